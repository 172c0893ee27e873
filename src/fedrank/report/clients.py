"""The clients: how well each is served, what each holds, on which devices they wait, and who failed."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fedrank.report import plots
from fedrank.report.page import Block, Chart, Facts, Row, Section, Table, Text
from fedrank.report.played import Played, known, sampled
from fedrank.told import counted
from fedrank.units import duration, energy, memory, share

POINTS, SHOWN, LABELS = 1500, 60, 30  # of a scatter, rows and columns of a map
PHASES = (("download", "download_seconds"), ("forward", "forward_seconds"), ("backward", "backward_seconds"),
          ("upload", "upload_seconds"), ("waiting", "waiting_seconds"))  # fmt: skip
WAYS = ("merged", "failed", "sat out")


def clients(run: Played) -> Section | None:
    """How the scores spread over clients, and what these hold."""
    if run.private:
        return None
    scored = [row for row in run.personal if row.get("accuracy") is not None]
    blocks: list[Block] = []
    if scored:
        blocks += served(scored, run.accuracy)
        if run.devices:
            blocks.append(by_kind(run, scored))
        if run.holders:
            blocks.append(over_rows(run, scored))
    elif run.rounds and run.config.rounds.personal != 0:
        when = (
            "No client was scored: none answered, or none has test rows enough."
            if run.summary
            else "Clients are scored on their own rows when the run ends."
        )
        blocks.append(Text(when, "note"))
    if run.holders:
        blocks.append(held(run))
    elif isinstance(some := run.facts.get("partition", {}).get("clients"), dict):
        figures = [(name.replace("_", " ").capitalize(), f"{part['least']} to {part['most']}", "of a client")
                   for name, part in some.items() if isinstance(part, dict) and {"least", "most"} <= part.keys()]  # fmt: skip
        blocks.append(Facts([("Clients", f"{some['count']:,}", "more than are listed one by one"), *figures]))
    return Section("clients", "Clients and fairness", blocks) if blocks else None


def served(scored: Sequence[Row], word: str) -> list[Block]:
    """The distribution of clients' own accuracy, and what sums up how even it is. word: what it is called."""
    values = sorted(known(scored, "accuracy"))
    worst = statistics.fmean(values[: math.ceil(len(values) / 10)])
    best = statistics.fmean(values[-math.ceil(len(values) / 10) :])
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    majority = [(row["accuracy"], row["majority"]) for row in scored if row.get("majority") is not None]
    marks = [("mean", mean), ("worst tenth", worst)]
    if majority:
        marks.append(("mean of majority classes", statistics.fmean(one for _, one in majority)))
    spec = plots.distribution(plots.histogram(values), marks, f"{word} on the client's own test rows", "Clients")
    below = sum(accuracy < one for accuracy, one in majority)
    lost = (
        f" {below} of {len(majority)} {'is' if below == 1 else 'are'} below what their most frequent class alone would give."
        if majority
        else ""
    )
    said = f"{len(values)} clients: mean {share(mean)}, standard deviation {share(deviation)}, "
    said += f"from {share(values[0])} to {share(values[-1])}.{lost}"
    order = sorted(scored, key=lambda row: row["accuracy"])
    table = Table(
        ["Client", word, "Majority class", "Test rows"],
        [[str(row["client"]), share(row["accuracy"]), share(row.get("majority")), f"{row.get('rows') or 0:.0f}"] for row in order],
    )  # fmt: skip
    return [
        Facts([
            ("Mean of clients", share(mean), ""), ("Standard deviation", share(deviation), "between clients"),
            ("Worst tenth", share(worst), "mean"), ("Best tenth", share(best), "mean"),
        ]),
        Chart("served", f"{word} of each client in the end", said, spec, table),
    ]  # fmt: skip


def by_kind(run: Played, scored: Sequence[Row]) -> Table:
    found = defaultdict[str, list[float]](list)
    for row in scored:
        if row["client"] in run.kinds:
            found[run.kinds[row["client"]]].append(row["accuracy"])
    rows = [[kind, str(len(v)), share(statistics.fmean(v)), share(min(v))] for kind, v in sorted(found.items())]
    return Table(["Device", "Clients scored", "Mean accuracy", "Lowest"], rows, title="Accuracy by kind of device")


def over_rows(run: Played, scored: Sequence[Row]) -> Chart:
    """Whether clients with little data are served worse."""
    held = {row["client"]: int(row["train_rows"]) for row in run.holders}
    rows = [
        {"x": held[row["client"]], "y": row["accuracy"], "label": row["client"],
         "series": run.devices.get(row["client"], "clients")}
        for row in sorted(scored, key=lambda row: str(row["client"]))
        if row["client"] in held
    ]  # fmt: skip
    shown = sampled(rows, POINTS)
    order = sorted({str(row["series"]) for row in shown})
    spec = plots.points(shown, order, ("Training rows", "~s"), ("Accuracy", plots.SHARE))
    note = f"Of {len(rows)} clients {len(shown)} are shown." if len(shown) < len(rows) else ""
    least, most = min((row["x"] for row in rows), default=0), max((row["x"] for row in rows), default=0)
    halves = sorted(rows, key=lambda row: row["x"])
    middle = len(halves) // 2
    said = f"Clients train on {least} to {most} rows."
    if middle:
        means = [statistics.fmean(row["y"] for row in part) for part in (halves[:middle], halves[middle:])]
        said += f" The half with fewer rows reaches {share(means[0])}, the other {share(means[1])}."
    table = Table(
        ["Client", "Device", "Training rows", "Accuracy"],
        [[str(r["label"]), str(r["series"]), str(r["x"]), share(r["y"])] for r in shown],
        left=2,
    )
    return Chart("by-rows", "Accuracy by amount of data", said, spec, table, note=note)


