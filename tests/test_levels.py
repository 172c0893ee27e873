"""Two levels: where a client's private adapter comes from and how it is kept, and the ranks of what both make together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import toy
from fedrank import levels
from fedrank.adapter import Adapter, Block, from_arrays, kaiming, to_arrays
from fedrank.protocol import Job, ModelSpec, Plan, rng

SPEC = toy.small({"0.m": (5, 6), "1.m": (7, 4)}, rank=3)


def job(client: str = "c0", spec: ModelSpec = SPEC, **more: object) -> Job:
    common = spec.with_head(kaiming(spec.shapes, spec.rank, spec.scale, rng(0, "common")))
    return replace(toy.job(spec, common, Plan(common.ids), print, client), **more)


def test_a_private_adapter_starts_as_loras_beside_the_common_one():
    found = levels.private(job(), 2)
    assert found.scale == SPEC.scale
    assert {n: b.ids.tolist() for n, b in found.blocks.items()} == {"0.m": [3, 4], "1.m": [3, 4]}
    for name, block in found.blocks.items():
        out, in_ = SPEC.shapes[name]
        assert (block.B.shape, block.A.shape, block.e) == ((out, 2), (2, in_), None)
        assert not block.B.any()
        assert 0 < np.abs(block.A).max() <= in_**-0.5
    whole = job().adapter.union(found)
    assert all(np.all(delta == 0) for delta in whole.delta().values())  # so that W_k = W_0 at first, bit for bit
    assert whole.components == 2 * (3 + 2)


def test_it_is_the_clients_own_and_the_same_every_time():
    assert toy.same(levels.private(job(), 2), levels.private(job(round=7), 2))
    assert not toy.same(levels.private(job(), 2), levels.private(job("c1"), 2))
    assert not toy.same(levels.private(job(), 2), levels.private(job(seed=1), 2))
    common = job().adapter.blocks["0.m"].A
    assert not np.isin(levels.private(job(), 2).blocks["0.m"].A, common).any()


def test_what_the_store_holds_goes_before_the_start():
    mine = levels.private(job("c9"), 2)
    kept = to_arrays(mine) | {"moments/B/step": np.array(3.0)}
    assert toy.same(levels.private(job(private=kept), 2), mine)
    assert levels.moments(kept) == {"B/step": 3.0}


def test_without_rank_there_are_no_components():
    assert not levels.private(job(), 0).blocks
    assert not levels.private(job(private={"moments/B/step": np.array(1.0)}), 0).blocks


@pytest.mark.parametrize("form", ["svd", "lora"])
def test_packed_adapters_come_back_to_the_bit(form):
    adapter = toy.drawn(SPEC)
    if form == "lora":
        adapter = replace(adapter, blocks={n: replace(b, e=None) for n, b in adapter.blocks.items()})
    adapter = adapter.without({"0.m": np.array([1])})
    arrays = to_arrays(adapter)
    assert toy.same(from_arrays(arrays | {"moments/h.head.weight/exp_avg": np.ones(2)}, adapter.scale), adapter)
    assert all(isinstance(array, np.ndarray) for array in arrays.values())


# ---- ranks


def product(ranks: int, spectrum: list[float]) -> Adapter:
    """One 5 x 6 module whose increment has exactly these singular values, in factors of so many components."""
    draw, count = rng(0, "product"), len(spectrum)
    u, v = (np.linalg.qr(draw.normal(size=(size, count)))[0] for size in (5, 6))
    mix = draw.normal(size=(count, ranks))
    a = np.linalg.pinv(mix) @ (v.T * np.array(spectrum)[:, None])
    return Adapter({"0.m": Block(np.arange(ranks), u @ mix, None, a)}, 1.0, {})


@pytest.mark.parametrize(("tau", "rank"), [(0.6, 1), (0.4, 2), (0.05, 3), (0.009, 4)])
def test_the_effective_rank_counts_singular_values_above_a_share_of_the_largest(tau, rank):
    adapter = product(5, [2.0, 1.0, 0.2, 0.02])
    np.testing.assert_allclose(np.linalg.svd(adapter.delta()["0.m"])[1][:4], [2.0, 1.0, 0.2, 0.02])
    found = levels.effective_ranks(adapter, SPEC, tau)
    assert found.tolist() == [rank, 0]  # in the order of the modules; there is nothing in the other
    assert found.dtype == np.int32


def test_the_effective_rank_is_of_the_sum_and_without_scale():
    """Private components that cancel common ones lower it, others raise it; no scale moves it."""
    eye = np.eye(5, 6)
    common = Adapter({"0.m": Block(np.arange(3), np.eye(5, 3), None, eye[:3])}, 2.0, {})
    cancels = Adapter({"0.m": Block(np.arange(3, 5), -np.eye(5, 3)[:, 1:], None, eye[1:3])}, 2.0, {})
    adds = Adapter({"0.m": Block(np.arange(3, 5), np.eye(5)[:, 3:], None, eye[3:5])}, 2.0, {})
    ranks = [levels.effective_ranks(a, SPEC, 0.05)[0] for a in (common, common.union(cancels), common.union(adds))]
    assert ranks == [3, 1, 5]
    zero = Adapter({"0.m": Block(np.arange(1), np.zeros((5, 1)), None, eye[:1])}, 2.0, {})
    assert levels.effective_ranks(zero, SPEC, 0.05).tolist() == [0, 0]


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_12_the_rank_of_a_sum_is_within_the_bounds_of_its_parts(common, private, shared, seed):
    """|rank BA - rank DC| <= rank(BA + DC) <= min(out, in, rank BA + rank DC), by the products' actual ranks."""
    draw = np.random.default_rng(seed)
    shared = min(shared, common, private)
    assume(not common == private == shared or not common)  # of a whole that cancels only round-off is left
    left, right = draw.normal(size=(5, common)), draw.normal(size=(common, 6))
    d = np.concatenate([-left[:, :shared], draw.normal(size=(5, private - shared))], axis=1)
    c = np.concatenate([right[:shared], draw.normal(size=(private - shared, 6))])
    parts = [(left, right, 0), (d, c, 10)]
    adapters = [Adapter({"0.m": Block(first + np.arange(len(a)), b, None, a)}, 0.5, {}) for b, a, first in parts]
    one, two = (int(levels.effective_ranks(a, SPEC, 1e-9)[0]) for a in adapters)
    both = int(levels.effective_ranks(adapters[0].union(adapters[1]), SPEC, 1e-9)[0])
    assert (one, two) == (common, private)
    assert abs(one - two) <= both <= min(5, 6, one + two)
    assert both == min(5, common + private - 2 * shared)  # both ends are reached
