"""A run that Flower plays: handed to a SuperLink as a Flower app, and followed from here."""

import importlib.util
import json
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Listener
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fedrank
from fedrank import config as settings
from fedrank import resolve
from fedrank.config import Config, ConfigError
from fedrank.ledger import Event
from fedrank.store import Store, StoreError

APP = Path("fedrank_app", "app.py")
NAME = "fedrank"  # of the connection in Flower's own config
# Of what a resumed run may change, what is a place on this machine.
PATHS = ("data.path", "model.name", "engine.root_certificate", "engine.fleet.csv", "observe.log", "observe.tensorboard",
         "observe.mlflow")  # fmt: skip
LOOK = 10.0  # seconds between looks at a run that has not been heard of
UP, DOWN = 60.0, 10.0  # seconds in which a SuperLink of one's own is up, and has ended with all that it started
STOPPED = 60.0  # seconds in which a server has ended that was stopped: it asks for that about every 20
POLL = {
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"
}  # seconds, of 1 by default, that every message waits for; less costs a core
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class RemoteError(ValueError):
    """A run that Flower did not take, or that ended there: what it said."""


class RunError(RuntimeError):
    """A run that ended there before it was over; to go on with it is to resume it."""


def mistaken(error: BaseException | None) -> bool:
    """Whether it is a mistake in what was asked, as far as one can tell before a run has begun."""
    ours = isinstance(error, ValueError | StoreError) and type(error).__module__.startswith("fedrank")
    return ours or isinstance(error, OSError | ImportError)


def start(config: Config, path: Path, imported: Path | None = None) -> Iterator[Event]:
    """Play a new run on the SuperLink that the config names, in this directory; the SuperLink must be able to reach it.

    imported: the folder of a PEFT adapter to start from, which it must be able to reach too.
    """
    resolved, _ = resolve.resolve(config)
    Store.create(path)
    yield from _play(resolved, path, {"overrides": "[]", "imported": str(imported.absolute()) if imported else ""})


def go_on(config: Config, path: Path, overrides: Iterable[str]) -> Iterator[Event]:
    """Go on with a run there, by overrides whose paths are from where one stands."""
    resolved, _ = resolve.resolve(config)

    def whole(item: str) -> str:
        key = item.partition("=")[0]
        return f"{key}={json.dumps(attrgetter(key)(resolved))}" if key in PATHS else item

    yield from _play(config, path, {"overrides": json.dumps([whole(item) for item in overrides])})


def write_app(folder: Path, told: Mapping[str, Any]) -> None:
    """The Flower app of a run: its components are fedrank's own. told: its settings."""
    (folder / APP).parent.mkdir(parents=True, exist_ok=True)
    (folder / APP.parent / "__init__.py").write_text('"""fedrank, as a Flower app."""\n')
    (folder / APP).write_text(
        '"""The components of the app, which are fedrank\'s."""\n\nfrom fedrank import apps\n\n'
        "server = apps.server\nclient = apps.client\n"
    )
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items())
    (folder / "pyproject.toml").write_text(
        "[build-system]\n"
        'requires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n'
        "[project]\n"
        f'name = "fedrank-app"\nversion = "{fedrank.__version__}"\n'
        'description = "A federated run of fedrank"\nlicense = "Apache-2.0"\n'
        "# fedrank itself is installed beside Flower: runtime dependency installation has to be off\n"
        "dependencies = []\n\n"
        "[tool.hatch.build.targets.wheel]\n"
        'packages = ["fedrank_app"]\n\n'
        '[tool.flwr.app]\npublisher = "fedrank"\n\n'
        "[tool.flwr.app.components]\n"
        'serverapp = "fedrank_app.app:server"\nclientapp = "fedrank_app.app:client"\n\n'
        f"[tool.flwr.app.config]\n{lines}"
    )


def write_connection(home: Path, address: str, certificate: Path | None) -> None:
    """Flower's own config in its home: how the SuperLink is reached, in plain text where there is no certificate."""
    how = "insecure = true" if certificate is None else f"root-certificates = {json.dumps(str(certificate.absolute()))}"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = {json.dumps(address)}\n{how}\n'
    )


def check() -> None:
    """ConfigError where Flower is not there."""
    if importlib.util.find_spec("flwr") is None:
        raise ConfigError("engine.kind: it needs flwr; pip install 'fedrank[flower]'")


def tool(name: str) -> str:
    """One of Flower's programs: that of this Python."""
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not there; pip install 'fedrank[flower]'")
    return found


