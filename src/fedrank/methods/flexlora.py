"""FlexLoRA: average the clients' products, send each the leading part of their SVD (Bai et al., 2024, arXiv:2402.11505).

Where the mean has a lower rank than the adapter, the components beyond it go on with B = 0 and the A they had.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedrank.adapter import truncate
from fedrank.aggregation import WEIGHTS, average
from fedrank.products import product_mean
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import leading


@dataclass(frozen=True)
class FlexLoRA:
    """dW = sum_k p_k B_k A_k = U S V^T, truncated to the adapter's rank; a client trains its first r_k components.

    split: "left" is B = U S, A = V^T, "even" is B = U S^1/2, A = S^1/2 V^T. weights: p_k by examples, or all alike.
    The mean is exact but for the truncation. What a client of low rank does not get counts as zero in its product, so
    directions that few can train shrink from round to round (raFLoRA's rank collapse).
    """

    split: Literal["left", "even"] = "left"
    weights: Literal["examples", "uniform"] = "examples"

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", year=2024,
        url="https://arxiv.org/abs/2402.11505", differs=("rank", "data"),
        travels="the client's leading components of A and B, and head, both ways",
        exact_start=False, exact_aggregation=False, averages=False,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        return {client: Plan(train=leading(state.adapter, device.rank)) for client, device in cohort.items()}

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        weight = WEIGHTS[self.weights]
        mean = product_mean(state.adapter, updates, weight)
        old = average(state.adapter, updates, weight, parts="h")
        return state.next(truncate(mean, old, power=1.0 if self.split == "left" else 0.5))
