"""A site: one file that says what a client has, and what it makes of the frames that come to it."""

import gc
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from fedrank import client, cost, hello, machine, resolve
from fedrank import config as settings
from fedrank.config import Columns, ConfigError, Positive
from fedrank.devices import PRESETS
from fedrank.fleet import NOMINAL, NUMBERS
from fedrank.frame import Refused
from fedrank.hello import Registration, Setup
from fedrank.protocol import Device, Load, Plan
from fedrank.store import CLIENT, Private, write
from fedrank.training.data import ClientData
from fedrank.training.sources import from_path
from fedrank.wire import Wire

log = logging.getLogger(__name__)
SOCKET_BYTES = 103  # of its path: macOS's limit, which is lower than Linux's
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rows(BaseModel, extra="forbid", frozen=True):
    """path: a file, or a folder whose train.* is read. columns: what they are called there."""

    path: Path
    columns: Columns = Columns()


class Hardware(BaseModel, extra="forbid", frozen=True):
    """The device that a site registers: a preset's kind, of which it may say single figures otherwise; or its own.

    rank: the largest LoRA rank that it can train, the adapter's where null.
    """

    kind: str = ""
    rank: Positive | None = None
    gigaflops_per_second: Rate | None = None
    memory_gigabytes: Rate | None = None
    up_megabits_per_second: Rate | None = None
    down_megabits_per_second: Rate | None = None
    idle_watts: Rate | None = None
    busy_watts: Rate | None = None

    def device(self) -> Device:
        """Without settings it is the nominal one, of no rank of its own and of unlimited memory, as in a simulation."""
        told = {place: getattr(self, name) * unit for name, (place, unit) in NUMBERS.items() if getattr(self, name)}
        if not self.kind and not told:
            return replace(PRESETS[NOMINAL], rank=self.rank, memory_bytes=0.0)
        if self.kind not in PRESETS and (missing := [name for name in NUMBERS if not getattr(self, name)]):
            near = settings.hint(self.kind, PRESETS)
            raise ConfigError(
                f"hardware.{missing[0]}: {self.kind!r} is no preset{near}, so its figures have to be given "
                f"(presets: {', '.join(PRESETS)})"
            )
        base = PRESETS.get(self.kind, Device("", 0, self.kind))
        return replace(base, rank=self.rank or base.rank, **told)


class SiteFile(BaseModel, extra="forbid", frozen=True):
    """client: its id in every run. model: a folder or a hub name; the run's where null. device: where it trains.

    hardware: what it registers. store: where its private state, and what it was told of each run, are kept.
    trust_remote_code: of its model; a server cannot ask for it. local_noise: the least noise multiplier of local privacy
    with which it takes part, of its changes and its votes; in any run where null.
    """

    client: Annotated[str, Field(pattern=f"^{CLIENT.pattern}$")]
    data: Rows
    store: Path
    model: str | None = None
    device: str = "cpu"
    hardware: Hardware = Hardware()
    trust_remote_code: bool = False
    local_noise: Rate | None = None

    @property
    def socket(self) -> Path:
        """Where its resident worker listens."""
        return self.store / "site.sock"

    def records(self) -> Iterable[Mapping[str, Any]]:
        """Its rows; DataError says what is wrong with them."""
        source = from_path(self.data.path, needed=("train",))
        _, rows = source.splits.get("all") or source.splits["train"]
        return (row for _, row in rows)


def read(path: str | Path) -> SiteFile:
    """A site's file; ConfigError names the key of a mistake. Paths in it are from where it stands."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"no site file {str(path)!r}")
    try:
        raw = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a site file is a mapping of keys, this is {type(raw).__name__}")
    try:
        found = SiteFile.model_validate(raw)
        found.hardware.device()
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {settings.explain(e, known=SiteFile)}" for e in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

    def whole(given: Path) -> Path:
        return (path.parent / given.expanduser()).absolute()

    model = found.model
    if model is not None and whole(Path(model)).is_dir():
        model = str(whole(Path(model)))
    data = found.data.model_copy(update={"path": whole(found.data.path)})
    found = found.model_copy(update={"data": data, "store": whole(found.store), "model": model})
    if (size := len(os.fsencode(found.socket))) > SOCKET_BYTES:
        raise ConfigError(f"{path}: store: {found.socket} has {size} bytes, and a socket's path at most {SOCKET_BYTES}")
    return found


def together(files: Iterable[str | Path], labels: tuple[str, ...] = ()) -> ClientData:
    """These sites as the clients of a run on this machine: `fedrank.run(..., data=...)`, a rehearsal of the real one."""
    sites = sorted(map(read, files), key=lambda site: site.client)
    if len({site.data.columns for site in sites}) > 1:
        raise ConfigError("on one machine all sites' columns have the same names, those of data.columns in the config")
    return ClientData(
        "sites", len(sites), lambda at: sites[at].records(), labels=labels, names=tuple(site.client for site in sites)
    )


# ---- what a run is, here


@dataclass(frozen=True, eq=False)
class Session:
    """A run, as one site takes part in it. device: as it is registered. answered: its last request, by a hash of it, and
    the answer."""

    site: client.Site
    device: Device
    registration: bytes
    answered: dict[bytes, bytes] = field(default_factory=dict)


class Mismatch(ValueError):
    """A site that cannot take part in a run; the server may read why."""


def open_session(file: SiteFile, setup: Setup) -> Session:
    """Load the model and the rows, and put together what answers this run's requests."""
    config, method = resolve.resolve(joined(file, setup))
    machine.start(config)
    from fedrank.training import clients

    data = ClientData(file.client, 1, lambda at: file.records(), labels=setup.labels, names=(file.client,))
    made = machine.build(config, method, setup.labels, partial(clients.own, config, data), prefixes=False)
    if made.spec.fingerprint != setup.fingerprint:
        raise Mismatch(
            f"the base model here is {made.spec.fingerprint}, the run's is {setup.fingerprint}; give the site the same "
            "files (model: in its site file)"
        )
    mine = made.held(file.client)
    if not len(mine.train):
        raise Mismatch("no rows are left to train on")
    device = made.registered(replace(file.hardware.device(), id=file.client, examples=len(mine.train)))
    begin, plan, _ = resolve.first(config, method, made.spec, {file.client: device})
    start = begin.adapter if setup.imported is None else setup.imported
    if start.shapes != begin.adapter.shapes or hello.begun(start) != setup.start:
        raise Mismatch("the adapter here does not start as the run's does; are both fedranks of one version?")
    made = made.counted(plan, begin, device)
    wire = Wire(made.spec, start, config.wire.dtype, setup.run, config.seed, made.numerics)

    def costs(round: int, plan: Plan, bytes_down: int) -> cost.Cost:
        up = cost.most_up(made.spec, start, plan, config.wire.dtype).frame
        return cost.predict(made.spec, start, plan, made.load(file.client, round), device, bytes_down, up)

    site = made.site(device, wire, Private(_folder(file, setup.run) / "private"), costs)
    if config.privacy.kind == "local":  # how many rows there are, and how long, would leave this place without noise
        device = replace(device, examples=1, load=Load(0, 0, 0, 0, 0))
    registration = Registration(setup.run, device, made.spec.fingerprint, made.numerics, setup.schema)
    return Session(site, device, hello.write_registration(registration))


