"""The arms of one setting side by side: results, accuracy over what it took, seeds, differences, clients, ranks."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedrank.report import plots
from fedrank.report.compared import Comparison
from fedrank.report.page import Block, Chart, Row, Section, Table, Text
from fedrank.report.played import known, short
from fedrank.studies import tables
from fedrank.told import total
from fedrank.units import duration, energy, share, size

SCORES = {
    "accuracy": "Accuracy of the global model",
    "personal_accuracy": "Accuracy of clients",
    "personal_worst_decile": "Accuracy of the worst tenth of clients",
}
MEANT = {  # what a number in the results is, and one at the end of a curve
    "accuracy": ("the mean of the last five evaluations, of the second half of the rounds", "one evaluation"),
    "personal_accuracy": ("the mean of all clients, scored when the run has ended", "the mean of that round's clients"),
}


def setting(found: Comparison, name: str, id: str, before: str) -> list[Section]:
    """Its sections. id: what their ids begin with. before: what their titles do."""
    result = found.part("results").get(name) or {}
    runs = {arm: mine for arm in found.arms if (mine := found.runs(name, arm))}
    parts: list[tuple[str, str, Sequence[Block | None]]] = [
        ("results", "Results", results(found, result)),
        ("progress", "Accuracy along the way", [curves(found, id, runs, score) for score in MEANT]),
        ("seeds", "Seeds and differences", [*seeds(found, id, result), *differences(found, id, result)]),
        ("clients", "Clients", [clients(found, id, runs)]),
        ("ranks", "Ranks", [alive(found, id, runs), ranks(id, runs)]),
    ]  # fmt: skip
    sections = [
        Section(f"{id}-{key}", f"{before}{title}", [b for b in blocks if b is not None]) for key, title, blocks in parts
    ]
    there = [section for section in sections if section.blocks]
    return there or [Section(f"{id}-results", f"{before}Results", [Text("No run of this setting has ended yet.")])]


def results(found: Comparison, result: Row) -> list[Block]:
    """What was reached and what it took, in the end and up to a common target; in the words of the comparison's own tables."""
    if not result:
        return []
    reached = tables.to_target(result)
    parts = (
        ("In the end: mean ± standard deviation over the seeds", tables.final(result)),
        (f"Up to a common target: {reached[0][0].removeprefix('to ') if reached else ''}", reached),
        (
            f"Costs as multiples of {found.reference}'s, paired over seeds: mean, 95 % interval, p corrected",
            tables.ratios(result, found.reference, found.fair),
        ),
    )
    meant = "; ".join(f"{tables.NAMES[name]} is {words}" for name, (words, _) in MEANT.items())
    made = [
        Table(["Arm", *(f"{name[0].upper()}{name[1:]}" for name in rows[0][1:])], rows[1:], title=title)
        for title, rows in parts
        if rows and rows[0][1:]
    ]
    return [*made[:1], Text(f"In the end, {meant}.", "note"), *made[1:]] if made else []


def curves(found: Comparison, id: str, runs: Mapping[str, Mapping[str, Row]], score: str) -> Chart | None:
    """A line for each arm, the mean over its seeds, in a band from the lowest seed to the highest."""
    points, order, title = [], [], SCORES[score]
    for arm, seeds in runs.items():
        mine = _mean_curve([run.get("curve") or [] for run in seeds.values()], score)
        points += [{"series": arm, **point} for point in mine]
        order += [arm] * bool(mine)
    if not points:
        return None
    spec, axes = plots.lines(points, order, title, plots.SHARE, every=found.arms)
    spec["height"] = 340
    ends = {arm: [p for p in points if p["series"] == arm][-1] for arm in order}
    best = sorted(order, key=lambda arm: -ends[arm]["value"])
    reached = ", ".join(f"{arm} {share(ends[arm]['value'])}" for arm in best)
    said = f"After the last evaluated round: {reached}. That is {MEANT[score][1]}, in the mean over seeds; in the results stands "
    said += f"{MEANT[score][0]}. Bands run from the lowest seed to the highest."
    table = Table(
        ["Arm", "Round", "Mean", "Lowest", "Highest", "Bytes", "Device time", "Energy"],
        [[str(p["series"]), str(p["round"]), share(p["value"]), share(p.get("low")), share(p.get("high")), size(p["bytes"]),
          duration(p["seconds"]), energy(p["joules"])] for p in points],
    )  # fmt: skip
    return Chart(f"{id}-{score.replace('_', '-')}", f"{title} over the seeds", said, spec, table, axes)


