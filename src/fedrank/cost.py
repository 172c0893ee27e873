"""What a plan costs: the bytes of its frames, predicted before anything is sent."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from fedrank.adapter import FACTORS, Adapter
from fedrank.frame import CHECKSUM, DTYPES, HEADER, Dtype, Sizes
from fedrank.protocol import ModelSpec, Plan


def factors(adapter: Adapter, sent: str, ranks: Mapping[str, int], dtype: Dtype) -> int:
    """Bytes of the factors in `sent` of so many components per module; shapes and form from `adapter`.

    A component is out + 1 + in numbers (B column, e, A row); int8 adds an f32 scale per vector, one
    per module for e.
    """
    size, scale = np.dtype(DTYPES[dtype]).itemsize, 4 if dtype == "int8" else 0
    total = 0
    for name, rank in ranks.items():
        for f in FACTORS:
            factor = getattr(adapter.blocks[name], f)
            if f in sent and factor is not None and rank:
                vector = 1 if f == "e" else factor.shape[0 if f == "B" else 1]
                total += rank * vector * size + scale * (1 if f == "e" else rank)
    return total


def dense(adapter: Adapter, sent: str, dtype: Dtype) -> int:
    """Bytes of the dense tensors; int8 adds an f32 scale per row."""
    if "h" not in sent:
        return 0
    size, scale = np.dtype(DTYPES[dtype]).itemsize, 4 if dtype == "int8" else 0
    return sum(t.size * size + scale * math.prod(t.shape[:-1]) for t in adapter.dense.values())


def block_flops(spec: ModelSpec) -> tuple[float, float]:
    """Forward FLOPs of one transformer block (the mean over blocks): per token, and per pair of tokens (attention)."""
    linear = sum(2.0 * map.out * map.in_ for map in spec.flow if map.block < spec.blocks)
    return linear / spec.blocks, 4.0 * spec.attention.width


def down(adapter: Adapter, plan: Plan, modules: int, dtype: Dtype, base: Iterable[Adapter] = ()) -> Sizes:
    """Bytes of the request by which this plan travels, for a model of so many adapted modules.

    base: the base updates that go with it (`increments.after`); always in f32.
    """
    ranks = {n: len(np.union1d(plan.train.get(n, []), plan.frozen.get(n, []))) for n in {**plan.train, **plan.frozen}}
    body, head = factors(adapter, plan.sent, ranks, dtype), dense(adapter, plan.sent, dtype)
    ids = sum(math.ceil(modules * plan.width / 8) for part in (plan.train, plan.frozen) if any(map(len, part.values())))
    arrays = sum(array.nbytes for array in plan.arrays.values())
    base = list(base)
    for update in base:
        body += 4 * sum(
            b.rank * (b.B.shape[0] + b.A.shape[1])
            for b in update.blocks.values()
            if b.B is not None and b.A is not None
        )
        body += 4 * sum(tensor.size for tensor in update.dense.values())
    rounds = len(base) * (8 + 4 * modules)  # which round each is of, and its rank in every module
    return Sizes(body, head, HEADER + body + head + ids + arrays + rounds + CHECKSUM)


def up(adapter: Adapter, plan: Plan, modules: int, dtype: Dtype) -> Sizes:
    """Bytes of the update that answers this plan (where it selects: of the components given in `adapter`)."""
    ranks = {n: len(ids) for n, ids in (plan.train if plan.select is None else adapter.ids).items()}
    body, head = factors(adapter, plan.up, ranks, dtype), dense(adapter, plan.up, dtype)
    ids = 0 if plan.select is None else math.ceil(modules * plan.width / 8)
    arrays = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in plan.returns.values())
    return Sizes(body, head, HEADER + body + head + ids + arrays + CHECKSUM)
