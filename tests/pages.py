"""Pages that are run: their fences, in order, in an empty folder, with one namespace of Python for the whole page.

A fence of sh is a script of commands. One of yaml or python that opens with a comment of a file's name alone is written
under that name; other python is run, other yaml has to be a part of a config. An HTML comment on the line before a fence
says what else holds: `<!-- long: why -->`, the exhaustive tests run it, those that follow one another as one session;
`<!-- not run: why -->`, nobody does; and `<!-- needs: PROGRAM -->`, it is run where that is installed. Text, json and
equations are no commands.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

import fedrank
from fedrank import cli, config

ROOT = Path(__file__).parents[1]
RUN = ("sh", "python", "yaml")
QUIET = ("text", "json", "equation")  # shown, and no commands
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]+?) -->\n)?```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
NAMED = re.compile(r"\A# ([\w./-]+\.\w+)\n")
SHELL = re.compile(
    r"[|<>&;$*`(){}]|^(for|do|done|if|then|fi|cd|export|until|while)\b", re.M
)  # more than simple commands


@dataclass(frozen=True)
class Fence:
    """A fence of a page. mark: what the comment before it says, such as "long: minutes"; line: where its body begins."""

    page: str
    line: int
    kind: str
    body: str
    mark: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def how(self) -> str:
        """ "long", "not run", "needs", or nothing."""
        return self.mark.partition(":")[0]

    @property
    def file(self) -> str | None:
        """The name under which it is written."""
        found = NAMED.match(self.body) if self.kind in ("yaml", "python") else None
        return found[1] if found else None


def pages() -> list[str]:
    """Every page with fences, by its path in the repository; reference pages have none."""
    return ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def fences(page: str) -> list[Fence]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Fence(page, line, match["kind"], match["body"], match["mark"] or ""))
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.M)), (
        f"{page}: a fence that is not read; is it indented?"
    )
    return found


def wanted(fence: Fence, long: bool) -> bool:
    """Whether it is to be run here."""
    if fence.how == "needs":
        return shutil.which(fence.mark.partition(": ")[2]) is not None
    return fence.how == "" or (fence.how == "long" and long)


def sessions(found: Iterable[Fence]) -> Iterator[Fence]:
    """Long scripts that follow one another as one."""
    for same, group in groupby(found, key=lambda fence: fence.how == "long" and fence.kind == "sh"):
        first, *more = group
        if same:
            yield replace(first, body="".join(fence.body for fence in (first, *more)))
        else:
            yield from (first, *more)


def play(found: Sequence[Fence], folder: Path, long: bool = False) -> None:
    """All of a page's fences that are run, in this folder; AssertionError says which one failed and what it said."""
    names: dict[str, Any] = {"__name__": "page"}
    with _inside(folder):
        for fence in sessions(fence for fence in found if wanted(fence, long)):
            if fence.file is not None:
                Path(fence.file).parent.mkdir(parents=True, exist_ok=True)
                Path(fence.file).write_text(fence.body)
            if fence.kind == "yaml":
                _is_config(fence)
            elif fence.file is not None:
                continue
            elif fence.kind == "python":
                lines = "\n" * (fence.line - 1) + fence.body  # a traceback names the page's line
                _said(fence, lambda lines=lines, fence=fence: exec(compile(lines, fence.page, "exec"), names))
            elif fence.kind == "sh":
                script(fence)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """This folder is the current one, and where modules are found; another page may have some of the same names."""
    path, before = list(sys.path), set(sys.modules)
    with contextlib.chdir(folder):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path[:] = path
            for name in set(sys.modules) - before:
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                    del sys.modules[name]


def _is_config(fence: Fence) -> None:
    """A config, or a part of one that lacks the rows; or another program's file, under a name."""
    found = yaml.safe_load(fence.body)
    if fence.file is not None and not found.keys() & config.Config.model_fields.keys():
        return
    rows = found.get("data", {})
    config.load({**found, "data": rows if {"name", "path"} & rows.keys() else {"name": "docstrings", **rows}})


def script(fence: Fence) -> None:
    """Its commands, in the current folder: fedrank's and Python's own in this process, where they mean the same."""
    if SHELL.search(re.sub(r"#.*", "", fence.body)):
        return _shell(fence, fence.body)
    for line in fence.body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["fedrank"]:
            done = CliRunner().invoke(cli.app, words[1:])
            assert done.exit_code == 0, f"{fence.place}: {line}\n{done.output}\n{done.exception!r}"
        elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
            _said(fence, lambda words=words: _program(words[1:]))
        elif words:
            _shell(fence, line)
    return None


def _program(words: Sequence[str]) -> None:
    """A script with its arguments, as Python runs it."""
    before = sys.argv
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before


def _said(fence: Fence, act: Callable[[], Any]) -> None:
    """Done; what it prints is shown where it fails."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            act()
    except BaseException as error:
        raise AssertionError(f"{fence.place}: {error!r}\n{out.getvalue()}") from error


def _shell(fence: Fence, text: str) -> None:
    words = ["bash", "-euo", "pipefail", "-c", text]
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=900)
    finally:  # what it has left in the background
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{fence.place}: {text}\n{said[-5000:]}"


def environment() -> dict[str, str]:
    """In which `fedrank`, `python` and the other programs of this Python are those under test."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": paths, "PYTHONPATH": str(Path(fedrank.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def spoken(page: str) -> Iterator[str]:
    """The commands of fedrank that its prose names: `fedrank show RUN`."""
    prose = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    yield from re.findall(r"`(fedrank [^`]+)`", prose.replace("\n", " "))
