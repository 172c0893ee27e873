"""Real SuperLinks and SuperNodes on loopback, with TLS and node authentication: parity, strangers, and kill -9."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import fedrank
from federation import (
    PROGRAMS,
    SERVERS,
    Federation,
    answered,
    committed,
    federation,
    follows,
    local,
    named,
    put_key,
    state,
    until,
)
from fedrank import ledger, remote

# One federation for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.xdist_group("superlink")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation")) as made:
        yield made


@pytest.mark.parametrize("method", ["fedara", pytest.param("pf2lora", marks=pytest.mark.exhaustive)])
def test_a_real_federation_ends_in_the_local_state(method: str, running: Federation, tmp_path: Path) -> None:
    """Three sites with rows of their own, five rounds; the same bytes in the ledger."""
    raw = running.config(method={"name": method})
    running.play(raw, tmp_path / "flower", 600)
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


def test_a_node_without_a_registered_key_gets_no_work(running: Federation, tmp_path: Path) -> None:
    running.start_node("intruder", key="stranger", site="north")
    until(lambda: "305" in running.tail("intruder.node"), 120, "the SuperNode's refusal")
    assert "Failed to initialize the connection to the SuperLink" in running.tail("intruder.node")
    running.play(running.config(rounds={"count": 1}), tmp_path / "run", 300)
    assert "Receiving" not in running.tail("intruder.node")
    assert answered(tmp_path / "run") == {1: set(running.names)}
    running.end("intruder.node")


def test_plain_text_is_refused(running: Federation, tmp_path: Path) -> None:
    with socket.create_connection(("127.0.0.1", running.port), 10) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        line.settimeout(10)
        with suppress(ConnectionResetError):
            assert not line.recv(100).startswith(b"HTTP/1.1 200")
    running.start_node("plain", insecure=True, site="north")
    until(lambda: "retrying" in running.tail("plain.node") or "305" in running.tail("plain.node"), 120, "its refusal")
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


# ---- kill -9


def test_what_is_killed_in_turn_loses_no_round(running: Federation, tmp_path: Path) -> None:
    """Each in a round of its own; all rounds are played, and the State is what the answers that arrived imply."""
    count = len(PROGRAMS) + 3
    raw = running.config(
        method={"name": "pf2lora"},
        rounds={"count": count, "minimum": 1, "deadline": 60.0, "evaluate_every": count, "personal": 0},
    )
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(json.dumps(raw))
    process = running.run(out, "run", str(path), "--out", str(out))
    last = 0
    for what in PROGRAMS:
        until(lambda last=last: max(committed(out), default=0) > last, 300, f"a round before the kill of {what}")
        before = {round: state(out, round) for round in committed(out)}
        last = max(before)
        running.strike(what, "south")
        if what in SERVERS:
            assert process.wait(300) == 1
            process = running.run(out, "resume", str(out))
        assert all(state(out, round) == before[round] for round in committed(out) if round in before)
    running.wait(process, 600)
    follows(running, raw, out, tmp_path)
