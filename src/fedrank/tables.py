"""Tables of what was asked: costs, profiles, methods, baselines."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from fedrank.units import duration, energy, memory, share, size


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


def methods(listed: list[dict[str, Any]]) -> Table:
    """Methods with what they are, what may differ between clients, what is exact, and their hyper-parameters."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for m in listed:
        exact = [what for what in ("start", "aggregation") if m[f"exact_{what}"]]
        facts = [
            f"clients differ in {', '.join(m['differs'])}" if m["differs"] else "",
            f"exact {' and '.join(exact)}" if exact else "",
            {None: "", False: "one global model", True: "personal models"}[m["personal"]],
            ", ".join(f"{key}={value}" for key, value in m["hyper_parameters"].items()),
        ]
        text = f"{escape(m['summary'].rpartition(' (')[0] or m['summary'])}\n[dim]{escape('; '.join(filter(None, facts)))}[/]"
        table.add_row(f"[bold]{m['name']}[/]", text)
    return table


def baselines(summary: dict[str, Any], found: dict[str, float]) -> Table:
    """A finished run beside what learns from the same rows in one place."""
    table = Table("on the same rows, all of them in one place", "accuracy")
    table.add_row(f"fedrank, {summary['method']}", share(summary["accuracy"]))
    for name, value in found.items():
        table.add_row(name, share(value))
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
    steps = sum(found["seconds"].get(name, 0.0) for name in STEPS) / max(found["round_seconds"], 1e-9)
    lines = [
        f"{rounds} rounds of {found['clients'] / rounds:.3g} clients, {found['examples']:.0f} examples: "
        f"{found['wall_seconds']:.1f} s, of which {found['round_seconds']:.1f} s in rounds; local steps are "
        f"{share(steps)} of these. Computed in {found['compute']} by {found['products']}, rows {found['rows']}.",
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
