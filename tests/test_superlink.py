"""Real SuperLinks and SuperNodes on loopback, with TLS and node authentication: parity, strangers, and kill -9."""

import json
import math
import secrets
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supernode import fleet_http_connection

import fedrank
from federation import (
    PROGRAMS,
    SERVERS,
    Federation,
    answered,
    committed,
    federation,
    follows,
    free_port,
    local,
    named,
    put_key,
    state,
    until,
)
from fedrank import ledger, remote
from test_observe import scrape

# One federation for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.xdist_group("superlink")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation")) as made:
        yield made


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["fedara", "pf2lora"])
def test_a_real_federation_ends_in_the_local_state(method: str, running: Federation, tmp_path: Path) -> None:
    """Three sites with rows of their own, five rounds; the same bytes in the ledger. Only the one on Flower is watched."""
    raw, port, log = running.config(method={"name": method}), free_port(), tmp_path / "log.jsonl"
    process = running.begin(raw | {"observe": {"log": str(log), "prometheus": port}}, tmp_path / "flower")
    served = until(lambda: scraped(port, 5), 600, "the last of five rounds, at the endpoint")
    assert (served["fedrank_rounds_total", ""], served["fedrank_clients_answered_total", ""]) == (4, 12)
    assert served["fedrank_build_info", f"{method} flower {fedrank.__version__}"] == 1
    assert any(listens(process, port) for process in running.found("flwr-serverapp", "link"))
    running.wait(process, 600)
    local(running.files, raw, tmp_path / "local")
    for round in (3, 4, 5):
        assert state(tmp_path / "flower", round) == state(tmp_path / "local", round)
    theirs, ours = (ledger.read(tmp_path / name / "rounds.jsonl") for name in ("flower", "local"))
    sizes = [name for name in ours[0] if "bytes" in name]
    assert len(sizes) > 5
    for mine, other in zip(ours, theirs, strict=True):
        assert {name: mine[name] for name in sizes} == {name: other[name] for name in sizes}
        assert other["clients_ok"] == 3
    assert (tmp_path / "flower" / "adapter" / "adapter_model.safetensors").exists()
    told = [line for line in ledger.read(log) if line.get("event") == "round"]
    assert [{name: line[name] for name in row} for line, row in zip(told, theirs, strict=True)] == theirs
    assert sum(line.get("event") == "client" and line["ok"] for line in ledger.read(log)) == 15


def scraped(port: int, round: int) -> dict[tuple[str, str], float] | None:
    """What the endpoint serves while this round is played; those before it are counted by then."""
    with suppress(OSError):
        found = scrape(port)
        return found if found["fedrank_round", ""] == round else None
    return None


def listens(process: psutil.Process, port: int) -> bool:
    return any(one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in process.net_connections())


def online(made: Federation) -> int:
    nodes = remote._flwr(made.home("cli"), "supernode", "list", remote.NAME)["nodes"]
    return sum(node["status"] == "online" for node in nodes)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["central", "local"])
def test_a_private_federation_ends_in_the_local_state(kind: str, running: Federation, tmp_path: Path) -> None:
    """With the same keys; sites make their noise in processes of their own."""
    raw = running.config(
        method={"name": "fedavg"}, clients={"count": 3}, rounds={"count": 2, "minimum": 1, "personal": 0},
        privacy={"kind": kind, "clip": 0.2, "noise": 3.0, "delta": 0.01},
    )  # fmt: skip
    run = named(raw, tmp_path / "flower")
    for name in running.names:
        put_key(running.site(name).parent / "store" / run / "private" / name)
        put_key(tmp_path / "local" / "clients" / name)
    for place in ("flower", "local"):
        put_key(tmp_path / place)
    until(lambda: online(running) == 3, 300, "three SuperNodes")  # a central round begins with one
    running.play(raw, tmp_path / "flower", 600)
    local(running.files, raw, tmp_path / "local")
    assert state(tmp_path / "flower", 2) == state(tmp_path / "local", 2)
    mine, theirs = (fedrank.Run(tmp_path / place) for place in ("flower", "local"))
    assert [row["epsilon"] for row in mine.rounds] == [row["epsilon"] for row in theirs.rounds]
    assert mine.summary["epsilon"] > 0


