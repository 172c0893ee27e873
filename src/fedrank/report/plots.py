"""The kinds of charts, as Vega-Lite specs without colours: those are the page's, by its theme."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedrank.report.page import Row

Spec = dict[str, Any]
SHARE, PLAIN = ".3~p", ".4~g"  # formats of numbers: of shares, and of others
DASHES = [
    [1, 0],
    [7, 3],
    [2, 2],
    [8, 3, 2, 3],
    [4, 2],
    [1, 3],
    [10, 2],
]  # as many fewer than shapes and colours that no two of 56 lines are alike
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right"]
FAINTEST = 0.9  # opacity of a mark: below it colours are too near the card's
BARS = 60  # of a chart over rounds
TALLEST = 900  # pixels of a map
UNITS = {
    "bytes": [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)],
    "seconds": [("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", 86400.0)],
    "joules": [("mJ", 1e-3), ("J", 1.0), ("kJ", 1e3), ("MJ", 1e6), ("GJ", 1e9)],
}
AXES = {  # as the page offers them: label, title
    "round": ("Rounds", "Round"), "bytes": ("Bytes", "Bytes both ways, so far"),
    "seconds": ("Device time", "Simulated time of the devices, so far"), "joules": ("Energy", "Energy of the devices, so far"),
}  # fmt: skip


def unit(kind: str, values: Sequence[float | int], least: float = 2.0) -> tuple[str, float]:
    """The largest unit of which the largest of these is at least so many, and what it stands for."""
    most = max((abs(value) for value in values), default=0.0)
    fitting = [one for one in UNITS[kind] if most >= least * one[1]]
    return fitting[-1] if fitting else UNITS[kind][0]


def rounds(first: int, last: int) -> Spec:
    """A horizontal axis of rounds. Of few, each has its tick: asked for a least step alone, Vega puts ticks between them."""
    ticks = {"values": list(range(first, last + 1))} if last - first < 10 else {"tickMinStep": 1}
    return {"title": "Round", "axis": {"format": "d", **ticks}}


def along(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, Spec]]:
    """Rows with `round` and, as far as known, sums of `bytes`, `seconds` and `joules`, in units that suit; and what x may be.

    An axis on which nothing is known, or that stays at 0, is none.
    """
    found, axes = [dict(row) for row in rows], dict[str, Spec]()
    for name, (_, title) in AXES.items():
        known = [float(row[name]) for row in rows if row.get(name) is not None]
        if not any(known):
            continue
        word, size = unit(name, known) if name in UNITS else ("", 1.0)
        for row in found:
            if row.get(name) is not None:
                row[name] = _short(row[name] / size)
        axes[name] = {
            "field": name, "type": "quantitative", "title": f"{title} ({word})" if word else title,
            "scale": {"zero": name != "round", "nice": False}, **(rounds(int(min(known)), int(max(known))) if name == "round" else {}),
        }  # fmt: skip
    return found, axes


def _short(value: float) -> float:
    """Five digits: a page holds thousands of numbers."""
    return float(f"{value:.5g}") if math.isfinite(value) else value


def series(order: Sequence[str], every: Sequence[str] = (), marks: Sequence[Any] = ()) -> Spec:
    """Colour, or one of `marks`, by name; of one name alone there is no legend.

    every: all names of the page, so that each looks the same in all of its charts; by default those of this one.
    """
    domain = list(every or order)
    scale: Spec = {"domain": domain} | ({"range": cycle(marks, len(domain))} if marks else {})
    legend: Spec | None = {"values": list(order), "symbolOpacity": 1} if len(order) > 1 else None
    if legend and max(map(len, order)) > 16:  # two do not fit beside each other on a phone
        legend |= {"columns": {"expr": "width < 400 ? 1 : 5"}, "labelLimit": 240}
    return {"field": "series", "type": "nominal", "sort": domain, "title": None, "scale": scale, "legend": legend}


def lines(
    rows: Sequence[Row],
    order: Sequence[str],
    title: str,
    format: str = PLAIN,
    steps: bool = False,
    zero: bool = False,
    every: Sequence[str] = (),
) -> tuple[Spec, dict[str, Spec]]:
    """A line for each `series` of rows with `value`, and around it a band where they have `low` and `high`; its x encodings."""
    placed, axes = along(rows)
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": zero}, "axis": {"format": format}}
    told = [{"field": "series", "title": " "}, {"field": "round", "title": "round"}]
    told += [{"field": "value", "title": title.lower(), "format": format}]
    told += [
        {"field": name, "title": f"{AXES[name][0].lower()} {x['title'].rpartition(' ')[2]}"}  # with its unit
        for name, x in axes.items()
        if name != "round"
    ]
    color, dash = series(order, every), series(order, every, DASHES)
    if len(order) > 1:  # the legend shows a piece of the line, as the dash tells lines apart where colours do not
        color["legend"] |= {"symbolType": "stroke", "symbolSize": 260}
        dash["legend"] = color["legend"]
    domain = list(every or order)
    shapes = dict(zip(domain, cycle(SHAPES, len(domain)), strict=True))
    placed = [{**row, "shape": shapes[row["series"]]} for row in placed]
    shape = {"field": "shape", "type": "nominal", "scale": None, "legend": None}
    layers: list[Spec] = [
        {"mark": {"type": "line", "interpolate": "step-after" if steps else "linear"}, "encoding": {"y": y, "color": color, "strokeDash": dash}},
        {"mark": {"type": "point", "filled": True, "size": 42 if len(rows) < 200 else 12, "opacity": 1}, "encoding": {"y": y, "color": color, "shape": shape, "tooltip": told}},
    ]  # fmt: skip
    if any(row.get("low") is not None for row in rows):
        edges = {"y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color}
        layers.insert(0, {"mark": {"type": "area", "opacity": 0.16, "line": False}, "encoding": edges})
    return {"data": {"values": placed}, "height": 300, "encoding": {"x": axes["round"]}, "layer": layers}, axes


def cycle(values: Sequence[Any], count: int) -> list[Any]:
    return [values[at % len(values)] for at in range(count)]


def whole(counts: Iterable[float]) -> Spec:
    """An axis of these counts: left to itself, Vega writes some twice where they are few."""
    return {"format": "d", "tickCount": min(max([1, *map(int, counts)]), 5)}


def bars(rows: Sequence[Row], order: Sequence[str], title: str, format: str = PLAIN, x: str = "Round") -> Spec:
    """Stacked bars: `at` (an order of their own), `series`, `value`."""
    places = list(dict.fromkeys(row["at"] for row in rows))
    heights = (math.fsum(row["value"] for row in rows if row["at"] == at) for at in places)
    return {
        "data": {"values": rows}, "height": 240, "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "at", "type": "ordinal", "sort": places, "title": x, "axis": {"labelAngle": 0, "labelOverlap": "greedy"}},
            "y": {"field": "value", "type": "quantitative", "title": title, "axis": whole(heights) if format == "d" else {"format": format}},
            "color": series(order), "order": {"field": "rank"},
            "tooltip": [{"field": "at", "title": x.lower()}, {"field": "series", "title": " "},
                        {"field": "value", "title": title.lower(), "format": format}],
        },
    }  # fmt: skip


def binned(rounds: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Rounds in at most `BARS` groups of neighbours, each with its name."""
    wide = max(-(-len(rounds) // BARS), 1)
    groups = [list(rounds[at : at + wide]) for at in range(0, len(rounds), wide)]
    return [(str(one[0]) if len(one) == 1 else f"{one[0]}–{one[-1]}", one) for one in groups]


def lying(rows: Sequence[Row], order: Sequence[str], title: str, format: str = PLAIN) -> Spec:
    """Stacked bars that lie: `name`, `series`, `value`."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    return {
        "data": {"values": rows}, "height": 34 * max(len(names), 1), "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": names, "title": None},
            "x": {"field": "value", "type": "quantitative", "title": title, "axis": {"format": format}},
            "color": series(order), "order": {"field": "rank"},
            "tooltip": [{"field": "name", "title": " "}, {"field": "series", "title": "part"},
                        {"field": "value", "title": title.lower(), "format": format}],
        },
    }  # fmt: skip


def step(count: int) -> float:
    """Pixels of a map's row."""
    return max(min(18.0, TALLEST / max(count, 1)), 3.0)


def heat(rows: Sequence[Row], names: Sequence[str], title: str, x: Spec, most: float | None = None) -> Spec:
    """A map: `name` by row, a span from `start` to `stop`, `value` as its colour. Nothing drawn is nothing there."""
    high = max([float(row["value"]) for row in rows], default=1.0) if most is None else most
    return {
        "data": {"values": rows}, "height": round(step(len(names)) * max(len(names), 1)),
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "start", "type": "quantitative", "scale": {"nice": False, "zero": False}, **x},
            "x2": {"field": "stop"},
            "y": {"field": "name", "type": "nominal", "sort": list(names), "title": None, "scale": {"domain": list(names), "paddingInner": 0.08},
                  "axis": {"labelOverlap": "greedy", "grid": False, "ticks": False}},
            "color": {"field": "value", "type": "quantitative", "title": title, "scale": {"domain": [0, high], "range": "ramp"},
                      "legend": {"gradientLength": 160, "values": [0, high / 2, high], "format": PLAIN}},
            "tooltip": [{"field": "name", "title": " "}, {"field": "label", "title": str(x.get("title") or " ").lower()},
                        {"field": "value", "title": title.lower(), "format": PLAIN}],
        },
    }  # fmt: skip


