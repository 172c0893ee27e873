"""What a person sees of a run: bars and a live table, a line per round, JSON events, a closing summary."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


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
            values = zip(COLUMNS, cells(event), strict=True)
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
    for name in COLUMNS:
        result.add_column(name.replace(" ", "\n").replace("/", "/\n"), justify="right", no_wrap=True)  # fits 80 columns
    for row in rows:
        result.add_row(*cells(row))
    return result


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["round"]), share(row["accuracy"]), share(row["personal_accuracy"]), _number(row["train_loss"]),
        str(row["components"]), str(row["modules_alive"]), size(row["adapter_bytes_up"]), size(row["adapter_bytes_down"]),
        f"{row['clients_ok']}/{row['clients_failed']}", f"{row['wall_seconds']:.1f}",
    )  # fmt: skip


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def size(count: int | float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds for people: 2.5 min."""
    if seconds is None:
        return "–"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return scaled(1e6 * seconds, "µs", "ms", "s")


def scaled(value: float | int, *units: str) -> str:
    """Two or three digits in the largest unit that is not above the value, each a thousand times the one before."""
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            return f"{value:.1f} {unit}" if 0 < value < 9.95 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError


def energy(joules: float) -> str:
    """Joules for people: 1.5 kJ."""
    return scaled(1000 * joules, "mJ", "J", "kJ", "MJ", "GJ")


def memory(count: float | int) -> str:
    """Bytes for people, shorter: 226 MB."""
    return scaled(count, "B", "kB", "MB", "GB", "TB")


def _about(event: dict[str, Any]) -> str:
    on = f", on from round {event['round']}" if event["event"] == "resume" else ""
    rows = "the clients' own" if event["train_rows"] is None else event["train_rows"]
    return (
        f"{event['method']} on {event['data']}: {rows} train and {event['test_rows']} test rows, "
        f"{event['classes']} classes (sha256 {event['hash']}…), {event['clients']} clients, "
        f"{event['model']} with {event['modules']} adapted modules{on}\nrun directory: {event['path']}"
    )


