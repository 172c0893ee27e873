"""The Flower engine on a grid in this process: parity, faults, and what travels before the first round."""

import contextlib
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr import serverapp
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError
from typer.testing import CliRunner

import fedrank
from federation import LABELS, answered, local, named, put_key, rows, state
from fedrank import (
    apps,
    central,
    cli,
    client,
    config,
    experiment,
    hello,
    privacy,
    remote,
    resident,
    sites,
    views,
)
from fedrank import frame as frames
from fedrank.config import ConfigError, PrivacySettings
from fedrank.engines import flower, nodes
from fedrank.forecast import forecast
from fedrank.frame import Refused, pack, unpack
from fedrank.protocol import Device, Load
from fedrank.store import Store, StoreError
from fedrank.training.sources import DataError
from fedrank.wire import Wire

NAMES = ("north", "south", "west")
Answer = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's own processes know of themselves, without which no message is made."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)


def written(path: Path, found: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A site file by name, each with rows and a store of its own."""
    found = {}
    for at, name in enumerate(NAMES):
        written(tmp_path / name / "rows" / "train.jsonl", rows(at, 30 + at))
        found[name] = tmp_path / name / "site.yaml"
        found[name].write_text(f"client: {name}\ndata: {{path: rows}}\nstore: store\n")
    return found


def settings(**sections: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": {"name": "tiny-encoder"}, "data": {"labels": list(LABELS)}, "adapter": {"rank": 4},
        "local": {"lr": 0.01, "steps": 2, "batch_size": 8}, "method": {"name": "fedavg"},
        "rounds": {"count": 2, "cohort": 3, "evaluate_every": 1, "minimum": 3},
        "engine": {"kind": "flower", "insecure": True, "compute": "float32", "products": "torch"},
    }  # fmt: skip
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


class Grid(serverapp.Grid):
    """Nodes in this process. answers: node -> what its site makes of a frame; None: the node is silent."""

    def __init__(self, answers: dict[int, Callable[[bytes], bytes] | None]) -> None:
        self.answers, self.replies, self.sent = answers, dict[str, Message](), list[tuple[int, bytes]]()
        self.open = dict[str, Message]()

    run = None  # type: ignore[assignment]

    def set_run(self, run: Any) -> None: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        found = []
        for message in messages:
            number, node = f"message {len(self.sent)}", message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = number
            self.sent.append((node, message.content.config_records["frame"]["frame"]))
            if (answer := self.answers.get(node)) is not None:
                app = flower.client_app(lambda frame, told, own, seconds, answer=answer: answer(frame))
                context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
                self.replies[number] = app(message, context)
            else:
                self.open[number] = message
            found.append(number)
        return found

    def late(self, answer: Callable[[bytes], bytes]) -> None:
        """What was left without an answer gets this one."""
        for number, message in self.open.items():
            app = flower.client_app(lambda frame, told, own, seconds: answer(frame))
            self.replies[number] = app(message, Context(1, message.metadata.dst_node_id, {}, RecordDict(), {}))
        self.open.clear()

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        return [self.replies.pop(number) for number in numbers if number in self.replies]


def grid_of(files: dict[str, Path]) -> Grid:
    return Grid({at: sites.Desk(sites.read(path)).answer for at, path in enumerate(files.values(), 1)})


def play(raw: dict[str, Any], out: Path, grid: Any) -> list[dict[str, Any]]:
    return list(experiment.start(config.load(raw), out, by=partial(central.prepare, grid=grid)))


def ledger(path: Path, name: str) -> list[dict[str, Any]]:
    """Its rows, in an order that is not that of arrival, without what a clock on the wall says."""
    found = [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
    timed = ("seconds", "wall_seconds", "evaluation_seconds", "train_seconds")
    return sorted(
        ({k: v for k, v in row.items() if k not in timed} for row in found),
        key=lambda row: (row["round"], row.get("client", "")),
    )


# ---- parity


@pytest.mark.parametrize("method", ["fedara", "pf2lora"])
@pytest.mark.parametrize("tested", [False, True], ids=["no test here", "a test here"])
def test_on_flower_a_run_is_the_local_one(method: str, tested: bool, files: dict[str, Path], tmp_path: Path) -> None:
    """The same State, bit for bit, and the same ledgers, whatever order the answers come in."""
    test, data = rows(9, 20), {}
    if tested:
        written(tmp_path / "held" / "test.jsonl", test)
        (tmp_path / "held" / "labels.txt").write_text("\n".join(LABELS))
        data = {"path": str(tmp_path / "held"), "labels": []}
    raw = settings(method={"name": method}, data=data)
    play(raw, tmp_path / "flower", grid_of(files))
    here = {**raw, "data": {"name": "sites"}, "engine": {"compute": "float32", "products": "torch", "stack": 1}}
    own = replace(sites.together(files.values(), LABELS), test=test if tested else ())
    fedrank.run(here, out=tmp_path / "local", data=own)
    for round in (1, 2):
        assert state(tmp_path / "flower", round) == state(tmp_path / "local", round)
    for name in ("rounds", "clients"):
        assert ledger(tmp_path / "flower", name) == ledger(tmp_path / "local", name)
    last = ledger(tmp_path / "flower", "rounds")[-1]
    assert last["clients_ok"] == 3
    assert 0 < last["personal_accuracy"] <= 1
    assert 0 < last["accuracy"] <= 1


@pytest.mark.slow
def test_a_fresh_process_for_every_frame_changes_no_bit(files: dict[str, Path], tmp_path: Path) -> None:
    """As Flower starts one; what a site knows is in its store."""
    raw = settings(method={"name": "pf2lora"})
    play(raw, tmp_path / "warm", grid_of(files))
    other = {name: path.parent / "again.yaml" for name, path in files.items()}
    for name, path in other.items():
        path.write_text(files[name].read_text().replace("store: store", "store: other"))
    cold = Grid({at: lambda frame, path=path: sites.Desk(sites.read(path)).answer(frame) for at, path in enumerate(other.values())})  # fmt: skip
    play(raw, tmp_path / "cold", cold)
    assert state(tmp_path / "warm", 2) == state(tmp_path / "cold", 2)


# ---- schemas


def spoken(found: Iterable[bytes]) -> list[tuple[str, int]]:
    return sorted({(meta["kind"], meta["schema"]) for meta, _ in map(unpack, found)})


def old(answer: Answer, monkeypatch: pytest.MonkeyPatch, heard: list[bytes]) -> Answer:
    """A site whose fedrank speaks schema 1 alone, and what it says."""

    def answered(frame: bytes) -> bytes:
        with monkeypatch.context() as then:
            then.setattr(frames, "SCHEMA", 1)
            heard.append(answer(frame))
        return heard[-1]

    return answered


@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_sites_of_two_schemas_under_one_server(
    dtype: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is never sent what it would refuse, and the State is that of a run in which all are new."""
    raw = settings(method={"name": "fedara"}, wire={"dtype": dtype})
    play(raw, tmp_path / "new", grid_of(files))
    mixed, heard = grid_of(files), list[bytes]()
    mixed.answers[2] = old(mixed.answers[2], monkeypatch, heard)
    play(raw, tmp_path / "mixed", mixed)
    for node, schema in ((1, 2), (2, 1), (3, 2)):
        assert spoken(frame for at, frame in mixed.sent if at == node) == [
            ("evaluate", schema), ("setup", 1), ("train", schema)
        ]  # fmt: skip
    assert spoken(heard) == [("evaluation", 1), ("registration", 1), ("update", 1)]
    assert state(tmp_path / "mixed", 2) == state(tmp_path / "new", 2)
    for name in ("rounds", "clients"):
        assert ledger(tmp_path / "mixed", name) == ledger(tmp_path / "new", name)


def test_new_sites_under_an_old_server(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its setup names no other schema; so nothing comes that it would refuse."""
    play(settings(), tmp_path / "new", grid_of(files))
    setup, heard, grid = central.setup, list[bytes](), grid_of(files)
    monkeypatch.setattr(central, "setup", lambda made, run: replace(setup(made, run), schema=1))
    for node, answer in grid.answers.items():
        grid.answers[node] = lambda frame, answer=answer: heard.append(answer(frame)) or heard[-1]
    play(settings(), tmp_path / "old", grid)
    assert {schema for _, schema in spoken([*heard, *(frame for _, frame in grid.sent)])} == {1}
    assert state(tmp_path / "old", 2) == state(tmp_path / "new", 2)


def test_a_site_that_goes_back_to_an_older_fedrank_is_told_again(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(files)
    raw = settings(rounds={"count": 3, "minimum": 2})  # in round 2 it is asked for a score, too
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] == 1:
            grid.answers[2] = old(sites.Desk(sites.read(files["south"])).answer, monkeypatch, [])
    found = {row["round"]: row for row in ledger(tmp_path / "run", "clients") if row["client"] == "south"}
    assert found[2]["error"].startswith("the frame has schema version 2, this fedrank ")
    assert found[3]["ok"]


def test_who_is_there_is_named_with_its_version(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    made = Admitted(a=lambda frame: b"a")
    with caplog.at_level("INFO"):
        made.engine.fleet()
    assert "client a is there: 5 examples, , fedrank 0.0.7" in caplog.text


@pytest.mark.parametrize(("theirs", "says"), [
    (fedrank.__version__, ""), ("9.9", f"; fedrank {fedrank.__version__} here, 9.9 there"),
    (None, f"; fedrank {fedrank.__version__} here, an older one there"),
])  # fmt: skip
def test_a_refusal_names_both_versions_where_they_differ(
    theirs: str | None, says: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = replace(setup_of(settings()), version=theirs)
    desk = sites.Desk(sites.read(files["north"]))
    with pytest.raises(Refused, match="client north: the adapter here does not start") as error:
        desk.answer(hello.write_setup(replace(setup, start="other")))
    assert str(error.value).endswith(f"are both fedranks of one version?{says}")
    with pytest.raises(Refused) as error:
        desk.answer(hello.write_setup(replace(setup, config={**setup.config, "new": 1})))
    assert str(error.value) == f"client north: ConfigError: what is wrong is said in the site's own log{says}"


def test_a_server_s_refusal_names_both_versions(files: dict[str, Path], tmp_path: Path) -> None:
    made = central.prepare(config.load(settings()), grid=grid_of(files))
    engine = made.carrier(made, Wire(made.spec, made.begin.adapter, "f32", made.run_id, 0), Store(tmp_path))
    assert isinstance(engine, nodes.Sites)
    found = replace(REGISTRATION, run=made.run_id, numerics={"fedrank": "9.9"})
    with pytest.raises(Refused, match=f"has base model print, not .*; fedrank {fedrank.__version__} here, 9.9 there$"):
        engine.admit(hello.write_registration(found), 1)


def test_what_differs_is_named(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(files)
    answer = grid.answers[2]
    assert answer is not None

    def elsewhere(frame: bytes) -> bytes:
        meta, tensors = unpack(answer(frame))
        if meta["kind"] == "update":
            meta["numerics"] = {**meta["numerics"], "cpu": "ABACUS"}
        return pack(meta, {name: array.copy() for name, array in tensors.items()})

    grid.answers[2] = elsewhere
    play(settings(rounds={"count": 1}), tmp_path / "run", grid)
    assert "client south computes otherwise than the server" in caplog.text
    assert "'cpu'" in caplog.text
    assert "ABACUS" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    {"adapter": {"head": "frozen"}}, {"method": {"name": "pf2lora"}}, {"method": {"name": "flora"}},
])  # fmt: skip
def test_an_import_is_where_every_site_starts(
    more: dict[str, Any], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server app is told of it, and what the sites are; a resumed run knows it too."""
    play(settings(rounds={"count": 1}), tmp_path / "before", grid_of(files))
    raw, adapter, grid = settings(rounds={"count": 1}, **more), tmp_path / "before" / "adapter", grid_of(files)

    def played(settings: config.Config, path: Path, told: dict[str, Any]) -> Iterable[Any]:
        (tmp_path / "run.yaml").write_text(config.dump(settings))
        apps._play(grid, {**told, "out": str(path), "config": str(tmp_path / "run.yaml")})  # type: ignore[arg-type]
        return ()

    monkeypatch.setattr(remote, "_play", played)
    monkeypatch.setattr(logging.getLogger("fedrank"), "handlers", [])
    list(experiment.start(config.load(raw), tmp_path / "run", imported=adapter))
    fedrank.resume(tmp_path / "run", "rounds.count=+1")
    local(files.values(), {**raw, "rounds": {**raw["rounds"], "count": 2}}, tmp_path / "local", imported=adapter)
    kept = [Store.open(tmp_path / name).state(0)[0] for name in ("run", "local", "before")]
    now, then, other = ([hello.begun(one.adapter), *map(hello.begun, one.base_updates.values())] for one in kept)
    assert now == then != other
    last = [Store.open(tmp_path / name).state(2)[0] for name in ("run", "local")]
    assert len({hello.begun(one.adapter) for one in last}) == 1
    assert [row["ok"] for row in ledger(tmp_path / "run", "clients")] == [True] * 6


# ---- what travels


def test_no_path_travels(files: dict[str, Path], tmp_path: Path) -> None:
    """Neither the sites' nor the server's; also where something goes wrong."""
    written(tmp_path / "secret" / "test.jsonl", rows(9, 20))
    (tmp_path / "secret" / "labels.txt").write_text("\n".join(LABELS))
    grid, heard = grid_of(files), list[bytes]()

    def listened(answer: Callable[[bytes], bytes], frame: bytes) -> bytes:
        try:
            heard.append(answer(frame))
        except Refused as error:
            heard.append(str(error).encode())
            raise
        return heard[-1]

    grid.answers = {node: partial(listened, answer) for node, answer in grid.answers.items() if answer is not None}
    play(settings(data={"path": str(tmp_path / "secret"), "labels": []}, method={"name": "pf2lora"}), tmp_path / "run", grid)  # fmt: skip
    (files["north"].parent / "rows" / "train.jsonl").unlink()  # what it says of that is for its own log
    desk = sites.Desk(sites.read(files["north"]))
    setup = next(frame for _, frame in grid.sent if unpack(frame)[0]["kind"] == "setup")
    with pytest.raises(Refused, match="client north: DataError: what is wrong is said in the site's own log") as error:
        desk.answer(setup)
    everything = b"".join([*heard, *(frame for _, frame in grid.sent), str(error.value).encode()])
    assert len(heard) > 6
    assert str(tmp_path).encode() not in everything
    assert b"secret" not in everything


@pytest.mark.slow
def test_lost_private_state_is_told_without_its_place(files: dict[str, Path], tmp_path: Path) -> None:
    grid = grid_of(files)
    raw = settings(method={"name": "pf2lora"}, rounds={"count": 1})
    play(raw, tmp_path / "run", grid)
    for path in (files["south"].parent / "store").glob("*/private/south/*.safetensors"):
        path.unlink()
    list(experiment.go_on(tmp_path / "run", ["rounds.count=+1"], by=partial(central.prepare, grid=grid)))
    row = next(row for row in ledger(tmp_path / "run", "clients") if (row["round"], row["client"]) == (2, "south"))
    assert "do not travel" in row["error"]
    assert str(tmp_path) not in row["error"]


# ---- faults


def node(grid: Grid, name: str) -> int:
    return 1 + NAMES.index(name)


def test_a_site_that_sends_garbage_ends_no_round(files: dict[str, Path], tmp_path: Path) -> None:
    grid = grid_of(files)
    south = grid.answers[2]
    assert south is not None

    def garbled(frame: bytes) -> bytes:
        return south(frame) if unpack(frame)[0]["kind"] == "setup" else b"garbage" * 100

    grid.answers[2] = garbled
    play(settings(rounds={"minimum": 2, "count": 1}), tmp_path / "run", grid)
    found = {row["client"]: row for row in ledger(tmp_path / "run", "clients")}
    assert [found[name]["ok"] for name in NAMES] == [True, False, True]
    assert "too short" in found["south"]["error"]
    assert ledger(tmp_path / "run", "rounds")[0]["clients_failed"] == 1


def test_whatever_a_site_does_the_run_goes_on(files: dict[str, Path], tmp_path: Path) -> None:
    """Crashes in training, answers for an old round and too late; leaves, and joins late: each is told in the ledger, and
    the State is what the answers that were good imply."""
    grid, run = grid_of(files), tmp_path / "run"
    desk, kept = sites.Desk(sites.read(files["south"])), dict[int, bytes]()

    def crash(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    def south(frame: bytes) -> bytes:
        meta, _ = unpack(frame)
        if meta["kind"] == "train" and meta["round"] == 2:
            session = desk.sessions[meta["run"]]
            return client.handle(frame, replace(session.site, fit=crash))
        kept[meta.get("round", 0)] = desk.answer(frame)
        return kept[1 if meta.get("round") == 3 else meta.get("round", 0)]

    west = grid.answers.pop(3)  # it joins in the third round
    grid.answers[2] = south
    raw = settings(
        method={"name": "pf2lora"},
        rounds={"count": 6, "minimum": 1, "deadline": 0.2, "evaluate_every": 6, "personal": 0},
    )
    for event in experiment.start(config.load(raw), run, by=partial(central.prepare, grid=grid)):
        match event["event"], event.get("round"):
            case "round", 2:
                grid.answers[3] = west
            case "round", 3:
                grid.answers[2] = None
            case "cohort", 5:
                grid.answers[2] = south
                grid.late(desk.answer)  # to the fourth round's request
            case "round", 5:
                del grid.answers[3]
    found = {(row["round"], row["client"]): row.get("error", "") for row in ledger(run, "clients")}
    wrong = {at: error for at, error in found.items() if error}
    assert wrong.keys() == {(2, "south"), (3, "south"), (4, "south")}
    assert wrong[2, "south"] == "ZeroDivisionError: the message stays with the client"
    assert "an answer to run, round, client, plan" in wrong[3, "south"]
    assert wrong[4, "south"] == "no answer within 0.2 s, though its node is connected"
    assert answered(run) == {
        1: {"north", "south"}, 2: {"north"}, 3: {"north", "west"}, 4: {"north", "west"},
        5: {"north", "south", "west"}, 6: {"north", "south"},
    }  # fmt: skip
    local(files.values(), raw, tmp_path / "local", answered(run))
    assert state(run, 6) == state(tmp_path / "local", 6)


def asked(grid: Any, requests: list[tuple[str, int, bytes]], seconds: float | None) -> dict[str, bytes | str]:
    return dict(flower.converse(flower.Apart(grid), requests, seconds))


def test_a_last_look_goes_before_the_deadline() -> None:
    """What is there by then counts, however long it took to ask everyone."""
    assert asked(Grid({1: lambda frame: frame}), [("a", 1, b"x")], 1e-9) == {"a": b"x"}


def test_too_few_answers_are_not_merged(files: dict[str, Path], tmp_path: Path) -> None:
    grid = grid_of(files)
    south = grid.answers[2]
    assert south is not None
    grid.answers[2] = lambda frame: south(frame) if unpack(frame)[0]["kind"] == "setup" else b"garbage"
    play(settings(rounds={"count": 1}), tmp_path / "run", grid)
    found = {row["client"]: row.get("error") for row in ledger(tmp_path / "run", "clients")}
    assert found["north"] == found["west"] == "not merged: fewer answered than rounds.minimum"
    run = fedrank.Run(tmp_path / "run").state
    assert run.seen == {}


def test_late_sites_are_told_apart_from_those_that_are_gone(files: dict[str, Path]) -> None:
    grid = Grid({1: None, 2: lambda frame: frame})
    assert asked(grid, [("a", 1, b"x"), ("b", 2, b"y"), ("c", 3, b"z")], 0.3) == {
        "b": b"y",
        "a": "no answer within 0.3 s, though its node is connected",
        "c": "no answer within 0.3 s, and its node is gone",
    }


def test_who_is_awaited_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A deadline must not be all that tells of a hang."""
    monkeypatch.setattr(flower, "WORD", 0.1)
    asked(Grid({1: None}), [("north", 1, b"x")], 0.4)
    assert "awaited for 0 s: north" in caplog.text


@pytest.mark.parametrize("content", [
    RecordDict({}), RecordDict({"frame": ConfigRecord({"frame": "text"})}), RecordDict({"frame": ConfigRecord({"frame": 3})}),
    RecordDict({"other": ConfigRecord({"frame": b"x"})}),
])  # fmt: skip
def test_messages_that_hold_no_frame(content: RecordDict) -> None:
    grid = Grid({1: lambda frame: frame})
    original = grid.pull_messages

    def changed(numbers: Iterable[str]) -> list[Message]:
        for message in original(numbers):
            said = Message(RecordDict({}), 1, flower.ASK)
            said.metadata.__dict__["_message_id"] = message.metadata.reply_to_message_id
            return [Message(content, reply_to=said)]
        return []

    grid.pull_messages = changed  # type: ignore[method-assign]
    assert asked(grid, [("a", 1, b"x")], 5.0) == {"a": "a message that holds no frame"}


def test_flowers_own_errors_are_reasons() -> None:
    grid = Grid({1: None})
    said = Message(RecordDict({}), 1, flower.ASK)

    def failed(numbers: Iterable[str]) -> list[Message]:
        (said.metadata.__dict__["_message_id"],) = numbers
        return [Message(Error(3, "gone"), reply_to=said)]

    grid.pull_messages = failed  # type: ignore[method-assign]
    assert asked(grid, [("a", 1, b"x")], None) == {"a": "Flower error 3: gone"}


def obstructed(grid: Grid, stalls: bool) -> threading.Event:
    """Flower waits for what is announced and not there, and what it cannot read is an error of who pulls: node 2's is such."""
    original, over = grid.pull_messages, threading.Event()

    def pull(numbers: Iterable[str]) -> list[Message]:
        found = original(numbers)
        if any(message.metadata.src_node_id == 2 for message in found):
            if not stalls:
                raise DecodeError("Error parsing message")
            over.wait(60)
        return found

    grid.pull_messages = pull  # type: ignore[method-assign]
    return over


@pytest.mark.parametrize("stalls", [False, True])
def test_one_answer_that_cannot_be_had_holds_no_other_up(stalls: bool) -> None:
    grid = Grid(dict.fromkeys((1, 2, 3), lambda frame: frame))
    over = obstructed(grid, stalls)
    started = time.monotonic()
    found = asked(grid, [("a", 1, b"x"), ("b", 2, b"y"), ("c", 3, b"z")], 1.0)
    assert time.monotonic() - started < 10
    over.set()
    why = (
        "no answer within 1 s, though its node is connected"
        if stalls
        else "an answer that Flower cannot read: DecodeError"
    )
    assert found == {"a": b"x", "b": why, "c": b"z"}


@pytest.mark.parametrize("stalls", [False, True])
def test_a_registration_that_cannot_be_had_holds_no_other_up(stalls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GREETING", 1.0)
    monkeypatch.setattr(nodes, "SLOWEST", 0.01)
    made = Admitted(a=lambda frame: b"a", b=lambda frame: b"b")
    over = obstructed(made.grid, stalls)
    assert list(made.engine.fleet()) == ["a"]
    over.set()


@pytest.mark.parametrize("error", [httpx.ConnectError("[SSL] certificate verify failed"), RunNotRunningException()])
def test_a_superlink_that_is_gone_ends_the_run(error: BaseException) -> None:
    """It is no client's fault, and the round is played again. Flower asks for ever where a link is merely down."""
    grid = Grid({1: lambda frame: frame})

    def gone(numbers: Iterable[str]) -> list[Message]:
        raise error

    grid.pull_messages = gone  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        asked(grid, [("a", 1, b"x")], 5.0)


def failing(request: str) -> httpx.HTTPStatusError:
    asked = httpx.Request("POST", f"https://there/v1/runtime/{request}")
    return httpx.HTTPStatusError("500", request=asked, response=httpx.Response(500, request=asked))


@pytest.mark.parametrize("times", [2, 10**6])
def test_an_answer_on_which_the_superlink_keeps_failing_is_its_site_s_loss(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moment's failure is none: it is pulled again."""
    monkeypatch.setattr(flower, "PATIENCE", 0.5)
    grid, left = Grid(dict.fromkeys((1, 2), lambda frame: frame)), [times]
    original = grid.pull_messages

    def pull(numbers: Iterable[str]) -> list[Message]:
        asked = list(numbers)
        if any(grid.sent[int(number.split()[1])][0] == 2 for number in asked) and left[0]:
            left[0] -= 1
            raise failing("pull-messages")
        return original(asked)

    grid.pull_messages = pull  # type: ignore[method-assign]
    pulling = flower.Apart(grid)
    found = dict(flower.converse(pulling, [("a", 1, b"x"), ("b", 2, b"y")], 60.0))
    assert found == {"a": b"x", "b": b"y" if times == 2 else "an answer on which its SuperLink fails: 500"}
    assert not pulling.failing


def test_a_message_that_is_gone_before_it_was_there_is_its_site_s_loss() -> None:
    """A node may confirm its message while that is uploaded."""
    made = Admitted(a=lambda frame: b"a", b=lambda frame: b"b")
    original = made.grid.push_messages

    def push(messages: Iterable[Message]) -> list[str]:
        found = list(messages)
        if found[0].metadata.dst_node_id == 2:
            raise ObjectPushError("an object", 1, "a session")
        return original(found)

    made.grid.push_messages = push  # type: ignore[method-assign]
    assert list(made.engine.fleet()) == ["a"]
    assert made.engine.barred[2][1] == "its SuperLink does not take what it is to be told"
    found = asked(made.grid, [("a", 1, b"x"), ("b", 2, b"y")], 60.0)
    assert found == {"a": b"a", "b": "its SuperLink did not take the message; is it too large?"}


def test_a_superlink_that_takes_nothing_ends_the_run() -> None:
    """Else the rounds that are left would be played in a moment, and merge nothing."""
    grid = Grid({1: lambda frame: frame})

    def fail(_: Iterable[Message]) -> list[str]:
        raise failing("push-messages")

    grid.push_messages = fail  # type: ignore[method-assign]
    with pytest.raises(httpx.HTTPStatusError):
        asked(grid, [("a", 1, b"x")], 60.0)


def test_no_message_can_be_guessed() -> None:
    """Flower names objects by their hash, and takes what is announced first for what such a name means."""
    grid, seen = Grid({1: lambda frame: b"yes"}), list[Message]()
    push, pull = grid.push_messages, grid.pull_messages
    grid.push_messages = lambda messages: push(noted(messages))  # type: ignore[method-assign]
    grid.pull_messages = lambda numbers: noted(pull(numbers))  # type: ignore[method-assign]

    def noted(messages: Iterable[Message]) -> list[Message]:
        found = list(messages)
        seen.extend(found)
        return found

    for _ in range(2):
        assert asked(grid, [("a", 1, b"hello")], 60.0) == {"a": b"yes"}
    assert len({message.content.object_id for message in seen}) == 4


def test_what_is_not_awaited_any_more_is_not_kept() -> None:
    grid = Grid({1: lambda frame: frame})
    number = flower.send(grid, 1, b"x", 60.0)
    assert number is not None
    pull = flower.Apart(grid)
    pull.pulled["given up"] = b"late"
    assert dict(pull([number])) == {number: b"x"}
    assert pull.pulled == pull.at_work == {}


class Admitted:
    """An engine whose sites register by their name alone."""

    def __init__(self, minimum: int = 1, **answers: Callable[[bytes], bytes] | None) -> None:
        self.grid = Grid(dict(enumerate(answers.values(), 1)))
        self.engine = nodes.Sites(self.grid, b"hello", self.admit, minimum, None, {})  # type: ignore[arg-type]

    def admit(self, frame: bytes, node: int) -> hello.Registration:
        if frame == b"stranger":
            raise Refused("another base model")
        return hello.Registration("", Device(frame.decode(), 5), "", {"fedrank": "0.0.7"})


def test_sites_that_join_late_leave_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Admitted(a=lambda frame: b"a", b=lambda frame: b"b")
    assert list(made.engine.fleet()) == ["a", "b"]
    made.grid.answers[7] = lambda frame: b"aa"
    made.engine.fleet()
    assert list(made.engine.fleet()) == ["a", "aa", "b"]
    b = made.grid.answers.pop(2)
    assert list(made.engine.fleet()) == ["a", "aa"]
    made.grid.answers[2] = b
    assert list(made.engine.fleet()) == ["a", "aa", "b"]
    assert [frame for _, frame in made.grid.sent] == [b"hello"] * 3  # who comes back as the same node is known


def test_a_round_waits_for_as_many_as_it_needs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    monkeypatch.setattr(nodes, "SLOWEST", 0.01)
    monkeypatch.setattr(nodes, "WORD", 0.1)
    made = Admitted(minimum=2, a=lambda frame: b"a", b=lambda frame: b"stranger")
    thread = threading.Timer(0.5, lambda: made.grid.answers.update({3: lambda frame: b"c"}))
    thread.start()
    assert list(made.engine.fleet()) == ["a", "c"]
    assert "1 sites are here after 0 s, and a round needs 2. another base model" in caplog.text
    assert "a site takes no part: another base model" in caplog.text


def test_the_first_round_waits_for_who_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for ever, and later ones do not."""
    monkeypatch.setattr(nodes, "SLOWEST", 0.01)
    made = Admitted(a=lambda frame: b"a", b=None)
    threading.Timer(0.3, lambda: made.grid.late(lambda frame: b"b")).start()
    assert list(made.engine.fleet()) == ["a", "b"]
    made.grid.answers[3] = None
    assert list(made.engine.fleet()) == ["a", "b"]
    monkeypatch.setattr(nodes, "GREETING", 0.1)
    assert list(Admitted(a=lambda frame: b"a", b=None).engine.fleet()) == ["a"]


def test_one_client_is_one_node(caplog: pytest.LogCaptureFixture) -> None:
    made = Admitted(a=lambda frame: b"a", b=lambda frame: b"a")
    made.engine.fleet()
    assert list(made.engine.fleet()) == ["a"]
    first = made.engine.known["a"][0]
    assert "client a is there already, as another node" in caplog.text
    del made.grid.answers[first]
    made.engine.barred.clear()
    made.engine.fleet()
    assert made.engine.known["a"][0] == 3 - first


def test_a_greeting_that_is_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a SuperNode ends over it and is back before anyone looks."""
    monkeypatch.setattr(nodes, "GREETING", 0.0)
    monkeypatch.setattr(nodes, "SLOWEST", 0.01)
    made = Admitted(a=lambda frame: b"a", b=None)
    assert list(made.engine.fleet()) == ["a"]
    made.grid.answers[2] = lambda frame: b"b"
    assert list(made.engine.fleet()) == ["a"]
    assert [node for node, _ in made.grid.sent] == [1, 2]
    monkeypatch.setattr(nodes, "LOST", 0.0)
    assert list(made.engine.fleet()) == ["a", "b"]
    assert [node for node, _ in made.grid.sent] == [1, 2, 2]
    assert made.engine.told == {}


def renewed(raw: dict[str, Any], files: dict[str, Path], tmp_path: Path, change: Callable[[Path], None]) -> list[Any]:
    """The rows of south, whose worker starts anew after the first round, on what the change has made of its folder."""
    grid = grid_of(files)
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] == 1:
            change(files["south"].parent)
            grid.answers[2] = sites.Desk(sites.read(files["south"])).answer
    return [row for row in ledger(tmp_path / "run", "clients") if row["client"] == "south"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "back"), [("fedavg", 3), ("flora", 4), ("fedsa_lora", 4), ("pf2lora", 4)])
def test_a_site_that_lost_its_store_begins_anew(method: str, back: int, files: dict[str, Path], tmp_path: Path) -> None:
    """It is told of the run again; and, where it says that it lacks what it kept, it is sent all."""
    raw = settings(rounds={"count": back, "minimum": 2}, method={"name": method})
    found = renewed(raw, files, tmp_path, lambda folder: shutil.rmtree(folder / "store"))
    assert found[1]["error"] == hello.UNKNOWN
    assert all(row["error"].startswith("StoreError: ") for row in found[2 : back - 1])
    assert [row["ok"] for row in found] == [True, *[False] * (back - 2), True]


def test_a_site_with_other_rows_registers_anew(files: dict[str, Path], tmp_path: Path) -> None:
    def more(folder: Path) -> None:
        written(folder / "rows" / "train.jsonl", rows(9, 60))

    found = renewed(settings(rounds={"count": 3, "minimum": 2}), files, tmp_path, more)
    assert found[1]["error"] == hello.UNKNOWN
    assert found[2]["ok"]
    assert found[2]["examples"] > found[0]["examples"]


@pytest.mark.slow
def test_two_runs_of_one_config_keep_apart_at_the_sites(files: dict[str, Path], tmp_path: Path) -> None:
    raw, grid = settings(method={"name": "pf2lora"}, rounds={"count": 3}), grid_of(files)
    play(raw, tmp_path / "alone", grid_of(files))
    for event in experiment.start(config.load(raw), tmp_path / "first", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] == 2:
            play({**raw, "rounds": {**raw["rounds"], "count": 1}}, tmp_path / "second", grid)
    assert state(tmp_path / "first", 3) == state(tmp_path / "alone", 3)


@pytest.mark.slow
def test_a_request_that_comes_late_costs_nothing_that_was_kept(files: dict[str, Path], tmp_path: Path) -> None:
    """The frame of round 2 is worked off once more, by another process, after that of round 3."""
    raw, grid = settings(method={"name": "pf2lora"}, rounds={"count": 4}), grid_of(files)
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] == 3:
            train = [frame for node, frame in grid.sent if node == 2 and unpack(frame)[0]["kind"] == "train"]
            assert unpack(train[1])[0]["round"] == 2
            sites.Desk(sites.read(files["south"])).answer(train[1])
    assert all(row["ok"] for row in ledger(tmp_path / "run", "clients"))


def test_a_refusal_is_an_answer_and_ends_the_wait(files: dict[str, Path], tmp_path: Path) -> None:
    """On the modelled clock, too: only for who is silent does a round last until its deadline."""
    grid = grid_of(files)
    south = grid.answers[2]
    assert south is not None

    def refused(frame: bytes) -> bytes:
        if unpack(frame)[0]["kind"] == "setup":
            return south(frame)
        raise Refused("not today")

    for name, answer, deadline in (("refused", refused, 50.0), ("silent", None, 0.3)):
        play_to = settings(rounds={"count": 1, "minimum": 1, "deadline": deadline, "personal": 0})
        for event in experiment.start(config.load(play_to), tmp_path / name, by=partial(central.prepare, grid=grid)):
            if event["event"] == "cohort":
                grid.answers[2] = answer
        grid.answers[2] = south
        (row,) = (row for row in ledger(tmp_path / name, "clients") if not row["ok"])
        (round,) = ledger(tmp_path / name, "rounds")
        assert row.get("bytes_up") == (0 if name == "refused" else None)
        assert (round["round_seconds"] == deadline) == (name == "silent")


def test_a_site_is_none_of_this_machine_s_clients_whatever_a_run_says(files: dict[str, Path], tmp_path: Path) -> None:
    """Its file holds for every run; a simulated run's folder would be read in its place."""
    told = {"simulation": True, "out": str(tmp_path / "elsewhere")}
    with pytest.raises(Refused, match="a frame of 11 bytes is too short"):
        apps._answer(b"not a frame", told, {"site": str(files["north"])}, None)


def test_what_a_client_app_cannot_do_is_told_without_a_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Refused) as error:
        apps._answer(b"", {}, {"site": str(tmp_path / "oncology" / "site.yaml")}, None)
    assert str(error.value) == "ConfigError: what is wrong is said in the site's own log"
    assert "oncology" in caplog.text


def test_what_other_machines_say_moves_no_cursor() -> None:
    assert str(Refused("a\x1b[2Jb\ud800\nc")) == "a[2Jbc"
    found = replace(REGISTRATION, numerics={"fedrank": "1\x1b[2J\n"})
    assert hello.read_registration(hello.write_registration(found), REGISTRATION.run).version == "1[2J"
    odd = replace(REGISTRATION, device=replace(DEVICE, kind="a\nb"))
    with pytest.raises(Refused, match="of id and kind"):
        hello.read_registration(hello.write_registration(odd), REGISTRATION.run)
    error = Message(Error(1, "\x1b[2J"), reply_to=Message(RecordDict(), 1, flower.ASK))
    assert flower._content(error) == "Flower error 1: [2J"


@pytest.mark.parametrize("raw", [settings(), settings(rounds={"personal": 0})], ids=["scored", "unscored"])
def test_a_run_ends_though_its_sites_have_left(raw: dict[str, Any], files: dict[str, Path], tmp_path: Path) -> None:
    grid = grid_of(files)
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] == 2:
            grid.answers.clear()
            grid.push_messages = lambda messages: [""]  # as a SuperLink answers for a node that it does not know
    assert fedrank.Run(tmp_path / "run").summary["rounds"] == 2