def cells(rows: Sequence[Row], names: Sequence[str], columns: Sequence[str], title: str, x: str) -> Spec:
    """A map of `name` by row and `column`, with words on both axes."""
    spec = heat(rows, names, title, {"title": x})
    turned = sum(map(len, columns)) > 36  # letters that fit beside each other on a phone
    spec["encoding"] |= {
        "x": {"field": "column", "type": "nominal", "sort": list(columns), "title": x, "scale": {"domain": list(columns), "paddingInner": 0.04},
              "axis": {"labelAngle": -90 if turned else 0, "labelOverlap": "greedy", "grid": False, "ticks": False}},
        "tooltip": [{"field": "name", "title": " "}, {"field": "column", "title": x.lower()},
                    {"field": "value", "title": title.lower(), "format": PLAIN}],
    }  # fmt: skip
    del spec["encoding"]["x2"]
    return spec


def histogram(values: Sequence[float], count: int = 20) -> list[dict[str, float]]:
    """How many of these shares lie in each of `count` equal parts of 0 to 1; the last includes 1."""
    tally = [0] * count
    for value in values:
        tally[min(int(value * count + 1e-9), count - 1)] += 1
    return [{"start": at / count, "stop": (at + 1) / count, "value": n} for at, n in enumerate(tally)]