def held(run: Played) -> Chart:
    """Which labels each client holds; where there are too many, how many of them."""
    labels = [str(label) for label in run.facts.get("labels", [])]
    people = sorted(run.holders, key=lambda row: -row["train_rows"])
    least, most = people[-1]["train_rows"], people[0]["train_rows"]
    kinds = [len(row.get("label_counts") or {}) for row in people]
    said = f"{len(people)} clients hold {least} to {most} training rows"
    said += f" of {min(kinds)} to {max(kinds)} of {len(labels)} labels." if labels and any(kinds) else "."
    drawn = 1 < len(labels) <= LABELS and any(kinds)
    table = Table(
        ["Client", "Training rows", "Test rows", "Labels", *(labels if drawn else [])],
        [
            [str(row["client"]), str(row["train_rows"]), str(row["test_rows"]), str(n),
             *(share(_held(row, at) or None) for at in range(len(labels) if drawn else 0))]
            for row, n in zip(people, kinds, strict=True)
        ],
    )  # fmt: skip
    if not drawn:
        tally = _parts([row["train_rows"] for row in people])
        spec = plots.bars(
            [{**one, "series": "clients", "rank": 0} for one in tally], ["clients"], "Clients", "d", x="Training rows"
        )
        return Chart("held", "Who holds how much", said, spec, table)
    place = {str(row["client"]): row for row in people}
    shown = sampled(list(place), SHOWN)
    cells = [
        {"name": c, "column": labels[int(label)], "value": round(_held(place[c], int(label)), 4)}
        for c in shown
        for label in place[c]["label_counts"]
    ]
    spec = plots.cells(cells, shown, labels, "Share of the client's rows", "Label")
    note = (
        f"Of {len(people)} clients {len(shown)} are shown, evenly from the most rows to the fewest."
        if len(shown) < len(people)
        else ""
    )
    return Chart("held", "Who holds what", f"{said} Those with the most rows are on top.", spec, table, note=note)


def _held(row: Row, label: int) -> float:
    """The share of a client's training rows that have this label."""
    return float((row.get("label_counts") or {}).get(str(label), 0) / max(row["train_rows"], 1))


