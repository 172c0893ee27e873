"""The page of one run: how far it is, what it reached, what it took, and how to run it again."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import yaml

from fedrank import config as settings
from fedrank.ledger import OF_TEXTS
from fedrank.report import plots
from fedrank.report.adapters import ranks
from fedrank.report.clients import clients, failures, fleet
from fedrank.report.page import WHENCE, Block, Chart, Code, Facts, Page, Row, Section, Table, Text
from fedrank.report.played import Played, known, thinned
from fedrank.studies.configs import flattened
from fedrank.told import CLIENTS, UNPROTECTED, computed, counted, last, portable, tested, total
from fedrank.units import duration, energy, memory, number, share, size

MEASURES = {  # of texts: its name, and how it is written
    "perplexity": ("Perplexity", number), "choice_accuracy": ("Likeliest choice right", share),
    "choice_accuracy_per_byte": ("Likeliest choice right, per byte", share), "exact_match": ("Exact match", share),
    "bleu": ("BLEU", number), "rouge_l": ("ROUGE-L", number),
}  # fmt: skip
assert MEASURES.keys() == set(OF_TEXTS)
PARTS = (("adapter up", "adapter_bytes_up"), ("adapter down", "adapter_bytes_down"), ("head up", "head_bytes_up"), ("head down", "head_bytes_down"))  # fmt: skip
OWN = "clients, in the mean"


def page(run: Played) -> Page:
    """All that a run directory tells."""
    config = run.config
    rows = summed(run.rounds)
    sections = [
        glance(run), progress(run, rows), *costs(run), ranks(run, rows), clients(run), fleet(run), privacy(run),
        failures(run), again(run),
    ]  # fmt: skip
    data, model = last(run.facts.get("data") or config.data.name or config.data.path), last(config.model.name)
    who = "sites" if (count := counted(run.facts)) is None else f"{count:,} clients"
    return Page(
        title=f"{config.method['name']} on {data}", kicker="Federated run",
        lead=f"{model}, rank {config.adapter.rank}; {who}, {config.rounds.cohort} a round; task {config.task}.",
        status=status(run), sections=[section for section in sections if section is not None],
        axes=plots.offered(plots.along(rows)[1]),
    )  # fmt: skip


def scored_on(run: Played) -> str:
    """What `accuracy` is of: the global model on the server's rows, or, where it has none, clients as they predict."""
    rows = tested(run.facts, {"data": {"split": run.config.data.split}})
    return "clients, over all rows" if rows == CLIENTS else f"global model, {rows} rows"


def status(run: Played) -> tuple[Literal["done", "running", "waiting", "stopped"], str]:
    """How far it is; said aloud when it changes."""
    count, done = run.config.rounds.count, len(run.rounds)
    last = next((row for row in reversed(run.rounds) if row.get("accuracy") is not None), None)
    score = "" if last is None else f", accuracy {share(last['accuracy'])} after round {last['round']}"
    if run.finished:
        return "done", f"Finished: {done} of {count} rounds{score}."
    if run.working:
        if not done:
            return "waiting", f"Running: no round of {count} has ended yet."
        walls = known(run.rounds, "wall_seconds")
        left = f"; some {duration(statistics.fmean(walls) * (count - done))} left" if walls and done < count else ""
        return "running", f"Running: {done} of {count} rounds{score}{left}."
    return "stopped", f"Not finished: {done} of {count} rounds{score}, and no process on this machine is at it."


def summed(rounds: Sequence[Row]) -> list[dict[str, Any]]:
    """Rounds with the sums so far that a chart may run along; None from where a run does not tell."""
    sums = {
        "bytes": _running([total(row.get(f"bytes_{way}") for way in ("up", "down")) for row in rounds]),
        "joules": _running([row.get("device_joules") for row in rounds]),
        "seconds": [row.get("clock_seconds") for row in rounds],
    }
    return [{**row, **{name: values[at] for name, values in sums.items()}} for at, row in enumerate(rounds)]


def _running(values: Sequence[float | int | None]) -> list[float | int | None]:
    if None in values:
        return [None] * len(values)
    return list(accumulate(value for value in values if value is not None))


