"""Two levels: the common adapter, which travels, and each client's private one, which never does."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from fedrank.adapter import FACTORS, Adapter, Block, kaiming, recompress
from fedrank.protocol import Job, ModelSpec, rng

MOMENTS = "moments/"  # the upper optimizer's, beside the private adapter

# Forward and backward passes of one bilevel step, for the costs. "double" goes back through the lower step's own
# backward pass, which costs two more; "finite" adds two whole passes; the upper and the lower batch are one each.
PASSES = {"double": (2.0, 4.0), "finite": (4.0, 4.0), "first": (2.0, 2.0)}


def private(job: Job, rank: int) -> Adapter:
    """The client's private adapter: as its store holds it, else its start, of `rank` components per module.

    It starts as LoRA does (B = 0), so that the client's function is the common one; its ids follow the
    common ones, so that ``job.adapter.union(private)`` is all that the client has, at one scale.
    """
    if job.private:
        return unpack(job.private, job.spec.scale)
    if not rank:
        return Adapter({}, job.spec.scale, {})
    start = kaiming(job.spec.shapes, rank, job.spec.scale, rng(job.seed, "private", job.device.id))
    return replace(start, blocks={n: replace(b, ids=b.ids + job.spec.rank) for n, b in start.blocks.items()})


def pack(adapter: Adapter) -> dict[str, np.ndarray]:
    """The adapter as arrays by name, for `Update.private`."""
    arrays = {f"h/{name}": tensor for name, tensor in adapter.dense.items()}
    for name, block in adapter.blocks.items():
        factors = {f: getattr(block, f) for f in FACTORS if getattr(block, f) is not None}
        arrays |= {f"{f}/{name}": factor for f, factor in factors.items()} | {f"ids/{name}": block.ids}
    return arrays


def unpack(arrays: Mapping[str, np.ndarray], scale: float) -> Adapter:
    """The adapter that `pack` wrote; other arrays beside it are left out."""
    parts = {name: name.partition("/")[2] for name in arrays}
    blocks = {
        module: Block(arrays[name], *(arrays.get(f"{f}/{module}") for f in FACTORS))
        for name, module in parts.items() if name.startswith("ids/")
    }  # fmt: skip
    return Adapter(blocks, scale, {part: arrays[name] for name, part in parts.items() if name.startswith("h/")})


def moments(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The upper optimizer's moments among a client's private arrays."""
    return {name.removeprefix(MOMENTS): array for name, array in arrays.items() if name.startswith(MOMENTS)}


def effective_ranks(adapter: Adapter, spec: ModelSpec, tau: float) -> Int[np.ndarray, "modules"]:
    """Per module, how many singular values of its increment are above `tau` times the largest; 0 where it is zero.

    In floating point a sum of factors nearly always has full rank; this is the numerical one.
    """
    small = recompress(adapter).blocks
    spectra = [np.asarray(small[m.name].e) if m.name in small else np.zeros(0) for m in spec.modules]
    return np.array([(e > tau * e[:1]).sum() for e in spectra], np.int32)
