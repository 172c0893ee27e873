"""Real SuperLinks and SuperNodes on loopback, with TLS and node authentication: parity, strangers, and kill -9."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fedrank
from federation import Federation, answered, federation, local, state, until
from fedrank import ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation")) as made:
        yield made


@pytest.mark.parametrize("method", ["fedara", "pf2lora"])
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


def begun(path: Path, round: int) -> bool:
    """Whether a round is being played."""
    return (path / "states" / f"{round - 1:04d}.safetensors").exists()


def committed(path: Path) -> list[int]:
    return sorted(int(file.stem) for file in (path / "states").glob("*.safetensors"))


def follows(made: Federation, raw: Mapping[str, Any], path: Path, tmp_path: Path) -> None:
    """Its State is what the answers that arrived imply."""
    rows = ledger.read(path / "rounds.jsonl")
    assert [row["round"] for row in rows] == list(range(1, raw["rounds"]["count"] + 1))
    local(made.files, raw, tmp_path / "again", answered(path))
    last = raw["rounds"]["count"]
    assert state(path, last) == state(tmp_path / "again", last)
    assert fedrank.Run(path).summary["rounds"] == last


KILLED = {
    "the worker": ("site", "south"), "the client app": ("flwr-clientapp", "south"), "the SuperNode": ("flower-supernode", "south"),
    "the server app": ("flwr-serverapp", "link"), "the SuperLink": ("flower-superlink", "link"),
}  # fmt: skip


@pytest.mark.parametrize("what", KILLED)
def test_what_is_killed_loses_no_round(what: str, running: Federation, tmp_path: Path) -> None:
    raw = running.config(
        method={"name": "pf2lora"},
        rounds={"count": 3, "minimum": 1, "deadline": 150.0, "evaluate_every": 3, "personal": 0},
    )
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(json.dumps(raw))
    process = running.run(out, "run", str(path), "--out", str(out))
    until(lambda: begun(out, 2), 300, "the second round")
    word, home = KILLED[what]
    killed = until(lambda: running.kill(word, home), 60, what)
    before = committed(out)
    assert killed
    if what == "the worker":
        running.start_worker("south")
    if what == "the SuperLink":
        running.start_link()
    if what in ("the server app", "the SuperLink"):
        assert process.wait(300) == 2
        assert committed(out) == before
        process = running.run(out, "resume", str(out))
    running.wait(process, 600)
    follows(running, raw, out, tmp_path)
