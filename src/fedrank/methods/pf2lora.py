"""PF2LoRA (reconstructed): a common and a private adapter per client, trained as two levels (Hao et al., 2025, arXiv:2503.03920).

Only the abstract and public reviews were available; these points were open. Hypergradient: through one SGD
step, exact for that step. Batches: the levels draw theirs apart. Scale: one for both adapters. The optimizer's
moments stay on the client between rounds. Clients count the same, as in the objective. The head is part of
the common level. Rank: nothing is pruned; a client's rank is the numerical one of the sum of both adapters as it
trained them, before the common ones are averaged, anywhere from r - r~ to r + r~. Left out of what the reconstruction
offers: one batch for both levels, several lower steps (unrolled, or at evaluation), both levels' gradients at once,
and private adapters that start anew in every round.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from fedrank import levels
from fedrank.adapter import Adapter, from_arrays, to_arrays
from fedrank.aggregation import WEIGHTS, average
from fedrank.protocol import About, ClientId, Device, Job, Lower, ModelSpec, Passes, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class PF2LoRA:
    """W_k = W_0 + s (B A + D_k C_k): B and A are averaged, D_k and C_k never leave their client.

    private_rank: r~ of D_k C_k, below the common one's r. rate: alpha, the lower level's SGD step. derivative:
    of the second-order term; "finite" where attention has no second derivative, "first" leaves it out.
    keep_moments: the upper optimizer goes on where the client left it. weights: of a client in the mean.
    threshold: tau, the share of the largest singular value above which one counts for the effective rank.
    """

    private_rank: int = 2
    rate: float = 0.1
    derivative: Literal["double", "finite", "first"] = "double"
    keep_moments: bool = True
    weights: Literal["uniform", "examples"] = "uniform"
    threshold: float = 0.05

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach via "
        "Two-Level LoRA", year=2025, url="https://arxiv.org/abs/2503.03920", differs=("rank", "data"),
        travels="common A, B and head, both ways; effective ranks up", exact_start=False, exact_aggregation=False,
        personal=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.private_rank < 0:
            raise ValueError(f"private_rank must be 0 or more, got {self.private_rank}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.threshold}")

    @property
    def lower(self) -> str | None:
        return self.derivative if self.private_rank else None

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        if self.private_rank >= spec.rank:
            raise ValueError(f"method.private_rank={self.private_rank} must be below adapter.rank={spec.rank}")
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        plan = Plan(
            everything(state.adapter), private=self.private_rank,
            passes=levels.PASSES[self.lower] if self.lower else Passes(),
            returns={"ranks": ("int32", (len(state.adapter.blocks),))},
        )  # fmt: skip
        return dict.fromkeys(cohort, plan)

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            kept = levels.moments(job.private) if self.keep_moments else {}
            lower = Lower(self.rate, levels.private(job, self.private_rank), self.derivative, kept)
            update = job.fit(job, lower=lower)
            own = from_arrays(update.private, job.spec.scale)
            ranks = levels.effective_ranks(update.adapter.union(own), job.spec, self.threshold)
            private = update.private if self.keep_moments else to_arrays(own)
            yield replace(update, private=private, arrays={"ranks": ranks})

    def merge(self, state: State, updates: Updates) -> State:
        adapter = average(state.adapter, updates, weight=WEIGHTS[self.weights])
        # All that the server learns of the private adapters.
        ranks = {f"ranks/{client}": update.arrays["ranks"] for client, update in updates}
        found = np.stack(list(ranks.values()))
        metrics = {"effective_rank": float(found.mean()), "rank_spread": float(found.mean(axis=1).std())}
        return state.next(adapter, arrays={**state.arrays, **ranks}, metrics=metrics)

    def adapt(self, job: Job) -> Adapter:
        return job.adapter.union(levels.private(job, self.private_rank))
