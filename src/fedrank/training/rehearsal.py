"""A local step that trains nothing: its update has the shape of a real one, for what hangs on shapes alone."""

from dataclasses import replace

import torch

from fedrank.adapter import FACTORS, to_arrays
from fedrank.protocol import Job, Lower, Observe, Update
from fedrank.training.hooks import live

STEP = 1e-3  # as far as AdamW first moves every number that learns, so that not all changes are of size zero


def fit(job: Job, observe: Observe | None = None, lower: Lower | None = None) -> Update:
    """Every learning number moves by `STEP`; gradients, where they are observed, are drawn."""
    train, learn = job.adapter.take(job.plan.train), job.plan.learn
    if observe is not None:
        adapter = live(train, job.adapter.take(job.plan.frozen), learn, "cpu")
        draw = torch.Generator().manual_seed(int(job.rng("rehearsal").integers(1 << 62)))
        for grad in adapter.grads.values():
            grad.normal_(generator=draw)
        observe(adapter.values, adapter.grads)
    blocks = {}
    for name, block in train.blocks.items():
        parts = {f: getattr(block, f) for f in FACTORS if f in learn}
        blocks[name] = replace(block, **{f: p + p.dtype.type(STEP) for f, p in parts.items() if p is not None})
    private = {} if lower is None or lower.private is None else to_arrays(lower.private)
    metrics = {"loss": 0.0, "steps": 1.0, "seconds": 0.0, "rows_seen": float(job.device.examples)}
    return Update(replace(train, blocks=blocks), job.device.examples, metrics, private=private)
