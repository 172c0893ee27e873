"""The algebra of components: what one operation does, another undoes, and the increment stays what it was."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrank.adapter import Adapter, Block, gaussian, kaiming, norms, recompress, split
from fedrank.protocol import rng as addressed
from toy import drawn, same, small

SHAPES = {"m": (300, 200), "n": (100, 400)}
SPEC = small({"m": (3, 4), "n": (4, 3)}, rank=5)
subsets = st.fixed_dictionaries({}, optional={name: st.sets(st.integers(0, 4)) for name in SPEC.shapes})
seeds = st.integers(0, 2**32 - 1)


def ids(chosen: dict[str, set[int]]) -> dict[str, np.ndarray]:
    return {name: np.array(sorted(part), int) for name, part in chosen.items()}


def block(*components: tuple[list[float], float, list[float]], ids: list[int] | None = None) -> Block:
    """A block of components (b, e, a)."""
    b, e, a = (np.array(part, np.float32) for part in zip(*components, strict=True))
    return Block(np.array(ids if ids is not None else range(len(e))), b.T, e, a)


def low_rank(seed: int, rank: int = 4) -> Adapter:
    return drawn(small({"m": (6, 5)}, rank), seed)


# ---- what an increment is


def test_increment_of_two_components() -> None:
    """delta = scale * sum_j e_j b_j a_j^T: 2 * (3 [1 0]^T [1 1 0] - [1 2]^T [0 0 1])."""
    adapter = Adapter({"m": block(([1, 0], 3, [1, 1, 0]), ([1, 2], -1, [0, 0, 1]))}, 2.0, {})
    np.testing.assert_array_equal(adapter.delta()["m"], [[6, 6, -2], [0, 0, -4]])


def test_without_e_the_increment_is_of_ones() -> None:
    whole = block(([1, 0], 1, [1, 1, 0]), ([1, 2], 1, [0, 0, 1]))
    plain = Block(whole.ids, whole.B, None, whole.A)
    np.testing.assert_array_equal(plain.delta(0.5), whole.delta(0.5))


@pytest.mark.parametrize("missing", ["B", "A"])
def test_no_increment_without_both_sides(missing: str) -> None:
    part = drawn(SPEC).only("BeA".replace(missing, ""))
    with pytest.raises(ValueError, match="needs both B and A"):
        part.delta()
    with pytest.raises(ValueError, match=r"module 'm': .* needs both B and A"):
        recompress(part)


# ---- sets of components


@given(subsets, seeds)
def test_take_and_without_partition_the_components(chosen: dict[str, set[int]], seed: int) -> None:
    """Every component is in exactly one of the two, and their union is the whole again, to the bit."""
    adapter, chosen_ids = drawn(SPEC, seed), ids(chosen)
    inside, outside = adapter.take(chosen_ids), adapter.without(chosen_ids)
    assert inside.components + outside.components == adapter.components
    assert {name: set(part.tolist()) for name, part in inside.ids.items()} == {n: s for n, s in chosen.items() if s}
    together = inside.union(outside)
    assert same(Adapter({name: together.blocks[name] for name in adapter.blocks}, 2.0, adapter.dense), adapter)


@given(subsets, seeds)
def test_parts_of_the_increment_add_up(chosen: dict[str, set[int]], seed: int) -> None:
    adapter = drawn(SPEC, seed)
    parts = [adapter.take(ids(chosen)).delta(), adapter.without(ids(chosen)).delta()]
    for name, whole in adapter.delta().items():
        np.testing.assert_allclose(sum(p[name] for p in parts if name in p), whole, atol=1e-5)


def test_take_picks_by_id_not_by_position() -> None:
    adapter = Adapter({"m": block(([1], 2, [3]), ([4], 5, [6]), ([7], 8, [9]), ids=[2, 5, 9])}, 1.0, {})
    found = adapter.take({"m": np.array([9, 2, 9])}).blocks["m"]  # a set: order and repeats do not matter
    assert [found.ids.tolist(), found.B.tolist(), found.e.tolist(), found.A.tolist()] == [
        [2, 9],
        [[1, 7]],
        [2, 8],
        [[3], [9]],
    ]


def test_repeated_ids_do_not_pass_for_the_whole_module() -> None:
    assert drawn(SPEC).take({"m": np.array([0, 0, 0, 0, 0])}).ids["m"].tolist() == [0]


def test_a_module_left_with_nothing_is_dropped() -> None:
    adapter = drawn(SPEC)
    assert list(adapter.take({"m": np.array([], int), "n": np.array([1])}).blocks) == ["n"]
    assert list(adapter.without({"n": np.arange(5)}).blocks) == ["m"]
    assert adapter.without({}).components == adapter.components == 10


def test_take_names_what_is_not_there() -> None:
    adapter = drawn(SPEC)
    with pytest.raises(KeyError, match=r"module 'm' has no components \[7, 9\]"):
        adapter.take({"m": np.array([0, 7, 9])})
    with pytest.raises(KeyError, match=r"module 'other' has no components, asked for \[0\]"):
        adapter.take({"other": np.array([0])})


def test_union_interleaves_by_id() -> None:
    left = Adapter({"m": block(([1], 10, [2]), ([5], 50, [6]), ids=[1, 5])}, 1.0, {"h": np.ones(1)})
    right = Adapter({"m": block(([3], 30, [4]), ids=[3]), "n": block(([9], 90, [9]))}, 1.0, {"h": np.zeros(1)})
    found = left.union(right)
    assert found.ids["m"].tolist() == [1, 3, 5]
    assert found.blocks["m"].e.tolist() == [10, 30, 50]
    assert found.blocks["m"].B.tolist() == [[1, 3, 5]]
    assert found.blocks["n"] is right.blocks["n"]
    assert found.dense["h"].tolist() == [1]


def test_union_refuses_what_would_change_the_increment() -> None:
    adapter = drawn(SPEC)
    with pytest.raises(ValueError, match="ascend without repeats"):
        adapter.union(adapter)
    one, other = adapter.take({"m": np.array([0])}), adapter.take({"m": np.array([1])})
    with pytest.raises(ValueError, match="module 'm': factor e is in one of the two"):
        one.union(other.only("BA"))
    with pytest.raises(ValueError, match=r"scale 2.0 and 1.0"):
        one.union(Adapter(other.blocks, 1.0, {}))


# ---- sets of factors


@given(st.sets(st.sampled_from("BeAh")), seeds)
def test_fill_gives_back_what_only_left_out(factors: set[str], seed: int) -> None:
    adapter = drawn(SPEC, seed)
    part = adapter.only("".join(factors))
    for name in SPEC.shapes:
        there = {f for f in "BeA" if getattr(part.blocks[name], f) is not None}
        assert there == factors - {"h"}
    assert bool(part.dense) == ("h" in factors)
    assert same(part.fill(adapter), adapter)


def test_fill_keeps_ours_where_both_have_it() -> None:
    ours, theirs = drawn(SPEC, 1).take({"m": np.array([1, 3])}), drawn(SPEC, 2)
    filled = ours.only("B").fill(theirs)
    np.testing.assert_array_equal(filled.blocks["m"].B, ours.blocks["m"].B)
    np.testing.assert_array_equal(filled.blocks["m"].A, theirs.blocks["m"].A[[1, 3]])
    assert list(filled.blocks) == ["m"]


# ---- recompress


@given(seeds)
def test_recompress_keeps_the_increment(seed: int) -> None:
    """B and A come out orthonormal, e as singular values / scale, descending."""
    adapter = low_rank(seed)
    found = recompress(adapter)
    at, want = found.blocks["m"], adapter.delta()["m"]
    np.testing.assert_allclose(found.delta()["m"], want, atol=1e-5 * np.linalg.norm(want))
    np.testing.assert_allclose(at.B.T @ at.B, np.eye(at.rank), atol=1e-5)
    np.testing.assert_allclose(at.A @ at.A.T, np.eye(at.rank), atol=1e-5)
    np.testing.assert_allclose(
        at.e * adapter.scale, np.linalg.svd(want.astype(float))[1][: at.rank], rtol=1e-3, atol=1e-5
    )


def test_recompress_drops_directions_that_are_nothing() -> None:
    """Two equal components are one direction; a module of zeros is no module."""
    twice = block(([1, 0, 1], 1, [1, 2, 0]), ([1, 0, 1], 1, [1, 2, 0]), ([1, 1, 1], 0, [5, 5, 5]))
    zeros = block(([1, 1], 0, [1, 1]))
    found = recompress(Adapter({"m": twice, "n": zeros}, 1.0, {"h": np.ones(2)}))
    assert {name: b.rank for name, b in found.blocks.items()} == {"m": 1}
    np.testing.assert_allclose(found.delta()["m"], [[2, 4, 0], [0, 0, 0], [2, 4, 0]], atol=1e-6)
    assert list(found.dense) == ["h"]
    one = low_rank(1)
    again = replace(one, blocks={"m": replace(one.blocks["m"], ids=np.arange(4, 8))})
    assert recompress(one.union(again)).components == one.components


# ---- norms, splits and starts


def test_norms_are_products_of_lengths() -> None:
    """|e| |b| |a|: 2 * 5 * 13 and 1 * 1 * 3; a factor that is not there counts as 1."""
    adapter = Adapter({"m": block(([3, 4], -2, [5, 12]), ([0, 1], 1, [0, 3]))}, 7.0, {})
    assert norms(adapter)["m"].tolist() == [130, 3]
    assert norms(adapter.only("eA"))["m"].tolist() == [26, 3]
    assert norms(adapter.only("B"))["m"].dtype == np.float64


def test_split() -> None:
    assert [part.tolist() for part in split(np.arange(5), [2, 0, 3])] == [[0, 1], [], [2, 3, 4]]


def test_gaussian_start() -> None:
    """A and B ~ N(0, 0.02^2), e = 0: the increment is zero, and the same address gives the same numbers."""
    found = gaussian(SHAPES, 8, 2.0, addressed(0, "begin"))
    assert all(not delta.any() for delta in found.delta().values())
    for name, (out, in_) in SHAPES.items():
        at = found.blocks[name]
        assert (at.B.shape, at.A.shape, at.ids.tolist()) == ((out, 8), (8, in_), list(range(8)))
        for factor in (at.B, at.A):
            # the standard error of a standard deviation is std / sqrt(2 n); of a mean, std / sqrt(n)
            assert abs(factor.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * factor.size)
            assert abs(factor.mean()) < 5 * 0.02 / np.sqrt(factor.size)
    assert same(found, gaussian(SHAPES, 8, 2.0, addressed(0, "begin")))
    assert not same(found, gaussian(SHAPES, 8, 2.0, addressed(1, "begin")))


def test_kaiming_start() -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, no e."""
    for name, at in kaiming(SHAPES, 8, 2.0, addressed(0, "begin")).blocks.items():
        bound = SHAPES[name][1] ** -0.5
        assert 0.99 * bound < np.abs(at.A).max() <= bound * (1 + 1e-6)
        assert abs(at.A.std() - bound / np.sqrt(3)) < 0.05 * bound
        assert not at.B.any()
        assert at.e is None


