"""A structured log: one line of JSON for every event, and for what fedrank logs meanwhile."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic_core import to_json

from fedrank.config import Observe
from fedrank.ledger import Event
from fedrank.observe.rows import Watch


class Lines(logging.Formatter):
    """NaN and infinity are null; an event's fields stand behind those that every line has."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run
        self.round: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        event: Event = getattr(record, "event", {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname, "logger": record.name, "message": record.getMessage(),
            "run": self.run, "round": event.get("round", self.round), "client": event.get("client"),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        fields = {name: value for name, value in event.items() if name not in line}
        return to_json({**line, **fields}, inf_nan_mode="null", fallback=str).decode()


@contextmanager
def opened(given: Observe, path: Path) -> Iterator[Watch]:
    """Loggers' levels stay as they are. What the clients of this process log of their failures is left out: it may quote
    their texts, which a server elsewhere would not have."""
    assert given.log is not None
    with ExitStack() as stack:
        stream = sys.__stderr__  # not through a display
        if given.log != "stderr":
            Path(given.log).parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(Path(given.log).open("a", encoding="utf-8"))
        handler, lines, here = logging.StreamHandler(stream), Lines(path.name), os.getpid()
        handler.setFormatter(lines)
        # A forked worker's records come to this process, which writes them.
        handler.addFilter(lambda record: record.name != "fedrank.client" and os.getpid() == here)
        logging.getLogger("fedrank").addHandler(handler)
        stack.callback(logging.getLogger("fedrank").removeHandler, handler)

        def put(level: int, message: str, event: Event) -> None:
            fields = {"levelno": level, "levelname": logging.getLevelName(level), "msg": message, "event": event}
            record = logging.makeLogRecord({"name": "fedrank.run", **fields})
            handler.stream.write(f"{lines.format(record)}\n")  # `handle` would keep its errors
            handler.flush()

        def watch(event: Event) -> None:
            lines.round = event.get("round", lines.round)
            put(logging.WARNING if "error" in event else logging.INFO, said(event), event)

        try:
            yield watch
        except Exception as error:
            put(logging.ERROR, f"the run failed: {type(error).__name__}: {error}", {"event": "failed"})
            raise
        except BaseException:  # Ctrl-C, or Flower's end of a server app that is stopped
            put(logging.WARNING, "the run was stopped", {"event": "stopped"})
            raise


def said(event: Event) -> str:
    """An event in words."""
    match event:
        case {"event": "start"}:
            return "the run starts"
        case {"event": "resume", "round": at}:
            return f"the run goes on after round {at}"
        case {"event": "cohort", "round": at, "rounds": count, "clients": clients}:
            return f"round {at} of {count}: {len(clients)} clients are asked"
        case {"client": client, "error": error}:
            return f"client {client} failed: {error}"
        case {"event": "client", "client": client}:
            return f"client {client} answered"
        case {"event": "round", "round": at, "rounds": count, "clients_ok": int(ok), "clients_failed": int(failed)}:
            return f"round {at} of {count} is played: {ok} of {ok + failed} clients answered"
        case {"event": "round", "round": at, "rounds": count}:
            return f"round {at} of {count} is played"
        case {"event": "end", "rounds": count}:
            return f"the run has ended after {count} rounds"
    return str(event["event"])
