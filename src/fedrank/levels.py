"""Two levels: the common adapter, which travels, and each client's private one, which never does."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from fedrank.adapter import Adapter, below, from_arrays, kaiming, recompress
from fedrank.protocol import Job, ModelSpec, Passes, rng

MOMENTS = "moments/"  # the upper optimizer's, beside the private adapter

# `Plan.passes` of one bilevel step. "double" goes back through the lower step's own backward pass, which costs two more;
# "finite" adds two whole passes; the upper and the lower batch are one each.
PASSES = {"double": Passes(2.0, 4.0), "finite": Passes(4.0, 4.0), "first": Passes(2.0, 2.0)}


def private(job: Job, rank: int) -> Adapter:
    """The client's private adapter: as its store holds it, else its start, of `rank` components per module.

    It starts as LoRA does (B = 0), so that the client's function is the common one; its ids follow the
    common ones, so that ``job.adapter.union(private)`` is all that the client has, at one scale.
    """
    if job.private:
        return from_arrays(job.private, job.spec.scale)
    if not rank:
        return Adapter({}, job.spec.scale, {})
    start = kaiming(job.spec.shapes, rank, job.spec.scale, rng(job.seed, "private", job.device.id))
    return replace(start, blocks={n: replace(b, ids=b.ids + job.spec.rank) for n, b in start.blocks.items()})


def moments(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The upper optimizer's moments among a client's private arrays."""
    return below(MOMENTS, arrays)


def effective_ranks(adapter: Adapter, spec: ModelSpec, tau: float) -> Int[np.ndarray, "modules"]:
    """Per module, how many singular values of its increment are above `tau` times the largest; 0 where it is zero.

    In floating point a sum of factors nearly always has full rank; this is the numerical one.
    """
    small = recompress(adapter).blocks
    spectra = [np.asarray(small[m.name].e) if m.name in small else np.zeros(0) for m in spec.modules]
    return np.array([(e > tau * e[:1]).sum() for e in spectra], np.int32)
