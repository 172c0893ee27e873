"""The ledgers: one JSON line per round, and one per client and round; appended, never rewritten but to resume.

What is summed here over clients is the same in whatever order their answers came.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrank.protocol import Module, State
from fedrank.store import write

Event = dict[str, Any]
ASKED = "asked.jsonl"  # every time that clients who protect themselves were asked, of killed rounds too
PERSONAL = "personal.jsonl"  # of the end: each client's scores on its own test rows
BYTES = tuple(f"{part}bytes_{way}" for way in ("up", "down") for part in ("", "adapter_", "head_"))
# What clients may score beside accuracy and loss, in task generate.
OF_TEXTS = ("perplexity", "choice_accuracy", "choice_accuracy_per_byte", "exact_match", "bleu", "rouge_l")


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


def of_round(clients: Sequence[Event], after: State, modules: Iterable[Module]) -> Event:
    """A round's row by its clients' rows and the state after it; its scores come when it is evaluated."""
    ok = [row for row in clients if row["ok"]]
    sums = {name: sum(row.get(name, 0) for row in clients) for name in BYTES}
    examples = sum(row["examples"] for row in ok)
    adapter = after.adapter
    alive = {module.block for module in modules if module.name in adapter.blocks}
    return {
        **after.metrics, "round": after.round, "accuracy": None, "loss": None, "personal_accuracy": None,
        "train_loss": math.fsum(row["loss"] * row["examples"] for row in ok if "loss" in row) / examples if ok else None,
        **sums, "clients_ok": len(ok), "clients_failed": len(clients) - len(ok), "components": adapter.components,
        "modules_alive": len(adapter.blocks), "lowest_active_block": min(alive, default=None),
        "train_seconds": round(sum(row.get("seconds", 0.0) for row in ok), 4),
    }  # fmt: skip


def clocked(clients: Sequence[Event], clock: float, deadline: float | None) -> Event:
    """A round on the simulated clock, in which the server's own work takes no time; clients' waits go into their rows.

    It lasts as long as the slowest that answered, or until the deadline where one is set and someone did not.
    Joules are those of all clients, as far as known; waits and memory are of those that answered.
    """
    timed = [row for row in clients if row["ok"] and "device_seconds" in row]
    lengths = [row["device_seconds"] for row in timed]
    if deadline is not None and any("bytes_up" not in row for row in clients):
        lengths.append(deadline)
    seconds = max(lengths, default=0.0)
    for row in timed:
        row["waiting_seconds"] = seconds - row["device_seconds"]
    waits = [row["waiting_seconds"] for row in timed]
    return {
        "round_seconds": seconds, "clock_seconds": clock + seconds,
        "waiting_seconds": _mean(waits) if waits else None,
        "device_joules": math.fsum(row.get("device_joules", 0.0) for row in clients),
        "peak_memory_bytes": max((row.get("peak_memory_bytes", 0.0) for row in timed), default=0.0),
    }  # fmt: skip


def personal(clients: Sequence[Event]) -> Event:
    """Clients' scores on their own test rows: the unweighted mean accuracy, and that of their majority classes."""
    frames = sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in clients)
    scored = [row for row in clients if row["ok"] and row.get("rows", 0) > 0 and {"accuracy", "loss"} <= row.keys()]
    result: Event = {"personal_accuracy": None, "personal_majority": None, "personal_clients": len(scored)}
    result |= {"evaluation_bytes": frames, "mean_accuracy": None, "mean_loss": None}
    if scored:
        total = sum(row["rows"] for row in scored)
        most = [row["majority"] for row in scored if "majority" in row]
        result |= {
            "personal_accuracy": _mean([row["accuracy"] for row in scored]),
            "personal_majority": _mean(most) if most else None,
            "mean_accuracy": math.fsum(row["accuracy"] * row["rows"] for row in scored) / total,
            "mean_loss": math.fsum(row["loss"] * row["rows"] for row in scored) / total,
        }
    for name in OF_TEXTS:
        if values := [row[name] for row in scored if name in row]:
            result[f"personal_{name}"] = _mean(values)
    return result


def each(clients: Iterable[Event]) -> list[Event]:
    """What is kept of every client's scores in the end."""
    untold = ("round", "ok", *BYTES, "seconds")
    return [{name: value for name, value in row.items() if name not in untold} for row in clients if row["ok"]]


def worst_decile(scored: Iterable[Event]) -> float | None:
    """The mean accuracy of the tenth of the clients, at least one, that are served worst."""
    found = sorted(row["accuracy"] for row in scored if "accuracy" in row)
    return _mean(found[: math.ceil(len(found) / 10)]) if found else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
