"""What of a run may be told elsewhere, in an export or on a page: nothing of this machine, and of a private run no rows."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OF_ROWS = ("stack", "prefix")  # how a run computes that hangs on how many rows there are and how long they are
CONNECTION = ("superlink", "root_certificate", "insecure")
CLIENTS = "clients' own"  # rows
UNPROTECTED = "Epsilon says nothing of the rows on which that adapter was trained before."  # of an imported one


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it may be told, or a part of one: less what is of one machine (folders, addresses, who watches) and, where
    it is private, what hangs on its clients' rows."""
    found = {name: value for name, value in config.items() if name != "observe"}
    for section, key in (("data", "path"), ("model", "name")):
        if key in (found.get(section) or {}):
            found[section] = {**found[section], key: last(found[section][key])}
    if found.get("engine"):
        private = (found.get("privacy") or {}).get("kind", "none") != "none"
        engine = computed({name: value for name, value in found["engine"].items() if name not in CONNECTION}, private)
        if engine.get("fleet"):
            engine["fleet"] = {**engine["fleet"], "csv": last(engine["fleet"].get("csv"))}
        found["engine"] = engine
    return found


def computed(numerics: Mapping[str, Any], private: bool) -> dict[str, Any]:
    """How a run computes, as it may be told of one that is private or not."""
    return {name: value for name, value in numerics.items() if not (private and name in OF_ROWS)}


def counted(facts: Mapping[str, Any]) -> int | None:
    """How many a run has; None where they come and go, as real sites do."""
    found = facts.get("partition", {}).get("clients")
    return found.get("count") if isinstance(found, Mapping) else len(found) if found else None


def tested(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Which rows the global model is scored on: test, validation, or, where the server has none, clients' own."""
    if facts.get("rows", {}).get("test") == 0:
        return CLIENTS
    return str((config.get("data") or {}).get("split", "test"))


def last(place: str | None) -> str | None:
    """A folder or file of this machine by its last name; other names as they are."""
    return Path(place).name if place and Path(place).is_absolute() else place


def total(values: Iterable[float | int | None]) -> float | int | None:
    """A sum, or None where one of these is not told, as of a private run."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, of which a browser has no JSON, and nobody a mean."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
