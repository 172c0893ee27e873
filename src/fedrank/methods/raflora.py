"""raFLoRA: FlexLoRA's products, each rank partition averaged over those that train it (Wu, Hu, Min, Wang, 2026, arXiv:2602.13486).

Only the abstract and another's account of the rule were available. The partitions lie between the fleet's rank
levels, and within one all components have the same contributors; so the mean over a component's own contributors is
the mean over its partition's, and the server need not know the levels, which must not hang on who came back.
A partition without contributors keeps what it was. Where the mean has a lower rank than the adapter, the components
beyond it go on with B = 0 and the A they had.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedrank.adapter import truncate
from fedrank.aggregation import average
from fedrank.products import product_mean
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import leading


@dataclass(frozen=True)
class RaFLoRA:
    """dW = sum_j sum_{k holds j} (n_k / N_j) b_kj a_kj, N_j the examples of those that hold component j; then its SVD.

    B = U S^1/2, A = S^1/2 V^T at the adapter's rank; a client trains its first r_k components.
    """

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity", year=2026,
        url="https://arxiv.org/abs/2602.13486", differs=("rank", "data"),
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
        mean = product_mean(state.adapter, updates, absent="skip")
        return state.next(truncate(mean, average(state.adapter, updates, parts="h"), power=0.5))
