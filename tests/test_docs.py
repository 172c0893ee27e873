"""The pages: every command on them runs, every key and knob on them is one, and the site builds without a warning."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
import yaml
from pydantic import BaseModel

import pages
from fedrank import cli, config, methods
from fedrank.training import docstrings

PAGES = [page for page in pages.pages() if pages.fences(page)]
LONG = [page for page in PAGES if any(fence.how == "long" for fence in pages.fences(page))]
# All that is not run in the normal tests: page, mark, the first command. A new one has to be written down here.
LEFT_OUT: set[tuple[str, str, str]] = set()


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """The standard library's docstrings are the same for every page, and take a second."""
    kept = docstrings.labelled
    found = kept()
    docstrings.labelled = lambda: found
    yield
    docstrings.labelled = kept


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, in order, in an empty folder."""
    monkeypatch.setenv("COLUMNS", "120")
    pages.play(pages.fences(page), tmp_path)


def test_what_is_not_run_is_written_down() -> None:
    found = {
        (page, fence.mark, fence.body.strip().splitlines()[0])
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
        known = {option for parameter in command.params for option in parameter.opts}
        assert not {word for word in words if word.startswith("-")} - known, f"{page}: {line}"
