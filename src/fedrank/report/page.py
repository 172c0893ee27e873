"""A page as a value: sections of figures, tables and charts; and the one HTML file, or the JSON, that is made of it."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import fedrank
from fedrank.told import finite

Cell = str | int | float | None
Row = Mapping[str, Any]
LONGEST = 300  # rows of a table that are shown
WHENCE = (  # a page goes from machine to machine, so it names no folder of one
    "Folders go by their last name here. A relative data.path starts from where the command is called."
)


@dataclass(frozen=True)
class Table:
    """Rows of text. left: how many of the first columns are words; the others are numbers, aligned right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""
    kind: Literal["table"] = "table"

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """Of more than `LONGEST` as many, evenly: the first, the last, and some of every arm or module in between."""
        last = len(self.rows) - 1
        if last < LONGEST:
            return self.rows
        return [self.rows[round(at * last / (LONGEST - 1))] for at in range(LONGEST)]

    @property
    def hidden(self) -> int:
        return max(len(self.rows) - LONGEST, 0)


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite spec, in words and as a table beside.

    axes: by the page's name of a horizontal axis, the x encoding that it stands for; empty where it has one of its own.
    """

    id: str
    title: str
    summary: str
    spec: Row
    table: Table
    axes: Mapping[str, Row] = field(default_factory=dict)
    note: str = ""
    kind: Literal["chart"] = "chart"


@dataclass(frozen=True)
class Facts:
    """Figures side by side: name, value, and what else there is to it."""

    figures: Sequence[tuple[str, str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Text:
    """A paragraph; of a tone where it is a conclusion, a verdict or a remark."""

    text: str
    tone: Literal["plain", "strong", "good", "bad", "note"] = "plain"
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Code:
    """Text as it is, such as a config or a command. folded: shown on demand, under its title."""

    text: str
    title: str
    folded: bool = False
    kind: Literal["code"] = "code"


Block = Table | Chart | Facts | Text | Code


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """kicker: what it is of. status: how far that is, in a word and a sentence. axes: name -> label of those on offer."""

    title: str
    kicker: str
    lead: str
    status: tuple[Literal["done", "running", "waiting", "stopped"], str]
    sections: Sequence[Section]
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The first section in which the horizontal axis can be chosen."""
        found = (s.id for s in self.sections if any(isinstance(b, Chart) and len(b.axes) > 1 for b in s.blocks))
        return next(found, "")

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """What draws each chart, by its id."""
        found = [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]
        return {chart.id: {"spec": chart.spec, "axes": chart.axes} for chart in found}


def inline(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end that."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def kept(text: str) -> str:
    """With numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=(%|[kMGT]?B|m?s|min|h|days|[kMG]?J|mJ)(?![\w-]))", "\u00a0", text)


def _template(name: str) -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ImportError("pages need jinja2: pip install 'fedrank[report]'") from None
    loader = PackageLoader("fedrank.report")
    made = Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["kept"] = kept
    return made.get_template(name)


@cache
def drawing() -> str:
    """Vega, Vega-Lite and vega-embed, as one script that sets `vegaEmbed`."""
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise ImportError("charts need vl-convert-python: pip install 'fedrank[report]'") from None
    code = str(javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    assert "</script" not in code.lower()
    return code


@cache
def _asset(name: str) -> str:
    return (files("fedrank.report") / "templates" / name).read_text(encoding="utf-8")


def policy(live: bool) -> str:
    """The Content-Security-Policy: these scripts and this style, and, where live, the page's own data.

    Style attributes are let through, in which the charts' library writes fonts and places.
    """
    scripts = " ".join(_hashed(code) for code in (drawing(), _asset("page.js")))
    return (
        f"default-src 'none'; script-src {scripts}; style-src-elem {_hashed(_asset('page.css'))}; "
        f"style-src-attr 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
        + ("; connect-src 'self'" if live else "")
    )


def _hashed(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def body(page: Page) -> str:
    """What of the page changes while a run goes on, as HTML."""
    return str(_template("body.html.j2").render(page=page))


def html(page: Page, live: bool = False) -> str:
    """The whole file. live: it asks its server for what is new."""
    return str(_template("page.html.j2").render(
        page=page, body=body(page), charts=inline(page.charts), library=drawing(), style=_asset("page.css"),
        script=_asset("page.js"), policy=policy(live), live=live, version=fedrank.__version__,
    ))  # fmt: skip


def data(page: Page) -> dict[str, Any]:
    """What a page that is open needs in order to show another state of the same run."""
    return {"title": page.title, "body": body(page), "charts": finite(page.charts), "said": page.status[1]}