def distribution(parts: Sequence[Row], marks: Sequence[tuple[str, float]], title: str, y: str) -> Spec:
    """A histogram of `start`, `stop` and `value`, and rules at named places."""
    order = [name for name, _ in marks]
    x = {
        "field": "start",
        "type": "quantitative",
        "title": title,
        "axis": {"format": ".0%"},
        "scale": {"domain": [0, 1]},
    }
    ruled = series(order)
    return {
        "height": 240,
        "layer": [
            {"data": {"values": parts}, "mark": {"type": "bar", "style": "bars"},
             "encoding": {"x": {**x, "bin": {"binned": True}}, "x2": {"field": "stop"},
                          "y": {"field": "value", "type": "quantitative", "title": y, "axis": whole(part["value"] for part in parts)},
                          "tooltip": [{"field": "start", "format": ".0%", "title": "from"}, {"field": "stop", "format": ".0%", "title": "to"},
                                      {"field": "value", "title": y.lower()}]}},
            {"data": {"values": [{"series": name, "start": at} for name, at in marks]},
             "mark": {"type": "rule", "strokeWidth": 2.5},
             "encoding": {"x": x, "color": ruled, "strokeDash": series(order, marks=DASHES),
                          "tooltip": [{"field": "series", "title": " "}, {"field": "start", "format": SHARE, "title": "at"}]}},
        ],
    }  # fmt: skip