def glance(run: Played) -> Section:
    """The figures of the end, or of now."""
    if not run.rounds:
        return Section("glance", "At a glance", [Text("No round has ended yet, so there is nothing to show.")])
    last = run.rounds[-1]
    scored = [row for row in run.rounds if row.get("accuracy") is not None or row.get("personal_accuracy") is not None]
    end = run.summary or (scored[-1] if scored else {})
    shown: list[tuple[str, str, str]] = []

    def figure(title: str, value: Any, write: Callable[[Any], str], more: str = "") -> None:
        if value is not None:
            shown.append((title, write(value), more))

    word, majority, (who, _, on) = run.accuracy, run.summary.get("majority"), scored_on(run).partition(", ")
    figure(
        f"{word}, {'clients' if who == 'clients' else 'global'}",
        end.get("accuracy"),
        share,
        f"{on}; majority class {share(majority)}" if majority else on,
    )
    theirs = end.get("personal_majority")
    figure(f"{word}, clients' mean", end.get("personal_accuracy"), share, f"their majority classes {share(theirs)}" if theirs else "")  # fmt: skip
    figure("Worst tenth of clients", end.get("personal_worst_decile"), share, "mean of their accuracy")
    for name, (title, write) in MEASURES.items():
        own = end.get(f"personal_{name}")
        figure(title, end.get(name), write, f"clients' mean {write(own)}" if own is not None else "")
    sums = {name: total(row.get(name) for row in run.rounds) for name in ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "device_joules")}  # fmt: skip
    if sums["bytes_up"] is not None:
        figure("Bytes up", sums["bytes_up"], size, f"adapter {size(sums['adapter_bytes_up'])}")
        figure("Bytes down", sums["bytes_down"], size, f"adapter {size(sums['adapter_bytes_down'])}")
    figure("Device time", last.get("clock_seconds"), duration, "simulated, the slowest of each round")
    figure("Energy of devices", sums["device_joules"], energy)
    figure("Largest memory", max(known(run.rounds, "peak_memory_bytes"), default=None), memory, "of a client")
    start = sum(run.common[0]["ranks"].values()) if run.common else None
    figure("Components", last.get("components"), str, f"{start} after round {run.common[0]['round']}" if start else "")
    figure("Modules alive", last.get("modules_alive"), str, f"of {run.summary['modules']}" if run.summary else "")
    figure("Epsilon spent", last.get("epsilon"), number, f"at delta {last['delta']:g}" if last.get("delta") else "")
    return Section("glance", "At a glance", [Facts(shown)])


# ---- over rounds


def scores(
    id: str, title: str, rows: Sequence[Row], names: Sequence[tuple[str, str]], format: str, write: Callable[[Any], str]
) -> Chart | None:
    """The lines of these columns, by their names; None where no round has any."""
    there = [(label, name) for label, name in names if known(rows, name)]
    if not there:
        return None
    parts = {label: thinned([row for row in rows if row.get(name) is not None]) for label, name in there}
    points = [
        {**{axis: row.get(axis) for axis in plots.AXES}, "series": label, "value": row[name]}
        for label, name in there
        for row in parts[label][0]
    ]
    note = max(note for _, note in parts.values())
    shown = [row for row in rows if any(row.get(name) is not None for _, name in there)]
    spec, axes = plots.lines(points, [label for label, _ in there], title, format)
    said = []
    for label, name in there:
        values = known(rows, name)
        said.append(f"{label}: from {write(values[0])} to {write(values[-1])}")
    table = Table(
        ["Round", *(label for label, _ in there), "Bytes so far", "Device time", "Energy"],
        [
            [str(row["round"]), *(write(row[name]) if row.get(name) is not None else "–" for _, name in there),
             size(row["bytes"]), duration(row["seconds"]), energy(row["joules"])]
            for row in shown
        ],
        left=0,
    )  # fmt: skip
    whole = "; ".join(said)
    return Chart(id, title, f"{whole[0].upper()}{whole[1:]}.", spec, table, axes, note)


def progress(run: Played, rows: Sequence[Row]) -> Section | None:
    word, common = run.accuracy, scored_on(run)
    charts = [
        scores("accuracy", word, rows, [(common, "accuracy"), (OWN, "personal_accuracy")], plots.SHARE, share),
        *(
            scores(name, title, rows, [(common, name), (OWN, f"personal_{name}")],
                   plots.SHARE if write is share else plots.PLAIN, write)
            for name, (title, write) in MEASURES.items()
        ),
        scores("loss", "Loss", rows, [("in training", "train_loss"), (common, "loss")], plots.PLAIN, number),
    ]  # fmt: skip
    found = [chart for chart in charts if chart is not None]
    if not found:
        return None
    early = run.config.rounds.evaluate_every
    lead = f"The model is scored every {early} rounds and after the last." if early > 1 else ""
    return Section("progress", "Progress", found, lead)


