"""The arms of one setting side by side: results, accuracy over what it took, seeds, differences, clients, ranks."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedrank.report import plots
from fedrank.report.compared import Comparison
from fedrank.report.page import Block, Chart, Row, Section, Table, Text
from fedrank.report.played import known, short
from fedrank.units import duration, energy, share, size

SCORES = {
    "accuracy": "Accuracy",
    "personal_accuracy": "Clients' accuracy",
    "personal_worst_decile": "Worst tenth of clients",
}
CURVES = ("accuracy", "personal_accuracy")
COSTS = {  # by name: title, and of which kind its units are
    "bytes_up": ("Bytes up", "bytes"), "bytes_down": ("Bytes down", "bytes"),
    "adapter_bytes_up": ("Adapter up", "bytes"), "adapter_bytes_down": ("Adapter down", "bytes"),
    "clock_seconds": ("Device time", "seconds"), "device_joules": ("Energy", "joules"),
    "peak_memory_bytes": ("Memory", "bytes"),
}  # fmt: skip
MEASURES = {
    **{name: (title, "share") for name, title in SCORES.items()},
    "last_accuracy": ("Accuracy, last round", "share"),
    **COSTS,
}


def setting(found: Comparison, name: str, id: str, before: str) -> list[Section]:
    """Its sections. id: what their ids begin with. before: what their titles do."""
    result = found.part("results").get(name) or {}
    runs = {arm: mine for arm in found.arms if (mine := found.runs(name, arm))}
    parts: list[tuple[str, str, Sequence[Block | None]]] = [
        ("results", "Results", [*results(found, result), target(found, result)]),
        ("progress", "Accuracy along the way", [curves(found, id, runs, score) for score in CURVES]),
        ("seeds", "Seeds and differences", [*seeds(found, id, result), *differences(found, id, result)]),
        ("clients", "Clients", [clients(found, id, runs)]),
        ("ranks", "Ranks", [alive(found, id, runs), ranks(id, runs)]),
    ]  # fmt: skip
    sections = [
        Section(f"{id}-{key}", f"{before}{title}", [b for b in blocks if b is not None]) for key, title, blocks in parts
    ]
    there = [section for section in sections if section.blocks]
    return there or [Section(f"{id}-results", f"{before}Results", [Text("No run of this setting has ended yet.")])]


def results(found: Comparison, result: Row) -> list[Table]:
    """What was reached, and what it took."""
    arms = result.get("arms") or {}
    tables = []
    for title, names in (("What was reached", (*SCORES, "last_accuracy")), ("What it took", COSTS)):
        there = [name for name in names if any((arms[arm].get(name) or {}).get("mean") is not None for arm in arms)]
        rows = [
            [arm, *(_spread(arms[arm].get(n) or {}, MEASURES[n][1]) for n in there)]
            for arm in found.arms
            if arm in arms
        ]
        if there:
            said = f"{title}: mean ± standard deviation over the seeds"
            tables.append(Table(["Arm", *(MEASURES[name][0] for name in there)], rows, title=said))
    return tables


def _spread(one: Row, kind: str) -> str:
    """Mean and deviation, in the mean's unit."""
    mean, deviation = one.get("mean"), one.get("deviation")
    if mean is None:
        return "–"
    word, size = {"share": ("%", 0.01), "rounds": ("", 1.0)}.get(kind) or plots.unit(kind, [mean], least=1.0)
    spread = f" ± {deviation / size:.1f}" if deviation or (deviation is not None and kind == "share") else ""
    return f"{mean / size:.1f}{spread} {word}".strip()


def target(found: Comparison, result: Row) -> Table | None:
    """What it took until a score was reached that all have in common."""
    wanted = result.get("target") or {}
    arms = wanted.get("arms") or {}
    if wanted.get("value") is None or not arms:
        return None
    names = [
        n
        for n in COSTS
        if not n.startswith("adapter") and any((one.get(n) or {}).get("mean") is not None for one in arms.values())
    ]
    rows = [
        [arm, str(arms[arm].get("reached", "–")), _spread(arms[arm].get("round") or {}, "rounds"),
         *(_spread(arms[arm].get(name) or {}, MEASURES[name][1]) for name in names)]
        for arm in found.arms if arm in arms
    ]  # fmt: skip
    title = f"To reach {share(wanted['value'])} {str(wanted.get('score', found.score)).replace('_', ' ')}"
    return Table(["Arm", "Seeds that do", "Round", *(MEASURES[name][0] for name in names)], rows, title=title)


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
    said = f"In the end: {reached}. Bands run from the lowest seed to the highest."
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
            "bytes": [_both(p) for p in mine],
            "seconds": [p.get("clock_seconds") for p in mine],
            "joules": [p.get("device_joules") for p in mine],
        }
        means = {
            name: None if None in v else statistics.fmean(x for x in v if x is not None) for name, v in sums.items()
        }
        found.append({"round": round, "value": statistics.fmean(values), **band, **means})
    return found


