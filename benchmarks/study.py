"""A comparison of methods from a YAML file: forecast, learning-rate pilot, runs, and one JSON of results.

python benchmarks/study.py benchmarks/fed_plora.yaml --data PATH/clinc150 --out runs/fed_plora

Every arm is played in every setting with the same data, seeds, rounds and tuning effort. Killed, it goes on
where it was; what the file of results holds of the same study is not played again. Each run is a process of its own with
one thread; --workers of them at once. --forecast stops after the forecast.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import machine
import yaml
from scipy import stats

HERE = Path(__file__).parent
TEXTS = ("perplexity", "exact_match", "bleu", "rouge_l")  # scores of task generate
Config = dict[str, Any]


# ---- one run


def merge(*parts: Config) -> Config:
    """Nested mappings laid over one another."""
    result: Config = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merge(result[key], value) if both else value
    return result


def play(folder: Path, config: Config) -> Path:
    """One run in a process of its own; a finished one is kept, a stopped one resumed."""
    file = folder.with_name(f"{folder.name}.yaml")
    if file.exists() and yaml.safe_load(file.read_text()) != config:
        raise SystemExit(f"{folder} was played from another config; move it away or choose another --out")
    if not (folder / "summary.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config))
        what = (
            ["resume", str(folder)] if (folder / "config.yaml").exists() else ["run", str(file), "--out", str(folder)]
        )
        clock = time.time()
        subprocess.run([sys.executable, "-m", "fedrank.cli", *what, "--output", "quiet"], check=True)
        print(f"{time.strftime('%H:%M:%S')}  {folder.name}  {time.time() - clock:.0f} s", flush=True)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def paired(ours: list[float], theirs: list[float], margin: float = 1) -> dict[str, Any]:
    """Differences in points over the same seeds (two at least), with the 95 % interval of their mean.

    margin: the points that may be lost.
    """
    points = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(points)
    half = float(stats.t.ppf(0.975, len(points) - 1)) * statistics.stdev(points) / len(points) ** 0.5
    verdict = f"no loss beyond {margin:g} point{'s' * (margin != 1)}" if mean - half > -margin else "not shown"
    return {"points": points, "mean": mean, "interval_95": [mean - half, mean + half], "verdict": verdict}


# ---- what a run says


def measured(folder: Path, score: str, columns: list[str]) -> dict[str, Any]:
    """The curve of a score, its last five evaluations, what it cost, and other columns of the ledger by round."""
    rounds, end = rows(folder, "rounds"), summary(folder)
    curve = {str(row["round"]): row[score] for row in rounds if row[score] is not None}
    kept = ("accuracy", "personal_accuracy", "personal_majority", "majority", "adapter_bytes_up",
            "adapter_bytes_down", "bytes_up", "bytes_down", "clock_seconds", "wall_seconds",
            *TEXTS, *(f"personal_{name}" for name in TEXTS))  # fmt: skip
    columns = [*dict.fromkeys([*columns, "adapter_bytes_up", "adapter_bytes_down", "clock_seconds"])]
    texts = rows(folder, "texts") if (folder / "texts.jsonl").exists() else []
    return {
        "curve": curve, "last_five": statistics.mean(list(curve.values())[-5:]),
        **{name: end[name] for name in kept if name in end},
        **({"different_texts": len({row["written"] for row in texts}), "prompts": len(texts)} if texts else {}),
        "by_round": {name: [row.get(name) for row in rounds] for name in columns},
    }  # fmt: skip


def reached(run: dict[str, Any], target: float) -> dict[str, float] | None:
    """When the mean of three evaluations in a row first was at the target: round, simulated seconds, bytes so far."""
    traffic, curve, by = 0.0, list[float](), run["by_round"]
    for at, (up, down) in enumerate(zip(by["adapter_bytes_up"], by["adapter_bytes_down"], strict=True)):
        traffic += up + down
        if str(at + 1) in run["curve"]:
            curve.append(run["curve"][str(at + 1)])
            if len(curve) >= 3 and statistics.mean(curve[-3:]) >= target:
                return {"round": at + 1, "clock_seconds": by["clock_seconds"][at], "adapter_bytes": traffic}
    return None


def targets(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The score that every arm's run reaches, and when each first did."""
    best = []
    for run in runs.values():
        curve = list(run["curve"].values())
        best.append(max(statistics.mean(curve[at : at + 3]) for at in range(max(1, len(curve) - 2))))
    return {"target": min(best), **{arm: reached(run, min(best)) for arm, run in runs.items()}}


