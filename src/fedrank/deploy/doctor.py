"""A site's check before its first run: that all it needs is there, and that a round goes through it."""

import gc
import os
import platform
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from packaging.requirements import Requirement

from fedrank import config as settings
from fedrank import hello, parts, resolve, sites
from fedrank.client import MIN_TEST_ROWS
from fedrank.config import Config, ConfigError
from fedrank.cost import Cost
from fedrank.frame import Refused
from fedrank.hello import Setup
from fedrank.protocol import ClientId, Device, Method, ModelSpec, State
from fedrank.server import Server
from fedrank.sites import Desk, SiteFile
from fedrank.store import Store, StoreError
from fedrank.training.data import Written, class_names, collect, is_id, label_ids
from fedrank.training.sources import numbered
from fedrank.wire import Wire

LEAST_BYTES = 1e9  # of free disk: a few adapters, Flower's log and its copy of the app are far below it
MOST_CLASSES = 10_000  # that a site's ids may stand for
PATIENCE = 10.0  # seconds of a connection
Found = TypeVar("Found")
ONE_STEP = ("local.steps=1", "rounds.cohort=1", "rounds.minimum=1", "rounds.deadline=null", "engine.kind=flower",
            "server.aggregation=mean", "server.hostile=null")  # fmt: skip
NOBODY = "0" * hello.RUN  # the run of a dry frame


