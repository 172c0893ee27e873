"""Where the time goes: named spans, kept while a recording is on, summed in words and drawn by a trace viewer."""

import json
import time
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from pathlib import Path
from types import TracebackType

Span = tuple[str, float, float, int]  # name, began, ended (seconds), depth

_recording: list[Span] | None = None
_depth = 0


class span(ContextDecorator):
    """``with span("forward"): ...``, or over a function; costs next to nothing while nobody records."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _recreate_cm(self) -> "span":
        return span(self.name)

    def __enter__(self) -> None:
        global _depth
        self.on = _recording is not None
        if self.on:
            self.began, self.depth = time.perf_counter(), _depth
            _depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _depth
        if self.on and _recording is not None:
            _depth -= 1
            _recording.append((self.name, self.began, time.perf_counter(), self.depth))


@contextmanager
def recording() -> Iterator[list[Span]]:
    """The spans of this process while the block runs, each added when it ends."""
    global _recording, _depth
    _recording, _depth = [], 0
    try:
        yield _recording
    finally:
        _recording = None


def on() -> bool:
    """Whether spans are kept; of this process alone, so that whoever would share work out computes it here."""
    return _recording is not None


def shares(spans: list[Span], whole: tuple[str, ...] = ()) -> dict[str, float]:
    """Seconds of each name, less those of the spans inside it; what is inside one of `whole` counts as that one."""
    found: dict[str, float] = {}
    open_: list[Span] = []
    for one in sorted(spans, key=lambda s: (s[1], s[3])):
        name, began, ended, depth = one
        open_ = open_[:depth]
        outer = open_[-1][0] if open_ else None
        if outer in whole:
            name = outer
        found[name] = found.get(name, 0.0) + ended - began
        if outer is not None:
            found[outer] -= ended - began
        open_.append((name, began, ended, depth))
    return found


def write(spans: list[Span], path: Path) -> None:
    """As a Chrome trace: chrome://tracing and Perfetto open it."""
    start = min((began for _, began, _, _ in spans), default=0.0)
    events = [
        {"name": name, "ph": "X", "pid": 0, "tid": 0, "ts": 1e6 * (began - start), "dur": 1e6 * (ended - began)}
        for name, began, ended, _ in sorted(spans, key=lambda s: s[1])
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
