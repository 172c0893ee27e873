"""FedProx: FedAvg whose clients are held near the global model by mu/2 |w - w_global|^2 (Li et al., 2020, arXiv:1812.06127)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class FedProx:
    """w is all that learns, the head included; mu = 0 is FedAvg. Of the paper's two parts this is the proximal term:
    local work of varying length is ``local.steps`` and ``rounds.deadline``.
    """

    mu: float = 0.01

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Federated Optimization in Heterogeneous Networks", year=2020, url="https://arxiv.org/abs/1812.06127",
        differs=("data",), travels="A, B and head, both ways", exact_start=True, exact_aggregation=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu must be a finite number of at least 0, got {self.mu}")

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter)))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job, observe=Proximal(self.mu)) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))


class Proximal:
    """Adds mu (w - w_global) to every gradient; w_global is what the first call sees, before any step."""

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.anchor: dict[str, Any] = {}

    def __call__(self, values: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
        for name, value in values.items():
            anchor = self.anchor.setdefault(name, value.clone())
            grads[name].add_(value - anchor, alpha=self.mu)