def _parts(values: Sequence[int], count: int = 12) -> list[dict[str, Any]]:
    """How many of these lie in each of at most `count` equal steps from the least to the most."""
    least, most = min(values), max(values)
    wide = max(-(-(most - least + 1) // count), 1)
    tally = Counter((value - least) // wide for value in values)
    found = []
    for at in range((most - least) // wide + 1):
        low = least + at * wide
        found.append({"at": str(low) if wide == 1 else f"{low}–{low + wide - 1}", "value": tally[at]})
    return found


# ---- devices


def fleet(run: Played) -> Section | None:
    """What the devices did with a round's time; None where no device was modelled, or none of it is told."""
    timed = [row for row in run.clients if row.get("device_seconds") is not None]
    counts = (run.facts.get("fleet") or {}).get("kinds") or {}
    if run.private or not timed or not known(run.rounds, "round_seconds"):  # rows of clients come before their round's
        return None
    if run.config.engine.kind == "flower":
        lead = "Devices are as the sites registered them."
    elif run.config.engine.fleet is None:
        lead = "No fleet was named: every client has the same nominal laptop."
    elif len(counts) > 1 and not run.kinds:
        lead = "Which client has which device cannot be told any more, so all are shown together."
    else:
        lead = ""
    kind = {row["client"]: run.kinds.get(row["client"], "all clients") for row in run.clients}
    groups = defaultdict[str, list[Row]](list)
    for row in run.clients:
        groups[kind[row["client"]]].append(row)
    return Section("fleet", "Fleet and waiting", [phases(groups), waiting(run), _kinds(run, groups, counts)], lead)


def phases(groups: dict[str, list[Row]]) -> Chart:
    """What a client's round is made of, by kind of device."""
    means = {
        kind: [statistics.fmean([row.get(name) or 0.0 for row in mine if row["ok"]] or [0.0]) for _, name in PHASES]
        for kind, mine in sorted(groups.items())
    }
    word, unit = plots.unit("seconds", [sum(values) for values in means.values()])
    rows = [
        {"name": kind, "series": part, "value": values[n] / unit, "rank": n}
        for kind, values in means.items()
        for n, (part, _) in enumerate(PHASES)
    ]
    spec = plots.lying(rows, [part for part, _ in PHASES], f"Mean of a client's round ({word})")
    waits = {kind: values[-1] / (sum(values) or 1) for kind, values in means.items()}
    longest = max(waits, key=lambda kind: waits[kind])
    said = f"In the mean over rounds, a client waits {share(waits[longest])} of its time for slower ones"
    said += f" where that is longest, on {longest}." if len(waits) > 1 else "."
    table = Table(["Device", *(part for part, _ in PHASES)], [[k, *map(duration, v)] for k, v in means.items()])
    return Chart("phases", "Where a round's time goes", said, spec, table)


def waiting(run: Played) -> Chart:
    """Each round's length, and how much of it a client waits in the mean."""
    by = {row["round"]: row for row in run.rounds if row.get("round_seconds") is not None}
    word, unit = plots.unit("seconds", [row["round_seconds"] for row in by.values()])
    rows = []
    for at, rounds in plots.binned(list(by)):
        whole = statistics.fmean(by[r]["round_seconds"] for r in rounds)
        wait = statistics.fmean(by[r].get("waiting_seconds") or 0.0 for r in rounds)
        parts = {"busy": whole - wait, "waiting": wait}
        rows += [{"at": at, "series": part, "value": v / unit, "rank": n} for n, (part, v) in enumerate(parts.items())]
    spec = plots.bars(rows, ["busy", "waiting"], f"Simulated time ({word})")
    waits, lengths = (known(list(by.values()), name) for name in ("waiting_seconds", "round_seconds"))
    said = f"A round takes {duration(statistics.fmean(lengths))} in the mean, and a client waits "
    said += f"{duration(statistics.fmean(waits or [0.0]))} of it."
    table = Table(
        ["Round", "Length", "Mean wait", "Energy"],
        [[str(r), duration(row["round_seconds"]), duration(row.get("waiting_seconds")), energy(row.get("device_joules"))]
         for r, row in by.items()],
        left=0,
    )  # fmt: skip
    return Chart("waiting", "Length of each round", said, spec, table)


def _kinds(run: Played, groups: dict[str, list[Row]], counts: Row) -> Table:
    rows = []
    for kind, mine in sorted(groups.items()):
        ok = [row for row in mine if row["ok"]]
        seconds, joules = known(ok, "device_seconds"), known(mine, "device_joules")
        rows.append([
            kind, str(counts.get(kind, counted(run.facts) or "–")), str(len(mine)), str(len(mine) - len(ok)),
            duration(statistics.fmean(seconds) if seconds else None), energy(sum(joules, 0.0)),
            memory(max(known(ok, "peak_memory_bytes"), default=None)),
        ])  # fmt: skip
    columns = ["Device", "Clients", "Asked", "Failed", "Mean round", "Energy", "Largest memory"]
    return Table(columns, rows, title="By kind of device")


# ---- failures


def failures(run: Played) -> Section | None:
    """Who did not answer, or was refused, and why; in the words of the ledger."""
    if run.private or not run.rounds:
        return None
    failed = [row for row in run.clients if not row["ok"]]
    out = sum(row.get("clients_out") or 0 for row in run.rounds)
    if not failed and not out:
        return Section(
            "failures", "Failures", [Text("Every client that was asked answered, and every answer was merged.", "good")]
        )
    by = {row["round"]: row for row in run.rounds}
    parts = ("clients_ok", "clients_failed", "clients_out")[: 3 if out else 2]
    bars = [
        {"at": at, "series": way, "value": statistics.fmean(by[r].get(name) or 0 for r in rounds), "rank": n}
        for at, rounds in plots.binned(list(by))
        for n, (way, name) in enumerate(zip(WAYS, parts, strict=False))
    ]
    asked = sum(len(known([row], name)) and row[name] for row in run.rounds for name in parts[:2])
    said = f"{len(failed)} of {asked} requests came to nothing" + (
        f", and {out} times a client sat out." if out else "."
    )
    table = Table(
        ["Round", *WAYS], [[str(r), *(str(row.get(name) or 0) for name in parts)] for r, row in by.items()], left=0
    )
    why = defaultdict[str, list[Row]](list)
    for row in failed:
        why[str(row.get("error", "unknown"))[:300]].append(row)
    reasons = [
        [reason, str(len(mine)), " to ".join(dict.fromkeys(str(row["round"]) for row in (mine[0], mine[-1]))),
         ", ".join(list(dict.fromkeys(str(row["client"]) for row in mine))[:8])]
        for reason, mine in sorted(why.items(), key=lambda item: -len(item[1]))
    ]  # fmt: skip
    blocks: list[Block] = [
        Chart("failed", "Answers of each round", said, plots.bars(bars, WAYS[: len(parts)], "Clients", "d"), table)
    ]
    if reasons:
        blocks.append(Table(["Reason", "Times", "Rounds", "Clients, at most 8"], reasons, title="Reasons"))
    return Section("failures", "Failures", blocks)