def test_a_resumed_run_is_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    """Its server starts anew, with an engine that knows no site."""
    raw, grid = settings(method={"name": "fedara"}, rounds={"count": 3}), grid_of(files)
    play(raw, tmp_path / "whole", grid_of(files))
    for event in experiment.start(config.load(raw), tmp_path / "cut", by=partial(central.prepare, grid=grid)):
        if event["event"] == "client" and event["round"] == 2:
            break
    list(experiment.go_on(tmp_path / "cut", by=partial(central.prepare, grid=grid)))
    assert state(tmp_path / "cut", 3) == state(tmp_path / "whole", 3)
    assert ledger(tmp_path / "cut", "clients") == ledger(tmp_path / "whole", "clients")


def test_the_start_says_what_is_known() -> None:
    about = central.prepare(config.load(settings()), grid=Grid({})).about
    said = views._about({"event": "start", "path": "runs/a", **about})
    assert "the clients' own train and 0 test rows, 3 classes, sites as they come, tiny-encoder with" in said


# ---- the two frames of a greeting


SETUP = hello.Setup("0123456789abcdef", {"task": "classify"}, LABELS, "print", "start")
DEVICE = Device("north", 5, "laptop", None, Load(1, 2, 3, 4, 5, 6, 7), 1.0, 0.0, 2.0, 2.0, 1.0, 3.0)
REGISTRATION = hello.Registration(SETUP.run, DEVICE, "print", {"cpu": "x"})