def _mean_curve(curves: Sequence[Sequence[Row]], score: str) -> list[dict[str, Any]]:
    """Of the rounds that every seed has scored: means, the edges of the band, and means of what it took so far."""
    by: dict[int, list[Row]] = defaultdict(list)
    for curve in curves:
        for point in curve:
            if point.get(score) is not None:
                by[int(point["round"])].append(point)
    found = []
    for round, mine in sorted(by.items()):
        if len(mine) < len(curves):
            continue
        values = known(mine, score)
        band = {"low": min(values), "high": max(values)} if len(values) > 1 else {}
        sums = {
            "bytes": [total(p.get(f"bytes_{way}") for way in ("up", "down")) for p in mine],
            "seconds": [p.get("clock_seconds") for p in mine],
            "joules": [p.get("device_joules") for p in mine],
        }
        means = {
            name: None if None in v else statistics.fmean(x for x in v if x is not None) for name, v in sums.items()
        }
        found.append({"round": round, "value": statistics.fmean(values), **band, **means})
    return found


def seeds(found: Comparison, id: str, result: Row) -> list[Chart]:
    """Every seed as a dot."""
    names = dict.fromkeys((found.score, "personal_worst_decile"))
    return [chart for name in names if (chart := _dots(found, id, result, name, SCORES[name])) is not None]


def _dots(found: Comparison, id: str, result: Row, name: str, title: str) -> Chart | None:
    there = result.get("arms") or {}
    of = {arm: there[arm]["seeds"] for arm in found.arms if arm in there}
    every = {arm: there.get(arm, {}).get(name) or {} for arm in found.arms}
    arms = {arm: one for arm, one in every.items() if one.get("mean") is not None}
    if not arms:
        return None
    rows: list[dict[str, Any]] = []
    for arm, one in arms.items():
        values = {seed: v for seed, v in zip(of[arm], one["values"], strict=True) if v is not None}
        rows.append({"name": arm, "middle": one["mean"], "low": min(values.values()), "high": max(values.values())})
        rows += [{"name": arm, "value": value, "label": f"seed {seed}"} for seed, value in values.items()]
    spec = plots.ranges(rows, list(arms), title, plots.SHARE, found.arms)
    top, bottom = (pick(arms, key=lambda arm: float(arms[arm]["mean"])) for pick in (max, min))
    said = f"A dot for each seed, a bar for the mean. Highest is {top} with {share(arms[top]['mean'])}"
    said += f", lowest {bottom} with {share(arms[bottom]['mean'])}." if bottom != top else "."
    table = Table(
        ["Arm", "Mean", "Seed by seed"],
        [
            [
                arm,
                share(one["mean"]),
                ", ".join(f"{s}: {share(v)}" for s, v in zip(of[arm], one["values"], strict=True)),
            ]
            for arm, one in arms.items()
        ],
    )
    return Chart(f"{id}-dots-{name.replace('_', '-')}", f"{title}, seed by seed", said, spec, table)


def differences(found: Comparison, id: str, result: Row) -> list[Block]:
    """How far each arm is from the reference over the same seeds."""
    every = result.get("differences") or {}
    arms = [arm for arm in found.arms if arm in every and found.score in every[arm]]
    if not arms:
        return []
    rows: list[dict[str, Any]] = []
    for arm in arms:
        one = every[arm][found.score]
        low, high = one.get("interval") or (None, None)
        row: dict[str, Any] = {"name": arm, "middle": 100 * one["mean"]}
        if low is not None and high is not None:
            row |= {"low": 100 * low, "high": 100 * high}
        rows.append(row)
        rows += [{"name": arm, "value": 100 * v, "label": "a seed"} for v in one.get("values") or []]
    what = found.score.replace("_", " ")
    spec = plots.ranges(
        rows, arms, f"Difference in {what} from {found.reference} (points)", "+.3~g", found.arms, zero=True
    )
    clear = [arm for arm in arms if (p := every[arm][found.score].get("p_corrected")) is not None and p < 0.05]
    said = "A dot for each seed, a bar for the mean, a line for its 95 % interval. "
    if found.fair:
        said += f"Told apart from 0 by the corrected test at 5 %: {', '.join(clear) or 'none'}."
    head, *lines = tables.differences(result, found.reference, found.fair)
    table = Table(["Points, 95 % interval, p corrected", *head[1:]], lines)
    return [Chart(f"{id}-differences", f"Against {found.reference}", said, spec, table)]


