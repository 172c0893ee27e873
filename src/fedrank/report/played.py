"""A run directory as a page needs it: whatever of it there is, while it goes on or after it broke off."""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from fedrank import config as settings
from fedrank import fleet
from fedrank.config import Config, ConfigError
from fedrank.ledger import PERSONAL
from fedrank.report.page import Row
from fedrank.store import Store, StoreError
from fedrank.told import finite

One = TypeVar("One")
Read = Callable[[Path], list[Row]]
LINE = 1000  # points of a line
FILES = ("config.yaml", "data.json", "rounds.jsonl", "clients.jsonl", "ranks.jsonl", PERSONAL, "summary.json")


@dataclass(frozen=True)
class Played:
    """What a run directory holds. facts: data.json. summary: empty until it ends. working: whether a process is at it.

    clients, personal: rows of single clients, none where the run protects them: a page may be handed on.
    """

    path: Path
    config: Config
    facts: Row
    rounds: Sequence[Row]
    clients: Sequence[Row]
    ranks: Sequence[Row]
    personal: Sequence[Row]
    summary: Row
    working: bool

    @property
    def private(self) -> bool:
        return self.config.privacy.kind != "none"

    @property
    def accuracy(self) -> str:
        """What accuracy is called in this task."""
        return "Token accuracy" if self.config.task == "generate" else "Accuracy"

    @property
    def finished(self) -> bool:
        return bool(self.summary) and self.summary.get("rounds") == self.config.rounds.count

    @property
    def modules(self) -> list[str]:
        """The adapted modules, in the model's order: those of the start."""
        return list(self.common[0]["ranks"]) if self.common else []

    @cached_property
    def common(self) -> list[Row]:
        """Ranks of the global adapter, a row a round."""
        return [row for row in self.ranks if row["client"] is None]

    @cached_property
    def apart(self) -> list[Row]:
        """Ranks of clients that trained others."""
        return [] if self.private else [row for row in self.ranks if row["client"] is not None]

    @cached_property
    def holders(self) -> list[Row]:
        """What each client holds, where that is listed and may be told."""
        found = self.facts.get("partition", {}).get("clients")
        return list(found) if isinstance(found, list) and not self.private else []

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Client -> its kind of device: dealt out once more, and held against what the run wrote down; else empty."""
        names = {row["client"]: int(row["train_rows"]) for row in self.holders}
        told = self.facts.get("fleet") or {}
        if not names or not told:
            return {}
        try:
            found = fleet.build(self.config.engine.fleet, names, self.config.seed)
        except ConfigError:  # a CSV that is no longer there, or is another
            return {}
        if found.digest() != told.get("hash"):
            return {}
        return {client: found.machines[int(at)].kind for client, at in zip(names, found.dealt, strict=True)}

    @property
    def devices(self) -> dict[str, str]:
        """The same where there is more than one kind: what all have in common tells nobody apart."""
        return self.kinds if len(set(self.kinds.values())) > 1 else {}

    @cached_property
    def effective(self) -> dict[str, list[int]]:
        """Client -> the effective rank of each module, of a method with private adapters that tells them."""
        if not any("effective_rank" in row for row in self.rounds) or self.private:
            return {}
        try:
            arrays = Store.open(self.path).state()[0].arrays
        except (StoreError, OSError):  # it is being replaced, or was cleared away
            return {}
        found = {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith("ranks/")}
        return {client: np.asarray(array).tolist() for client, array in sorted(found.items())}


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def follower() -> Read:
    """What reads ledgers again and again: each time only what was added, and all of one that was cut, as by a resume."""
    known = dict[Path, tuple[int, int, bytes, list[Row]]]()

    def rows(path: Path) -> list[Row]:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            known.pop(path, None)
            return []
        with file:
            which, start = os.fstat(file.fileno()).st_ino, (0, b"", list[Row]())
            before, at, last, found = known.get(path, (which, *start))
            file.seek(at - len(last))
            if before != which or file.read(len(last)) != last:
                at, last, found = start
                file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # it is being written, or a kill has torn it
            del lines[-1]
        try:
            found += [finite(json.loads(line)) for line in lines]
        except ValueError as error:
            raise StoreError(f"{path}: not a ledger after its row {len(found)}: {error}") from None
        known[path] = which, at + sum(map(len, lines)), lines[-1] if lines else last, found
        return found

    return rows


def read(path: Path, rows: Read | None = None) -> Played:
    """All that is there. rows: what reads its ledgers.

    StoreError where it is no run directory; ConfigError where its config is not of this version.
    """
    if not is_run(path):
        raise StoreError(f"{path} is no run directory: it has no config.yaml")
    config = settings.load(path / "config.yaml")
    shown, rows = config.privacy.kind == "none", rows or follower()
    return Played(
        path, config, _json(path / "data.json"), rows(path / "rounds.jsonl"),
        rows(path / "clients.jsonl") if shown else [], rows(path / "ranks.jsonl"),
        rows(path / PERSONAL) if shown else [], _json(path / "summary.json"), working(path),
    )  # fmt: skip


def _json(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    return dict(finite(found))


def working(path: Path) -> bool:
    """Whether a process holds the run's lock. It is let go at once, and who starts a run asks more than once."""
    with suppress(FileNotFoundError, PermissionError), (path / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def sampled(every: Sequence[One], most: int) -> list[One]:
    """At most so many, evenly over their order, the first and the last among them."""
    if len(every) <= most:
        return list(every)
    return [every[at] for at in np.linspace(0, len(every) - 1, most).round().astype(int).tolist()]


def thinned(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """As many points as a line shows, and a note where there are more."""
    shown = sampled(rows, LINE)
    return shown, f"At most {LINE:,} points of a line are drawn, evenly spaced." if len(shown) < len(rows) else ""


def known(rows: Iterable[Row], name: str) -> list[float]:
    """The numbers of a column that some rows may lack."""
    return [float(row[name]) for row in rows if row.get(name) is not None]


def short(modules: Sequence[str]) -> dict[str, str]:
    """Names that fit beside a chart: the number of a module's block, and as much of its end as tells kinds apart."""
    parts = {name: _parted(name) for name in modules}
    tails: Mapping[str, str] = _tails({tail for _, tail in parts.values()})
    made = {name: f"{block} {tails[tail]}".strip() for name, (block, tail) in parts.items()}
    return made if len(set(made.values())) == len(made) else {name: name for name in modules}


def _parted(name: str) -> tuple[str, str]:
    """The number of a module's block, or nothing, and what comes after it."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _tails(names: set[str]) -> dict[str, str]:
    """The shortest end of each dotted name that is no end of another; all of it where one is the end of another."""
    result = {}
    for name in names:
        words = name.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        others = [f".{other}" for other in names if other != name]
        result[name] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), name)
    return result