def environment(home: Path) -> dict[str, str]:
    """Flower's programs find each other on the path; what they keep is in this home."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **QUIET, **POLL, "PATH": path, "FLWR_HOME": str(home)}


def _play(config: Config, path: Path, told: dict[str, Any]) -> Iterator[Event]:
    check()
    engine = config.engine
    with TemporaryDirectory(prefix="fedrank-") as folder:
        place = Path(folder)
        home = place / "home"
        (place / "config.yaml").write_text(settings.dump(config))
        told |= {
            "out": str(path.absolute()), "config": str(place / "config.yaml"), "watch": str(place / "watch"),
            "simulation": engine.kind == "flower-simulation",
        }  # fmt: skip
        write_app(place / "app", told)
        certificate = None if engine.root_certificate is None else Path(engine.root_certificate)
        if engine.kind == "flower":
            if certificate is not None and not certificate.is_file():
                raise ConfigError(f"engine.root_certificate: no file {str(certificate)!r}")
            if not engine.insecure and certificate is None:
                raise ConfigError(
                    "engine.root_certificate: a file with the certificate of the CA that signed the SuperLink's; or "
                    "engine.insecure=true, for plain text"
                )
            write_connection(home, engine.superlink, certificate)
            yield from _follow(place, path)
            return
        with _superlink(home, path) as address:
            write_connection(home, address, None)
            nodes = f"num-supernodes={config.rounds.cohort} client-resources-num-cpus={engine.threads}"
            yield from _follow(place, path, ["--federation-config", nodes])


def _follow(place: Path, path: Path, own: Sequence[str] = ()) -> Iterator[Event]:
    """Submit the app, and yield what its server tells until it ends.

    own: what a SuperLink of one's own is told besides; a run that is left ends with it.
    """
    heard = queue.Queue[Event | None]()
    with Listener(str(place / "watch"), "AF_UNIX") as listener:
        listening = threading.Thread(target=_listen, args=(listener, heard), daemon=True)
        listening.start()
        run = _flwr(place / "home", "run", str(place / "app"), NAME, *own)["run-id"]
        ended, early = False, True  # until it is heard of, it may have ended without a word
        try:
            while (event := _next(heard, place / "home", str(run) if early else None)) is not None:
                early = False
                if event["event"] == "log":
                    logging.getLogger(event["logger"]).log(event["level"], "%s", event["text"])
                    continue
                if event["event"] == "error":
                    ended = True
                    raise (RemoteError if event["mistake"] else RunError)(str(event["error"]))
                ended = ended or event["event"] == "end"
                yield event
            if not ended:
                raise RunError(f"the server app ended before the run did; fedrank resume {path}")
        finally:
            if not ended and not own:
                with suppress(RemoteError):
                    _flwr(place / "home", "stop", str(run), NAME)
            if not early and not own:  # once the server has ended its directory is free
                listening.join(STOPPED)


def _listen(listener: Listener, heard: "queue.Queue[Event | None]") -> None:
    with suppress(OSError, EOFError), listener.accept() as line:
        while True:
            heard.put(json.loads(line.recv_bytes()))
    heard.put(None)


def _next(heard: "queue.Queue[Event | None]", home: Path, run: str | None) -> Event | None:
    """The next event, None where the server is gone. run: it is looked whether that has ended, while nothing is heard."""
    while True:
        try:
            return heard.get(timeout=LOOK)
        except queue.Empty:
            if run is None:
                continue
            (found,) = _flwr(home, "list", NAME, "--run-id", run)["runs"]
            if str(found["status"]).startswith("finished") and heard.empty():
                raise RemoteError(
                    f"Flower ended the run before its server was heard of ({found['status']}): {found.get('details') or ''}"
                ) from None


def _flwr(home: Path, *words: str) -> dict[str, Any]:
    """What one of the `flwr` commands says as JSON; RemoteError with its words where it failed."""
    done = subprocess.run(
        [tool("flwr"), *words, "--format", "json"], env=environment(home), stdin=subprocess.DEVNULL, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    begin = done.stdout.find("{")
    try:
        said = json.loads(done.stdout[begin:]) if begin >= 0 else {}
    except ValueError:
        said = {}
    if done.returncode or not said.get("success", bool(said)):
        words_ = " ".join(str(said.get("error-message") or done.stdout).split())
        hint = ""
        if "404 Not Found" in words_:  # what the SuperLink itself does not know, Flower says in words
            hint = "; is engine.superlink the gate? the SuperLink listens at the port after it, on the server's machine alone"
        raise RemoteError(f"flwr {words[0]}: {words_[-1000:]}{hint}")
    return dict(said)


@contextmanager
def _superlink(home: Path, path: Path) -> Iterator[str]:
    """A SuperLink of one's own for a simulation, on a free port of this machine; it goes with all that it started."""
    home.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--simulation", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port)]
    with (path / "flower.log").open("ab") as log:
        process = subprocess.Popen(
            [tool("flower-superlink"), *words], env=environment(home), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + UP
        while not _open(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RemoteError(f"Flower's SuperLink does not come up; see {path / 'flower.log'}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        groups = _groups(process.pid)
        for end in (signal.SIGTERM, signal.SIGKILL):
            _signal(groups, end)
            until = time.monotonic() + DOWN
            while _signal(groups, 0) and time.monotonic() < until:
                process.poll()  # else it stays, as a zombie
                time.sleep(0.1)


def _groups(program: int) -> set[int]:
    """The process groups of a program and of what it started: Flower puts that in one of its own, Ray beside it."""
    found = {program}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            _, parent, group, *_ = path.read_text().rpartition(")")[2].split()
            if int(parent) == program:
                found.add(int(group))
    return found


def _signal(groups: Iterable[int], number: int) -> bool:
    """Signal these process groups, with 0 nothing; whether any is there."""
    there = False
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, number)
            there = True
    return there


def _open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
