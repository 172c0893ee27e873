"""The run directory: what was saved comes back, whole or not at all."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from fedrank import store
from fedrank.adapter import Adapter, Block
from fedrank.protocol import State
from fedrank.store import Private, Store, StoreError
from toy import drawn, equal, same, small

SPEC = small({"z.last": (2, 3), "a.first": (3, 2), "m": (4, 4)}, rank=3)


def state(round: int = 4, **changes: Any) -> State:
    adapter = drawn(SPEC, round).take({"z.last": np.array([0, 2]), "a.first": np.array([1])})
    head = {"head.weight": np.ones((2, 2), np.float32), "bias": np.array(0.5, np.float32)}
    arrays = {
        "start": np.array(36),
        "votes": np.array([[0.1, 0.2]]),
        "seen": np.array([True]),
        "none": np.zeros((0, 2)),
    }
    made = State(round, 20, Adapter(adapter.blocks, 1 / 3, head), arrays, {"budget": 7.5}, {"c1": 3, "c0": 4})
    return State(**{**vars(made), **changes})


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "run")


def states(run: Store) -> list[int]:
    return sorted(int(path.stem) for path in (run.path / "states").iterdir())


# ---- states


def test_a_state_comes_back_whole(run: Store) -> None:
    """Adapter to the bit and in its order of modules, head, arrays with their shapes and dtypes, metrics, seen."""
    saved = state()
    run.save_state(saved, {"threads": 1, "torch": "2.13"})
    found, numerics = run.state()
    assert equal(found, saved)
    assert list(found.adapter.blocks) == ["z.last", "a.first"]
    assert list(found.adapter.dense) == ["head.weight", "bias"]
    assert found.adapter.scale == 1 / 3
    assert {n: (a.dtype, a.shape) for n, a in found.arrays.items()} == {
        n: (a.dtype, a.shape) for n, a in saved.arrays.items()
    }
    assert int(found.arrays["start"]) == 36
    assert list(found.seen.items()) == [("c1", 3), ("c0", 4)]
    assert numerics == {"threads": 1, "torch": "2.13"}


def test_forms_and_dtypes_come_back(run: Store) -> None:
    """Plain LoRA without e, half precision and double, an adapter with nothing in it."""
    for round, kind in enumerate((np.float16, np.float32, np.float64)):
        block = Block(np.array([5]), np.ones((2, 1), kind), None, np.ones((1, 3), kind))
        run.save_state(state(round, adapter=Adapter({"m": block}, 2.0, {})), {})
        assert same(run.state(round)[0].adapter, Adapter({"m": block}, 2.0, {}))
    run.save_state(state(3, adapter=Adapter({}, 2.0, {}), seen={}, arrays={}, metrics={}), {})
    assert run.state()[0].adapter.components == 0


def test_the_last_three_and_every_tenth_stay(run: Store) -> None:
    for round in range(24):
        run.save_state(state(round), {})
        assert set(range(max(round - 2, 0), round + 1)) <= set(states(run))
    assert states(run) == [0, 10, 20, 21, 22, 23]
    assert run.state()[0].round == 23
    assert run.state(10)[0].round == 10


def test_a_state_that_is_not_there(run: Store) -> None:
    with pytest.raises(StoreError, match="holds no state of round any; it has: none"):
        run.state()
    run.save_state(state(0), {})
    run.save_state(state(1), {})
    with pytest.raises(StoreError, match="holds no state of round 7; it has: 0, 1"):
        run.state(7)


def test_a_file_that_is_being_written_is_no_state(run: Store) -> None:
    run.save_state(state(1), {})
    (run.path / "states" / "0002.safetensors.new").write_bytes(b"half of it, from before a kill")
    assert run.state()[0].round == 1
    run.save_state(state(2), {})
    assert states(run) == [1, 2]
    assert run.state()[0].round == 2


def test_a_damaged_state_is_named(run: Store) -> None:
    """Cut short, emptied, scribbled into, or of something else."""
    run.save_state(state(), {})
    path = run.path / "states" / "0004.safetensors"
    whole = path.read_bytes()
    meta = whole.index(b"z.last")
    for damaged in (
        b"",
        whole[:40],
        whole[:-1],
        b"\xff" * 100,
        whole[:meta] + b"Z" + whole[meta + 1 :],
        store.save({"x": np.ones(1)}),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"0004.safetensors is damaged"):
            run.state()


# ---- directories


def test_a_run_does_not_overwrite(tmp_path: Path) -> None:
    """Not another run, nor anything else; a start that was cut short before its config was there is no run yet."""
    (tmp_path / "run").mkdir()
    for name in ("config.yaml.new", "noise.key.new"):
        (tmp_path / "run" / name).write_text("half")
    Store.create(tmp_path / "run").save_state(state(0), {})
    Store.create(tmp_path / "run").write("config.yaml", "seed: 1")
    with pytest.raises(
        StoreError, match=r"run is not an empty folder; choose another --out, or go on with: fedrank resume"
    ):
        Store.create(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    for name in ("other", "other/thesis.tex"):
        with pytest.raises(StoreError, match=r"is not an empty folder; choose another --out$"):
            Store.create(tmp_path / name)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_run_directory_has_a_config(run: Store) -> None:
    with pytest.raises(StoreError, match=r"is no run directory: it has no config.yaml"):
        Store.open(run.path)
    run.write("config.yaml", "seed: ä\n")
    assert (Store.open(run.path).path / "config.yaml").read_text(encoding="utf-8") == "seed: ä\n"


def test_a_run_is_played_by_one_process(run: Store) -> None:
    """A second process is told so; when the first has gone, however it went, the lock has gone."""
    take = f"from pathlib import Path; from fedrank.store import *\nwith Store(Path({str(run.path)!r})).locked(): print('locked'); "
    with run.locked():
        second = subprocess.run([sys.executable, "-c", f"{take} pass"], capture_output=True, text=True, check=False)
        assert second.returncode
        assert "StoreError" in second.stderr
        assert "is in use by another process" in second.stderr
    killed = subprocess.run(
        [sys.executable, "-c", f"{take} import os; os.kill(os.getpid(), 9)"], capture_output=True, check=False
    )
    assert killed.returncode == -9
    with run.locked():
        pass


# ---- writing


def test_a_file_is_written_beside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the whole of the new one is on disk the old one stands."""
    path = tmp_path / "deep" / "file"
    store.write(path, b"old")
    assert [p.name for p in path.parent.iterdir()] == ["file"]

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            store.write(path, b"newer")
    assert path.read_bytes() == b"old"
    store.write(path, b"newest")
    assert path.read_bytes() == b"newest"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, whole = tmp_path / "file", os.replace, {bytes([at]) * (1000 + at) for at in range(8)}

    def late(old: Path, new: Path) -> None:
        time.sleep(0.002)
        replace(old, new)
        assert path.read_bytes() in whole

    monkeypatch.setattr(os, "replace", late)
    with ThreadPoolExecutor(8) as threads:
        for written in [threads.submit(store.write, path, data) for data in whole for _ in range(5)]:
            written.result()
    assert path.read_bytes() in whole
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_secret_is_drawn_once(tmp_path: Path) -> None:
    """Whoever asks at the same time is given the same."""
    with ThreadPoolExecutor(8) as threads:
        for number in range(10):
            path, together = tmp_path / str(number) / "key", Barrier(8)

            def ask(path: Path = path, together: Barrier = together) -> bytes:
                together.wait()
                return store.secret(path)

            asked = [threads.submit(ask) for _ in range(8)]
            assert {one.result() for one in asked} == {path.read_bytes()}
            assert path.stat().st_mode & 0o777 == 0o600


