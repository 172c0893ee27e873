"""The run directory: config, states, spooled updates and the clients' private state; killed anywhere, it resumes."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from fedrank import aggregation
from fedrank.adapter import Adapter, below, from_arrays, to_arrays
from fedrank.protocol import ClientId, State, Total, Update
from fedrank.trace import span

KEEP_LAST, KEEP_EVERY = 3, 10
KEY, NAME = "noise.key", "run.id"
RETRIES = 20  # of the lock, a tenth of a second apart
CLIENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class StoreError(Exception):
    """A run directory that is missing, taken, in use or damaged."""


def write(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Beside, to disk, then renamed: the file is the old one or the new one, never half of it.

    One at a time, as a site may be asked by two processes at once: what is beside is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    while True:
        with open(beside, "ab", opener=partial(os.open, mode=mode)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), beside.stat()):
                    continue
            except FileNotFoundError:  # who held it has renamed it
                continue
            file.truncate(0)  # what a kill left
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
            return


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process or thread at a time in this folder; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def secret(path: Path) -> bytes:
    """A key of the system's own entropy: drawn when it is first asked for, and kept for this user's eyes."""
    if not path.exists():
        with _alone(path.parent):
            if not path.exists():  # another process may have drawn it meanwhile
                write(path, os.urandom(32), 0o600)
    return path.read_bytes()


def check_client(client: ClientId) -> None:
    """ValueError where it is no name for a client, as it might lead out of a folder."""
    if not CLIENT.fullmatch(client):
        raise ValueError(
            f"client id {client[:200]!r} must be letters, digits, '_', '-' or '.', not '.' first, at most 128"
        )


def _of(folder: Path, client: ClientId) -> Path:
    """The client's place in a folder."""
    check_client(client)
    return folder / client


def _numbered(folder: Path) -> dict[int, Path]:
    files = folder.glob("*.safetensors") if folder.is_dir() else ()
    return {int(file.stem): file for file in sorted(files) if file.stem.isdigit()}


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: {error}") from None


@dataclass(frozen=True)
class Private:
    """One place for the private state of clients; each version is kept under the round that wrote it."""

    root: Path

    def key(self, client: ClientId) -> bytes:
        """What this client's noise is made of."""
        return secret(_of(self.root, client) / KEY)

    def _base(self, round: int) -> Path:
        return self.root / ".base" / f"{round:04d}.safetensors"  # no client is called so

    def base(self, round: int, scale: float) -> Adapter:
        """The base update of this round, as it came; StoreError where it is gone."""
        if not (path := self._base(round)).exists():
            raise StoreError(f"{path}, an update of the base model that this client was sent, is gone")
        return from_arrays(_load(path), scale)

    def save_base(self, updates: Mapping[int, Adapter]) -> None:
        """Keep base updates as they came; they are the same for every client of this place."""
        if not updates:
            return
        with _alone(self.root):  # the clients of several workers keep their base updates in one folder
            for round, update in updates.items():
                path = self._base(round)
                data = save({n: np.asarray(a, order="C") for n, a in to_arrays(update).items()})
                if not path.exists() or path.read_bytes() != data:
                    write(path, data)
                if update.dense:  # it sums up all before it, and no later request names those
                    for number, old in _numbered(path.parent).items():
                        if number < round:
                            old.unlink()

    def load(self, client: ClientId, since: int) -> dict[str, np.ndarray] | None:
        """The version of round `since`, never a newer one; None where that round left none."""
        path = _of(self.root, client) / f"{since:04d}.safetensors"
        return _load(path) if since >= 0 and path.exists() else None

    def save(self, client: ClientId, round: int, since: int, arrays: Mapping[str, np.ndarray] | None) -> None:
        """Write this round's version, none for None; all before it but `since`, which a redone round needs, are over.

        Later ones stay: a request that comes late, for a round that is over, must not cost the client what it has.
        """
        folder = _of(self.root, client)
        if arrays is not None:
            write(folder / f"{round:04d}.safetensors", save({n: np.asarray(a, order="C") for n, a in arrays.items()}))
        for number, path in _numbered(folder).items():
            if (number < round and number != since) or (number == round and arrays is None):
                path.unlink()


@dataclass(frozen=True)
class Spool:
    """The updates of one round on disk, read one at a time in client order, whatever order they came in."""

    folder: Path
    clients: tuple[ClientId, ...]
    read: Callable[[ClientId, bytes], Update]

    def __len__(self) -> int:
        return len(self.clients)

    def __iter__(self) -> Iterator[tuple[ClientId, Update]]:
        for client in sorted(self.clients):
            yield client, self.read(client, (self.folder / client).read_bytes())

    def total(self, fn: Callable[[Update], Adapter], weight: Callable[[Update], float]) -> Total:
        return aggregation.total((fn(update), weight(update)) for _, update in self)


