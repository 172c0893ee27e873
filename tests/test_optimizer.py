"""Server optimizers: their equations on small numbers, and that moments follow the components."""

import shutil
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrank
import toy
from fedrank import methods
from fedrank.adapter import Adapter, Block
from fedrank.config import ServerSettings
from fedrank.methods.fedavg import FedAvg
from fedrank.optimizer import step
from fedrank.protocol import State

KINDS = ("fedavgm", "fedadam", "fedyogi")


def one(value: float, head: float = 0.0) -> Adapter:
    """All numbers of the adapter are this one, in float64."""
    block = Block(np.arange(2), np.full((3, 2), value), np.full(2, value), np.full((2, 4), value))
    return Adapter({"m": block}, 1.0, {"head": np.full((2, 2), head)})


def merged(state: State, *change: float) -> State:
    """The state as a method would merge it: every factor moved by the first number, the head by the second."""
    moved = {name: array + change[0] for name, array in toy.arrays(state.adapter).items()}
    block = Block(np.arange(2), moved["m/B"], moved["m/e"], moved["m/A"])
    dense = {"head": state.adapter.dense["head"] + change[-1]}
    return state.next(replace(state.adapter, blocks={"m": block}, dense=dense))


# beta1 = 1/2, beta2 = 3/4, tau = 1/2, lr = 2; the changes are 1 and then 2, and v starts at tau^2 = 1/4.
STEPS = {
    # m = 1, then 1/2 + 2
    "fedavgm": (2 * 1, 2 * 2.5),
    # m = 1/2, then 1/4 + 1; v = 3/16 + 1/4 = 7/16, then 21/64 + 1
    "fedadam": (2 * 0.5 / (sqrt(7 / 16) + 0.5), 2 * 1.25 / (sqrt(85 / 64) + 0.5)),
    # v = 1/4 + 1/4, then 1/2 + 4/4
    "fedyogi": (2 * 0.5 / (sqrt(0.5) + 0.5), 2 * 1.25 / (sqrt(1.5) + 0.5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_by_hand(kind):
    settings = ServerSettings(optimizer=kind, lr=2, beta1=0.5, beta2=0.75, tau=0.5)
    state, value = State(0, 9, one(10.0, 5.0)), 10.0
    for change, go in zip((1.0, 2.0), STEPS[kind], strict=True):
        state, value = step(state, merged(state, change), settings), value + go
        for name, array in toy.arrays(state.adapter).items():
            expected = value - 5 * name.startswith("dense/")
            if not name.endswith("/ids"):
                np.testing.assert_allclose(array, expected, rtol=1e-14, err_msg=name)


def test_yogis_second_moment_falls_by_no_more_than_the_change():
    """Where v is above d^2: Adam's falls by a share of itself, Yogi's by (1 - beta2) d^2."""
    found = {}
    for kind in ("fedadam", "fedyogi"):
        settings = ServerSettings(optimizer=kind, beta2=0.5, tau=4)
        state = State(0, 9, one(0.0))
        found[kind] = step(state, merged(state, 2.0), settings).arrays["optimizer/v/B/m"]
    assert np.unique(found["fedadam"]) == 0.5 * 16 + 0.5 * 4
    assert np.unique(found["fedyogi"]) == 16 - 0.5 * 4


def test_none_changes_nothing_and_plain_momentum_neither():
    """fedavgm with beta1 = 0 and lr = 1 is what was merged, to the bit, also where the change swamps the value."""
    spec = toy.small()
    before, after = State(0, 9, toy.drawn(spec, 1)), State(0, 9, toy.drawn(spec, 2))
    odd = replace(after.adapter.blocks["0.m"], e=np.array([1e-30, -0.0], np.float32))
    after = replace(after, adapter=replace(after.adapter, blocks={**after.adapter.blocks, "0.m": odd}))
    assert step(before, after, ServerSettings()) is after
    plain = step(before, after, ServerSettings(optimizer="fedavgm", beta1=0.0, lr=1.0))
    assert toy.same(plain.adapter, after.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_go_with_their_components(kind):
    """After a removal the others step as if it had never been; a new component starts without moments."""
    spec, settings = toy.small(rank=3), ServerSettings(optimizer=kind)
    full, kept = toy.drawn(spec, 0), {"0.m": np.array([0, 2])}

    def drift(adapter: Adapter, seed: int) -> Adapter:
        """Each component goes the same way, whichever others there are."""
        draw = toy.drawn(spec, seed)
        blocks = {
            name: Block(block.ids, *(getattr(block, f) + getattr(draw.blocks[name].at(block.ids), f) for f in "BeA"))
            for name, block in adapter.blocks.items()
        }
        return replace(adapter, blocks=blocks)

    first = State(0, 9, full)
    second = step(first, first.next(drift(full, 1)), settings)
    pruned = step(second, second.next(drift(second.adapter, 2).take(kept)), settings)
    whole = step(second, second.next(drift(second.adapter, 2)), settings)
    assert toy.same(pruned.adapter, whole.adapter.take(kept))
    assert {name.rpartition("/")[2] for name in pruned.arrays} == {"0.m", "head.weight"}
    assert all(len(array) == 2 for name, array in pruned.arrays.items() if "head" not in name)

    # Component 1 comes back as a new one.
    back = pruned.next(drift(pruned.adapter, 3).union(full.take({"0.m": np.array([1])})))
    after = step(pruned, back, settings)
    assert toy.same(after.adapter.take({"0.m": np.array([1])}), full.take({"0.m": np.array([1])}))
    assert toy.same(after.adapter.take(kept), step(pruned, pruned.next(drift(pruned.adapter, 3)), settings).adapter)
    assert not after.arrays["optimizer/m/B/0.m"][1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_round_left_alone_does_not_drift(kind):
    """Momentum would move a factor that was frozen, or components that no one trained, away from what clients hold."""
    settings, spec = ServerSettings(optimizer=kind), toy.small(rank=3)
    state = State(0, 9, toy.drawn(spec, 0))
    state = step(state, state.next(toy.drawn(spec, 1)), settings)
    block, other = state.adapter.blocks["0.m"], toy.drawn(spec, 2).blocks["0.m"]
    b = np.where(np.arange(3) == 1, other.B, block.B)  # of component 1 only
    changed = {**state.adapter.blocks, "0.m": replace(block, B=b)}
    after = step(state, state.next(replace(state.adapter, blocks=changed)), settings)
    found = after.adapter.blocks["0.m"]
    assert np.all(found.B == block.B, axis=0).tolist() == [True, False, True]
    assert toy.same(
        replace(after.adapter, blocks={"0.m": replace(found, B=block.B)}), state.adapter.take({"0.m": np.arange(3)})
    )
    for name, array in after.arrays.items():
        same = np.array_equal(array, state.arrays[name])
        assert same == (not name.endswith("/B/0.m"))
        assert same or np.array_equal(array[[0, 2]], state.arrays[name][[0, 2]])


# ---- in a run


def federation(method: Any, path: Path, settings: ServerSettings, **more: Any) -> toy.Federation:
    f = toy.federation(method, path, **more)
    return replace(f, server=replace(f.server, optimizer=settings))


EACH = ("fedara", "fedsa_lora", "hetlora")  # with every optimizer, as fedavg; all others that average with one
OTHERS = [name for name in methods.names() if methods.find(name).about.averages and name not in ("fedavg", *EACH)]
QUICK = [*product(["fedavg"], KINDS), ("fedara", "fedadam")]
CASES = [*product(["fedavg", *EACH], KINDS), *product(OTHERS, ["fedadam"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*case, marks=[] if case in QUICK else toy.EXHAUSTIVE) for case in CASES]
)
def test_a_run_learns_and_resumes_to_the_same_bits(name, kind, tmp_path):
    method = methods.build({"name": name, **({"target_rank": 1} if name == "fedara" else {})})
    settings = ServerSettings(optimizer=kind)
    f = federation(method, tmp_path / "run", settings, rounds=4, epochs=2)
    f.server.store.save_state(f.begin, {})
    playing = f.server.play(f.begin)
    rows = [next(e for e in playing if e["event"] == "round") for _ in range(2)]
    again = federation(method, tmp_path / "run", settings, rounds=4, epochs=2)
    assert any(array.any() for name, array in again.last.arrays.items() if name.startswith("optimizer/"))
    shutil.copytree(f.store.path, tmp_path / "stopped")
    rows += [e for e in playing if e["event"] == "round"]
    again = federation(method, tmp_path / "stopped", settings, rounds=4, epochs=2)
    again.play(again.last)
    assert toy.equal(again.last, f.last)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    none = federation(method, tmp_path / "none", ServerSettings(), rounds=4, epochs=2)
    none.play()
    assert not toy.same(none.last.adapter, f.last.adapter)
    assert none.last.arrays.keys() == {n for n in f.last.arrays if not n.startswith("optimizer/")}


@pytest.mark.parametrize("kind", KINDS)
def test_roloras_frozen_factor_stays_where_its_clients_have_it(kind, tmp_path):
    f = federation(methods.build({"name": "rolora"}), tmp_path / "run", ServerSettings(optimizer=kind), rounds=3)
    f.play()
    for t, frozen in ((2, "B"), (3, "A")):
        for name, block in f.states[t].adapter.blocks.items():
            before = f.states[t - 1].adapter.blocks[name]
            np.testing.assert_array_equal(getattr(block, frozen), getattr(before, frozen))
            moves = "BA".replace(frozen, "")
            assert np.any(getattr(block, moves) != getattr(before, moves))


def test_exactness_is_of_the_mean_not_of_the_step(tmp_path):
    """One client: its function is the mean, whatever the server makes of it."""
    f = federation(FedAvg(), tmp_path / "run", ServerSettings(optimizer="fedadam"), rounds=1, cohort=1)
    rounds = f.server.rounds.model_copy(update={"exactness": True})
    replace(f, server=replace(f.server, rounds=rounds)).play()
    assert f.last.metrics["agg_fullmodel"] < 1e-9
    plain = federation(FedAvg(), tmp_path / "plain", ServerSettings(), rounds=1, cohort=1)
    plain.play()
    assert not toy.same(f.last.adapter, plain.last.adapter)


# ---- the config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("texts")
    toy.write(folder, train=toy.texts(24, 0), test=toy.texts(8, 0))
    return {
        "data": {"path": str(folder), "partition": {"kind": "iid"}}, "clients": {"count": 2}, "rounds": {"count": 2},
        "adapter": {"rank": 2}, "local": {"max_length": 16},
    }  # fmt: skip


def test_the_papers_defaults():
    found = {kind: ServerSettings(optimizer=kind) for kind in KINDS}
    assert {kind: s.lr for kind, s in found.items()} == {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}
    assert {(s.beta1, s.beta2, s.tau) for s in found.values()} == {(0.9, 0.99, 1e-3)}
    assert ServerSettings(optimizer="fedadam", lr=0.1).lr == 0.1


def test_a_config_with_one_plays_and_goes_on(base, tmp_path):
    run = fedrank.run(base, "server.optimizer=fedadam", out=tmp_path / "run")
    assert run.config.server == ServerSettings(optimizer="fedadam", lr=0.01)
    assert any(name.startswith("optimizer/v/") for name in run.state.arrays)
    with pytest.raises(ValueError, match=r"'server.lr' cannot be changed in a run that has begun"):
        fedrank.resume(run.path, "server.lr=1")
    assert fedrank.resume(run.path, "rounds.count=+1").state.round == 3


@dataclass(frozen=True)
class Silent(FedAvg):
    """It does not say what it is."""

    about = None


@pytest.mark.parametrize("method", ["fedex_lora", "flexlora", "flora", "local_only", "raflora", Silent()])
def test_a_method_without_a_mean_takes_none(method, base, tmp_path):
    named, given = ({"name": method}, None) if isinstance(method, str) else ({"name": "fedavg"}, method)
    with pytest.raises(ValueError, match=r"server.optimizer=fedyogi: \w+ makes no mean of its updates"):
        fedrank.run({**base, "method": named}, "server.optimizer=fedyogi", out=tmp_path / "run", method=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.optimizer=fedadm", "did you mean 'fedadam'"), ("server.beta1=1", "less than 1"), ("server.lr=0", "greater than 0"),
        ("server.tau=0", "greater than 0"), ("server.beta=0.9", "did you mean 'server.beta"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(override, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        fedrank.run(base, override, out=tmp_path / "run")
