"""A method of one's own: components join one after the other, so that the first ones learn the coarse part alone."""

import math
from dataclasses import dataclass
from typing import ClassVar

from fedrank.aggregation import average
from fedrank.protocol import Plan, State
from fedrank.selection import leading


@dataclass(frozen=True)
class Grow:
    """In round t of T the first ceil(rank * t / (share * T)) components learn; those that wait have B = 0.

    share: of the rounds, after which all of them learn.
    """

    share: float = 0.5

    default_lr: ClassVar[float] = 3e-3

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    def begin(self, spec, rounds, seed):
        return State(0, rounds, spec.lora(seed))

    def plan(self, state, cohort, seed):
        rank = max(block.rank for block in state.adapter.blocks.values())
        grown = min(rank, math.ceil(rank * (state.round + 1) / (self.share * state.rounds)))
        # The others are zero so far: neither learning nor frozen, they are absent and do not travel.
        return dict.fromkeys(cohort, Plan(train=leading(state.adapter, grown)))

    def train(self, jobs):
        return (job.fit(job) for job in jobs)

    def merge(self, state, updates):
        return state.next(average(state.adapter, updates))  # what nobody sent keeps its value
