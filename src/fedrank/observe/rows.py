"""The ledgers as watchers read them: rows as they are added, and the numbers in one; what a run does not tell is null."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedrank.ledger import Event

Row = dict[str, Any]
Watch = Callable[[Event], None]

GROWN = ("start", "resume", "round")  # events before which rows were added; before the first two, by an earlier process


def added(path: Path) -> Callable[[], list[Row]]:
    """What gives, at each call, the rows of this ledger that it has not given yet."""
    at = 0

    def rows() -> list[Row]:
        nonlocal at
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(at)
            lines = file.read().splitlines()
            at = file.tell()
        return [json.loads(line) for line in lines]

    return rows


def numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    return {name: n for name, n in row.items() if isinstance(n, int | float) and not isinstance(n, bool)}


def timed(rows: Iterable[Row]) -> Iterator[tuple[Row, float]]:
    """Each row with the time of its end, in seconds, as if the last had ended now and none had waited for the next."""
    rows, now = list(rows), time.time()
    left = sum(row["wall_seconds"] or 0.0 for row in rows)
    for row in rows:
        left -= row["wall_seconds"] or 0.0
        yield row, now - left
