"""Metrics for Prometheus, served over HTTP while a run is played."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fedrank
from fedrank import config as settings
from fedrank.config import ConfigError, Observe
from fedrank.ledger import Event
from fedrank.observe.rows import GROWN, Row, Watch, added

GAUGES = {
    "train_loss": "Mean training loss of the last round, over examples.",
    "loss": "Loss of the global model when it was last evaluated.",
    "accuracy": "Accuracy of the global model when it was last evaluated.",
    "personal_accuracy": "Mean accuracy of clients on their own test rows when they were last evaluated.",
    "components": "Rank-one components of the adapter.",
    "modules_alive": "Modules that have components.",
    "clock_seconds": "Simulated seconds so far.",
    "epsilon": "Differential privacy spent so far.",
}
BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)  # seconds
REASONS = ("no_answer", "invalid", "memory", "refused", "not_merged", "error")
SAID = {"DeviceError": "memory", "refused: ": "refused", "not merged: ": "not_merged"}  # what an error begins with


def reason(row: Row) -> str:
    """Why a client failed, of REASONS: what it says itself could be anything."""
    if "bytes_up" not in row:
        return "no_answer"
    if row["bytes_up"] and "adapter_bytes_up" not in row:
        return "invalid"  # its frame was not one to trust
    return next((name for start, name in SAID.items() if row["error"].startswith(start)), "error")


@contextmanager
def opened(given: Observe, path: Path) -> Iterator[Watch]:
    """Counters are the sums of the ledgers, of the rounds before a resume too; what moves within a round are gauges."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

    every = CollectorRegistry()
    build = Info("fedrank_build", "What plays which run.", registry=every)
    rounds = Counter("fedrank_rounds", "Rounds played.", registry=every)
    current = Gauge("fedrank_round", "The round that is played, or was last.", registry=every)
    planned = Gauge("fedrank_rounds_planned", "Rounds of the whole run.", registry=every)
    told = dict[str, Any]()  # what rows have had so far
    played, clients, evaluation_bytes = added(path / "rounds.jsonl"), added(path / "clients.jsonl"), 0
    hidden = False  # how many are drawn, which rows do not tell either

    def metric(kind: Callable[..., Any], name: str, text: str, **more: Any) -> Any:
        if name not in told:
            told[name] = kind(f"fedrank_{name}", text, registry=every, **more)
        return told[name]

    def awaited() -> Any:
        return metric(Gauge, "clients_awaited", "Clients whose answer this round still waits for.")

    def count(row: Row) -> None:
        rounds.inc()
        if row["wall_seconds"] is not None:
            metric(Histogram, "round_seconds", "Wall time of a round.", buckets=BUCKETS).observe(row["wall_seconds"])
        if row["clients_ok"] is not None:
            metric(Counter, "clients_answered", "Client updates that were merged.").inc(row["clients_ok"])
        for way in ("up", "down"):
            adapter, head, whole = (row[f"{part}bytes_{way}"] for part in ("adapter_", "head_", ""))
            if whole is None:
                continue
            sent = metric(Counter, "bytes", "Bytes of training frames, all parts.", labelnames=["direction", "part"])
            for part, size in (("adapter", adapter), ("head", head), ("overhead", whole - adapter - head)):
                sent.labels(way, part).inc(size)
        for name, text in GAUGES.items():
            if row.get(name) is not None:
                metric(Gauge, name, text).set(row[name])

    def fail(rows: list[Row], counted: set[int]) -> None:
        """counted: the rounds of which it is told how many failed."""
        if counted:
            failed = metric(Counter, "clients_failed", "Clients that were asked in vain.", labelnames=["reason"])
            found = [reason(row) for row in rows if not row["ok"] and row["round"] in counted]
            for name in REASONS:
                failed.labels(name).inc(found.count(name))

    def evaluated(total: int) -> None:
        nonlocal evaluation_bytes
        scored = metric(Counter, "evaluation_bytes", "Bytes of evaluation frames, both ways.")
        scored.inc(total - evaluation_bytes)
        evaluation_bytes = total

    def watch(event: Event) -> None:
        nonlocal hidden
        match event["event"]:
            case "start" | "resume":
                config = settings.load(path / "config.yaml")
                hidden = config.privacy.kind == "central"
                build.info({"version": fedrank.__version__, "method": config.method["name"], "run": path.name})
                planned.set(config.rounds.count)
                current.set(event.get("round", 0))
            case "cohort":
                current.set(event["round"])
                if not hidden:
                    awaited().set(len(event["clients"]))
            case "client" if not hidden:
                awaited().dec()
            case "round" if not hidden:
                awaited().set(0)
            case "end":
                evaluated(event["evaluation_bytes"] or evaluation_bytes)
        if event["event"] in GROWN:
            rows = played()
            for row in rows:
                count(row)
            evaluated(evaluation_bytes + sum(row.get("evaluation_bytes") or 0 for row in rows))
            fail(clients(), {row["round"] for row in rows if row["clients_failed"] is not None})

    assert given.prometheus is not None
    host, _, port = given.prometheus.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), every)
    except OSError as error:
        raise ConfigError(f"observe.prometheus={given.prometheus}: {error.strerror}; give another port, or null") from None  # fmt: skip
    try:
        yield watch
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
