"""Seconds and peak memory of training steps under one state of a run: python benchmarks/step_cost.py RUN first|last."""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedrank import config
from fedrank.protocol import Device, Job, Plan
from fedrank.selection import everything
from fedrank.store import Store
from fedrank.training import data, local, models, tasks

STEPS, BATCH, LENGTH = 20, 16, 32


def peak() -> int:
    """The peak resident size of this process since it was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    path, when = Path(sys.argv[1]), sys.argv[2]
    settings = config.load(path / "config.yaml", [f"local.steps={STEPS}", f"local.batch_size={BATCH}"])
    rows = data.load(None, settings.data.path, "classify", settings.data.columns.model_dump(), 2000, 0)
    model = models.load(settings, rows.labels)
    encoded = tasks.encode(rows.train, model.tokenizer, "classify", LENGTH)
    count = len(encoded)  # every row fills the length
    fields = {name: np.resize(ids, count * LENGTH) for name, ids in encoded.fields.items()}
    encoded = tasks.Encoded(fields, LENGTH * np.arange(count + 1), encoded.labels, encoded.pad)
    trainer = local.Trainer(model, encoded, encoded, 1e-3, 1, "cpu")
    state, _ = Store.open(path).state(0 if when == "first" else None)
    fit = partial(trainer.fit, rows=np.arange(STEPS * BATCH))
    plan = Plan(train=everything(state.adapter))
    job = Job(plan, 1, 1, model.spec, state.adapter, (), {}, settings.local, Device("0", STEPS * BATCH), 0, fit)

    with trainer.session():
        warm = settings.local.model_copy(update={"steps": 2})
        fit(replace(job, local=warm))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak()
        started = time.perf_counter()
        fit(job)
        seconds = (time.perf_counter() - started) / STEPS

    print(json.dumps({"step_seconds": seconds, "peak_bytes": peak(), "peak_over_start_bytes": peak() - before}))


if __name__ == "__main__":
    main()
