"""Fed-PLoRA: parallel one-rank modules, of which each client trains a few (Zhang, Hu, Xu, 2026, arXiv:2602.16936).

Most of the paper was read, but not its algorithm listing, ablations and code. These points were open. A module
that nobody trained in a round keeps its value. The means are over the clients that came back, and uniform. The
scale is one for all, clients and server (the paper's alpha = rank is s = 1: set adapter.alpha to adapter.rank);
with alpha / rank of each client, none would start from the global function. There is no dropout on the adapter,
under which folded and frozen modules would differ. Which modules a client trains is drawn by the server and
travels as bits. The head is averaged as the rest is; the authors' habit, a frozen random one, is adapter.head: frozen.
The start error and the three figures of aggregation noise are the server's, by rounds.exactness.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from fedrank.adapter import norms
from fedrank.aggregation import WEIGHTS, average
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything, largest, leading, others, sampled


@dataclass(frozen=True)
class FedPLoRA:
    """The server holds R one-rank modules per matrix; a client of rank r_i trains r_i of them (Select-N-Fold).

    selection: afresh for every round, client and matrix ("random"), the first r_i ("fixed"), or those of the
    largest norm, ties drawn ("weight_norm"). rest: what a client does not train stays in its forward pass
    ("freeze"), goes into its copy of the base ("fold": the same function and gradients, and costed as the same), or
    does not travel and is missing ("drop", an ablation). weights: of the clients, in the mean over those who trained
    a module.
    """

    selection: Literal["random", "fixed", "weight_norm"] = "random"
    rest: Literal["freeze", "fold", "drop"] = "freeze"
    weights: Literal["uniform", "examples"] = "uniform"

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation", year=2026,
        url="https://arxiv.org/abs/2602.16936", differs=("rank", "data"),
        travels="all of A and B down, the trained modules up; head both ways",
        exact_start=True, exact_aggregation=False,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        choose, plans = self.choice(state, seed), {}
        for client, device in cohort.items():
            train = everything(state.adapter) if device.rank is None else choose(device.rank, client)
            plans[client] = Plan(train, {} if self.rest == "drop" else others(state.adapter, train))
        return plans

    def choice(self, state: State, seed: int) -> Callable[[int, ClientId], dict[str, np.ndarray]]:
        """A rank and a client -> K_i per matrix, for the round to come."""
        adapter, round = state.adapter, state.round + 1
        if self.selection == "fixed":
            return lambda rank, client: leading(adapter, rank)
        if self.selection == "random":
            return lambda rank, client: sampled(adapter, rank, seed, round, client)
        sizes = norms(adapter)
        return lambda rank, client: largest(adapter, rank, seed, round, client, sizes=sizes)

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            if self.rest == "fold" and job.plan.frozen:
                folded = job.adapter.take(job.plan.frozen).only("BeA")  # less the head, which is no part of the base
                updates = (*job.base_updates, folded)
                job = replace(job, plan=replace(job.plan, frozen={}), base_updates=updates)
            yield job.fit(job)

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates, WEIGHTS[self.weights]))
