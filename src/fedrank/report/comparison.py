"""The page of a comparison: what may be concluded, then what it rests on, setting by setting."""

import shlex
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from fedrank.report import plots
from fedrank.report.arms import setting
from fedrank.report.compared import Comparison
from fedrank.report.page import WHENCE, Block, Chart, Code, Facts, Page, Row, Section, Table, Text
from fedrank.studies import tables
from fedrank.studies.claims import SCORES
from fedrank.told import portable
from fedrank.units import duration, number, share, within


def page(found: Comparison) -> Page:
    study, axes = found.study, dict[str, str]()
    sections = [conclusions(found)]
    for at, name in enumerate(found.settings):
        sections += setting(found, name, f"s{at}", f"{name}: " if len(found.settings) > 1 else "")
    sections += [section for section in (tuning(found), failures(found), again(found)) if section is not None]
    for chart in (block for section in sections for block in section.blocks if isinstance(block, Chart)):
        axes |= plots.offered(chart.axes)
    ordered = {name: axes[name] for name in plots.AXES if name in axes}
    seeds = len(study.get("seeds") or [])
    return Page(
        title=str(study.get("title") or "Comparison"), kicker="Comparison",
        lead=f"{_counted(len(found.arms), 'arm')}, {_counted(len(found.settings), 'setting')}, "
             f"{_counted(seeds, 'seed')}. Judged by {found.score.replace('_', ' ')}.",
        status=status(found), sections=sections, axes=ordered,
    )  # fmt: skip


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def status(found: Comparison) -> tuple[Literal["done", "running", "waiting", "stopped"], str]:
    done, planned, failed = found.done, found.planned, len(found.part("failures"))
    more = f", {failed} failed" if failed else ""
    if found.finished:
        return "done", f"Finished: {done} of {planned} runs{more}."
    if found.working:
        return ("running" if done else "waiting"), f"Running: {done} of {planned} runs{more}."
    return "stopped", f"Not finished: {done} of {planned} runs{more}, and no process on this machine is at it."


def conclusions(found: Comparison) -> Section:
    """First of all: what was asked, and what may be concluded; before all runs are played, and of unlike arms, nothing."""
    blocks: list[Block] = [
        Text(f"{name.replace('_', ' ')}: {text}", "note") for name, text in (found.study.get("about") or {}).items()
    ]
    if not found.finished or not found.part("fair"):
        blocks.append(Text(f"Not finished: {found.done} of {found.planned} runs, so nothing is concluded."))
        open = "not finished"
    else:
        fair, notes = found.part("fair"), len(found.part("fair")["notes"]) > 0
        lines = tables.said(found.found)
        tone: Literal["strong", "bad"] = "strong" if fair["verdict"] else "bad"
        blocks += [Text(line, tone) for line in lines[: len(lines) - notes]]
        if fair["verdict"]:
            apart = f", but for {', '.join(varied)}, which it is about" if (varied := found.study.get("varies")) else ""
            same = "the arms were given the same data, seeds, work and number of trials"
            blocks.append(Text(f"A fair comparison: {same}{apart}.", "good"))
        blocks += [Text(line, "note") for line in lines[len(lines) - notes :]]
        open = "" if fair["verdict"] else "nothing is concluded"
    if found.study.get("claims"):
        blocks.append(claims(found, open))
    if found.part("results") and (rows := tables.across(found.found)):
        said = f"{found.score.replace('_', ' ').capitalize()} in the end, by setting: mean ± standard deviation over the seeds"
        blocks.append(Table(["Arm", *rows[0][1:-1], "Mean"], rows[1:], title=said))
    return Section("conclusions", "What may be concluded", blocks)


def claims(found: Comparison, open: str) -> Table:
    """What was claimed beforehand, and what the runs say of it. open: why none is judged yet, if so."""
    rows = []
    for name, claim in found.study["claims"].items():
        judged = {} if open else found.part("claims").get(name) or {}
        ours = "; ".join(f"{s}: {_found(claim['of'], one)}" for s, one in judged.get("settings", {}).items())
        rows.append([str(claim["claim"]), ours or "–", open or str(judged.get("verdict", "–"))])
    return Table(
        ["Claim", "Found, with 95 % intervals", "Verdict"],
        rows,
        left=3,
        title="Claims, as written down before the runs",
    )


def _found(of: str, one: Row) -> str:
    return str(one.get("why", "–")) if one.get("mean") is None else within(one["mean"], one["interval"], of in SCORES)


# ---- tuning, failures, once more


