"""Worker processes: the same results in the same order, what they log, and their end."""

import fcntl
import gc
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from fedrank.engines.workers import KERNELS, Workers, cores, fitting, keep_few_kernels, page_out
from fedrank.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_whoever_makes_them(count):
    with Workers(count, 1) as workers:
        spread = workers.share(square)
        found = list(spread(range(10)))
        assert [value for value, _ in found] == [n**2 for n in range(10)]
        processes = {process for _, process in found}
        assert (os.getpid() in processes) == (count == 1)
        assert len(processes) <= count
        assert [value for value, _ in spread([])] == []


def test_arguments_are_taken_as_they_are_needed():
    taken = []

    def numbers():
        for n in range(20):
            taken.append(n)
            yield n

    with Workers(2, 1) as workers:
        results = workers.share(square)(numbers())
        next(results)
        assert len(taken) <= 5
        results.close()


def test_what_a_worker_logs_is_logged_here(caplog):
    def warn(number: int) -> int:
        logging.getLogger("fedrank.test").warning("number %d", number)
        return number

    with Workers(2, 1) as workers:
        assert list(workers.share(warn)(range(3))) == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == ["number 0", "number 1", "number 2"]


def test_an_error_in_a_worker_is_raised_here():
    def fail(number: int) -> int:
        raise ValueError(f"not {number}")

    with Workers(2, 1) as workers, pytest.raises(ValueError, match="not 0"):
        list(workers.share(fail)([0]))


def test_a_worker_that_is_killed_is_noticed():
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with Workers(2, 1) as workers, pytest.raises(BrokenProcessPool):
        list(workers.share(die)([0]))


def test_workers_end_when_they_are_left():
    with Workers(2, 1) as workers:
        found = {process for _, process in workers.share(square)(range(8))}
    assert not any(Path(f"/proc/{process}").exists() for process in found)


def test_workers_end_with_the_process_that_made_them(tmp_path):
    """Even where that is killed."""
    code = (
        "import os, sys, time\nfrom fedrank.engines.workers import Workers\n"
        "def who(n):\n    time.sleep(0.05)\n    return os.getpid()\n"
        "w = Workers(2, 1)\nprint(*set(w.share(who)(range(8))), flush=True)\ntime.sleep(60)\n"
    )
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    processes = [int(word) for word in made.stdout.readline().split()]
    assert processes
    made.kill()
    made.wait()
    made.stdout.close()
    until = time.monotonic() + 20
    while any(_alive(process) for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_alive(process) for process in processes)


def _alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_as_many_as_fill_the_cores():
    assert fitting(1, "cpu", 10**7) == cores()
    assert fitting(2 * cores(), "cpu", 10**7) == 1
    assert fitting(1, "cuda", 10**7) == fitting(1, "cpu", 10**4) == 1


def test_fewer_kernels_are_kept_unless_the_environment_says_how_many(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")  # to be put back
    del os.environ["LRU_CACHE_CAPACITY"]
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "17")
    keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == KERNELS["LRU_CACHE_CAPACITY"]
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "17"


def test_workers_of_several_threads_compute_after_their_parent_has():
    """OpenMP's threads do not come along in a fork; in a process of its own, since the tests have one thread."""
    code = """
import torch
from fedrank.engines.workers import Workers

def total(n):
    torch.set_num_threads(2)
    return torch.ones(n).neg().abs().sum().item()

torch.set_num_threads(2)
total(4_000_000)
with Workers(2, 2) as workers:
    print(list(workers.share(total)([4_000_000, 2_000_000])))
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "[4000000.0, 2000000.0]\n", done.stderr


def test_memory_that_is_let_go_comes_back_unchanged():
    values = np.arange(1 << 20)
    page_out(values.ctypes.data, values.nbytes)
    page_out(values.ctypes.data + 1, 10)  # less than a page
    assert (values == np.arange(1 << 20)).all()


def test_what_was_shared_is_let_go_with_the_next_workers():
    """Set aside for the fork, garbage that holds itself would never be found."""

    class Model:
        def __init__(self) -> None:
            self.me = self

        def square(self, number: int) -> int:
            return number**2

    def run() -> weakref.ref[Model]:
        model = Model()
        with Workers(2, 1) as workers:
            assert list(workers.share(model.square)(range(3))) == [0, 1, 4]
        return weakref.ref(model)

    first = run()
    gc.collect()
    assert first() is not None
    run()
    assert first() is None


def test_a_lock_that_workers_share_is_free_when_they_are_left(tmp_path):
    """They are killed where the work is broken off, and waited for."""
    store = Store.create(tmp_path / "run")

    def stop(number: int) -> None:
        if number:
            time.sleep(30)
        raise KeyError

    with pytest.raises(KeyError), store.locked(), Workers(2, 1) as workers:
        list(workers.share(stop)(range(4)))
    with (store.path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("limit", "fitted"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("990000 100000", 8)]
)
def test_a_control_group_has_less_time_than_cores(monkeypatch, limit, fitted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda path: limit)
    assert cores() == fitted
