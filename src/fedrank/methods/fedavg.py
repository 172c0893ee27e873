"""FedAvg over LoRA factors, also known as FedIT (Zhang et al., 2023, arXiv:2305.05644)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class FedAvg:
    """Every client trains all of A and B; the server averages A and B apart, weighted by examples.

    The product of the means is not the mean of the products: the aggregate is biased under skew.
    """

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Towards Building the Federated GPT: Federated Instruction Tuning", year=2023,
        url="https://arxiv.org/abs/2305.05644", differs=("data",), travels="A, B and head, both ways",
        exact_start=True, exact_aggregation=False,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return {client: Plan(train=everything(state.adapter)) for client in cohort}

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))
