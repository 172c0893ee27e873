"""What a person sees of a run: bars and a live table, a line per round, JSON events, a closing summary."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedrank.units import duration, energy, memory, number, share, size


class Output(StrEnum):
    live = "live"
    plain = "plain"
    json = "json"
    quiet = "quiet"


def _quiet(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from events


def _json(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in events:
        print(json.dumps(event), flush=True)
        yield event


def _plain(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    console = Console()
    for event in events:
        if event["event"] in ("start", "resume"):
            console.print(_about(event), markup=False, highlight=False, soft_wrap=True)
        elif event["event"] == "round":
            values = zip(columns([event]), cells(event), strict=True)
            console.print("  ".join(f"{name} {value}" for name, value in values), highlight=False, soft_wrap=True)
        elif event["event"] == "end":
            console.print(summary(event))
        yield event


def _live(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    console = Console()
    if not console.is_terminal:
        yield from _plain(events)
        return
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
    rounds, clients = bars.add_task("rounds", total=None), bars.add_task("clients", total=None)
    recent: list[dict[str, Any]] = []
    with Live(console=console, refresh_per_second=4) as live:
        for event in events:
            match event["event"]:
                case "start" | "resume":
                    console.print(_about(event), markup=False, highlight=False)
                case "cohort":
                    bars.update(rounds, total=event["rounds"], completed=event["round"] - 1)
                    bars.reset(clients, total=len(event["clients"]))
                case "client":
                    bars.advance(clients)
                    if not event["ok"]:
                        console.print(
                            f"[yellow]round {event['round']}: client {event['client']} failed: {escape(event['error'])}[/]",
                            highlight=False,
                        )
                case "refused" | "not_merged":
                    console.print(
                        f"[yellow]round {event['round']}: client {event['client']} {escape(event['error'])}[/]",
                        highlight=False,
                    )
                case "round":
                    bars.update(rounds, completed=event["round"])
                    recent = [*recent[-11:], event]
                case "end":
                    bars.update(rounds, visible=False)
                    bars.update(clients, visible=False)
            shown = table(recent) if event["event"] == "end" else Group(table(recent), bars)
            live.update(shown, refresh=event["event"] == "round")
            yield event
    console.print(summary(event))


VIEWS: dict[Output, Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]] = {
    Output.live: _live, Output.plain: _plain, Output.json: _json, Output.quiet: _quiet,
}  # fmt: skip


def study(event: dict[str, Any]) -> None:
    """A line for each run of a study, its forecast before, its tables and conclusions after."""
    from fedrank.studies import tables

    console = Console()
    match event["event"]:
        case "forecast":
            unknown = (
                f"; not known of {', '.join(event['unknown'])}, whose first round failed" if event["unknown"] else ""
            )
            lines = [
                f"forecast: {duration(3600 * event['hours'])} for {event['trials']} trials and {event['runs']} runs, "
                f"{event['workers']} at once{unknown}"
            ]
        case "run":
            what = "trial" if event["seed"] is None else f"seed {event['seed']}"
            knobs = " ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in event["knobs"].items()
            )
            score = f"score {share(event['score'])}"
            if "error" in event:
                score = f"counts as the worst: {event['error']}"
            lines = [
                f"{event['at']}/{event['of']}  {event['setting']}  {event['arm']}  {what}  {knobs}  {score}  "
                f"{duration(event['wall_seconds'])}, about {duration(event['seconds_left'])} left"
            ]
        case "failed":
            lines = [_said(event)]
        case "end":
            for table in tables.terminal(event["comparison"], console.width):
                console.print(table, "")
            lines = [*tables.said(event["comparison"]), f"comparison: {event['path']}"]
            if event["comparison"]["failures"]:
                lines.append("What failed is played again when the study is started again.")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(event: dict[str, Any]) -> None:
    print(json.dumps({name: value for name, value in event.items() if name not in ("run", "comparison")}), flush=True)


def _failed(event: dict[str, Any]) -> None:
    if event["event"] == "failed":
        print(_said(event), file=sys.stderr)


def _said(event: dict[str, Any]) -> str:
    what = "tuning" if event["seed"] is None else f"seed {event['seed']}"
    return f"failed: {event['setting']}  {event['arm']}  {what}: {event['error']}"


STUDIES: dict[Output, Callable[[dict[str, Any]], None]] = {
    Output.live: study, Output.plain: study, Output.json: _line, Output.quiet: _failed,
}  # fmt: skip

TEXTS = (
    ("perplexity", "perplexity", number), ("choice_accuracy", "likeliest choice", share),
    ("choice_accuracy_per_byte", "likeliest choice by the byte", share), ("exact_match", "exact match", share),
    ("bleu", "BLEU", number), ("rouge_l", "ROUGE-L", number),
)  # fmt: skip

COLUMNS = (
    "round",
    "accuracy",
    "personal",
    "train loss",
    "components",
    "modules",
    "adapter up",
    "adapter down",
    "ok/failed",
    "secs",
)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rounds of a ledger."""
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns(rows):
        result.add_column(name.replace(" ", "\n").replace("/", "/\n"), justify="right", no_wrap=True)  # fits 80 columns
    for row in rows:
        result.add_row(*cells(row))
    return result


