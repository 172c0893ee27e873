"""comparison.json: its name, its form, how it is read and written."""

import json
from pathlib import Path
from typing import Any

from fedrank.store import StoreError

FILE, SCHEMA = "comparison.json", 1
RESOLVED = "study.yaml"  # beside it: the study with all that it leaves open written out


def read(path: Path) -> dict[str, Any]:
    """The comparison of a folder, or of its file. StoreError where it is none, or of another version of its form."""
    file = path / FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} is no comparison: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise StoreError(f"{file}: schema {schema!r}, this fedrank reads {SCHEMA}; use the version that wrote it")
    return dict(found)


def text(found: Any, depth: int = 0) -> str:
    """JSON in which what holds nothing nested is a line of its own: a run is a page, and not hundreds of lines."""
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    if not any(isinstance(one, dict | list) and one for one in inside):
        return json.dumps(found)
    pad = " " * (depth + 1)
    if isinstance(found, dict):
        lines = [f"{pad}{json.dumps(key)}: {text(value, depth + 1)}" for key, value in found.items()]
    else:
        lines = [f"{pad}{text(value, depth + 1)}" for value in found]
    start, end = "{}" if isinstance(found, dict) else "[]"
    return start + "\n" + ",\n".join(lines) + f"\n{' ' * depth}{end}"
