"""PF2LoRA: the invariants of its specification (10.1), by their numbers there; 2 to 6 are in test_bilevel, 12 in test_levels."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedrank import client, cost, levels
from fedrank.adapter import Adapter, Block, from_arrays, to_arrays
from fedrank.frame import unpack
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.pf2lora import PF2LoRA
from fedrank.protocol import Job, Lower, Plan, State, Update, rng
from fedrank.training.bilevel import hypergradient
from fedrank.training.hooks import live, mounted

FAST = PF2LoRA(derivative="first")


def fresh(method: PF2LoRA, name: str = "c0", **more: Any) -> Job:
    """A client's first job on the tiny model, with a real fit."""
    spec = toy.encoder().spec
    start = method.begin(spec, 3, 0).adapter
    fit = partial(toy.trainer(method.default_lr).fit, rows=np.arange(16))
    return replace(toy.job(spec, start, Plan(start.ids), fit, name, round=1), **more)


def trained(job: Job, method: PF2LoRA = FAST) -> Update:
    return next(iter(method.train([job])))


def whole(job: Job, update: Update) -> Adapter:
    """W_k as its client trained it."""
    return update.adapter.union(from_arrays(update.private, job.spec.scale))


def logits(adapter: Adapter | None) -> torch.Tensor:
    model = toy.encoder()
    inputs, _ = toy.encoded("test").batch(np.arange(8), "cpu")
    with torch.inference_mode():
        if adapter is None:
            return model.network(**inputs)
        with mounted(model.modules, model.heads, live(adapter, Adapter({}, adapter.scale, {}), "", "cpu")):
            return model.network(**inputs)


