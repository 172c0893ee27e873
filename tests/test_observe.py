"""Whoever watches a run reads what its ledgers hold, goes on where it goes on, and changes no bit of it."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import fedrank
import toy
from federation import free_port as port
from fedrank import config, experiment, ledger
from fedrank.config import ConfigError, Observe
from fedrank.engines.workers import Workers
from fedrank.methods.fedavg import FedAvg
from fedrank.observe import watching
from fedrank.observe.prometheus import reason
from fedrank.protocol import Job, State, Update, Updates
from fedrank.store import Store

SECRET = "what a client wrote"
ROUNDS = 3


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    toy.write(folder, train=toy.texts(48, 0), test=toy.texts(24, 1))
    return folder


def settings(texts: Path, **observe: Any) -> dict[str, Any]:
    return {
        "data": {"path": str(texts), "partition": {"kind": "iid"}}, "clients": {"count": 4},
        "rounds": {"count": ROUNDS, "cohort": 3, "evaluate_every": 2}, "adapter": {"rank": 4},
        "local": {"batch_size": 8, "max_length": 16}, "engine": {"failure_rate": 0.3}, "observe": observe, "seed": 3,
    }  # fmt: skip


def scrape(port: int) -> dict[tuple[str, str], float]:
    """(name, label values) -> value of what is served."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(s.name, " ".join(s.labels[k] for k in sorted(s.labels))): s.value for s in samples}


def clients(run: Path) -> list[dict[str, Any]]:
    return ledger.read(run / "clients.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    """Each a JSON object as the standard has it: NaN is none."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if type(value) in (int, float)}


@dataclass(frozen=True)
class Quoting(FedAvg):
    """Half of its clients fail with a message of Python's own that quotes a text; from round `breaks` on, merging fails."""

    breaks: int = 1000

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            if job.device.id in ("0", "1"):
                int(SECRET)
            yield job.fit(job)

    def merge(self, state: State, updates: Updates) -> State:
        if state.round + 1 >= self.breaks:
            raise RuntimeError("it broke")
        return super().merge(state, updates)


# ---- Prometheus


def equals(found: Mapping[tuple[str, str], float], run: Path) -> None:
    """Counters are the sums of the ledgers as they are now, gauges the last values."""
    rows = ledger.read(run / "rounds.jsonl")
    assert found["fedrank_rounds_total", ""] == len(rows)
    if not rows:
        return
    assert found["fedrank_round_seconds_count", ""] == len(rows)
    assert found["fedrank_round_seconds_sum", ""] == pytest.approx(sum(row["wall_seconds"] for row in rows))
    assert found["fedrank_clients_answered_total", ""] == sum(row["clients_ok"] for row in rows)
    failures = Counter(reason(row) for row in clients(run) if not row["ok"])
    assert sum(failures.values()) == sum(row["clients_failed"] for row in rows)
    for name in ("no_answer", "invalid", "memory", "refused", "not_merged", "error"):
        assert found["fedrank_clients_failed_total", name] == failures[name]
    for way in ("up", "down"):
        sizes = {part: found["fedrank_bytes_total", f"{way} {part}"] for part in ("adapter", "head", "overhead")}
        assert sizes["adapter"] == sum(row[f"adapter_bytes_{way}"] for row in rows)
        assert sizes["head"] == sum(row[f"head_bytes_{way}"] for row in rows)
        assert sum(sizes.values()) == sum(row[f"bytes_{way}"] for row in rows)
    for name in ("train_loss", "loss", "accuracy", "personal_accuracy", "components", "clock_seconds"):
        values = [row[name] for row in rows if row[name] is not None]
        assert found.get((f"fedrank_{name}", "")) == (values[-1] if values else None)
    assert ("fedrank_epsilon", "") not in found


def test_the_endpoint_serves_the_ledgers_sums_in_the_middle_at_the_end_and_after_a_resume(
    texts: Path, tmp_path: Path
) -> None:
    at, run, awaited, told = port(), tmp_path / "run", list[float](), Counter[str]()

    def watch(event: dict[str, Any]) -> None:
        told[event["event"]] += 1
        found = scrape(at)
        assert found["fedrank_build_info", f"fedavg run {fedrank.__version__}"] == 1
        if event["event"] == "cohort":
            assert found["fedrank_round", ""] == event["round"]
            awaited[:] = [len(event["clients"])]
        elif event["event"] == "client":
            awaited[:] = [awaited[0] - 1]
        if event["event"] in ("cohort", "client", "round"):
            assert found["fedrank_clients_awaited", ""] == awaited[0]
        assert found["fedrank_rounds_planned", ""] == config.load(run / "config.yaml").rounds.count
        equals(found, run)
        if event["event"] == "end":
            assert found["fedrank_evaluation_bytes_total", ""] == event["evaluation_bytes"] > 0
            assert found["fedrank_bytes_total", "up adapter"] > found["fedrank_bytes_total", "up head"] > 0

    fedrank.run(settings(texts, prometheus=at), out=run, watch=watch)
    assert told["round"] == ROUNDS
    assert sum(row["clients_failed"] for row in ledger.read(run / "rounds.jsonl")) > 0
    with pytest.raises(OSError, match="refused"):  # it ends with the run
        scrape(at)
    fedrank.resume(run, "rounds.count=+1", watch=watch)
    assert (told["resume"], told["round"]) == (1, ROUNDS + 1)
    assert not [t for t in threading.enumerate() if t.daemon and "serve_forever" in t.name]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"error": "no answer"}, "no_answer"),
        ({"bytes_up": 0, "error": "Flower error 3: gone"}, "error"),
        ({"bytes_up": 9, "error": "the checksum does not fit"}, "invalid"),
        ({"bytes_up": 9, "adapter_bytes_up": 0, "error": "DeviceError: out of memory: needs 2 GB"}, "memory"),
        ({"bytes_up": 9, "adapter_bytes_up": 0, "error": "refused: its change has norm 2"}, "refused"),
        ({"bytes_up": 9, "adapter_bytes_up": 0, "error": "not merged: fewer answered"}, "not_merged"),
        ({"bytes_up": 9, "adapter_bytes_up": 0, "error": "anything at all"}, "error"),
    ],
)
def test_reasons_are_a_closed_set(row: dict[str, Any], word: str) -> None:
    assert reason(row) == word