def costs(run: Played) -> list[Section]:
    """What travelled in each round."""
    rows = [row for row in run.rounds if row.get("bytes_up") is not None]
    if not rows:
        return []
    by = {row["round"]: row for row in rows}
    word, unit = plots.unit("bytes", [row["bytes_up"] + row["bytes_down"] for row in rows])
    groups = plots.binned(list(by))
    names = [*(label for label, _ in PARTS), "the rest of the frames"]
    bars = []
    for at, rounds in groups:
        parts = [statistics.fmean(by[r].get(name) or 0 for r in rounds) for _, name in PARTS]
        whole = statistics.fmean(by[r]["bytes_up"] + by[r]["bytes_down"] for r in rounds)
        values = [*parts, max(whole - sum(parts), 0.0)]
        bars += [
            {"at": at, "series": name, "value": value / unit, "rank": n}
            for n, (name, value) in enumerate(zip(names, values, strict=True))
        ]
    first, last = (row["bytes_up"] + row["bytes_down"] for row in (rows[0], rows[-1]))
    whole = sum(row["bytes_up"] + row["bytes_down"] for row in rows)
    table = Table(
        ["Round", *(label for label, _ in PARTS), "all up", "all down"],
        [[str(row["round"]), *(size(row.get(name)) for _, name in PARTS), size(row["bytes_up"]), size(row["bytes_down"])] for row in rows],
        left=0,
    )  # fmt: skip
    said = f"{size(first)} in round {rows[0]['round']}, {size(last)} in round {rows[-1]['round']}, {size(whole)} in all; all clients of a round together."
    note = "Each bar is the mean of several rounds." if len(groups) < len(by) else ""
    chart = Chart("bytes", "Bytes of each round", said, plots.bars(bars, names, f"Bytes ({word})"), table, note=note)
    tested = sum(known(run.rounds, "evaluation_bytes"))
    blocks: list[Block] = [chart]
    if tested:
        blocks.append(Text(f"Evaluation took {size(tested)} more, which is counted apart.", "note"))
    return [Section("bytes-sent", "Bytes", blocks)]


def privacy(run: Played) -> Section | None:
    """What was spent; a run without protection has none."""
    kept = run.config.privacy
    if kept.kind == "none":
        return None
    spent = [row for row in run.rounds if row.get("epsilon") is not None]
    about = Facts([
        ("Protection", kept.kind, "the server clips and noises" if kept.kind == "central" else "each client clips and noises"),
        ("Clip", f"{kept.clip:g}", "largest norm of a change"), ("Noise", f"{kept.noise:g}", "in clips"),
        ("Delta", f"{kept.delta:g}", ""),
        *([("Epsilon", number(spent[-1]["epsilon"]), f"after {len(spent)} rounds")] if spent else []),
    ])  # fmt: skip
    blocks: list[Block] = [about]
    if spent:
        chart = scores("epsilon", "Epsilon spent", summed(spent), [("epsilon", "epsilon")], plots.PLAIN, number)
        assert chart is not None
        blocks.append(replace(chart, axes={}))
    elif run.rounds:
        blocks.append(Text("Epsilon is unbounded: a round had no noise.", "bad"))
    if run.facts.get("imported"):
        blocks.append(Text(f"The run started from an imported adapter. {UNPROTECTED}", "bad"))
    blocks.append(Text("What single clients did and hold is left out of this page, as the run protects them.", "note"))
    return Section("privacy", "Privacy", blocks)


# ---- once more


def again(run: Played) -> Section:
    """The config, where it came from, and the commands; of it all no more than an export tells."""
    path, config = shlex.quote(run.path.resolve().name), portable(run.config.model_dump(mode="json"))
    numerics, began = computed(run.summary.get("numerics", {}), run.private), run.facts.get("imported")
    hashes = run.facts.get("hash") or {}
    origin = [
        ("fedrank", str(run.summary.get("version") or numerics.get("fedrank") or "–"), ""),
        ("Seed", str(run.config.seed), ""),
        *[(f"{part} rows".capitalize(), str(run.facts["rows"][part]), f"sha256 {str(digest)[:16]}" if digest else "")
          for part in (("test",) if run.private else ("train", "test"))
          if (digest := hashes.get(part)) is not None and run.facts["rows"].get(part)],
        *([("Started from", "an adapter", f"sha256 {str(began['sha256'])[:16]}")] if began else []),
    ]  # fmt: skip
    own = run.facts.get("rows", {"train": 0}).get("train") is None and run.config.engine.kind != "flower"
    if "object" in config["method"] or own:
        what = "a method of one's own" if "object" in config["method"] else "clients that bring their own rows"
        blocks: list[Block] = [
            Text(f"It was started from Python with {what}: fedrank.run() with the same runs it again.")
        ]
    else:
        lines = [f"fedrank {'import ADAPTER' if began else 'run'} {path}/config.yaml --out again"]
        lines += [f"fedrank resume {path}" + (" rounds.count=+10" if run.finished else "")]
        blocks = [Code("\n".join(lines), "Commands"), Text(WHENCE, "note")]
    plain = flattened(settings.load({"data": {"name": "any"}}).model_dump(mode="json"))
    changed = [[key, _written(value)] for key, value in flattened(config).items() if plain.get(key) != value and value is not None]  # fmt: skip
    return Section("again", "Run it again", [
        *blocks, Facts(origin),
        Table(["Setting", "Value"], changed, left=2, title="Settings that are not the defaults"),
        Code(yaml.safe_dump(config, sort_keys=False), "The whole config", folded=True),
        *([Code(yaml.safe_dump(numerics, sort_keys=False), "What bit equality hangs on", folded=True)] if numerics else []),
    ])  # fmt: skip


def _written(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
