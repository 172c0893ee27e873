"""RoLoRA: learn and average B in one round and A in the next, the other frozen (Chen et al., 2024, arXiv:2409.02346)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class RoLoRA:
    """The frozen factor is common to all clients, so the mean of the other is the mean of the products.

    Odd rounds move B, which starts at zero, even rounds A. What learns now was frozen in the last round, and
    is kept from there by whoever took part in it; everyone else may hold an old one and gets both.
    """

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA", year=2024,
        url="https://arxiv.org/abs/2409.02346", differs=("data",),
        travels="B or A in turn and head, both ways; both down to a client that missed the last round",
        exact_start=True, exact_aggregation=True,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        moves, rests = "AB" if state.round % 2 else "BA"
        present = everything(state.adapter)
        plan = Plan(present, learn=f"{moves}h", up=f"{moves}h")
        return {c: replace(plan, down=f"{rests}h") if state.seen.get(c, -1) == state.round else plan for c in cohort}

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))