# ---- the study


def forecast(arms: dict[str, Config], study: Config, workers: int) -> dict[str, Any]:
    """Hours, from two clients trained and one evaluation timed in each arm; pilots and runs together."""
    pilot = study["pilot"]
    tries = len(pilot["learning_rates"])

    def needed(config: Config) -> float:
        with tempfile.TemporaryDirectory() as folder:
            # What of an arm two clients cannot play, such as a rule that needs more of them, is left out.
            small = merge(config, study.get("forecast", {}), {"rounds": {"count": 1, "cohort": 2, "evaluate_every": 1}})
            file = Path(folder) / "one.yaml"
            file.write_text(yaml.safe_dump(small))
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "fedrank.cli", "run", str(file), "--out", str(run), "--output", "quiet"]
            subprocess.run(command, check=True)
            row = rows(run, "rounds")[0]
        client, rest = row["train_seconds"] / 2, row["wall_seconds"] - row["train_seconds"]

        def seconds(rounds: Config) -> float:
            evaluations = rounds["count"] / rounds["evaluate_every"]
            return float(rounds["count"] * rounds["cohort"] * client + evaluations * rest)

        runs = seconds(config["rounds"]) * len(study["seeds"]) * len(study["settings"])
        tried = seconds(pilot["rounds"]) * tries * (len(study["settings"]) if pilot["every_setting"] else 1)
        return (runs + tried) / 3600

    with ThreadPoolExecutor(workers) as pool:  # as many at once as runs will be
        hours = dict(zip(arms, pool.map(needed, arms.values()), strict=True))
    return {"hours": sum(hours.values()) / workers, "workers": workers, "hours_of_one_core": hours}


def configs(study: Config, where: Config) -> Iterator[tuple[str, str, Config]]:
    """(setting, arm, config), the settings one after another. where: data and model are, on this machine."""
    for (setting, more), (arm, own) in product(study["settings"].items(), study["arms"].items()):
        yield setting, arm, merge(study["base"], where, more or {}, own)