def test_plain_text_is_refused(running: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the gate and the SuperLink itself: where they speak, it is TLS."""
    trusted = ssl.create_default_context(cafile=running.keys / "ca.crt")
    for port in (running.port, running.inner):
        with socket.create_connection(("127.0.0.1", port), 10) as plain:
            assert b"HTTP/" not in asked(plain)
        plain = socket.create_connection(("127.0.0.1", port), 10)
        with trusted.wrap_socket(plain, server_hostname="127.0.0.1") as line:
            assert asked(line).startswith(b"HTTP/1.1 ")
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")  # with which a SuperNode says why it tries again
    running.start_node("plain", insecure=True, site="north")
    monkeypatch.undo()
    failed = "Connection attempt failed with exception: "
    until(lambda: running.said("plain.node").count(failed) > 2, 120, "its refusals")
    said = running.said("plain.node")
    reasons = {line.partition(failed)[2] for line in said.splitlines() if failed in line}
    # No status of HTTP is among them, with which whoever hears it refuses a stranger.
    assert reasons <= {"Server disconnected without sending a response.", "[Errno 104] Connection reset by peer"}
    assert "Failed to initialize" not in said
    assert "/v1/fleet/activate-node" in running.said("link")  # what others call is there, so its call would be
    assert "/v1/fleet/register-node" not in running.said("link")
    running.end("plain.node")
    raw = running.config(engine={"insecure": True, "root_certificate": None})
    (tmp_path / "plain.yaml").write_text(json.dumps(raw))
    said = subprocess.run(
        [sys.executable, "-m", "fedrank.cli", "run", str(tmp_path / "plain.yaml"), "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 2
    assert "flwr run" in said.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_node_without_a_registered_key_gets_no_work_and_a_hostile_one_costs_nobody_an_answer(
    running: Federation, tmp_path: Path
) -> None:
    """The hostile one has a registered key, and tries with its greeting whatever the SuperLink itself would fall for; last it
    announces an answer and uploads nothing of it."""
    running.start_node("intruder", key="stranger", site="north")
    until(lambda: "305" in running.tail("intruder.node"), 120, "the SuperNode's refusal")
    assert "Failed to initialize the connection to the SuperLink" in running.tail("intruder.node")
    running.register("hostile")
    key = load_ssh_private_key((running.keys / "hostile.key").read_bytes(), None)
    raw, out, ca = running.config(rounds={"count": 4}), tmp_path / "run", (running.keys / "ca.crt").read_bytes()
    process = running.begin(raw, out)
    # The first round would wait for the greeting's answer.
    until(lambda: max(committed(out), default=0) > 0, 300, "the first round")
    link = fleet_http_connection.http_request_response(f"127.0.0.1:{running.port}", False, ca, (key, key.public_key()))
    with link as (node, receive, send, *_, confirm):
        told, parts = until(receive, 120, "the greeting")
        assert told.metadata.dst_node_id == node

        def answer(**forged: Any) -> tuple[Message, ObjectTree]:
            made = Message(RecordDict({"frame": ConfigRecord({"frame": secrets.token_bytes(99)})}), reply_to=told)
            vars(made.metadata).update({f"_{name}": value for name, value in forged.items()})
            vars(made.metadata)["_message_id"] = made.object_id
            return made, get_object_tree(made)

        for forged in (
            {"ttl": math.nan}, {"created_at": math.nan}, {"src_node_id": node + 1}, {"src_node_id": 1, "reply_to_message_id": ""},
            {"reply_to_message_id": ""},
        ):  # fmt: skip
            with pytest.raises(httpx.HTTPStatusError, match="400"):
                send(*answer(**forged), 1.0)
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            send(answer()[0], parts, 1.0)
        missing, _ = send(*answer(), 1.0)
        assert len(missing) > 2
        confirm(told.metadata.run_id, told.metadata.message_id)
        running.wait(process, 300)
    assert answered(out) == {round: set(running.names) for round in range(1, 5)}
    assert running.said("gate").count("which is refused") >= 6
    assert "Receiving" not in running.said("intruder.node")
    running.end("intruder.node")


def states(out: Path) -> dict[int, Any]:
    """Those that are there; a run lets old ones go meanwhile."""
    found = {}
    for round in committed(out):
        with suppress(FileNotFoundError):
            found[round] = state(out, round)
    return found


def asked(line: socket.socket) -> bytes:
    """All that comes back for a request."""
    found = b""
    with suppress(ConnectionError):
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while part := line.recv(1000):
            found += part
    return found


# ---- kill -9


@pytest.mark.parametrize(
    "programs",
    [("the worker", "the gate", "the server app"), pytest.param([*PROGRAMS], marks=pytest.mark.exhaustive)],
    ids=["fedrank's own", "all"],
)  # fmt: skip
def test_what_is_killed_in_turn_loses_no_round(programs: Sequence[str], running: Federation, tmp_path: Path) -> None:
    """Each in a round of its own, a site's while it answers; the site comes back each time. All rounds are played, and the
    State is what the answers that arrived imply."""
    raw = running.config(
        method={"name": "pf2lora"},
        rounds={"count": 100, "minimum": 1, "deadline": 60.0, "evaluate_every": 100, "personal": 0},
    )
    out = tmp_path / "run"
    process, more = running.begin(raw, out), list[str]()
    until(lambda: max(committed(out), default=0) > 0, 300, "the first round")
    for what in programs:
        if PROGRAMS[what][1] is None:
            until(lambda: running.working("south"), 120, f"a message that is answered, before the kill of {what}")
        before = states(out)
        running.strike(what, "south")
        if what in SERVERS:
            assert process.wait(300) == 1
            if what == programs[-1]:  # how many rounds a SuperNode is away is not known before
                raw["rounds"]["count"] = max(committed(out)) + 3
                more = [f"rounds.count={raw['rounds']['count']}"]
            process = running.run(out, "resume", str(out), *more)
        struck = max(committed(out)) + 1  # the round that is played
        assert all(now == before[round] for round, now in states(out).items() if round in before)
        # Flower refuses the key of a killed SuperNode until two of its heartbeats are missed.
        until(lambda struck=struck: running.back("south", out, struck), 300, f"the site, after the kill of {what}")
        if what == "the SuperNode":
            assert "south" not in answered(out)[struck]  # with it went the message that it had
    running.wait(process, 600)
    follows(running, raw, out, tmp_path)
