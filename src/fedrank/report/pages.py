"""What page a path has, and the file that is made of it."""

from pathlib import Path

from fedrank.report import compared, comparison, played, run
from fedrank.report.page import Page, Section, Text, html
from fedrank.store import StoreError, write
from fedrank.studies.record import FILE


def page_of(path: Path, rows: played.Read | None = None) -> Page:
    """What a run directory, a folder with a comparison.json, or that file itself tells. StoreError where it is none.

    rows: what reads the ledgers.
    """
    if compared.is_comparison(path):
        return comparison.page(compared.read(path))
    if played.is_run(path):
        return run.page(played.read(path, rows))
    raise StoreError(f"{path} is no run directory and holds no comparison: it has no config.yaml and no {FILE}")


def awaited(path: Path, rows: played.Read) -> Page:
    """The same; before there is anything, a page that says so."""
    if compared.is_comparison(path) or played.is_run(path):
        return page_of(path, rows)
    waits = Section(
        "waiting", "Nothing yet", [Text("The page shows the run, or the comparison, as soon as it begins.")]
    )
    return Page(
        path.name or str(path), "Not begun", "", ("waiting", f"Waiting for a run or a comparison in {path}."), [waits]
    )


def report(path: Path, out: Path | None = None) -> Path:
    """Write the page into one file, by default report.html beside what it tells of, and say where that is."""
    text = html(page_of(path))
    if out is None:
        out = (path if path.is_dir() else path.parent) / "report.html"
    write(out, text.encode())
    return out
