"""Metrics for Prometheus, served over HTTP while a run is played."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fedrank
from fedrank import config as settings
from fedrank.config import ConfigError, Observe
from fedrank.observe.rows import GROWN, Row, Watch, added
from fedrank.server import Event

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
REASONS = ("no_answer", "invalid", "memory", "error")


def reason(row: Row) -> str:
    """Why a client failed, of REASONS: what it says itself could be anything."""
    if "bytes_up" not in row:
        return "no_answer"
    if "adapter_bytes_up" not in row:
        return "invalid"  # its frame was not one to trust
    return "memory" if row["error"].startswith("DeviceError") else "error"


@contextmanager
def opened(given: Observe, path: Path) -> Iterator[Watch]:
    """Counters are the sums of the ledgers, of the rounds before a resume too; what moves within a round are gauges."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

    every = CollectorRegistry()
    build = Info("fedrank_build", "What plays which run.", registry=every)
    rounds = Counter("fedrank_rounds", "Rounds played.", registry=every)
    seconds = Histogram("fedrank_round_seconds", "Wall time of a round.", registry=every, buckets=BUCKETS)
    answered = Counter("fedrank_clients_answered", "Client updates that were merged.", registry=every)
    failed = Counter("fedrank_clients_failed", "Clients that were asked in vain.", ["reason"], registry=every)
    sent = Counter("fedrank_bytes", "Bytes of training frames, all parts.", ["direction", "part"], registry=every)
    scored = Counter("fedrank_evaluation_bytes", "Bytes of evaluation frames, both ways.", registry=every)
    current = Gauge("fedrank_round", "The round that is played, or was last.", registry=every)
    planned = Gauge("fedrank_rounds_planned", "Rounds of the whole run.", registry=every)
    awaited = Gauge("fedrank_clients_awaited", "Clients whose answer this round still waits for.", registry=every)
    for name in REASONS:
        failed.labels(name)
    for way in ("up", "down"):
        for part in ("adapter", "head", "overhead"):
            sent.labels(way, part)
    gauges = dict[str, Gauge]()  # of what rows have had so far
    played, clients, evaluation_bytes = added(path / "rounds.jsonl"), added(path / "clients.jsonl"), 0

    def count(row: Row) -> None:
        rounds.inc()
        seconds.observe(row["wall_seconds"])
        answered.inc(row["clients_ok"])
        for way in ("up", "down"):
            adapter, head, whole = (row[f"{part}bytes_{way}"] for part in ("adapter_", "head_", ""))
            for part, size in (("adapter", adapter), ("head", head), ("overhead", whole - adapter - head)):
                sent.labels(way, part).inc(size)
        for name, text in GAUGES.items():
            if row.get(name) is not None:
                if name not in gauges:
                    gauges[name] = Gauge(f"fedrank_{name}", text, registry=every)
                gauges[name].set(row[name])

    def evaluated(total: int) -> None:
        nonlocal evaluation_bytes
        scored.inc(total - evaluation_bytes)
        evaluation_bytes = total

    def watch(event: Event) -> None:
        match event["event"]:
            case "start" | "resume":
                config = settings.load(path / "config.yaml")
                build.info({"version": fedrank.__version__, "method": config.method["name"], "run": path.name})
                planned.set(config.rounds.count)
                current.set(event.get("round", 0))
            case "cohort":
                current.set(event["round"])
                awaited.set(len(event["clients"]))
            case "client":
                awaited.dec()
            case "round":
                awaited.set(0)
            case "end":
                evaluated(event["evaluation_bytes"])
        if event["event"] in GROWN:
            for row in played():
                count(row)
                evaluated(evaluation_bytes + row.get("evaluation_bytes", 0))
            for row in clients():
                if not row["ok"]:
                    failed.labels(reason(row)).inc()

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
