"""A study played: trials and runs, several at once; comparison.json grows with each, and what it holds is kept."""

import logging
import platform
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import xxhash

import fedrank
from fedrank.engines.workers import cores
from fedrank.store import write
from fedrank.studies import runs as played
from fedrank.studies.configs import Part, digest, dotted
from fedrank.studies.record import FILE, SCHEMA, read, text
from fedrank.studies.results import compared, fairness, verdicts
from fedrank.studies.runs import Processes, RunFailed, late
from fedrank.studies.study import Range, Study
from fedrank.studies.tuning import chosen, count, edges, search

log = logging.getLogger(__name__)
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
        if tuning is None or (setting, arm) not in self.searched or self.best(setting, arm) is not None:
            return 0
        return max(0, count(tuning.knobs(arm), tuning.trials) - len(self.tuned(setting, arm)["trials"]))

    def sought(self, arm: str, values: Mapping[str, Any]) -> bool:
        """Whether these are values that the arm's search may try."""
        knobs = self.study.tuning.knobs(arm) if self.study.tuning else {}
        return knobs.keys() == values.keys() and all(
            knob.low <= values[key] <= knob.high if isinstance(knob, Range) else values[key] in knob
            for key, knob in knobs.items()
        )

    def asked(self, arm: str) -> dict[str, Any]:
        """What an arm's tuning hangs on beside the configs of its trials."""
        assert self.study.tuning is not None
        knobs = {
            key: knob.model_dump() if isinstance(knob, Range) else [*knob]
            for key, knob in self.study.tuning.knobs(arm).items()
        }
        return {"knobs": knobs, "trials": self.study.tuning.trials, "score": self.study.score}

    def seeds_left(self, setting: str, arm: str) -> list[int]:
        return [seed for seed in self.study.seeds if str(seed) not in self.ran(setting, arm)]

    # ---- in threads, one for each run at work

    def play(self, setting: str, arm: str, seed: int, knobs: Mapping[str, Any]) -> None:
        """Play a run and tell of it; RunFailed where it fails."""
        config = self.run(setting, arm, seed)
        folder = self.runs / f"{setting}-{arm}-{seed}-{digest(config)}"
        wall = played.play(folder, config, self.processes)
        run = played.measured(folder) | {"digest": digest(config)}
        who = {"setting": setting, "arm": arm, "seed": seed, "knobs": knobs, "score": run["summary"][self.study.score]}
        self.told.put({"event": "run", **who, "wall_seconds": wall, "run": run})

    def attempt(self, setting: str, arm: str, config: Part, knobs: dict[str, Any]) -> dict[str, Any]:
        """Play a trial and tell of it; one that diverges has an error, no score. RunFailed where it fails otherwise."""
        folder, wall = self.runs / f"{setting}-{arm}-trial-{digest(config)}", 0.0
        trial = {"knobs": knobs, "score": None, "seconds": 0.0, "digest": digest(config)}
        try:
            wall = played.play(folder, config, self.processes)
        except RunFailed as error:
            if not error.diverged:
                tried = ", ".join(f"{key}={value}" for key, value in knobs.items())
                raise RunFailed(f"its trial of {tried}: {error}") from None
            trial["error"] = str(error)
        else:
            run = played.measured(folder)
            trial |= {"score": scored(run, self.study.score), "seconds": run["seconds"], "code": run["facts"]["code"]}
            if trial["score"] is None:
                raise RunFailed(
                    f"a trial has no {self.study.score}; methods without a global model have personal_accuracy"
                )
        who = {"setting": setting, "arm": arm, "seed": None, "knobs": knobs, "score": trial["score"]}
        failed = {"error": trial["error"]} if "error" in trial else {}
        self.told.put({"event": "run", **who, **failed, "wall_seconds": wall, "run": trial})
        return trial

    def tune(self, setting: str, arm: str) -> None:
        """An arm's trials, one after another, as each may hang on those before."""
        tuning, trials = self.study.tuning, list[dict[str, Any]]()
        assert tuning is not None
        known = {trial["digest"]: trial for trial in self.tuned(setting, arm)["trials"]}

        def score(knobs: dict[str, Any]) -> float:
            config = self.trial(setting, arm, knobs)
            trials.append(known.get(digest(config)) or self.attempt(setting, arm, config, knobs))
            return float(trials[-1]["score"] or 0.0)

        knobs = tuning.knobs(arm)
        search(knobs, tuning.trials, tuning.seed, score)
        if not (there := [trial for trial in trials if trial["score"] is not None]):
            raise RunFailed(f"none of its trials has a score, the last with: {trials[-1]['error']}")
        best = chosen(there)
        found = {"asked": self.asked(arm), "trials": trials, "best": best, "edge": edges(knobs, best)}
        self.told.put({"event": "tuned", "setting": setting, "arm": arm, "found": found})

    def work(self, key: Key) -> None:
        """Do what a key stands for, and tell of its end."""
        setting, arm, seed = key
        end: Event = {"event": "done"}
        try:
            if seed is None:
                self.tune(setting, arm)
            else:
                self.play(setting, arm, seed, self.best(setting, arm) or {})
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
        runs, tuning = dict[str, Any](), dict[str, Any]()  # in the order of the study, whatever ended or was read first
        for setting, arm in self.pairs:
            mine, tuned = self.ran(setting, arm), self.tuned(setting, arm)
            runs.setdefault(setting, {})[arm] = {str(s): mine[str(s)] for s in self.study.seeds if str(s) in mine}
            if tuned["trials"]:
                tuning.setdefault(setting, {})[arm] = tuned
        self.found.update(runs=runs, tuning=tuning)
        self.found["fair"] = fairness(self.study, self.found)
        fair = self.found["fair"]["verdict"]
        self.found["results"] = compared(self.study, self.found["runs"], fair)
        self.found["claims"] = verdicts(self.study, self.found["runs"], self.found["results"]) if fair else {}
        write(self.out / FILE, f"{text(self.found)}\n".encode())