# ---- layout and checks


def test_one_layout_however_a_block_was_made() -> None:
    """Each component's vector is contiguous, so that a norm has the same bits whatever the memory order was."""
    b, e, a = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in ((301, 7), 7, (7, 203)))
    one = Block(np.arange(7), np.ascontiguousarray(b), e, np.asfortranarray(a))
    other = Block(np.arange(7), np.asfortranarray(b), e, np.ascontiguousarray(a))
    for at in (one, other, one.at(np.array([0, 3])), one.at(np.arange(7) > 2)):
        assert at.B.flags.f_contiguous
        assert at.A.flags.c_contiguous
    left, right = norms(Adapter({"m": one}, 1.0, {}))["m"], norms(Adapter({"m": other}, 1.0, {}))["m"]
    assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("ids", [[1, 0], [0, 0], [2, 3, 3]])
def test_ids_ascend_without_repeats(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend without repeats"):
        Block(np.array(ids), None, None, None)


@pytest.mark.parametrize("factor", ["B", "e", "A"])
def test_a_factor_of_another_rank_is_refused(factor: str) -> None:
    """By the shape check of the tests, and by the class's own in production."""
    shapes = {"B": (4, 3), "e": (3,), "A": (3, 4)}
    parts = {f: np.ones(shapes[f], np.float32) if f == factor else None for f in "BeA"}
    with pytest.raises((ValueError, TypeError)):
        Block(np.arange(2), **parts)
