"""Where a run's time goes: a few of its rounds, played in one process with every part of them timed."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedrank import experiment, trace
from fedrank.config import Config, ConfigError, Observe
from fedrank.engines.workers import fitting


def profile(config: Config, rounds: int, to: Path) -> dict[str, Any]:
    """Seconds by part of this many rounds, evaluated at the end; every span goes to a Chrome trace.

    The first round counts too: a run pays for its warming up once.
    """
    if config.engine.kind != "local":
        raise ConfigError(
            f"engine.kind={config.engine.kind}: only what runs in one process is timed part by part; local"
        )
    played = {
        "count": rounds,
        "evaluate_every": rounds,
        "personal": 0 if config.rounds.personal == 0 else config.rounds.cohort,
    }
    config = config.model_copy(update={"rounds": config.rounds.model_copy(update=played), "observe": Observe()})
    events = list[dict[str, Any]]()
    with TemporaryDirectory(prefix="fedrank-") as folder, trace.recording() as spans:
        started = time.perf_counter()
        for event in experiment.start(config, Path(folder) / "run"):
            events.append(event)
            if event["event"] == "start":
                begun = ended = time.perf_counter()
            if event["event"] == "round":
                ended = time.perf_counter()
        seconds = time.perf_counter() - started
        summary = experiment.Run(Path(folder) / "run").summary
    to.parent.mkdir(parents=True, exist_ok=True)
    trace.write(spans, to)
    found = trace.shares(spans, whole=("evaluation", "both levels"))
    found["the rest"] = seconds - sum(found.values())
    clients = [event for event in events if event["event"] == "client"]
    numerics = summary["numerics"]
    return {
        "seconds": dict(sorted(found.items(), key=lambda pair: -pair[1])),
        "wall_seconds": seconds,
        "round_seconds": ended - begun,
        "rounds": rounds,
        "clients": len(clients),
        "examples": sum(event.get("examples", 0) for event in clients),
        "workers": config.engine.workers or fitting(config.engine.threads, config.device, events[0]["parameters"]),
        "compute": numerics["compute"], "products": numerics["products"], "rows": numerics["rows"],
        "stack": numerics["stack"],
    }  # fmt: skip