def test_01_every_client_starts_from_the_base_to_the_bit():
    for name in toy.CLIENTS:
        assert torch.equal(logits(PF2LoRA().adapt(fresh(PF2LoRA(), name))), logits(None))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three rounds; what every client began with, its frames and its store after every round."""
    path = tmp_path_factory.mktemp("pf2lora") / "run"
    began: dict[tuple[int, str], tuple[Adapter, Lower]] = {}
    frames: list[tuple[dict[str, Any], dict[str, np.ndarray], bytes]] = []
    stores: dict[int, dict[str, dict[str, np.ndarray]]] = {}

    def note(site: client.Site) -> client.Site:
        def fit(job: Job, observe: Any = None, lower: Lower | None = None) -> Update:
            began[job.round, job.device.id] = (job.adapter, lower)
            return site.fit(job, observe=observe, lower=lower)

        return replace(site, fit=fit)

    def carry(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        frames.append((*unpack(frame), frame))
        return [(name, frame)]

    f = toy.federation(FAST, path, alter=note, carry=lambda e: toy.Tampering(e, carry), evaluate_every=1)
    states = {0: f.begin}

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            number = event["round"]
            states[number] = f.last
            stores[number] = {c: f.store.private.load(c, number) for c in toy.CLIENTS}

    events = f.play(watch=keep)
    return {"federation": f, "began": began, "frames": frames, "stores": stores, "states": states, "events": events}


def private_of(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("private/"): array for name, array in stored.items() if name.startswith("private/")}


def test_07_after_a_round_the_common_part_is_common_and_the_private_one_untouched(run):
    for number in (2, 3):
        for name in toy.CLIENTS:
            adapter, lower = run["began"][number, name]
            assert toy.same(adapter, run["states"][number - 1].adapter)
            stored = private_of(run["stores"][number - 1][name])
            assert toy.same(lower.private, from_arrays(stored, adapter.scale))
            assert dict(lower.moments).keys() == levels.moments(stored).keys()
            assert all(np.array_equal(a, levels.moments(stored)[n]) for n, a in lower.moments.items())
    ones = [run["began"][3, name][1].private for name in toy.CLIENTS]
    assert not any(toy.same(ones[0], other) for other in ones[1:])
    assert all(block.B.any() for block in ones[0].blocks.values())


def test_07_no_private_number_is_in_any_frame(run):
    secrets = [
        array.tobytes() for stores in run["stores"].values() for stored in stores.values()
        for array in stored.values() if array.size > 8
    ]  # fmt: skip
    assert len(secrets) > 100
    for _, tensors, frame in run["frames"]:
        assert not any(secret in frame for secret in secrets)
        assert not any(secret[:32] in frame for secret in secrets)
        assert set(tensors) <= {"B", "A", "h.head.weight", "h.head.bias", "arrays.ranks", "checksum"}


@pytest.mark.parametrize("private_rank", [0, 1, 3])
def test_07_the_payload_does_not_depend_on_the_private_rank(private_rank, tmp_path):
    spec = toy.encoder().spec
    f = toy.federation(PF2LoRA(private_rank, derivative="first"), tmp_path / "run", rounds=2, cohort=2)
    expected = 4 * spec.rank * sum(m.out + m.in_ for m in spec.modules)
    for event in f.play()["client"]:
        assert (event["adapter_bytes_up"], event["adapter_bytes_down"]) == (expected, expected)


@pytest.mark.parametrize("epochs", [1, 3])
def test_08_with_one_client_aggregation_is_the_identity(epochs, tmp_path):
    updates: list[Adapter] = []

    def note(site: client.Site) -> client.Site:
        def fit(job: Job, observe: Any = None, lower: Lower | None = None) -> Update:
            update = site.fit(job, observe=observe, lower=lower)
            updates.append(update.adapter)
            return update

        return replace(site, fit=fit)

    f = toy.federation(FAST, tmp_path / "run", rounds=2, epochs=epochs, shares={"c0": np.arange(16)}, alter=note)
    f.play()
    assert toy.same(f.last.adapter, updates[-1])


@pytest.mark.parametrize("derivative", ["double", "finite", "first"])
def test_09_without_private_components_it_is_fedavg_to_the_bit(derivative, tmp_path):
    method = PF2LoRA(0, derivative=derivative, keep_moments=False, weights="examples")
    runs = [toy.federation(m, tmp_path / type(m).__name__, rounds=2) for m in (method, FedAvg())]
    for f in runs:
        f.play()
    assert toy.same(runs[0].last.adapter, runs[1].last.adapter)
    assert not toy.same(runs[0].last.adapter, runs[0].begin.adapter)


def test_09_and_differs_from_it_with_them(tmp_path):
    runs = [toy.federation(m, tmp_path / str(i), rounds=1) for i, m in enumerate((FAST, FedAvg()))]
    for f in runs:
        f.play()
    assert not toy.same(runs[0].last.adapter, runs[1].last.adapter)


def test_10_identical_clients_stay_identical():
    """The same data, start and batches: the mean is each one's own, and so are the private parts."""
    one, two = trained(fresh(FAST)), trained(fresh(FAST))
    assert all(np.array_equal(array, two.private[name]) for name, array in one.private.items())
    state = FAST.begin(toy.encoder().spec, 3, 0)
    assert toy.same(FAST.merge(state, toy.Arrived({"a": one, "b": two})).adapter, one.adapter)


@pytest.mark.parametrize(("settings", "share"), [({}, [1, 1, 1]), ({"weights": "examples"}, [1, 10, 100])])
def test_11_the_order_of_clients_does_not_matter_and_their_weights_do(settings, share):
    spec = toy.small()
    method = PF2LoRA(1, **settings)
    ranks = {"ranks": np.zeros(2, np.int32)}
    draws = {name: Update(toy.drawn(spec, seed), 10**seed, arrays=ranks) for seed, name in enumerate("abc")}
    state = State(0, 3, draws["a"].adapter)
    found = [method.merge(state, toy.Arrived({k: draws[k] for k in order})).adapter for order in permutations("abc")]
    assert all(toy.same(found[0], other) for other in found[1:])
    mean = sum(n * u.adapter.blocks["0.m"].A.astype(float) for n, u in zip(share, draws.values(), strict=True))
    np.testing.assert_array_equal(found[0].blocks["0.m"].A, (mean / sum(share)).astype(np.float32))


