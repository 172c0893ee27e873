"""A study played: trials and runs, several at once; comparison.json grows with each, and what it holds is kept."""

import json
import platform
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import fedrank
from fedrank.engines.workers import cores
from fedrank.store import StoreError, write
from fedrank.studies import runs as played
from fedrank.studies.results import compared, fairness, verdicts
from fedrank.studies.runs import Processes, RunFailed
from fedrank.studies.study import Part, Study, digest, dotted
from fedrank.studies.tuning import chosen, count, edges, search

SCHEMA = 1
FILE = "comparison.json"
Event = dict[str, Any]
Key = tuple[str, str, int | None]  # setting, arm, seed; no seed: the arm's tuning


@dataclass(frozen=True)
class Comparison:
    """A study being played. found: what comparison.json holds. told: what became of tasks, in the order of their ends."""

    study: Study
    out: Path
    runs: Path
    workers: int
    found: dict[str, Any]
    processes: Processes = field(default_factory=Processes)
    told: SimpleQueue[Event] = field(default_factory=SimpleQueue)

    # ---- what there is to play

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(setting, arm) for setting in self.study.settings for arm in self.study.arms]

    @property
    def searched(self) -> list[tuple[str, str]]:
        """The pairs whose knobs are searched."""
        tuning, first = self.study.tuning, next(iter(self.study.settings))
        return [(s, arm) for s, arm in self.pairs if tuning and (tuning.every_setting or s == first)]

    def trial(self, setting: str, arm: str, knobs: Mapping[str, Any]) -> Part:
        """The config of a trial."""
        assert self.study.tuning is not None
        fixed = {"seed": self.study.tuning.seed, "data": {"split": "validation"}}
        return self.study.config(setting, arm, self.study.tuning.config, dotted(knobs), fixed)

    def run(self, setting: str, arm: str, seed: int) -> Part:
        """The config of a run, with the knobs that tuning chose."""
        return self.study.config(setting, arm, dotted(self.best(setting, arm) or {}), {"seed": seed})

    def best(self, setting: str, arm: str) -> dict[str, Any] | None:
        """The knobs that tuning chose; None where it has not come to its end."""
        if self.study.tuning is None:
            return {}
        at = setting if self.study.tuning.every_setting else next(iter(self.study.settings))
        best: dict[str, Any] | None = self.tuned(at, arm).get("best")
        return best

    def tuned(self, setting: str, arm: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"trials": []}
        found: dict[str, Any] = self.found["tuning"].setdefault(setting, {}).setdefault(arm, empty)
        return found

    def ran(self, setting: str, arm: str) -> dict[str, Any]:
        """Seed -> the run that there is."""
        found: dict[str, Any] = self.found["runs"].setdefault(setting, {}).setdefault(arm, {})
        return found

    def trials_left(self, setting: str, arm: str) -> int:
        tuning = self.study.tuning
        if tuning is None or (setting, arm) not in self.searched:
            return 0
        return count(tuning.knobs(arm), tuning.trials) - len(self.tuned(setting, arm)["trials"])

    def seeds_left(self, setting: str, arm: str) -> list[int]:
        return [seed for seed in self.study.seeds if str(seed) not in self.ran(setting, arm)]

    # ---- in threads, one for each run at work

    def play(self, setting: str, arm: str, seed: int | None, config: Part, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """Play a run, or a trial where there is no seed, and tell of it; RunFailed where it fails."""
        folder = self.runs / f"{setting}-{arm}-{'trial' if seed is None else seed}-{digest(config)}"
        wall = played.play(folder, config, self.processes)
        run = played.measured(folder) | {"digest": digest(config)}
        score = run["summary"][self.study.score]
        if seed is None:
            run = {"knobs": dict(knobs), "score": score, "seconds": run["seconds"], "digest": run["digest"]}
        who = {"setting": setting, "arm": arm, "seed": seed, "knobs": knobs}
        self.told.put({"event": "run", **who, "score": score, "wall_seconds": wall, "run": run})
        return run

    def tune(self, setting: str, arm: str) -> None:
        """An arm's trials, one after another, as each may hang on those before."""
        tuning, trials = self.study.tuning, list[dict[str, Any]]()
        assert tuning is not None
        known = {trial["digest"]: trial for trial in self.tuned(setting, arm)["trials"]}

        def score(knobs: dict[str, Any]) -> float:
            config = self.trial(setting, arm, knobs)
            trial = known.get(digest(config)) or self.play(setting, arm, None, config, knobs)
            if trial["score"] is None:
                raise RunFailed(
                    f"a trial has no {self.study.score}; methods without a global model have personal_accuracy"
                )
            trials.append(trial)
            return float(trial["score"])

        knobs = tuning.knobs(arm)
        search(knobs, tuning.trials, tuning.seed, score)
        best = chosen(trials)
        found = {"trials": trials, "best": best, "edge": edges(knobs, best)}
        self.told.put({"event": "tuned", "setting": setting, "arm": arm, "found": found})

    def work(self, key: Key) -> None:
        """Do what a key stands for, and tell of its end."""
        setting, arm, seed = key
        end: Event = {"event": "done"}
        try:
            if seed is None:
                self.tune(setting, arm)
            else:
                self.play(setting, arm, seed, self.run(setting, arm, seed), self.best(setting, arm) or {})
        except RunFailed as error:
            self.told.put({"event": "failed", "setting": setting, "arm": arm, "seed": seed, "error": str(error)})
        except BaseException as error:  # raised again where somebody sees it
            end = {"event": "done", "raised": error}
        self.told.put(end)

    # ---- in the main thread

    def together(self, keys: list[Key]) -> Iterator[Event]:
        """Do these, as many at once as there are workers; what became of them as it comes, recorded."""
        left, pool = len(keys), ThreadPoolExecutor(self.workers)
        try:
            for key in keys:
                pool.submit(self.work, key)
            while left:
                event = self.told.get()
                if event["event"] == "done":
                    if "raised" in event:
                        raise event["raised"]
                    left -= 1
                else:
                    self.record(event)
                    yield event
        finally:
            if left:
                self.processes.stop()
            pool.shutdown(cancel_futures=True)

    def record(self, event: Event) -> None:
        setting, arm, seed = event["setting"], event["arm"], event.get("seed")
        match event["event"]:
            case "run" if seed is None:
                self.tuned(setting, arm)["trials"].append(event["run"])
            case "run":
                self.ran(setting, arm)[str(seed)] = event["run"]
            case "tuned":
                self.found["tuning"][setting][arm] = event["found"]
            case "failed":
                self.found["failures"].append({"setting": setting, "arm": arm, "seed": seed, "error": event["error"]})
        self.save()

    def save(self) -> None:
        for setting, arm in self.pairs:  # in the order of the study, whatever ended first
            arms, mine = self.found["runs"].setdefault(setting, {}), self.ran(setting, arm)
            arms[arm] = {str(seed): mine[str(seed)] for seed in self.study.seeds if str(seed) in mine}
        self.found["fair"] = fairness(self.study, self.found)
        self.found["results"] = compared(self.study, self.found["runs"])
        self.found["claims"] = verdicts(self.study, self.found["results"])
        write(self.out / FILE, text(self.found).encode())


def opened(study: Study, out: Path, runs: Path, workers: int) -> Comparison:
    """The comparison with what comparison.json has of the study's own runs; what was played otherwise is left out of it."""
    before = read(out) if (out / FILE).exists() else {}
    found: dict[str, Any] = {
        "schema": SCHEMA, "version": fedrank.__version__, "study": study.model_dump(mode="json"), "forecast": before.get("forecast"),
        "machine": {"processor": processor(), "cores": cores(), "workers": workers}, "tuning": {}, "runs": {}, "failures": [],
    }  # fmt: skip
    self = Comparison(study, out, runs, workers, found)
    for setting, arm in self.searched:
        mine = before.get("tuning", {}).get(setting, {}).get(arm, {"trials": []})
        same = [
            trial for trial in mine["trials"] if trial["digest"] == digest(self.trial(setting, arm, trial["knobs"]))
        ]
        found["tuning"].setdefault(setting, {})[arm] = {"trials": same}
        if "best" in mine and self.trials_left(setting, arm) == 0:
            found["tuning"][setting][arm] = mine | {"trials": same}
    for setting, arm in self.pairs:
        for seed, run in before.get("runs", {}).get(setting, {}).get(arm, {}).items():
            if self.best(setting, arm) is not None and run["digest"] == digest(self.run(setting, arm, int(seed))):
                self.ran(setting, arm)[seed] = run
    return self


def processor() -> str:
    """The model of this machine's processor, as far as it can be known."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


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


def text(found: Mapping[str, Any]) -> str:
    """JSON with what holds nothing nested on a line of its own: a run is a page, and not hundreds of lines."""
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: " ".join(m[0].split()), json.dumps(found, indent=1)) + "\n"
