"""FFA-LoRA: freeze the random A, learn and average only B (Sun, Li, Li and Ding, 2024, arXiv:2403.12313)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class FFALoRA:
    """A is everywhere the run's first draw and travels once; so the mean of B is the mean of the products."""

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Improving LoRA in Privacy-preserving Federated Learning", year=2024,
        url="https://arxiv.org/abs/2403.12313", differs=("data",),
        travels="B and head, both ways; A down on first contact",
        exact_start=True, exact_aggregation=True,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter), learn="Bh", up="Bh", down="Bh"))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))
