"""FedARA: the properties of its specification, by their numbers there, on small numbers or the tiny model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import toy
from fedrank import methods, wire
from fedrank.adapter import Adapter, Block, gaussian, norms
from fedrank.aggregation import average
from fedrank.frame import sizes, unpack
from fedrank.methods.fedara import FedARA, Sensitivity
from fedrank.protocol import ModelSpec, Plan, State, Update, rng
from fedrank.selection import by_module, cubic, everything
from fedrank.training import tasks
from fedrank.training.hooks import live, mounted

BITS = 8


def state_of(method: FedARA, adapter: Adapter, round: int, rounds: int = 10) -> State:
    """A state after `round` rounds of a run that began with this adapter."""
    spec = toy.small()
    return replace(method.begin(spec, rounds, 0), round=round, adapter=adapter)


def voting(masks: Mapping[str, list[int]], adapter: Adapter) -> toy.Arrived:
    """Updates that all carry this adapter, each with its client's mask."""
    return toy.Arrived({
        name: Update(adapter, 1, arrays={"keep": np.packbits(np.array(mask, bool))}) for name, mask in masks.items()
    })  # fmt: skip


def mask_of(full: Adapter, kept: Adapter) -> np.ndarray:
    """Which of the components of `full` are still there."""
    return np.concatenate([
        np.isin(block.ids, kept.blocks[name].ids if name in kept.blocks else []) for name, block in full.blocks.items()
    ])  # fmt: skip


def batch(split: str = "train", rows: int = 8) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return toy.encoded(split).batch(np.arange(rows), "cpu")


