"""The commands that show a run or a comparison as a page: written into a file, or served while it grows."""

import threading
from pathlib import Path
from typing import Annotated

import typer

from fedrank.exits import mistakes, stoppable

What = Annotated[Path, typer.Argument(metavar="PATH", help="A run directory, or a folder with a comparison.json.")]


def report(
    path: What,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; by default PATH/report.html.")] = None,
) -> None:
    """Write the page of a run or of a comparison: one file, which needs nothing else."""
    from fedrank.report import pages

    with mistakes():
        print(pages.report(path, out))


def watch(
    path: What,
    host: Annotated[str, typer.Option(help="The address to serve at; all of the machine's: 0.0.0.0, for whoever reaches it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8600,
) -> None:  # fmt: skip
    """Serve the page of a run or of a comparison, before it begins, while it goes on, and after; Ctrl-C ends it."""
    from fedrank.report.watch import served

    with stoppable(code=0), mistakes(), served(path, host, port) as url:
        print(url, flush=True)
        threading.Event().wait()
