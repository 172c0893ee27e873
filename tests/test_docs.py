"""The pages: every command on them runs, every key and knob on them is one, and the site builds without a warning."""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
import yaml
from markdown.extensions.toc import slugify
from pydantic import BaseModel

import pages
from fedrank import cli, config, methods

PAGES = [page for page in pages.pages() if pages.fences(page)]
BESIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
SLOW = ("README.md", "docs/quickstart.md", "docs/observe.md", "docs/export.md", "docs/report.md")
LONG = [page for page in PAGES if any(fence.how == "long" for fence in pages.fences(page))]
INSTALLS, SITES = (
    "not run: it installs packages; make installs the same, in place, in CI",
    "long: server and sites on one machine, minutes",
)
# All that is not run in the normal tests, or not everywhere: page, mark, the first command. A new one is written down here.
LEFT_OUT = {
    ("README.md", "not run: they install all there is; CI runs the second", "make run"),
    ("README.md", INSTALLS, "pip install -c constraints.txt torch"),
    ("README.md", "long: MiniLM for 20 rounds, with the baselines", "fedrank run quickstart --baselines --out runs/quickstart"),
    ("docs/quickstart.md", "long: MiniLM over all rows", "fedrank run centralized rounds.count=1 --out runs/centralized"),
    ("docs/deploy.md", INSTALLS, "pip install -c constraints.txt '.[flower]'"),
    ("docs/deploy.md", SITES, "mkdir try && cd try"),
    ("docs/deploy.md", SITES, "for site in north south west; do"),
    ("docs/deploy.md", SITES, "bash fed/server/server.sh >server.log 2>&1 &"),
    ("docs/deploy.md", SITES, "cd fed/server"),
    ("docs/observe.md", "not run: it serves until it is stopped", "tensorboard --logdir runs"),
    ("docs/observe.md", "needs: jq", "jq -r"),
    ("README.md", "long: two dozen runs of MiniLM", "fedrank compare my.yaml --methods fedavg,fedara,flora --seeds 3"),
    ("docs/compare.md", "long: three dozen runs", "fedrank compare small.yaml --methods fedavg,fedara,ffa_lora --seeds 3"),
    ("docs/compare.md", "long: three dozen runs", "fedrank compare study.yaml --forecast"),
    ("docs/export.md", "not run: vLLM cannot be installed here", "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules adapter=runs/a/adapter"),
    ("docs/report.md", "not run: it serves until it is stopped", "fedrank watch runs/a"),
}  # fmt: skip


@pytest.mark.xdist_group("docs")  # in one process, which reads the built-in rows once
@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES])
def test_every_command_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, in order, in an empty folder."""
    monkeypatch.setenv("COLUMNS", "120")
    pages.play(pages.fences(page), tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("superlink")
@pytest.mark.parametrize("page", LONG)
def test_the_long_commands_of_a_page_too(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    pages.play(pages.fences(page), tmp_path, long=True)


def test_what_is_not_run_is_written_down() -> None:
    found = {
        (page, fence.mark, re.split(r"  +#| 'select", fence.body.strip().splitlines()[0])[0])
        for page in PAGES for fence in pages.fences(page) if fence.mark
    }  # fmt: skip
    assert found == LEFT_OUT
    assert {mark.partition(":")[0] for _, mark, _ in found} <= {"long", "not run", "needs"}


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides(page: str) -> None:
    """Every fence is of a kind that is run, or of one that shows and holds no command."""
    for fence in pages.fences(page):
        assert fence.kind in (*pages.RUN, *pages.QUIET), f"{fence.place}: {fence.kind!r}"
        if fence.kind in pages.QUIET:
            assert not re.search(r"^\s*\$?\s*(fedrank|pip|make|python|flwr|mkdocs) ", fence.body, re.M), fence.place


@pytest.mark.parametrize("page", pages.pages())
def test_commands_in_prose_are_commands(page: str) -> None:
    for line in pages.spoken(page):
        command: click.Command = typer.main.get_command(cli.app)
        words = line.split()[1:]
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        left = command.commands if isinstance(command, click.Group) else ()
        assert not left or not words or words[0].startswith("-"), f"{page}: {line}: {words[0]} is no command"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert not {word for word in words if word.startswith("-")} - known, f"{page}: {line}"


@pytest.mark.parametrize(
    "page",
    [*BESIDE, *(str(path.relative_to(pages.ROOT)) for path in sorted((pages.ROOT / "examples").glob("*/README.md")))],
)
def test_links_lead_somewhere(page: str) -> None:
    """Of the pages that are no part of the site, which looks at its own."""
    for path, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", (pages.ROOT / page).read_text(encoding="utf-8")
    ):
        to = ((pages.ROOT / page).parent / path).resolve() if path else pages.ROOT / page
        assert to.exists(), f"{page}: {path}"
        titles = re.findall(r"^#+ (.+)$", to.read_text(encoding="utf-8"), re.M) if to.suffix == ".md" else []
        assert not anchor or anchor in {slugify(title, "-") for title in titles}, f"{page}: {path}#{anchor}"


# ---- what stands in tables


def rows(text: str) -> list[list[str]]:
    """The cells of every table's rows."""
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")
    ]