def test_refused_updates_are_counted_by_their_reason(texts: Path, tmp_path: Path) -> None:
    """Where a hostile client is refused, the two others of its round are too few to be merged."""
    at, refused, found = port(), list[int](), dict[tuple[str, str], float]()

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "refused":
            refused.append(event["round"])
        if event["event"] == "end":
            found.update(scrape(at))

    raw = settings(texts, prometheus=at) | {"engine": {"attack": {"share": 0.25, "kind": "scale", "factor": 100}}}
    run = fedrank.run(raw, "server.max_norm_ratio=10", "rounds.minimum=3", out=tmp_path / "run", watch=watch)
    equals(found, run.path)
    assert 0 < len(refused) == found["fedrank_clients_failed_total", "refused"]
    assert found["fedrank_clients_failed_total", "not_merged"] == 2 * len(refused)
    assert found["fedrank_clients_failed_total", "error"] == 0


def test_the_pages_filter_finds_all_failures_of_clients(texts: Path, tmp_path: Path) -> None:
    """Those that were silent, refused, or too few to be merged, as the ledger has them."""
    page = (Path(__file__).parents[1] / "docs" / "observe.md").read_text()
    (found,) = re.findall(r"""^jq -r 'select\((.*)\) \| "(.*)"' runs.jsonl$""", page, re.MULTILINE)
    names = re.compile(r"\.(\w+)")
    chosen, shown = names.sub(r"line.get('\1')", found[0]), re.compile(r"\\\(\.(\w+)\)").sub(r"{\1}", found[1])
    raw, out = settings(texts, log=str(tmp_path / "log")), tmp_path / "run"
    raw["engine"]["attack"] = {"share": 0.25, "kind": "scale", "factor": 100}
    events = Counter[str]()
    fedrank.run(
        raw, "server.max_norm_ratio=10", "rounds.minimum=3", out=out, watch=lambda e: events.update([e["event"]])
    )
    failed = [row for row in clients(out) if not row["ok"]]
    assert {reason(row) for row in failed} == {"no_answer", "refused", "not_merged"}
    assert events["not_merged"] == sum(reason(row) == "not_merged" for row in failed)
    told = [shown.format(**line) for line in lines(tmp_path / "log") if eval(chosen, {"line": line})]
    assert sorted(told) == sorted(f"run {row['round']} {row['client']} {row['error']}" for row in failed)
    if jq := shutil.which("jq"):
        words = [jq, "-r", f'select({found[0]}) | "{found[1]}"', str(tmp_path / "log")]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines() == told


