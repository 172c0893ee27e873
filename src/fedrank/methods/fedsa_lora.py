"""FedSA-LoRA: share and average A, keep B with each client (Guo, Zeng, Wang, Fan, Wang and Qu, 2025, arXiv:2410.01463)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class FedSALoRA:
    """Both factors learn; A is thought to hold what clients have in common, B what is each one's own.

    The head is shared too (``adapter.head=own`` keeps it with the client).
    """

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Selective Aggregation for Low-Rank Adaptation in Federated Learning", year=2025,
        url="https://arxiv.org/abs/2410.01463", differs=("data",), travels="A and head, both ways; B never",
        exact_start=False, exact_aggregation=False, personal=True,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter), learn="BAh", up="Ah", down="Ah", own="B"))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))