def _both(point: Row) -> float | None:
    up, down = point.get("bytes_up"), point.get("bytes_down")
    return None if up is None or down is None else float(up + down)


def seeds(found: Comparison, id: str, result: Row) -> list[Chart]:
    """Every seed as a dot."""
    names = dict.fromkeys((found.score, "personal_worst_decile"))
    return [chart for name in names if (chart := _dots(found, id, result, name, SCORES[name])) is not None]


def _dots(found: Comparison, id: str, result: Row, name: str, title: str) -> Chart | None:
    every = {arm: (result.get("arms") or {}).get(arm, {}).get(name) or {} for arm in found.arms}
    arms = {arm: one for arm, one in every.items() if one.get("mean") is not None}
    if not arms:
        return None
    rows: list[dict[str, Any]] = []
    for arm, one in arms.items():
        values = [v for v in one.get("values") or [] if v is not None]
        rows.append(
            {"name": arm, "middle": one["mean"], "low": min(values, default=None), "high": max(values, default=None)}
        )
        rows += [
            {"name": arm, "value": value, "label": f"seed {n} of {len(values)}"} for n, value in enumerate(values, 1)
        ]
    spec = plots.ranges(rows, list(arms), title, plots.SHARE, found.arms)
    top, bottom = (pick(arms, key=lambda arm: float(arms[arm]["mean"])) for pick in (max, min))
    said = f"A dot for each seed, a bar for the mean. Highest is {top} with {share(arms[top]['mean'])}"
    said += f", lowest {bottom} with {share(arms[bottom]['mean'])}." if bottom != top else "."
    table = Table(
        ["Arm", "Mean", "Each seed"],
        [[arm, share(one["mean"]), ", ".join(share(v) for v in one.get("values") or [])] for arm, one in arms.items()],
    )
    return Chart(f"{id}-dots-{name.replace('_', '-')}", f"{title}, seed by seed", said, spec, table)


def differences(found: Comparison, id: str, result: Row) -> list[Block]:
    """How far each arm is from the reference over the same seeds, and the costs as multiples of its own."""
    every = result.get("differences") or {}
    arms = [arm for arm in found.arms if arm in every and found.score in every[arm]]
    if not arms:
        return []
    rows: list[dict[str, Any]] = []
    lines = []
    for arm in arms:
        one = every[arm][found.score]
        low, high = one.get("interval") or (None, None)
        row: dict[str, Any] = {"name": arm, "middle": 100 * one["mean"]}
        if low is not None and high is not None:
            row |= {"low": 100 * low, "high": 100 * high}
        rows.append(row)
        rows += [{"name": arm, "value": 100 * v, "label": "a seed"} for v in one.get("values") or []]
        p = one.get("p_corrected")
        lines.append([
            arm, _points(one["mean"]), "–" if low is None or high is None else f"{_points(low)} to {_points(high)}",
            "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
            *(_times(every[arm].get(name)) for name in ("bytes_up", "bytes_down", "clock_seconds", "device_joules")),
        ])  # fmt: skip
    what = found.score.replace("_", " ")
    spec = plots.ranges(
        rows, arms, f"Difference in {what} from {found.reference} (points)", "+.3~g", found.arms, zero=True
    )
    clear = [arm for arm in arms if (p := every[arm][found.score].get("p_corrected")) is not None and p < 0.05]
    said = "A dot for each seed, a bar for the mean, a line for its 95 % interval. "
    said += f"Told apart from 0 by the corrected test at 5 %: {', '.join(clear) or 'none'}."
    columns = ["Arm", "Points", "95 % interval", "p, corrected", "Bytes up", "Bytes down", "Device time", "Energy"]
    table = Table(columns, lines)
    return [
        Chart(f"{id}-differences", f"Against {found.reference}", said, spec, table),
        Table(columns, lines, title=f"Against {found.reference}: points, and costs as multiples of its own"),
    ]


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _times(one: Row | None) -> str:
    return "–" if not one or one.get("mean") is None else f"{one['mean']:.3g} ×"


def clients(found: Comparison, id: str, runs: Mapping[str, Mapping[str, Row]]) -> Chart | None:
    """How the accuracy of single clients spreads, all seeds together."""
    rows, lines, names = list[dict[str, Any]](), list[list[str]](), list[str]()
    for arm, mine in runs.items():
        values = sorted(float(v) for run in mine.values() for v in run.get("personal") or [] if v is not None)
        if not values:
            continue
        names.append(arm)
        cuts = [_quantile(values, q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)]
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


def _quantile(values: Sequence[float], q: float) -> float:
    """Of sorted values, between neighbours in a straight line."""
    at = q * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


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
