"""Weighted means of adapters, on numbers that can be checked by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrank.adapter import Adapter, Block
from fedrank.aggregation import average, examples, total, uniform, vote
from fedrank.protocol import Update
from fedrank.store import Store
from toy import Arrived, arrays, drawn, same, small


def adapter(
    ids: list[int], e: list[float], head: float | None = None, scale: float = 2.0, kind: Any = np.float32
) -> Adapter:
    """One 2x2 module with component j: b = e_j [1 1], a = e_j [1 2]; the head is one number."""
    value = np.array(e, kind)
    block = Block(np.array(ids), np.stack([value, value]), value, np.stack([value, 2 * value], axis=1))
    return Adapter({"m": block} if ids else {}, scale, {} if head is None else {"head": np.array([head], kind)})


def arrived(*updates: tuple[Adapter, int], **extra: Any) -> Arrived:
    return Arrived({f"c{at}": Update(found, count, **extra) for at, (found, count) in enumerate(updates)})


OLD = adapter([0, 1], [10, 20], head=5)


def test_average_is_weighted_by_examples() -> None:
    """(1 * 4 + 3 * 8) / 4 = 7 and (1 * 0 + 3 * 4) / 4 = 3."""
    found = average(OLD, arrived((adapter([0, 1], [4, 0], 1), 1), (adapter([0, 1], [8, 4], 2), 3)))
    assert found.blocks["m"].e.tolist() == [7, 3]
    assert found.blocks["m"].B.tolist() == [[7, 3], [7, 3]]
    assert found.blocks["m"].A.tolist() == [[7, 14], [3, 6]]
    assert found.dense["head"].tolist() == [1.75]


def test_average_can_be_uniform() -> None:
    found = average(OLD, arrived((adapter([0, 1], [4, 0], 1), 1), (adapter([0, 1], [8, 4], 2), 3)), uniform)
    assert found.blocks["m"].e.tolist() == [6, 2]
    assert found.dense["head"].tolist() == [1.5]


@pytest.mark.parametrize(
    ("absent", "e", "head"),
    [
        ("skip", [5, 8], 1),  # (1*2 + 3*6) / 4; only the second client has component 1
        ("zero", [5, 6], 0.25),  # (1*0 + 3*8) / 4; (1*1 + 3*0) / 4
        ("old", [5, 11], 4),  # (1*20 + 3*8) / 4; (1*1 + 3*5) / 4
    ],
)
def test_what_a_client_without_a_component_counts_as(absent: str, e: list[float], head: float) -> None:
    updates = arrived((adapter([0], [2], head=1), 1), (adapter([0, 1], [6, 8]), 3))
    found = average(OLD, updates, absent=absent)
    assert found.blocks["m"].e.tolist() == e
    assert found.blocks["m"].A[:, 1].tolist() == [2 * value for value in e]
    assert found.dense["head"].tolist() == [head]


@pytest.mark.parametrize("absent", ["skip", "zero", "old"])
def test_what_no_update_carries_stays(absent: str) -> None:
    """A component, a module and a head that nobody sent keep their old values."""
    old = Adapter({**OLD.blocks, "n": OLD.blocks["m"]}, 2.0, OLD.dense)
    found = average(old, arrived((adapter([1], [3]), 1), (adapter([1], [3]), 1)), absent=absent)
    assert found.blocks["m"].e.tolist() == [10, 3]
    assert found.blocks["n"].e.tolist() == [10, 20]
    assert found.dense["head"].tolist() == [5]


@pytest.mark.parametrize(("absent", "mean"), [("skip", 8), ("zero", 6), ("old", 11)])
def test_a_module_that_only_some_have(absent: str, mean: float) -> None:
    """As a component: (8), (1*0 + 3*8) / 4, (1*20 + 3*8) / 4."""
    old = Adapter({**OLD.blocks, "n": adapter([0], [20]).blocks["m"]}, 2.0, {})
    with_n = Adapter({"n": adapter([0], [8]).blocks["m"]}, 2.0, {})
    found = average(old, arrived((adapter([0, 1], [1, 1]), 1), (with_n, 3)), absent=absent)
    assert found.blocks["n"].e.tolist() == [mean]


def test_new_components_join() -> None:
    """A component or module that the old adapter has not: the mean over those that sent it."""
    new = Adapter({**adapter([1, 4], [2, 6]).blocks, "n": adapter([0], [1]).blocks["m"]}, 2.0, {})
    found = average(OLD, arrived((new, 1), (adapter([4], [9]), 2)))
    assert found.ids["m"].tolist() == [0, 1, 4]
    assert found.blocks["m"].e.tolist() == [10, 2, 8]
    assert found.blocks["n"].e.tolist() == [1]


def test_factors_that_did_not_travel_stay_as_they_were() -> None:
    updates = arrived((adapter([0, 1], [4, 0]).only("B"), 1), (adapter([0, 1], [8, 4]).only("B"), 1))
    found = average(OLD, updates).blocks["m"]
    assert found.B.tolist() == [[6, 2], [6, 2]]
    assert found.e.tolist() == [10, 20]
    assert found.A.tolist() == OLD.blocks["m"].A.tolist()


def test_a_new_component_must_bring_every_factor() -> None:
    with pytest.raises(ValueError, match="new components came without factor B"):
        average(OLD, arrived((adapter([0, 7], [1, 1]).only("eA"), 1)))


@pytest.mark.parametrize(("first", "second"), [("B", "BA"), ("BA", "B")])
def test_updates_must_carry_the_same_factors(first: str, second: str) -> None:
    with pytest.raises(ValueError, match="in some updates of a module and not in others"):
        average(OLD, arrived((OLD.only(first), 1), (OLD.only(second), 1)))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_mean_has_the_old_adapters_dtype(kind: Any) -> None:
    old = adapter([0, 1], [1, 2], head=1, kind=kind)
    found = average(old, arrived((adapter([0], [1], head=2, kind=np.float64), 1)))
    assert {array.dtype for name, array in arrays(found).items() if not name.endswith("ids")} == {np.dtype(kind)}


def test_sums_are_in_float64() -> None:
    """2^24 + 1 + 1 + ... is 2^24 for ever in float32."""
    parts = [(adapter([0], [2.0**24]), 1.0), *[(adapter([0], [1]), 1.0)] * 8]
    assert total(parts).sums.blocks["m"].e.tolist() == [2**24 + 8]
    one, three = adapter([0], [0.1]), adapter([0], [0.3])
    exact = (float(np.float32(0.1)) + 3 * float(np.float32(0.3))) / 4
    assert average(one, arrived((one, 1), (three, 3))).blocks["m"].e[0] == np.float32(exact)


def test_total_says_the_weight_behind_every_part() -> None:
    parts = [(adapter([0, 2], [1, 1]), 2.0), (adapter([1, 2], [1, 3], head=4), 5.0)]
    found = total(parts)
    assert found.sums.ids["m"].tolist() == [0, 1, 2]
    assert found.sums.blocks["m"].e.tolist() == [2, 5, 17]
    assert found.weights["m"].tolist() == [2, 5, 7]
    assert found.sums.dense["head"].tolist() == [20]
    assert (float(found.weights["head"]), found.weight) == (5, 7)


def test_the_summands_are_left_alone() -> None:
    first, second = adapter([0, 1], [1, 2], head=3), adapter([1, 2], [5, 6], head=7)
    total([(first, 2.0), (second, 3.0)])
    assert same(first, adapter([0, 1], [1, 2], head=3))
    assert same(second, adapter([1, 2], [5, 6], head=7))


def test_different_scales_are_not_added_factor_by_factor() -> None:
    with pytest.raises(ValueError, match=r"scale 2.0 and 1.0"):
        total([(adapter([0], [1]), 1.0), (adapter([0], [1], scale=1.0), 1.0)])


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no update arrived"):
        average(OLD, arrived())


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50), st.sets(st.integers(0, 3))), min_size=1, max_size=5),
    st.randoms(),
)
def test_the_mean_does_not_depend_on_the_order(parts: list[tuple[int, int, set[int]]], random: Any) -> None:
    """Up to rounding: the bits are only claimed for one order, which the spool fixes."""
    old = drawn(small(rank=4))
    found = [
        (drawn(small(rank=4), seed).take({"0.m": np.array(sorted(ids), int)}), weight) for seed, weight, ids in parts
    ]
    shuffled = random.sample(found, len(found))
    one, other = average(old, arrived(*found)), average(old, arrived(*shuffled))
    for name, array in arrays(one).items():
        np.testing.assert_allclose(arrays(other)[name], array, rtol=1e-6, atol=1e-9)


def test_any_order_of_arrival_gives_the_same_bits(tmp_path: Path) -> None:
    """The spool is read in client order, as often as asked, one update at a time."""
    spec = small(rank=4)
    updates = {f"c{at}": Update(drawn(spec, at), at + 1) for at in range(5)}
    reads: list[str] = []

    def read(client: str, frame: bytes) -> Update:
        assert frame == client.encode()
        reads.append(client)
        return updates[client]

    found = []
    for order in (["c3", "c0", "c4", "c1", "c2"], ["c2", "c4", "c1", "c0", "c3"]):
        store = Store(tmp_path)
        store.clear_spool()
        for client in order:
            store.spool(client, client.encode())
        spool = store.spooled(tuple(order), read)
        assert len(spool) == 5
        found.append(average(drawn(spec, 9), spool))
        assert [client for client, _ in spool] == sorted(order)
    assert same(*found)
    assert reads == [f"c{at}" for at in range(5)] * 4
    store.clear_spool()
    assert list((tmp_path / "spool").iterdir()) == []


def test_examples_are_the_weight() -> None:
    assert (examples(Update(OLD, 7)), uniform(Update(OLD, 7))) == (7.0, 1.0)


def test_vote_is_the_share_of_clients_per_bit() -> None:
    """Every client counts the same, whatever its examples; bits past the size are padding."""
    masks = {
        "c0": [1, 1, 0, 0, 0, 0, 0, 0, 1],
        "c1": [1, 0, 0, 0, 0, 0, 0, 0, 1],
        "c2": [1, 0, 1, 0, 0, 0, 0, 0, 0],
        "c3": [1] * 9,
    }
    updates = {c: Update(OLD, 10**at, arrays={"keep": np.packbits(mask)}) for at, (c, mask) in enumerate(masks.items())}
    assert vote(Arrived(updates), "keep", 9).tolist() == [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.75]
