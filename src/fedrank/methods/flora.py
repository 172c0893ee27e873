"""FLoRA: stack the clients' factors, merge the stack into everyone's base, start afresh (Wang et al., 2024, arXiv:2409.05976).

Points that were open: the fresh A is one draw for all clients, of which each takes its leading rows, and it travels;
the merged updates are dealt out as factors, or as matrices once those are smaller.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedrank.adapter import Adapter, kaiming
from fedrank.aggregation import average
from fedrank.products import product_mean, promise
from fedrank.protocol import About, ClientId, Device, Job, ModelSpec, Plan, State, Update, Updates, rng
from fedrank.selection import leading


@dataclass(frozen=True)
class FLoRA:
    """B = [B_1 ... B_v], A = [p_1 A_1; ...; p_v A_v], so that B A = sum_k p_k B_k A_k exactly, at any ranks.

    The sum over the rounds is not limited to the adapter's rank; a client starts each round at the global function
    with a random A and B = 0.
    """

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", year=2024,
        url="https://arxiv.org/abs/2409.05976", differs=("rank", "data"),
        travels="up the client's A and B, and head; down everyone's A and B once, a fresh A, and head",
        exact_start=True, exact_aggregation=True, averages=False,
    )  # fmt: skip

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.lora(seed), arrays={"seed": np.array(seed), "rank": np.array(spec.rank)})

    def adopt(self, state: State, increment: Adapter) -> State:
        """An import goes into everyone's base, as a merge's increment does."""
        return replace(state, base_updates=promise(replace(state, round=-1), increment))

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan]:
        # B is zero whenever a round begins: it goes down once, on first contact, and stays so.
        return {client: Plan(leading(state.adapter, device.rank), down="Ah") for client, device in cohort.items()}

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        base_updates = promise(state, product_mean(state.adapter, updates))
        head = average(state.adapter, updates, parts="h").dense
        seed, rank = int(state.arrays["seed"]), int(state.arrays["rank"])
        fresh = kaiming(state.adapter.shapes, rank, state.adapter.scale, rng(seed, "fresh", state.round + 1))
        return state.next(replace(fresh, dense=head), base_updates=base_updates)