# ---- 13: the gauge


def squares(x: Sequence[torch.Tensor], y: Sequence[torch.Tensor]) -> torch.Tensor:
    target = torch.tensor(rng(0, "target").normal(size=(4, 5)))
    return (x[0] @ x[1] + y[0] @ y[1] - target).pow(2).sum() / 2


def trajectory(turn: np.ndarray, optimizer: type[torch.optim.Optimizer]) -> list[np.ndarray]:
    """W over a few steps from (B Q, Q^-1 A)."""
    draw = rng(0, "gauge")
    b, a, d, c = (torch.tensor(draw.normal(size=size)) for size in ((4, 3), (3, 5), (4, 2), (2, 5)))
    x, y = [b @ torch.tensor(turn), torch.tensor(np.linalg.inv(turn)) @ a], [d, c]
    rule = optimizer(x, lr=0.02)
    found = []
    for _ in range(4):
        found.append((x[0] @ x[1] + y[0] @ y[1]).numpy().copy())
        _, h, y = hypergradient(squares, squares, x, y, 0.05, "double")
        for value, grad in zip(x, h, strict=True):
            value.grad = grad
        rule.step()
    return found


def test_13_the_gauge_is_free_and_only_orthogonal_turns_leave_the_descent_alone():
    identity, draw = np.eye(3), rng(0, "turn")
    orthogonal, skewed = np.linalg.qr(draw.normal(size=(3, 3)))[0], draw.normal(size=(3, 3))
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        plain, turned, other = (trajectory(q, optimizer) for q in (identity, orthogonal, skewed))
        np.testing.assert_allclose(turned[0], plain[0], atol=1e-12)
        np.testing.assert_allclose(other[0], plain[0], atol=1e-12)
        assert np.abs(other[-1] - plain[-1]).max() > 1e-2
        gap = np.abs(turned[-1] - plain[-1]).max()
        assert gap < 1e-12 if optimizer is torch.optim.SGD else gap > 1e-3


# ---- 14, 15


def test_14_merged_weights_are_the_same_function():
    job = fresh(PF2LoRA(rate=0.5))
    found, model = whole(job, trained(job, PF2LoRA(rate=0.5))), toy.encoder()
    merged = copy.deepcopy(model.network)
    owners = {id(m): n for n, m in model.network.named_modules()}
    state = merged.state_dict()
    for name, delta in found.delta().items():
        state[f"{owners[id(model.modules[name])]}.weight"] += torch.tensor(delta)
    for name, tensor in found.dense.items():
        layer, _, part = name.rpartition(".")
        state[f"{owners[id(model.heads[layer])]}.{part}"] = torch.tensor(tensor)
    merged.load_state_dict(state)
    inputs, _ = toy.encoded("test").batch(np.arange(8), "cpu")
    with torch.inference_mode():
        torch.testing.assert_close(merged(**inputs), logits(found), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(found), logits(None), atol=1e-2)


@pytest.mark.parametrize("private_rank", [1, 2, 3])
def test_15_the_parameters_are_r_and_r_private_times_the_sides(private_rank):
    job = fresh(PF2LoRA(private_rank))
    sides = sum(m.out + m.in_ for m in job.spec.modules)

    def count(adapter: Adapter) -> int:
        return sum(b.B.size + b.A.size for b in adapter.blocks.values())

    assert count(PF2LoRA(private_rank).adapt(job)) == (job.spec.rank + private_rank) * sides
    assert count(levels.private(job, private_rank)) * job.spec.rank == count(job.adapter) * private_rank


