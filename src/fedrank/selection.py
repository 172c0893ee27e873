"""Which components take part: selections under a budget or a deadline, and schedules of ranks and budgets."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from fedrank.adapter import Adapter, split
from fedrank.protocol import Address, rng


def everything(adapter: Adapter) -> dict[str, np.ndarray]:
    """All components of the adapter."""
    return adapter.ids


def others(adapter: Adapter, ids: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All components but these; a module left with none is absent."""
    result = {}
    for name, block in adapter.blocks.items():
        if name not in ids:
            result[name] = block.ids
        elif len(ids[name]) < block.rank:
            left = np.ones(block.rank, bool)
            left[block.ids.searchsorted(ids[name])] = False
            result[name] = block.ids[left]
    return result


def leading(adapter: Adapter, rank: int | None) -> dict[str, np.ndarray]:
    """The first `rank` components of every module, all of them where it is None or larger."""
    return {name: ids[:rank] for name, ids in adapter.ids.items()}


def cubic(round: int, rounds: int, start: int, end: int, warmup: int, settle: int) -> int:
    """AdaLoRA's cubic budget in rounds 1..`rounds`: `start` through the warm-up, `end` while it settles.

    b(t) = ceil(end + (start - end) (1 - (t - warmup) / (rounds - settle - warmup))^3) in between.
    """
    if round <= warmup:
        return start
    if round > rounds - settle:
        return end
    last = rounds - settle
    left, window = last - round, last - warmup
    return end - (end - start) * left**3 // window**3  # whole numbers: a float cube rounds some budgets up by one


def top(budget: int, *keys: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """The mask of the `budget` entries largest by the first key, ties by the next ones, then by position."""
    order = np.lexsort([-key for key in reversed(keys)])
    mask = np.zeros(len(keys[0]), bool)
    mask[order[:budget]] = True
    return mask


def by_module(adapter: Adapter, mask: Bool[np.ndarray, "n"]) -> dict[str, np.ndarray]:
    """A mask over all components, in module and id order, as ids by module."""
    parts = split(mask, (block.rank for block in adapter.blocks.values()))
    return {name: block.ids[part] for (name, block), part in zip(adapter.blocks.items(), parts, strict=True)}


def sampled(adapter: Adapter, rank: int, seed: int, *address: Address) -> dict[str, np.ndarray]:
    """`rank` components of every module, uniformly without replacement; each module has a draw of its own."""
    result = {}
    for name, block in adapter.blocks.items():
        if rank >= block.rank:  # each draw has an address of its own: none depends on another
            result[name] = block.ids
            continue
        result[name] = rng(seed, "select", *address, name).choice(block.ids, rank, replace=False)
        result[name].sort()
    return result


def largest(
    adapter: Adapter, rank: int, seed: int, *address: Address, sizes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The `rank` components of the largest size of every module; ties, such as norms at first, where B = 0, are drawn."""
    return {
        name: block.ids[top(rank, sizes[name], rng(seed, "select", *address, name).random(block.rank))]
        for name, block in adapter.blocks.items()
    }


def arithmetic(layers: int, budget: int, least: int = 2) -> Int[np.ndarray, "layers"]:
    """Ranks that rise evenly from the input side to the output and sum up to `budget`.

    The first is `least`, or less where the budget is smaller; in whole numbers, what rounding down leaves goes
    to the largest fractions, ties to the later layer. ValueError where there is not one rank per layer.
    """
    if not 0 < layers <= budget:
        raise ValueError(f"a budget of {budget} ranks cannot give each of {layers} layers one")
    least = budget if layers == 1 else min(least, budget // layers)
    # x_l = least + l * rise / run, in whole numbers: fractions of floats would tie, or not, by accident
    at, run = np.arange(float(layers)), max(1, layers * (layers - 1))
    rise = 2 * (budget - layers * least) * at
    ranks = least + rise // run
    return np.asarray(ranks + top(int(budget - ranks.sum()), rise % run, at), int)


def suffix(adapter: Adapter, layer: Int[np.ndarray, "modules"], depth: int) -> dict[str, np.ndarray]:
    """All components of the last `depth` layers. layer: of each module, in the adapter's order, from 0 at the input."""
    inside = layer > layer.max() - depth
    return {name: block.ids for (name, block), deep in zip(adapter.blocks.items(), inside, strict=True) if deep}


def depths(
    seconds: Float[np.ndarray, "n layers"],
    caps: Int[np.ndarray, "n"],
    least: int = 1,
    slack: float = 0.0,
    quantile: float = 0.0,
) -> tuple[Int[np.ndarray, "n"], float]:
    """The largest depth of each client under one deadline, and that deadline (LEGEND's greedy).

    seconds: of a client's round at depth 1, 2, ..., never falling; a row of NaN where unknown: that client gets
    `least`. caps: the depth a client is capable of; below `least` it gets 0, sits out, and sets no deadline.
    By the deadline the slowest can do `least` and the fastest all layers (or this `quantile` of full rounds);
    `slack` is added as a share of it. It is NaN where no one's seconds are known.
    """
    result = np.where(caps >= least, least, 0)
    known = (result > 0) & ~np.isnan(seconds[:, 0])
    if not known.any():
        return result, math.nan
    times, able = seconds[known], caps[known]
    # Caps do not count here: one fast client short of memory must not shorten everybody's round.
    anchor = float(np.quantile(times[:, -1], quantile))
    if (deepest := able.max()) < seconds.shape[1]:  # no one can do all layers: as many as can be are covered
        anchor = max(anchor, times[able == deepest, deepest - 1].min())
    deadline = max(times[:, least - 1].max(), anchor) * (1 + slack)
    reached = times <= deadline * (1 + 1e-12)  # equal but for the order of a sum
    result[known] = np.minimum(reached.sum(axis=1), able)
    return result, float(deadline)
