"""LoRA-A2: train B and A in turn, each client only the rank-one pieces that matter to it (Koo, Jang, Ok, 2024, arXiv:2410.22815).

Points that were open: B learns in the first round, as A alone cannot move while B = 0. The epoch that scores is the
first of the round's own and what it learnt on the chosen pieces is kept; the optimizer starts afresh after it. Where
a round is given in steps, one pass over the client's rows scores. The head, frozen in the paper, learns as in all
other methods unless the config freezes it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedrank.adapter import Adapter, norms
from fedrank.aggregation import average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import by_module, everything, top


@dataclass(frozen=True)
class LoRAA2:
    """One factor learns per round, the other is frozen and common, so the mean of the factor is that of the products.

    A client of rank r_k keeps, of all N modules together, the r_k N pieces with the largest |db_j| |a_j| (or
    |b_j| |da_j|). Those that did not choose a piece count as no change of it: one chosen by few moves little.
    a_rate: the learning rate while A learns, as a multiple of that for B.
    """

    a_rate: float = 1.0

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients", year=2024,
        url="https://arxiv.org/abs/2410.22815", differs=("rank", "data"),
        travels="down A, B and head; up the chosen pieces of A or B with their ids, and head",
        exact_start=True, exact_aggregation=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.a_rate < math.inf:
            raise ValueError(f"a_rate must be above 0 and finite, got {self.a_rate}")

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        moving = "Bh" if state.round % 2 == 0 else "Ah"
        every, modules = everything(state.adapter), len(state.adapter.blocks)
        largest = max(block.rank for block in state.adapter.blocks.values())
        # Both factors travel down: whoever missed a round has old ones of both.
        return {
            client: Plan(every, learn=moving, up=moving, select=min(device.rank or largest, largest) * modules)
            for client, device in cohort.items()
        }

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            if "A" in job.plan.learn:
                rate = self.a_rate * (job.local.lr or self.default_lr)
                job = replace(job, local=job.local.model_copy(update={"lr": rate}))
            yield self.choose(job)

    def choose(self, job: Job) -> Update:
        """Score in a first epoch, and in those that remain train only what was chosen; the rest goes back."""
        assert job.plan.select is not None
        if job.plan.select >= job.adapter.components:
            return job.fit(job)
        first, remaining = _epochs(job)
        scored = job.fit(first)
        scores = change(job.adapter, scored.adapter, "B" if "B" in job.plan.learn else "A")
        chosen = by_module(scored.adapter, top(job.plan.select, scores))
        kept, others = scored.adapter.take(chosen), job.adapter.without(chosen)
        if remaining is None:
            return replace(scored, adapter=kept)
        plan = replace(job.plan, train=kept.ids, frozen=others.ids)
        last = job.fit(replace(remaining, plan=plan, adapter=kept.union(others)))
        return replace(last, metrics=_together(scored.metrics, last.metrics))

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates, absent="old"))


def change(old: Adapter, new: Adapter, factor: str) -> np.ndarray:
    """The size |db_j| |a_j| or |b_j| |da_j| of each component's change, in module and id order."""
    moved = {
        name: replace(block, **{factor: getattr(block, factor) - getattr(old.blocks[name], factor)})
        for name, block in new.blocks.items()
    }
    return np.concatenate(list(norms(replace(new, blocks=moved)).values()))


def _epochs(job: Job) -> tuple[Job, Job | None]:
    """The job of the epoch that scores, and that of the rest of the round, on batches of its own."""
    local = job.local
    epoch = math.ceil(job.device.examples / local.batch_size)
    if local.steps is None:
        parts = [{"epochs": 1}, {"epochs": local.epochs - 1}]
    else:
        parts = [{"steps": min(local.steps, epoch)}, {"steps": local.steps - epoch}]
    first, remaining = (replace(job, local=local.model_copy(update=part)) for part in parts)
    left = max(parts[1].values()) > 0
    return first, replace(remaining, seed=int(job.rng("remaining").integers(1 << 62))) if left else None


def _together(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, Any]:
    """The metrics of two stretches of one training: counts add up, the loss is the mean over all steps."""
    steps = one["steps"] + two["steps"]
    sums = {name: one[name] + two[name] for name in two}
    return sums | {"loss": (one["loss"] * one["steps"] + two["loss"] * two["steps"]) / steps}
