"""The documentation site: built without a warning, whole, and without anything from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import pages

pytestmark = pytest.mark.xdist_group("site")  # it is built once


class Loads(HTMLParser):
    """What a page makes a browser fetch, from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        url = given.get("href") if tag == "link" else given.get("src")
        if url and url.startswith(("http:", "https:", "//")):
            self.found.append(url)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it; a warning, a link or an anchor to nowhere among them, ends it."""
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=pages.ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    assert "WARNING" not in made.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    for page in (pages.ROOT / "docs").rglob("*.md"):
        place = page.relative_to(pages.ROOT / "docs").with_suffix("")
        assert (site / (place.parent if place.name == "index" else place) / "index.html").exists(), place


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_reference_documents_what_it_lists(site: Path) -> None:
    """A docstring of each page is there, and so is what a method's author needs."""
    text = (site / "reference" / "protocol" / "index.html").read_text(encoding="utf-8")
    for name in ("State", "Plan", "Job", "Update", "Method", "Engine"):
        assert f'id="fedrank.protocol.{name}"' in text
    assert "What one client does in one round." in text


def test_every_module_below_the_engines_is_in_the_reference() -> None:
    listed = {
        found for page in (pages.ROOT / "docs" / "reference").glob("*.md")
        for found in re.findall(r"^::: fedrank\.(\w+)", page.read_text(encoding="utf-8"), re.M)
    }  # fmt: skip
    below = {"adapter", "protocol", "aggregation", "exactness", "levels", "optimizer", "privacy", "products", "robust",
             "selection", "cost", "devices", "fleet", "frame", "increments", "layout", "wire", "config", "hello", "store",
             "ledger", "client", "server", "export", "studies", "report"}  # fmt: skip
    assert below - listed == set()


def test_equations_are_set_and_names_of_the_code_are_not(site: Path) -> None:
    text = (site / "methods" / "legend" / "index.html").read_text(encoding="utf-8")
    equations = re.findall(r'<div class="equation">(.*?)</div>', text, re.S)
    assert "t<sub>k</sub>(d) = L · forward<sub>k</sub>" in equations[1]
    assert "min_depth" in equations[2]
    assert "method.min_depth" in text
    assert "trains the last d<sub>k</sub> of the L blocks" in text
