"""One run of a study in a process of its own, and what it came to."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fedrank import ledger
from fedrank.server import OF_TEXTS, PERSONAL
from fedrank.studies.study import Part, located

# What grows from round to round is told as the sum up to a round of the curve, the largest memory as the largest yet.
SUMS = ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "device_joules")
AT = ("round", "accuracy", "loss", "personal_accuracy", "clock_seconds", "components", "modules_alive", *OF_TEXTS,
      *(f"personal_{name}" for name in OF_TEXTS))  # fmt: skip
CLOSING = ("accuracy", "loss", "personal_accuracy", "personal_majority", "personal_worst_decile", "majority", "rounds",
           "clients_ok", "clients_failed", "clock_seconds", "waiting_seconds", "peak_memory_bytes", "components",
           "modules_alive", "modules", "epsilon", "delta", "train_seconds", *SUMS, *OF_TEXTS,
           *(f"personal_{name}" for name in OF_TEXTS))  # fmt: skip


class RunFailed(RuntimeError):
    """A run that ended otherwise than with a summary; the message is its own last word."""


@dataclass
class Processes:
    """The runs at work, so that whoever stops the study stops them."""

    working: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.working):
            process.send_signal(signal.SIGTERM)
        for process in list(self.working):
            process.wait()

    def call(self, words: Collection[str], log: Path) -> int:
        """The exit code of a command whose output goes into a file."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            self.working.add(process)
            try:
                if self.stopped:  # while it was started
                    process.send_signal(signal.SIGTERM)
                return process.wait()
            finally:
                self.working.discard(process)


def play(folder: Path, config: Part, processes: Processes) -> float:
    """Play a run, or go on with it where it stopped; a finished one is left as it is. The seconds that it took just now.

    RunFailed with its last word where it fails.
    """
    command, file, log = [sys.executable, "-m", "fedrank.cli"], folder.with_suffix(".yaml"), folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _wait(folder)
    started = time.monotonic()
    if (folder / "summary.json").exists():
        return 0.0
    if (folder / "config.yaml").exists():
        code = processes.call([*command, "resume", str(folder), "--output", "quiet"], log)
    else:
        file.write_text(yaml.safe_dump(located(config), sort_keys=False))
        code = processes.call([*command, "run", str(file), "--out", str(folder), "--output", "quiet"], log)
    if code:
        words = log.read_text(errors="replace").strip().splitlines() or [f"it ended with code {code}"]
        raise RunFailed(words[-1].removeprefix("error: "))
    return time.monotonic() - started


def _wait(folder: Path) -> None:
    """Until nobody plays this run: where a study is killed, what it had begun plays on to its end."""
    if (folder / ".lock").exists():
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run came to: its closing scores and sums, its curve, and its clients' own scores.

    curve: a point for each evaluated round, with bytes and joules up to it. seconds: of its rounds, on this machine.
    """
    rounds = ledger.read(folder / "rounds.jsonl")
    summary, facts = (json.loads((folder / name).read_text()) for name in ("summary.json", "data.json"))
    curve, sums, peak = list[dict[str, Any]](), dict[str, float | None](dict.fromkeys(SUMS, 0.0)), 0.0
    for row in rounds:
        for name, before in sums.items():  # a private run does not tell
            sums[name] = None if before is None or row[name] is None else before + row[name]
        peak = max(peak, row["peak_memory_bytes"] or 0.0)
        if row["accuracy"] is not None or row["personal_accuracy"] is not None:
            curve.append({name: row[name] for name in AT if name in row} | sums | {"peak_memory_bytes": peak or None})
    clients = ledger.read(folder / PERSONAL)
    whole = [row for row in ledger.read(folder / "ranks.jsonl") if row["client"] is None]
    return {
        "summary": {name: summary[name] for name in CLOSING if name in summary}, "curve": curve,
        "personal": [row["accuracy"] for row in clients if "accuracy" in row], "ranks": whole[-1]["ranks"] if whole else {},
        "seconds": round(sum(row["wall_seconds"] or 0.0 for row in rounds), 1),
        "facts": {"data": facts["hash"], "model": facts["model"]["fingerprint"], "version": summary["version"],
                  "numerics": summary["numerics"]},
    }  # fmt: skip


def late(curve: list[dict[str, Any]], score: str) -> float | None:
    """A score towards the end: the mean of its last five evaluations, of the second half of the rounds only.

    One round's score is noisy where clients differ; None where there is none.
    """
    last = max((point["round"] for point in curve), default=0)
    values = [point[score] for point in curve if point[score] is not None and 2 * point["round"] > last]
    return fmean(values[-5:]) if values else None


def reached(curve: list[dict[str, Any]], score: str, target: float) -> dict[str, Any] | None:
    """The point of the curve at which the mean of three evaluations in a row first was at the target; None: never."""
    scored = [point for point in curve if point[score] is not None]
    for at, point in enumerate(scored):
        if at >= 2 and fmean(p[score] for p in scored[at - 2 : at + 1]) >= target:
            return point
    return None


def best(curve: list[dict[str, Any]], score: str) -> float | None:
    """The highest target that `reached` finds in this curve; None where there is none."""
    values = [point[score] for point in curve if point[score] is not None]
    return max((fmean(values[at : at + 3]) for at in range(len(values) - 2)), default=None)
