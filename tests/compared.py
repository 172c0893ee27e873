"""A small comparison that nobody played: four arms, five seeds, one arm without a global model, as comparison.json holds it."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from fedrank.protocol import rng

MODULES = [f"encoder.layer.{at}.attention.self.{part}" for at in range(4) for part in ("query", "value")]
ARMS = {"fedavg": (0.88, 1.0, 8), "fedara": (0.872, 0.55, 4), "legend": (0.86, 0.7, 6), "local_only": (None, 0.0, 8)}
COSTS = ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "clock_seconds", "device_joules")
SEEDS = (1, 2, 3, 4, 5)


def run(arm: str, seed: int, rounds: int = 20) -> dict[str, Any]:
    """One run's entry: saturating scores with noise of the seed's own, costs in proportion."""
    top, cost, rank = ARMS[arm]
    draw = rng(seed, "compared", arm)
    shift, curve = draw.normal(0, 0.008), []
    for at in range(2, rounds + 1, 2):
        score = None if top is None else (top + shift) * (1 - math.exp(-at / 4)) + draw.normal(0, 0.006)
        own = (0.8 if top is None else top) * (1 - math.exp(-at / 3)) + draw.normal(0, 0.006)
        sums = {"bytes_up": 7e6, "bytes_down": 7.2e6, "adapter_bytes_up": 6e6, "adapter_bytes_down": 6e6}
        curve.append({
            "round": at, "accuracy": score, "personal_accuracy": own, "loss": 4 * math.exp(-at / 6),
            **{name: value * cost * at for name, value in sums.items()}, "clock_seconds": (2 + 3 * cost) * at,
            "device_joules": (60 + 90 * cost) * at, "peak_memory_bytes": 9e7, "modules_alive": 8 - (at // 6 if arm == "fedara" else 0),
            "components": rank * 8,
        })  # fmt: skip
    last = curve[-1]
    personal = [float(min(max(value, 0.0), 1.0)) for value in draw.normal(last["personal_accuracy"], 0.06, 24)]
    alive = MODULES[: last["modules_alive"]] if arm != "fedara" else MODULES[8 - last["modules_alive"] :]
    summary = {name: last[name] for name in ("accuracy", "personal_accuracy", "peak_memory_bytes", *COSTS)}
    summary |= {"personal_worst_decile": statistics.fmean(sorted(personal)[:3])}
    ranks = {name: rank + n % 3 if arm != "fedavg" else rank for n, name in enumerate(alive)}
    return {"summary": summary, "curve": curve, "personal": personal, "ranks": ranks, "seconds": 41.0 + seed}


def results(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Spread, differences from fedavg, and the sentence; p values are made up."""
    names = ("accuracy", "personal_accuracy", "personal_worst_decile", *COSTS, "peak_memory_bytes")
    values = {
        arm: {name: [one["summary"][name] for one in mine.values()] for name in names} for arm, mine in arms.items()
    }
    found = {arm: {name: _spread(mine[name]) for name in names} for arm, mine in values.items()}
    differences: dict[str, Any] = {}
    for arm in arms:
        if arm == "fedavg":
            continue
        differences[arm] = {}
        for name in names[:3]:
            if None not in values[arm][name]:
                gaps = [a - b for a, b in zip(values[arm][name], values["fedavg"][name], strict=True)]
                mean = statistics.fmean(gaps)
                differences[arm][name] = {
                    "mean": mean,
                    "interval": [mean - 0.008, mean + 0.008],
                    "p": 0.02,
                    "p_corrected": 0.04,
                    "values": gaps,
                }
        for name in COSTS:
            if all(values[arm][name]):
                ratio = statistics.fmean(values[arm][name]) / statistics.fmean(values["fedavg"][name])
                differences[arm][name] = {"mean": ratio, "interval": [ratio, ratio], "values": [ratio] * len(SEEDS)}
    said = "fedavg has accuracy 87.4 % over 5 seeds. Worse: legend by 1.9 points (1.1 to 2.7), with 0.7 times the bytes up."
    return {
        "arms": found, "target": {"score": "accuracy", "value": 0.8}, "differences": differences, "conclusion": said,
    }  # fmt: skip


def _spread(values: list[float | None]) -> dict[str, Any]:
    there = [value for value in values if value is not None]
    many = len(there) > 1
    return {
        "mean": statistics.fmean(there) if there else None,
        "deviation": statistics.stdev(there) if many else None,
        "values": values,
    }


def comparison(**other: Any) -> dict[str, Any]:
    """The whole of it. other: top-level parts in the place of these."""
    arms = {arm: {str(seed): run(arm, seed) for seed in SEEDS} for arm in ARMS}
    rates = (0.001, 0.003, 0.01, 0.03)
    tuning = {
        arm: {
            "trials": [{"knobs": {"local.lr": lr}, "score": 0.8 - 0.02 * abs(n - 1 - at % 2) - 0.006 * at, "seconds": 12.0} for n, lr in enumerate(rates)],
            "best": {"local.lr": rates[1 + at % 2]}, "edge": [],
        }
        for at, arm in enumerate(ARMS)
    }  # fmt: skip
    study = {
        "title": "Does pruning cost accuracy?", "questions": {"bytes": "Half the bytes of FedAvg at no more than a point of accuracy?"},
        "base": {"clients": {"count": 24}}, "settings": {"clinc150": None}, "arms": {arm: {"method": {"name": arm}} for arm in ARMS},
        "seeds": list(SEEDS), "score": "accuracy", "tuning": {"trials": 4},
    }  # fmt: skip
    return {
        "schema": 1, "version": "0.1.0", "command": "fedrank compare study.yaml --out pruning", "study": study,
        "machine": {"cpu": "two cores"}, "forecast": {"seconds": 900.0}, "tuning": {"clinc150": tuning},
        "runs": {"clinc150": arms}, "failures": [{"setting": "clinc150", "arm": "legend", "seed": 6, "error": "out of memory"}],
        "results": {"clinc150": results(arms)}, "fair": {"verdict": True, "why": [], "notes": ["the best local.lr of legend is at the edge of what was tried"]},
        **other,
    }  # fmt: skip


def write(folder: Path, found: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder
