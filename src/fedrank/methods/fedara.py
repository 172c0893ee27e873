"""FedARA (reconstructed): adaptive rank allocation with truncated-SVD adapters (Wu, Hu, Min, Wang, 2025, arXiv:2501.14406).

Only the paper's front matter was available: the equations follow AdaLoRA's public rule, and these points
were open. Form: every update is B diag(e) A with e = 0 at first, not an SVD of the weights; no penalty on
orthogonality. Scores: ranked over all modules jointly, not module by module, so that a module can empty;
their averages and the optimizer start afresh each round. Arbitration: clients vote with equal weights (T_h
is 0.5 in threshold mode); a local mask is a proposal and cuts nothing itself; removal is final. Budget:
counted in triplets, not parameters, and scheduled in rounds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from fedrank.adapter import Adapter, gaussian, norms
from fedrank.aggregation import average, vote
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates, rng
from fedrank.selection import by_module, cubic, everything, top


@dataclass(frozen=True)
class FedARA:
    """Triplets (b, e, a) train in SVD form; clients propose which to keep, the server decides.

    target_rank: mean components per module at the end (r_T). warmup, settle: shares of the rounds
    before the first and after the last arbitration (T_w, T_f). score: how a client ranks its triplets;
    "random" is a control. arbitration: "budget" keeps exactly b(t), "threshold" what at least that
    share of the clients wants. smoothing: beta_1 = beta_2 of the sensitivity and its uncertainty.
    """

    target_rank: int = 3
    warmup: float = 0.05
    settle: float = 0.30
    score: Literal["adalora", "magnitude", "random"] = "adalora"
    arbitration: Literal["budget", "threshold"] = "budget"
    threshold: float = 0.5
    smoothing: float = 0.85

    default_lr: ClassVar[float] = 1e-2
    about: ClassVar[About] = About(
        paper="Adaptive Rank Allocation for Federated Parameter-Efficient Fine-Tuning of Language Models", year=2025,
        url="https://arxiv.org/abs/2501.14406", differs=("data",),
        travels="B, e, A of the components still alive, and head, both ways; a bit mask up",
        exact_start=True, exact_aggregation=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.target_rank < 1:
            raise ValueError(f"target_rank must be at least 1, got {self.target_rank}")
        if not (self.warmup >= 0 and self.settle >= 0 and self.warmup + self.settle < 1):
            raise ValueError(f"warmup + settle must be below 1, got {self.warmup} + {self.settle}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        if self.target_rank > spec.rank:
            raise ValueError(f"method.target_rank={self.target_rank} is above adapter.rank={spec.rank}")
        adapter = gaussian(spec.shapes, spec.rank, spec.scale, rng(seed, "begin"))
        births = {"start": np.array(adapter.components), "end": np.array(self.target_rank * len(adapter.blocks))}
        return State(0, rounds, spec.with_head(adapter), arrays=births)

    def budget(self, state: State) -> int | None:
        """b(t) for the round to come; None outside the window in which masks are made."""
        # At least one round of warm-up: at the very first step e = 0, so every score is 0. And at least one
        # round after it, so that a short run reaches its target too.
        settle = max(0, min(math.floor(self.settle * state.rounds), state.rounds - 2))
        warmup = max(1, min(math.ceil(self.warmup * state.rounds), state.rounds - settle - 1))
        round = state.round + 1
        if not warmup < round <= state.rounds - settle:
            return None
        start, end = int(state.arrays["start"]), int(state.arrays["end"])
        return cubic(round, state.rounds, start, end, warmup, settle)

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        plan = Plan(train=everything(state.adapter))
        if (budget := self.budget(state)) is not None:
            bits = math.ceil(state.adapter.components / 8)
            plan = replace(plan, arrays={"budget": np.array(budget)}, returns={"keep": ("uint8", (bits,))})
        return dict.fromkeys(cohort, plan)

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            if "budget" not in job.plan.arrays:
                yield job.fit(job)
                continue
            sensitivity = Sensitivity(self.smoothing)  # fresh each round: with partial participation it goes stale
            update = job.fit(job, observe=sensitivity if self.score == "adalora" else None)
            scores = self.rank(update.adapter, sensitivity, job)
            # A proposal only: zeroing the rest here would shrink what other clients keep.
            mask = top(int(job.plan.arrays["budget"]), scores)
            yield replace(update, arrays={"keep": np.packbits(mask)})

    def rank(self, adapter: Adapter, sensitivity: "Sensitivity", job: Job) -> np.ndarray:
        """The client's score of each triplet, over all modules jointly."""
        if self.score == "adalora":
            return sensitivity.triplets(adapter)
        if self.score == "magnitude":
            return np.concatenate(list(norms(adapter).values()))
        return rng(job.seed, "random masks", job.round).random(adapter.components)  # the same on every client

    def merge(self, state: State, updates: Updates) -> State:
        adapter = average(state.adapter, updates)
        budget = self.budget(state)
        if budget is None:
            return state.next(adapter)
        count = adapter.components
        share = vote(updates, "keep", count)
        if self.arbitration == "threshold":
            keep = share >= self.threshold
            if not keep.any():  # a module may go to zero, the model may not
                keep = np.ones(count, bool)
        else:
            keep = top(min(budget, count), share, np.concatenate(list(norms(adapter).values())))
        # Removed means deleted, here and so on every client and on the wire: it never returns.
        kept = adapter.take(by_module(adapter, keep))
        return state.next(
            kept, metrics={"budget": float(budget), "agreement": float(np.mean(np.maximum(share, 1 - share)))}
        )


class Sensitivity:
    """AdaLoRA's score: smoothed |w dL/dw| times its smoothed uncertainty, averaged over a triplet.

    Called with the values before the optimizer's step (a clean first-order Taylor term).
    """

    def __init__(self, smoothing: float) -> None:
        self.beta = smoothing
        self.mean: dict[str, Any] = {}
        self.uncertainty: dict[str, Any] = {}

    def __call__(self, values: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
        for factor, value in ((f, v) for f, v in values.items() if f in "BeA"):
            now = (value * grads[factor]).abs_()
            if factor not in self.mean:
                self.mean[factor], self.uncertainty[factor] = now * 0, now * 0
            mean = self.mean[factor].mul_(self.beta).add_(now, alpha=1 - self.beta)
            self.uncertainty[factor].mul_(self.beta).add_(now.sub_(mean).abs_(), alpha=1 - self.beta)

    def triplets(self, adapter: Adapter) -> np.ndarray:
        """Q = q(e) + mean q(a) + mean q(b) for each component, in module and id order."""
        q = {f: (self.mean[f].double() * self.uncertainty[f].double()).cpu().numpy() for f in "BeA"}
        blocks = adapter.blocks.values()
        lengths = {
            "B": np.concatenate([np.full(b.rank, b.B.shape[0]) for b in blocks if b.B is not None]),
            "A": np.concatenate([np.full(b.rank, b.A.shape[1]) for b in blocks if b.A is not None]),
        }
        scores: np.ndarray = q["e"].copy()
        for factor, length in lengths.items():
            scores += np.add.reduceat(q[factor], np.concatenate([[0], np.cumsum(length)[:-1]])) / length
        return scores
