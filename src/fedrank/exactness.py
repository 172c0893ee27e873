"""Exactness: how far clients start from the global function, and how far a merge ends from the mean of theirs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from fedrank.adapter import FACTORS, Adapter, Block
from fedrank.aggregation import WEIGHTS, uniform
from fedrank.protocol import ClientId, Plan, State, Update, Updates

SLOW = 2  # a number in a QR costs about as much as so many in a product
Present = Callable[[ClientId, Update], Mapping[str, np.ndarray]]


@dataclass(eq=False)
class _Sum:
    """One module's increment: stacked factors, or the matrix from where that is smaller on. float64."""

    lefts: list[Float[np.ndarray, "r out"]] = field(default_factory=list)
    rights: list[Float[np.ndarray, "r in"]] = field(default_factory=list)
    whole: Float[np.ndarray, "out in"] | None = None

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        self.lefts.append(left)
        self.rights.append(right)
        out, in_ = left.shape[1], right.shape[1]
        if sum(map(len, self.lefts)) * (out + in_) >= out * in_:
            self.add_whole(np.concatenate(self.lefts).T @ np.concatenate(self.rights))
            self.lefts, self.rights = [], []

    def add_whole(self, matrix: np.ndarray) -> None:
        self.whole = matrix if self.whole is None else self.whole + matrix

    def square(self) -> float:
        """The squared Frobenius norm."""
        if not self.lefts:
            return 0.0 if self.whole is None else float(np.sum(np.square(self.whole)))
        left, right = np.concatenate(self.lefts).T, np.concatenate(self.rights).T
        if self.whole is None and SLOW * (left.size + right.size) < len(left) * len(right):
            # X Y' has the norm of the product of the triangles of X and Y. Gram matrices would give it too, but
            # their round-off is squared: two equal functions would seem 1e-8 apart.
            triangles = [np.asarray(np.linalg.qr(side, mode="r")) for side in (left, right)]
            return float(np.sum(np.square(triangles[0] @ triangles[1].T)))
        matrix = left @ right.T
        return float(np.sum(np.square(matrix if self.whole is None else self.whole + matrix)))


@dataclass(eq=False)
class Increment:
    """A running weighted sum of increments, all modules; no (out, in) matrix while the factors are smaller."""

    modules: dict[str, _Sum] = field(default_factory=dict)

    def add(self, adapter: Adapter, weight: float | Mapping[str, np.ndarray] = 1.0) -> "Increment":
        """Add weight * delta_W; a weight by module is one per component."""
        for name, block in adapter.blocks.items():
            if block.B is None or block.A is None:
                raise ValueError(f"module {name!r}: the increment needs both B and A")
            size = np.broadcast_to(weight[name] if isinstance(weight, Mapping) else weight, block.rank)
            size = adapter.scale * (size if block.e is None else size * block.e.astype(np.float64))
            if (there := np.flatnonzero(size)).size:
                left = block.B.T[there].astype(np.float64) * size[there, None]
                self.modules.setdefault(name, _Sum()).add(left, block.A[there].astype(np.float64))
        return self

    def add_base(self, updates: Iterable[Adapter], weight: float = 1.0) -> "Increment":
        """Add weight * the increments of a frozen base, in their order; a whole tensor sums up all before it."""
        updates = list(updates)
        last = {name: at for at, update in enumerate(updates) for name in update.dense}
        for at, update in enumerate(updates):
            self.add(update.take({n: ids for n, ids in update.ids.items() if at > last.get(n, -1)}), weight)
            for name, tensor in update.dense.items():
                if last[name] == at:
                    self.modules.setdefault(name, _Sum()).add_whole(weight * tensor.astype(np.float64))
        return self

    def norm(self) -> float:
        """The Frobenius norm, over all modules together."""
        return float(np.sqrt(sum(module.square() for module in self.modules.values())))


