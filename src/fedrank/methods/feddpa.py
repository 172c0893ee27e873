"""FedDPA: a global and a local adapter side by side, trained in turn (Yang, Long, Shen, Jiang, Blumenstein, 2024, arXiv:2403.19211).

Taken from the paper's iterative variant (FedDPA-T): in each round the local adapter trains first, on top of
the frozen global one, then the global one, which alone travels. Settled here: both stand in every forward
pass with weight 1 and one scale, where the authors' code weighs each with 1/2 and by default trains the global
adapter without the local one. Left out: the weighting of the two by each test row's likeness to training rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedrank import levels
from fedrank.adapter import Adapter, to_arrays
from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Passes, Plan, State, Update, Updates
from fedrank.selection import everything


@dataclass(frozen=True)
class FedDPA:
    """W_k = W_0 + s (B A + D_k C_k), first D_k C_k and then B A; B A is averaged by examples, D_k C_k stays.

    private_rank: of the local adapter; the global one's where None.
    """

    private_rank: int | None = None

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Dual-Personalizing Adapter for Federated Foundation Models", year=2024,
        url="https://arxiv.org/abs/2403.19211", differs=("data",), travels="global A, B and head, both ways",
        exact_start=False, exact_aggregation=False, personal=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.private_rank is not None and self.private_rank < 1:
            raise ValueError(f"private_rank must be at least 1, or null for the global one's, got {self.private_rank}")

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        rank = self.private_rank or max(block.rank for block in state.adapter.blocks.values())
        # Each adapter has all of a round's steps for its own.
        return dict.fromkeys(cohort, Plan(everything(state.adapter), private=rank, passes=Passes(2.0, 2.0)))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            common, private = job.plan.train, levels.private(job, job.plan.private)
            plan = replace(job.plan, train=private.ids, frozen=common, learn=job.plan.learn.replace("h", ""))
            draws = int(job.rng("private").integers(1 << 62))  # batches of its own, not the global one's again
            mine = job.fit(replace(job, plan=plan, adapter=job.adapter.union(private), seed=draws))
            private = replace(mine.adapter, dense={})
            plan = replace(job.plan, frozen=private.ids)
            update = job.fit(replace(job, plan=plan, adapter=job.adapter.union(private)))
            summed = update.metrics.keys() - {"loss"}
            work = {name: mine.metrics[name] + update.metrics[name] for name in sorted(summed)}
            yield replace(update, private=to_arrays(private), metrics={**update.metrics, **work})

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))

    def adapt(self, job: Job) -> Adapter:
        return job.adapter.union(levels.private(job, job.plan.private))