def test_a_greeting_comes_as_it_was() -> None:
    found = hello.read_setup(hello.write_setup(SETUP))
    assert (found.run, found.config, found.labels, found.fingerprint, found.start) == (
        SETUP.run, SETUP.config, SETUP.labels, SETUP.fingerprint, SETUP.start)  # fmt: skip
    assert found.imported is None
    answer = hello.read_registration(hello.write_registration(REGISTRATION), SETUP.run)
    assert (answer.device, answer.fingerprint, answer.numerics) == (DEVICE, "print", {"cpu": "x"})


@pytest.mark.parametrize("change", [
    {"id": "../north"}, {"id": ""}, {"id": "a/b"}, {"id": "a\0"}, {"id": "x" * 200}, {"id": 3}, {"examples": 0},
    {"examples": -1}, {"examples": 1 << 60}, {"examples": 2.0}, {"examples": True}, {"rank": 0}, {"rank": "4"}, {"load": None},
    {"load": {}}, {"kind": "k" * 100}, {"flops_per_second": -1.0}, {"flops_per_second": 1e400}, {"idle_watts": "1"},
    {"more": 1}, {"load": {"steps": -1, "tokens": 2, "pairs": 3, "peak_tokens": 4, "peak_pairs": 5, "rows": 6, "peak_rows": 7}},
])  # fmt: skip
def test_what_no_device_is(change: dict[str, Any]) -> None:
    meta, _ = unpack(hello.write_registration(REGISTRATION))
    with pytest.raises(Refused):
        hello.read_registration(pack(meta | {"device": meta["device"] | change}, {}), SETUP.run)


