"""Increments of the frozen base: what travels, what a client keeps, what the working copy of the weights is."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import toy
from fedrank import client, cost, export, increments
from fedrank.adapter import Adapter, Block, kaiming, recompress
from fedrank.aggregation import average
from fedrank.frame import Refused, pack, sizes, unpack
from fedrank.increments import digest
from fedrank.protocol import Device, Job, ModelSpec, Plan, State, Update, rng
from fedrank.selection import everything
from fedrank.store import StoreError
from fedrank.training import tasks
from fedrank.training.hooks import incremented, live, mounted, swapped
from fedrank.training.local import Trainer
from fedrank.training.scoring import Scorer

SPEC = toy.small({"0.m": (2, 3), "1.m": (3, 2), "2.m": (4, 4)})


def factors(seed: int, *names: str, rank: int = 2, spec: ModelSpec = SPEC) -> Adapter:
    """Random factors without e, in these modules."""
    draw = rng(seed, "factors")
    sizes = {name: spec.shapes[name] for name in names or spec.shapes}
    blocks = {
        name: Block(np.arange(rank), *(f.astype(np.float32) for f in (draw.normal(size=(o, rank)),)), None, draw.normal(size=(rank, i)).astype(np.float32))
        for name, (o, i) in sizes.items()
    }  # fmt: skip
    return Adapter(blocks, spec.scale, {})


def whole(*updates: Adapter) -> Adapter:
    """One whole increment in place of these."""
    total: dict[str, np.ndarray] = {}
    for update in updates:
        for name, delta in update.delta().items():
            total[name] = total.get(name, 0) + delta
    return Adapter({}, updates[0].scale, total)


ONE, TWO, THREE = factors(1), factors(2, "0.m"), factors(3, "1.m", "2.m", rank=3)


# ---- what travels


def test_a_client_is_sent_what_came_after_its_last_round():
    updates = {1: ONE, 2: TWO, 3: THREE}
    assert list(increments.after(updates, -1)) == [1, 2, 3]  # never merged: everything
    assert list(increments.after(updates, 2)) == [2, 3]  # round 2 was played with 1 at hand
    assert list(increments.after(updates, 4)) == []


@pytest.mark.parametrize("updates", [{}, {3: ONE}, {1: ONE, 2: TWO, 7: THREE}, {2: whole(ONE, TWO), 3: THREE}])
def test_they_travel_as_they_are(updates):
    for since in (-1, 3):
        _, back = unpack(pack({"schema": 1}, increments.write(updates, since, SPEC)))
        found = increments.read(back, SPEC, SPEC.scale)
        assert not back
        assert list(found) == list(updates)  # all that hold are named, those that were sent before only named
        assert [n for n, update in found.items() if update is None] == [n for n in updates if n < since]
        assert all(update is None or toy.same(update, updates[n]) for n, update in found.items())


ODD = {
    "ranks without rounds": lambda t: t.pop("base.rounds"),
    "a factor that is missing": lambda t: t.pop("A.base"),
    "a factor that is too short": lambda t: t.update({"B.base": t["B.base"][:-1]}),
    "another type": lambda t: t.update({"A.base": t["A.base"].astype(np.float64)}),
    "rounds that do not ascend": lambda t: t.update({"base.rounds": t["base.rounds"][::-1].copy()}),
    "too few modules": lambda t: t.update({"base.ranks": t["base.ranks"][:, :-1].copy()}),
    "a rank below the whole": lambda t: t.update({"base.ranks": t["base.ranks"] - 9}),
    "a whole one that was not sent": lambda t: t["base.ranks"].__setitem__((0, 0), increments.WHOLE),
}


@pytest.mark.parametrize("what", ODD)
def test_what_does_not_fit_is_refused(what):
    tensors = unpack(pack({"schema": 1}, increments.write({1: ONE, 2: TWO}, -1, SPEC)))[1]
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    ODD[what](tensors)
    with pytest.raises(Refused):
        increments.read(tensors, SPEC, SPEC.scale)


@pytest.mark.parametrize("updates", [{}, {1: ONE, 4: THREE}, {2: whole(ONE), 3: TWO}])
@pytest.mark.parametrize("since", [-1, 2])
def test_a_requests_bytes_are_predicted_with_them(updates, since, tmp_path):
    f = toy.federation(Promising(), tmp_path / "run")
    spec = f.server.wire.spec
    moved = {n: _onto(update, spec) for n, update in updates.items()}
    plan = Plan(everything(f.begin.adapter), since=since)
    frame = f.server.wire.request("train", "c0", plan, replace(f.begin, round=5, base_updates=moved))
    assert cost.down(f.begin.adapter, plan, len(spec.modules), "f32", moved) == sizes(frame)


def _onto(update: Adapter, spec: ModelSpec) -> Adapter:
    """An update of as many of the real model's modules."""
    found = factors(9, *list(spec.shapes)[: len(update.blocks or update.dense)], spec=spec)
    return found if update.blocks else whole(found)


