"""Local training alone: every client fits its own adapter and nothing travels (the "local" models of Smith et al., 2017, arXiv:1705.10467)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class LocalOnly:
    """The control of every personal method: what a client reaches without the others, from the same start."""

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Federated Multi-Task Learning", year=2017, url="https://arxiv.org/abs/1705.10467", differs=("data",),
        travels="nothing", exact_start=False, exact_aggregation=False, personal=True, averages=False,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter), up="", down="", own="BeAh"))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(state.adapter)