@pytest.mark.parametrize("change", [
    {"run": "../../../../etc/x"}, {"run": "0123"}, {"run": "0123456789ABCDEF"}, {"run": 5}, {"config": []}, {"labels": [1]},
    {"labels": "abc"}, {"kind": "train"}, {"fingerprint": None}, {"scale": "1"},
])  # fmt: skip
def test_what_no_setup_is(change: dict[str, Any], files: dict[str, Path]) -> None:
    meta, _ = unpack(hello.write_setup(SETUP))
    frame = pack(meta | change, {})
    with pytest.raises(Refused):
        hello.read_setup(frame)
    before = sorted(files["north"].parent.rglob("*"))
    with pytest.raises(Refused):
        sites.Desk(sites.read(files["north"])).answer(frame)
    assert sorted(files["north"].parent.rglob("*")) == before


def test_a_registration_of_another_run_is_refused() -> None:
    with pytest.raises(Refused, match="not a registration for this run"):
        hello.read_registration(hello.write_registration(REGISTRATION), "f" * 16)


def setup_of(raw: dict[str, Any]) -> hello.Setup:
    """What a server of this config tells its sites, as they read it."""
    made = central.prepare(config.load(raw), grid=Grid({}))
    return hello.read_setup(hello.write_setup(central.setup(made, made.run_id)))


