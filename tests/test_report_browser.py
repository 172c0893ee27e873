"""Pages in a browser: every chart drawn, no word on the console, nothing asked of the network, for keyboards, screen readers and phones."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import compared as study
import fedrank
import toy
from fedrank import ledger
from fedrank.report import page, pages, watch
from fedrank.store import Store

sync = pytest.importorskip("playwright.sync_api", reason="no playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-playwright-python")
pytestmark = pytest.mark.xdist_group("browser")  # one browser, and the same few runs
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
CHARTS = "[...document.querySelectorAll('.plot')].map(p => [p.dataset.chart, p.dataset.state, p.querySelectorAll('svg .role-mark path, svg .role-mark line').length])"
WAITING = 20.0  # seconds


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on three kinds of devices whose clients fail and train depths of their own; a private one; one with private
    adapters; one that writes texts; a comparison.
    """
    folder = tmp_path_factory.mktemp("browser")
    (folder / "texts").mkdir()
    toy.write(folder / "texts", train=toy.texts(64, 0), test=toy.texts(48, 1))
    base = {
        "data": {"path": str(folder / "texts"), "partition": {"kind": "iid"}}, "clients": {"count": 6},
        "rounds": {"count": 3, "cohort": 4, "evaluate_every": 1}, "adapter": {"rank": 4, "targets": ["query", "value"]},
        "local": {"batch_size": 8, "max_length": 16}, "engine": {"workers": 1, "compute": "float32", "products": "torch"},
    }  # fmt: skip
    devices = "engine.fleet={devices: {jetson-tx2: 1, jetson-xavier-nx: 1, jetson-agx-xavier: 1}, jitter: 0.5}"
    run = fedrank.run(base, "method.name=legend", "engine.failure_rate=0.25", devices, out=folder / "run").path
    private = "privacy={kind: central, clip: 1.0, noise: 0.8, delta: 0.01}"
    private_ = fedrank.run(base, private, "rounds.personal=0", out=folder / "private").path
    own = fedrank.run(base, "method.name=pf2lora", "rounds.count=2", out=folder / "own").path
    pairs = [
        json.dumps({"prompt": f"{word} {at}:", "completion": word[::-1]})
        for word in ("red", "blue")
        for at in range(20)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    pairs_ = ("task=generate", "model.name=tiny-decoder", f"data.path={folder / 'pairs.jsonl'}", "adapter.targets=all",
              "generation={when: always, max_tokens: 4}", "rounds.count=2")  # fmt: skip
    texts = fedrank.run(base, *pairs_, out=folder / "generate").path
    found = {"run": run, "private": private_, "own": own, "texts": texts}
    return found | {"comparison": study.write(folder / "study", study.comparison())}


@contextmanager
def opened(
    chromium: Any, url: str, colours: str = "light", width: int = 1280
) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page once its charts are drawn, what its console said, and what it asked of the network."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=colours, reduced_motion="reduce"
    )
    shown, said, asked = context.new_page(), list[str](), list[str]()
    shown.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    shown.on("pageerror", lambda error: said.append(f"error: {error}"))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(url)
    until(shown, "Boolean(document.documentElement.dataset.drawn)")
    yield shown, said, asked
    context.close()


def until(shown: Any, expression: str) -> None:
    """Wait for this to be true; asked from outside, as the page's policy lets no text be evaluated in it."""
    end = time.monotonic() + WAITING
    while not shown.evaluate(expression):
        assert time.monotonic() < end, expression
        shown.wait_for_timeout(50)


def violations(shown: Any) -> list[tuple[str, str]]:
    found = axe.Axe().run(shown).response["violations"]
    return [(one["id"], node["html"][:200]) for one in found for node in one["nodes"]]


def redrawn(shown: Any, act: Callable[[], object]) -> None:
    """Do this, and wait until all charts were drawn once more."""
    before = int(shown.evaluate("document.documentElement.dataset.drawn"))
    act()
    until(shown, f"Number(document.documentElement.dataset.drawn) > {before}")


@pytest.mark.parametrize("what", ["run", "private", "own", "texts", "comparison"])
def test_a_page_draws_all_and_asks_nobody(what: str, runs: dict[str, Path], chromium: Any, tmp_path: Path) -> None:
    file = pages.report(runs[what], tmp_path / "page.html")
    made = pages.page_of(runs[what])
    with opened(chromium, file.as_uri()) as (shown, said, asked):
        assert {name for name, _, _ in shown.evaluate(CHARTS)} == made.charts.keys()
        assert [one for one in shown.evaluate(CHARTS) if one[1] != "drawn" or not one[2]] == []
        assert violations(shown) == []
        redrawn(shown, lambda: shown.click("#theme"))
        assert shown.evaluate("document.documentElement.dataset.theme") == "dark"
        assert [one for one in shown.evaluate(CHARTS) if one[1] != "drawn" or not one[2]] == []
        shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert violations(shown) == []
        assert (said, asked) == ([], [file.as_uri()])


def test_between_them_these_pages_have_every_chart(runs: dict[str, Path]) -> None:
    there = {name for path in runs.values() for name in pages.page_of(path).charts}
    source = "".join(file.read_text() for file in sorted(Path(pages.__file__).parent.glob("*.py")))
    named = re.findall(r'''\bChart\(\s*(f?)"([^"]+)"''', source)
    assert len(named) > 12
    for formatted, name in named:
        pattern = re.sub(r"\{[^}]+\}", ".+", name) if formatted else re.escape(name)
        assert any(re.fullmatch(pattern, one) for one in there), f"no page here has the chart {name}"
    scores = {"perplexity", "accuracy", "exact_match", "bleu", "rouge_l", "effective"}
    assert scores <= {name.replace("-", "_") for name in there}


