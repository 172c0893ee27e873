"""A comparison as tables: for a terminal, CSV, Markdown and LaTeX."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from fedrank.store import write
from fedrank.studies.claims import SCORES
from fedrank.studies.results import TO_TARGET
from fedrank.units import duration, energy, factor, memory, share, size
from fedrank.views import TEXTS


def _epsilon(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


FORMS: dict[str, Callable[[Any], str]] = {
    "accuracy": share, "personal_accuracy": share, "personal_worst_decile": share, "last_accuracy": share, "bytes_up": size,
    "bytes_down": size, "adapter_bytes_up": size, "adapter_bytes_down": size, "clock_seconds": duration, "device_joules": energy,
    "peak_memory_bytes": memory, "waiting_seconds": duration, "epsilon": _epsilon, "personal_majority": share, "rows_seen": lambda value: "–" if value is None else f"{value:.0f}",
    **{name: form for text, _, form in TEXTS for name in (text, f"personal_{text}")}, "round": lambda value: "–" if value is None else f"{value:.0f}",
}  # fmt: skip
NAMES = {
    "accuracy": "accuracy", "personal_accuracy": "personal", "personal_worst_decile": "worst decile", "bytes_up": "up",
    "bytes_down": "down", "bytes": "bytes", "adapter_bytes": "adapter bytes", "adapter_bytes_up": "adapter up", "adapter_bytes_down": "adapter down", "clock_seconds": "device time",
    "device_joules": "energy", "peak_memory_bytes": "memory", "waiting_seconds": "mean wait", "epsilon": "epsilon", "round": "rounds", "last_accuracy": "last round", "personal_majority": "majority",
    **{name: words if name == text else f"personal {words}" for text, words, _ in TEXTS for name in (text, f"personal_{text}")},
}  # fmt: skip
SHOWN = (
    *SCORES,
    "personal_majority",
    *(f"{whose}{name}" for name, _, _ in TEXTS for whose in ("", "personal_")),
    "epsilon",
    "bytes_up",
    "bytes_down",
    "clock_seconds",
    "waiting_seconds",
    "device_joules",
    "peak_memory_bytes",
)

WRITTEN = ("perplexity", "personal_perplexity")  # which runs of task generate alone have


def told(name: str, one: Mapping[str, Any]) -> str:
    """A measure for people: mean ± standard deviation over seeds; a share in per cent."""
    mean, deviation, form = one["mean"], one["deviation"], FORMS[name]
    if mean is None or deviation is None:
        return form(mean)
    if form is share:
        return f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
    return f"{form(mean)} ± {100 * deviation / mean:.0f} %" if mean and deviation >= 0.005 * mean else form(mean)


def final(result: Mapping[str, Any]) -> list[list[str]]:
    """Arms by what they came to in the end, a head line first."""
    unknown = {"mean": None, "deviation": None}  # to a comparison of before it was recorded
    arms = {arm: {name: mine.get(name, unknown) for name in SHOWN} for arm, mine in result["arms"].items()}
    names = [name for name in SHOWN if any(mine[name]["mean"] is not None for mine in arms.values())]
    return [["", *(NAMES[name] for name in names)]] + [
        [arm, *(told(name, mine[name]) for name in names)] for arm, mine in arms.items()
    ]


def to_target(result: Mapping[str, Any]) -> list[list[str]]:
    """Arms by what it took them to the target, a head line first; empty where there is none."""
    target = result["target"]
    if target["value"] is None:
        return []
    names = [name for name in TO_TARGET if name in ("round", *SHOWN)]
    whose = " of a round's clients" if target["score"] == "personal_accuracy" else ""
    head = f"to {target['score'].replace('_', ' ')}{whose} {share(target['value'])}"
    return [[head, "seeds", *(NAMES[name] for name in names)]] + [
        [arm, f"{mine['reached']} of {mine['played']}", *(told(name, mine[name]) for name in names)]
        for arm, mine in target["arms"].items()
    ]


def differences(result: Mapping[str, Any], baseline: str, fair: bool) -> list[list[str]]:
    """Arms by how many points their scores lie above the reference's, a head line first; empty where there are none.

    fair: whether tests are told, too.
    """
    found = result["differences"]
    names = [name for name in SCORES if any(name in one for one in found.values())]
    if not names:
        return []
    head = [f"points above {baseline}", *(NAMES[name] for name in names)]
    return [head] + [[arm, *(_difference(one.get(name), fair) for name in names)] for arm, one in found.items()]


def ratios(result: Mapping[str, Any], baseline: str, fair: bool) -> list[list[str]]:
    """Arms by their costs as parts of the reference's, a head line first; empty where there are none. fair: as above."""
    found = result["differences"]
    names = ("bytes", "adapter_bytes", "clock_seconds", "device_joules", "peak_memory_bytes")
    costs = [*names, *(f"to_target.{name}" for name in names[:-1])]
    if not (costs := [name for name in costs if any(name in one for one in found.values())]):
        return []
    head = [f"times {baseline}'s"]
    head += [NAMES[n.removeprefix("to_target.")] + ", to target" * n.startswith("to_target.") for n in costs]
    return [head] + [[arm, *(_ratio(one.get(name), fair) for name in costs)] for arm, one in found.items()]