@pytest.mark.parametrize("key", ["split=validation", "train_limit=9"])
def test_what_only_whole_data_have_is_refused_where_sites_have_the_rows(key: str) -> None:
    with pytest.raises(
        DataError, match=f"data.{key.split('=')[0]}: it is of a whole data set, and with engine.kind=flower"
    ):
        setup_of(config.load(settings(), [f"data.{key}"]).model_dump(mode="json", exclude_unset=True))


def test_another_base_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    setup = setup_of(settings())
    desk = sites.Desk(sites.read(files["north"]))
    with pytest.raises(
        Refused, match=r"client north: the base model here is .*, the run's is other; give the site the same"
    ):
        desk.answer(hello.write_setup(replace(setup, fingerprint="other")))
    with pytest.raises(Refused, match="client north: the adapter here does not start as the run's does"):
        desk.answer(hello.write_setup(replace(setup, start="other")))
    assert not list((files["north"].parent / "store").glob("*/setup.frame"))


def test_a_server_cannot_have_a_site_run_a_model_s_code(files: dict[str, Path], tmp_path: Path) -> None:
    setup = setup_of(settings())
    told = {**setup.config, "model": {"name": "tiny-encoder", "trust_remote_code": True}}
    mine = sites.joined(sites.read(files["north"]), replace(setup, config=told))
    assert not mine.model.trust_remote_code


