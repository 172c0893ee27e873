"""A small comparison that nobody played: four arms, five seeds, one arm without a global model, as comparison.json holds it."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from fedrank.protocol import rng
from fedrank.studies.results import compared, verdicts
from fedrank.studies.study import Study

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
    return {
        "summary": summary, "curve": curve, "personal": personal, "ranks": ranks, "seconds": 41.0 + seed,
        "rows_seen": 640.0 * rounds,
    }  # fmt: skip


def comparison(**other: Any) -> dict[str, Any]:
    """The whole of it. other: top-level parts in the place of these; of what is not fair nothing is concluded."""
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
        "title": "Does pruning cost accuracy?", "about": {"question": "Half the bytes of FedAvg at no more than a point of accuracy?"},
        "claims": {"bytes": {"claim": "FedARA sends less than 0.7 of FedAvg's bytes.", "arm": "fedara", "of": "bytes", "confirmed": {"below": 0.7}, "refuted": {"above": 0.7}}},
        "base": {"data": {"name": "docstrings"}, "clients": {"count": 24}}, "settings": {"clinc150": None}, "arms": {arm: {"method": {"name": arm}} for arm in ARMS},
        "seeds": list(SEEDS), "score": "accuracy", "tuning": {"trials": 4},
    }  # fmt: skip
    asked = Study.model_validate(study)
    fair = other.get(
        "fair", {"verdict": True, "why": [], "notes": ["the best local.lr of legend is at the edge of what was tried"]}
    )
    results = compared(asked, {"clinc150": arms}, fair["verdict"])
    return {
        "schema": 1, "version": "0.1.0", "study": asked.model_dump(mode="json"), "machine": {"cpu": "two cores"},
        "forecast": {"seconds": 900.0}, "tuning": {"clinc150": tuning}, "runs": {"clinc150": arms},
        "failures": [{"setting": "clinc150", "arm": "legend", "seed": 6, "error": "out of memory"}], "results": results,
        "claims": verdicts(asked, {"clinc150": arms}, results) if fair["verdict"] else {}, "fair": fair, **other,
    }  # fmt: skip


def write(folder: Path, found: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder
