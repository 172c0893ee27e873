"""What became of the adapter: modules alive, the rank map, and the ranks of single clients."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedrank.report import plots
from fedrank.report.page import Block, Chart, Row, Section, Table
from fedrank.report.played import Played, known, sampled, short, thinned

SPANS = 6000  # rectangles of a map, which the page has to draw
CLIENTS, MODULES = 60, 80  # rows and columns of a map of clients


def ranks(run: Played, rows: Sequence[Row]) -> Section | None:
    if not run.rounds:
        return None
    blocks: list[Block] = [
        alive("alive", "Modules alive", "modules_alive", rows),
        alive("components", "Rank-one components", "components", rows),
    ]
    if run.common:
        blocks.append(rank_map(run))
    if run.apart:
        blocks.append(by_round(run))
        blocks.append(by_client(
            run, "trained", "Ranks that clients trained", _trained(run.apart),
            "Components by client, in the mean over the rounds in which it trained others than the global adapter had",
        ))  # fmt: skip
    if run.effective:
        modules = run.modules
        found = {c: dict(zip(modules, map(float, values), strict=False)) for c, values in run.effective.items()}
        blocks += [chart for chart in (over_rounds(rows),) if chart is not None]
        blocks.append(by_client(
            run, "effective", "Effective ranks of private adapters", found,
            "Numerical rank of what a client uses, the common and its private adapter together, when it last trained",
        ))  # fmt: skip
    return Section("ranks", "Ranks", blocks)


def alive(id: str, title: str, name: str, every: Sequence[Row]) -> Chart:
    rows, note = thinned(every)
    points = [{**{axis: row.get(axis) for axis in plots.AXES}, "series": title, "value": row[name]} for row in rows]
    spec, axes = plots.lines(points, [title], title, "d", steps=True, zero=True)
    spec["height"] = 180
    first, last = rows[0], rows[-1]
    said = f"{first[name]} after round {first['round']}, {last[name]} after round {last['round']}."
    table = Table(["Round", title], [[str(row["round"]), str(row[name])] for row in rows], left=0)
    return Chart(id, title, said, spec, table, axes, note)


def rank_map(run: Played) -> Chart:
    """Modules by rounds: rounds in a row with the same rank are one span."""
    rounds, note, names = list(run.common), "", short(run.modules)
    spans = _spans(rounds, names)
    if len(spans) > SPANS:
        wanted = max(SPANS // max(len(names), 1), 2)
        rounds = sampled(rounds, wanted)
        spans = _spans(rounds, names)
        note = f"Of {len(run.common)} rounds {len(rounds)} are shown, evenly spaced."
    last = run.common[-1]["ranks"]
    order = list(reversed(names.values()))  # the first block at the bottom, as the others stand on it
    spec = plots.heat(
        [span for span in spans if span["value"]], order, "Rank", plots.rounds(rounds[0]["round"], rounds[-1]["round"])
    )
    gone = [names[module] for module in names if not last.get(module)]
    most = max(last.values(), default=0)
    said = f"Components of each module after each round. At the end {len(names) - len(gone)} of {len(names)} modules "
    said += f"have any, at most {most}"
    if gone:
        listed = ", ".join(f"block {name}" if name[0].isdigit() else name for name in gone[:6])
        said += f"; empty: {listed}{' and more' if len(gone) > 6 else ''}. Where nothing is drawn, nothing is left."
    else:
        said += "."
    full = {name: module for module, name in names.items()}
    table = Table(
        ["Module", "Rounds", "Rank"], [[full[one["name"]], one["label"], str(one["value"])] for one in spans], left=2
    )
    return Chart("map", "Rank map", said, spec, table, note=note)


def _spans(rounds: Sequence[Row], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """For every module the stretches of rounds over which its rank stays."""
    found = []
    edges = [row["round"] for row in rounds]
    for module, name in names.items():
        values = [row["ranks"].get(module, 0) for row in rounds]
        start = 0
        for at in range(1, len(values) + 1):
            if at < len(values) and values[at] == values[start]:
                continue
            stop = edges[at] - 0.5 if at < len(edges) else edges[-1] + 0.5
            label = str(edges[start]) if at - 1 == start else f"{edges[start]} to {edges[at - 1]}"
            found.append(
                {"name": name, "start": edges[start] - 0.5, "stop": stop, "value": values[start], "label": label}
            )
            start = at
    return found


def by_round(run: Played) -> Chart:
    """Clients by rounds: the components that each trained, of all modules; of many rounds neighbours in the mean."""
    summed: dict[str, dict[int, int]] = defaultdict(dict)
    for row in run.apart:
        summed[str(row["client"])][int(row["round"])] = sum(row["ranks"].values())
    order = sorted(summed, key=lambda client: (-statistics.fmean(summed[client].values()), client))
    shown, labels = sampled(order, CLIENTS), _labels(run, order)
    cells = list[dict[str, Any]]()
    for client in shown:
        for label, rounds in plots.binned([row["round"] for row in run.rounds]):
            if there := [summed[client][at] for at in rounds if at in summed[client]]:
                cells.append({
                    "name": labels[client], "start": rounds[0] - 0.5, "stop": rounds[-1] + 0.5, "label": label,
                    "value": round(statistics.fmean(there), 1),
                })  # fmt: skip
    first, last = run.rounds[0]["round"], run.rounds[-1]["round"]
    ends = {"nice": False, "domain": [first - 0.5, last + 0.5]}
    spec = plots.heat(
        cells, [labels[client] for client in shown], "Components", plots.rounds(first, last) | {"scale": ends}
    )
    every = [value for mine in summed.values() for value in mine.values()]
    said = (
        f"Components of all modules that a client trained, from {min(every)} to {max(every)}. Where nothing is drawn, "
    )
    said += "the client was not asked, failed, or trained the global adapter as it was."
    table = Table(
        ["Client", "Round", "Components"], [[c["name"], c["label"], f"{c['value']:g}"] for c in cells], left=2
    )
    note = [f"Of {len(order)} clients {len(shown)} are shown, evenly from the most components to the fewest."] * (
        len(shown) < len(order)
    )
    note += ["Each cell is the mean of several rounds."] * (len(run.rounds) > plots.BARS)
    return Chart(
        "trained-rounds", "Components that clients trained, round by round", said, spec, table, note=" ".join(note)
    )


def _labels(run: Played, clients: Sequence[str]) -> dict[str, str]:
    return {client: f"{client} · {run.devices[client]}" if client in run.devices else client for client in clients}


def _trained(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Client -> module -> its components in the mean over the client's rows."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[str(row["client"])].append(row["ranks"])
    every = list(dict.fromkeys(module for mine in found.values() for one in mine for module in one))
    return {c: {m: statistics.fmean(one.get(m, 0) for one in mine) for m in every} for c, mine in found.items()}


def by_client(run: Played, id: str, title: str, found: Mapping[str, Mapping[str, float]], what: str) -> Chart:
    """Clients by modules, those with the most components on top; of many clients some, of many modules sums."""
    modules = [m for m in run.modules if any(m in mine for mine in found.values())]
    names, note = short(modules), []
    if len(modules) > MODULES:
        names = {module: f"block {name.split()[0]}" for module, name in names.items()}
        note.append("Modules of a block are added up.")
    order = sorted(found, key=lambda client: (-sum(found[client].values()), client))
    shown = sampled(order, CLIENTS)
    if len(shown) < len(order):
        note.append(f"Of {len(order)} clients {len(shown)} are shown, evenly from the most components to the fewest.")
    labels = _labels(run, order)
    columns = list(dict.fromkeys(names[module] for module in modules))
    cells = []
    for client in shown:
        sums: dict[str, float] = defaultdict(float)
        for module in modules:
            sums[names[module]] += found[client].get(module, 0.0)
        cells += [{"name": labels[client], "column": c, "value": round(v, 2)} for c, v in sums.items() if v]
    spec = plots.cells(cells, [labels[client] for client in shown], columns, "Rank", "Module")
    totals = {client: sum(mine.values()) for client, mine in found.items()}
    value = {(cell["name"], cell["column"]): cell["value"] for cell in cells}
    least, most = min(totals.values()), max(totals.values())
    said = f"{what}. Of {len(found)} clients, from {least:.4g} to {most:.4g} over all modules."
    table = Table(
        ["Client", *(["Device"] if run.devices else []), "All modules", *columns[:MODULES]],
        [
            [client, *([run.devices.get(client, "–")] if run.devices else []), f"{totals[client]:.4g}",
             *(f"{value.get((labels[client], column), 0):.3g}" for column in columns[:MODULES])]
            for client in shown
        ],
        left=2 if run.devices else 1,
    )  # fmt: skip
    return Chart(id, title, said, spec, table, note=" ".join(note))


def over_rounds(every: Sequence[Row]) -> Chart | None:
    """The mean effective rank, and a band of one standard deviation between clients."""
    told = [row for row in every if row.get("effective_rank") is not None and row.get("rank_spread") is not None]
    rows, note = thinned(told)
    points = [
        {**{axis: row.get(axis) for axis in plots.AXES}, "series": "mean", "value": row["effective_rank"],
         "low": row["effective_rank"] - row["rank_spread"], "high": row["effective_rank"] + row["rank_spread"]}
        for row in rows
    ]  # fmt: skip
    if not points:
        return None
    values = known(points, "value")
    spec, axes = plots.lines(points, ["mean"], "Effective rank")
    spec["height"] = 200
    table = Table(
        ["Round", "Mean", "Deviation between clients"],
        [[str(p["round"]), f"{p['value']:.3f}", f"{p['high'] - p['value']:.3f}"] for p in points],
        left=0,
    )
    said = f"Mean over the clients of a round and all modules: from {values[0]:.2f} to {values[-1]:.2f}. "
    said += "The band is one standard deviation between clients."
    return Chart("effective-mean", "Effective rank over rounds", said, spec, table, axes, note)