@pytest.mark.parametrize("what", ["run", "comparison"])
def test_a_page_fits_a_phone(what: str, runs: dict[str, Path], chromium: Any, tmp_path: Path) -> None:
    file = pages.report(runs[what], tmp_path / "page.html")
    with opened(chromium, file.as_uri(), "dark", width=390) as (shown, said, _):
        shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390
        beyond = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, .unseen, svg svg, svg > *') && e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 120))"
        assert shown.evaluate(beyond) == []
        assert said == []


def test_the_axis_is_chosen_by_keyboard(runs: dict[str, Path], chromium: Any, tmp_path: Path) -> None:
    title = "document.querySelector('#plot-accuracy svg').textContent"
    with opened(chromium, pages.report(runs["run"], tmp_path / "page.html").as_uri()) as (shown, said, _):
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.className") == "skip"
        for _ in range(40):
            shown.keyboard.press("Tab")
            if shown.evaluate("document.activeElement.name") == "axis":
                break
        assert shown.evaluate("document.activeElement.value") == "round"
        assert "Bytes both ways" not in shown.evaluate(title)
        redrawn(shown, lambda: shown.keyboard.press("ArrowRight"))
        assert shown.evaluate("document.activeElement.value") == "bytes"
        assert "Bytes both ways" in shown.evaluate(title)
        redrawn(shown, lambda: shown.keyboard.press("ArrowRight"))
        assert "Simulated time" in shown.evaluate(title)
        assert said == []


def test_headings_go_down_by_one_and_landmarks_are_named(runs: dict[str, Path], chromium: Any, tmp_path: Path) -> None:
    with opened(chromium, pages.report(runs["run"], tmp_path / "page.html").as_uri()) as (shown, _, _):
        levels = shown.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(one => Number(one.tagName[1]))")
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        for landmark in ("header", "nav[aria-label]", "main", "footer"):
            assert shown.locator(landmark).count() == 1
        plots = "[...document.querySelectorAll('.plot')].map(p => document.getElementById(p.getAttribute('aria-describedby')).textContent)"
        assert all(len(text) > 10 for text in shown.evaluate(plots))


def test_a_hint_shows_text_as_text(chromium: Any, tmp_path: Path) -> None:
    """What the mouse finds in a chart comes from the run as well."""
    bad, found = "<img src=x onerror=alert(1)>", study.comparison()
    rename = json.loads(json.dumps(found).replace("fedara", bad))
    file = pages.report(study.write(tmp_path / "study", rename))
    with opened(chromium, file.as_uri()) as (shown, said, asked):
        shown.locator("#plot-s0-accuracy").scroll_into_view_if_needed()
        shown.locator("#plot-s0-accuracy svg .mark-symbol path").nth(12).hover(force=True)
        hint = shown.locator("#vg-tooltip-element")
        hint.wait_for(state="visible", timeout=1000 * WAITING)
        assert bad in hint.inner_text()
        assert shown.locator("img").count() == 0
        assert (said, len(asked)) == ([], 1)


def test_watch_draws_new_rounds_and_leaves_all_else_as_it_was(
    runs: dict[str, Path], chromium: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    ledgers = {name: ledger.read(runs["run"] / f"{name}.jsonl") for name in ("clients", "ranks", "rounds")}

    def play(round: int) -> None:
        for name, rows in ledgers.items():
            ledger.append(path / f"{name}.jsonl", [row for row in rows if row["round"] == round])

    with watch.served(path, "127.0.0.1", 0) as url, opened(chromium, url) as (shown, said, asked):
        until(shown, "document.querySelector('#said').textContent.includes('Waiting for a run')")
        for name in ("data.json", "config.yaml"):
            shutil.copy(runs["run"] / name, path)
        with Store(path).locked():
            play(1)
            until(shown, "document.querySelector('#plot-alive svg') !== null")
            assert "Running: 1 of 3 rounds" in shown.text_content("#said")
            shown.focus("input[name=axis]")
            redrawn(shown, lambda: shown.keyboard.press("ArrowRight"))
            shown.evaluate("document.querySelector('#accuracy-table').open = true")
            shown.evaluate(
                "scrollTo({top: 500, behavior: 'instant'}); window.kept = document.querySelector('#plot-alive')"
            )
            before = shown.evaluate("scrollY")
            redrawn(shown, lambda: play(2))
            until(shown, "document.querySelector('#said').textContent.startsWith('Running: 2 of 3')")
            assert shown.evaluate("document.activeElement.value") == "bytes"
            assert shown.evaluate("document.querySelector('input[name=axis]:checked').value") == "bytes"
            assert shown.evaluate("document.querySelector('#accuracy-table').open")
            assert abs(shown.evaluate("scrollY") - before) < 60  # no further than a line of text
            assert shown.evaluate("document.querySelector('#plot-alive') === window.kept")
            assert shown.locator("#accuracy-table tbody tr").count() == 2
            assert violations(shown) == []
            drawn = shown.evaluate("document.documentElement.dataset.drawn")
            shown.wait_for_timeout(2500)  # nothing is new: nothing is drawn
            assert shown.evaluate("document.documentElement.dataset.drawn") == drawn
        play(3)
        for name in ("personal.jsonl", "summary.json"):
            shutil.copy(runs["run"] / name, path)
        until(shown, "document.querySelector('#said').textContent.startsWith('Finished: 3 of 3')")
        until(shown, "document.querySelector('#plot-served svg') !== null")
        assert page.policy(live=True).endswith("connect-src 'self'")
        assert said == []
        assert {one.removeprefix(url) for one in asked} == {"", "data.json"}
