"""HetLoRA: each client trains the leading components that its device can hold (Cho, Liu, Xu, Fahrezi and Joshi, 2024, arXiv:2401.06432).

Only accounts of the paper were available, and these points were open. Sparsity weight: one per client, the
norm over all its modules, for the head too. Self-pruning: one rank per client for all modules; the tail's
norm products are summed over modules, in the penalty and in the test. Padding: spans the largest rank among
the round's updates; a component that none of them carries keeps its value, since with zeros in both of its
factors it could never learn again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from fedrank.adapter import Adapter
from fedrank.aggregation import WEIGHTS, Absent, average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Observe, Plan, State, Update, Updates
from fedrank.selection import leading


@dataclass(frozen=True)
class HetLoRA:
    """A client of rank r gets, trains and returns the first r components of every module, at one common scale.

    form: "uniform" pads with zeros and counts clients equally; "full" pads, weighs a client by the norm of
    its product, and lets it prune its own rank; "contributor" takes the mean over those who carry a
    component (a control). Of "full": gamma: the share of its rank that a client keeps when it prunes, below
    which lies the tail. penalty: lambda on the tail's |B| |A|. min_rank: no client prunes below it.
    """

    form: Literal["uniform", "full", "contributor"] = "full"
    gamma: float = 0.99
    penalty: float = 1e-3
    min_rank: int = 1

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", year=2024,
        url="https://arxiv.org/abs/2401.06432", differs=("rank", "data"),
        travels="A and B of the client's leading components and head, both ways",
        exact_start=False, exact_aggregation=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be above 0 and below 1, got {self.gamma}")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be a finite number of at least 0, got {self.penalty}")
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be at least 1, got {self.min_rank}")

    @property
    def weights(self) -> Literal["norm", "uniform"]:
        """What a client counts by."""
        return "norm" if self.form == "full" else "uniform"

    @property
    def prunes(self) -> bool:
        """Whether a client's model may lose components in a round."""
        return self.form == "full"

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        plans = {}
        for client, device in cohort.items():
            limits = [device.rank, state.arrays.get(f"rank/{client}")]
            train = leading(state.adapter, min([_rank(state.adapter), *(int(r) for r in limits if r is not None)]))
            # Which components come back says whether it pruned.
            plans[client] = Plan(train, select=sum(map(len, train.values())) if self.form == "full" else None)
        return plans

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            if self.form != "full":
                yield job.fit(job)
                continue
            received = job.adapter.take(job.plan.train)
            kept = leading(received, max(self.min_rank, math.floor(self.gamma * _rank(received))))
            update = job.fit(job, observe=_shrink(received, kept, self.penalty))
            pruned = _product(update.adapter.without(kept)) < _product(received.without(kept))
            yield replace(update, adapter=update.adapter.take(kept)) if pruned else update

    def merge(self, state: State, updates: Updates) -> State:
        absent: Absent = "skip" if self.form == "contributor" else "zero"
        adapter = average(state.adapter, updates, WEIGHTS[self.weights], absent)
        if self.form != "full":
            return state.next(adapter)
        ranks = {f"rank/{client}": np.array(max(1, _rank(update.adapter))) for client, update in updates}
        metrics = {"mean_rank": float(np.mean(list(ranks.values())))}
        return state.next(adapter, arrays={**state.arrays, **ranks}, metrics=metrics)


def _rank(adapter: Adapter) -> int:
    return max((block.rank for block in adapter.blocks.values()), default=0)


def _product(adapter: Adapter) -> float:
    """|B|_F |A|_F, summed over modules."""
    pairs = [(b.B, b.A) for b in adapter.blocks.values() if b.B is not None and b.A is not None]
    return float(sum(np.linalg.norm(b) * np.linalg.norm(a) for b, a in pairs))


def _shrink(received: Adapter, kept: Mapping[str, np.ndarray], penalty: float) -> Observe:
    """An observer that adds the gradient of penalty * |B| |A| of each module's components beyond `kept`."""
    tails: list[dict[str, slice]] = []
    ends = {"B": 0, "A": 0}
    for name, block in received.blocks.items():
        tail = {}
        for f, width in (("B", block.B.shape[0]), ("A", block.A.shape[1])):  # type: ignore[union-attr]
            tail[f] = slice(ends[f] + len(kept[name]) * width, ends[f] + block.rank * width)
            ends[f] = tail[f].stop
        tails.append(tail)

    def observe(values: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
        for tail in tails:
            for f, other in ("BA", "AB"):
                mine, theirs = values[f][tail[f]], values[other][tail[other]]
                grads[f][tail[f]] += mine * (penalty * theirs.norm() / mine.norm().clamp(min=1e-12))

    return observe