def test_how_many_are_drawn_in_secret_is_no_metric(texts: Path, tmp_path: Path) -> None:
    at, seen = port(), set[str]()

    def watch(event: dict[str, Any]) -> None:
        seen.update(name for name, _ in scrape(at))

    raw = settings(texts, prometheus=at) | {"privacy": {"kind": "central", "clip": 1, "noise": 1, "delta": 0.1}}
    fedrank.run(raw, "rounds.personal=0", "rounds.count=2", out=tmp_path / "run", watch=watch)
    assert {"fedrank_epsilon", "fedrank_rounds_total", "fedrank_components"} <= seen
    told = {"clients_awaited", "clients_answered_total", "clients_failed_total", "bytes_total", "round_seconds_sum"}
    assert not seen & {f"fedrank_{name}" for name in told}


def test_a_port_in_use_is_told_before_anything_is_written(texts: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"observe\.prometheus=127\.0\.0\.1:{at}: Address already in use"):
            fedrank.run(settings(texts, prometheus=at, tensorboard=True), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    run = fedrank.run(settings(texts, prometheus=at), out=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="already in use"):
            fedrank.resume(run.path, "rounds.count=+1", f"observe.prometheus={taken.getsockname()[1]}")
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


# ---- the structured log


def test_every_event_is_a_line_and_so_is_what_fedrank_logs(texts: Path, tmp_path: Path) -> None:
    out, events = tmp_path / "logs" / "run.jsonl", list[dict[str, Any]]()

    def watch(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "cohort":
            logging.getLogger("fedrank.server").warning("said in round %d", event["round"])

    run = fedrank.run(settings(texts, log=str(out)), out=tmp_path / "run", watch=watch)
    found = lines(out)
    for line in found:
        assert list(line)[:7] == ["time", "level", "logger", "message", "run", "round", "client"]
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
        assert line["run"] == "run"
    mine = [line for line in found if line["logger"] == "fedrank.run"]
    assert [line["event"] for line in mine] == [event["event"] for event in events]
    for line, event in zip(mine, events, strict=True):
        assert line.items() >= json.loads(json.dumps(event)).items()
    failures = [(line["round"], line["client"], line["error"]) for line in mine if line["level"] == "WARNING"]
    assert failures == [(row["round"], row["client"], row["error"]) for row in clients(run.path) if not row["ok"]] != []
    said = [(line["round"], line["level"], line["message"]) for line in found if line["logger"] == "fedrank.server"]
    assert said == [(t, "WARNING", f"said in round {t}") for t in range(1, ROUNDS + 1)]
    logging.getLogger("fedrank").warning("after the run")
    assert lines(out) == found


def test_a_clients_own_words_are_in_no_line_and_a_failed_run_says_so(
    texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError, match="it broke"):
        fedrank.run(
            settings(texts, log=str(out)), "engine.failure_rate=0", out=tmp_path / "run", method=Quoting(breaks=2)
        )
    assert SECRET in caplog.text  # the client's side said it, in this process
    assert SECRET not in out.read_text()
    failed = [line for line in lines(out) if line.get("error", "").startswith("ValueError")]
    assert failed
    assert {line["client"] for line in failed} <= {"0", "1"}
    last = lines(out)[-1]
    assert (last["level"], last["round"], last["message"]) == ("ERROR", 2, "the run failed: RuntimeError: it broke")


def test_an_end_that_is_no_mistake_is_a_stop(texts: Path, tmp_path: Path) -> None:
    """As Flower ends a server app that is stopped."""
    events = experiment.start(config.load(settings(texts, log=str(tmp_path / "log"))), tmp_path / "run")
    while next(events)["event"] != "round":
        pass
    with pytest.raises(SystemExit):
        events.throw(SystemExit(1))  # type: ignore[attr-defined]
    assert lines(tmp_path / "log")[-1]["message"] == "the run was stopped"


def test_a_stopped_run_says_so_and_closes_what_was_open(texts: Path, tmp_path: Path) -> None:
    out, at, run = tmp_path / "run.jsonl", port(), tmp_path / "run"
    events = experiment.start(config.load(settings(texts, log=str(out), prometheus=at, tensorboard=True)), run)
    while next(events)["event"] != "round":
        pass
    scrape(at)
    events.close()
    assert (lines(out)[-1]["level"], lines(out)[-1]["message"]) == ("WARNING", "the run was stopped")
    with pytest.raises(OSError, match="refused"):
        scrape(at)
    assert curves(run / "tensorboard")["train_loss"].keys() == {1}


def test_a_workers_record_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run.jsonl"
    caplog.set_level(logging.WARNING, "fedrank")
    with watching.watching(Observe(log=str(out)), tmp_path / "run"), Workers(2, 1) as workers:
        assert list(workers.share(say)([1, 2, 3])) == [os.getpid()] * 3  # their parent
    assert [line["message"] for line in lines(out)] == ["worker at 1", "worker at 2", "worker at 3"]


def say(number: int) -> int:
    logging.getLogger("fedrank.engines.local").warning("worker at %d", number)
    return os.getppid()


# ---- TensorBoard


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard shows what is in a folder."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(folder), {"tensors": 0})
    found.Reload()
    tensors = {tag: found.Tensors(tag) for tag in found.Tags()["tensors"] if not tag.endswith("/text_summary")}
    for events in tensors.values():
        assert len({event.step for event in events}) == len(events)
        times = [event.wall_time for event in events]
        assert times == sorted(times)
        assert times[-1] <= time.time()
    return {tag: {e.step: float(make_ndarray(e.tensor_proto)) for e in events} for tag, events in tensors.items()}


def expected(run: Path) -> dict[str, dict[int, float]]:
    found = dict[str, dict[int, float]]()
    for row in ledger.read(run / "rounds.jsonl"):
        for name, value in numbers(row).items():
            found.setdefault(name, {})[row["round"]] = value
    return found


def single(found: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """In the precision that TensorBoard keeps."""
    return {tag: {step: float(np.float32(value)) for step, value in steps.items()} for tag, steps in found.items()}


def test_event_files_hold_the_ledger_also_of_rounds_before_a_resume(texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fedrank.run(settings(texts, tensorboard=True), out=run)
    assert curves(run / "tensorboard") == single(expected(run))
    fedrank.resume(run, "rounds.count=+2")
    assert curves(run / "tensorboard") == single(expected(run))
    assert expected(run)["bytes_down"].keys() == set(range(1, ROUNDS + 3))
    fedrank.resume(run, "rounds.count=+1", f"observe.tensorboard={tmp_path / 'boards'}")
    assert curves(tmp_path / "boards" / "run") == single(expected(run))


def test_the_folder_of_another_run_is_not_written_to(texts: Path, tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    fedrank.run(settings(texts, tensorboard=str(boards)), "rounds.count=1", out=tmp_path / "a" / "run")
    with pytest.raises(ConfigError, match=r"observe\.tensorboard: .*boards/run is another run's"):
        fedrank.run(settings(texts, tensorboard=str(boards)), "rounds.count=1", out=tmp_path / "b" / "run")
    assert not (tmp_path / "b").exists()


# ---- MLflow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Quicker than a database, and so old that MLflow wants to be asked twice."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return str(tmp_path / "mlruns")


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def remembered(uri: str, run: Path) -> Any:
    """(the client, the MLflow run) of a run directory."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return client, client.get_run(json.loads((run / "mlflow.json").read_text())["run"])


def arrived(uri: str, run: Path) -> dict[str, dict[int, float]]:
    client, found = remembered(uri, run)
    names = [name for name in found.data.metrics if not name.startswith("summary.")]
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in names}
    for name, history in histories.items():
        assert len({m.step for m in history}) == len(history), name
    return {name: {m.step: m.value for m in history} for name, history in histories.items()}


@pytest.mark.slow
def test_mlflow_holds_the_ledger_and_a_resumed_run_is_the_same_one(texts: Path, tmp_path: Path, tracking: str) -> None:
    run = tmp_path / "run"
    fedrank.run(settings(texts, mlflow=tracking), out=run)
    assert arrived(tracking, run) == expected(run)
    client, found = remembered(tracking, run)
    first = found.info.run_id
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert client.get_experiment(found.info.experiment_id).name == "fedrank"
    assert found.data.tags["fedrank.version"] == fedrank.__version__
    assert found.data.params["local.lr"] == "0.003"
    assert found.data.params["data.path"] == str(texts)
    assert not [key for key in found.data.params if key.startswith("observe")]
    assert found.data.metrics["summary.adapter_bytes_up"] == fedrank.Run(run).summary["adapter_bytes_up"]
    fedrank.resume(run, "rounds.count=+2", "observe.mlflow=null")
    fedrank.resume(run, "rounds.count=+1", f"observe.mlflow={tracking}")  # which lacks two rounds
    client, found = remembered(tracking, run)
    assert found.info.run_id == first
    assert arrived(tracking, run) == expected(run)
    assert len(expected(run)["train_loss"]) == ROUNDS + 3
    assert (found.data.params["rounds.count"], found.data.tags["rounds.count"]) == (str(ROUNDS), str(ROUNDS + 3))
    assert found.data.metrics["summary.rounds"] == ROUNDS + 3
    fedrank.resume(run, "rounds.count=+1", "observe.mlflow_experiment=another")
    assert arrived(tracking, run) == expected(run)
    assert remembered(tracking, run)[1].info.run_id != first


def test_what_mlflow_missed_while_it_was_away_comes_later(
    texts: Path, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    send: Callable[..., Any] = MlflowClient.log_batch
    away, back = Counter[str](), list[int]()

    def fail(self: Any, run: str, metrics: Any = (), **rest: Any) -> None:
        if metrics and not back:
            away["times"] += 1
            raise ConnectionError("the server is away")
        send(self, run, metrics=metrics, **rest)

    def watch(event: dict[str, Any]) -> None:
        if (event["event"], event.get("round")) == ("cohort", ROUNDS):
            back.append(ROUNDS)

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    run = tmp_path / "run"
    fedrank.run(settings(texts, mlflow=folder, mlflow_experiment="away"), out=run, watch=watch)
    assert away["times"] == ROUNDS - 1  # once a round
    said = [record.getMessage() for record in caplog.records if record.name == "fedrank.observe.watching"]
    assert said == ["observe.mlflow has failed, and the run goes on: ConnectionError: the server is away"]
    assert arrived(folder, run) == expected(run)


@pytest.mark.slow
def test_how_a_run_ended_is_its_status_and_the_adapter_comes_along_where_asked(
    texts: Path, tmp_path: Path, tracking: str
) -> None:
    given = settings(texts, mlflow=tracking, mlflow_experiment="status", mlflow_adapter=True)
    with pytest.raises(RuntimeError, match="it broke"):
        fedrank.run(given, "engine.failure_rate=0", out=tmp_path / "a", method=Quoting(breaks=2))
    assert remembered(tracking, tmp_path / "a")[1].info.status == "FAILED"
    events = experiment.start(config.load(given), tmp_path / "b")
    while next(events)["event"] != "round":
        pass
    assert remembered(tracking, tmp_path / "b")[1].info.status == "RUNNING"
    events.close()
    client, found = remembered(tracking, tmp_path / "b")
    assert (found.info.status, list(client.list_artifacts(found.info.run_id))) == ("KILLED", [])
    fedrank.resume(tmp_path / "b")
    client, found = remembered(tracking, tmp_path / "b")
    assert found.info.status == "FINISHED"
    sent = {entry.path for entry in client.list_artifacts(found.info.run_id, "adapter")}
    assert {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")} <= sent
    beside = Path(tracking.removeprefix("sqlite:///")).parent / "mlruns"
    assert found.info.artifact_uri == str(beside / found.info.run_id / "artifacts")


def test_a_tracking_server_that_cannot_be_used_is_told_before_anything_is_written(
    texts: Path, tmp_path: Path, folder: str
) -> None:
    with pytest.raises(ConfigError, match=r"observe\.mlflow: .*Connection refused"):
        fedrank.run(settings(texts, mlflow=f"http://127.0.0.1:{port()}"), out=tmp_path / "run")
    for scheme in ("https", "HTTP", "postgresql", "mysql+pymysql"):
        with pytest.raises(ConfigError, match=r"observe\.mlflow: .*MLFLOW_TRACKING_PASSWORD") as told:
            fedrank.run(settings(texts, mlflow=f"{scheme}://me:hidden@localhost"), out=tmp_path / "run")
        assert "hidden" not in str(told.value)
    assert not (tmp_path / "run").exists()
    run = fedrank.run(settings(texts), "rounds.count=1", out=tmp_path / "run")
    (run.path / "mlflow.json").write_text(json.dumps({"uri": folder, "experiment": "fedrank", "run": "0" * 32}))
    with pytest.raises(ConfigError, match=r"observe\.mlflow: .*not found"):
        fedrank.resume(run.path, "rounds.count=+1", f"observe.mlflow={folder}")


# ---- all of them


def test_with_watchers_a_run_is_the_same_to_the_bit(texts: Path, tmp_path: Path, folder: str) -> None:
    plain = fedrank.run(settings(texts), out=tmp_path / "plain")
    every = settings(texts, log=str(tmp_path / "log"), prometheus=port(), tensorboard=True, mlflow=folder)
    watched = fedrank.run(every, out=tmp_path / "watched")
    assert toy.equal(plain.state, watched.state)
    timed = {"wall_seconds", "train_seconds", "evaluation_seconds"}
    bare = [[{k: v for k, v in row.items() if k not in timed} for row in run.rounds] for run in (plain, watched)]
    assert bare[0] == bare[1]
    off = ("observe.log=null", "observe.prometheus=null", "observe.tensorboard=false", "observe.mlflow=null")
    fedrank.resume(watched.path, "rounds.count=+1", *off)
    assert watched.config.observe == Observe()
    fedrank.resume(plain.path, "rounds.count=+1", f"observe.prometheus={port()}")
    assert toy.equal(plain.state, watched.state)


def test_what_a_run_does_not_tell_is_not_watched(
    texts: Path, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a private run, whose rows have null for most of what comes from clients."""
    run, at, out = tmp_path / "run", port(), tmp_path / "lines"
    fedrank.run(settings(texts), out=run)
    told = {"round", "components", "modules_alive", "accuracy"}
    first, *rest = ledger.read(run / "rounds.jsonl")
    rows = [{name: value if name in told else None for name, value in row.items()} for row in (first, *rest)]
    (run / "rounds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:-1]))
    given = Observe(log=str(out), prometheus=at, tensorboard=True, mlflow=folder)
    with watching.watching(given, run) as tell:
        tell({"event": "resume", "round": ROUNDS - 1})
        ledger.append(run / "rounds.jsonl", rows[-1:])
        tell({"event": "round", "rounds": ROUNDS, **rows[-1]})
        found = scrape(at)
        tell({"event": "end", "rounds": ROUNDS, "evaluation_bytes": None})
    assert not [record for record in caplog.records if record.name.startswith("fedrank.observe")]
    names = {name.removeprefix("fedrank_") for name, _ in found if not name.endswith("_created")}
    assert names == {
        "build_info", "rounds_total", "round", "rounds_planned", "clients_awaited", "components", "modules_alive",
        "accuracy", "evaluation_bytes_total",
    }  # fmt: skip
    assert (found["fedrank_rounds_total", ""], found["fedrank_evaluation_bytes_total", ""]) == (ROUNDS, 0)
    assert curves(run / "tensorboard") == single(expected(run))
    assert arrived(folder, run) == expected(run)
    assert lines(out)[-2]["message"] == f"round {ROUNDS} of {ROUNDS} is played"


def test_a_log_on_a_full_disk_does_not_end_the_run(
    texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    run = fedrank.run(settings(texts, log="/dev/full", tensorboard=True), out=tmp_path / "run")
    assert len(run.rounds) == ROUNDS
    said = [record for record in caplog.records if record.name == "fedrank.observe.watching"]
    assert [record.getMessage() for record in said] == [
        "observe.log has failed, and the run goes on: OSError: [Errno 28] No space left on device"
    ]
    assert curves(run.path / "tensorboard") == single(expected(run.path))  # the others go on, too


def test_a_missing_package_is_told_by_its_extra(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (("prometheus", 9464), ("tensorboard", True), ("mlflow", "sqlite:///m.db")):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None)
            with pytest.raises(ConfigError, match=rf"observe\.{key}: it needs .*pip install 'fedrank\[observe\]'"):
                fedrank.run(settings(texts, **{key: value}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("observe.prometheus=0", "must be a port, such as 9464, or host:port"),
        ("observe.prometheus=70000", "must be a port"),
        ("observe.prometheus=:9464", "must be a port"),
        ("observe.prometheus=true", "must be a port"),
        ("observe.tensorboard=3", "must be true, false or a folder"),
        ("observe.log=''", "at least 1 character"),
        ("observe.prometeus=9464", "did you mean 'observe.prometheus'"),
    ],
)
def test_mistakes_name_the_key(texts: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"{override.split('=')[0]}.*{told}"):
        config.load(settings(texts), [override])


def test_paths_are_whole_and_ports_are_this_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = Observe(log="a.jsonl", prometheus=9464, tensorboard="boards", mlflow="sqlite:///m.db")
    assert (given.log, given.prometheus) == (str(tmp_path / "a.jsonl"), "127.0.0.1:9464")
    assert (given.tensorboard, given.mlflow) == (str(tmp_path / "boards"), f"sqlite:///{tmp_path / 'm.db'}")
    assert Observe(**given.model_dump()) == given
    assert Observe(log="stderr", mlflow="http://127.0.0.1:5000", prometheus="[::]:1").model_dump() == {
        "log": "stderr", "mlflow": "http://127.0.0.1:5000", "prometheus": "[::]:1", "tensorboard": False,
        "mlflow_experiment": "fedrank", "mlflow_adapter": False,
    }  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_same_port_and_its_log_reaches_stderr(texts: Path, tmp_path: Path) -> None:
    """From the command line, with the kill wherever it falls after the second round."""
    at, run, file = port(), tmp_path / "run", tmp_path / "my.yaml"
    file.write_text(json.dumps(settings(texts, prometheus=at, tensorboard=True, log="stderr")))
    command = [sys.executable, "-m", "fedrank.cli"]
    with subprocess.Popen([*command, "run", str(file), "rounds.count=300", "--out", str(run), "-o", "quiet"]) as first:
        while len(ledger.read(run / "rounds.jsonl")) < 2:
            time.sleep(0.02)
            assert first.poll() is None
        first.send_signal(signal.SIGKILL)
    played = Store.open(run).state()[0].round  # the ledger may be a row ahead
    more = [*command, "resume", str(run), f"rounds.count={played + 2}", "-o", "quiet"]
    done = subprocess.run(more, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["event"] for line in found if line.get("event") != "client"] == [
        "resume", *["cohort", "round"] * 2, "end",
    ]  # fmt: skip
    assert curves(run / "tensorboard") == single(expected(run))
    fedrank.resume(run, "rounds.count=+1", watch=lambda event: equals(scrape(at), run))