@pytest.mark.parametrize(
    ("modules", "width", "rank", "private_rank", "common", "private"),
    [(24, 768, 8, 2, 294_912, 73_728), (24, 768, 8, 4, 294_912, 147_456), (48, 1024, 8, 2, 786_432, 196_608),
     (48, 1024, 4, 1, 393_216, 98_304), (96, 1600, 4, 2, 1_228_800, 614_400)],
)  # fmt: skip
def test_15_the_parameters_and_bytes_of_query_and_value_in_known_models(
    modules, width, rank, private_rank, common, private
):
    """Section 4: RoBERTa-base, twice; RoBERTa-large or GPT-2 medium; GPT-2 medium; GPT-2 XL."""
    spec = replace(toy.small({f"{at}.m": (width, width) for at in range(modules)}, rank), dense={})
    method = PF2LoRA(private_rank)
    start = method.begin(spec, 3, 0).adapter
    plan = method.plan(State(0, 3, start), toy.cohort("c0"), 0)["c0"]
    assert cost.trainable(spec, start, plan) == common + private
    assert cost.most_up(spec, start, plan, "f32").adapter == 4 * common
    own = levels.private(toy.job(spec, start, plan, print), private_rank)
    assert sum(block.B.size + block.A.size for block in own.blocks.values()) == private


# ---- what clients predict with, and the ranks they report


def test_clients_predict_with_both_levels_and_the_server_scores_the_common_one(run):
    f, state = run["federation"], run["federation"].last
    for name in toy.CLIENTS:
        stored = private_of(run["stores"][3][name])
        job = replace(fresh(FAST, name), adapter=state.adapter, private=stored)
        found = FAST.adapt(job)
        assert toy.same(found, state.adapter.union(from_arrays(stored, state.adapter.scale)))
    row = run["events"]["round"][-1]
    assert row["accuracy"] == f.server.evaluate(state.adapter, (), True)["accuracy"]
    assert row["personal_clients"] == 4
    own = []
    for name in toy.CLIENTS:
        private = from_arrays(private_of(run["stores"][3][name]), state.adapter.scale)
        own.append(f.sites[name].evaluate(state.adapter.union(private), (), True)["accuracy"])
    assert row["personal_accuracy"] == pytest.approx(np.mean(own))


def test_the_server_knows_every_clients_ranks_and_their_mean(run):
    state = run["federation"].last
    assert state.arrays.keys() == {f"ranks/{name}" for name in toy.CLIENTS}
    ranks = np.stack([state.arrays[f"ranks/{name}"] for name in toy.CLIENTS])
    assert state.metrics["effective_rank"] == pytest.approx(ranks.mean())
    assert run["events"]["round"][-1]["effective_rank"] == pytest.approx(ranks.mean())
    # of the models that the clients trained: common as uploaded, private as kept
    uploads = {m["client"]: t for m, t, _ in run["frames"] if m["kind"] == "update" and m["round"] == 3}
    spec = toy.encoder().spec
    for name in toy.CLIENTS:
        np.testing.assert_array_equal(uploads[name]["arrays.ranks"], state.arrays[f"ranks/{name}"])
    job = fresh(FAST)
    update = trained(job)
    delta = whole(job, update).delta()
    sizes = np.stack([np.linalg.svd(delta[m.name], compute_uv=False) for m in spec.modules])
    np.testing.assert_array_equal(update.arrays["ranks"], (sizes > FAST.threshold * sizes[:, :1]).sum(1))
    assert update.arrays["ranks"].max() <= spec.rank + FAST.private_rank


@pytest.mark.parametrize(("threshold", "rank"), [(0.0, 4), (0.05, 3), (0.3, 2), (0.6, 1)])
def test_a_clients_ranks_are_of_both_adapters_as_it_trained_them(threshold, rank):
    """Singular values 4 and 2 of the common one, 1 and 0.1 of its own; it began with others."""
    spec, method = toy.small({"0.m": (5, 6)}), PF2LoRA(1, threshold=threshold)
    start, eye = method.begin(spec, 3, 0).adapter, np.eye(6, dtype=np.float32)

    def diagonal(*values: float, at: int) -> Adapter:
        ids = np.arange(at, at + len(values))
        return Adapter({"0.m": Block(ids, eye[:5, ids] * np.float32(values), None, eye[ids])}, spec.scale, {})

    done = Update(diagonal(4, 2, at=0), 16, private=to_arrays(diagonal(1, 0.1, at=2)))
    job = toy.job(spec, start, Plan(start.ids), lambda job, lower: done)
    assert trained(job, method).arrays["ranks"].tolist() == [rank]


