"""Exactness: how far clients start from the global function, and how far a merge ends from the mean of theirs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedrank.adapter import FACTORS, Adapter, Block
from fedrank.aggregation import WEIGHTS, uniform
from fedrank.products import Increment
from fedrank.protocol import ClientId, Plan, State, Update, Updates

Ids = Mapping[str, np.ndarray]
Present = Callable[[ClientId, Update], tuple[Ids, Ids]]


def factor_norm(adapter: Adapter) -> float:
    """|B|_F + |e| + |A|_F, summed over modules.

    Of what a client's start lacks of the global adapter, and summed over a round's clients, this is the paper's N_Init
    (Zhang, Hu, Xu, 2026, eq. 2): what a client has, it has as it is. It tells factors apart that make the same function.
    """
    rows = (rows for block in adapter.blocks.values() for rows in block.rows.values())
    return math.fsum(np.linalg.norm(factor.astype(np.float64)) for factor in rows)


def covariance(updates: Updates, weight: Callable[[Update], float] = uniform) -> float:
    """|sum_j mean_i (B_ij - mean B_j)(A_ij - mean A_j)|_F times the scale, means over those who trained j.

    How far apart the clients' factors went, and what a mean of factors over contributors loses of the mean of products:
    Fed-PLoRA's own figure of its aggregation noise. A method that merges otherwise loses something else, or nothing
    (`errors`). A module of which only one factor came adds nothing: the other was the same for all.
    """
    found, total = Increment(), updates.total(lambda update: update.adapter, weight)
    for _, update in updates:
        blocks, shares = {}, {}
        for name, block in update.adapter.blocks.items():
            if block.e is not None:
                raise ValueError(f"module {name!r}: the covariance is of B and A alone")
            if block.B is None or block.A is None:
                continue
            sums = total.sums.blocks[name]
            at = np.searchsorted(sums.ids, block.ids)
            mean, weights = sums.at(at), total.weights[name][at]
            blocks[name] = Block(block.ids, block.B - mean.B / weights, None, block.A - mean.A / weights[:, None])
            shares[name] = weight(update) / weights
        found.add(Adapter(blocks, update.adapter.scale, {}), shares)
    return found.norm()


def errors(
    before: State, after: State, updates: Updates, present: Present, weight: Callable[[Update], float] = uniform
) -> dict[str, float]:
    """The figures of one merge. present: the components of a client's model at its start and at its end.

    start_error: |what a client starts from - the global function|_F, mean over clients. n_init: the same between
    factors, summed over them, while no base update holds a part of the global function. agg_eq3: |mean of what
    clients trained - the new global function|_F (the paper's eq. 3). agg_fullmodel: the same with the mean of the
    clients' whole functions. Heads, and low precision on the wire, are left out. Memory: all updates stacked, until
    their ranks sum up to a side of the module's matrix, and from there on that matrix.
    """
    old, mean, starts, n_init, total = before.adapter, Increment(), list[float](), 0.0, 0.0
    rest = {name: np.zeros(block.rank) for name, block in old.blocks.items()}
    for client, update in updates:
        started, ended = present(client, update)
        absent, returned, share = old.without(started), update.adapter.ids, weight(update)
        starts.append(Increment().add(absent).norm())
        n_init += factor_norm(absent)
        mean.add(update.adapter.fill(old), share)
        for name, ids in ended.items():
            kept = np.setdiff1d(ids, returned.get(name, []))
            rest[name][np.isin(old.blocks[name].ids, kept)] += share
        total += share
    mean.add(after.adapter, -total).add_base(after.base_updates.values(), -total)
    mean.add_base(before.base_updates.values(), total)
    found = {"start_error": float(np.mean(starts)), "agg_eq3": mean.norm() / total}
    found["agg_fullmodel"] = mean.add(old, rest).norm() / total
    return found if before.base_updates else found | {"n_init": n_init}


def noted(method: Any, before: State, after: State, plans: Mapping[ClientId, Plan], updates: Updates) -> State:
    """The state after a merge with its `errors` and their `covariance` among the metrics, under the method's weights.

    Where clients keep components of their own, nobody but they knows their functions: only the covariance of the
    common factors is noted; where they keep factors of a component, nothing is.
    """
    if any(set(FACTORS) & (set(plans[c].own) | (set(plans[c].learn) - set(plans[c].up))) for c, _ in updates):
        return after
    weight = WEIGHTS[getattr(method, "weights", "examples")]

    def present(client: ClientId, update: Update) -> tuple[Ids, Ids]:
        here = plans[client].present
        return here, (update.adapter.ids if getattr(method, "prunes", False) else here)

    found = {}
    if "e" not in before.adapter.factors:
        found["agg_cov"] = covariance(updates, weight)
    if not any(plans[client].private for client, _ in updates):
        found |= errors(before, after, updates, present, weight)
    return replace(after, metrics={**found, **after.metrics})
