"""Spread over seeds, paired differences with their intervals, and a test that is corrected for how many are looked at."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

LEVEL = 0.05  # of tests; intervals are of 95 %


def spread(values: Sequence[float | int | None]) -> dict[str, Any]:
    """Mean and sample standard deviation of what there is, and the values; None where there is nothing, or one alone."""
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "deviation": stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def paired(ours: Sequence[float | int], theirs: Sequence[float | int]) -> dict[str, Any]:
    """ours - theirs over the same seeds: the mean, its 95 % interval by Student's t, and the p of the paired t-test.

    None for interval and p of fewer than two pairs; of differences that are all the same, p is None.
    """
    from scipy import stats

    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    found: dict[str, Any] = {"mean": fmean(values), "interval": None, "p": None, "values": values}
    if len(values) < 2:
        return found
    error = stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * error
    found["interval"] = [found["mean"] - half, found["mean"] + half]
    if error > 1e-12 * max(map(abs, [*ours, *theirs])):  # below, it is rounding
        found["p"] = float(2 * stats.t.sf(abs(found["mean"]) / error, len(values) - 1))
    return found


def ratio(ours: Sequence[float | int], theirs: Sequence[float | int]) -> dict[str, Any] | None:
    """ours / theirs over the same seeds: the geometric mean, its 95 % interval and p, by their logarithms as `paired`.

    None where a value is not above 0.
    """
    if min([*ours, *theirs], default=0) <= 0:
        return None
    logs = paired([math.log(x) for x in ours], [math.log(x) for x in theirs])
    interval = logs["interval"] and [math.exp(end) for end in logs["interval"]]
    values = [math.exp(x) for x in logs["values"]]
    return {"mean": math.exp(logs["mean"]), "interval": interval, "p": logs["p"], "values": values}


def holm(ps: Mapping[str, float | None]) -> dict[str, float | None]:
    """The p values corrected for their number by Holm's step-down rule (Scandinavian Journal of Statistics, 1979).

    The smallest counts as often as there are, the next once less, and none is below one before it.
    """
    known = sorted((p, name) for name, p in ps.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(ps)
    highest = 0.0
    for at, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - at)))
        found[name] = highest
    return found
