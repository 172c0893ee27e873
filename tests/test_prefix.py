"""What is frozen below the lowest block that learns is computed once, and changes nothing but the time."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from fedrank.adapter import Adapter, Block, gaussian
from fedrank.config import Local
from fedrank.protocol import Device, Job, ModelSpec, Plan, rng
from fedrank.training import models, prefix
from fedrank.training.course import Ask
from fedrank.training.local import Trainer
from fedrank.training.scoring import Scorer

ROWS = np.arange(40)
ROOM = 1 << 20
KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """kind, the bytes that hidden states may take, and whether rows are packed where they can be."""
    known = {kind: toy.loaded(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}
    folder = str(toy.saved("bert", tmp_path_factory.mktemp("mean")))
    known["mean"] = models.load(toy.settings(model={"name": folder, "pooling": "mean"}), toy.LABELS)

    def make(kind: str = "mean", room: int = ROOM, packs: bool = True) -> Trainer:
        made = Trainer(known[kind], toy.encoded("train"), toy.encoded("test"), 1e-2, 1, "cpu", prefix_bytes=room)
        assert made.frozen.packs or kind != "mean"
        if not packs:
            made.frozen.first = None
        return made

    return make


def start(spec: ModelSpec, seed: int = 0) -> Adapter:
    """With no factor at zero: what is frozen counts."""
    draw = rng(seed, "start")
    filled = {
        name: Block.of(
            block.ids, {f: draw.normal(0, 0.3, part.shape).astype(np.float32) for f, part in block.rows.items()}
        )
        for name, block in gaussian(spec.shapes, 3, spec.scale, draw).blocks.items()
    }
    return spec.with_head(Adapter(filled, spec.scale, {}))


def ask(spec: ModelSpec, rest: bool = False, base: tuple[Adapter, ...] = (), seed: int = 0, **settings: Any) -> Ask:
    """Of the last block. rest: the components below it are there, frozen."""
    adapter = start(spec)
    top = max(module.block for module in spec.modules)
    ids = {module.name: adapter.blocks[module.name].ids for module in spec.modules}
    train = {module.name: ids[module.name] for module in spec.modules if module.block == top}
    plan = Plan(train, {name: ids[name] for name in ids if name not in train} if rest else {})
    local = Local(**{"batch_size": 8, "epochs": 2, **settings})
    return Ask(Job(plan, 2, 10, spec, adapter, base, {}, local, Device("c0", len(ROWS)), seed, print), ROWS, None, None)


def fit(trainer: Trainer, one: Ask) -> Any:
    [found] = trainer.fit_all([one])
    if isinstance(found, Exception):
        raise found
    return found


def near(a: Adapter, b: Adapter) -> None:
    for name, array in toy.arrays(a).items():
        np.testing.assert_allclose(array, toy.arrays(b)[name], rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", [False, True])
def test_training_is_as_in_whole_passes(trainer, kind, rest):
    with_, without = trainer(kind), trainer(kind, room=0)
    assert with_.kept
    assert not without.kept
    one = ask(with_.model.spec, rest)
    near(fit(with_, one).adapter, fit(without, one).adapter)
    assert with_.kept[with_.train].stamps[ROWS].all()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("stack", [1, 2])
def test_packed_and_padded_alone_and_stacked(trainer, packs, stack):
    with_, without = trainer(packs=packs), trainer(room=0, packs=packs)
    one = ask(with_.model.spec)
    other = replace(one, rows=np.arange(40, 57))
    for a, b in zip(with_.fit_all([one, other][:stack]), without.fit_all([one, other][:stack]), strict=True):
        near(a.adapter, b.adapter)


def test_its_bits_do_not_hang_on_what_is_kept(trainer):
    once = trainer()
    one = ask(once.model.spec)
    first = fit(once, one)
    assert toy.same(fit(once, one).adapter, first.adapter)  # from the file
    fit(once, replace(one, rows=ROWS[:9]))  # other rows are computed together: theirs take the place
    assert toy.same(fit(once, one).adapter, first.adapter)
    assert toy.same(fit(trainer(), one).adapter, first.adapter)


@pytest.mark.parametrize("packs", [True, False])
def test_every_row_is_computed_with_one_batch(packs):
    encoded, rows = toy.encoded("test"), np.arange(40)[::-1]
    batches = list(prefix.batches(encoded, rows, packs))
    assert sorted(np.concatenate(batches)) == sorted(rows)
    assert [len(batch) for batch in batches] == [32, 8]
    if packs:  # as they come
        assert np.concatenate(batches).tolist() == rows.tolist()


def test_it_is_computed_once(trainer):
    """And only as far as it is needed: its products are those of the first block, forward."""
    once, one = trainer(), ask(trainer().model.spec)
    calls = list[int]()
    product = once.frozen.product(once.frozen.groups[0])
    product.forward, forward = lambda x: calls.append(len(x)) or forward(x), product.forward
    fit(once, one)
    assert len(calls) == -(-len(ROWS) // prefix.CHUNK)
    calls.clear()
    fit(once, replace(one, job=replace(one.job, round=3)))
    assert not calls


def test_another_base_or_another_frozen_adapter_is_another_prefix(trainer):
    once, plain = trainer(), trainer(room=0)
    spec = once.model.spec
    update = Adapter(start(spec).blocks, spec.scale, {})
    changes = [ask(spec), ask(spec, base=(update,)), ask(spec, rest=True)]
    moved = replace(changes[2].job, adapter=start(spec, seed=1))
    losses = set[float]()
    for one in (*changes, replace(changes[2], job=moved), changes[0]):
        found = fit(once, one)
        near(found.adapter, fit(plain, one).adapter)
        losses.add(found.metrics["loss"])
    assert len(losses) == 4


def test_dropout_below_is_off(trainer):
    """Draws are the same whether the prefix is computed or read, and those above it are taken."""
    once = trainer()
    one = ask(once.model.spec, dropout=0.5)
    first = fit(once, one)
    assert toy.same(fit(once, one).adapter, first.adapter)
    assert first.metrics["loss"] != fit(once, ask(once.model.spec)).metrics["loss"]
    near(first.adapter, fit(trainer(room=0), one).adapter)  # also where nothing is kept
    assert not any(module.training for module in once.frozen.network.modules())


@pytest.mark.parametrize("packs", [True, False])
def test_evaluation_shares_it(trainer, packs):
    once, plain = trainer(packs=packs), trainer(room=0, packs=packs)
    spec, scorer, other = once.model.spec, Scorer(once), Scorer(plain)
    adapter = start(spec).take(ask(spec).job.plan.train)
    whole, half = np.arange(len(once.test)), np.arange(0, len(once.test), 2)
    for rows in (whole, half, whole):
        assert scorer.evaluate(adapter, once.test, rows) == pytest.approx(other.evaluate(adapter, plain.test, rows))
    batches = [whole[:16], whole[16:]]
    found = scorer.counts(adapter, once.test, batches)
    assert found == scorer.counts(adapter, once.test, batches)
    np.testing.assert_allclose(found, other.counts(adapter, plain.test, batches), rtol=1e-5)
    assert once.kept[once.test].stamps.all()


def test_scores_of_some_rows_and_of_all_keep_the_same_states(trainer, monkeypatch):
    """Whoever asks for which rows, and with how many others: nothing is computed twice."""
    once = trainer()
    scorer, adapter = Scorer(once), start(once.model.spec).take(ask(once.model.spec).job.plan.train)
    made = list[int]()
    compute = prefix.Prefix._computed
    monkeypatch.setattr(prefix.Prefix, "_computed", lambda one, rows: made.extend(rows) or compute(one, rows))
    whole, half = np.arange(len(once.test)), np.arange(0, len(once.test), 2)
    for asked in ([whole], [half], [half, half[3:], whole], [whole]):
        scorer.evaluate_all([(adapter, once.test, rows, ()) for rows in asked])
    assert sorted(made) == whole.tolist()


def test_nothing_is_kept_above_the_bytes_it_may_take(trainer):
    tokens = sum(int(toy.encoded(split).starts[-1]) for split in ("train", "test"))
    width = trainer().model.base.config.hidden_size
    assert len(trainer(room=tokens * width * 4).kept) == 2
    assert not trainer(room=tokens * width * 4 - 1).kept


def test_where_steps_do_not_visit_all_rows_nothing_is_computed_for_the_others(trainer):
    once = trainer()
    few, all_ = (ask(once.model.spec, epochs=1, steps=steps) for steps in (4, 5))
    fit(once, few)
    assert not once.kept[once.train].stamps.any()
    fit(once, all_)
    assert once.kept[once.train].stamps[ROWS].all()


def test_workers_share_what_is_kept(trainer):
    """Forked later, they read and write the same file."""
    once, one = trainer(), ask(trainer().model.spec)
    kept = once.kept[once.train]
    if not (child := os.fork()):
        try:
            fit(once, one)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (kept.stamps[ROWS] != 0).all()
    assert (kept.stamps[len(ROWS) :] == 0).all()
    assert toy.same(fit(once, one).adapter, fit(trainer(), one).adapter)


@pytest.mark.parametrize("written", [OSError(28, "No space left on device"), 3])
def test_a_full_disk_costs_time_and_no_bit(trainer, monkeypatch, caplog, written):
    def full(*_: Any) -> int:
        if isinstance(written, int):
            return written
        raise written

    once, one = trainer(), ask(trainer().model.spec)
    with monkeypatch.context() as patched:
        patched.setattr(prefix.os, "pwrite", full)
        found = fit(once, one)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "are not kept in" in caplog.text
    assert not once.kept[once.train].stamps.any()
    assert toy.same(found.adapter, fit(trainer(), one).adapter)


def test_a_model_that_cannot_begin_above_has_none(tmp_path: Path):
    """Its last layer adds what the first block makes."""
    model = toy.loaded("bert", tmp_path)
    encoder = model.base.bert.encoder
    forward = encoder.forward

    def skipping(*given: Any, **named: Any) -> Any:
        first = list[Any]()
        handle = encoder.layer[0].register_forward_hook(lambda module, inputs, output: first.append(output))
        try:
            found = forward(*given, **named)
        finally:
            handle.remove()
        found.last_hidden_state = found.last_hidden_state + first[0]
        return found

    encoder.forward = skipping
    trainer = Trainer(model, toy.encoded("train"), toy.encoded("test"), 1e-2, 1, "cpu", prefix_bytes=ROOM)
    assert trainer.frozen.blocks is None
    assert not trainer.kept


def test_a_model_whose_blocks_are_not_called_as_modules_has_none(tmp_path: Path):
    """It is used as it is: a trial that cannot be made is no error."""
    model = toy.loaded("bert", tmp_path)
    for layer in model.base.bert.encoder.layer:
        layer.__class__ = type(
            "Direct", (type(layer),), {"__call__": lambda self, *given, **named: self.forward(*given, **named)}
        )
    trainer = Trainer(model, toy.encoded("train"), toy.encoded("test"), 1e-2, 1, "cpu", prefix_bytes=ROOM)
    assert trainer.frozen.blocks is None
    assert fit(trainer, ask(model.spec)).metrics["loss"] > 0
