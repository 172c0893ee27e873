"""Steps of two levels beside steps of one, of two commits in turns: python benchmarks/bilevel.py DATA BEFORE AFTER

BEFORE and AFTER are checkouts, DATA a folder such as clinc150. A process trains three clients of MiniLM on one thread, eight
steps each, after one to warm up, as the engine chooses to compute here; the next pair goes the other way round.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np

METHODS = {
    "one level": ("method.name=fedavg",),
    "two levels": ("method.name=pf2lora",),
    "two levels, first order": ("method.name=pf2lora", "method.derivative=first"),
    "two levels, differences": ("method.name=pf2lora", "method.derivative=finite"),
    "per-FedAvg": ("method.name=per_fedavg_lora",),
}
CLIENTS, STEPS = 3, 8


def steps(data: Path) -> None:
    """Seconds per step of every method, and the norm of what the last client came to."""
    from fedrank import config, parts
    from fedrank.protocol import Job

    found = {}
    for name, overrides in METHODS.items():
        base = {
            "model": {"name": "minilm"}, "data": {"path": str(data), "train_limit": 3000, "partition": {"kind": "iid"}},
            "clients": {"count": 20}, "rounds": {"count": 1, "cohort": 4}, "adapter": {"rank": 8},
            "local": {"steps": STEPS, "batch_size": 16, "max_length": 32},
        }  # fmt: skip
        made = parts.prepare(config.load(base, list(overrides)))
        devices, seconds = dict(list(made.devices.items())[: CLIENTS + 1]), []
        plans = made.method.plan(made.begin, devices, 1)
        for client, device in devices.items():
            mine = made.held(client)
            fit = partial(made.trainer.fit, rows=mine.train, encoded=mine.encoded)
            job = Job(plans[client], 1, 1, made.spec, made.begin.adapter, (), {}, made.config.local, device, 1, fit)
            with made.trainer.session():
                started = time.perf_counter()
                (update,) = made.method.train([job])
                seconds.append((time.perf_counter() - started) / STEPS)
        norm = np.sqrt(
            sum(float(np.square(part).sum()) for b in update.adapter.blocks.values() for part in b.rows.values())
        )
        found[name] = {"seconds": float(np.mean(seconds[1:])), "norm": norm, "compute": made.config.engine.compute}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    if args.before is None:
        steps(args.data)
        return
    trees = {"before": args.before.resolve(), "after": args.after.resolve()}
    records: dict[str, list[dict[str, Any]]] = {which: [] for which in trees}
    for pair in range(args.pairs):
        for which in sorted(trees, reverse=pair % 2 == 0):
            env = {**os.environ, "PYTHONPATH": str(trees[which] / "src"), "OMP_NUM_THREADS": "1"}
            told = subprocess.run(
                [sys.executable, __file__, str(args.data.resolve())], env=env, stdout=subprocess.PIPE, check=True
            )
            records[which].append(json.loads(told.stdout.splitlines()[-1]))
            print(which, {name: round(one["seconds"], 3) for name, one in records[which][-1].items()}, flush=True)
    ratios = {
        name: [
            b[name]["seconds"] / a[name]["seconds"] for a, b in zip(records["before"], records["after"], strict=True)
        ]
        for name in METHODS
    }
    commits = {which: machine.commit(tree) for which, tree in trees.items()}
    result = {"machine": machine.describe() | {"commit": commits}, "records": records, "after_over_before": ratios}
    (Path(__file__).parent / "results" / "bilevel.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, found in ratios.items():
        beside = np.mean([record[name]["seconds"] / record["one level"]["seconds"] for record in records["after"]])
        print(
            f"{name}: {np.mean(found):.2f} ± {np.std(found, ddof=1):.2f} times the seconds, {beside:.1f} times one level's"
        )


if __name__ == "__main__":
    main()
