"""Clients that are trained or scored together: as one by one, to float tolerance, and the same whoever does it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from fedrank import experiment
from fedrank.adapter import gaussian, kaiming
from fedrank.config import Local
from fedrank.engines import local as engine
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import Device, Job, Plan, rng
from fedrank.training import linears, models, packing, workload
from fedrank.training.course import Ask, TrainingError
from fedrank.training.local import Trainer
from fedrank.training.scoring import Scorer

EQUAL = {"c0": 3, "c1": 3, "c2": 3}
ROWS = {"c0": np.arange(20), "c1": np.arange(20, 31), "c2": np.arange(31, 64)}


@pytest.fixture(scope="module", params=["packed", "padded"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    if request.param == "packed":
        return toy.trainer(1e-2)
    model = models.load(toy.settings(model={"name": "tiny-encoder"}), toy.LABELS)
    return Trainer(model, toy.encoded("train"), toy.encoded("test"), 1e-2, 1, "cpu")


def asks(trainer: Trainer, ranks: Mapping[str, int] = EQUAL, **settings: Any) -> list[Ask]:
    spec = trainer.model.spec
    start = spec.with_head(kaiming(spec.shapes, 3, spec.scale, rng(0, "start")))
    found = []
    for name, rows in ROWS.items():
        adapter = start.take({module: np.arange(ranks[name]) for module in start.blocks})
        plan, local = Plan(adapter.ids), Local(**{"batch_size": 8, **settings})
        job = Job(plan, 2, 10, spec, adapter, (), {}, local, Device(name, len(rows)), 0, print)
        found.append(Ask(job, rows, None, None))
    return found


def near(a: Any, b: Any) -> None:
    for name, array in toy.arrays(a).items():
        np.testing.assert_allclose(array, toy.arrays(b)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("ranks", [EQUAL, {"c0": 1, "c1": 3, "c2": 2}])
@pytest.mark.parametrize("settings", [{}, {"steps": 1}, {"epochs": 2, "clip": 0.1}])
def test_trained_together_as_one_by_one(trainer, ranks, settings):
    """Clients of unlike numbers of rows and ranks; who has no batch left drops out of the pass."""
    together = trainer.fit_all(asks(trainer, ranks, **settings))
    for found, ask in zip(together, asks(trainer, ranks, **settings), strict=True):
        alone = trainer.fit_all([ask])[0]
        near(found.adapter, alone.adapter)
        assert found.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
        assert (found.examples, found.metrics["steps"], found.metrics["rows_seen"]) == (
            alone.examples, alone.metrics["steps"], alone.metrics["rows_seen"],
        )  # fmt: skip


def test_what_is_observed_and_changed_is_each_clients_own(trainer):
    seen: dict[str, int] = {}

    def observe(name: str, values: Any, grads: Any) -> None:
        seen[name] = seen.get(name, 0) + 1
        if name == "c1":
            for grad in grads.values():
                grad.zero_()

    given = [replace(ask, observe=partial(observe, ask.job.device.id)) for ask in asks(trainer)]
    found = trainer.fit_all(given)
    assert seen == {"c0": 3, "c1": 2, "c2": 5}
    assert toy.same(found[1].adapter, given[1].job.adapter)
    assert not toy.same(found[0].adapter, given[0].job.adapter)


def test_dropout_is_drawn_for_each_client_alone(trainer):
    together = trainer.fit_all(asks(trainer, dropout=0.3))
    for found, ask in zip(together, asks(trainer, dropout=0.3), strict=True):
        assert toy.same(found.adapter, trainer.fit_all([ask])[0].adapter)


@pytest.mark.parametrize("who", range(3))
@pytest.mark.parametrize(("how", "most"), [("diverges", packing.MOST), ("diverges", 4), ("raises", packing.MOST)])
def test_one_that_fails_fails_alone(trainer, monkeypatch, who, how, most):
    """Whether its numbers are none any more or a method's own code raises; wherever it stands, filled up alike or not."""
    monkeypatch.setattr(packing, "MOST", most)

    def raises(*_: Any) -> None:
        raise ValueError("of this client")

    given = asks(trainer)
    diverging = replace(given[who].job, local=Local(batch_size=8, lr=1e37, clip=None, epochs=2))
    broken = {"diverges": {"job": diverging}, "raises": {"observe": raises}}[how]
    found = trainer.fit_all([replace(ask, **broken) if at == who else ask for at, ask in enumerate(given)])
    assert isinstance(found[who], TrainingError if how == "diverges" else ValueError)
    for at in {0, 1, 2} - {who}:
        near(found[at].adapter, trainer.fit_all([given[at]])[0].adapter)