def backward(adapter: Adapter, learn: str = "BeA", scale: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the flat gradients of one batch."""
    model, on = toy.encoder(), live(adapter, Adapter({}, adapter.scale, {}), learn, "cpu")
    inputs, labels = batch()
    with mounted(model.modules, model.heads, on):
        logits = model.network(**inputs)
        (tasks.loss(logits, labels) * scale).backward()
    return logits.detach(), on.grads


def trained(seed: int = 0, rank: int = 3) -> Adapter:
    """The SVD form on the tiny model with e away from zero, as after some training."""
    spec = replace(toy.encoder().spec, rank=rank)
    adapter = gaussian(spec.shapes, rank, spec.scale, rng(seed, "a"), std=0.2)
    draw = rng(seed, "e")
    blocks = {
        n: replace(b, e=draw.normal(size=rank).astype(np.float32)) for n, b in adapter.blocks.items()
    }  # fmt: skip
    return replace(adapter, blocks=blocks, dense=spec.dense)


def per_component(flat: np.ndarray, adapter: Adapter, factor: str) -> list[np.ndarray]:
    """A flat factor or gradient as one array (rank, vector) per module."""
    found, at = [], 0
    for block in adapter.blocks.values():
        width = {"B": block.B.shape[0], "e": 1, "A": block.A.shape[1]}[factor]
        found.append(flat[at : at + width * block.rank].reshape(block.rank, width))
        at += width * block.rank
    assert at == flat.size
    return found


@dataclass(frozen=True)
class FixedRank:
    """The SVD form averaged by FedAvg, with no allocation at all: the control of property 17."""

    default_lr: ClassVar[float] = FedARA.default_lr

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.with_head(gaussian(spec.shapes, spec.rank, spec.scale, rng(seed, "begin"))))

    def plan(self, state: State, cohort: Any, seed: int) -> dict[str, Plan]:
        return dict.fromkeys(cohort, Plan(train=everything(state.adapter)))

    def train(self, jobs: Any) -> Any:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Any) -> State:
        return state.next(average(state.adapter, updates))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One pruning run of five rounds, its states and what travelled."""
    frames: dict[tuple[int, str], bytes] = {}

    def keep(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        meta, _ = unpack(frame)
        if meta["kind"] == "update":
            frames[meta["round"], name] = frame
        return [(name, frame)]

    path = tmp_path_factory.mktemp("fedara") / "run"
    f = toy.federation(FedARA(target_rank=1), path, rounds=5, cohort=3, carry=lambda e: toy.Tampering(e, keep))
    states = {0: f.begin}
    f.store.save_state(f.begin, {})
    events = []
    for event in f.server.play(f.begin):
        events.append(event)
        if event["event"] == "round":
            states[event["round"]] = f.last
    return {"states": states, "events": events, "frames": frames, "federation": f}


# ---- 1-6: the adapter


def test_01_the_increment_is_zero_and_the_function_is_the_backbones_at_the_start():
    f = FedARA().begin(toy.encoder().spec, 10, 0).adapter
    assert all(np.all(delta == 0) for delta in f.delta().values())
    model, (inputs, _) = toy.encoder(), batch()
    with torch.inference_mode():
        bare = model.network(**inputs)
        on = live(Adapter({}, f.scale, {}), f, "", "cpu")
        with mounted(model.modules, model.heads, on):
            assert torch.equal(model.network(**inputs), bare)


def test_02_at_the_first_step_only_e_moves_and_all_scores_are_zero():
    start = FedARA().begin(toy.encoder().spec, 10, 0).adapter
    _, grads = backward(start)
    assert not grads["B"].any()
    assert not grads["A"].any()
    assert grads["e"].abs().min() > 0
    sensitivity = Sensitivity(0.85)
    sensitivity(toy.flat(start), grads)
    assert np.all(sensitivity.triplets(start) == 0)


def test_03_gauge_identity_of_the_gradients():
    """sum_c A_ic dA_ic = E_i dE_i = sum_c B_ci dB_ci, signed, for every triplet."""
    adapter = trained()
    values, (_, grads) = toy.flat(adapter), backward(adapter)
    product = {f: (values[f] * grads[f]).double().numpy() for f in "BeA"}
    sums = {f: np.concatenate([p.sum(1) for p in per_component(product[f], adapter, f)]) for f in "BeA"}
    assert np.abs(sums["e"]).max() > 1e-4
    np.testing.assert_allclose(sums["A"], sums["e"], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(sums["B"], sums["e"], rtol=1e-3, atol=1e-7)


def test_03_gauge_identity_on_two_by_two():
    b, e, a = (torch.tensor(v, requires_grad=True) for v in ([[1.0, 2], [3, -1]], [0.5, -2.0], [[2.0, 1], [1, 3]]))
    (torch.tensor([[1.0, -2], [0.5, 3]]) * (b @ torch.diag(e) @ a)).sum().backward()
    np.testing.assert_allclose((a * a.grad).sum(1).detach(), (e * e.grad).detach())
    np.testing.assert_allclose((b * b.grad).sum(0).detach(), (e * e.grad).detach())


def masked_and_compacted() -> tuple[Adapter, Adapter, np.ndarray]:
    """The same adapter with half its triplets, and one whole module, zeroed or deleted."""
    full = trained()
    keep = rng(1, "keep").random(full.components) < 0.5
    keep[:3] = False
    gone = by_module(full, ~keep)
    blocks = {n: replace(b, e=np.where(np.isin(b.ids, gone[n]), 0, b.e)) for n, b in full.blocks.items()}
    return replace(full, blocks=blocks), full.without(gone), keep


def test_04_masked_and_compacted_give_equal_outputs_and_gradients():
    masked, compacted, keep = masked_and_compacted()
    assert len(compacted.blocks) < len(masked.blocks)
    (out_masked, g_masked), (out, g) = backward(masked), backward(compacted)
    torch.testing.assert_close(out, out_masked, rtol=1e-5, atol=1e-6)
    for factor in "BeA":
        wide = np.concatenate([
            part[np.asarray(mask)].reshape(-1)
            for part, mask in zip(per_component(g_masked[factor].numpy(), masked, factor), np.split(keep, keep.size // 3), strict=True)
        ])  # fmt: skip
        np.testing.assert_allclose(g[factor].numpy(), wide, rtol=1e-4, atol=1e-7)


def test_05_a_soft_masked_e_still_gets_a_gradient_so_deletion_is_needed():
    masked, _, keep = masked_and_compacted()
    _, grads = backward(masked)
    assert np.all(grads["e"].numpy()[~keep] != 0)
    a = np.concatenate(per_component(grads["A"].numpy(), masked, "A")[:1])
    assert np.all(a == 0)  # but its directions do not move


def svd(b: Any, e: Any, a: Any) -> Adapter:
    b, e, a = (np.array(v, np.float32) for v in (b, e, a))
    return Adapter({"m": Block(np.arange(len(e)), b, e, a)}, 1.0, {})


def merged(*clients: Adapter, weights: tuple[int, ...] = (1, 1)) -> Adapter:
    updates = {f"c{i}": Update(a, n) for i, (a, n) in enumerate(zip(clients, weights, strict=True))}
    return average(clients[0], toy.Arrived(updates))


def test_06_averaging_is_exact_while_only_e_differs():
    one = svd([[1, 2], [0, 1]], [1, 3], [[1, 0], [2, 1]])
    two = svd([[1, 2], [0, 1]], [-1, 5], [[1, 0], [2, 1]])
    found = merged(one, two, weights=(1, 3)).delta()["m"]
    np.testing.assert_array_equal(found, (one.delta()["m"] + 3 * two.delta()["m"]) / 4)


def test_06_averaging_is_biased_once_the_factors_differ():
    """mean(B) mean(A) = [[.5], [.5]] [.5 .5] has 1/4 everywhere; the mean of the products is I / 2."""
    one, two = svd([[1], [0]], [1], [[1, 0]]), svd([[0], [1]], [1], [[0, 1]])
    np.testing.assert_array_equal(merged(one, two).delta()["m"], np.full((2, 2), 0.25))
    np.testing.assert_array_equal((one.delta()["m"] + two.delta()["m"]) / 2, np.eye(2) / 2)


# ---- 7-11: budget and arbitration


@given(
    rounds=st.integers(2, 60), start=st.integers(2, 500), share=st.floats(0.01, 1),
    warmup=st.floats(0, 0.6), settle=st.floats(0, 0.39),
)  # fmt: skip
@examples(max_examples=60, deadline=None)
def test_07_the_budget_starts_full_never_rises_and_ends_at_its_target(rounds, start, share, warmup, settle):
    end = max(1, int(start * share))
    first, last = math.ceil(warmup * rounds), math.floor(settle * rounds)
    budgets = [cubic(t, rounds, start, end, first, last) for t in range(1, rounds + 1)]
    assert all(b == start for b in budgets[:first])
    assert all(a >= b for a, b in pairwise(budgets))
    assert all(b == end for b in budgets[rounds - last :])
    if first + last < rounds:
        assert budgets[rounds - last - 1] == end


def test_07_the_cubic_by_hand():
    """N0 = 16, NT = 4, T = 10, T_w = 1, T_f = 3: b = ceil(4 + 12 (1 - (t - 1) / 6)^3)."""
    assert [cubic(t, 10, 16, 4, 1, 3) for t in range(1, 11)] == [16, 11, 8, 6, 5, 5, 4, 4, 4, 4]


def test_08_masks_are_monotone(run):
    states = run["states"]
    for before, after in pairwise(states.values()):
        for name, block in after.adapter.blocks.items():
            assert set(block.ids) <= set(before.adapter.blocks[name].ids)
    assert states[5].adapter.components < states[0].adapter.components


def test_09_budget_mode_keeps_exactly_the_budget(run):
    method, states = run["federation"].server.method, run["states"]
    for t in range(1, 6):
        budget, before = method.budget(states[t - 1]), states[t - 1].adapter.components
        assert states[t].adapter.components == (before if budget is None else min(budget, before))
    assert states[5].adapter.components == len(toy.encoder().spec.modules)  # target_rank 1


@given(st.data())
@examples(max_examples=40, deadline=None)
def test_09_budget_mode_keeps_exactly_the_budget_whatever_the_votes(data):
    method = FedARA(target_rank=1)
    full = toy.drawn(toy.small())
    state = state_of(method, full, round=data.draw(st.integers(1, 6)))
    masks = {f"c{i}": data.draw(st.lists(st.integers(0, 1), min_size=4, max_size=4)) for i in range(3)}
    after = method.merge(state, voting(masks, full))
    assert after.adapter.components == min(method.budget(state), 4)


def test_09_ties_go_to_the_larger_triplet_then_to_the_first():
    method = FedARA(target_rank=1)
    full = svd([[1, 1], [0, 0]], [2, 3], [[1, 0], [1, 0]])
    second = Block(np.arange(2), *(getattr(full.blocks["m"], f) for f in "BeA"))
    adapter = replace(full, blocks={"0.m": full.blocks["m"], "1.m": second})
    start = State(6, 10, adapter, arrays={"start": np.array(4), "end": np.array(2)})
    assert method.budget(start) == 2
    kept = method.merge(start, voting({"a": [1, 1, 1, 1]}, adapter)).adapter
    assert {n: b.ids.tolist() for n, b in kept.blocks.items()} == {"0.m": [1], "1.m": [1]}  # both |e| = 3
    kept = method.merge(start, voting({"a": [1, 0, 1, 0]}, adapter)).adapter  # votes come before size
    assert {n: b.ids.tolist() for n, b in kept.blocks.items()} == {"0.m": [0], "1.m": [0]}
    even = replace(adapter, blocks={n: replace(b, e=np.ones(2, np.float32)) for n, b in adapter.blocks.items()})
    kept = method.merge(start, voting({"a": [1, 1, 1, 1]}, even)).adapter  # all alike: by place
    assert {n: b.ids.tolist() for n, b in kept.blocks.items()} == {"0.m": [0, 1]}


def kept_by(threshold: float, masks: Mapping[str, list[int]]) -> np.ndarray:
    method = FedARA(target_rank=1, arbitration="threshold", threshold=threshold)
    full = toy.drawn(toy.small())
    return mask_of(full, method.merge(state_of(method, full, 1), voting(masks, full)).adapter)


def test_10_threshold_mode_on_unanimous_masks_keeps_their_budget():
    assert kept_by(0.5, {"a": [1, 0, 1, 0], "b": [1, 0, 1, 0]}).tolist() == [True, False, True, False]


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
@examples(max_examples=40, deadline=None)
def test_10_threshold_mode_runs_from_the_union_to_the_intersection(votes):
    masks = {f"c{i}": vote for i, vote in enumerate(votes)}
    union, common = np.any(votes, 0), np.all(votes, 0)
    everything_ = np.ones(4, bool)  # where nothing is wanted, the old mask stays
    np.testing.assert_array_equal(kept_by(1e-9, masks), union if union.any() else everything_)
    np.testing.assert_array_equal(kept_by(1.0, masks), common if common.any() else everything_)
    wanted = [int((np.mean(votes, 0) >= share).sum()) for share in (0.1, 0.3, 0.5, 0.7, 1.0)]
    kept = [int(kept_by(share, masks).sum()) for share in (0.1, 0.3, 0.5, 0.7, 1.0)]
    assert kept == [w or 4 for w in wanted]
    assert wanted == sorted(wanted, reverse=True)


def permuted(adapter: Adapter, order: Mapping[str, np.ndarray]) -> Adapter:
    """The same triplets under other ids: new id i holds what was order[i]."""
    blocks = {
        n: Block(b.ids, b.B[:, order[n]], b.e[order[n]], b.A[order[n]]) for n, b in adapter.blocks.items()
    }  # fmt: skip
    return replace(adapter, blocks=blocks)


@pytest.mark.parametrize("arbitration", ["budget", "threshold"])
def test_11_masks_follow_a_permutation_of_the_triplets(arbitration):
    method = FedARA(target_rank=1, arbitration=arbitration)
    spec = toy.small(rank=3)
    full = toy.drawn(spec)
    order = {"0.m": np.array([2, 0, 1]), "1.m": np.array([1, 2, 0])}
    place = np.concatenate([order["0.m"], 3 + order["1.m"]])
    votes = np.array([[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1]])
    state = replace(method.begin(spec, 10, 0), round=2)
    found = method.merge(replace(state, adapter=full), voting({f"c{i}": v for i, v in enumerate(votes)}, full))
    turned = permuted(full, order)
    others = voting({f"c{i}": v[place] for i, v in enumerate(votes)}, turned)
    again = method.merge(replace(state, adapter=turned), others)
    np.testing.assert_array_equal(mask_of(turned, again.adapter), mask_of(full, found.adapter)[place])


def test_11_masks_do_not_depend_on_who_says_what():
    method, full = FedARA(target_rank=1), toy.drawn(toy.small())
    votes = [[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    state = state_of(method, full, 1)
    found = [
        method.merge(state, voting(dict(zip(names, votes, strict=True)), full)).adapter
        for names in (("a", "b", "c"), ("c", "a", "b"))
    ]
    assert toy.same(*found)


# ---- 12-14: what travels


def test_12_mask_bits_travel_only_in_allocation_rounds(run):
    method, states = run["federation"].server.method, run["states"]
    rounds = {t for t in range(1, 6) if method.budget(states[t - 1]) is not None}
    assert rounds == {2, 3, 4}  # T_w = 1, T_f = 1
    for (t, _), frame in run["frames"].items():
        _, tensors = unpack(frame)
        assert ("arrays.keep" in tensors) == (t in rounds)
        if t in rounds:
            assert tensors["arrays.keep"].nbytes == math.ceil(states[t - 1].adapter.components / BITS)


def payload(adapter: Adapter) -> int:
    shapes = toy.encoder().spec.shapes
    return 4 * sum(block.rank * (sum(shapes[name]) + 1) for name, block in adapter.blocks.items())


def test_13_and_14_payload_is_the_formula_to_the_byte_under_the_mask_of_the_round_before(run):
    """q sum_l R_l^{t-1} (o_l + d_l + 1) each way, the head beside it; the cut of round t shows in round t + 1."""
    clients = [e for e in run["events"] if e["event"] == "client"]
    assert len(clients) == 15
    head = 4 * sum(t.size for t in toy.encoder().spec.dense.values())
    for row in clients:
        before = run["states"][row["round"] - 1].adapter
        assert row["adapter_bytes_down"] == row["adapter_bytes_up"] == payload(before)
        assert row["head_bytes_down"] == row["head_bytes_up"] == head
    assert payload(run["states"][2].adapter) < payload(run["states"][1].adapter)


@pytest.mark.parametrize("empty", [[], ["0.m"], ["1.m"]])
def test_13_decode_of_encode_is_the_identity_also_with_empty_modules(empty):
    spec, full = toy.small(), toy.drawn(toy.small())
    adapter = full.without({name: np.arange(2) for name in empty})
    ends = wire.Wire(spec, full, "f32", "r", 0)
    plan = Plan(train=everything(adapter))
    frame = ends.request("train", "c0", plan, State(0, 3, adapter))
    request = ends.open_request(frame)
    assert toy.same(request.adapter, adapter)
    reply = ends.update(request, Update(adapter, 5))
    assert toy.same(ends.open_reply(reply, "train", 1, "c0", plan, adapter).update.adapter, adapter)
    assert sizes(reply).adapter == 4 * sum(b.rank * 6 for b in adapter.blocks.values())


# ---- 15, 16: deletion


def test_15_a_dead_module_has_no_parameter_no_optimizer_state_and_no_hook_and_stays_dead(run):
    states = run["states"].values()
    alive = [set(state.adapter.blocks) for state in states]
    assert all(later <= earlier for earlier, later in pairwise(alive))
    assert len(alive[-1]) < len(alive[0])  # some did die in this run
    model, adapter = toy.encoder(), masked_and_compacted()[1]
    on = live(adapter, Adapter({}, adapter.scale, {}), "BeA", "cpu")
    dead = model.modules.keys() - adapter.blocks.keys()
    assert dead
    assert not dead & on.learning.keys()
    optimizer = torch.optim.AdamW(on.values.values())
    inputs, labels = batch()
    with mounted(model.modules, model.heads, on):
        assert not any(model.modules[name]._forward_hooks for name in dead)
        tasks.loss(model.network(**inputs), labels).backward()
        optimizer.step()
    moments = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert moments * 4 == payload(adapter)
    assert not any(module._forward_hooks for module in model.modules.values())


def test_16_deleting_a_module_equals_keeping_it_masked():
    full = trained()
    name = next(iter(full.blocks))
    zeroed = replace(full.blocks[name], e=np.zeros(3, np.float32))
    masked = replace(full, blocks={**full.blocks, name: zeroed})
    deleted = full.without({name: np.arange(3)})
    assert name not in deleted.blocks
    assert torch.equal(backward(masked)[0], backward(deleted)[0])


# ---- 17-23: whole runs


def scores(f: toy.Federation, events: Mapping[str, list]) -> list[tuple]:
    keys = ("accuracy", "loss", "train_loss", "bytes_up", "bytes_down", "components")
    return [tuple(row[key] for key in keys) for row in events["round"]]


def test_17_a_budget_of_all_equals_fixed_rank_fedavg_in_svd_form(tmp_path):
    ours = toy.federation(FedARA(target_rank=4), tmp_path / "a")
    fixed = toy.federation(FixedRank(), tmp_path / "b")
    one, two = ours.play(), fixed.play()
    assert [r["train_loss"] for r in one["round"]] == [r["train_loss"] for r in two["round"]]
    assert one["round"][-1]["accuracy"] == two["round"][-1]["accuracy"]
    assert toy.same(ours.last.adapter, fixed.last.adapter)


@pytest.mark.parametrize("arbitration", ["budget", "threshold"])
@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_18_with_one_client_the_mask_is_its_own(arbitration, threshold):
    method = FedARA(target_rank=1, arbitration=arbitration, threshold=threshold)
    spec, full = toy.small(), toy.drawn(toy.small())
    state = state_of(method, full, round=3)
    plan = method.plan(state, toy.cohort("a"), 0)["a"]
    update = next(iter(method.train([toy.job(spec, full, plan, pretend)])))
    after = method.merge(state, toy.Arrived({"a": update}))
    mask = np.unpackbits(update.arrays["keep"], count=4).astype(bool)
    assert mask.sum() == method.budget(state)
    np.testing.assert_array_equal(mask_of(full, after.adapter), mask)


def pretend(job: Any, observe: Any = None, scale: float = 1.0) -> Update:
    """Local training without a model: three steps of drawn gradients."""
    adapter = job.adapter.take(job.plan.train)
    values = toy.flat(adapter)
    for step in range(3):
        draw = job.rng("gradients", step)
        grads = {f: torch.tensor(draw.normal(size=len(v)).astype(np.float32)) * scale for f, v in values.items()}
        if observe is not None:
            observe(values, grads)
    return Update(adapter, 4)


def test_19_clients_that_are_alike_propose_the_same_mask():
    method = FedARA(target_rank=1)
    model, rows = toy.encoder(), np.arange(8)
    state = replace(method.begin(model.spec, 10, 0), round=2)
    plan = method.plan(state, toy.cohort("c0"), 0)["c0"]
    fit = partial(toy.trainer(1e-2).fit, rows=rows)
    jobs = [toy.job(model.spec, state.adapter, plan, fit, round=3) for _ in range(2)]
    one, two = method.train(jobs)
    np.testing.assert_array_equal(one.arrays["keep"], two.arrays["keep"])
    assert toy.same(one.adapter, two.adapter)
    kept = np.unpackbits(one.arrays["keep"], count=state.adapter.components)
    assert kept.sum() == method.budget(state) < state.adapter.components


def test_20_the_scale_is_not_changed_by_removal(run):
    assert {state.adapter.scale for state in run["states"].values()} == {toy.encoder().spec.scale} == {2.0}


def test_21_the_same_seeds_give_the_same_masks_bytes_and_accuracy(run, tmp_path):
    again = toy.federation(FedARA(target_rank=1), tmp_path / "again", rounds=5, cohort=3)
    events = again.play()
    first = {"round": [e for e in run["events"] if e["event"] == "round"]}
    assert scores(again, events) == scores(again, first)
    assert toy.equal(again.last, run["states"][5])
    other = toy.federation(FedARA(target_rank=1), tmp_path / "other", rounds=1, seed=1)
    other.play()
    assert not toy.same(other.last.adapter, run["states"][1].adapter)


def test_22_those_who_do_not_take_part_do_not_matter(run, tmp_path):
    cohorts = [set(e["clients"]) for e in run["events"] if e["event"] == "cohort"][:2]

    def break_others(site: Any) -> Any:
        def fit(job: Any, observe: Any = None) -> Update:
            if job.device.id not in cohorts[job.round - 1]:
                raise AssertionError(f"{job.device.id} was not drawn in round {job.round}")
            return site.fit(job, observe=observe)

        return replace(site, fit=fit)

    f = toy.federation(FedARA(target_rank=1), tmp_path / "run", rounds=5, cohort=3, alter=break_others)
    playing = f.server.play(f.begin)
    next(e for e in playing if e["event"] == "round" and e["round"] == 2)
    assert toy.equal(f.last, run["states"][2])


def test_22_other_rows_of_an_absent_client_do_not_matter(run, tmp_path):
    drawn = set(next(e for e in run["events"] if e["event"] == "cohort")["clients"])
    (absent,) = set(toy.CLIENTS) - drawn
    shares = {**toy.SHARES, absent: np.arange(5)}
    f = toy.federation(FedARA(target_rank=1), tmp_path / "run", rounds=5, cohort=3, shares=shares)
    next(e for e in f.server.play(f.begin) if e["event"] == "round")
    assert toy.equal(f.last, run["states"][1])


def test_23_the_head_is_never_masked(run):
    states = run["states"]
    for t in range(1, 6):
        assert states[t].adapter.dense.keys() == toy.encoder().spec.dense.keys()
        for name, tensor in states[t].adapter.dense.items():
            assert np.any(tensor != states[t - 1].adapter.dense[name])


# ---- 24, 25: compute and scores


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_24_backward_stops_below_the_lowest_active_block(lowest):
    model, full = toy.encoder(), trained()
    names = [m.name for m in model.spec.modules if m.block >= lowest]
    adapter = full.take({name: np.arange(3) for name in names})
    on = live(adapter, Adapter({}, adapter.scale, {}), "BeA", "cpu")
    layers = model.base.encoder.layer
    tracked, reached = {}, set()

    def watch(at: int) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            tracked[at] = hidden.requires_grad
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: reached.add(at))

        return hook

    handles = [layer.register_forward_hook(watch(at)) for at, layer in enumerate(layers)]
    try:
        inputs, labels = batch()
        with mounted(model.modules, model.heads, on):
            tasks.loss(model.network(**inputs), labels).backward()
    finally:
        for handle in handles:
            handle.remove()
    assert tracked == {at: at >= lowest for at in range(3)}
    assert reached == set(range(lowest, 3))


@given(factor=st.sampled_from([2.0, 0.5, 4.0, 16.0]), seed=st.integers(0, 20))
@examples(max_examples=20, deadline=None)
def test_25_a_common_factor_on_the_loss_scales_scores_by_its_square(factor, seed):
    spec = toy.small()
    adapter = toy.drawn(spec, seed)
    found = {}
    for scale in (1.0, factor):
        sensitivity = Sensitivity(0.85)
        pretend(toy.job(spec, adapter, Plan(train=adapter.ids), pretend), sensitivity, scale)
        found[scale] = sensitivity.triplets(adapter)
    np.testing.assert_allclose(found[factor], found[1.0] * factor**2, rtol=1e-5)
    np.testing.assert_array_equal(np.argsort(found[factor]), np.argsort(found[1.0]))


def by_hand(steps: list[tuple[dict, dict]], adapter: Adapter, beta: float) -> np.ndarray:
    """AdaLoRA's score, one scalar at a time."""
    smooth = {f: np.zeros(len(v)) for f, v in steps[0][0].items()}
    doubt = {f: np.zeros(len(v)) for f, v in steps[0][0].items()}
    for values, grads in steps:
        for f in "BeA":
            for i in range(len(values[f])):
                now = abs(float(values[f][i]) * float(grads[f][i]))
                smooth[f][i] = beta * smooth[f][i] + (1 - beta) * now
                doubt[f][i] = beta * doubt[f][i] + (1 - beta) * abs(now - smooth[f][i])
    q = {f: per_component(smooth[f] * doubt[f], adapter, f) for f in "BeA"}
    result = []
    for at, block in enumerate(adapter.blocks.values()):
        out, in_ = block.B.shape[0], block.A.shape[1]
        for i in range(block.rank):
            result.append(q["e"][at][i, 0] + sum(q["A"][at][i]) / in_ + sum(q["B"][at][i]) / out)
    return np.array(result)


def test_the_score_is_adaloras_recomputed_from_what_training_recorded():
    """Three steps of the real local training, one module of each size, pre-step values."""
    model = toy.encoder()
    picked = ["encoder.layer.1.intermediate.dense", "encoder.layer.2.output.dense"]
    adapter = trained(rank=2).take({name: np.arange(2) for name in picked})
    steps: list[tuple[dict, dict]] = []
    sensitivity = Sensitivity(0.85)

    def observe(values: Any, grads: Any) -> None:
        steps.append(tuple({f: t.detach().clone().double().numpy() for f, t in d.items()} for d in (values, grads)))
        sensitivity(values, grads)

    work = toy.job(model.spec, adapter, Plan(train=adapter.ids), pretend)
    update = toy.trainer(1e-2).fit(work, np.arange(24), observe)
    assert len(steps) == 3
    assert set(sensitivity.mean) == set("BeA") < set(steps[0][0])  # the head is not scored
    for factor, value in toy.flat(adapter).items():
        np.testing.assert_array_equal(steps[0][0][factor], value.double())  # before the first step: as received
    assert not np.array_equal(steps[0][0]["e"], steps[1][0]["e"])
    found, expected = sensitivity.triplets(update.adapter), by_hand(steps, adapter, 0.85)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(expected))


def test_the_score_on_two_by_two_numbers():
    """beta = 0: I = s and U = |s - I| = 0; beta = .5 over s = 4, 2 of e: I = 2, 2; U = 1, .5; q = 1."""
    adapter = svd([[1], [1]], [1], [[1, 1]])
    zeros = torch.zeros(2)
    for beta, expected in ((0.0, 0.0), (0.5, 1.0)):
        sensitivity = Sensitivity(beta)
        for size in (4.0, -2.0):
            sensitivity(toy.flat(adapter), {"B": zeros, "e": torch.tensor([size]), "A": zeros})
        assert sensitivity.triplets(adapter).tolist() == [expected]
    sensitivity = Sensitivity(0.5)
    for size in (4.0, 2.0):  # the same in one of two numbers of b, and in both of a: means over the vectors
        sensitivity(toy.flat(adapter), {"B": torch.tensor([size, 0]), "e": torch.zeros(1), "A": torch.full((2,), size)})
    assert sensitivity.triplets(adapter).tolist() == [1.5]


def proposal(method: FedARA, client: str, seed: int = 0) -> np.ndarray:
    spec, full = toy.small(), toy.drawn(toy.small(), seed)
    plan = method.plan(state_of(method, full, 3), toy.cohort(client), 0)[client]
    update = next(iter(method.train([toy.job(spec, full, plan, pretend, client, round=4)])))
    assert toy.same(update.adapter, full)  # the mask is a proposal: nothing is zeroed before upload
    return np.unpackbits(update.arrays["keep"], count=4).astype(bool)


def test_magnitude_proposes_the_largest_triplets():
    method, full = FedARA(target_rank=1, score="magnitude"), toy.drawn(toy.small())
    size = np.concatenate(list(norms(full).values()))
    by_size = np.argsort(-size)[: method.budget(state_of(method, full, 3))]
    assert set(np.flatnonzero(proposal(method, "c0"))) == set(by_size)
    block = full.blocks["0.m"]
    expected = abs(block.e[0]) * np.linalg.norm(block.B[:, 0]) * np.linalg.norm(block.A[0])
    assert size[0] == pytest.approx(expected, rel=1e-6)


def test_random_is_one_draw_for_all_clients_of_a_round():
    method = FedARA(target_rank=1, score="random")
    np.testing.assert_array_equal(proposal(method, "c0"), proposal(method, "c1"))
    np.testing.assert_array_equal(proposal(method, "c0"), proposal(method, "c0", seed=5))  # whatever the numbers


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("arbitration", ["budget", "threshold"])
def test_every_score_and_arbitration_prunes_a_run_to_its_target(score, arbitration, tmp_path):
    method = FedARA(target_rank=1, score=score, arbitration=arbitration)
    f = toy.federation(method, tmp_path / "run", cohort=2)
    f.play()
    modules = len(toy.encoder().spec.modules)
    if arbitration == "budget" or score == "random":  # random masks are unanimous
        assert f.last.adapter.components == modules
    assert 0 < f.last.adapter.components < 4 * modules


@pytest.mark.parametrize(
    ("rounds", "window"), [(1, []), (2, [2]), (3, [2, 3]), (5, [2, 3, 4]), (10, [2, 3, 4, 5, 6, 7])]
)
def test_short_runs_prune_too(rounds, window):
    """Never in the first round, where every score is zero; from two rounds on to the target."""
    method, spec = FedARA(target_rank=1), toy.small()
    state, asked = method.begin(spec, rounds, 0), []
    for t in range(1, rounds + 1):
        plan = method.plan(state, toy.cohort("a"), 0)["a"]
        if "budget" in plan.arrays:
            asked.append(t)
        update = next(iter(method.train([toy.job(spec, state.adapter, plan, pretend, round=t)])))
        state = replace(method.merge(state, toy.Arrived({"a": update})), round=t)
    assert asked == window
    assert state.adapter.components == (2 if window else 4)


@pytest.mark.parametrize(("rounds", "warmup", "settle"), [(3, 0.4, 0.5), (10, 0.69, 0.3), (2, 0.9, 0.0), (5, 0.0, 0.9)])
def test_where_the_shares_fill_a_short_run_it_still_prunes_once(rounds, warmup, settle):
    method = FedARA(target_rank=1, warmup=warmup, settle=settle)
    state = method.begin(toy.small(), rounds, 0)
    budgets = [method.budget(replace(state, round=t)) for t in range(rounds)]
    assert budgets[0] is None
    assert 2 in budgets


def test_scores_start_afresh_each_round_and_only_allocation_rounds_make_them():
    method, spec, full = FedARA(target_rank=1), toy.small(), toy.drawn(toy.small())
    watched: list[Any] = []

    def fit(job: Any, observe: Any = None) -> Update:
        watched.append(observe)
        return pretend(job, observe)

    quiet = method.plan(state_of(method, full, 0), toy.cohort("a"), 0)["a"]
    loud = method.plan(state_of(method, full, 3), toy.cohort("a"), 0)["a"]
    assert (quiet.arrays, quiet.returns) == ({}, {})
    updates = list(method.train([toy.job(spec, full, plan, fit) for plan in (quiet, loud, loud)]))
    assert watched[0] is None
    assert watched[1] is not watched[2]
    assert "keep" not in updates[0].arrays
    np.testing.assert_array_equal(updates[1].arrays["keep"], updates[2].arrays["keep"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_rank": 0}, "target_rank"), ({"warmup": 0.7, "settle": 0.3}, "warmup"), ({"warmup": -0.1}, "warmup"),
        ({"settle": -0.1}, "warmup"), ({"threshold": 0}, "threshold"), ({"threshold": 1.5}, "threshold"),
        ({"smoothing": 1.0}, "smoothing"), ({"score": "loudness"}, "score"), ({"arbitration": "coin"}, "arbitration"),
        ({"warmup": float("nan")}, "warmup"), ({"target_rnak": 2}, "target_rank"), ({"target_rank": "many"}, "target_rank"),
    ],
)  # fmt: skip
def test_a_bad_hyper_parameter_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        methods.build({"name": "fedara", **settings})


def test_a_target_above_the_rank_at_birth_is_refused():
    with pytest.raises(ValueError, match=r"target_rank=5.*rank=2"):
        FedARA(target_rank=5).begin(toy.small(), 10, 0)
    assert FedARA(target_rank=2).begin(toy.small(), 10, 0).adapter.components == 4


def test_the_start_is_shared_and_small():
    """A, B ~ N(0, .02^2) from the run's seed alone; e = 0; the head as the model has it."""
    spec = toy.encoder().spec
    one, two, other = (FedARA().begin(spec, 10, seed).adapter for seed in (0, 0, 1))
    assert toy.same(one, two)
    assert not toy.same(one, other)
    draws = np.concatenate([block.A.ravel() for block in one.blocks.values()])
    assert np.std(draws) == pytest.approx(0.02, rel=0.05)
    assert one.dense.keys() == spec.dense.keys()


def test_nothing_wanted_by_anyone_keeps_the_old_mask():
    assert kept_by(0.5, {"a": [0, 0, 0, 0], "b": [0, 0, 0, 0]}).all()