def columns(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """What is shown of rounds; of private ones also what they have told."""
    return COLUMNS + ("epsilon",) * any("epsilon" in row for row in rows)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    answered = "–" if row["clients_ok"] is None else f"{row['clients_ok']}/{row['clients_failed']}"
    return (
        str(row["round"]), share(row["accuracy"]), share(row["personal_accuracy"]), number(row["train_loss"]),
        str(row["components"]), str(row["modules_alive"]), size(row["adapter_bytes_up"]), size(row["adapter_bytes_down"]),
        answered, "–" if row["wall_seconds"] is None else f"{row['wall_seconds']:.1f}",
        *(("–" if row["epsilon"] is None else f"{row['epsilon']:.3g}",) if "epsilon" in row else ()),
    )  # fmt: skip


def budget(spent: dict[str, Any]) -> str:
    """A run's epsilon and delta, in words."""
    if spent["epsilon"] is None:
        return "none: without noise there is no bound"
    return f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g}"


def _about(event: dict[str, Any]) -> str:
    on = f", on from round {event['round']}" if event["event"] == "resume" else ""
    rows = "the clients' own" if event["train_rows"] is None else event["train_rows"]
    hashed = f" (sha256 {event['hash']}…)" if event["hash"] else ""  # of rows elsewhere none is known
    clients = "sites as they come" if event["clients"] is None else f"{event['clients']} clients"
    return (
        f"{event['method']} on {event['data']}: {rows} train and {event['test_rows']} test rows, "
        f"{event['classes']} classes{hashed}, {clients}, "
        f"{event['model']} with {event['modules']} adapted modules{on}\nrun directory: {event['path']}"
    )


def summary(summary: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False, title=f"{summary['method']}, {summary['rounds']} rounds")
    generates = summary.get("perplexity", summary.get("personal_perplexity")) is not None
    what = "token accuracy" if generates else "accuracy"
    rows = [
        (f"{what}, global test set", share(summary["accuracy"])),
        *([] if generates else [("  majority class", share(summary["majority"]))]),
        *((f"  {name}", share(value)) for name, value in summary.get("baselines", {}).items()),
        *((f"{words}, global test set", form(summary[name])) for name, words, form in TEXTS if name in summary),
        (f"personal {what}, mean over clients", share(summary["personal_accuracy"])),
        *([] if generates else [("  majority class of each client", share(summary["personal_majority"]))]),
        *(
            (f"personal {words}, mean over clients", form(summary[f"personal_{name}"]))
            for name, words, form in TEXTS
            if f"personal_{name}" in summary
        ),
        ("adapter bytes up / down", f"{size(summary['adapter_bytes_up'])} / {size(summary['adapter_bytes_down'])}"),
        ("head bytes up / down", f"{size(summary['head_bytes_up'])} / {size(summary['head_bytes_down'])}"),
        ("all bytes up / down", f"{size(summary['bytes_up'])} / {size(summary['bytes_down'])}"),
        ("components, start and end", f"{summary['components_at_start']} and {summary['components']}"),
        ("modules alive", f"{summary['modules_alive']} of {summary['modules']}"),
        *([("privacy of a client", budget(summary))] if "epsilon" in summary else []),
        *_unless_private(summary),
        (
            "simulated time, energy",
            f"{duration(summary['clock_seconds'])}, {energy(summary['device_joules'])}",
        ),
        ("simulated wait of a client per round, mean", duration(summary["waiting_seconds"])),
        ("largest memory of a client", memory(summary["peak_memory_bytes"])),
        ("run directory", escape(summary["path"])),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _unless_private(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """How many answered and how long it took: what a private run may not tell is left out."""
    rows = []
    if summary["clients_ok"] is not None:
        rows.append(("client updates merged / failed", f"{summary['clients_ok']} / {summary['clients_failed']}"))
    if summary["wall_seconds"] is not None:
        both = f"{summary['wall_seconds']:.0f}, {summary['train_seconds']:.0f}"
        rows.append(("seconds; training, all workers added up", both))
    return rows


@contextmanager
def rounds(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar of the rounds played while the block runs, on a terminal; what to call with every event."""
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bars:
        task = bars.add_task("rounds", total=None)

        def watch(event: dict[str, Any]) -> None:
            if event["event"] == "round":
                bars.update(task, total=event["rounds"], completed=event["round"])

        yield watch
