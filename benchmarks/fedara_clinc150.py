"""The clinc150 study of fedara_clinc150.yaml: pilot, runs, step costs, and one JSON of results.

python benchmarks/fedara_clinc150.py --data PATH/clinc150 --out runs/fedara_clinc150

Killed, it goes on where it was. Each run is a process of its own with one thread; --workers of them at once.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
import yaml
from study import merge, paired, play, rows, spread

HERE = Path(__file__).parent


def measured(folder: Path) -> dict[str, Any]:
    """What one run says: the accuracy of its last five evaluations, its bytes, its steps early and late."""
    rounds, clients = rows(folder, "rounds"), rows(folder, "clients")
    scored = [r["accuracy"] for r in rounds if r["accuracy"] is not None]
    summary = json.loads((folder / "summary.json").read_text())
    last = rounds[-1]["round"]

    def step(first: int, end: int) -> float:
        steps = [c["seconds"] / c["steps"] for c in clients if c["ok"] and first <= c["round"] <= end]
        return statistics.median(steps)

    return {
        "accuracy_last_five": statistics.mean(scored[-5:]), "accuracy_final": scored[-1],
        "accuracy_curve": {r["round"]: r["accuracy"] for r in rounds if r["accuracy"] is not None},
        "personal_accuracy": summary["personal_accuracy"],
        "adapter_bytes": summary["adapter_bytes_up"] + summary["adapter_bytes_down"],
        "head_bytes": summary["head_bytes_up"] + summary["head_bytes_down"],
        "bytes": summary["bytes_up"] + summary["bytes_down"],
        "components": [r["components"] for r in rounds], "modules_alive": [r["modules_alive"] for r in rounds],
        "lowest_active_block": [r["lowest_active_block"] for r in rounds],
        "step_seconds_first_five_rounds": step(1, 5), "step_seconds_last_five_rounds": step(last - 4, last),
        "wall_seconds": summary["wall_seconds"], "train_seconds": summary["train_seconds"],
    }  # fmt: skip


def costs(folders: dict[str, Path], repeats: int = 5) -> dict[str, Any]:
    """Seconds and peak memory of the same training steps under the first and the last state, alternately."""
    result: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for name, folder in folders.items():
            for when in ("first", "last"):
                out = subprocess.run(
                    [sys.executable, str(HERE / "step_cost.py"), str(folder), when], check=True, capture_output=True, text=True
                ).stdout  # fmt: skip
                result.setdefault(f"{name}, {when} state", []).append(json.loads(out))
    return {
        name: {key: {"median": statistics.median(r[key] for r in runs), "min": min(r[key] for r in runs),
                     "max": max(r[key] for r in runs)} for key in runs[0]}
        for name, runs in result.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of clinc150")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "fedara_clinc150.json")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    study = yaml.safe_load((HERE / "fedara_clinc150.yaml").read_text())
    base = merge(study["base"], {"data": {"path": args.data}})
    pool = ThreadPoolExecutor(args.workers)

    pilot = study["pilot"]
    jobs = {}
    for arm, settings in study["arms"].items():
        for lr in pilot["learning_rates"][settings["method"]["name"]]:
            part = {
                "rounds": pilot["rounds"],
                "seed": pilot["seed"],
                "local": {"lr": lr},
                "data": {"split": "validation"},
            }
            jobs[arm, lr] = pool.submit(play, args.out / f"pilot-{arm}-{lr:g}", merge(base, settings, part))
    tried = {key: json.loads((job.result() / "summary.json").read_text())["accuracy"] for key, job in jobs.items()}
    best = {arm: max((lr for a, lr in tried if a == arm), key=lambda lr: tried[arm, lr]) for arm in study["arms"]}
    print("learning rates by the pilot:", best, flush=True)

    result: dict[str, Any] = {
        "study": study,
        "command": "python benchmarks/fedara_clinc150.py --data PATH/clinc150 --out runs/fedara_clinc150",
        "machine": machine.describe() | {"threads_per_run": 1, "runs_at_once": args.workers},
        "pilot": {arm: {f"{lr:g}": tried[a, lr] for a, lr in tried if a == arm} for arm in best},
        "learning_rate": best,
        "runs": {arm: {} for arm in best},
    }  # fmt: skip
    runs: dict[tuple[Any, ...], Future[Path]] = {}
    for seed in study["seeds"]:
        for arm, settings in study["arms"].items():
            config = merge(base, settings, {"seed": seed, "local": {"lr": best[arm]}})
            runs[arm, seed] = pool.submit(play, args.out / f"{arm}-{seed}", config)
    for (arm, seed), job in runs.items():
        result["runs"][arm][str(seed)] = measured(job.result())
        args.results.write_text(json.dumps(result, indent=1))

    def each(arm: str, key: str) -> list[float]:
        return [run[key] for run in result["runs"][arm].values()]

    scalar = ("accuracy_last_five", "accuracy_final", "personal_accuracy", "adapter_bytes", "head_bytes", "bytes",
              "step_seconds_first_five_rounds", "step_seconds_last_five_rounds", "wall_seconds")  # fmt: skip
    result["arms"] = {arm: {key: spread(each(arm, key)) for key in scalar} for arm in best}
    for arm in best:
        result["arms"][arm]["modules_alive_at_end"] = [m[-1] for m in each(arm, "modules_alive")]  # type: ignore[index]
    ours = each("fedara", "accuracy_last_five")
    result["fedara_minus"] = {arm: paired(ours, each(arm, "accuracy_last_five")) for arm in best if arm != "fedara"}
    total = statistics.mean(each("fedara", "adapter_bytes"))
    result["adapter_bytes_over_fedara"] = {arm: statistics.mean(each(arm, "adapter_bytes")) / total for arm in best}

    rates = study["afterwards"]["learning_rates"]
    for arm, lr in rates.items():
        for seed in study["seeds"]:
            config = merge(base, study["arms"][arm], {"seed": seed, "local": {"lr": lr}})
            runs[arm, lr, seed] = pool.submit(play, args.out / f"afterwards-{arm}-{lr:g}-{seed}", config)
    result["afterwards"] = {}
    for arm, lr in rates.items():
        found = {str(seed): measured(runs[arm, lr, seed].result()) for seed in study["seeds"]}
        late = [run["accuracy_last_five"] for run in found.values()]
        result["afterwards"][arm] = {
            "learning_rate": lr, "runs": found, "accuracy_last_five": spread(late),
            "adapter_bytes": spread([run["adapter_bytes"] for run in found.values()]),
            # no verdict: these rates were chosen with the results at hand
            "minus": {
                other: {k: v for k, v in paired(late, each(other, "accuracy_last_five")).items() if k != "verdict"}
                for other in best
            },
        }  # fmt: skip
    folders = {arm: args.out / f"{arm}-{study['seeds'][0]}" for arm in ("fedara", "fedavg_rank_12")}
    result["step_cost"] = costs(folders)
    args.results.write_text(json.dumps(result, indent=1))
    print(
        json.dumps(
            {key: result[key] for key in ("arms", "fedara_minus", "adapter_bytes_over_fedara", "step_cost")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
