"""The gallery: every example runs by the commands of its own README, and leaves what it says."""

import re
import shutil
from pathlib import Path

import pytest

import fedrank
import pages

FOLDER = pages.ROOT / "examples"
LEAVES = {
    "quickstart": ["runs/quickstart"], "own_data": ["runs/own_data"], "own_method": ["runs/fedavg", "runs/grow"],
    "own_fleet": ["runs/own_fleet"], "personal_models": ["runs/personal"],
}  # fmt: skip


def play(name: str, folder: Path) -> None:
    """A copy of the example, as its README says; there is nothing in it that no fence runs."""
    shutil.copytree(FOLDER / name, folder / name, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    found = pages.fences(f"examples/{name}/README.md")
    assert [fence.kind for fence in found] == ["sh"]
    pages.play(found, folder / name)


def test_the_page_lists_every_example() -> None:
    text = (pages.ROOT / "docs" / "examples.md").read_text()
    there = {path.name for path in FOLDER.iterdir() if (path / "README.md").exists()}
    assert set(re.findall(r"^`examples/(\w+)`:", text, re.M)) == there == {*LEAVES, "flower"}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    play(name, tmp_path)
    for path in LEAVES[name]:
        run = fedrank.Run(tmp_path / name / path)
        assert run.summary["rounds"] == run.config.rounds.count
        assert run.summary["clients_failed"] == 0
    if name == "personal_models":  # an adapter for every client, and no two alike
        adapters = list((tmp_path / name / "adapters").glob("*/adapter_model.safetensors"))
        assert len({path.read_bytes() for path in adapters}) == run.config.clients.count


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("superlink")
def test_the_example_of_flower_runs(tmp_path: Path) -> None:
    """It compares the adapters itself."""
    pytest.importorskip("ray")
    play("flower", tmp_path)
    assert fedrank.Run(tmp_path / "flower" / "runs" / "flower").summary["rounds"] == 2