@dataclass(frozen=True)
class Finding:
    """One check. text: what was found, or what is wrong and what would be right."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Link:
    """How a SuperLink is reached. address: host:port. certificate: of its CA; None for those that the machine trusts."""

    address: str
    certificate: Path | None
    insecure: bool


def examine(
    path: Path, link: Link | None = None, config: str | None = None, fingerprint: str | None = None
) -> Iterator[Finding]:
    """Every check of the site of this file, as it is made.

    config: of a run, by which the model and the frame are tried; by default a small one, on the task that the rows are
    of. fingerprint: what the base model should have.
    """
    yield _try("versions", _versions)[0]
    finding, file = _try("site", lambda: _site(path))
    yield finding
    if link is not None:
        yield _try("link", lambda: _link(link))[0]
    if file is None:
        return
    if config is None:  # the small run is nobody's, and sends nothing anywhere
        file = file.model_copy(update={"local_noise": None})
    yield _try("disk", lambda: _disk(file))[0]
    finding, run = _try("data", lambda: _data(file, config))
    yield finding
    if run is not None:
        room, free = _try("memory", lambda: ("", _free_bytes(file.device)))  # before anything large is loaded
        finding, made = _try("model", lambda: _model(path, file, run, fingerprint))
        yield finding
        if made is not None:
            yield room if free is None else _try("memory", lambda: _memory(file, made, free))[0]
            yield _try("frame", lambda: _frame(file, run, made))[0]
    yield _try("worker", lambda: _worker(file))[0]


def _try(name: str, check: Callable[[], tuple[str, Found]]) -> tuple[Finding, Found | None]:
    try:
        text, found = check()
    except (ValueError, OSError, ImportError, RuntimeError, StoreError) as error:
        return Finding(name, False, " ".join(str(error).split()) or type(error).__name__), None
    return Finding(name, True, text), found


def _versions() -> tuple[str, None]:
    """That what fedrank asks for on Flower is installed."""
    wrong = []
    for written in metadata.requires("fedrank") or ():
        one = Requirement(written)
        if one.marker is not None and not one.marker.evaluate({"extra": "flower"}):
            continue
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is not installed")
        else:
            if not one.specifier.contains(found, prereleases=True):
                wrong.append(f"{one.name} is {found}, and {one.specifier} is needed")
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}: pip install 'fedrank[flower]'")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("fedrank", "flwr", "torch", "transformers"))
    return f"Python {platform.python_version()}, {shown}", None


def _site(path: Path) -> tuple[str, SiteFile]:
    file = sites.read(path)
    kind = file.hardware.device().kind
    return f"client {file.client} on {file.device}, registered as {kind or 'hardware of its own'}", file


def _link(link: Link) -> tuple[str, None]:
    host, colon, port = link.address.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"--superlink {link.address}: host:port, such as fed.example.org:8000")
    host = host.strip("[]")
    if link.insecure:
        with _connected(host, int(port)) as line:
            _closed(link, line)
        return f"{link.address} answers; in plain text, which anyone on the way can read and change", None
    if link.certificate is not None and not link.certificate.is_file():
        raise ConfigError(f"--root-certificate: no file {str(link.certificate)!r}")
    try:
        context = ssl.create_default_context(cafile=link.certificate)
        with _connected(host, int(port)) as raw, context.wrap_socket(raw, server_hostname=host) as line:
            version, shown = line.version(), line.getpeercert() or {}
            _closed(link, line)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{link.address} is not to be trusted: {error.verify_message}; its certificate has to be signed by the CA of "
            "--root-certificate, and be for this name"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(f"{link.address} does not speak TLS, or the file is no certificate: {error.reason}") from None
    if _plainly(host, int(port)).startswith(b"HTTP/"):
        raise ConfigError(f"{link.address} also answers in plain text; start the SuperLink without --insecure")
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)
    days = (until - datetime.now(UTC)).days
    return f"{version} with {link.address}, whose certificate holds for {days} days; plain text is refused", None


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), PATIENCE)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be reached ({error}); is the SuperLink running, and no firewall between?") from None  # fmt: skip


def _plainly(host: str, port: int) -> bytes:
    """What comes back for a request without TLS."""
    with _connected(host, port) as raw:
        return _health(raw)


def _closed(link: Link, line: socket.socket) -> None:
    """The SuperLink says that it is well, and lets whoever can hear that submit apps; its gate does not."""
    if b" 200 " in _health(line):
        raise ConfigError(
            f"{link.address} is the SuperLink itself: whoever has its certificate can submit apps, whose code sites run; it "
            "should listen on its own machine alone, behind `fedrank deploy gate`"
        )


def _health(line: socket.socket) -> bytes:
    """What comes back when it is asked for, where anything does."""
    try:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return line.recv(16)
    except OSError:
        return b""


def _disk(file: SiteFile) -> tuple[str, None]:
    store = file.store
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (mode := stat.S_IMODE(store.stat().st_mode)) & 0o077:
        raise ConfigError(f"store: others may look into {store} (mode {mode:o}); chmod 700 {store}")
    if not os.access(store, os.W_OK | os.X_OK):
        raise ConfigError(f"store: this user cannot write into {store}")
    free = shutil.disk_usage(store).free
    if free < LEAST_BYTES:
        raise ConfigError(
            f"store: {free / 1e9:.2g} GB are free at {store}; at least {LEAST_BYTES / 1e9:.2g} GB should be"
        )
    return f"{free / 1e9:.3g} GB free at {store}", None


def _data(file: SiteFile, source: str | None) -> tuple[str, Setup | None]:
    """Read every row, as a run will; and the run that is tried on them, of which only the base model is not known.

    None where the small one cannot be: it has no template for chats.
    """
    columns = file.data.columns
    given = None if source is None else settings.load(source, ONE_STEP)
    if given is None:
        first: Mapping[str, Any] = next(iter(file.records()), {})
        written_from = (columns.prompt, columns.instruction, columns.messages)
        instructs = any(column in first for column in written_from)
        classes = columns.text in first and (columns.label in first or not instructs)
        task, form = "classify" if classes else "generate", settings.Instructions()
    else:
        task, form = given.task, given.data.instructions
    place = str(file.data.path)
    found, written = collect(place, numbered(place, file.records()), task, columns.model_dump(), form)
    labels = () if task == "generate" else (() if given is None else given.data.labels) or _classes(written)
    label_ids(written, labels)  # DataError where it is none of the run's classes
    if given is None and found.turns is not None and file.model is None:
        return f"{len(found)} rows of chats; a model for them is tried with --config, or one in the site's file", None
    if given is None:
        model = "tiny-decoder" if task == "generate" else "tiny-encoder"
        raw = {"task": task, "model": {"name": model}, "data": {"labels": labels}}
        given = settings.load(raw, ONE_STEP)
    resolved, _ = resolve.resolve(given)
    told = hello.told(resolved)
    told["engine"]["stack"] = 1
    about = f"{len(labels)} classes" if labels else f"task {task}"
    return f"{len(found)} rows, {about}", Setup(NOBODY, told, tuple(labels), "", "")


def _classes(written: Sequence[Written]) -> tuple[str, ...]:
    """The classes by a site's own rows, which may lack some of the run's: where they are ids, those below the largest, too."""
    ids = [int(label) for _, label in written if is_id(label)]
    if len(ids) == len(written) and max(ids) < MOST_CLASSES:
        return tuple(map(str, range(1 + max(ids))))
    return class_names(written)


@dataclass(frozen=True, eq=False)
class Made:
    """What a server knows before its first round, and what that round costs this site."""

    method: Method
    spec: ModelSpec
    begin: State
    numerics: Mapping[str, Any]
    config: Config
    cost: Cost

    @property
    def wire(self) -> Wire:
        return Wire(self.spec, self.begin.adapter, self.config.wire.dtype, NOBODY, self.config.seed, self.numerics)


def _model(path: Path, file: SiteFile, run: Setup, fingerprint: str | None) -> tuple[str, Made]:
    """Load it as the server would; it is let go again, so that there is never a second one."""
    made = parts.prepare(sites.joined(file, run), data=sites.together((path,), run.labels))
    begin, plan, _ = resolve.first(made.config, made.method, made.spec, made.devices)
    assert made.cost is not None
    wire = Wire(made.spec, begin.adapter, made.config.wire.dtype, NOBODY, made.config.seed, made.numerics)
    down = len(wire.request("train", file.client, plan, begin))
    cost = made.cost(file.client, begin.adapter, 1, plan, down)
    found, name, size = made.spec.fingerprint, made.config.model.name, made.spec.parameters
    if fingerprint is not None and found != fingerprint:
        raise ConfigError(f"model: {name} is {found}, not {fingerprint}; give the site the run's own files")
    return f"{name}, {size / 1e6:.3g} M parameters, fingerprint {found}", Made(made.method, made.spec, begin, made.numerics, made.config, cost)  # fmt: skip


def _memory(file: SiteFile, made: Made, free: int) -> tuple[str, None]:
    needed, where = made.cost.peak_memory_bytes, "memory" if file.device == "cpu" else f"memory of {file.device}"
    said = f"training needs {needed / 1e9:.2g} GB beside the programs' own, and {free / 1e9:.3g} GB of {where} are free"
    if needed > free:
        raise ConfigError(f"{said}; a smaller batch, local.checkpoint, or model.quantise need less")
    if needed > file.hardware.device().memory_bytes > 0:
        raise ConfigError(f"training needs {needed / 1e9:.2g} GB, more than hardware.memory_gigabytes says")
    return said, None


def _free_bytes(device: str) -> int:
    """Of the machine's memory, as Linux says what a new program may take, or of a GPU's."""
    if device != "cpu":
        from fedrank.training.compute import free_bytes

        return free_bytes(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say MemAvailable")


@dataclass(frozen=True, eq=False)
class Alone:
    """The engine of a server whose only client is this desk."""

    device: Device
    desk: Desk

    def fleet(self) -> dict[ClientId, Device]:
        return {self.device.id: self.device}

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterator[tuple[ClientId, bytes | str]]:
        for client, build in requests:
            try:
                yield client, self.desk.answer(build())
            except Refused as error:
                yield client, str(error)


def _frame(file: SiteFile, run: Setup, made: Made) -> tuple[str, None]:
    """One round of one step: the frames that travel, answered by the site and read by a server, here and in a store that goes."""
    gc.collect()  # the model of before
    config, started = made.config, time.perf_counter()
    with TemporaryDirectory(prefix="fedrank-") as place:
        desk = Desk(file.model_copy(update={"store": Path(place) / "site"}))
        setup = Setup(NOBODY, run.config, run.labels, made.spec.fingerprint, hello.begun(made.begin.adapter))
        told = hello.read_registration(desk.answer(hello.write_setup(setup)), NOBODY)
        joined, (session,) = time.perf_counter(), desk.sessions.values()
        store = Store.create(Path(place) / "server")
        server = Server(
            made.method, Alone(told.device, desk), made.wire, store, config.rounds, config.seed, config.adapter.head, None,
            config.server,
        )  # fmt: skip
        rows = [row for row in server.train(made.begin, 0.0, server.cohort(1)) if row["event"] == "client"]
    if not rows:
        return "the method gives a site alone nothing to do in its first round; it could join", None
    (row,) = rows
    if not row["ok"]:
        raise ConfigError(str(row["error"]))
    ended = time.perf_counter()
    loss = f", loss {row['loss']:.3g}" if "loss" in row else ""  # with local privacy it stays at the site
    few = f"; a fifth of the rows is its own test, and it has no score with fewer than {MIN_TEST_ROWS}"
    return (
        f"{row['bytes_down']:,} bytes down, {row['bytes_up']:,} up{loss}; joined in {joined - started:.1f} s, "
        f"answered in {ended - joined:.1f} s{few if session.site.evaluate is None else ''}"
    ), None


def _worker(file: SiteFile) -> tuple[str, None]:
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(file.socket))
        except (FileNotFoundError, ConnectionRefusedError):
            return "not running: without `fedrank site serve` the model is loaded anew for every frame", None
    return f"running, at {file.socket}", None
