"""One run of a study in a process of its own, and what it came to."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

import yaml

from fedrank import ledger
from fedrank.client import STAYS
from fedrank.ledger import OF_TEXTS, PERSONAL
from fedrank.studies.configs import Part, located
from fedrank.told import finite

# What grows from round to round is told as the sum up to a round of the curve, the largest memory as the largest yet.
SUMS = ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "device_joules")
AT = ("round", "accuracy", "loss", "personal_accuracy", "clock_seconds", "components", "modules_alive", *OF_TEXTS,
      *(f"personal_{name}" for name in OF_TEXTS))  # fmt: skip
CLOSING = ("accuracy", "loss", "personal_accuracy", "personal_majority", "personal_worst_decile", "majority", "rounds",
           "clients_ok", "clients_failed", "clock_seconds", "waiting_seconds", "peak_memory_bytes", "components",
           "modules_alive", "modules", "epsilon", "delta", "train_seconds", *SUMS, *OF_TEXTS,
           *(f"personal_{name}" for name in OF_TEXTS))  # fmt: skip


class RunFailed(RuntimeError):
    """A run that is of no use; the message is its own last word.

    diverged: it was played to its end, and its training came to nothing, which is a result, if no good one.
    """

    def __init__(self, said: str, diverged: bool = False) -> None:
        super().__init__(said)
        self.diverged = diverged


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

    def call(self, words: Sequence[str], log: BinaryIO) -> int:
        """The exit code of a command whose output goes into a file."""
        process = subprocess.Popen([*words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.working.add(process)
        try:
            if self.stopped:  # while it was started
                process.send_signal(signal.SIGTERM)
            return process.wait()
        finally:
            self.working.discard(process)

    @contextmanager
    def alone(self, path: Path) -> Iterator[BinaryIO]:
        """The log of a run, locked, by its process too: what a killed study had begun plays on, and is waited for."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as log:
            while True:
                if self.stopped:
                    raise RunFailed("stopped")
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    time.sleep(0.2)
                else:
                    break
            log.truncate(0)
            yield log


def play(folder: Path, config: Part, processes: Processes) -> float:
    """Play a run, or go on with it where it stopped; a finished one is left as it is. The seconds that it took just now.

    RunFailed with its last word where it fails, or where no client's update was merged in any round; such a one is played
    anew when it is asked for again.
    """
    command, started = [sys.executable, "-m", "fedrank.cli"], time.monotonic()
    file, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("yaml", "log"))
    with processes.alone(log) as told:
        if _nothing(folder):
            shutil.rmtree(folder)
        if not (folder / "summary.json").exists():
            if (folder / "config.yaml").exists():
                words = ["resume", str(folder)]
            else:
                file.write_text(yaml.safe_dump(located(config), sort_keys=False))
                words = ["run", str(file), "--out", str(folder)]
            code = processes.call([*command, *words, "--output", "quiet"], told)
            if code and not (folder / "summary.json").exists():
                raise RunFailed(_last_word(log, code).replace(f"{folder.parent}/", ""))  # it is kept, and no place is
    if _nothing(folder):
        see = f"; see {folder.name}/clients.jsonl"
        for row in ledger.read(folder / "clients.jsonl"):
            said = row.get("error", "")  # of another library, it is of this machine, such as of its memory
            if said.endswith(STAYS) and not said.startswith("Error:"):  # which is all that a private client says
                raise RunFailed(f"client {row['client']} in round {row['round']}: {said}{see}")
        raise RunFailed(f"no client's update was merged in any round{see}", diverged=True)
    return time.monotonic() - started


def _nothing(folder: Path) -> bool:
    """Whether it is a finished run without a single update; a private one does not tell."""
    end = folder / "summary.json"
    return end.exists() and json.loads(end.read_text())["clients_ok"] == 0


def _last_word(log: Path, code: int) -> str:
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}" + ", as when memory runs out" * (code == -signal.SIGKILL)
    said = log.read_text(errors="replace").strip().splitlines()
    return said[-1].removeprefix("error: ") if said else f"it ended with code {code}"


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
    clients, asked = ledger.read(folder / PERSONAL), ledger.read(folder / "clients.jsonl")
    curve, summary = finite(curve), finite(summary)
    whole = [row for row in ledger.read(folder / "ranks.jsonl") if row["client"] is None]
    return {
        "summary": {name: summary[name] for name in CLOSING if name in summary}, "curve": curve,
        "personal": [row["accuracy"] for row in clients if "accuracy" in row], "ranks": whole[-1]["ranks"] if whole else {},
        "seconds": round(sum(row["wall_seconds"] or 0.0 for row in rounds), 1),
        "rows_seen": sum(row.get("rows_seen", 0.0) for row in asked if row["ok"]),
        "facts": {"data": facts["hash"], "model": facts["model"]["fingerprint"], "numerics": summary["numerics"],
                  "code": summary.get("code")},
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
