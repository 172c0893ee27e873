"""A study from its forecast to its comparison, told as it goes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fedrank.engines.workers import cores
from fedrank.store import Store, StoreError, write
from fedrank.studies.comparison import Event, Key, opened
from fedrank.studies.estimate import forecast
from fedrank.studies.record import FILE, RESOLVED
from fedrank.studies.study import Study, read
from fedrank.studies.tables import save


def compare(
    source: str | Path | Study, *overrides: str, out: str | Path, watch: Callable[[Event], None] = lambda event: None
) -> dict[str, Any]:
    """Play a study, a YAML file or an object, and give what comparison.json then holds. watch: called with every event.

    Raises ConfigError or StoreError with what to mend.
    """
    study = source if isinstance(source, Study) else read(source, overrides)
    last: Event = {}
    for last in play(study, Path(out)):
        watch(last)
    return dict(last["comparison"])


def play(
    study: Study, out: Path, runs: Path | None = None, workers: int | None = None, ahead: bool = False
) -> Iterator[Event]:
    """Play a study: its forecast, each trial and run as it ends, and in the end the comparison, with its tables.

    out: where comparison.json grows; what it already holds of the same runs is not played again, and a run that was cut
    short goes on. runs: where run directories go; by default out/runs. workers: runs at once, by default one a core. ahead:
    stop after the forecast. A run that fails is told and left out. StoreError where comparison.json cannot be read, or
    another process plays there.
    """
    if (out / RESOLVED).exists() and not (out / FILE).exists():  # somebody's own
        raise StoreError(
            f"{out / RESOLVED} is there, where the study as it is resolved would be written; another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with Store(out).locked():
        comparison = opened(study, out, runs or out / "runs", workers or cores())
        expected = forecast(comparison)
        comparison.found["forecast"] = comparison.found["forecast"] or expected  # of the first start, where it goes on
        yield {"event": "forecast", **expected}
        if ahead:
            return
        comparison.save()
        write(out / RESOLVED, yaml.safe_dump(comparison.found["study"], sort_keys=False).encode())
        done, seconds, all_ = 0, list[float](), expected["trials"] + expected["runs"]

        def played(keys: list[Key]) -> Iterator[Event]:
            nonlocal done
            for event in comparison.together(keys):
                if event["event"] == "run":
                    done += 1
                    seconds.append(event["wall_seconds"])
                    left = fmean(seconds) * (all_ - done) / comparison.workers
                    yield {**event, "at": done, "of": all_, "seconds_left": left}
                elif event["event"] == "failed":
                    yield event

        yield from played([(s, arm, None) for s, arm in comparison.searched if comparison.best(s, arm) is None])
        yield from played(
            [
                (setting, arm, seed)
                for seed in study.seeds  # all arms of a seed first, so that what is there can be compared early
                for setting, arm in comparison.pairs
                if seed in comparison.seeds_left(setting, arm) and comparison.best(setting, arm) is not None
            ]
        )
        comparison.save()
        save(comparison.found, out)
        yield {"event": "end", "path": str(out / FILE), "comparison": comparison.found}
