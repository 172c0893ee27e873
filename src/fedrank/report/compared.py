"""comparison.json as a page needs it, whole or still growing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrank.report.page import Row
from fedrank.report.played import working
from fedrank.studies import record
from fedrank.studies.record import FILE
from fedrank.told import finite


@dataclass(frozen=True)
class Comparison:
    """comparison.json, of which every part may be missing while it grows. working: whether a process is at it."""

    path: Path
    found: Row
    working: bool

    def part(self, name: str) -> Any:
        return self.found.get(name) or {}

    @property
    def study(self) -> Row:
        return dict(self.part("study"))

    @property
    def settings(self) -> list[str]:
        """In the study's order; what it does not name comes after."""
        return list(dict.fromkeys([*(self.study.get("settings") or {}), *self.part("runs"), *self.part("results")]))

    @property
    def arms(self) -> list[str]:
        there = [arm for arms in self.part("runs").values() for arm in arms]
        return list(dict.fromkeys([*(self.study.get("arms") or {}), *there]))

    @property
    def score(self) -> str:
        return str(self.study.get("score") or "accuracy")

    @property
    def reference(self) -> str:
        """The arm that the others are held against."""
        return str(self.study.get("reference") or next(iter(self.arms), ""))

    @property
    def done(self) -> int:
        """How many runs there are."""
        return sum(len(self.runs(s, arm)) for s in self.settings for arm in self.arms)

    @property
    def planned(self) -> int:
        return max(len(self.settings) * len(self.arms) * len(self.study.get("seeds") or []), self.done)

    @property
    def finished(self) -> bool:
        return self.done == self.planned > 0

    @property
    def fair(self) -> bool:
        """Whether anything may be concluded."""
        return self.finished and bool(self.part("fair").get("verdict"))

    def runs(self, setting: str, arm: str) -> dict[str, Row]:
        """Seed -> run."""
        return dict((self.part("runs").get(setting) or {}).get(arm) or {})


def file_of(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def is_comparison(path: Path) -> bool:
    return (path / FILE).is_file() or (path.is_file() and path.suffix == ".json")


def read(path: Path) -> Comparison:
    """The comparison of a folder, or of its file. StoreError where it is none, or of a form that is not known here."""
    return Comparison(file_of(path).parent, finite(record.read(path)), working(file_of(path).parent))