# ---- the working copy of the weights


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("form", ["factors", "whole", "both"])
def test_updated_weights_are_the_mounted_adapter(kind, form, tmp_path):
    """Also for GPT-2's Conv1D, whose weights are stored (in, out)."""
    model = toy.loaded(kind, tmp_path)
    parts = [factors(seed, spec=model.spec) for seed in (1, 2)]
    updates = {"factors": parts, "whole": [whole(*parts)], "both": [whole(parts[0]), parts[1]]}[form]
    before = {name: layer.weight.clone() for name, layer in model.modules.items()}
    batch, _ = toy.encoded("test").batch(np.arange(5), "cpu")
    batch = {k: v for k, v in batch.items() if k in model.tokenizer.model_input_names}
    with torch.inference_mode():
        plain = model.network(**batch)
        with swapped(model.modules, incremented(model.modules, updates)):
            found = model.network(**batch)
        both = [live(part, Adapter({}, part.scale, {}), "", "cpu") for part in parts]
        with mounted(model.modules, {}, both[0]), mounted(model.modules, {}, both[1]):
            expected = model.network(**batch)
        torch.testing.assert_close(model.network(**batch), plain, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert all(torch.equal(before[name], layer.weight) for name, layer in model.modules.items())


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all", "square"])
def test_training_and_scores_see_the_updated_base(kind, targets, tmp_path):
    """As they would a model whose own weights are those; also a square one of GPT-2's, whichever way it is stored."""
    model, rows = toy.loaded(kind, tmp_path), np.arange(12)
    train, test = (tasks.encode(toy.texts(30, seed), model.tokenizer, "classify", 16) for seed in (1, 2))
    spec, ends = model.spec, ("attn.c_proj", "query", "q_proj")
    names = [name for name in spec.shapes if targets == "all" or name.endswith(ends)]
    part = replace(factors(1, *names, spec=spec), scale=20.0)
    adapter = spec.with_head(kaiming(spec.shapes, 2, spec.scale, rng(0, "start")))
    job = toy.job(spec, adapter, Plan(everything(adapter)), print)

    def trainer() -> Trainer:
        return Trainer(model, train, test, 1e-2, 1, "cpu")

    found = trainer().fit(replace(job, base_updates=(part,)), rows).adapter
    scored = Scorer(trainer()).evaluate(job.adapter, test, rows, (part,))
    with swapped(model.modules, incremented(model.modules, [part])):
        other = trainer()
        expected, score = other.fit(job, rows).adapter, Scorer(other).evaluate(job.adapter, test, rows)
    for name, array in toy.arrays(expected).items():
        np.testing.assert_allclose(toy.arrays(found)[name], array, rtol=1e-3, atol=1e-4)
    assert scored["loss"] == pytest.approx(score["loss"], rel=1e-4)
    plain = toy.arrays(trainer().fit(job, rows).adapter)
    assert any(np.abs(plain[name] - array).max() > 1e-3 for name, array in toy.arrays(expected).items())


def test_a_digest_names_numbers_however_they_lie_in_memory():
    """Those read from a frame and those loaded from the client's store."""
    one = factors(1)
    turned = {n: Block(b.ids, np.asfortranarray(b.B), b.e, np.asfortranarray(b.A)) for n, b in one.blocks.items()}
    assert digest([one]) == digest([replace(one, blocks=turned)]) != digest([factors(2)])


def test_an_error_inside_puts_the_weights_back():
    modules = toy.encoder().modules
    name = next(iter(modules))
    pointer = modules[name].weight.data_ptr()
    with pytest.raises(RuntimeError), swapped(modules, {name: torch.zeros_like(modules[name].weight)}):
        raise RuntimeError
    assert modules[name].weight.data_ptr() == pointer


# ---- a whole run


@dataclass(frozen=True)
class Promising:
    """A test's method in the shape of FLoRA: each round's mean goes into the base, and A starts anew."""

    whole_from: int = 99
    default_lr: ClassVar[float] = 3e-2

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.with_head(kaiming(spec.shapes, spec.rank, spec.scale, rng(seed, "begin"))))

    def plan(self, state: State, cohort: Mapping[str, Device], seed: int) -> dict[str, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter)))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Any) -> State:
        mean, t = average(state.adapter, updates), state.round + 1
        promised = {**state.base_updates, t: replace(mean, dense={})}
        if t >= self.whole_from:
            *early, last = promised.values()
            old = {n: d for update in early for n, d in update.dense.items()}
            parts = [update for update in (*early, last) if update.blocks]
            total = {n: d + old.get(n, 0) for n, d in whole(*parts).dense.items()}
            promised = {t: Adapter({}, mean.scale, total)}
        fresh = {
            name: replace(block, B=np.zeros_like(block.B), A=rng(t, "fresh", name).permutation(block.A, axis=1))
            for name, block in mean.blocks.items()
        }
        return state.next(Adapter(fresh, mean.scale, mean.dense), base_updates=promised)