def points(
    rows: Sequence[Row],
    order: Sequence[str],
    x: tuple[str, str],
    y: tuple[str, str],
    logarithmic: bool = False,
    every: Sequence[str] = (),
) -> Spec:
    """A point for each row of `x`, `y`, `series` and `label`; x, y: title and format."""
    places = sorted({row["x"] for row in rows})
    axis = {"format": x[1]} | ({"values": places} if logarithmic and len(places) <= 8 else {})
    return {
        "data": {"values": rows}, "height": 260, "mark": {"type": "point", "filled": True, "size": 60, "opacity": FAINTEST},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": x[0], "axis": axis,
                  "scale": {"type": "log", "nice": False, "padding": 16} if logarithmic else {"zero": False, "padding": 8}},
            "y": {"field": "y", "type": "quantitative", "title": y[0], "axis": {"format": y[1]}, "scale": {"zero": False}},
            "color": series(order, every), "shape": series(order, every, SHAPES),
            "tooltip": [{"field": "label", "title": " "}, {"field": "series", "title": "  "},
                        {"field": "x", "title": x[0].lower(), "format": x[1]}, {"field": "y", "title": y[0].lower(), "format": y[1]}],
        },
    }  # fmt: skip


def ranges(
    rows: Sequence[Row], names: Sequence[str], title: str, format: str, every: Sequence[str], zero: bool = False
) -> Spec:
    """By `name`: single values as points (`value`), and what sums them up as a tick (`middle`) and a line from `low` to `high`.

    zero: a rule at 0.
    """
    x = {
        "field": "value",
        "type": "quantitative",
        "title": title,
        "axis": {"format": format},
        "scale": {"zero": False, "padding": 12},
    }
    y = {"field": "name", "type": "nominal", "sort": list(names), "title": None, "scale": {"domain": list(names)}}
    said = [{"field": "name", "title": " "}]
    layers: list[Spec] = [
        {"transform": [{"filter": "isValid(datum.low)"}], "mark": {"type": "rule", "strokeWidth": 2, "opacity": FAINTEST},
         "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"},
                      "tooltip": [*said, {"field": "low", "format": format, "title": "from"}, {"field": "high", "format": format, "title": "to"}]}},
        {"transform": [{"filter": "isValid(datum.middle)"}], "mark": {"type": "tick", "thickness": 3, "size": 20, "opacity": 1},
         "encoding": {"x": {**x, "field": "middle"}, "tooltip": [*said, {"field": "middle", "format": format, "title": title.lower()}]}},
        {"transform": [{"filter": "isValid(datum.value)"}], "mark": {"type": "point", "filled": True, "size": 50, "opacity": FAINTEST},
         "encoding": {"x": x, "tooltip": [*said, {"field": "value", "format": format, "title": title.lower()}, {"field": "label", "title": "of"}]}},
    ]  # fmt: skip
    if zero:
        layers.insert(0, {"data": {"values": [{"value": 0}]}, "mark": {"type": "rule", "style": "zero"}, "encoding": {"x": x}})  # fmt: skip
    color = {"field": "name", "type": "nominal", "scale": {"domain": list(every)}, "legend": None}
    for layer in layers[int(zero) :]:
        layer["encoding"] |= {"y": y, "color": color}
    return {"data": {"values": rows}, "height": 38 * max(len(names), 1), "layer": layers}


def offered(axes: Mapping[str, Row]) -> dict[str, str]:
    """The page's choice of horizontal axes."""
    return {name: AXES[name][0] for name in axes}
