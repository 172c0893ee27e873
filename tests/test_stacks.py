"""The methods that average products (FlexLoRA, raFLoRA, FLoRA, FedEx-LoRA) or one factor of them (LoRA-A2), on small numbers.

Everywhere out != in, the weights differ, the scale is not 1 and the clients have ranks of their own.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import toy
from fedrank import increments, methods
from fedrank.adapter import Adapter, Block, kaiming, truncate
from fedrank.aggregation import average, examples, uniform
from fedrank.config import ConfigError, Local
from fedrank.methods.fedex_lora import FedExLoRA
from fedrank.methods.flexlora import FlexLoRA
from fedrank.methods.flora import FLoRA
from fedrank.methods.lora_a2 import LoRAA2, change
from fedrank.methods.raflora import RaFLoRA
from fedrank.products import Increment, product_mean, promise, residual
from fedrank.protocol import Device, Plan, State, Update, rng
from fedrank.selection import leading

SPEC = toy.small({"0.m": (9, 11), "1.m": (12, 8)}, rank=4)
RANKS = {"a": 1, "b": 2, "c": 4}  # summed 7, below the sides of both modules
EXAMPLES = {"a": 1, "b": 3, "c": 6}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def lora(rank: int, seed: Any, spec: Any = SPEC, kind: Any = np.float64) -> Adapter:
    """Random factors without e, and a random head."""
    draw = rng(0, "lora", seed)
    blocks = {
        name: Block(np.arange(rank), draw.normal(size=(out, rank)).astype(kind), None, draw.normal(size=(rank, in_)).astype(kind))
        for name, (out, in_) in spec.shapes.items()
    }  # fmt: skip
    return Adapter(blocks, spec.scale, {"head.weight": draw.normal(size=(2, 2)).astype(kind)})


OLD = lora(4, "old")


def arrived(ranks: dict[str, int] = RANKS, kind: Any = np.float64) -> toy.Arrived:
    return toy.Arrived({name: Update(lora(rank, name, kind=kind), EXAMPLES[name]) for name, rank in ranks.items()})


def mean_of(updates: toy.Arrived, weight: Any = examples) -> dict[str, np.ndarray]:
    """sum_k p_k s B_k A_k, one matrix at a time."""
    whole = sum(weight(update) for _, update in updates)
    return {
        name: sum(
            weight(u) / whole * SPEC.scale * u.adapter.blocks[name].B @ u.adapter.blocks[name].A for _, u in updates
        )
        for name in SPEC.shapes
    }


def close(found: Any, expected: Any, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[name], matrix, **(tolerance or EXACT))


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young's approximation."""
    u, s, vt = np.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def merged(method: Any, updates: toy.Arrived, old: Adapter = OLD, round: int = 0) -> State:
    start = method.begin(SPEC, 9, 0)
    return method.merge(replace(start, round=round, adapter=old), updates)


# ---- the rules


@pytest.mark.parametrize(("count", "ranks"), [(1, 4), (2, 8), (3, (9, 8)), (5, (9, 8))])
def test_a_sum_of_increments_is_factors_until_they_reach_a_side(count, ranks):
    """0.m is 9 x 11, 1.m is 12 x 8: from rank 9 and 8 on, one running sum stands for all."""
    parts = [replace(lora(4, seed), scale=scale) for seed, scale in enumerate((2.0, 0.5, 1.0, 4.0, 3.0)[:count])]
    running = Increment(2.0)
    for part in parts:
        running.add(part)
    found = running.adapter()
    expected = {name: sum(part.delta()[name] for part in parts) for name in SPEC.shapes}
    close(found.delta(), expected)
    assert found.scale == 2.0
    kept = (ranks, ranks) if isinstance(ranks, int) else ranks
    assert tuple(found.blocks[name].rank for name in SPEC.shapes) == kept
    assert all(block.B.dtype == block.A.dtype == np.float64 for block in found.blocks.values())
    if count == 1:
        np.testing.assert_array_equal(found.blocks["1.m"].A, parts[0].blocks["1.m"].A)
    assert np.array_equal(found.blocks["0.m"].B, np.eye(9)) == (count > 2)
    assert np.array_equal(found.blocks["1.m"].A, np.eye(8)) == (count > 1)  # 4 + 4 is a side already


