"""The search for an arm's knobs: which values to try next, given what those before scored."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedrank.studies.study import Knob, Range

EDGE = 0.1  # of a range, from either end


def count(knobs: Mapping[str, Knob], trials: int) -> int:
    """How many trials a search makes: as many as lists have combinations, but no more than `trials`."""
    return min(trials, math.prod(trials if isinstance(knob, Range) else len(knob) for knob in knobs.values()))


def search(knobs: Mapping[str, Knob], trials: int, seed: int, score: Callable[[dict[str, Any]], float]) -> None:
    """Score as many settings of the knobs as `count` says.

    Of lists alone, combinations are drawn and none twice; where there is a range, Optuna's tree-structured Parzen estimator
    proposes. The same scores give the same proposals, so that a search that was cut short goes on as it would have.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lists = {key: list(knob) for key, knob in knobs.items() if not isinstance(knob, Range)}
    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, trials // 2))
    if len(lists) == len(knobs):
        sampler = optuna.samplers.GridSampler(lists, seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(
        lambda trial: score({key: _next(trial, key, knob) for key, knob in knobs.items()}), count(knobs, trials)
    )


def _next(trial: Any, key: str, knob: Knob) -> Any:
    if isinstance(knob, Range):
        return trial.suggest_float(key, knob.low, knob.high, log=knob.log)
    return trial.suggest_categorical(key, list(knob))


def chosen(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The knobs of the best trial; the first of equals."""
    return dict(max(trials, key=lambda trial: trial["score"])["knobs"])


def edges(knobs: Mapping[str, Knob], values: Mapping[str, Any]) -> list[str]:
    """Knobs whose best value is the first or last number of a list of three or more, or within a tenth of a range's end.

    There a better one may lie outside of what was searched.
    """
    return [key for key, knob in knobs.items() if _at_edge(knob, values[key])]


def _at_edge(knob: Knob, value: Any) -> bool:
    if not isinstance(knob, Range):
        numbers = [one for one in knob if isinstance(one, int | float) and not isinstance(one, bool)]
        return len(numbers) == len(knob) > 2 and value in (min(numbers), max(numbers))
    low, high, at = (math.log(x) if knob.log else x for x in (knob.low, knob.high, value))
    return not EDGE <= (at - low) / (high - low) <= 1 - EDGE