def clients(found: Comparison, id: str, runs: Mapping[str, Mapping[str, Row]]) -> Chart | None:
    """How the accuracy of single clients spreads, all seeds together."""
    rows, lines, names = list[dict[str, Any]](), list[list[str]](), list[str]()
    for arm, mine in runs.items():
        values = sorted(float(v) for run in mine.values() for v in run.get("personal") or [] if v is not None)
        if not values:
            continue
        names.append(arm)
        cuts = np.quantile(values, (0.1, 0.25, 0.5, 0.75, 0.9)).tolist()
        rows.append({"name": arm, "low": cuts[0], "high": cuts[-1], "middle": cuts[2]})
        rows += [
            {"name": arm, "value": v, "label": f"{q} % of clients are below"} for q, v in ((25, cuts[1]), (75, cuts[3]))
        ]
        lines.append([arm, str(len(values)), *map(share, cuts), share(values[0])])
    if not names:
        return None
    spec = plots.ranges(rows, names, "Accuracy of a client on its own rows", plots.SHARE, found.arms)
    said = (
        "The bar is the median client; half of all lie between the dots, eight tenths on the line. All seeds together."
    )
    table = Table(["Arm", "Clients", "10 %", "25 %", "Median", "75 %", "90 %", "Lowest"], lines)
    return Chart(f"{id}-personal", "Accuracy over clients", said, spec, table)


def alive(found: Comparison, id: str, runs: Mapping[str, Mapping[str, Row]]) -> Chart | None:
    points, order = [], []
    for arm, mine in runs.items():
        curve = _mean_curve([run.get("curve") or [] for run in mine.values()], "modules_alive")
        points += [{"series": arm, **point} for point in curve]
        order += [arm] * bool(curve)
    if not points:
        return None
    spec, axes = plots.lines(points, order, "Modules alive", steps=True, zero=True, every=found.arms)
    ends = {arm: next(p["value"] for p in reversed(points) if p["series"] == arm) for arm in order}
    left = ", ".join(f"{arm} {value:.4g}" for arm, value in ends.items())
    table = Table(
        ["Arm", "Round", "Modules alive"], [[str(p["series"]), str(p["round"]), f"{p['value']:.4g}"] for p in points]
    )
    return Chart(f"{id}-alive", "Modules alive", f"Mean over the seeds, in the end: {left}.", spec, table, axes)


def ranks(id: str, runs: Mapping[str, Mapping[str, Row]]) -> Chart | None:
    """Modules by arms: the ranks of the end, in the mean over the seeds."""
    means: dict[str, dict[str, float]] = {}
    for arm, mine in runs.items():
        there = [run["ranks"] for run in mine.values() if run.get("ranks")]
        modules = dict.fromkeys(module for one in there for module in one)
        if there:
            means[arm] = {m: statistics.fmean(one.get(m, 0) for one in there) for m in modules}
    longest = max((list(one) for one in means.values()), key=len, default=[])
    modules = dict.fromkeys([*longest, *(m for one in means.values() for m in one)])
    if not modules:
        return None
    names = short(list(modules))
    cells = [
        {"name": names[m], "column": arm, "value": round(v, 2)}
        for arm, one in means.items()
        for m, v in one.items()
        if v
    ]
    spec = plots.cells(cells, list(reversed(names.values())), list(means), "Rank", "Arm")
    totals = ", ".join(f"{arm} {sum(one.values()):.4g}" for arm, one in means.items())
    said = f"Components of each module in the end, in the mean over the seeds; of all modules: {totals}."
    table = Table(["Module", *means], [[m, *(f"{means[arm].get(m, 0):.3g}" for arm in means)] for m in modules])
    return Chart(f"{id}-ranks", "Ranks in the end", said, spec, table)
