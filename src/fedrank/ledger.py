"""The ledgers: one JSON line per round, and one per client and round; appended, never rewritten but to resume."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedrank.store import write


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows at the end, on disk before this returns."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a torn last line, as a kill leaves it, is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON line") from None
    return rows


def cut(path: Path, round: int) -> None:
    """Drop a torn last line and every row newer than `round`, so that the round can be played again."""
    if not path.exists():
        return
    rows = [row for row in read(path) if row["round"] <= round]
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
