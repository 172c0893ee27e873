"""Aggregation rules: weighted sums and means of adapters in float64, and votes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from fedrank.adapter import FACTORS, Adapter, Block
from fedrank.protocol import Total, Update, Updates

Absent = Literal["skip", "zero", "old"]


@dataclass(eq=False)
class _Sum:
    """The running sum of one module: components by rows, so that B is held as (r, out)."""

    ids: np.ndarray
    rows: dict[str, np.ndarray]
    weights: np.ndarray

    def reindex(self, ids: np.ndarray) -> None:
        at = np.searchsorted(ids, self.ids)
        for name, rows in self.rows.items():
            self.rows[name] = np.zeros((len(ids), *rows.shape[1:]))
            self.rows[name][at] = rows
        weights, self.weights, self.ids = self.weights, np.zeros(len(ids)), ids
        self.weights[at] = weights

    def add(self, block: Block, weight: float) -> None:
        if not np.array_equal(block.ids, self.ids):
            union = np.union1d(self.ids, block.ids)
            if len(union) != len(self.ids):
                self.reindex(union)
        parts = block.rows
        if parts.keys() != self.rows.keys():
            odd = ", ".join(sorted(parts.keys() ^ self.rows.keys()))
            raise ValueError(f"factor {odd} is in some updates of a module and not in others")
        whole = len(block.ids) == len(self.ids)
        at = slice(None) if whole else np.searchsorted(self.ids, block.ids)
        self.weights[at] += weight
        for name, rows in parts.items():
            part = rows.astype(np.float64)
            part *= weight
            if whole:  # x[:] += y would write x twice
                self.rows[name] += part
            else:
                self.rows[name][at] += part


def total(parts: Iterable[tuple[Adapter, float]]) -> Total:
    """The sum of weight * adapter, taken in the order given; absent components add nothing.

    The summands must share one scale; only one of them is in memory at a time beside the sums.
    """
    modules: dict[str, _Sum] = {}
    dense: dict[str, np.ndarray] = {}
    weights: dict[str, float] = {}
    scale, whole = None, 0.0
    for adapter, weight in parts:
        if scale is not None and adapter.scale != scale:
            raise ValueError(f"adapters of scale {scale} and {adapter.scale} cannot be added factor by factor")
        scale = adapter.scale
        whole += weight
        for name, block in adapter.blocks.items():
            if name not in modules:
                zeros = {f: np.zeros(rows.shape) for f, rows in block.rows.items()}
                modules[name] = _Sum(block.ids, zeros, np.zeros(block.rank))
            modules[name].add(block, weight)
        for name, tensor in adapter.dense.items():
            dense[name] = dense.get(name, 0.0) + np.multiply(tensor, weight, dtype=np.float64)
            weights[name] = weights.get(name, 0.0) + weight
    if scale is None:
        raise ValueError("nothing to sum: no update arrived")
    blocks = {name: Block.of(s.ids, s.rows) for name, s in modules.items()}
    by_part = {name: s.weights for name, s in modules.items()}
    return Total(Adapter(blocks, scale, dense), {**by_part, **{n: np.array(w) for n, w in weights.items()}}, whole)


def examples(update: Update) -> float:
    """FedAvg's weight: the number of training rows behind an update."""
    return float(update.examples)


def uniform(update: Update) -> float:
    """Every client counts the same."""
    return 1.0


def norm(update: Update) -> float:
    """|B A|_F of an update without e, over all its modules: HetLoRA's sparsity weight.

    As tr((B'B)(A A')) of each module: no (out, in) matrix is formed. Where all products are zero, clients count alike.
    """
    square = 0.0
    for name, block in update.adapter.blocks.items():
        if block.B is None or block.A is None or block.e is not None:
            raise ValueError(f"module {name!r}: the norm is of B A alone")
        b, a = block.B.astype(np.float64), block.A.astype(np.float64)
        square += float(np.sum((b.T @ b) * (a @ a.T)))
    return max(math.sqrt(max(square, 0.0)), 1e-30)


WEIGHTS: dict[str, Callable[[Update], float]] = {"examples": examples, "uniform": uniform, "norm": norm}


def average(
    old: Adapter, updates: Updates, weight: Callable[[Update], float] = examples, absent: Absent = "skip",
    parts: str = "BeAh",
) -> Adapter:  # fmt: skip
    """Factor-wise weighted mean over the updates, per component.

    absent: what a client that lacks a component counts as: "skip" leaves it out of the mean, "zero"
    averages zeros in (zero padding), "old" lets it vote for the old value. What no update carries
    keeps its old value, and so do factors (and with "h" the dense tensors) that are not in `parts`.
    The result has the dtype of `old`.
    """
    found = updates.total(lambda update: update.adapter.only(parts), weight)
    blocks = {}
    for name in dict.fromkeys([*old.blocks, *found.sums.blocks]):
        if name not in found.sums.blocks:
            blocks[name] = old.blocks[name]
            continue
        new, weights = found.sums.blocks[name], found.weights[name]
        before = old.blocks.get(name)
        blocks[name] = _mean(before, new, weights, found.weight, absent)
    dense = dict(old.dense)
    for name, summed in found.sums.dense.items():
        part = float(found.weights[name])
        dense[name] = _blend(summed, part, old.dense[name], found.weight, absent).astype(old.dense[name].dtype)
    return Adapter(blocks, old.scale, dense)


def _blend(summed: np.ndarray, part: Float[np.ndarray, "*n"] | float, old: np.ndarray, whole: float,
           absent: Absent) -> np.ndarray:  # fmt: skip
    if absent == "skip":
        return summed / part
    if absent == "old":
        summed = summed + (whole - part) * old
    return summed / whole


def _mean(old: Block | None, new: Block, weights: np.ndarray, whole: float, absent: Absent) -> Block:
    ids = new.ids if old is None else np.union1d(old.ids, new.ids)
    fresh, before = new.rows, {} if old is None else old.rows
    rows = {}
    for f in FACTORS:
        if f not in fresh:
            if f in before:
                if old is None or len(ids) != old.rank:
                    raise ValueError(f"new components came without factor {f}")
                rows[f] = before[f]
            continue
        width = fresh[f].shape[1:]
        full = np.zeros((len(ids), *width))
        if f in before and old is not None:
            full[np.searchsorted(ids, old.ids)] = before[f]
        at = np.searchsorted(ids, new.ids)
        share = weights.reshape(-1, *[1] * len(width))
        full[at] = _blend(fresh[f], share, full[at], whole, absent)
        rows[f] = full.astype(before[f].dtype if f in before else np.float32)
    return Block.of(ids, rows)


def vote(updates: Updates, name: str, size: int) -> Float[np.ndarray, "n"]:
    """The share of updates whose packed bit mask `name` (of `size` bits) holds each bit, uniform weights.

    A bit counts 1/2 or -1/2, so that an update without a mask stands for neither.
    """

    def ballot(update: Update) -> Adapter:
        mask = update.arrays.get(name)
        return Adapter({}, 1.0, {name: np.zeros(size) if mask is None else np.unpackbits(mask, count=size) - 0.5})

    found = updates.total(ballot, uniform)
    return np.asarray((found.sums.dense[name] + found.weight / 2) / found.weight)
