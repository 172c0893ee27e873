"""Accuracy over epsilon: clients protected centrally at several noise levels, paired with none, at 1,000 clients.

python benchmarks/privacy.py --data PATH/clinc150 --out runs/privacy [--workers 2] [--smoke]

1,000 clients of 15 rows each (clinc150, iid), a tenth of them expected in a round. FFA-LoRA of rank 4 on the last block's
query and value layers and the head, since noise grows with the root of what travels: 61,000 numbers. Before that, pilots of
ten rounds on the validation split, with a seed of their own: clip and learning rate at the middle noise level, for all
private arms alike, and the learning rate without privacy. An arm of noise 0 clips alone, so that what the clip costs and
what the noise costs are told apart. Killed, it goes on where it was; what the file of results holds is not played again.
Each run is a process of its own with one thread.
--smoke: two rounds of 20 clients, one seed, to see that it works; its results are in --out, too.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import machine
from study import HERE, merge, paired, play, rows, spread, summary

CLIENTS, COHORT, DELTA = 1000, 100, 1e-4
NOISES = (0.0, 0.5, 0.8, 1.2, 2.0)
CLIPS, RATES = (0.3, 1.0, 3.0), (0.003, 0.01)
SEEDS, PILOT_SEED, PILOT_NOISE, PILOT_ROUNDS = (1, 2, 3), 100, 0.8, 10
BASE: dict[str, Any] = {
    "model": {"name": "minilm"}, "data": {"partition": {"kind": "iid"}}, "clients": {"count": CLIENTS},
    "rounds": {"count": 30, "cohort": COHORT, "evaluate_every": 3, "personal": 0},
    "local": {"epochs": 2, "batch_size": 16}, "method": {"name": "ffa_lora"},
    "adapter": {"rank": 4, "targets": ["5.attention.self.query", "5.attention.self.value"]}, "engine": {"threads": 1, "workers": 1},
}  # fmt: skip


def private(clip: float, noise: float) -> dict[str, Any]:
    return {"privacy": {"kind": "central", "clip": clip, "noise": noise, "delta": DELTA}}


def measured(folder: Path) -> dict[str, Any]:
    """The curve of the score, its last five evaluations, and what the rounds up to each of them told."""
    scored = [row for row in rows(folder, "rounds") if row["accuracy"] is not None]
    return {
        "curve": {str(row["round"]): row["accuracy"] for row in scored},
        "epsilon_by_round": {str(row["round"]): row.get("epsilon") for row in scored},
        "epsilon": summary(folder).get("epsilon"),
        "last_five": statistics.mean([row["accuracy"] for row in scored][-5:]),
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", required=True, help="the folder of clinc150")
    words.add_argument("--out", type=Path, required=True, help="where the runs go")
    words.add_argument("--results", type=Path, help="default: benchmarks/results/privacy.json")
    words.add_argument("--workers", type=int, default=2, help="runs at once")
    words.add_argument("--smoke", action="store_true")
    given = words.parse_args()
    given.results = given.results or (given.out if given.smoke else HERE / "results") / "privacy.json"
    plan, noises, clips, rates, seeds = BASE, NOISES, CLIPS, RATES, SEEDS
    if given.smoke:
        plan = merge(BASE, {"rounds": {"count": 2, "cohort": 20, "evaluate_every": 1}})
        noises, clips, rates, seeds = (0.0, 0.8), CLIPS[:1], RATES[:1], SEEDS[:1]
    base = merge(plan, {"data": {"path": given.data}})
    pool = ThreadPoolExecutor(given.workers)
    before = json.loads(given.results.read_text()) if given.results.exists() else {}
    before = before if before.get("base") == plan and before.get("noises") == list(noises) else {}
    result: dict[str, Any] = {
        "command": "python benchmarks/privacy.py --data PATH/clinc150 --out FOLDER", "machine": machine.describe(),
        "base": plan, "noises": list(noises), "clients": CLIENTS, "delta": DELTA, "pilot": before.get("pilot", []),
        "runs": before.get("runs", {}),
    }  # fmt: skip

    tuning: dict[str, Any] = {"seed": PILOT_SEED, "data": {"split": "validation"}}
    tuning["rounds"] = {"count": min(PILOT_ROUNDS, base["rounds"]["count"])}
    if not result["pilot"]:
        tried = {}
        for clip, lr in product((None, *clips), rates):
            own = merge({"local": {"lr": lr}}, private(clip, PILOT_NOISE) if clip else {})
            tried[clip, lr] = pool.submit(play, given.out / f"pilot-{clip or 'none'}-{lr:g}", merge(base, tuning, own))
        result["pilot"] = [
            {"clip": clip, "lr": lr, "accuracy": measured(job.result())["last_five"]}
            for (clip, lr), job in tried.items()
        ]
    best = max((one for one in result["pilot"] if one["clip"]), key=lambda one: one["accuracy"])
    plain = max((one for one in result["pilot"] if not one["clip"]), key=lambda one: one["accuracy"])

    arms = {"none": {"local": {"lr": plain["lr"]}}}
    arms |= {f"noise {noise:g}": merge({"local": {"lr": best["lr"]}}, private(best["clip"], noise)) for noise in noises}
    runs, result["arms"] = result["runs"], arms
    jobs = {
        (arm, seed): pool.submit(play, given.out / f"{arm.replace(' ', '-')}-{seed}", merge(base, {"seed": seed}, own))
        for seed in seeds
        for arm, own in arms.items()
        if str(seed) not in runs.get(arm, {})
    }
    for (arm, seed), job in jobs.items():
        runs.setdefault(arm, {})[str(seed)] = measured(job.result())
        given.results.write_text(json.dumps(result, indent=1) + "\n")
    late = {arm: [run["last_five"] for run in played.values()] for arm, played in runs.items()}
    result["accuracy"] = {arm: spread(values) for arm, values in late.items()}
    if len(seeds) > 1:
        result["minus_none"] = {arm: paired(late[arm], late["none"]) for arm in arms if arm != "none"}
    given.results.write_text(json.dumps(result, indent=1) + "\n")
    for arm, values in late.items():
        found = spread(values)
        spent = next(iter(runs[arm].values()))["epsilon"]
        told = "no bound" if spent is None else f"epsilon {spent:.2f} at delta {DELTA:g}"
        print(f"{arm:12} {100 * found['mean']:.1f} ± {100 * found['deviation']:.1f} %  {told}")


if __name__ == "__main__":
    main()
