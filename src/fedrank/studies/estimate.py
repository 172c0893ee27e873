"""What a study will take on this machine: two rounds of each arm are timed, before anything is played."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedrank import config as settings
from fedrank import ledger
from fedrank.studies import runs as played
from fedrank.studies.comparison import Comparison
from fedrank.studies.configs import Part, located, merged
from fedrank.studies.runs import RunFailed


def forecast(comparison: Comparison) -> dict[str, Any]:
    """Hours of all that is left, as many runs at once as there are workers: a round and an evaluation of each arm timed.

    hours_of_one_core: by setting and arm. unknown: arms whose first round failed; their runs will say why.
    """
    left = {
        (setting, arm): (comparison.trials_left(setting, arm), len(comparison.seeds_left(setting, arm)))
        for setting, arm in comparison.pairs
    }
    hours, unknown = dict[str, dict[str, float]](), list[str]()
    with ThreadPoolExecutor(comparison.workers) as pool:
        try:
            asked = {
                pair: pool.submit(_timed, comparison, *pair) for pair, (trials, runs) in left.items() if trials or runs
            }
            for (setting, arm), answer in asked.items():
                trials, runs = left[setting, arm]
                try:
                    taken = answer.result()
                except RunFailed:
                    unknown.append(f"{setting}/{arm}")
                    continue
                total = runs * taken.run(comparison.study.config(setting, arm))
                total += trials * taken.run(comparison.trial(setting, arm, {})) if trials else 0.0
                hours.setdefault(setting, {})[arm] = round(total / 3600, 4)
        except BaseException:
            comparison.processes.stop()
            raise
    spent = sum(sum(arms.values()) for arms in hours.values())
    trials, runs = (sum(one[at] for one in left.values()) for at in (0, 1))
    return {
        "hours": round(spent / comparison.workers, 4), "workers": comparison.workers, "trials": trials, "runs": runs,
        "hours_of_one_core": hours, "unknown": unknown,
    }  # fmt: skip


@dataclass(frozen=True)
class Taken:
    """Seconds of all but the rounds, of a round, and of an evaluation."""

    rest: float
    round: float
    evaluation: float

    def run(self, config: Part) -> float:
        """Seconds of a run of this config."""
        rounds = settings.load(located(config)).rounds
        return self.rest + rounds.count * self.round + -(-rounds.count // rounds.evaluate_every) * self.evaluation


def _timed(comparison: Comparison, setting: str, arm: str) -> Taken:
    """As the second round of a run of two shows them: the first has more to set up. RunFailed where it fails."""
    with TemporaryDirectory(prefix="fedrank-") as folder:
        two = {"rounds": {"count": 2, "evaluate_every": 2}}
        started = time.monotonic()
        played.play(Path(folder) / "run", merged(comparison.study.config(setting, arm), two), comparison.processes)
        whole = time.monotonic() - started
        rows = ledger.read(Path(folder) / "run" / "rounds.jsonl")
    wall, evaluation = ([row[name] for row in rows] for name in ("wall_seconds", "evaluation_seconds"))
    if None in wall:  # a private run does not tell: all of it counts as rounds, which is too much
        return Taken(0.0, whole / 2, 0.0)
    return Taken(whole - sum(wall), wall[-1] - evaluation[-1], evaluation[-1])
