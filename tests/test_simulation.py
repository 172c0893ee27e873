"""A run on Flower's real simulation runtime: imported, stopped by Ctrl-C and resumed, it ends as the local engine's does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

import fedrank
from federation import LABELS, PLAYED, rows, state, until, write_rows
from fedrank import config, experiment, ledger

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROUNDS = 20


@pytest.mark.exhaustive  # that a simulated run is the local one, examples/flower shows in CI
def test_a_simulated_run_is_the_local_one_also_after_ctrl_c(tmp_path: Path) -> None:
    """The same State, bit for bit, at the end and on the way; and nothing that Flower or Ray started is left."""
    write_rows(tmp_path / "data" / "train.jsonl", rows(0, 120))
    write_rows(tmp_path / "data" / "test.jsonl", rows(1, 30))
    (tmp_path / "data" / "labels.txt").write_text("\n".join(LABELS))
    raw: dict[str, Any] = {
        "model": {"name": "tiny-encoder"}, "data": {"path": str(tmp_path / "data"), "partition": {"kind": "iid"}},
        "clients": {"count": 4}, "adapter": {"rank": 4}, "local": {"lr": 0.01, "steps": 2, "batch_size": 8},
        "method": {"name": "pf2lora"}, "rounds": {"count": ROUNDS, "cohort": 3, "evaluate_every": 5},
        "engine": {**PLAYED, "kind": "flower-simulation", "failure_rate": 0.1},
    }  # fmt: skip
    path, run, said = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "said"
    path.write_text(json.dumps(raw))
    here = {**raw, "engine": {**PLAYED, "failure_rate": 0.1}}
    fedrank.run(here, "rounds.count=1", "method={name: fedavg}", out=tmp_path / "before")
    adapter = tmp_path / "before" / "adapter"
    for _ in experiment.start(config.load(here), tmp_path / "local", imported=adapter):
        pass
    with TemporaryDirectory(dir="/tmp") as temporary:  # a socket's path is short
        environment = {**os.environ, "TMPDIR": temporary, "OMP_NUM_THREADS": "1"}

        def play(*words: str) -> subprocess.Popen[bytes]:
            with said.open("wb") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "fedrank.cli", *words, "-o", "plain"], env=environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )  # fmt: skip

        process = play("import", str(adapter), str(path), "--out", str(run))
        until(lambda: (run / "states" / "0002.safetensors").exists() or process.poll(), 600, "the third round")
        started = psutil.Process(process.pid).children(recursive=True)
        assert "raylet" in {one.name() for one in started}
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, said.read_text()
        assert f"Go on with: fedrank resume {run}" in said.read_text()
        assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
        assert list(Path(temporary).glob("fedrank-*")) == []
        assert not (run / "summary.json").exists()

        process = play("resume", str(run))
        until(lambda: len(list((run / "states").glob("*"))) > 3 or process.poll(), 600, "the resumed run")
        started = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(600) == 0, said.read_text()
        assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
        assert list(Path(temporary).glob("fedrank-*")) == []

    for round in (0, 10, ROUNDS - 1, ROUNDS):
        assert state(run, round) == state(tmp_path / "local", round)
    theirs, ours = (ledger.read(folder / "rounds.jsonl") for folder in (run, tmp_path / "local"))
    same = [name for name in ours[0] if "bytes" in name or name.startswith(("clients_", "personal_", "device_"))]
    assert len(same) > 8
    assert [{name: row[name] for name in same} for row in theirs] == [
        {name: row[name] for name in same} for row in ours
    ]
    assert sum(row["clients_failed"] for row in ours) > 0