def _difference(one: Mapping[str, Any] | None, fair: bool) -> str:
    if one is None:
        return "–"
    text = f"{100 * one['mean']:+.1f}"
    if one["interval"] is not None:
        text += f" ({100 * one['interval'][0]:+.1f} to {100 * one['interval'][1]:+.1f})"
    return text + _p(one, fair)


def _ratio(one: Mapping[str, Any] | None, fair: bool) -> str:
    if one is None:
        return "–"
    mean, interval = one["mean"], one["interval"]
    if interval is None or interval[1] - interval[0] < 0.01 * mean:
        return factor(mean)
    return f"{factor(mean)} ({factor(interval[0])} to {factor(interval[1])}){_p(one, fair)}"


def _p(one: Mapping[str, Any], fair: bool) -> str:
    """What the corrected test says, if anything may be concluded from it."""
    if not fair or one.get("p_corrected") is None:
        return ""
    return ", p < 0.001" if one["p_corrected"] < 0.001 else f", p {one['p_corrected']:.3f}"


def across(found: Mapping[str, Any]) -> list[list[str]]:
    """Arms by the judged score in each setting, and its mean over them, a head line first; empty where there is but one."""
    score, results = found["study"]["score"], found["results"]
    if len(results) < 2:
        return []
    rows = [["", *results, "mean"]]
    for arm in found["study"]["arms"]:
        mine = [one["arms"][arm][score] for one in results.values()]
        whole = all(one["mean"] is not None for one in mine)
        rows.append(
            [arm, *(told(score, one) for one in mine), share(fmean(one["mean"] for one in mine) if whole else None)]
        )
    return rows


