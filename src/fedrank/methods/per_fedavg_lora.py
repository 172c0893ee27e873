"""Per-FedAvg over LoRA: learn an adapter from which one step on a client's own data goes far (Fallah, Mokhtari, Ozdaglar, 2020, arXiv:2002.07948).

Open was what a LoRA adapter makes of it: all that learns takes both steps, the head too; the outer one is
AdamW's, as in every method here. A client predicts after one step on one batch of its training rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedrank import levels
from fedrank.adapter import Adapter, from_arrays
from fedrank.aggregation import WEIGHTS, average
from fedrank.protocol import About, ClientId, Device, Job, Lower, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class PerFedAvgLoRA:
    """x moves along (I - alpha H) grad f(x - alpha grad f(x)); clients count the same.

    rate: alpha, the step by which a client makes the model its own. derivative: of the second-order term;
    "finite" where attention has no second derivative (HF), "first" leaves it out (FO).
    """

    rate: float = 0.01
    derivative: Literal["double", "finite", "first"] = "double"

    default_lr: ClassVar[float] = 3e-3
    weights: ClassVar[str] = "uniform"
    about: ClassVar[About] = About(
        paper="Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning Approach",
        year=2020, url="https://arxiv.org/abs/2002.07948", differs=("data",), travels="A, B and head, both ways",
        exact_start=True, exact_aggregation=False, personal=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")

    @property
    def lower(self) -> str:
        return self.derivative

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter), passes=levels.PASSES[self.derivative]))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            # Nothing stays with a client: the optimizer starts afresh each round.
            yield replace(job.fit(job, lower=Lower(self.rate, derivative=self.derivative)), private={})

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates, weight=WEIGHTS[self.weights]))

    def adapt(self, job: Job) -> Adapter:
        # The received adapter as a lower level of which nothing is above: it takes SGD steps.
        plan, one = replace(job.plan, train={}, frozen={}), job.local.model_copy(update={"steps": 1})
        alone = replace(job, plan=plan, adapter=Adapter({}, job.adapter.scale, {}), local=one)
        return from_arrays(
            job.fit(alone, lower=Lower(self.rate, job.adapter, self.derivative)).private, job.adapter.scale
        )