def factor_distance(one: Adapter, two: Adapter) -> float:
    """|B - B'|_F + |e - e'| + |A - A'|_F, summed over modules; components are matched by id, a missing one is zero.

    Summed over a round's clients, between the global adapter and what each starts from, this is the paper's N_Init
    (Zhang, Hu, Xu, 2026, eq. 2). It tells factors apart that make the same function.
    """
    found = 0.0
    for name in {**one.blocks, **two.blocks}:
        pair = [a.blocks[name] for a in (one, two) if name in a.blocks]
        ids = np.unique(np.concatenate([block.ids for block in pair]))
        for f in FACTORS:
            difference: np.ndarray | float = 0.0
            for sign, block in zip((1.0, -1.0), pair, strict=False):
                if (factor := getattr(block, f)) is not None:
                    rows = np.asarray(factor.T if f == "B" else factor, np.float64).reshape(block.rank, -1)
                    full = np.zeros((len(ids), rows.shape[1]))
                    full[np.searchsorted(ids, block.ids)] = sign * rows
                    difference = difference + full
            found += float(np.linalg.norm(difference))
    return found


def covariance(updates: Updates, weight: Callable[[Update], float] = uniform) -> float:
    """|sum_j mean_i (B_ij - mean B_j)(A_ij - mean A_j)|_F times the scale, means over those who trained j.

    Fed-PLoRA's own figure of its aggregation noise; it is the distance to the clients' mean function only where
    all of them trained every component.
    """
    found, total = Increment(), updates.total(lambda update: update.adapter, weight)
    for _, update in updates:
        blocks, shares = {}, {}
        for name, block in update.adapter.blocks.items():
            if block.B is None or block.A is None or block.e is not None:
                raise ValueError(f"module {name!r}: the covariance is of B and A alone")
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
    """The figures of one merge. present: the components that a client's model had, those it trained among them.

    start_error: |what a client starts from - the global function|_F, mean over clients. n_init: the same between
    factors, summed over them. agg_eq3: |mean of what clients trained - the new global function|_F (the paper's
    eq. 3). agg_fullmodel: the same with the mean of the clients' whole functions. Heads, and low precision on the
    wire, are left out. Memory: all updates stacked, or one matrix per adapted module where that is smaller.
    """
    old, mean, starts, n_init, total = before.adapter, Increment(), list[float](), 0.0, 0.0
    rest = {name: np.zeros(block.rank) for name, block in old.blocks.items()}
    for client, update in updates:
        here, returned, share = present(client, update), update.adapter.ids, weight(update)
        absent = old.without(here)
        starts.append(Increment().add(absent).norm())
        n_init += factor_distance(absent, replace(absent, blocks={}))
        mean.add(update.adapter.fill(old), share)
        for name, ids in here.items():
            kept = np.setdiff1d(ids, returned.get(name, []))
            rest[name][np.isin(old.blocks[name].ids, kept)] += share
        total += share
    mean.add(after.adapter, -total).add_base(after.base_updates.values(), -total)
    mean.add_base(before.base_updates.values(), total)
    eq3 = mean.norm() / total
    full = mean.add(old, rest).norm() / total
    return {"start_error": float(np.mean(starts)), "n_init": n_init, "agg_eq3": eq3, "agg_fullmodel": full}


def noted(method: Any, before: State, after: State, plans: Mapping[ClientId, Plan], updates: Updates) -> State:
    """The state after a merge with its `errors` among the metrics, under the method's own weights.

    Where clients keep factors or components of their own, nobody but they knows their functions: nothing is noted.
    """
    if "agg_fullmodel" in after.metrics:  # the method measures itself
        return after
    for client, _ in updates:
        plan = plans[client]
        if plan.private or set(FACTORS) & (set(plan.own) | (set(plan.learn) - set(plan.up))):
            return after

    def present(client: ClientId, update: Update) -> dict[str, np.ndarray]:
        train, frozen = plans[client].train, plans[client].frozen
        return {n: np.union1d(train.get(n, []), frozen.get(n, [])) for n in {**train, **frozen}}

    counted = getattr(method, "weights", "examples")
    if counted not in WEIGHTS:
        known = ", ".join(WEIGHTS)
        raise ValueError(f"rounds.exactness: {type(method).__name__} weighs clients by {counted!r}; known are {known}")
    weight = WEIGHTS[counted]
    return replace(after, metrics={**errors(before, after, updates, present, weight), **after.metrics})