def opened(study: Study, out: Path, runs: Path, workers: int) -> Comparison:
    """The comparison with what comparison.json has of the study's own runs. Where it has others, it is kept beside."""
    before = read(out) if (out / FILE).exists() else {}
    found: dict[str, Any] = {
        "schema": SCHEMA, "version": fedrank.__version__, "study": study.model_dump(mode="json"), "forecast": before.get("forecast"),
        "machine": {"processor": processor(), "cores": cores(), "workers": workers}, "tuning": {}, "runs": {}, "failures": [],
    }  # fmt: skip
    if runs.resolve() != (out / "runs").resolve():
        found["runs_folder"] = runs.resolve().name  # where that is, is of one machine
    self = Comparison(study, out, runs, workers, found)
    for setting, arm in self.searched:
        mine = before.get("tuning", {}).get(setting, {}).get(arm, {"trials": []})
        same = [
            one
            for one in mine["trials"]
            if one["digest"] == digest(self.trial(setting, arm, one["knobs"])) and self.sought(arm, one["knobs"])
        ]
        asked = mine.get("asked", {})
        if asked.get("score", study.score) == study.score:
            self.tuned(setting, arm)["trials"] = same
            if asked == self.asked(arm) and len(same) == len(mine["trials"]):
                found["tuning"][setting][arm] = mine
            if not self.trials_left(setting, arm) and all("error" in one for one in same):
                self.tuned(setting, arm)["trials"] = []  # none to go on with: tried again
    there = {
        (s, arm, seed) for s, arms in before.get("runs", {}).items() for arm, mine in arms.items() for seed in mine
    }
    for setting, arm, seed in there:
        run = before["runs"][setting][arm][seed]
        known = (setting, arm) in self.pairs and int(seed) in study.seeds and self.best(setting, arm) is not None
        if known and run["digest"] == digest(self.run(setting, arm, int(seed))):
            self.ran(setting, arm)[seed] = run
    kept = sum(len(mine) for arms in found["runs"].values() for mine in arms.values())
    if kept < len(there):
        other = out / f"comparison-{xxhash.xxh3_64_hexdigest((out / FILE).read_bytes())[:8]}.json"
        write(other, (out / FILE).read_bytes())
        log.warning(
            "%d runs in %s are not of this study as it stands; they stay in %s", len(there) - kept, out / FILE, other
        )
    return self


def scored(run: Mapping[str, Any], score: str) -> float | None:
    """What a trial is judged by: accuracy as runs are, over the last evaluations; of clients, all in the end."""
    value = late(run["curve"], score) if score == "accuracy" else run["summary"].get(score)
    return None if value is None else float(value)


def processor() -> str:
    """The model of this machine's processor, as far as it can be known."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
