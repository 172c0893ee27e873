"""What a step costs by the number of blocks that learn, as for LEGEND's and late FedARA's clients.

python benchmarks/depth.py DATA: seconds and peak memory of MiniLM's last 6, 5, ... 1 blocks, in turns, with the states
below them kept and computed anew, beside the share of the FLOPs. DATA holds clinc150/ and 20news/.
"""

import argparse
import ctypes
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import median

import machine
import numpy as np

from fedrank import config, cost
from fedrank.adapter import Adapter
from fedrank.parts import prepare
from fedrank.protocol import Device, Job, Plan, rng
from fedrank.training import local

RESULTS = Path(__file__).parent / "results" / "depth.json"
STEPS, BATCH = 10, 16


def settings(path: Path) -> dict:
    return {
        "model": {"name": "minilm"}, "data": {"path": str(path), "test_limit": 64}, "clients": {"count": 1},
        "local": {"lr": 0.003, "batch_size": BATCH, "max_length": 64}, "rounds": {"count": 1, "cohort": 1},
    }  # fmt: skip


def peak() -> int:
    """The peak resident size of this process since it was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def timed(trainer: local.Trainer, job: Job, rows: np.ndarray) -> float:
    """Seconds of a step, after training once for kernels and for what is kept: of each row, the last depth's states."""
    with trainer.session():
        trainer.fit(job, rows)
        started = time.perf_counter()
        trainer.fit(job, rows)
        return (time.perf_counter() - started) / STEPS


def above(trainer: local.Trainer, job: Job, rows: np.ndarray) -> int:
    """Bytes by which training lifts the peak of a new process that shares the model."""
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is still here would be taken without a trace
    read, write = os.pipe()
    if not (child := os.fork()):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak()
        timed(trainer, job, rows)
        os.write(write, str(peak() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as found:
        return int(found.read())


def job(trainer: local.Trainer, adapter: Adapter, depth: int, rows: np.ndarray) -> Job:
    blocks = trainer.model.spec.blocks
    names = [module.name for module in trainer.model.spec.modules if module.block >= blocks - depth]
    plan = Plan({name: adapter.blocks[name].ids for name in names})
    settings = config.Local(lr=0.003, batch_size=BATCH)
    return Job(plan, 1, 1, trainer.model.spec, adapter, (), {}, settings, Device("0", len(rows)), 0, print)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    found = {"machine": machine.describe(), "steps": STEPS, "batch": BATCH, "data": {}}
    for name in ("clinc150", "20news"):
        parts = prepare(config.load(settings(args.data / name)))
        adapter, rows = parts.begin.adapter, rng(0, "rows").permutation(len(parts.trainer.train))[: STEPS * BATCH]
        compute = parts.trainer.compute
        trainers = {
            kind: local.Trainer(
                parts.trainer.model, parts.trainer.train, parts.trainer.test, 3e-3, 1, "cpu", compute, prefix_bytes=room
            )
            for kind, room in (("kept", parts.config.engine.prefix_bytes), ("anew", 0))
        }
        depths = range(parts.spec.blocks, 0, -1)
        jobs = {depth: job(parts.trainer, adapter, depth, rows) for depth in depths}
        lengths = parts.trainer.train.lengths
        load = local.workload(rows, lengths, jobs[1].local, partial(jobs[1].rng, "batches"), parts.trainer.frozen.packs)
        seconds = {(kind, depth): list[float]() for depth in depths for kind in trainers}
        memory = {(kind, depth): above(trainers[kind], jobs[depth], rows) for kind, depth in seconds}
        for _ in range(args.repeats):
            for kind, depth in seconds:
                seconds[kind, depth].append(timed(trainers[kind], jobs[depth], rows))
        whole = sum(cost.flops(parts.spec, adapter, jobs[max(depths)].plan, load))
        found["data"][name] = {
            f"{kind}, {depth} blocks": {
                "step_seconds": {"median": median(times), "least": min(times), "most": max(times)},
                "share_of_seconds": median(times) / median(seconds[kind, max(depths)]),
                "share_of_flops": sum(cost.flops(parts.spec, adapter, jobs[depth].plan, load)) / whole,
                "training_bytes": memory[kind, depth],
            }
            for (kind, depth), times in seconds.items()
        }
        for key, row in found["data"][name].items():
            print(
                name, key, {k: (round(v["median"], 4) if isinstance(v, dict) else round(v, 3)) for k, v in row.items()}
            )
        RESULTS.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