@pytest.mark.parametrize("whole_from", [99, 2, 3])
def test_every_client_trains_on_the_servers_base(whole_from, tmp_path):
    """Cohorts of two of four: who was away is sent all it missed, and rebuilds the same weights."""
    jobs: list[Job] = []

    def note(site: client.Site) -> client.Site:
        return replace(site, fit=lambda job, observe=None: (jobs.append(job), site.fit(job))[1])

    f = toy.federation(Promising(whole_from), tmp_path / "run", rounds=6, cohort=2, alter=note)
    events = f.play()
    assert all(row["clients_failed"] == 0 for row in events["round"])
    states = f.states
    for job in jobs:
        expected = states.get(job.round - 1)
        if expected is None:
            continue
        ours, theirs = (
            incremented(toy.encoder().modules, u) for u in (expected.base_updates.values(), job.base_updates)
        )
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-5, atol=1e-6)
    assert {job.device.id for job in jobs} == set(toy.CLIENTS)
    assert events["round"][-1]["train_loss"] < events["round"][0]["train_loss"]
    files = sorted(int(p.stem) for p in (f.store.path / "clients" / ".base").iterdir())
    assert files[-1] == 5  # what round 6 promised reached no one who trains
    assert files == [1, 2, 3, 4, 5] if whole_from == 99 else files[0] > 2


def test_resumes_to_the_same_bits_with_promises(tmp_path):
    f = toy.federation(Promising(3), tmp_path / "run", rounds=4, cohort=2)
    for event in f.server.play(f.begin):
        if event["event"] == "round":
            shutil.copytree(f.store.path, tmp_path / str(event["round"]))
    for number in (1, 2, 3):
        again = toy.federation(Promising(3), tmp_path / str(number), rounds=4, cohort=2)
        again.play(again.last)
        assert toy.equal(again.last, f.last)


def test_a_lost_base_update_is_missed(tmp_path):
    f = toy.federation(Promising(), tmp_path / "run", rounds=3)
    f.play()
    shutil.rmtree(f.store.path / "clients" / ".base")
    plan = Plan(everything(f.begin.adapter), since=3)
    frame = f.server.wire.request("train", "c0", plan, replace(f.last, round=3))
    meta, _ = unpack(client.handle(frame, f.sites["c0"]))
    assert meta["kind"] == "error"
    assert "update of the base model" in meta["error"]


def test_a_client_whose_own_versions_are_gone_misses_no_base_update(tmp_path):
    """Which updates hold is the server's word, so a lost store cannot leave a client on another base in silence."""
    f = toy.federation(Promising(), tmp_path / "run", rounds=3)
    f.play()
    shutil.rmtree(f.store.path / "clients" / "c0", ignore_errors=True)
    jobs: list[Job] = []
    noted = replace(f.sites["c0"], fit=lambda job, observe=None: (jobs.append(job), f.sites["c0"].fit(job))[1])
    frame = f.server.wire.request("train", "c0", Plan(everything(f.begin.adapter), since=3), replace(f.last, round=3))
    client.handle(frame, noted)
    for ours, theirs in zip(jobs[0].base_updates, f.last.base_updates.values(), strict=True):
        one, two = toy.arrays(ours), toy.arrays(theirs)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_an_update_that_came_again_otherwise_is_kept_as_it_came_last(tmp_path):
    private = toy.federation(Promising(), tmp_path / "run").store.private
    for update in (ONE, THREE, THREE):
        private.save_base({4: update})
        assert toy.same(private.base(4, update.scale), update)


def test_a_damaged_base_update_is_named(tmp_path):
    f = toy.federation(Promising(), tmp_path / "run", rounds=2)
    f.play()
    path = f.store.path / "clients" / ".base" / "0001.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"0001\.safetensors is damaged"):
        f.store.private.base(1, 2.0)


@pytest.mark.parametrize("whole_from", [99, 2])
def test_the_export_holds_the_whole_function(whole_from, tmp_path):
    f = toy.federation(Promising(whole_from), tmp_path / "run", rounds=3)
    f.play()
    state = f.last
    found = export.whole(state)
    expected = {name: np.zeros(shape) for name, shape in toy.encoder().spec.shapes.items()}
    for part in (state.adapter, *state.base_updates.values()):
        for name, delta in (part.delta() | part.dense if part is not state.adapter else part.delta()).items():
            expected[name] = expected[name] + delta
    for name, delta in found.delta().items():
        np.testing.assert_allclose(delta, expected[name], rtol=1e-4, atol=1e-6)
    assert found.dense.keys() == state.adapter.dense.keys()
    assert recompress(found).components == found.components  # no component twice