def rates(study: Config, where: Config, out: Path, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The pilot on the validation split: setting (or the first alone) -> arm -> what each rate scored, and the best."""
    pilot, first = study["pilot"], next(iter(study["settings"]))
    jobs = {}
    for setting, arm, config in configs(study, where):
        if setting == first or pilot["every_setting"]:
            for lr in pilot["learning_rates"]:
                part = {"rounds": pilot["rounds"], "seed": pilot["seed"], "local": {"lr": lr}, "data": {"split": "validation"}}  # fmt: skip
                part = merge(part, pilot.get("with", {}))
                folder = out / f"pilot-{setting}-{arm}-{lr:g}"
                jobs[setting, arm, lr] = pool.submit(play, folder, merge(config, part))
    found: dict[str, Any] = {}
    for (setting, arm, lr), job in jobs.items():
        scored = found.setdefault(setting, {}).setdefault(arm, {"scores": {}})
        scored["scores"][lr] = summary(job.result())[study["score"]]
        scored["best"] = max(scored["scores"], key=scored["scores"].__getitem__)
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("study", type=Path)
    words.add_argument("--data", required=True, help="the folder of the data set")
    words.add_argument("--model", help="the folder of the model, where the study names none")
    words.add_argument("--out", type=Path, required=True, help="where the runs go")
    words.add_argument("--results", type=Path, help="default: results/ beside this file")
    words.add_argument("--workers", type=int, default=2)
    words.add_argument("--forecast", action="store_true", help="print the forecast and stop")
    given = words.parse_args()
    study = yaml.safe_load(given.study.read_text())
    results = given.results or HERE / "results" / f"{given.study.stem}.json"
    first = next(iter(study["settings"]))
    where: Config = {"data": {"path": given.data}} | ({"model": {"name": given.model}} if given.model else {})
    arms = {arm: config for setting, arm, config in configs(study, where) if setting == first}
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "forecast.json"  # of the first start: a study that goes on has less to do
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if given.forecast or known.get("study") != study:
        known = {"study": study, "forecast": forecast(arms, study, given.workers)}
        kept.write_text(json.dumps(known))
    expected = known["forecast"]
    print(f"forecast: {expected['hours']:.1f} hours with {expected['workers']} runs at once", flush=True)
    if given.forecast:
        return
    pool = ThreadPoolExecutor(given.workers)
    before = json.loads(results.read_text()) if results.exists() else {}
    before = before if before.get("study") == study else {}
    result: dict[str, Any] = {
        "study": study, "command": f"python benchmarks/study.py benchmarks/{given.study.name} --data PATH --out FOLDER",
        "machine": machine.describe() | {"threads_per_run": 1, "runs_at_once": given.workers}, "forecast": expected,
        "pilot": before.get("pilot") or rates(study, where, given.out, pool), "runs": before.get("runs", {}), "to_target": {},
    }  # fmt: skip
    jobs = {}
    for seed in study["seeds"]:
        for setting, arm, config in configs(study, where):
            tuned = result["pilot"].get(setting, result["pilot"][first])
            if str(seed) in result["runs"].get(setting, {}).get(arm, {}):
                continue
            part = {"seed": seed, "local": {"lr": float(tuned[arm]["best"])}}
            jobs[setting, arm, seed] = pool.submit(play, given.out / f"{setting}-{arm}-{seed}", merge(config, part))
    for (setting, arm, seed), job in jobs.items():
        found = measured(job.result(), study["score"], study["columns"])
        result["runs"].setdefault(setting, {}).setdefault(arm, {})[str(seed)] = found
        results.write_text(json.dumps(result, indent=1) + "\n")
    for setting, seed in product(study["settings"], study["seeds"]):
        played = {arm: result["runs"][setting][arm][str(seed)] for arm in study["arms"]}
        result["to_target"].setdefault(setting, {})[str(seed)] = targets(played)
    baseline, *others = study["arms"]
    if len(study["seeds"]) > 1:  # the same seeds, so that what they have in common falls out
        late = {(s, arm): [run["last_five"] for run in seeds.values()] for s, arms in result["runs"].items()
                for arm, seeds in arms.items()}  # fmt: skip
        result["minus_first_arm"] = {
            s: {arm: paired(late[s, arm], late[s, baseline], study.get("margins", {}).get(arm, 1)) for arm in others}
            for s in study["settings"]
        }
    results.write_text(json.dumps(result, indent=1) + "\n")
    for setting, played in result["runs"].items():
        print(f"\n{setting}")
        for arm, seeds in played.items():
            one = list(seeds.values())
            late = spread([run["last_five"] for run in one])
            traffic = statistics.mean(run["adapter_bytes_up"] + run["adapter_bytes_down"] for run in one)
            deviation = f"± {100 * late['deviation']:.1f} %" if len(one) > 1 else "% (one seed)"
            for name in (name for name in (*TEXTS, *(f"personal_{name}" for name in TEXTS)) if name in one[0]):
                print(
                    f"  {arm:24} {name:24} "
                    + "{mean:.3f} ± {deviation:.3f}".format(**spread([run[name] for run in one]))
                )
            print(f"  {arm:24} {study['score']} {100 * late['mean']:.1f} {deviation}, "
                  f"{traffic / 1e6:.0f} MB of adapter, {one[0].get('clock_seconds', 0):.0f} simulated seconds")  # fmt: skip


if __name__ == "__main__":
    main()