def read(page: str) -> str:
    return (pages.ROOT / "docs" / page).read_text(encoding="utf-8")


def written(value: Any) -> str:
    """A default, as a config has it."""
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True)).strip().removesuffix("\n...").strip()


def defaults(model: type[BaseModel] = config.Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the config that is no section, and its default; – where it has none."""
    for name, entry in model.model_fields.items():
        kinds = [kind for kind in (entry.annotation, *get_args(entry.annotation)) if isinstance(kind, type)]
        nested = [kind for kind in kinds if issubclass(kind, BaseModel)]
        if nested:
            yield from defaults(nested[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "–" if entry.is_required() else written(entry.default)


def test_every_key_and_its_default_is_in_the_configuration_s_tables() -> None:
    found = [
        (cells[0].strip("`"), cells[1].strip("`")) for cells in rows(read("configuration.md")) if cells[0] != "key"
    ]
    assert sorted(found) == sorted(defaults())


@pytest.mark.parametrize("name", methods.names())
def test_a_method_s_page_says_what_the_method_says(name: str) -> None:
    """The paper, what travels, what is exact; every knob with its default, and the default learning rate."""
    text, cls = read(f"methods/{name}.md"), methods.find(name)
    about = cls.about
    exact = ["exact" if claim else "–" for claim in (about.exact_start, about.exact_aggregation)]
    facts = [
        ["clients may differ in", ", ".join(about.differs)], ["what travels", about.travels],
        ["start from the global function", exact[0]], ["merge to the mean of the functions", exact[1]],
        ["whose model", "personal" if about.personal else "global"],
        ["server optimizers, medians and Krum", "yes" if about.averages else "no"],
    ]  # fmt: skip
    tables = rows(text)
    assert [row for row in tables if row[0] in dict(facts)] == facts
    assert f"*{about.paper}*, {about.year}, [arXiv:{about.url.rpartition('/')[2]}]({about.url})." in text
    knobs = [tuple(cells[:2]) for cells in tables if cells[0].startswith(("`local.lr`", "`method."))]
    of_class = [(f"`method.{field.name}`", f"`{written(field.default)}`") for field in fields(cls) if field.init]
    assert knobs == [("`local.lr`", f"`{written(cls.default_lr)}`"), *of_class]
    reconstructed = "(reconstructed)" in sys.modules[cls.__module__].__doc__.splitlines()[0]
    assert reconstructed == ("(reconstructed)" in text.splitlines()[0])


def test_the_house_names_every_module() -> None:
    drawn = pages.fences("docs/house.md")[0].body
    source = Path(methods.__file__).parents[1]
    there = {path.name for path in source.glob("*.py")} | {f"{path.parent.name}/" for path in source.glob("*/*.py")}
    named = set(re.findall(r"\w+\.py|\w+/(?=\s)", drawn)) | {f"{name}/" for name in re.findall(r"(\w+)/\w+\.py", drawn)}
    assert there - named == {"__init__.py"}


@pytest.mark.parametrize("page", pages.pages())
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page: str) -> None:
    """A bar in a cell would cut it off."""
    text = re.sub(r"^```.*?^```$", "", (pages.ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in table.splitlines()}
        assert len(counts) == 1, f"{page}: {table[:80]}"
