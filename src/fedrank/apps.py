"""The two components of a Flower app: a run's server, and what answers for a client."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from fedrank import central, experiment, remote, resident, sites
from fedrank import config as settings
from fedrank.client import Late, handle
from fedrank.engines import flower
from fedrank.engines.workers import quieten
from fedrank.frame import Refused
from fedrank.ledger import Event
from fedrank.store import Store
from fedrank.wire import Wire

log = logging.getLogger(__name__)
quieten()


def _play(grid: flower.Grid, told: Mapping[str, Any]) -> None:
    """Begin a run, or go on with it, in the directory that the settings name: `flwr run` again resumes."""
    out = Path(str(told["out"]))
    prepare = partial(central.prepare, grid=grid)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")  # `flwr log` shows it
    logging.getLogger("fedrank").setLevel(logging.INFO)
    begun = False
    with _listener(str(told.get("watch", ""))) as tell:
        logging.getLogger("fedrank").addHandler(_Told(tell))
        try:
            if (out / "config.yaml").exists():
                events = experiment.go_on(out, json.loads(str(told.get("overrides") or "[]")), by=prepare)
            else:
                imported = Path(str(told["imported"])) if told.get("imported") else None
                events = experiment.start(settings.load(str(told["config"])), out, imported=imported, by=prepare)
            for event in events:
                begun = True
                tell(event)
        except Exception as error:
            mistake = remote.mistaken(error) and not (begun and isinstance(error, OSError | ImportError))  # a full disk
            tell({"event": "error", "mistake": mistake, "error": f"{error}" or type(error).__name__})
            raise


class _Told(logging.Handler):
    """Warnings reach who follows the run: the log of a server app is on another machine's disk."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell({"event": "log", "level": record.levelno, "logger": record.name, "text": record.getMessage()})


@contextmanager
def _listener(address: str) -> Iterator[Callable[[Event], None]]:
    """Who started the run and follows it; the run does not hang on it."""
    if not address:
        yield lambda event: log.info("%s", json.dumps(event))
        return
    with Client(address, "AF_UNIX") as line:

        def tell(event: Event) -> None:
            try:
                line.send_bytes(json.dumps(event).encode())
            except OSError:
                log.info("%s", json.dumps(event))

        yield tell


def _answer(frame: bytes, told: Mapping[str, Any], node: Mapping[str, Any], seconds: float | None) -> bytes | None:
    if told.get("simulation") and "site" not in node:  # a site is none of this machine's clients, whatever a run says
        return _simulated(str(told["out"])).answer(frame, seconds)
    if "site" not in node:
        raise Refused("this SuperNode names no site file: --node-config 'site=\"/path/to/site.yaml\"'")
    try:
        return resident.ask(sites.read(str(node["site"])), frame)
    except Refused:
        raise
    except Exception as error:  # Flower would send its text, in which paths may be
        log.exception("a frame could not be answered")
        raise Refused(f"{type(error).__name__}: what is wrong is said in the site's own log") from None


class _Everyone:
    """Every client of a simulated run, in a process of Flower's simulation runtime."""

    def __init__(self, out: Path) -> None:
        from fedrank.parts import prepare

        self.store = Store.open(out)
        self.parts = prepare(settings.load(out / "config.yaml"))
        config, start = self.parts.config, self.store.state(0)[0].adapter
        self.wire = Wire(self.parts.spec, start, config.wire.dtype, self.parts.run_id, config.seed, self.parts.numerics)

    def answer(self, frame: bytes, seconds: float | None) -> bytes | None:
        name = self.wire.open_request(frame).client
        try:
            return handle(frame, self.parts.site(name, self.wire, self.store), seconds)
        except Late:
            return None


_simulated = cache(lambda out: _Everyone(Path(out)))
server = flower.server_app(_play)
client = flower.client_app(_answer)