def test_ranks_of_clients_that_sit_out_stay():
    state = FAST.begin(toy.encoder().spec, 3, 0)
    one, two = (replace(trained(fresh(FAST)), arrays={"ranks": np.full(18, n, np.int32)}) for n in (2, 4))
    first = FAST.merge(state, toy.Arrived({"a": one, "b": two}))
    assert (first.metrics["effective_rank"], first.metrics["rank_spread"]) == (3.0, 1.0)
    second = FAST.merge(first, toy.Arrived({"b": one}))
    assert {name: int(ranks[0]) for name, ranks in second.arrays.items()} == {"ranks/a": 2, "ranks/b": 2}


# ---- what local training is asked for


@pytest.mark.parametrize("method", [PF2LoRA(), PF2LoRA(1, 0.3, "finite"), PF2LoRA(3, 0.02, "first")])
def test_the_lower_level_is_the_clients_own_with_the_methods_rate_and_derivative(method):
    job, given = fresh(method), list[Lower]()

    def fit(job: Job, lower: Lower) -> Update:
        given.append(lower)
        return Update(job.adapter, 16, private=to_arrays(lower.private))

    trained(replace(job, fit=fit), method)
    (lower,) = given
    assert (lower.rate, lower.derivative, dict(lower.moments)) == (method.rate, method.derivative, {})
    assert toy.same(lower.private, levels.private(job, method.private_rank))
    assert {block.rank for block in lower.private.blocks.values()} == {method.private_rank}


# ---- the private store


@pytest.mark.parametrize("keep", [True, False])
def test_the_optimizers_moments_are_kept_where_they_are_wanted(keep):
    method = replace(FAST, keep_moments=keep)
    job = fresh(method)
    first = trained(job, method)
    given: list[Lower] = []

    def fit(again: Job, lower: Lower) -> Update:
        given.append(lower)
        return job.fit(again, lower=lower)

    second = trained(replace(job, round=2, adapter=first.adapter, private=first.private, fit=fit), method)
    assert bool(given[0].moments) == keep
    kept = levels.moments(second.private)
    assert float(kept["B/step"]) == 4 if keep else not kept


def test_a_lost_private_adapter_is_missed(tmp_path):
    f = toy.federation(FAST, tmp_path / "run", rounds=1)
    f.play()
    site = f.sites["c0"]
    plan = replace(FAST.plan(f.last, {"c0": site.device}, 0)["c0"], since=1)
    frame = f.server.wire.request("train", "c0", plan, f.last)
    assert unpack(client.handle(frame, site))[0]["kind"] == "update"
    for file in Path(site.private.root / "c0").iterdir():
        file.unlink()
    meta, _ = unpack(client.handle(frame, site))
    assert "private components do not travel" in meta["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"private_rank": -1}, "0 or more, got -1"), ({"rate": 0.0}, "rate must be above 0"),
     ({"rate": float("nan")}, "rate must be above 0"), ({"threshold": 1.0}, r"in \[0, 1\), got 1.0")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PF2LoRA(**settings)


def test_the_private_rank_is_below_the_common_one():
    with pytest.raises(ValueError, match=r"private_rank=4 must be below adapter\.rank=4"):
        PF2LoRA(4).begin(toy.encoder().spec, 3, 0)


@pytest.mark.parametrize("derivative", ["double", "finite", "first"])
def test_the_plan_tells_the_costs(derivative):
    method = PF2LoRA(derivative=derivative)
    plan = method.plan(method.begin(toy.encoder().spec, 3, 0), toy.cohort("c0"), 0)["c0"]
    assert (plan.private, plan.passes) == (2, levels.PASSES[derivative])
    none = replace(method, private_rank=0)
    assert none.plan(none.begin(toy.encoder().spec, 3, 0), toy.cohort("c0"), 0)["c0"].passes == (1, 1)
    assert (method.lower, none.lower) == (derivative, None)
