"""FedEx-LoRA: average the factors, and give everyone's base what their product lacks (Singhal, Ponkshe, Vepakomma, 2024, arXiv:2410.09432).

The residuals are dealt out as factors, or as matrices once those are smaller; means are weighted by examples.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedrank.aggregation import average
from fedrank.products import promise, residual
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class FedExLoRA:
    """A and B as in FedAvg, and W0 <- W0 + s (sum_k p_k B_k A_k - B A), so that the global function is exactly the mean.

    A server optimizer has no place here: the residual belongs to just these means. Ranks are equal, as published.
    """

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", year=2024,
        url="https://arxiv.org/abs/2410.09432", differs=("data",),
        travels="A, B and head, both ways; down also the residuals of the rounds since the client's last",
        exact_start=True, exact_aggregation=True, averages=False,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return {client: Plan(train=everything(state.adapter)) for client in cohort}

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        mean = average(state.adapter, updates)
        return state.next(mean, base_updates=promise(state, residual(mean, updates)))
