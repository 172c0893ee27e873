"""Which components take part: selections under a budget, and budget schedules over rounds."""

import numpy as np
from jaxtyping import Bool, Float

from fedrank.adapter import Adapter, split


def everything(adapter: Adapter) -> dict[str, np.ndarray]:
    """All components of the adapter."""
    return adapter.ids


def leading(adapter: Adapter, rank: int) -> dict[str, np.ndarray]:
    """The first `rank` components of every module, or all where it has fewer."""
    return {name: block.ids[:rank] for name, block in adapter.blocks.items()}


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