@pytest.mark.parametrize("weight", [examples, uniform])
def test_the_mean_of_the_products_has_each_weight_once(weight):
    updates = arrived()
    found = product_mean(OLD, updates, weight)
    close(found.delta(), mean_of(updates, weight))
    np.testing.assert_array_equal(found.blocks["0.m"].B[:, :1], updates.updates["a"].adapter.blocks["0.m"].B)


def test_the_sum_of_many_is_their_mean_too():
    """Summed rank 7 + 7: beyond the sides."""
    one, two = arrived(), arrived({"a": 2, "b": 2, "c": 3})
    both = toy.Arrived(dict(one.updates) | {name + "2": update for name, update in two.updates.items()})
    found = product_mean(OLD, both)
    assert found.blocks["0.m"].rank == 9
    close(found.delta(), mean_of(both))


def test_only_the_head_is_averaged_where_only_it_is_asked_for():
    found = average(OLD, arrived(), parts="h")
    assert toy.same(replace(found, dense=OLD.dense), OLD)
    heads = {name: update.adapter.dense["head.weight"] for name, update in arrived()}
    np.testing.assert_allclose(found.dense["head.weight"], 0.1 * heads["a"] + 0.3 * heads["b"] + 0.6 * heads["c"])


def test_the_leading_components():
    assert {name: ids.tolist() for name, ids in leading(OLD, 2).items()} == {"0.m": [0, 1], "1.m": [0, 1]}
    assert leading(OLD, None)["0.m"].tolist() == leading(OLD, 9)["0.m"].tolist() == [0, 1, 2, 3]


# ---- FlexLoRA


@pytest.mark.parametrize("split", ["left", "even"])
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_flexlora_is_the_best_approximation_of_the_mean(split, weights):
    updates, weight = arrived(), examples if weights == "examples" else uniform
    found = merged(FlexLoRA(split, weights), updates).adapter
    expected = mean_of(updates, weight)
    close(found.delta(), {name: best(matrix, 4) for name, matrix in expected.items()})
    for name, block in found.blocks.items():
        s = np.linalg.svd(expected[name])[1][:4] / SPEC.scale
        assert block.ids.tolist() == [0, 1, 2, 3]
        power = 1.0 if split == "left" else 0.5
        np.testing.assert_allclose(np.linalg.norm(block.B, axis=0), s**power)
        np.testing.assert_allclose(np.linalg.norm(block.A, axis=1), s ** (1 - power))
    np.testing.assert_array_equal(found.dense["head.weight"], average(OLD, updates, weight).dense["head.weight"])


DEVICES = {"a": Device("a", 4, rank=1), "b": Device("b", 4, rank=3), "c": Device("c", 4), "d": Device("d", 4, rank=9)}
TRAINED = {"a": 1, "b": 3, "c": 4, "d": 4}  # of the adapter's 4


def test_a_client_gets_the_best_approximation_of_its_rank():
    """The leading components of the one adapter: B_k = U[:, :r] S[:r], A_k = V^T[:r]."""
    state, expected = merged(FlexLoRA(), arrived()), mean_of(arrived())
    for client, plan in FlexLoRA().plan(state, DEVICES, 0).items():
        found = state.adapter.take(plan.train).delta()
        close(found, {name: best(matrix, TRAINED[client]) for name, matrix in expected.items()})


@pytest.mark.parametrize("method", [FlexLoRA(), RaFLoRA(), FLoRA()])
def test_a_client_trains_the_leading_components_that_it_can(method):
    plans = method.plan(method.begin(SPEC, 9, 0), DEVICES, 0)
    assert {c: [i.tolist() for i in plan.train.values()] for c, plan in plans.items()} == {
        client: [list(range(rank))] * 2 for client, rank in TRAINED.items()
    }
    assert not any(plan.frozen for plan in plans.values())


