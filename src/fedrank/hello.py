"""The two frames before a site's first round: what the server tells it of the run, and what it tells of itself."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

import fedrank
from fedrank import config as settings
from fedrank import increments
from fedrank.adapter import Adapter, below, from_arrays, to_arrays
from fedrank.config import Config
from fedrank.frame import OLDEST, SCHEMA, Refused, pack, printable, spoken, unpack
from fedrank.protocol import Device, Load
from fedrank.store import CLIENT

RUN = 16  # hexadecimal digits
UNKNOWN = "this site has not been told of the run"
_TOLD = ("task", "rounds", "local", "adapter", "method", "wire", "server", "privacy", "generation", "seed")
_ENGINE = ("kind", "threads", "compute", "products", "timing", "stack", "offload")
_COUNTS = ("examples", *(f"load.{field.name}" for field in fields(Load)))


@dataclass(frozen=True, eq=False)
class Setup:
    """A run, to a site.

    config: the run's, resolved, less where the server's own data and model are. labels: the class names. fingerprint: of
    the base model. start: a hash of the adapter that the run starts from; imported: that adapter, where it is not as the
    method makes it. schema: the newest that the server speaks; once read, that both ends do. version: the server's
    fedrank; None before schema 2.
    """

    run: str
    config: Mapping[str, Any]
    labels: tuple[str, ...]
    fingerprint: str
    start: str
    imported: Adapter | None = None
    schema: int = SCHEMA
    version: str | None = fedrank.__version__


@dataclass(frozen=True, eq=False)
class Registration:
    """A site, to the server. schema: the newest that both ends speak."""

    run: str
    device: Device
    fingerprint: str
    numerics: Mapping[str, Any]
    schema: int = SCHEMA

    @property
    def version(self) -> str:
        """The site's fedrank."""
        return printable(f"{self.numerics.get('fedrank')!s:.40}")


def write_setup(setup: Setup) -> bytes:
    """It goes to sites of every schema, which read what they know of it, and answer in the newest that they share."""
    imported = setup.imported
    meta = {
        "schema": OLDEST, "kind": "setup", "run": setup.run, "config": dict(setup.config), "labels": list(setup.labels),
        "fingerprint": setup.fingerprint, "start": setup.start, "scale": None if imported is None else imported.scale,
    }  # fmt: skip
    if setup.schema >= 2:
        meta |= {"newest": setup.schema, "version": setup.version}
    return pack(meta, {} if imported is None else to_arrays(imported))


def read_setup(frame: bytes) -> Setup:
    """Refused where it is none."""
    meta, tensors = unpack(frame)
    match meta:
        case {
            "kind": "setup", "run": str(run), "config": dict(config), "labels": [*labels], "fingerprint": str(fingerprint),
            "start": str(start), "scale": None | float() as scale,
        } if _is_run(run) and all(type(label) is str for label in labels):  # fmt: skip
            imported = None if scale is None else _start(tensors, scale)
            version = meta.get("version")
            if not (version is None or (type(version) is str and len(version) <= 40)):
                raise Refused(f"a version is a short text, got {version!r}")
            return Setup(run, config, tuple(labels), fingerprint, start, imported, spoken(meta), version)
    raise Refused("not the setup of a run")


def write_registration(registration: Registration) -> bytes:
    device = asdict(registration.device)
    meta = {
        "schema": registration.schema, "kind": "registration", "run": registration.run, "device": device,
        "fingerprint": registration.fingerprint, "numerics": dict(registration.numerics),
    }  # fmt: skip
    return pack(meta, {})


def read_registration(frame: bytes, run: str) -> Registration:
    """Refused where it is none, of another run, or says of a device what none can be."""
    meta, tensors = unpack(frame)
    match meta:
        case {
            "kind": "registration", "run": str(of), "device": dict(device), "fingerprint": str(fingerprint),
            "numerics": dict(numerics),
        } if of == run and not tensors:  # fmt: skip
            return Registration(of, _device(device), fingerprint, numerics, spoken(meta))
    raise Refused("not a registration for this run")


