"""fedrank of two commits, in turns: python commits.py DATA BEFORE AFTER [--pairs 3]

BEFORE and AFTER are checkouts; DATA holds clinc150 and 20news. Each runs the job of 10 rounds as it comes, like the row
"fedrank" of run.py; ratios are of AFTER to BEFORE within a pair, and the next pair goes the other way round.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import run


def ratios(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, list[float]]:
    """AFTER over BEFORE, pair by pair; accuracies are subtracted, in points."""
    pairs = list(zip(before, after, strict=True))
    found = {key: [b[key] / a[key] for a, b in pairs] for key in ("wall_seconds", "steady_updates_per_second")}
    return found | {"accuracy_points": [100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--datasets", default="clinc150,20news")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=run.HERE.parent / "results" / "throughput_commits.json")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: run.CORES])
    trees = {"before": args.before.resolve(), "after": args.after.resolve()}
    commits = {which: run.machine.commit(tree) for which, tree in trees.items()}
    result: dict[str, Any] = {"machine": run.machine.describe() | {"commit": commits}, "jobs": {}}
    with tempfile.TemporaryDirectory() as work:
        for dataset in args.datasets.split(","):
            records: dict[str, list[dict[str, Any]]] = {which: [] for which in trees}
            for pair in range(args.pairs):
                for which in sorted(trees, reverse=pair % 2 == 0):  # "before" first, then "after" first
                    tree, data = trees[which], (args.data / dataset).resolve()
                    script = tree / "benchmarks" / "throughput" / "fedrank_run.py"
                    command = ["env", f"PYTHONPATH={tree / 'src'}", sys.executable, *map(str, (script, data, work))]
                    records[which].append(run.play(command, Path(work), 2))
                    shown = {key: round(value, 4) for key, value in records[which][-1].items() if key in run.SHOWN}
                    print(dataset, commits[which], shown, flush=True)
            result["jobs"][f"{dataset}, 10 rounds"] = {"records": records, "after_over_before": ratios(**records)}
            args.results.write_text(json.dumps(result, indent=1) + "\n")
            print(dataset, result["jobs"][f"{dataset}, 10 rounds"]["after_over_before"], flush=True)


if __name__ == "__main__":
    main()
