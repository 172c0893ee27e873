"""What a step costs by the number of blocks that learn, as for LEGEND's and late FedARA's clients.

python benchmarks/depth.py DATA: seconds and peak memory of MiniLM's last 6, 5, ... 1 blocks, and of what FedARA has left
after 20 rounds, in turns, beside the share of the FLOPs: with the states below kept, with these yet to be computed (a
client's first time), and in every pass anew. DATA holds clinc150/ and 20news/.
"""

import argparse
import ctypes
import json
import os
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import machine
import numpy as np

import fedrank
from fedrank import config, cost
from fedrank.adapter import Adapter
from fedrank.parts import Parts, prepare
from fedrank.protocol import Device, Job, Plan, rng
from fedrank.store import Store
from fedrank.training import local, workload

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


def timed(trainer: local.Trainer, job: Job, rows: np.ndarray, first: bool = False) -> float:
    """Seconds of a step, after training once for kernels and for what is kept: of each row, the last depth's states.

    first: of what is kept, nothing is left.
    """
    with trainer.session():
        trainer.fit(job, rows)
        if first:
            for kept in trainer.kept.values():
                kept.stamps[:] = 0
        started = time.perf_counter()
        trainer.fit(job, rows)
        return (time.perf_counter() - started) / STEPS


def above(trainer: local.Trainer, job: Job, rows: np.ndarray, first: bool = False) -> int:
    """Bytes by which training lifts the peak of a new process that shares the model and what is kept, as in timed()."""
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is still here would be taken without a trace
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = peak()
            timed(trainer, job, rows, first)
            os.write(write, str(peak() - before).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    os.close(write)
    with os.fdopen(read) as found:
        if not (text := found.read()):
            raise SystemExit(f"training in a new process ended with {os.waitstatus_to_exitcode(status)}")
        return int(text)


def pruned(path: Path) -> tuple[Adapter, Adapter]:
    """FedARA's adapter before its first round and after its last."""
    raw = settings(path) | {
        "clients": {"count": 100}, "rounds": {"count": 20, "cohort": 10, "evaluate_every": 20, "personal": 0},
        "adapter": {"rank": 12}, "method": {"name": "fedara", "target_rank": 1},
    }  # fmt: skip
    raw["local"] |= {"lr": 0.01, "steps": 5}
    with TemporaryDirectory() as folder:
        fedrank.run(raw, out=Path(folder) / "run")
        store = Store.open(Path(folder) / "run")
        return store.state(0)[0].adapter, store.state()[0].adapter


def jobs(parts: Parts, path: Path, rows: np.ndarray) -> dict[str, tuple[str, Job]]:
    """What is timed, each beside the one it is compared with."""
    adapter, spec = parts.begin.adapter, parts.spec
    local = config.Local(lr=0.003, batch_size=BATCH)

    def job(adapter: Adapter, names: Iterable[str]) -> Job:
        plan = Plan({name: adapter.blocks[name].ids for name in names})
        return Job(plan, 1, 1, spec, adapter, (), {}, local, Device("0", len(rows)), 0, print)

    found = {
        f"{depth} blocks": (
            f"{spec.blocks} blocks",
            job(adapter, (m.name for m in spec.modules if m.block >= spec.blocks - depth)),
        )
        for depth in range(spec.blocks, 0, -1)
    }
    for when, left in zip(("first", "last"), pruned(path), strict=True):
        found[f"fedara's {when} round"] = "fedara's first round", job(left, left.blocks)
    return found


def measured(path: Path, repeats: int) -> dict[str, dict]:
    parts = prepare(config.load(settings(path)))
    teacher = parts.trainer
    rows = rng(0, "rows").permutation(len(teacher.train))[: STEPS * BATCH]
    rooms = {"kept": teacher.prefix_bytes, "yet to be kept": teacher.prefix_bytes, "anew": 0}
    trainers = {kind: replace(teacher, prefix_bytes=room) for kind, room in rooms.items()}
    for trainer in trainers.values():  # made once, and shared by who trains
        trainer.frozen.ready()
        assert trainer.frozen.blocks is not None
        assert bool(trainer.kept) == bool(trainer.prefix_bytes)
    cases = jobs(parts, path, rows)
    timings = {(kind, what): list[float]() for what in cases for kind in trainers}
    memory = {
        (kind, what): median([above(trainers[kind], cases[what][1], rows, kind == "yet to be kept")
                              for _ in range(1 + repeats)][1:])  # the first one may have to compute what is kept
        for kind, what in timings
    }  # fmt: skip
    for _ in range(repeats):
        for kind, what in timings:
            timings[kind, what].append(timed(trainers[kind], cases[what][1], rows, kind == "yet to be kept"))

    def flops(job: Job) -> float:
        draw = partial(job.rng, "batches")
        load = workload.workload(rows, teacher.train, job.local, draw, teacher.frozen.packs)
        return sum(cost.flops(parts.spec, job.adapter, job.plan, load))

    found = {}
    for (kind, what), times in timings.items():
        whole = cases[what][0]
        seconds = median(times) / median(timings[kind, whole])
        work = flops(cases[what][1]) / flops(cases[whole][1])
        found[f"{what}, states below {kind}"] = {
            "step_seconds": {"median": median(times), "least": min(times), "most": max(times)},
            "share_of_seconds": seconds, "share_of_flops": work,
            "training_bytes": memory[kind, what], "share_of_bytes": memory[kind, what] / memory[kind, whole],
            "met": {"time falls as the FLOPs do, less 15 %": 1 - seconds >= 0.85 * (1 - work),
                    "memory falls": memory[kind, what] < memory[kind, whole]} if what != whole else {},
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    found = {"machine": machine.describe(), "steps": STEPS, "batch": BATCH, "data": {}}
    for name in ("clinc150", "20news"):
        found["data"][name] = measured(args.data / name, args.repeats)
        for key, row in found["data"][name].items():
            print(name, key, {k: v if k == "met" else round(v["median"] if isinstance(v, dict) else v, 4)
                              for k, v in row.items()})  # fmt: skip
        RESULTS.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