def joined(file: SiteFile, setup: Setup) -> settings.Config:
    """The run's config, on this site's rows and model: nothing of where these are is the server's to say.

    Mismatch where the site cannot take part, or will not.
    """
    told = dict(setup.config)
    model = {**told.get("model", {}), "trust_remote_code": file.trust_remote_code}
    if file.model is not None:
        model["name"] = file.model
    elif not model.get("name"):
        raise Mismatch("the run's base model has no name that holds everywhere; name it in the site file (model:)")
    data = {"path": str(file.data.path), "columns": file.data.columns.model_dump()}
    data["instructions"] = told.get("data", {}).get("instructions", {})
    engine = {**told.get("engine", {}), "workers": 1}
    if file.device != told.get("device"):  # it has other kernels
        engine |= {"compute": "auto", "products": "auto"}
    config = settings.load({**told, "model": model, "data": data, "device": file.device, "engine": engine})
    _insist(file, config.privacy)
    return config


def _insist(file: SiteFile, privacy: settings.PrivacySettings) -> None:
    """Mismatch where a run protects this site by less than its file asks for."""
    noises = [noise for noise in (privacy.noise, privacy.votes_noise) if noise is not None]
    if file.local_noise is not None and (privacy.kind != "local" or min(noises, default=0.0) < file.local_noise):
        raise Mismatch(
            f"it takes part in runs with privacy.kind=local and noise of {file.local_noise:g} or more alone; this one has "
            f"privacy.kind={privacy.kind}" + "".join(f", {noise:g}" for noise in noises)
        )


def _folder(file: SiteFile, run: str) -> Path:
    return file.store / run


@dataclass(frozen=True)
class Desk:
    """A site at work: it keeps the run that it was last asked of."""

    file: SiteFile
    sessions: dict[str, Session] = field(default_factory=dict)

    def answer(self, frame: bytes) -> bytes:
        """The answer to a frame: to a setup, its registration; to a request, what `client.handle` says.

        Refused where there is none to be given: the text may go to the server, and says nothing of where things are.
        """
        kind, run = hello.kind(frame)
        kept, registered = (_folder(self.file, run) / f"{name}.frame" for name in ("setup", "registration"))
        if kind == "setup":
            setup = hello.read_setup(frame)
            if run in self.sessions and kept.exists() and kept.read_bytes() == frame:  # its server has started anew
                write(registered, self.sessions[run].registration)
                return self.sessions[run].registration
            session = self._open(setup)
            self.file.store.mkdir(parents=True, exist_ok=True, mode=0o700)
            write(kept, frame)  # it is there when a fresh process is asked
            write(registered, session.registration)
            return session.registration
        if not kept.exists() or not registered.exists():
            raise Refused(hello.UNKNOWN)
        session = self.sessions.get(run) or self._open(hello.read_setup(kept.read_bytes()))
        if session.device != hello.read_registration(registered.read_bytes(), run).device:  # rows came, or went
            raise Refused(hello.UNKNOWN)
        asked = hashlib.blake2b(frame).digest()
        if asked not in session.answered:  # a carrier may ask again, whose process died over the answer
            reply = client.handle(frame, session.site)
            session.answered.clear()
            session.answered[asked] = reply
        return session.answered[asked]

    def _open(self, setup: Setup) -> Session:
        try:
            joined(self.file, setup)  # what refuses a run by its config keeps the model that is loaded
            if self.sessions:  # one model at a time
                self.sessions.clear()
                gc.collect()
            session = open_session(self.file, setup)
        except Mismatch as error:
            raise Refused(f"client {self.file.client}: {error}{hello.versions(setup.version)}") from None
        except Exception as error:  # what the server has no business to read: paths, rows
            known = isinstance(error, ValueError | OSError | ImportError)
            log.error("the run cannot be joined: %s: %s", type(error).__name__, error, exc_info=not known)
            raise Refused(
                f"client {self.file.client}: {type(error).__name__}: what is wrong is said in the site's own log"
                f"{hello.versions(setup.version)}"
            ) from error
        self.sessions[setup.run] = session
        return session