def all_of(found: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Every table of a comparison with what it is of."""
    baseline = found["study"]["reference"] or next(iter(found["study"]["arms"]))
    several, fair, result = len(found["results"]) > 1, found["fair"]["verdict"], []
    tested = ", 95 % interval" + ", p corrected for the number of arms" * fair
    if rows := across(found):
        result.append((f"{NAMES[found['study']['score']]}, by setting", rows))
    for setting, one in found["results"].items():
        where = f"{setting}: " if several else ""
        parts = (
            ("in the end: mean ± standard deviation over the seeds; accuracy of the last five evaluations", final(one)),
            ("up to a common target: mean ± standard deviation over the seeds that reach it", to_target(one)),
            (f"scores, paired over the seeds: mean{tested}", differences(one, baseline, fair)),
            (f"costs, paired over the seeds: geometric mean{tested}", ratios(one, baseline, fair)),
        )
        result += [(f"{where}{what}", rows) for what, rows in parts if rows]
    return result


# ---- forms


def terminal(found: Mapping[str, Any], width: int) -> list[Table]:
    """Every table for a terminal of so many characters: what does not fit beside the rest goes on below it."""
    return [
        _table(title if not at else "", lines)
        for title, rows in all_of(found)
        for at, lines in enumerate(_folded(rows, width))
    ]


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if at else "left", no_wrap=at > 0)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _folded(rows: Sequence[Sequence[str]], width: int) -> Iterator[list[list[str]]]:
    """The columns in groups that fit, each behind the first column, which says whose line it is."""
    first, *columns = zip(*rows, strict=True)
    group: list[Sequence[str]] = []
    for column in columns:
        if group and sum(max(map(len, one)) + 2 for one in (first, *group, column)) > width:
            yield [list(line) for line in zip(first, *group, strict=True)]
            group = []
        group.append(column)
    yield [list(line) for line in zip(first, *group, strict=True)]


def markdown(found: Mapping[str, Any]) -> str:
    from tabulate import tabulate

    parts = [
        f"**{title}**\n\n{tabulate(rows, head, 'github', disable_numparse=True)}"
        for title, (head, *rows) in all_of(found)
    ]
    return "\n\n".join([*parts, *said(found)]) + "\n"


def latex(found: Mapping[str, Any]) -> str:
    """Tables for the package booktabs; what may be concluded, in comments before them."""
    from tabulate import tabulate

    parts = ["\n".join(f"% {line}" for line in said(found))]
    for title, (head, *rows) in all_of(found):
        parts.append(
            f"% {title}\n" + tabulate(rows, head, "latex_booktabs", disable_numparse=True).replace("±", r"$\pm$")
        )
    return "\n\n".join(parts) + "\n"


def summaries(found: Mapping[str, Any]) -> str:
    """CSV for a spreadsheet: a line for each setting, arm and measure, with its spread and how far it is from the reference.

    difference: of scores ours - theirs, of costs ours / theirs; empty for the reference itself. p only where a comparison is fair.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["setting", "arm", "measure", "to_target", "seeds", "mean", "deviation", "difference", "low", "high",
                    "p", "p_corrected"])  # fmt: skip
    for setting, one in found["results"].items():
        for arm, mine in one["arms"].items():
            for part, before in ((mine, ""), (one["target"]["arms"][arm], "to_target.")):
                for name, its in part.items():
                    if not isinstance(its, dict) or its["mean"] is None:
                        continue
                    there = one["differences"].get(arm, {}).get(before + name) or {}
                    low, high = there.get("interval") or (None, None)
                    tests = [there.get("p"), there.get("p_corrected")] if found["fair"]["verdict"] else [None, None]
                    seeds = sum(value is not None for value in its["values"])
                    lines.writerow([setting, arm, name, bool(before), seeds, its["mean"], its["deviation"], there.get("mean"),
                                    low, high, *tests])  # fmt: skip
    return text.getvalue()


def values(found: Mapping[str, Any]) -> str:
    """CSV of every run's own numbers, for a program to read: a line for each setting, arm, seed and measure."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["setting", "arm", "seed", "measure", "value", "to_target"])
    for setting, one in found["results"].items():
        for arm, mine in one["arms"].items():
            for part, up_to in ((mine, False), (one["target"]["arms"][arm], True)):
                for name in (name for name, one in part.items() if isinstance(one, dict)):
                    for seed, value in zip(part["seeds"], part[name]["values"], strict=True):
                        lines.writerow([setting, arm, seed, name, "" if value is None else value, up_to])
    return text.getvalue()


def said(found: Mapping[str, Any]) -> list[str]:
    """What may be concluded, in sentences: whether it is a fair comparison first."""
    fair, several = found["fair"], len(found["results"]) > 1
    if not fair["verdict"]:
        return [f"Not a fair comparison, so nothing is concluded: {'; '.join(fair['why'])}.", *_notes(fair)]
    lines = [
        f"{setting}: {one['conclusion']}" if several else one["conclusion"] for setting, one in found["results"].items()
    ]
    perplexities = (
        arm[n]["mean"] for one in found["results"].values() for arm in one["arms"].values() for n in WRITTEN
    )
    if any(one is not None for one in perplexities):
        lines.append("Accuracy is the share of the answers' tokens that are the likeliest after those before them.")
    return [*lines, *_notes(fair)]


def _notes(fair: Mapping[str, Any]) -> list[str]:
    return [f"Note: {'; '.join(fair['notes'])}."] if fair["notes"] else []


def save(found: Mapping[str, Any], out: Path) -> None:
    """The tables beside comparison.json."""
    written = {"comparison.csv": summaries(found), "seeds.csv": values(found), "comparison.md": markdown(found),
               "comparison.tex": latex(found)}  # fmt: skip
    for name, text in written.items():
        write(out / name, text.encode())
