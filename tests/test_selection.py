"""Budgets over rounds, and the choice of components under one."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrank.adapter import Adapter, Block, norms
from fedrank.selection import by_module, cubic, everything, largest, leading, others, sampled, top
from toy import drawn, small


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, int]:
    rounds = draw(st.integers(1, 60))
    warmup = draw(st.integers(0, rounds - 1))
    settle = draw(st.integers(0, rounds - 1 - warmup))
    end = draw(st.integers(1, 100))
    return {"rounds": rounds, "start": end + draw(st.integers(0, 900)), "end": end, "warmup": warmup, "settle": settle}


@given(schedules())
def test_cubic_starts_whole_ends_at_the_target_and_never_grows(law: dict[str, int]) -> None:
    """b(1..T_w) = N0, b non-increasing, b(t > T - T_f) = N_T."""
    budgets = [cubic(t, **law) for t in range(1, law["rounds"] + 1)]
    assert budgets[: law["warmup"]] == [law["start"]] * law["warmup"]
    assert all(later <= earlier for earlier, later in pairwise(budgets))
    assert budgets[law["rounds"] - law["settle"] :] == [law["end"]] * law["settle"]
    assert law["end"] <= budgets[-1] <= budgets[0] <= law["start"]


@given(schedules())
def test_cubic_is_the_ceiling_of_the_exact_law(law: dict[str, int]) -> None:
    for t in range(law["warmup"] + 1, law["rounds"] - law["settle"] + 1):
        left = 1 - Fraction(t - law["warmup"], law["rounds"] - law["settle"] - law["warmup"])
        assert cubic(t, **law) == math.ceil(law["end"] + (law["start"] - law["end"]) * left**3)


def test_cubic_by_hand() -> None:
    """From 100 to 36 over rounds 3..6 of 8: 36 + 64 * (3/4)^3 = 63, (2/4)^3 = 44, (1/4)^3 = 37, 0 = 36."""
    assert [cubic(t, 8, 100, 36, 2, 2) for t in range(1, 9)] == [100, 100, 63, 44, 37, 36, 36, 36]
    # 108 + 324 * (2/3)^3 = 204 exactly, which floating point takes for a little more
    assert cubic(1, 3, 432, 108, 0, 0) == 204


def test_top_by_the_first_key() -> None:
    assert top(2, np.array([0.1, 0.9, 0.5])).tolist() == [False, True, True]


def test_top_breaks_ties_by_the_next_keys_then_by_position() -> None:
    first, second = np.array([1.0, 2.0, 1.0, 1.0]), np.array([0.0, -9.0, 5.0, 0.0])
    assert np.flatnonzero(top(2, first, second)).tolist() == [1, 2]
    assert np.flatnonzero(top(3, first, second)).tolist() == [0, 1, 2]
    assert np.flatnonzero(top(2, np.zeros(4))).tolist() == [0, 1]


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (3, 3), (9, 3)])
def test_top_keeps_the_budget_or_all_there_is(budget: int, kept: int) -> None:
    assert top(budget, np.array([3.0, 1.0, 2.0])).sum() == kept


@given(st.permutations(range(6)), st.integers(0, 6))
def test_top_does_not_depend_on_positions_where_scores_differ(order: list[int], budget: int) -> None:
    scores = np.array([0.3, 0.1, 0.6, 0.2, 0.5, 0.4])
    np.testing.assert_array_equal(top(budget, scores)[order], top(budget, scores[order]))


def test_by_module_reads_a_mask_in_module_and_id_order() -> None:
    adapter = drawn(small(rank=4)).take({"0.m": np.array([1, 3]), "1.m": np.array([0, 2, 3])})
    found = by_module(adapter, np.array([False, True, True, False, True]))
    assert {name: ids.tolist() for name, ids in found.items()} == {"0.m": [3], "1.m": [0, 3]}
    assert adapter.take(by_module(adapter, np.array([True, True, False, False, False]))).ids.keys() == {"0.m"}


def test_everything_is_all_of_it() -> None:
    assert {name: ids.tolist() for name, ids in everything(drawn(small())).items()} == {"0.m": [0, 1], "1.m": [0, 1]}


GAPS = drawn(small(rank=6)).take({"0.m": np.array([0, 2, 3, 5]), "1.m": np.array([1, 4])})


def test_leading_is_the_first_of_every_module_whatever_their_ids() -> None:
    assert {n: ids.tolist() for n, ids in leading(GAPS, 3).items()} == {"0.m": [0, 2, 3], "1.m": [1, 4]}


@pytest.mark.parametrize("choose", [sampled, partial(largest, sizes=norms(GAPS))], ids=["sampled", "largest"])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_selections_take_as_many_as_there_are(choose: Any, rank: int) -> None:
    for name, ids in choose(GAPS, rank, 0, 1, "c0").items():
        assert len(ids) == min(rank, GAPS.blocks[name].rank)
        assert set(ids) <= set(GAPS.blocks[name].ids)
        assert ids.tolist() == sorted(ids)


def test_sampled_is_addressed() -> None:
    many = drawn(small({f"{at}": (2, 2) for at in range(9)}, rank=6))
    draws = [
        sampled(many, 2, *address) for address in ((0, 1, "a"), (0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"))
    ]
    found = [[tuple(ids) for ids in draw.values()] for draw in draws]
    assert found[0] == found[1]
    assert all(found[0] != other for other in found[2:])
    assert len(set(found[0])) > 1


def test_others_are_what_without_leaves() -> None:
    ids = {"a": np.array([0, 2, 5]), "b": np.array([1, 3]), "c": np.arange(4)}
    adapter = Adapter({n: Block(i, np.ones((2, len(i))), None, np.ones((len(i), 2))) for n, i in ids.items()}, 1.0, {})
    for chosen in ({}, {"a": ids["a"][:0], "b": ids["b"]}, {"a": ids["a"][1:], "c": ids["c"][[0, 3]]}):
        left, said = others(adapter, chosen), adapter.without(chosen).ids
        assert {n: i.tolist() for n, i in left.items()} == {n: i.tolist() for n, i in said.items()}


def test_largest_goes_by_the_norm_and_draws_ties() -> None:
    """e decides here: |e| |b| |a| with b = a = (1,)."""
    ones = np.ones((1, 4), np.float32)
    block = Block(np.arange(4), ones, np.array([1, -5, 2, 2], np.float32), ones.T)
    alike = replace(block, e=np.zeros(4, np.float32))
    adapter = Adapter({"m": block}, 1.0, {})
    assert largest(adapter, 1, 0, sizes=norms(adapter))["m"].tolist() == [1]
    assert {tuple(largest(adapter, 2, seed, sizes=norms(adapter))["m"]) for seed in range(20)} == {(1, 2), (1, 3)}
    ties = Adapter({"m": alike}, 1.0, {})
    assert len({tuple(largest(ties, 2, seed, sizes=norms(ties))["m"]) for seed in range(50)}) == 6