# ---- site files


@pytest.mark.parametrize(("text", "says"), [
    ("client: north\ndata: {path: rows}\nstoer: s\n", "unknown key 'stoer'; did you mean 'store'?"),
    ("client: a/b\ndata: {path: rows}\nstore: s\n", "client: "),
    ("client: north\nstore: s\n", "data: field required"),
    ("client: north\ndata: {path: rows}\nstore: s\nhardware: {kind: lapdog}\n", "is no preset; did you mean 'laptop'?"),
    ("client: [", "not YAML"),
    ("- a", "a site file is a mapping of keys, this is list"),
])  # fmt: skip
def test_site_files_say_what_is_wrong(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        sites.read(tmp_path / "site.yaml")
    assert says in str(error.value)
    assert str(tmp_path / "site.yaml") in str(error.value)


def test_a_site_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no site file"):
        sites.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("changes", "says"), [
    ({"data": {"labels": []}}, "data.labels: task classify needs the class names"),
    ({"engine": {"failure_rate": 0.1}}, "engine.failure_rate: with engine.kind=flower it is as the sites are"),
    ({"engine": {"stack": 2}}, "each client trains alone"),
    ({"rounds": {"minimum": 4}}, "it is never reached"),
])  # fmt: skip
def test_configs_that_no_site_can_play(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        play(settings(**changes), tmp_path / "run", Grid({}))
    assert not (tmp_path / "run").exists()


# ---- privacy: the run's constant rate, what was recorded, and what leaves a site


KEY = bytes(range(32))


def private(kind: str = "central", **sections: Any) -> dict[str, Any]:
    """Three sites, of which two are asked in the mean."""
    told = {"kind": kind, "clip": 0.2, "noise": 3.0, "delta": 1e-2, **sections.pop("privacy", {})}
    rounds = {"cohort": 2, "minimum": 1, "personal": 0, **sections.pop("rounds", {})}
    return settings(**{"privacy": told, "rounds": rounds, "clients": {"count": 3}, **sections})


def give_keys(raw: dict[str, Any], out: Path, files: dict[str, Path], key: bytes = KEY) -> None:
    """A known one to each of these sites, for the run that is played there."""
    for name, file in files.items():
        put_key(file.parent / "store" / named(raw, out) / "private" / name, key)


@pytest.mark.parametrize("kind", ["central", "local"])
def test_a_private_run_on_flower_is_the_local_one(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """With the same keys the same State, bit for bit, the same cohorts and the same epsilon."""
    raw = private(kind, method={"name": "fedara"}, rounds={"count": 3}, privacy={"votes_noise": 2.0})
    give_keys(raw, tmp_path / "flower", files)
    put_key(tmp_path / "flower")
    play(raw, tmp_path / "flower", grid_of(files))
    for folder in (tmp_path / "local", *(tmp_path / "local" / "clients" / name for name in files)):
        put_key(folder)
    here = {**raw, "data": {"name": "sites"}, "engine": {"compute": "float32", "products": "torch", "stack": 1}}
    fedrank.run(here, out=tmp_path / "local", data=sites.together(files.values(), LABELS))
    for round in (1, 2, 3):
        assert state(tmp_path / "flower", round) == state(tmp_path / "local", round)
    for name in ("rounds", "clients"):
        assert ledger(tmp_path / "flower", name) == ledger(tmp_path / "local", name)
    assert fedrank.Run(tmp_path / "flower").summary["epsilon"] > 0
    assert ledger(tmp_path / "flower", "clients")
    before, spent = forecast(config.load(raw))["epsilon"], fedrank.Run(tmp_path / "flower").summary["epsilon"]
    assert before == spent if kind == "central" else before >= spent  # of a site that is asked in every round


def test_a_private_run_takes_no_more_sites_than_planned_over_a_restart(files: dict[str, Path], tmp_path: Path) -> None:
    raw = private("local", clients={"count": 2}, rounds={"count": 1, "cohort": 1, "minimum": 1})
    both = {name: files[name] for name in ("north", "south")}
    play(raw, tmp_path / "run", grid_of(both))
    again = partial(central.prepare, grid=grid_of(files))
    for event in experiment.go_on(tmp_path / "run", ["rounds.count=4"], by=again):
        assert event["event"] != "cohort" or "west" not in event["clients"]
    assert json.loads((tmp_path / "run" / "registered.json").read_text()) == ["north", "south"]


def test_a_node_takes_one_place_of_a_private_run(files: dict[str, Path], tmp_path: Path) -> None:
    """However often it says that it is another site."""
    raw, grid = private(rounds={"count": 1, "cohort": 3}), grid_of({"north": files["north"]})
    engine = central.prepare(config.load(raw), grid=grid).server(Store.create(tmp_path / "run")).engine
    assert isinstance(engine, nodes.Sites)
    told = sites.Desk(sites.read(files["north"])).answer(engine.hello)
    other = sites.Desk(sites.read(files["south"])).answer(engine.hello)
    assert engine.admit(told, 1).device.id == engine.admit(told, 1).device.id == "north"
    with pytest.raises(Refused, match="client south: its node has registered as north"):
        engine.admit(other, 1)
    assert engine.admit(other, 2).device.id == "south"


def test_a_run_without_its_name_does_not_go_on(files: dict[str, Path], tmp_path: Path) -> None:
    """Sites would take it for another, and begin anew."""
    play(settings(rounds={"count": 1}), tmp_path / "run", grid_of(files))
    (tmp_path / "run" / "run.id").unlink()
    again = experiment.go_on(tmp_path / "run", ["rounds.count=2"], by=partial(central.prepare, grid=grid_of(files)))
    with pytest.raises(StoreError, match=r"run\.id is gone"):
        list(again)


def test_a_worker_whose_store_went_away_asks_to_be_told(files: dict[str, Path], tmp_path: Path) -> None:
    grid = grid_of(files)
    raw = settings(rounds={"count": 4, "minimum": 2, "personal": 0, "evaluate_every": 4}, method={"name": "fedavg"})
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] == 1:
            shutil.rmtree(next((files["south"].parent / "store").iterdir()))
    found = [row for row in ledger(tmp_path / "run", "clients") if row["client"] == "south"]
    assert found[1]["error"] == hello.UNKNOWN
    assert [row["ok"] for row in found] == [True, False, True, True]


def test_a_round_that_was_begun_is_not_left_out_of_epsilon(files: dict[str, Path], tmp_path: Path) -> None:
    raw, grid = private("local", rounds={"count": 3}), grid_of(files)
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "client" and event["round"] == 2:
            break
    with pytest.raises(ConfigError, match=r"rounds.count=1: round 2 was begun"):
        list(experiment.go_on(tmp_path / "run", ["rounds.count=1"], by=partial(central.prepare, grid=grid)))


def test_a_site_gives_nothing_that_no_noise_covers(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that leaves its own check out."""
    monkeypatch.setattr(privacy, "check", lambda *args: None)
    raw = private("local", method={"name": "lora_a2"}, rounds={"count": 1, "cohort": 3})
    for path in files.values():
        path.write_text(f"{path.read_text()}hardware: {{rank: 1}}\n")
    play(raw, tmp_path / "run", grid_of(files))
    assert [row["error"] for row in ledger(tmp_path / "run", "clients")] == [
        "Error: the message stays with the client"
    ] * 3


@pytest.mark.parametrize("what", ["baselines", "cost", "profile"])
def test_what_needs_the_sites_rows_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings()))
    words = (
        ["run", str(tmp_path / "run.yaml"), "--baselines"]
        if what == "baselines"
        else [what, str(tmp_path / "run.yaml")]
    )
    said = CliRunner().invoke(cli.app, words)
    assert said.exit_code == 2
    assert "engine.kind=flower" in said.stderr


@pytest.mark.parametrize(
    ("kind", "privacy", "takes_part"),
    [
        ("local", {}, True),
        ("local", {"noise": 2.9}, False),
        ("local", {"votes_noise": 2.9}, False),
        ("central", {}, False),
    ],
)
def test_a_site_can_insist_on_its_noise(
    kind: str, privacy: dict[str, Any], takes_part: bool, files: dict[str, Path]
) -> None:
    raw = private(kind, method={"name": "fedara"}, privacy={"noise": 3.0, "votes_noise": 3.0, **privacy})
    setup = hello.Setup("0" * hello.RUN, hello.told(config.load(raw)), LABELS, "print", "start")
    files["north"].write_text(f"{files['north'].read_text()}local_noise: 3\n")
    asked = pytest.raises(sites.Mismatch, match="noise of 3 or more alone; this one has privacy")
    with contextlib.nullcontext() if takes_part else asked:
        sites.joined(sites.read(files["north"]), setup)


@pytest.mark.parametrize("count", [5, 20])
def test_a_site_knows_how_many_are_planned(count: int, files: dict[str, Path]) -> None:
    """Also where that is the default, which an older fedrank need not be told of other keys."""
    raw = private(clients={"count": count})
    setup = hello.Setup("0" * hello.RUN, hello.told(config.load(raw)), LABELS, "print", "start")
    assert sites.joined(sites.read(files["north"]), setup).clients.count == count


def epsilons(path: Path) -> list[float]:
    return [row["epsilon"] for row in ledger(path, "rounds")]


def cohorts(events: list[dict[str, Any]]) -> list[list[str]]:
    return [event["clients"] for event in events if event["event"] == "cohort"]


def coming_and_going(raw: dict[str, Any], out: Path, files: dict[str, Path]) -> list[dict[str, Any]]:
    """West comes after the first round, north goes after the second; four rounds."""
    grid, found = grid_of(files), list[dict[str, Any]]()
    west = grid.answers.pop(3)
    for event in experiment.start(config.load(raw), out, by=partial(central.prepare, grid=grid)):
        found.append(event)
        match event:
            case {"event": "round", "round": 1}:
                grid.answers[3] = west
            case {"event": "round", "round": 2}:
                del grid.answers[1]
    return found


def test_a_central_epsilon_is_that_of_the_constant_rate_whoever_is_there(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """Each connected site is drawn by itself, by its name, with the probability cohort / clients.count."""
    raw = private(rounds={"count": 4}, clients={"count": 5})
    put_key(tmp_path / "run")
    found = cohorts(coming_and_going(raw, tmp_path / "run", files))
    here = [["north", "south"], ["north", "south", "west"], ["south", "west"], ["south", "west"]]
    for round, (asked, connected) in enumerate(zip(found, here, strict=True), 1):
        assert asked == [name for name in connected if privacy.poisson([name], 2 / 5, KEY, round)]
    assert {len(asked) for asked in found} > {1}
    given = PrivacySettings.model_validate(raw["privacy"])
    by_hand = [privacy.epsilon(given, 2 / 5, [(3.0, ())] * rounds) for rounds in (1, 2, 3, 4)]
    assert epsilons(tmp_path / "run") == by_hand
    assert not (tmp_path / "run" / "asked.jsonl").exists()


def test_a_local_epsilon_is_of_the_site_that_was_asked_most(files: dict[str, Path], tmp_path: Path) -> None:
    raw = private("local", rounds={"count": 4}, seed=3)
    found = cohorts(coming_and_going(raw, tmp_path / "run", files))
    given = PrivacySettings.model_validate(raw["privacy"])
    most = [max(sum(name in asked for asked in found[:rounds]) for name in NAMES) for rounds in (1, 2, 3, 4)]
    assert most[-1] < 4  # in some round the others were asked, so it is not the number of rounds
    assert epsilons(tmp_path / "run") == [privacy.epsilon(given, 1.0, [(3.0, ["x"])] * count) for count in most]


def stop_in(raw: dict[str, Any], out: Path, grid: Grid, round: int) -> list[dict[str, Any]]:
    """Killed after the first answer of this round."""
    found = list[dict[str, Any]]()
    for event in experiment.start(config.load(raw), out, by=partial(central.prepare, grid=grid)):
        found.append(event)
        if event["event"] == "client" and event["round"] == round:
            break
    return found


@pytest.mark.parametrize("kind", ["central", "local"])
def test_a_resumed_private_run_counts_what_was_recorded(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """North and south are asked in two rounds and in a third one that is killed; then only west is there. What they told in
    the killed round is told, so a local epsilon has all three; the rate of a central run is no other for a smaller fleet."""
    raw = private(kind, rounds={"count": 5}, clients={"count": 3})
    if kind == "central":  # so that all are drawn and the third round can be stopped
        raw["rounds"]["cohort"] = 3
    grid, other = grid_of(files), grid_of(files)
    del grid.answers[3]
    stop_in(raw, tmp_path / "run", grid, 3)
    before = epsilons(tmp_path / "run")
    other.answers = {3: other.answers[3]}
    list(experiment.go_on(tmp_path / "run", by=partial(central.prepare, grid=other)))
    given = PrivacySettings.model_validate(raw["privacy"])
    counts = [1, 2, 3, 4, 5] if kind == "central" else [1, 2, 3, 3, 3]
    by_hand = [privacy.epsilon(given, 1.0, [(3.0, ["x"])] * count) for count in counts]
    assert epsilons(tmp_path / "run") == by_hand
    assert before == by_hand[:2]
    assert {row["client"] for row in ledger(tmp_path / "run", "clients") if row["round"] > 2} == {"west"}
    if kind == "local":
        (tmp_path / "run" / "asked.jsonl").write_text("")
        with pytest.raises(StoreError, match=r"asked\.jsonl does not say who was asked in round 1"):
            list(
                experiment.go_on(
                    tmp_path / "run", ["rounds.count=+1"], by=partial(central.prepare, grid=grid_of(files))
                )
            )


@pytest.mark.parametrize("noise", [0.0, 3.0], ids=["clip", "noise"])
def test_what_leaves_a_site_is_clipped_and_noised(noise: float, files: dict[str, Path], tmp_path: Path) -> None:
    """Measured in the frames that travel: longer changes are of the clip's length, and noise is on every number."""
    raw = private("local", rounds={"count": 1, "cohort": 3}, privacy={"noise": noise}, local={"lr": 0.1})
    grid, heard = grid_of(files), list[bytes]()

    def listened(answer: Callable[[bytes], bytes], frame: bytes) -> bytes:
        heard.append(answer(frame))
        return heard[-1]

    grid.answers = {node: partial(listened, answer) for node, answer in grid.answers.items() if answer is not None}
    for path, key in zip(files.values(), (b"n" * 32, b"s" * 32, b"w" * 32), strict=True):  # so that it repeats
        give_keys(raw, tmp_path / "run", {path.parent.name: path}, key)
    play(raw, tmp_path / "run", grid)
    store = Store.open(tmp_path / "run")
    wire, begin = central.prepare(config.load(raw), grid=grid).server(store).wire, store.state(0)[0]
    asked = {
        request.client: request
        for request in map(wire.open_request, (f for _, f in grid.sent if unpack(f)[0]["kind"] == "train"))
    }
    changes = []
    for frame in heard:
        meta, _ = unpack(frame)
        if meta["kind"] != "update":
            continue
        assert (meta["examples"], meta["metrics"]) == (1, {})
        request = asked[meta["client"]]
        update = wire.open_reply(frame, "train", 1, request.client, request.plan, begin.adapter).update
        assert update is not None
        moved = privacy.each(np.subtract, update.adapter.astype(np.float64), request.adapter.take(update.adapter.ids))
        changes.append(np.concatenate([np.ravel(part) for part in privacy.numbers(moved)]))
    assert len(changes) == 3
    if noise:
        assert [float(change.std()) for change in changes] == pytest.approx([0.6] * 3, rel=0.05)
        assert min(np.count_nonzero(change) for change in changes) == changes[0].size
        assert np.abs(np.corrcoef(changes) - np.eye(3)).max() < 5 / np.sqrt(changes[0].size)
    else:
        assert [float(np.linalg.norm(change)) for change in changes] == pytest.approx([0.2] * 3, rel=1e-3)


def test_a_site_s_key_is_in_its_own_store_and_outlives_its_process(files: dict[str, Path], tmp_path: Path) -> None:
    """A request that comes again to a fresh process is answered by the same bytes, noise included; without the key it is not."""
    grid = grid_of(files)
    play(private("local", rounds={"count": 1, "cohort": 3}), tmp_path / "run", grid)
    (key,) = (files["south"].parent / "store").rglob("noise.key")
    assert key.parent.name == "south"
    assert (len(key.read_bytes()), key.stat().st_mode & 0o077) == (32, 0)
    assert not list((tmp_path / "run").rglob("noise.key"))
    request = next(frame for node, frame in grid.sent if node == 2 and unpack(frame)[0]["kind"] == "train")
    first = [sites.Desk(sites.read(files["south"])).answer(request) for _ in range(2)]
    assert first[0] == first[1]
    for secret in (key.read_bytes(), key.read_bytes().hex().encode()):
        assert not any(secret in frame for frame in [*first, *(frame for _, frame in grid.sent)])
    key.unlink()
    assert sites.Desk(sites.read(files["south"])).answer(request) != first[0]


def test_a_site_that_protects_itself_tells_nothing_of_its_rows(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither how many there are nor how long, in its registration; nor what a failure says."""
    setup = hello.write_setup(setup_of(private("local")))
    before = sites.Desk(sites.read(files["north"])).answer(setup)
    written(
        files["north"].parent / "rows" / "train.jsonl",
        [{"text": "red " * at, "label": "colour"} for at in range(1, 60)],
    )
    assert sites.Desk(sites.read(files["north"])).answer(setup) == before
    assert hello.read_registration(before, unpack(setup)[0]["run"]).device.examples == 1
    open_to_all = hello.write_setup(setup_of(private()))
    told = sites.Desk(sites.read(files["north"])).answer(open_to_all)
    assert hello.read_registration(told, unpack(open_to_all)[0]["run"]).device.examples > 40

    def quote(*args: Any) -> None:
        raise privacy.PrivacyError("row 3 holds 'red red'")

    monkeypatch.setattr(privacy, "withheld", quote)
    events = play(private("local", rounds={"count": 1, "cohort": 3}), tmp_path / "run", grid_of(files))
    said = {event["error"] for event in events if event["event"] == "client"}
    assert said == {"Error: the message stays with the client"}


def test_no_more_sites_than_the_run_is_planned_for(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = private(clients={"count": 2}, rounds={"count": 1})
    play(raw, tmp_path / "run", grid_of(files))
    assert "a site takes no part: client " in caplog.text
    assert "the run is planned for clients.count=2 sites, and as many have registered" in caplog.text
    assert len({row["client"] for row in ledger(tmp_path / "run", "clients")}) == 2
    assert epsilons(tmp_path / "run") == [
        privacy.epsilon(PrivacySettings.model_validate(raw["privacy"]), 1.0, [(3.0, ())])
    ]


UNPLANNED = {name: section for name, section in private().items() if name != "clients"}


@pytest.mark.parametrize(("raw", "says"), [
    (UNPLANNED, "clients.count: with engine.kind=flower and privacy.kind=central it says how many sites the run is planned for"),
    (UNPLANNED | {"privacy": {**UNPLANNED["privacy"], "kind": "local"}}, "clients.count: with engine.kind=flower and privacy.kind=local"),
    (private(clients={"count": 1}), "clients.count=1: the run is planned for fewer sites than a round asks"),
    (private(privacy={"delta": 0.4}), "privacy.delta=0.4: it must be below one over the 3 clients"),
    (private(method={"name": "flora"}), "method flora has no private form"),
    (private(server={"max_examples": 5}), "server.max_examples=5: with privacy.kind=central all clients count alike; null"),
    (private(rounds={"minimum": 2}), "rounds.minimum=2: with privacy.kind=central only a clipped, noised sum"),
])  # fmt: skip
def test_sites_that_cannot_be_protected_are_told_before_a_run(raw: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        play(raw, tmp_path / "run", Grid({}))
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "asked"), [("central", "in cohorts of 2 of 3 sites"), ("local", "asked in every round")]
)
def test_what_a_run_of_sites_comes_to_is_told_beforehand(kind: str, asked: str, tmp_path: Path) -> None:
    raw = private(kind)
    (tmp_path / "my.yaml").write_text(json.dumps(raw))
    shown = CliRunner().invoke(cli.app, ["cost", str(tmp_path / "my.yaml")])
    rate = 2 / 3 if kind == "central" else 1.0
    spent = privacy.epsilon(PrivacySettings.model_validate(raw["privacy"]), rate, [(3.0, ["x"])] * 2)
    assert f"epsilon {spent:.3g} at delta 0.01, {asked}" in " ".join(shown.output.split())
    assert forecast(config.load(raw))["epsilon"] == spent


@pytest.mark.parametrize("change", ["clients.count=4", "rounds.cohort=1", "privacy.noise=1"])
def test_what_epsilon_hangs_on_cannot_be_changed(change: str, files: dict[str, Path], tmp_path: Path) -> None:
    play(private(rounds={"count": 1}), tmp_path / "run", grid_of(files))
    with pytest.raises(ConfigError, match="cannot be changed"):
        list(experiment.go_on(tmp_path / "run", [change], by=partial(central.prepare, grid=grid_of(files))))


# ---- the resident worker


@pytest.fixture
def worker(files: dict[str, Path]) -> sites.SiteFile:
    """North's, in a thread of this process."""
    file = sites.read(files["north"])
    threading.Thread(target=resident.serve, args=(file,), daemon=True).start()
    until(file.socket.exists, 10)
    return file


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_answers_as_the_site_does(worker: sites.SiteFile, files: dict[str, Path], tmp_path: Path) -> None:
    grid = grid_of(files)
    play(settings(), tmp_path / "cold", grid)
    warm = grid_of(files)
    warm.answers[1] = partial(resident.ask, worker)
    play(settings(), tmp_path / "warm", warm)
    assert state(tmp_path / "warm", 2) == state(tmp_path / "cold", 2)


def test_a_worker_says_why_it_refuses(worker: sites.SiteFile) -> None:
    with pytest.raises(Refused, match="too short"):
        resident.ask(worker, b"garbage")
    with pytest.raises(Refused, match="too short"):
        resident.ask(worker, b"garbage")  # and goes on


def test_a_worker_s_socket_is_its_owner_s(worker: sites.SiteFile) -> None:
    assert worker.socket.stat().st_mode & 0o077 == 0
    assert worker.store.stat().st_mode & 0o077 == 0


def test_who_says_nothing_does_not_hold_a_worker_up(
    monkeypatch: pytest.MonkeyPatch, worker: sites.SiteFile, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resident, "PATIENCE", 1)
    with socket.socket(socket.AF_UNIX) as line, socket.socket(socket.AF_UNIX) as half:
        line.connect(str(worker.socket))
        half.connect(str(worker.socket))
        half.sendall(b"\0\0\1\0abc")  # 256 bytes are announced
        with pytest.raises(Refused, match="too short"):
            resident.ask(worker, b"garbage")
    assert caplog.text.count("whoever connected sent no frame") == 2


def test_two_workers_of_one_site(worker: sites.SiteFile) -> None:
    with pytest.raises(StoreError, match="is in use by another process"):
        resident.serve(worker)


def test_a_socket_that_a_killed_worker_left(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    file = sites.read(files["north"])
    file.store.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(file.socket))
    with pytest.raises(Refused, match="too short"):
        resident.ask(file, b"garbage")  # worked out here
    assert "nobody listens there any more" in caplog.text
    threading.Thread(target=resident.serve, args=(file,), daemon=True).start()

    def served() -> bool:
        caplog.clear()
        with contextlib.suppress(Refused):
            resident.ask(file, b"garbage")
        return "nobody listens" not in caplog.text

    until(served, 10)
