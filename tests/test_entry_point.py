"""A method from another package is found through its entry point and named in a config like any other."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fedrank
import toy
from fedrank import methods
from fedrank.cli import app
from fedrank.store import Store

GOOD = '''
"""Slow averaging (Nobody, 2030)."""

from dataclasses import dataclass
from typing import ClassVar

from fedrank.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Calm:
    pull: float = 0.5
    default_lr: ClassVar[float] = 1e-3

    def begin(self, spec, rounds, seed):
        return FedAvg().begin(spec, rounds, seed)

    def plan(self, state, cohort, seed):
        return FedAvg().plan(state, cohort, seed)

    def train(self, jobs):
        return FedAvg().train(jobs)

    def merge(self, state, updates):
        after = FedAvg().merge(state, updates)
        return after.next(after.adapter, metrics={"pull": self.pull})
'''
BROKEN = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Lazy:
    default_lr = 1e-3

    def begin(self, spec, rounds, seed): ...

    def plan(self, state, cohort, seed): ...
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, value: str) -> None:
    """A package as pip leaves it, in a folder on sys.path."""
    (folder / f"{name}_package.py").write_text(source)
    about = folder / f"{name}_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fedrank.methods]\n{name} = {name}_package:{value}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, f"{name}_package", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> dict:
    folder = tmp_path / "texts"
    folder.mkdir()
    toy.write(folder, train=toy.texts(24, 0), test=toy.texts(8, 0))
    return {
        "data": {"path": str(folder), "partition": {"kind": "iid"}},
        "clients": {"count": 2},
        "rounds": {"count": 1},
    }


def test_a_method_of_another_package(config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "calm", GOOD, "Calm")
    assert "calm" in methods.names()
    run = fedrank.run({**config, "method": {"name": "calm", "pull": 0.25}}, out=tmp_path / "run")
    assert run.summary["method"] == "calm"
    assert run.rounds[0]["pull"] == 0.25
    assert fedrank.resume(run.path, "rounds.count=+1").state.round == 2  # by its name, as any other
    with pytest.raises(ValueError, match=r"method.pul: calm has no such hyper-parameter; did you mean 'pull'\?"):
        fedrank.run({**config, "method": {"name": "calm", "pul": 1}}, out=tmp_path / "other")


def with_pull(value: str) -> str:
    """The good method with another default."""
    source = GOOD.replace("import ClassVar", "import Any, ClassVar").replace(
        "pull: float = 0.5", f"pull: Any = {value}"
    )
    return "import math\n" + source.replace('metrics={"pull": self.pull}', "metrics={}")


@pytest.mark.parametrize("value", ["math.inf", "(1, 2.5)", "None", "('a', ('b', True))"])
def test_a_hyper_parameter_comes_back_on_resume(
    value: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "calm", with_pull(value), "Calm")
    run = fedrank.run({**config, "method": {"name": "calm"}}, out=tmp_path / "run")
    assert fedrank.resume(run.path, "rounds.count=+1").state.round == 2


@pytest.mark.parametrize("value", ["math.nan", "len", "frozenset('ab')", "(1, len)"])
def test_a_hyper_parameter_that_no_config_holds(
    value: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "calm", with_pull(value), "Calm")
    with pytest.raises(ValueError, match=r"method.pull: .* cannot be written in a config"):
        fedrank.run({**config, "method": {"name": "calm"}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["name", "object"])
def test_a_hyper_parameter_of_a_taken_name(
    word: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "calm", GOOD.replace("pull", word), "Calm")
    with pytest.raises(ValueError, match=f"Calm needs another word for {word}"):
        fedrank.run({**config, "method": {"name": "calm"}}, out=tmp_path / "run")


def test_the_method_of_the_page_on_methods(config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "write_a_method.md").read_text()
    source = next(part for part in text.split("```python\n") if "class FFALoRA" in part).split("```")[0]
    install(tmp_path, monkeypatch, "ffa", source, "FFALoRA")
    run = fedrank.run({**config, "method": {"name": "ffa"}, "rounds": {"count": 3, "cohort": 2}}, out=tmp_path / "run")
    begun = Store(run.path).state(0)[0].adapter.blocks
    for name, block in run.state.adapter.blocks.items():
        np.testing.assert_array_equal(block.A, begun[name].A)
        assert not np.array_equal(block.B, begun[name].B)
    first, second, _ = (row["adapter_bytes_down"] for row in run.rounds)
    assert second < first  # A goes down once


def test_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, monkeypatch, "calm", GOOD, "Calm")
    app(["methods", "--json"], standalone_mode=False)
    listed = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    told = {"name": "calm", "summary": "Slow averaging (Nobody, 2030).", "default_lr": 1e-3, "hyper_parameters": {"pull": 0.5}}  # fmt: skip
    assert listed["calm"] == dict.fromkeys(listed["fedavg"]) | told  # what it does not say is null
    app(["methods"], standalone_mode=False)
    assert "calm" in capsys.readouterr().out
    assert {"fedavg", "fedara"} <= listed.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [("Lazy", "Lazy is no method: it lacks train, merge"), ("Other", "has no attribute 'Other'")],
)
def test_a_broken_one(
    value: str, message: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    install(tmp_path, monkeypatch, "lazy", BROKEN, value)
    with pytest.raises(ValueError, match=f"method.name=lazy: .*{message}"):
        fedrank.run({**config, "method": {"name": "lazy"}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    app(["methods", "--json"], standalone_mode=False)  # the others are listed all the same
    shown = capsys.readouterr()
    assert "lazy" not in {m["name"] for m in json.loads(shown.out)}
    assert message in shown.err


def test_a_missing_package(config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "gone", "import nowhere_to_be_found", "Gone")
    with pytest.raises(ImportError, match="nowhere_to_be_found"):
        fedrank.run({**config, "method": {"name": "gone"}}, out=tmp_path / "run")