# ---- private state of clients


def versions(private: Private, client: str) -> list[int]:
    return sorted(int(path.stem) for path in (private.root / client).glob("*"))


def kept(number: float) -> dict[str, np.ndarray]:
    return {"B/0.m": np.full((2, 3), number, np.float32), "ids/0.m": np.arange(3), "private/steps": np.array(number)}


def test_private_state_comes_back(tmp_path: Path) -> None:
    private = Private(tmp_path)
    private.save("c0", 2, -1, kept(2))
    found = private.load("c0", 2)
    assert {n: (a.dtype, a.shape, a.tolist()) for n, a in found.items()} == {
        n: (a.dtype, a.shape, a.tolist()) for n, a in kept(2).items()
    }
    assert private.load("c1", 2) is None


def test_a_job_never_sees_a_newer_version_than_was_merged(tmp_path: Path) -> None:
    """Round 5's update was lost: the client still starts from round 2's state, and then the lost one is over."""
    private = Private(tmp_path)
    private.save("c0", 2, -1, kept(2))
    private.save("c0", 5, 2, kept(5))
    assert versions(private, "c0") == [2, 5]
    assert private.load("c0", 2)["B/0.m"][0, 0] == 2
    assert private.load("c0", -1) is private.load("c0", 3) is None
    private.save("c0", 7, 2, kept(7))  # from round 2 again
    assert versions(private, "c0") == [2, 7]
    private.save("c0", 9, 7, kept(9))  # round 7 was merged: 2 is over
    assert versions(private, "c0") == [7, 9]
    private.save("c0", 9, 7, kept(9.5))  # the same round once more, as after a kill of the server
    assert versions(private, "c0") == [7, 9]
    assert private.load("c0", 9)["B/0.m"][0, 0] == 9.5


def test_a_client_that_keeps_nothing_writes_nothing(tmp_path: Path) -> None:
    private = Private(tmp_path)
    private.save("c0", 2, -1, None)
    assert list(tmp_path.iterdir()) == []
    private.save("c0", 3, -1, kept(3))
    private.save("c0", 4, 3, None)
    assert versions(private, "c0") == [3]


def test_an_empty_version_is_told_from_a_lost_one(tmp_path: Path) -> None:
    private = Private(tmp_path)
    private.save("c0", 2, -1, {})
    assert private.load("c0", 2) == {}
    assert private.load("c0", 3) is None


def test_clients_do_not_share(tmp_path: Path) -> None:
    private = Private(tmp_path)
    for client in ("c1", "c10", "c1.b"):
        private.save(client, 1, -1, kept(len(client)))
    assert [private.load(client, 1)["B/0.m"][0, 0] for client in ("c1", "c10", "c1.b")] == [2, 3, 4]


@pytest.mark.parametrize(
    "client", ["", ".", "..", "../c0", "a/b", "/etc", "a\0b", ".hidden", "ü", "a b", "a\n", "x" * 129]
)
def test_a_client_id_is_no_path(tmp_path: Path, client: str) -> None:
    for use in (lambda: Private(tmp_path).load(client, 1), lambda: Private(tmp_path).save(client, 1, -1, kept(1))):
        with pytest.raises(ValueError, match="must be letters, digits"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_damaged_private_state_is_named(tmp_path: Path) -> None:
    private = Private(tmp_path)
    private.save("c0", 1, -1, kept(1))
    (tmp_path / "c0" / "0001.safetensors").write_bytes(b"half")
    with pytest.raises(StoreError, match=r"0001.safetensors is damaged"):
        private.load("c0", 1)