def test_factors_and_the_whole_matrix_have_one_svd():
    """The same mean as factors of rank 12 and as a running sum."""
    updates = toy.Arrived({str(seed): Update(lora(4, seed), 1) for seed in range(3)})
    whole = product_mean(OLD, updates)
    factors = Adapter({}, SPEC.scale / 3, {})
    for at, (_, u) in enumerate(updates):
        blocks = {name: replace(block, ids=block.ids + 4 * at) for name, block in u.adapter.blocks.items()}
        factors = factors.union(Adapter(blocks, factors.scale, {}))
    assert (whole.blocks["0.m"].rank, factors.blocks["0.m"].rank) == (9, 12)
    one, two = (truncate(increment, OLD, 0.5) for increment in (whole, factors))
    close(one.delta(), two.delta())
    close(one.delta(), {name: best(matrix, 4) for name, matrix in mean_of(updates).items()})


def test_sums_are_in_float64_and_the_result_in_the_old_dtype():
    updates = arrived(kind=np.float32)
    found = merged(FlexLoRA(), updates, OLD.astype(np.float32)).adapter
    assert {a.dtype for name, a in toy.arrays(found).items() if "ids" not in name} == {np.dtype(np.float32)}
    exact = {n: best(m, 4) for n, m in mean_of(toy.Arrived({c: replace(u, adapter=u.adapter.astype(float)) for c, u in updates})).items()}  # fmt: skip
    close(found.delta(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [FlexLoRA(), FlexLoRA("even")])
@pytest.mark.parametrize("ranks", [{"a": 1}, {"a": 1, "b": 2}])
def test_where_the_mean_has_too_low_a_rank_every_component_can_still_learn(method, ranks):
    found = merged(method, arrived(ranks)).adapter
    close(found.delta(), mean_of(arrived(ranks)))
    for name, block in found.blocks.items():
        rank = sum(ranks.values())
        assert not block.B[:, rank:].any()
        np.testing.assert_array_equal(block.A[rank:], OLD.blocks[name].A[rank:])
        assert all(np.linalg.norm(block.A, axis=1) > 0.01)  # B's gradient is G A^T


@pytest.mark.parametrize("method", [FlexLoRA(), FlexLoRA("even"), RaFLoRA()])
def test_nothing_learnt_is_no_end(method):
    """B = 0 on every client: as at the start."""
    start = method.begin(SPEC, 3, 0)
    idle = {c: Update(start.adapter.take(leading(start.adapter, r)), 1) for c, r in RANKS.items()}
    assert toy.same(method.merge(start, toy.Arrived(idle)).adapter, start.adapter)


# ---- raFLoRA


def by_partitions(updates: toy.Arrived, levels: list[int], old: Adapter) -> dict[str, np.ndarray]:
    """The rule as it is written: dW = sum over partitions [l, h) of the mean over those of rank h and more."""
    result = {}
    for name, before in old.blocks.items():
        total = np.zeros(SPEC.shapes[name])
        for low, high in pairwise([0, *levels]):
            those = [u for _, u in updates if u.adapter.blocks[name].rank >= high]
            count = sum(u.examples for u in those)
            for part, share in [(u.adapter.blocks[name], u.examples / count) for u in those] or [(before, 1.0)]:
                total += share * part.B[:, low:high] @ part.A[low:high]
        result[name] = SPEC.scale * total
    return result


@pytest.mark.parametrize("back", ["abc", "ac", "bc", "c", "ab", "b", "a"])
def test_raflora_averages_each_partition_over_those_that_train_it(back):
    """The levels are the fleet's, 1, 2 and 4, whoever came back; a partition without contributors keeps what it was."""
    updates = arrived({name: RANKS[name] for name in back})
    expected = by_partitions(updates, [1, 2, 4], OLD)
    close(product_mean(OLD, updates, absent="skip").delta(), expected)
    found = merged(RaFLoRA(), updates).adapter
    close(found.delta(), {name: best(matrix, 4) for name, matrix in expected.items()})
    for block in found.blocks.values():
        np.testing.assert_allclose(np.linalg.norm(block.B, axis=0), np.linalg.norm(block.A, axis=1))
    if back in ("ab", "b", "a"):
        rest = by_partitions(updates, [RANKS[back[-1]]], OLD)
        assert not np.allclose(rest["0.m"], expected["0.m"])  # with the round's own levels the tail would be lost


def idle(method: Any, rounds: int) -> list[dict[str, np.ndarray]]:
    """Singular values per round, of a run whose clients return what they received."""
    devices = {name: Device(name, EXAMPLES[name], rank=rank) for name, rank in RANKS.items()}
    state = replace(method.begin(SPEC, rounds, 0), adapter=truncate(OLD, OLD, 0.5))
    found = []
    for _ in range(rounds):
        plans = method.plan(state, devices, 0)
        back = {c: Update(state.adapter.take(plans[c].train), EXAMPLES[c]) for c in devices}
        state = method.merge(state, toy.Arrived(back))
        found.append({name: np.linalg.svd(d)[1][:4] for name, d in state.adapter.delta().items()})
    return found


def test_the_tail_decays_with_flexlora_and_stays_with_raflora():
    """Rank collapse: 9/10 of the examples see component 1, 6/10 see 2 and 3, so they shrink by that each round."""
    start = {name: np.linalg.svd(d)[1][:4] for name, d in OLD.delta().items()}
    for round, (flex, ra) in enumerate(zip(idle(FlexLoRA(), 5), idle(RaFLoRA(), 5), strict=True), 1):
        close(flex, {name: s * np.array([1, 0.9, 0.6, 0.6]) ** round for name, s in start.items()})
        close(ra, start)


# ---- FLoRA


def test_flora_stacks_and_starts_afresh():
    """B = [B_1 B_2], A = [p_1 A_1; p_2 A_2] with p = 1/4 and 3/4."""
    updates, old = arrived({"a": 1, "b": 2}), kaiming(SPEC.shapes, 4, 2.0, rng(0, "old")).astype(float)
    state = merged(FLoRA(), updates, replace(old, dense=OLD.dense), round=4)
    ((round, promised),) = state.base_updates.items()
    assert round == 5
    found, (one, two) = promised.blocks["0.m"], [u.adapter.blocks["0.m"] for _, u in updates]
    np.testing.assert_array_equal(found.B, np.hstack([one.B, two.B]))
    np.testing.assert_allclose(found.A, np.vstack([one.A / 4, two.A * 3 / 4]), **EXACT)
    close(promised.delta(), mean_of(updates))  # exact, at any ranks
    assert not any(block.B.any() for block in state.adapter.blocks.values())
    assert all((block.A != old.blocks[name].A).all() for name, block in state.adapter.blocks.items())
    np.testing.assert_array_equal(state.adapter.dense["head.weight"], average(OLD, updates).dense["head.weight"])


def test_flora_is_exact_as_a_whole_too():
    """Ranks 1 + 2 + 4 of these small matrices are more numbers than the matrices."""
    close(merged(FLoRA(), arrived()).base_updates[1].dense, mean_of(arrived()))


def test_flora_draws_its_fresh_start_by_seed_and_round():
    def drawn(seed: int, round: int) -> Adapter:
        start = FLoRA().begin(SPEC, 9, seed)
        back = {c: Update(start.adapter.take(leading(start.adapter, r)), 1) for c, r in RANKS.items()}
        return FLoRA().merge(replace(start, round=round), toy.Arrived(back)).adapter

    assert toy.same(drawn(0, 3), drawn(0, 3))
    assert not toy.same(drawn(0, 3), drawn(0, 4))
    assert not toy.same(drawn(0, 3), drawn(1, 3))
    assert np.abs(drawn(0, 3).blocks["0.m"].A).max() <= 11**-0.5


# ---- FedEx-LoRA


EQUAL = dict.fromkeys("abc", 2)


@pytest.mark.parametrize(("count", "rank"), [(1, None), (2, 2), (3, 4)])
def test_fedex_makes_the_mean_exact(count, rank):
    """W0 + s res + s B A = W0 + s sum_k p_k B_k A_k; the residual of v clients has rank (v - 1) r."""
    updates, old = arrived(dict(list(EQUAL.items())[:count])), lora(2, "old")
    state = merged(FedExLoRA(), updates, old)
    assert toy.same(state.adapter, average(old, updates))
    found = state.adapter.delta()
    if rank is None:
        assert not state.base_updates
    else:
        assert {block.rank for block in state.base_updates[1].blocks.values()} == {rank}
        assert not np.allclose(found["0.m"], mean_of(updates)["0.m"])
        found = {name: d + state.base_updates[1].delta()[name] for name, d in found.items()}
    close(found, mean_of(updates))


def test_the_residual_is_the_three_terms():
    """sum_k p_k B_k A_k - B A, not transposed and with the weights of the means."""
    updates = arrived(EQUAL)
    mean = average(lora(2, "old"), updates, uniform)
    expected = mean_of(updates, uniform)
    found = residual(mean, updates, uniform)
    close(found.delta(), {name: expected[name] - d for name, d in mean.delta().items()})
    assert not np.allclose(found.delta()["0.m"], residual(mean, updates).delta()["0.m"])


def test_a_residual_needs_equal_ranks():
    with pytest.raises(ValueError, match=r"client 'a' holds 1 of 4 components of '0.m'"):
        merged(FedExLoRA(), arrived())


# ---- what is promised to the base


def increment(rank: int, seed: Any) -> Adapter:
    return lora(rank, seed).only("BeA")


def base(state: State) -> dict[str, np.ndarray]:
    """The sum of all base updates."""
    parts = [p for u in state.base_updates.values() for p in (u.delta(), u.dense)]
    return {name: sum(part[name] for part in parts if name in part) for name in SPEC.shapes}


def after(*ranks: int, kind: Any = np.float64) -> list[State]:
    """States after increments of these ranks."""
    states = [State(0, 9, OLD.astype(kind))]
    for round, rank in enumerate(ranks, 1):
        promised = promise(states[-1], increment(rank, round))
        states.append(State(round, 9, OLD.astype(kind), base_updates=promised))
    return states


def test_factors_become_whole_once_they_are_larger():
    """The matrices have 9 * 11 + 12 * 8 = 195 numbers, a rank 40: four ranks are fewer, five are more."""
    states = after(2, 2, 1, 4, 1, 5)
    kept = [[(n, "whole" if u.dense else "factors") for n, u in state.base_updates.items()] for state in states]
    assert kept == [
        [],
        [(1, "factors")],
        [(1, "factors"), (2, "factors")],
        [(3, "whole")],
        [(3, "whole"), (4, "factors")],
        [(5, "whole")],
        [(6, "whole")],
    ]  # fmt: skip
    expected = {name: np.zeros(shape) for name, shape in SPEC.shapes.items()}
    for round, rank in enumerate((2, 2, 1, 4, 1, 5), 1):
        expected = {name: d + increment(rank, round).delta()[name] for name, d in expected.items()}
        close(base(states[round]), expected)
    assert not states[3].base_updates[3].blocks


def test_a_matrix_of_exactly_as_many_numbers_stays_factors():
    """4 x 4: rank 2 has 16 numbers, as many as the matrix."""
    spec = toy.small({"m": (4, 4)}, rank=3)
    state = State(0, 9, lora(3, "old", spec))
    assert promise(state, lora(2, 1, spec).only("BeA"))[1].blocks["m"].rank == 2
    assert promise(state, lora(3, 1, spec).only("BeA"))[1].dense["m"].shape == (4, 4)


def test_a_round_without_an_increment_promises_nothing_new():
    state = after(2)[-1]
    assert promise(state, Adapter({}, 2.0, {})) == state.base_updates


def test_a_client_never_lacks_more_than_one_whole_and_some_factors():
    states = after(2, 2, 1, 4)
    assert list(increments.after(states[4].base_updates, -1)) == [3, 4]
    assert list(increments.after(states[4].base_updates, 4)) == [4]


def test_promises_have_the_adapters_dtype():
    for state in after(2, 4, kind=np.float32)[1:]:
        parts = [a for u in state.base_updates.values() for n, a in toy.arrays(u).items() if "ids" not in n]
        assert {part.dtype for part in parts} == {np.dtype(np.float32)}


@pytest.mark.parametrize("method", [FlexLoRA(), RaFLoRA(), FLoRA(), FedExLoRA(), LoRAA2()])
def test_who_started_exactly_and_what_came_of_it(method, tmp_path):
    """One round of the tiny model: the server's function against the mean of what the clients trained."""
    trained: dict[str, Adapter] = {}

    def note(site: Any) -> Any:
        def fit(job: Any, observe: Any = None) -> Update:
            update = site.fit(job, observe=observe)
            trained[job.device.id] = update.adapter.union(job.adapter.without(update.adapter.ids))
            return update

        return replace(site, fit=fit)

    f = toy.federation(method, tmp_path / "run", rounds=1, alter=note)
    f.play()
    found = f.last.adapter.delta()
    for update in f.last.base_updates.values():
        found = {name: d + update.delta()[name] for name, d in found.items()}
    shares = {client: len(rows) / 64 for client, rows in toy.SHARES.items()}
    mean = {name: sum(shares[c] * adapter.delta()[name] for c, adapter in trained.items()) for name in found}
    error = sum(np.linalg.norm(found[n] - mean[n]) for n in found) / sum(np.linalg.norm(m) for m in mean.values())
    if method.about.exact_aggregation and not isinstance(method, LoRAA2):  # which drops what it did not choose
        assert error < 1e-6
    else:
        assert 1e-3 < error < 1


# ---- LoRA-A2


@pytest.mark.parametrize(("round", "factor"), [(0, "B"), (1, "A"), (2, "B"), (3, "A")])
def test_a2_trains_one_factor_at_a_time_and_sends_both(round, factor):
    method = LoRAA2()
    state = replace(method.begin(SPEC, 9, 0), round=round)
    plans = method.plan(state, DEVICES, 0)
    assert {(plan.learn, plan.up, plan.sent) for plan in plans.values()} == {(factor + "h", factor + "h", "BeAh")}
    assert {client: plan.select for client, plan in plans.items()} == {"a": 2, "b": 6, "c": 8, "d": 8}
    assert plans["a"].train["0.m"].tolist() == [0, 1, 2, 3]
    again = replace(plans["a"], since=round)
    assert "B" in again.sent  # also who was there last time: its own factors were trained since
    assert "A" in again.sent


def test_a2_adds_what_the_choosers_changed_by_their_share_of_all():
    """B <- B + sum_k w_k dB_k, w_k = n_k / N of all that came back; who did not choose a piece counts as no change."""
    chosen = {"a": {"0.m": [0]}, "b": {"0.m": [0, 3], "1.m": [1]}, "c": {"1.m": [1]}}
    back, expected = {}, {name: block.B.copy() for name, block in OLD.blocks.items()}
    for client, parts in chosen.items():
        adapter = lora(4, client).take({name: np.array(ids) for name, ids in parts.items()})
        back[client] = Update(adapter.only("Bh"), EXAMPLES[client])
        for name, ids in parts.items():
            expected[name][:, ids] += EXAMPLES[client] / 10 * (adapter.blocks[name].B - OLD.blocks[name].B[:, ids])
    found = merged(LoRAA2(), toy.Arrived(back)).adapter
    for name, block in found.blocks.items():
        np.testing.assert_allclose(block.B, expected[name], **EXACT)
        np.testing.assert_array_equal(block.A, OLD.blocks[name].A)
    np.testing.assert_array_equal(found.blocks["1.m"].B[:, [0, 2, 3]], OLD.blocks["1.m"].B[:, [0, 2, 3]])


def test_a2_is_exact_for_the_masked_changes():
    """As A is common, the mean of the factor gives the mean of the functions."""
    full = {
        c: replace(OLD, blocks={n: replace(b, B=lora(4, c).blocks[n].B) for n, b in OLD.blocks.items()}) for c in RANKS
    }
    updates = toy.Arrived({c: Update(adapter, EXAMPLES[c]) for c, adapter in full.items()})
    sent = toy.Arrived({c: Update(adapter.only("B"), EXAMPLES[c]) for c, adapter in full.items()})
    close(merged(LoRAA2(), sent).adapter.delta(), mean_of(updates))


SHIFTS = {"0.m": [0.1, 3.0, 0.2, 2.0], "1.m": [5.0, 0.3, 0.4, 0.5]}  # how far each component moves in a fit


def work(method: LoRAA2, factor: str, rank: int, **local: Any) -> tuple[list[Any], Update]:
    """One client's round with a fit that moves component j by SHIFTS[j] along a unit vector, and its jobs."""
    ones = {n: replace(b, B=b.B / np.linalg.norm(b.B, axis=0), A=b.A / np.linalg.norm(b.A, axis=1)[:, None]) for n, b in OLD.blocks.items()}  # fmt: skip
    adapter = replace(OLD, blocks=ones)
    jobs: list[Any] = []

    def fit(job: Any, observe: Any = None) -> Update:
        jobs.append(job)
        blocks = {}
        for name, block in job.adapter.take(job.plan.train).blocks.items():
            shift = np.array(SHIFTS[name])[block.ids]
            if factor == "B":
                blocks[name] = replace(block, B=block.B + np.eye(len(block.B))[:, :1] * shift)
            else:
                blocks[name] = replace(block, A=block.A + shift[:, None] * np.eye(block.A.shape[1])[0])
        loss, steps = float(len(jobs)), 2.0 * len(jobs)
        dense = {name: tensor + 1 for name, tensor in job.adapter.dense.items()}
        return Update(replace(adapter, blocks=blocks, dense=dense), 4, {"loss": loss, "steps": steps, "seconds": 1.0})

    plan = Plan(adapter.ids, learn=factor + "h", up=factor + "h", select=rank * 2)
    job = replace(toy.job(SPEC, adapter, plan, fit), local=Local(batch_size=2, **local), device=Device("c0", 5))
    (update,) = method.train([job])
    return jobs, update


@pytest.mark.parametrize("factor", ["B", "A"])
def test_a2_keeps_the_pieces_that_changed_most_over_all_modules(factor):
    """Rank 1 of two modules: two pieces, 5.0 of the second module and 3.0 of the first; one epoch, so it ends there."""
    jobs, update = work(LoRAA2(), factor, rank=1)
    assert {name: ids.tolist() for name, ids in update.adapter.ids.items()} == {"0.m": [1], "1.m": [0]}
    assert len(jobs) == 1
    jobs, update = work(LoRAA2(), factor, rank=2)
    assert {name: ids.tolist() for name, ids in update.adapter.ids.items()} == {"0.m": [1, 3], "1.m": [0, 3]}


@pytest.mark.parametrize("factor", ["B", "A"])
def test_a2_weighs_a_change_by_the_frozen_side(factor):
    """|db| |a|: a piece whose frozen vector is ten times as long changes the function ten times as much."""
    long = {n: replace(b, B=b.B * ([1, 1, 100, 1] if factor == "A" else 1), A=b.A * (np.array([[1], [1], [100], [1]]) if factor == "B" else 1)) for n, b in OLD.blocks.items()}  # fmt: skip
    new = {n: replace(b, **{factor: getattr(b, factor) + 1e-3}) for n, b in long.items()}
    sizes = change(replace(OLD, blocks=long), replace(OLD, blocks=new), factor)
    assert sorted(np.argsort(-sizes)[:2]) == [2, 6]
    moved = new["0.m"].B[:, 2] - long["0.m"].B[:, 2] if factor == "B" else new["0.m"].A[2] - long["0.m"].A[2]
    still = long["0.m"].A[2] if factor == "B" else long["0.m"].B[:, 2]
    assert sizes[2] == pytest.approx(np.linalg.norm(moved) * np.linalg.norm(still))


@pytest.mark.parametrize(
    ("local", "parts"),
    [
        ({"epochs": 3}, [{"epochs": 1}, {"epochs": 2}]),
        ({"steps": 7}, [{"steps": 3}, {"steps": 4}]),  # five rows by twos: an epoch has three steps
        ({"steps": 3}, [{"steps": 3}]),
        ({"steps": 2, "epochs": 4}, [{"steps": 2}]),
    ],
)
def test_a2_scores_in_the_first_epoch_and_trains_only_what_it_chose_after(local, parts):
    jobs, update = work(LoRAA2(), "B", rank=1, **local)
    assert [{name: getattr(job.local, name) for name in part} for job, part in zip(jobs, parts, strict=True)] == parts
    assert {name: ids.tolist() for name, ids in jobs[0].plan.train.items()} == {
        name: [0, 1, 2, 3] for name in SPEC.shapes
    }
    moved = {name: len(parts) * np.array(SHIFTS[name]) for name in SHIFTS}
    begun = jobs[0].adapter
    for name, block in update.adapter.blocks.items():
        (j,) = block.ids
        np.testing.assert_allclose(block.B[0, 0], begun.blocks[name].B[0, j] + moved[name][j])
    for name, tensor in update.adapter.dense.items():  # the head learns through both
        np.testing.assert_array_equal(tensor, OLD.dense[name] + len(parts))
    if len(jobs) == 1:
        assert update.metrics["steps"] == 2.0
        return
    last = jobs[1]
    assert {name: ids.tolist() for name, ids in last.plan.train.items()} == {"0.m": [1], "1.m": [0]}
    assert {name: ids.tolist() for name, ids in last.plan.frozen.items()} == {"0.m": [0, 2, 3], "1.m": [1, 2, 3]}
    for name, ids in last.plan.frozen.items():  # what was not chosen is where it was
        np.testing.assert_array_equal(last.adapter.blocks[name].B[:, ids], begun.blocks[name].B[:, ids])
    assert last.rng("batches", 0).random() != jobs[0].rng("batches", 0).random()
    assert update.metrics == {"steps": 6.0, "seconds": 2.0, "loss": pytest.approx((1 * 2 + 2 * 4) / 6)}


def test_a2_needs_no_scores_where_everything_is_kept():
    jobs, update = work(LoRAA2(), "B", rank=4, epochs=3)
    assert len(jobs) == 1
    assert jobs[0].local.epochs == 3
    assert update.adapter.components == 8


@pytest.mark.parametrize(
    ("factor", "lr", "rate"), [("A", None, 6e-3), ("A", 1e-2, 2e-2), ("B", None, None), ("B", 1e-2, 1e-2)]
)
def test_a2_may_give_a_a_rate_of_its_own(factor, lr, rate):
    jobs, _ = work(LoRAA2(a_rate=2.0), factor, rank=1, lr=lr)
    assert jobs[0].local.lr == (rate if rate is None else pytest.approx(rate))


def test_a2_sends_no_more_than_it_may(tmp_path):
    """Ranks 1, 2, 4, 4 of four: so many of the 72 pieces come back, of one factor."""
    f = toy.federation(LoRAA2(), tmp_path / "run", rounds=2, epochs=2)
    events = f.play()
    sizes = {(e["round"], e["client"]): e["adapter_bytes_up"] for e in events["client"]}
    sides = f.begin.adapter.shapes
    assert sizes[1, "c2"] == sum(4 * 4 * out for out, _ in sides.values())
    assert sizes[2, "c3"] == sum(4 * 4 * in_ for _, in_ in sides.values())
    assert sizes[1, "c0"] <= len(sides) * 4 * max(out for out, _ in sides.values())
    assert sizes[1, "c0"] < sizes[1, "c1"] < sizes[1, "c2"]
    one, two = f.states[1].adapter, f.states[2].adapter
    for name, block in f.begin.adapter.blocks.items():
        np.testing.assert_array_equal(one.blocks[name].A, block.A)
        np.testing.assert_array_equal(two.blocks[name].B, one.blocks[name].B)
    assert any((two.blocks[n].A != one.blocks[n].A).any() for n in sides)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "flexlora", "split": "both"}, "split"), ({"name": "flexlora", "weights": "rows"}, "weights"),
        ({"name": "lora_a2", "a_rate": 0}, "a_rate"), ({"name": "lora_a2", "a_rate": float("inf")}, "a_rate"),
    ],
)  # fmt: skip
def test_a_bad_hyper_parameter_is_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        methods.build(settings)