def summary(summary: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False, title=f"{summary['method']}, {summary['rounds']} rounds")
    rows = [
        ("accuracy, global test set", share(summary["accuracy"])),
        ("  majority class", share(summary["majority"])),
        *((f"  {name}", share(value)) for name, value in summary.get("baselines", {}).items()),
        ("personal accuracy, mean over clients", share(summary["personal_accuracy"])),
        ("  majority class of each client", share(summary["personal_majority"])),
        ("adapter bytes up / down", f"{size(summary['adapter_bytes_up'])} / {size(summary['adapter_bytes_down'])}"),
        ("head bytes up / down", f"{size(summary['head_bytes_up'])} / {size(summary['head_bytes_down'])}"),
        ("all bytes up / down", f"{size(summary['bytes_up'])} / {size(summary['bytes_down'])}"),
        ("components, start and end", f"{summary['components_at_start']} and {summary['components']}"),
        ("modules alive", f"{summary['modules_alive']} of {summary['modules']}"),
        ("client updates merged / failed", f"{summary['clients_ok']} / {summary['clients_failed']}"),
        ("seconds; training, all workers added up", f"{summary['wall_seconds']:.0f}, {summary['train_seconds']:.0f}"),
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


def costs(found: dict[str, Any]) -> Table:
    """What a round costs on each kind of device: means over its clients as asked in the run, the largest memory of any.

    lost: the share of those drawn that sat out, were late, or lacked the memory; shown where there are any.
    """
    lost = [kind["sitting_out"] + kind["late"] + kind["too_small"] for kind in found["kinds"]]
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("device", no_wrap=True)
    for name in ("#", "down", "up", "FLOP", "train", "link", "energy", "memory", "of", *["lost"] * any(lost)):
        result.add_column(name, justify="right", no_wrap=True)  # fits 80 columns
    for kind, missing in zip(found["kinds"], lost, strict=True):
        numbers = ["–"] * 7
        if kind["peak_memory_bytes"] is not None:
            numbers = [
                memory(kind["bytes_down"]), memory(kind["bytes_up"]), f"{kind['flops']:.0e}".replace("e+", "e"),
                duration(kind["forward_seconds"] + kind["backward_seconds"]),
                duration(kind["download_seconds"] + kind["upload_seconds"]), energy(kind["device_joules"]),
                memory(kind["peak_memory_bytes"]),
            ]  # fmt: skip
        result.add_row(
            kind["kind"], str(kind["clients"]), *numbers,
            f"{kind['memory_bytes'] / 1e9:.3g} GB" if kind["memory_bytes"] else "–",
            *[f"{100 * missing / kind['drawn']:.0f} %" if kind["drawn"] else "–"] * any(lost),
        )  # fmt: skip
    return result


def kinds(found: dict[str, Any]) -> Table:
    """What all rounds together took each kind of device, its clients added up. asked: how often one was asked to train."""
    result = Table("device", box=None, pad_edge=False)
    for name in ("asked", "down", "up", "time", "energy"):
        result.add_column(name, justify="right")
    for kind in found["kinds"]:
        run = kind["run"]
        result.add_row(
            kind["kind"], str(kind["drawn"] - kind["sitting_out"]), size(run["bytes_down"]), size(run["bytes_up"]),
            duration(run["spent_seconds"]), energy(run["device_joules"]),
        )  # fmt: skip
    return result


def totals(found: dict[str, Any]) -> Table:
    """What a round, in the mean, and the whole run cost, all clients of a cohort together."""
    table = Table("", "a round, mean", f"{found['rounds']} rounds", box=None, pad_edge=False)
    one, run = found["round"], found["run"]
    rows = [
        ("simulated time", duration(one["round_seconds"]), duration(run["clock_seconds"])),
        ("  wait of a client, mean", duration(one["waiting_seconds"]), ""),
        ("  of the slowest client", duration(one["slowest_seconds"]), ""),
        ("bytes down", size(one["bytes_down"]), size(run["bytes_down"])),
        ("bytes up", size(one["bytes_up"]), size(run["bytes_up"])),
        ("energy", energy(one["device_joules"]), energy(run["device_joules"])),
        ("largest memory a client needs", memory(one["peak_memory_bytes"]), ""),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def profile(found: dict[str, Any]) -> Table:
    """Where the seconds of a profiled run went."""
    result = Table("where the time goes", "seconds", "share", "what it is")
    for name, seconds in found["seconds"].items():
        result.add_row(name, f"{seconds:.2f}", share(seconds / found["wall_seconds"]), SPANS.get(name, ""))
    return result


def advice(found: dict[str, Any], trace: Any) -> list[str]:
    """What a profile comes to, in words."""
    rounds, workers = found["rounds"], found["workers"]
    share_ = sum(found["seconds"].get(name, 0.0) for name in STEPS) / max(found["round_seconds"], 1e-9)
    lines = [
        f"{rounds} rounds of {found['clients'] / rounds:.3g} clients, {found['examples']:.0f} examples: "
        f"{found['wall_seconds']:.1f} s, of which {found['round_seconds']:.1f} s in rounds; local steps are "
        f"{share(share_)} of these. Computed in {found['compute']} by {found['products']}, rows {found['rows']}.",
    ]
    if workers > 1:
        lines.append(f"All in one process; a run here has {workers} workers.")
    return [*lines, f"Every span: {trace}, for chrome://tracing or ui.perfetto.dev."]


STEPS = ("prefix", "data", "forward", "backward", "optimizer", "both levels")
SPANS = {
    "loading": "the model, the partition, the fleet",
    "reading": "the rows, read and tokenised",
    "prefix": "hidden states below what learns, computed or read",
    "data": "batches made",
    "forward": "of local steps",
    "backward": "of local steps",
    "optimizer": "clipping, AdamW",
    "both levels": "bilevel steps, there and back",
    "planning": "the method's plans",
    "wire": "frames packed and opened, on both sides",
    "aggregation": "the method's merge",
    "evaluation": "of the global model and of clients",
    "saving": "states",
    "the rest": "adapters to the device and back, private stores, ledgers",
}