def told(config: Config) -> dict[str, Any]:
    """What a site is told of the config: nothing of where the server's data and model are.

    But for device and engine, and a private run's clients, only what is not as by default: an older fedrank refuses keys
    that it does not know.
    """
    raw, own = config.model_dump(mode="json"), config.model_dump(mode="json", exclude_defaults=True)
    name = raw["model"]["name"]
    local = name not in settings.OWN_MODELS and Path(name).is_dir()
    return {key: own[key] for key in _TOLD if key in own} | {
        "device": raw["device"],
        "model": own.get("model", {}) | {"name": "" if local else name, "trust_remote_code": False},
        "data": {"instructions": own.get("data", {}).get("instructions", {})},
        "engine": {key: raw["engine"][key] for key in _ENGINE},
        **({} if config.privacy.kind == "none" else {"clients": raw["clients"]}),
    }


def kind(frame: bytes) -> tuple[str, str]:
    """The kind of a checked frame, and the run that it belongs to; Refused where it names none."""
    meta, _ = unpack(frame)
    found, run = meta.get("kind"), meta.get("run")
    if type(found) is not str or type(run) is not str or not _is_run(run):
        raise Refused(f"a frame of kind {found!r} of run {run!r}")
    return found, run


def versions(theirs: str | None) -> str:
    """What a refusal adds where the two ends' fedranks differ."""
    ours = fedrank.__version__
    return "" if theirs == ours else f"; fedrank {ours} here, {theirs or 'an older one'} there"


def begun(adapter: Adapter) -> str:
    """A hash of an adapter, by which both ends know that they start from the same."""
    return increments.digest((adapter,))


def _is_run(run: str) -> bool:
    """It becomes a folder's name."""
    return len(run) == RUN and set(run) <= set("0123456789abcdef")


def _start(tensors: Mapping[str, np.ndarray], scale: float) -> Adapter:
    """The adapter that a run starts from; Refused where it is none: those who use one count on its shapes and types."""
    ranks = {name: ids.size for name, ids in below("ids/", tensors).items()}
    for name, array in tensors.items():
        part, _, module = name.partition("/")
        rank = ranks.get(module)
        asked = {"ids": (rank,), "B": (*array.shape[:1], rank), "e": (rank,), "A": (rank, *array.shape[-1:])}
        if array.shape != asked.get(part, array.shape) or array.dtype.kind != ("i" if part == "ids" else "f"):
            raise Refused(f"not an adapter to start from: tensor {name!r} is {array.dtype}{list(array.shape)}")
    try:
        found = from_arrays(tensors, scale)
    except ValueError as error:
        raise Refused(f"not an adapter to start from: {error}") from None
    if not math.isfinite(scale) or any(block.B is None or block.A is None for block in found.blocks.values()):
        raise Refused(f"not an adapter to start from: of scale {scale!r}, or a module without B or A")
    return found


def _device(record: dict[str, Any]) -> Device:
    load = record.get("load")
    if not isinstance(load, dict) or load.keys() != {field.name for field in fields(Load)}:
        raise Refused("a device must say what load it expects")
    if record.keys() != {field.name for field in fields(Device)}:
        raise Refused(f"a device is told by other fields than {sorted(map(str, record))[:20]}")
    flat = {**record, **{f"load.{name}": value for name, value in load.items()}}
    for name in _COUNTS:
        if type(flat[name]) is not int or not 0 <= flat[name] < 1 << 53:
            raise Refused(f"a device's {name} must be a whole number from 0 on, got {flat[name]!r}")
    rates = [field.name for field in fields(Device) if field.type is float]
    for name in rates:
        if type(flat[name]) is not float or not 0 <= flat[name] < math.inf:
            raise Refused(f"a device's {name} must be a finite number of at least 0, got {flat[name]!r}")
    rank, named = record["rank"], (record["id"], record["kind"])
    if not (rank is None or (type(rank) is int and rank > 0)) or not all(type(word) is str for word in named):
        raise Refused(f"a device of id and kind {named!r} and rank {rank!r}")
    kind = record["kind"]
    if not CLIENT.fullmatch(record["id"]) or len(kind) > 64 or kind != printable(kind) or not record["examples"]:
        raise Refused(f"a device of id and kind {named!r} with {record['examples']} examples")
    return Device(**{**record, "load": Load(**load)})
