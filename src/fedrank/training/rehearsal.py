"""A local step that trains nothing: its update has the shape of a real one, for what hangs on shapes alone."""

import torch

from fedrank.adapter import to_arrays
from fedrank.protocol import Job, Lower, Observe, Update
from fedrank.training.hooks import live

STEP = 1e-3


def fit(job: Job, observe: Observe | None = None, lower: Lower | None = None) -> Update:
    """One small step along gradients that are drawn, so that choices by size or sensitivity are made by chance."""
    train, frozen = job.adapter.take(job.plan.train), job.adapter.take(job.plan.frozen)
    adapter = live(train, frozen, job.plan.learn, "cpu")
    draw = torch.Generator().manual_seed(int(job.rng("rehearsal").integers(1 << 62)))
    for grad in adapter.grads.values():
        grad.normal_(generator=draw)
    if observe is not None:
        observe(adapter.values, adapter.grads)
    for name, value in adapter.values.items():
        value.sub_(adapter.grads[name], alpha=STEP)
    private = {} if lower is None or lower.private is None else to_arrays(lower.private)
    metrics = {"loss": 0.0, "steps": 1.0, "seconds": 0.0, "rows_seen": float(job.device.examples)}
    return Update(adapter.export(train), examples=job.device.examples, metrics=metrics, private=private)
