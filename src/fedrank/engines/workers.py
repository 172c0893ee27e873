"""Worker processes: forked from this one, so that they share its model and data, each on its own cores."""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from fedrank import trace

Spread = Callable[[Iterable[Any]], Iterator[Any]]

TRIM, TOP_PAD, MMAP = -1, -2, -3  # mallopt's parameters, in glibc's malloc.h
PAGE_OUT = 21  # madvise's, in Linux' mman.h
# How many of oneDNN's kernels are kept, by torch and by oneDNN itself, each 1,024 unless told. A kernel is half a megabyte,
# there is one for every shape, and making one takes 0.2 ms; oneDNN's own cache is enough.
KERNELS = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
SMALL = 1_000_000  # parameters: a smaller model is trained faster than other processes are reached
KEPT, LARGEST = 1 << 30, 1 << 25  # bytes; above 32 MiB glibc takes no threshold for mmap

_functions: list[Callable[[Any], Any]] = []  # of a worker, from the process it was forked from
_threads: list[ThreadPoolExecutor] = []  # of a worker with several: who computes, see _begin


class Workers:
    """`count` processes that compute shared functions; with one, or while spans are recorded, this process computes them.

    They are forked when something is first computed: whatever is in memory by then is shared and not copied.
    """

    forked = False  # whether any of them has been, in this process

    def __init__(self, count: int, threads: int) -> None:
        self.count, self.threads = count, threads
        self.functions: list[Callable[[Any], Any]] = []
        self.pool: ProcessPoolExecutor | None = None
        self.processes = set[BaseProcess]()

    def share(self, function: Callable[[Any], Any]) -> Spread:
        """The function over many arguments: results in the order of these, which are taken as they are needed."""
        assert self.pool is None, "what is shared must be known before the workers are"
        self.functions.append(function)
        here = self.count == 1 or trace.on()
        return partial(map, function) if here else partial(self._map, len(self.functions) - 1)

    def _map(self, at: int, items: Iterable[Any]) -> Iterator[Any]:
        pool, waiting, source = self._started(), deque[Future[Any]](), iter(items)

        def submit(count: int) -> None:
            waiting.extend(pool.submit(_call, at, item) for item in islice(source, count))

        submit(self.count + 1)  # one more: the next is prepared while all work
        try:
            while waiting:
                result, records = waiting.popleft().result()
                for record in records:
                    logging.getLogger(record.name).handle(record)
                submit(1)
                yield result
        finally:
            for future in waiting:
                future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            context, cores = multiprocessing.get_context("fork"), sorted(os.sched_getaffinity(0))
            places = context.SimpleQueue()
            for at in range(self.count):
                own = cores[at * self.threads : (at + 1) * self.threads]
                places.put(own if self.count * self.threads == len(cores) else [])
            if Workers.forked:  # what an earlier run left is looked for here: at that one's end it would cost a second
                gc.unfreeze()
            Workers.forked = True
            gc.collect()
            give_back()
            gc.freeze()  # else collecting garbage would write to, and so copy, all that is shared
            before = set(multiprocessing.active_children())
            self.pool = ProcessPoolExecutor(self.count, context, _begin, (self.functions, places, self.threads))
            self.pool.submit(int).result()  # all are forked with the first task
            self.processes = set(multiprocessing.active_children()) - before
        return self.pool

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pool is not None:
            if kind is not None:  # nobody waits for what they are at
                for process in self.processes:
                    process.kill()
                for process in self.processes:  # they hold what was open at the fork, such as the run's lock
                    process.join()
            self.pool.shutdown(wait=kind is None, cancel_futures=True)
            self.pool = None
        self.functions.clear()  # they lead back here, and to the model: a cycle that would stay as long as it is frozen


def fitting(threads: int, device: str, parameters: int) -> int:
    """As many workers as keep all cores of this machine busy; a small model gains nothing from another process."""
    if sys.platform != "linux" or device != "cpu" or parameters < SMALL:
        return 1
    return max(1, cores() // threads)


def cores() -> int:
    """Those that this process may run on, or as many as its control group has the time of."""
    may = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return may
    return may if quota == "max" else min(may, max(1, int(quota) // int(period)))


def keep_few_kernels() -> None:
    """Let kernels go that are long out of use, unless the environment says otherwise. In vain after torch's first product."""
    for name, count in KERNELS.items():
        os.environ.setdefault(name, count)


def quieten() -> None:
    """Loading bars and advice of the libraries below are not a run's output. In vain after they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("torchao", "torch.utils._pytree"):  # transformers imports it where it is; it warns of kernels
        logging.getLogger(library).setLevel(logging.ERROR)


def keep_memory() -> None:
    """Let this process keep freed memory: with glibc's defaults every step gets its activations from the kernel anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in ((MMAP, LARGEST), (TRIM, KEPT), (TOP_PAD, 1 << 26)):
            libc.mallopt(parameter, value)


def give_back() -> None:
    """Return freed memory, such as that of the texts before they were tokens, to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def page_out(address: int, size: int) -> None:
    """Let the system take this memory, which is hardly read; it brings it back unchanged when it is."""
    libc, page = ctypes.CDLL(None), os.sysconf("SC_PAGE_SIZE")
    begin = -(-address // page) * page
    if sys.platform == "linux" and (length := (address + size - begin) // page * page) > 0:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), PAGE_OUT)  # an older kernel does nothing


def _begin(functions: list[Callable[[Any], Any]], places: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not through a display that only the first process draws
    _functions[:] = functions
    if cores := places.get():
        os.sched_setaffinity(0, cores)
    keep_memory()
    if threads > 1:  # OpenMP waits forever for threads of the process that was forked, but not in a new thread
        _threads.append(ThreadPoolExecutor(1))
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End with the process that forked this one, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


def _call(at: int, item: Any) -> tuple[Any, list[logging.LogRecord]]:
    """The result, and what was logged meanwhile: the first process writes it where its own log goes."""
    root, kept = logging.getLogger(), _Kept()
    before, root.handlers = root.handlers, [kept]
    try:
        function = _functions[at]
        return _threads[0].submit(function, item).result() if _threads else function(item), kept.records
    finally:
        root.handlers = before