@dataclass(frozen=True)
class Store:
    """One run's directory."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "Store":
        """A new directory; StoreError where something is in it already, but for a start that was cut short."""
        held = {entry.name.removesuffix(".new") for entry in path.iterdir()} if path.is_dir() else set()
        begun = (path / "config.yaml").exists()
        left = {
            "states",
            "clients",
            "spool",
            ".lock",
            "data.json",
            "drawn.safetensors",
            "config.yaml",
            "flower.log",
            KEY,
            NAME,
        }
        if begun or path.is_file() or held - left:
            hint = f", or go on with: fedrank resume {path}" if begun else ""
            raise StoreError(f"{path} is not an empty folder; choose another --out{hint}")
        for folder in ("states", "clients", "spool"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """An existing run; StoreError says what is missing."""
        if not (path / "config.yaml").is_file():
            raise StoreError(f"{path} is no run directory: it has no config.yaml")
        return cls(path)

    @property
    def key(self) -> bytes:
        """What the server's noise and its private cohorts are made of; no frame, state or config holds it."""
        self._there(KEY)
        return secret(self.path / KEY)

    def _there(self, name: str) -> None:
        """StoreError where a run has been played and this file of it is gone."""
        if not (self.path / name).exists() and max(_numbered(self.path / "states"), default=0):
            raise StoreError(f"{self.path / name} is gone: without it the run cannot go on to the same bits")

    @property
    def name(self) -> str:
        """What no other run directory is called, by which sites know what they keep of this run."""
        self._there(NAME)
        return secret(self.path / NAME).hex()

    @property
    def private(self) -> Private:
        return Private(self.path / "clients")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the lock goes with the process and its workers, so a kill leaves none behind."""
        with (self.path / ".lock").open("w") as file:
            for left in reversed(range(RETRIES)):  # workers end a moment after a process that is killed
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    if not left:
                        raise StoreError(f"{self.path} is in use by another process") from None
                    time.sleep(0.1)
                else:
                    break
            yield

    def write(self, name: str, content: str | bytes) -> None:
        write(self.path / name, content.encode() if isinstance(content, str) else content)

    # ---- states

    @span("saving")
    def save_state(self, state: State, numerics: Mapping[str, Any]) -> None:
        """Commit a round: after this, resume starts here. Keeps the last 3 states and every 10th."""
        tensors = {f"adapter/{name}": array for name, array in to_arrays(state.adapter).items()}
        for round, update in state.base_updates.items():
            tensors |= {f"base/{round}/{name}": array for name, array in to_arrays(update).items()}
        tensors |= {f"arrays/{name}": array for name, array in state.arrays.items()}
        tensors["seen"] = np.frombuffer(json.dumps(dict(state.seen)).encode(), np.uint8)
        meta = {
            "round": state.round, "rounds": state.rounds, "scale": state.adapter.scale, "modules": list(state.adapter.blocks),
            "dense": list(state.adapter.dense), "metrics": dict(state.metrics), "numerics": dict(numerics),
            "base_updates": list(state.base_updates),
        }  # fmt: skip
        data = save({n: np.asarray(t, order="C") for n, t in tensors.items()}, {"fedrank": json.dumps(meta)})
        write(self.path / "states" / f"{state.round:04d}.safetensors", data)
        for number, path in _numbered(self.path / "states").items():
            if number <= state.round - KEEP_LAST and number % KEEP_EVERY:
                path.unlink()

    def state(self, round: int | None = None) -> tuple[State, dict[str, Any]]:
        """The state after `round` rounds (default: the last one saved), and the numerics it was made with."""
        states = _numbered(self.path / "states")
        if not states or round not in {None, *states}:
            have = ", ".join(map(str, states)) or "none"
            raise StoreError(f"{self.path} holds no state of round {'any' if round is None else round}; it has: {have}")
        path = states[max(states) if round is None else round]
        try:
            with safe_open(path, "np") as file:
                meta = json.loads(file.metadata()["fedrank"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = from_arrays(below("adapter/", tensors), meta["scale"])
            blocks = {name: found.blocks[name] for name in meta["modules"]}  # a file has an order of its own
            dense = {name: found.dense[name] for name in meta["dense"]}
            updates = {n: from_arrays(below(f"base/{n}/", tensors), meta["scale"]) for n in meta["base_updates"]}
            state = State(
                meta["round"], meta["rounds"], Adapter(blocks, meta["scale"], dense), arrays=below("arrays/", tensors),
                metrics=meta["metrics"], seen=json.loads(tensors["seen"].tobytes()), base_updates=updates,
            )  # fmt: skip
            return state, meta["numerics"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {error}") from None

    # ---- the spool of the round that is being played

    def clear_spool(self) -> None:
        shutil.rmtree(self.path / "spool", ignore_errors=True)
        (self.path / "spool").mkdir()

    def spool(self, client: ClientId, frame: bytes) -> None:
        _of(self.path / "spool", client).write_bytes(frame)

    def spooled(self, clients: tuple[ClientId, ...], read: Callable[[ClientId, bytes], Update]) -> Spool:
        return Spool(self.path / "spool", clients, read)
