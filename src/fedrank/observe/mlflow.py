"""An MLflow run: the config as parameters, every number of a round's row as a metric of that step."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fedrank
from fedrank import config as settings
from fedrank.config import ConfigError, Observe
from fedrank.ledger import Event
from fedrank.observe.rows import GROWN, Watch, added, numbers, timed
from fedrank.store import write

# By itself it tells its makers how it is used, prints among a run's events, and waits minutes for a server that is gone.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
               "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
               "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # fmt: skip
MOST_PARAMS = 100  # of one request


@contextmanager
def opened(given: Observe, path: Path) -> Iterator[Watch]:
    """What it is called over there stays in the run directory, so that a resumed run goes on with it, from the last row
    that has arrived. The summary's numbers are metrics too, under ``summary.``."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    assert given.mlflow is not None
    if urlsplit(given.mlflow).password is not None:
        raise ConfigError(
            "observe.mlflow: a password would stay in the run directory; give it as MLFLOW_TRACKING_PASSWORD, or that of a "
            "database as its driver reads it"
        )
    client, place = MlflowClient(given.mlflow), {"uri": given.mlflow, "experiment": given.mlflow_experiment}
    file = Path(given.mlflow.removeprefix("sqlite:///"))
    files = str(file.parent / "mlruns") if given.mlflow.startswith("sqlite:") else None  # else where this process is
    found = client.get_experiment_by_name(given.mlflow_experiment)
    experiment = found.experiment_id if found else client.create_experiment(given.mlflow_experiment, files)
    note = path / "mlflow.json"
    kept = json.loads(note.read_text()) if note.exists() else {}
    run: str | None = kept["run"] if {**kept, **place} == kept else None
    known = {} if run is None else client.get_run(run).data.params
    arrived = 0 if run is None else max((m.step for m in client.get_metric_history(run, "round")), default=0)
    rows, waiting, begun, status = added(path / "rounds.jsonl"), list[list[Metric]](), False, "FINISHED"

    def begin() -> None:
        nonlocal run, begun
        if run is None:
            run = client.create_run(experiment, run_name=path.name).info.run_id
            write(note, json.dumps({**place, "run": run}).encode())
        config = _flat(settings.load(path / "config.yaml").model_dump(mode="json", exclude={"observe"}))
        fresh = [Param(key, value) for key, value in config.items() if key not in known]
        for at in range(0, len(fresh), MOST_PARAMS):
            client.log_batch(run, params=fresh[at : at + MOST_PARAMS])
        tags = {key: value for key, value in config.items() if known.get(key, value) != value}  # no parameter changes
        tags |= {"fedrank.version": fedrank.__version__, "fedrank.path": str(path.absolute())}
        client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
        client.update_run(run, status="RUNNING")
        begun = True

    def watch(event: Event) -> None:
        if event["event"] not in (*GROWN, "end"):  # a server that is gone is tried once a round
            return
        if event["event"] in GROWN:
            for row, seconds in timed(row for row in rows() if row["round"] > arrived):
                now = int(1000 * seconds)
                waiting.append([Metric(name, value, now, row["round"]) for name, value in numbers(row).items()])
        if event["event"] == "end":
            now, step = int(1000 * time.time()), event["rounds"]
            waiting.append([Metric(f"summary.{name}", value, now, step) for name, value in numbers(event).items()])
        if not begun:
            begin()
        while waiting:  # what could not be sent before, too; a row goes whole or not at all
            client.log_batch(run, metrics=waiting[0])
            del waiting[0]
        if event["event"] == "end" and given.mlflow_adapter and (path / "adapter").is_dir():
            client.log_artifacts(run, str(path / "adapter"), "adapter")

    try:
        yield watch
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        if begun:
            client.set_terminated(run, status)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys, and values as text."""
    found = dict[str, str]()
    for key, value in section.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found