def tuning(found: Comparison) -> Section | None:
    """The knobs that were tried for each arm, and what came of each."""
    trials = [
        (s, arm, trial, mine)
        for s, arms in found.part("tuning").items()
        for arm, mine in (arms or {}).items()
        for trial in mine.get("trials") or []
    ]
    if not trials:
        return None
    several = len(found.part("tuning")) > 1
    blocks: list[Block] = []
    knobs = list(dict.fromkeys(knob for _, _, trial, _ in trials for knob in trial.get("knobs") or {}))
    for at, knob in enumerate(knobs):
        if (chart := _tried(found, trials, knob, at)) is not None:
            blocks.append(chart)
    rows, failed = list[list[str]](), any("error" in trial for _, _, trial, _ in trials)
    for s, arm, trial, mine in trials:
        best = "yes" if trial.get("knobs") == mine.get("best") else "no"
        rows.append([
            *([s] if several else []), arm, _knobs(trial.get("knobs") or {}),
            *([str(trial.get("error", "–"))[:300]] if failed else []), _score(trial.get("score")),
            duration(trial.get("seconds")), best,
        ])  # fmt: skip
    words = [*(["Setting"] if several else []), "Arm", "Knobs", *(["Error"] if failed else [])]
    blocks.append(Table([*words, "Score", "Took", "Chosen"], rows, left=len(words), title="Every trial"))
    edges = [
        f"{arm} ({', '.join(mine['edge'])})"
        for arms in found.part("tuning").values()
        for arm, mine in arms.items()
        if mine.get("edge")
    ]
    if edges:
        said = f"The best value lies at the edge of what was tried for: {', '.join(edges)}. A wider search might do better."
        blocks.append(Text(said, "note"))
    return Section("tuning", "Tuning", blocks, "Knobs are searched on a validation share, from which no result is.")


def _tried(found: Comparison, trials: Sequence[tuple[str, str, Row, Row]], knob: str, at: int) -> Chart | None:
    points = [
        {"x": trial["knobs"][knob], "y": trial["score"], "series": arm, "label": s}
        for s, arm, trial, _ in trials
        if isinstance((trial.get("knobs") or {}).get(knob), int | float) and trial.get("score") is not None
    ]
    if not points:
        return None
    values = [point["x"] for point in points]
    order = [arm for arm in found.arms if any(point["series"] == arm for point in points)]
    y = (found.score.replace("_", " ").capitalize(), plots.SHARE)
    wide = min(values) > 0 and max(values) / min(values) >= 8
    spec = plots.points(points, order, (knob, "~g"), y, wide, found.arms)
    top = max(points, key=lambda point: float(point["y"]))
    said = f"{len(points)} trials from {min(values):g} to {max(values):g}; "
    said += f"the best of all, {top['series']} at {top['x']:g}, has {share(top['y'])}."
    table = Table(["Arm", knob, "Score"], [[p["series"], f"{p['x']:g}", _score(p["y"])] for p in points])
    return Chart(f"tried-{at}", f"Trials by {knob}", said, spec, table)


def _knobs(knobs: Row) -> str:
    written = (f"{value:g}" if isinstance(value, float) else str(value) for value in knobs.values())
    return ", ".join(f"{name}={value}" for name, value in zip(knobs, written, strict=True)) or "–"


def _score(value: Any) -> str:
    return share(value) if value is None or 0 <= value <= 1 else number(value)


def failures(found: Comparison) -> Section | None:
    failed = found.part("failures")
    if not failed:
        return None
    rows = [
        ["–" if (value := one.get(name)) is None else str(value) for name in ("setting", "arm", "seed")]
        + [str(one.get("error", ""))[:300]]
        for one in failed
    ]
    return Section("failures", "Failures", [Table(["Setting", "Arm", "Seed", "Error"], rows, left=4)])


def again(found: Comparison) -> Section:
    """The study, the command, the machine and what was forecast."""
    folder = shlex.quote(found.path.resolve().name)
    command = f"fedrank compare {folder}/study.yaml --out {folder}"
    if runs := found.found.get("runs_folder"):
        command += f" --runs {shlex.quote(str(runs))}"
    walls = [
        run.get("seconds") or 0.0 for s in found.settings for arm in found.arms for run in found.runs(s, arm).values()
    ]
    figures = [("fedrank", str(found.found.get("version") or "–"), "")]
    if walls:
        figures.append(("Wall time of the runs", duration(sum(walls, 0.0)), f"{len(walls)} runs, added up"))
    blocks: list[Block] = [Code(command, "Command"), Text(WHENCE, "note"), Facts(figures)]
    for name, title in (
        ("study", "The study as it was resolved"),
        ("machine", "The machine"),
        ("forecast", "What was forecast"),
    ):
        if part := found.part(name):
            told = _portable(part) if name == "study" else part
            blocks.append(Code(yaml.safe_dump(told, sort_keys=False), title, folded=True))
    return Section("again", "Run it again", blocks)


def _portable(study: Row) -> dict[str, Any]:
    """The study without what is of one machine in the parts of its configs."""
    told = {**study, "base": portable(study.get("base") or {})}
    told |= {
        key: {name: part and portable(part) for name, part in (study.get(key) or {}).items()}
        for key in ("settings", "arms")
    }
    if tuning := study.get("tuning"):
        told["tuning"] = {**tuning, "config": portable(tuning.get("config") or {})}
    return told