def test_one_that_cannot_be_scored_fails_alone(trainer):
    adapter = trainer.model.spec.with_head(asks(trainer)[0].job.adapter)
    asked = [(adapter, trainer.test, np.arange(count), ()) for count in (5, 0, 9)]
    found = Scorer(trainer).evaluate_all(asked)
    assert str(found[1]) == "no rows to evaluate on"
    assert [found[at]["rows"] for at in (0, 2)] == [5, 9]


def test_scored_together_as_one_by_one(trainer):
    """Each adapter on its rows."""
    spec = trainer.model.spec
    adapters = [replace(toy.drawn(replace(spec, rank=2, scale=0.1), seed), dense=spec.dense) for seed in range(3)]
    asked = [
        (adapter, trainer.test, rows, ())
        for adapter, rows in zip(adapters, (np.arange(9), np.arange(9, 40), np.arange(5)), strict=True)
    ]
    for found, one in zip(Scorer(trainer).evaluate_all(asked), asked, strict=True):
        alone = Scorer(trainer).evaluate_all([one])[0]
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert (found["accuracy"], found["rows"]) == (alone["accuracy"], alone["rows"])


def test_groups_are_about_equal_in_rows_and_hold_everyone_once():
    devices = {f"c{n}": Device(f"c{n}", examples) for n, examples in enumerate((90, 10, 20, 80, 50, 40, 60))}
    carrier = engine.Local(devices, print, 0.0, 0, 3)
    groups = [[name for name, _ in group] for group in carrier._groups((name, bytes) for name in devices)]
    assert sorted(name for group in groups for name in group) == sorted(devices)
    sizes = [sum(devices[name].examples for name in group) for group in groups]
    assert len(groups) == 3
    assert max(sizes) - min(sizes) <= 40
    assert all(group == sorted(group) for group in groups)


def config(data: Path, **engine_settings: Any) -> dict[str, Any]:
    return {
        "model": {"name": "tiny-encoder", "pooling": "mean"}, "data": {"name": "docstrings", "train_limit": 240, "test_limit": 60},
        "clients": {"count": 6}, "rounds": {"count": 2, "cohort": 5, "evaluate_every": 1}, "local": {"max_length": 32},
        "adapter": {"rank": 4}, "method": {"name": "feddpa"}, "engine": engine_settings,
    }  # fmt: skip


def test_a_stack_that_is_filled_up_alike_in_some_steps_only(trainer, monkeypatch):
    if not trainer.frozen.packs:
        pytest.skip("of packed rows")
    alike = list[bool]()

    def layout(lengths: Any, counts: Any, whole: Any = packing.layout) -> Any:
        at, sizes = whole(lengths, counts)
        alike.extend([len(set(sizes)) == 1] * (len(sizes) > 1))
        return at, sizes

    monkeypatch.setattr(packing, "layout", layout)
    monkeypatch.setattr(packing, "MOST", 1.3)
    found = trainer.fit_all(asks(trainer, epochs=2))
    assert {*alike} == {True, False}
    for one, ask in zip(found, asks(trainer, epochs=2), strict=True):
        near(one.adapter, trainer.fit_all([ask])[0].adapter)


@pytest.mark.parametrize(
    ("parameters", "device", "length", "cohort", "workers", "stack"),
    [
        (10**5, "cpu", 10, 10, 2, 1),  # too small to gain
        (10**7, "cpu", 10, 10, 2, 5),  # 12 would fill a pass: all in one, for each worker
        (10**7, "cpu", 10, 60, 2, 10),  # three turns of 10 rather than two of 12 and one of 6
        (10**7, "cpu", 100, 10, 2, 1),  # 800 tokens of one client fill it
        (10**7, "cuda", 100, 32, 1, 16),
    ],
)
def test_as_many_are_stacked_as_fill_a_pass(parameters, device, length, cohort, workers, stack):
    settings = toy.settings(clients={"count": 100}, rounds={"cohort": cohort}, device=device)
    assert workload.stacking(parameters, np.full(7, length), settings, workers) == stack


@pytest.mark.slow
def test_workers_change_no_bit_and_a_stack_next_to_nothing(tmp_path):
    """A method that trains twice and scores personal models, over the whole engine."""
    runs = {
        (stack, workers): experiment.run(
            config(tmp_path, stack=stack, workers=workers), out=tmp_path / f"{stack}-{workers}"
        )
        for stack, workers in ((1, 1), (1, 2), (3, 1), (3, 2))
    }
    for stack in (1, 3):
        one, two = (runs[stack, workers].state.adapter for workers in (1, 2))
        assert toy.same(one, two)
        rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in runs[stack, w].rounds] for w in (1, 2)]
        assert rows[0] == rows[1]
    near(runs[1, 1].state.adapter, runs[3, 1].state.adapter)
    assert runs[3, 1].summary["numerics"]["stack"] == 3
    assert runs[1, 1].summary["personal_accuracy"] == pytest.approx(runs[3, 1].summary["personal_accuracy"], abs=0.02)


@dataclass(frozen=True)
class LastBlock(FedAvg):
    """FedAvg of the last block alone: the others are a frozen prefix."""

    def plan(self, state: Any, cohort: Any, seed: int) -> Any:
        return {client: Plan({n: b.ids for n, b in state.adapter.blocks.items() if ".1." in n}) for client in cohort}


@pytest.mark.slow
def test_a_frozen_prefix_changes_no_bit_with_workers_or_after_a_resume(tmp_path):
    raw = config(tmp_path, workers=1) | {"method": {"name": "fedavg"}}
    whole = experiment.run(raw, out=tmp_path / "whole", method=LastBlock())
    assert whole.summary["numerics"]["prefix"] == "apart"
    two = experiment.run(raw, "engine.workers=2", "engine.stack=2", out=tmp_path / "two", method=LastBlock())
    one = experiment.run(raw, "engine.stack=2", out=tmp_path / "one", method=LastBlock())
    assert toy.same(one.state.adapter, two.state.adapter)
    half = experiment.run(raw, "rounds.count=1", out=tmp_path / "half", method=LastBlock())
    resumed = experiment.resume(half.path, "rounds.count=+1", method=LastBlock())
    assert toy.same(resumed.state.adapter, whole.state.adapter)
    none = experiment.run(raw, "engine.prefix_bytes=0", out=tmp_path / "none", method=LastBlock())
    near(none.state.adapter, whole.state.adapter)


@pytest.mark.parametrize("factors", ["BAh", "BeAh"])
def test_clients_that_are_alike_are_one_batched_product(trainer, monkeypatch, factors):
    """As many products for three clients as for one, where all have batches of about as many tokens."""
    monkeypatch.setattr(packing, "MOST", 4)
    model = trainer.model
    make = gaussian if "e" in factors else kaiming
    start = model.spec.with_head(make(model.spec.shapes, 3, model.spec.scale, rng(0, "start")))

    def ask(name: str) -> Ask:
        plan, settings = Plan(start.ids, learn=factors), Local(batch_size=8, steps=2)
        job = Job(plan, 2, 10, model.spec, start, (), {}, settings, Device(name, 20), 0, print)
        return Ask(job, ROWS[name][:11], None, None)

    counts = list[int]()
    for names in (["c0"], list(ROWS)):
        called = list[int]()
        with monkeypatch.context() as patch:
            patch.setattr(linears, "_add", lambda *given, add=linears._add, to=called: to.append(1) or add(*given))
            found = trainer.fit_all([ask(name) for name in names])
        counts.append(len(called))
    assert 0 < counts[0] == counts[1]
    for name, together in zip(ROWS, found, strict=True):
        near(together.adapter, trainer.fit_all([ask(name)])[0].adapter)
