"""Who holds which rows: every row once, the same for the same seed, skewed as asked, and clear refusals."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedrank.training.partition import Partition, PartitionError, largest_remainder, partition


def deal(kind: str, labels: np.ndarray | None, count: int, seed: int = 0, **changes: Any) -> Partition:
    options: dict[str, Any] = {
        "alpha": 1.0,
        "classes_per_client": 2,
        "s": 0.5,
        "min_rows": 1,
        "column": None,
        "test_labels": None,
        "test_rows": 0,
    }
    return partition(kind, labels, count, seed, **{**options, **changes})  # type: ignore[arg-type]


def even_labels(classes: int, rows: int) -> np.ndarray:
    return np.repeat(np.arange(classes), rows)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "pathological", "label_sorted", "quantity"]),
    classes=st.integers(1, 6),
    rows=st.integers(10, 30),
    count=st.integers(3, 10),
    seed=st.integers(0, 2**32),
    s=st.floats(0, 1),
    alpha=st.floats(0.05, 20),
)
def test_every_row_goes_to_exactly_one_client(
    kind: str, classes: int, rows: int, count: int, seed: int, s: float, alpha: float
) -> None:
    labels, test_labels = even_labels(classes, rows), even_labels(classes, 5)
    options = {"s": s, "alpha": alpha, "classes_per_client": min(2, classes), "test_labels": test_labels}
    try:
        shares = deal(kind, labels, count, seed, **options)
    except PartitionError:
        assume(kind not in ("dirichlet", "quantity"))  # those may end without a draw that gives each client a row
        raise
    assert np.array_equal(np.sort(np.concatenate(shares.train)), np.arange(len(labels)))
    assert np.array_equal(np.sort(np.concatenate(shares.test)), np.arange(len(test_labels)))
    assert min(map(len, shares.train)) >= 1
    again = deal(kind, labels, count, seed, **options)
    assert all(
        np.array_equal(a, b) for a, b in zip([*shares.train, *shares.test], [*again.train, *again.test], strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(column=st.lists(st.sampled_from("abcdefg"), min_size=1), min_rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_natural_clients_hold_out_a_fifth_of_their_own_rows(column: list[str], min_rows: int, seed: int) -> None:
    sizes = {value: column.count(value) for value in sorted(set(column))}
    kept = [value for value, size in sizes.items() if size >= min_rows]
    if not kept:
        with pytest.raises(PartitionError, match=f"under min_rows {min_rows}"):
            deal("natural", None, 0, seed, column=column, min_rows=min_rows)
        return
    shares = deal("natural", None, 0, seed, column=column, min_rows=min_rows)
    assert shares.origin is not None
    assert shares.origin.tolist() == kept
    assert shares.dropped == shares.summary()["dropped"] == len(sizes) - len(kept)
    assert shares.test_from == "train"
    for value, train, test in zip(shares.origin, shares.train, shares.test, strict=True):
        assert len(test) == sizes[value] // 5
        assert sorted([*train, *test]) == [i for i, v in enumerate(column) if v == value]


def test_a_natural_test_is_the_same_for_every_seed_and_apart_from_validation() -> None:
    """Rates that are tuned with one seed must not have seen what another seed's run is tested on."""
    column = list("aabbbbbbbbbbbbbcccccccccccccccccccccc") * 3
    one, other = (deal("natural", None, 0, seed, column=column) for seed in (1, 2))
    held = deal("natural", None, 0, 3, column=column, validation=True)
    for at, size in enumerate(one.train.sizes + one.test.sizes):
        assert one.test[at].tolist() == other.test[at].tolist()
        assert len(held.test[at]) == size // 5
        assert not {*held.test[at], *held.train[at]} & {*one.test[at]}
        assert sorted([*held.test[at], *held.train[at]]) == sorted(one.train[at])


@pytest.mark.parametrize("validation", [False, True])
def test_natural_clients_keep_groups_whole(validation: bool) -> None:
    """References of one prompt are not split between training and test."""
    draw = np.random.default_rng(0)
    groups, column = draw.integers(0, 60, 400), [f"c{at % 3}" for at in range(400)]
    shares = deal("natural", None, 0, 0, column=column, groups=groups, validation=validation)
    for train, test in zip(shares.train, shares.test, strict=True):
        assert not set(groups[train]) & set(groups[test])
        assert 15 <= len(test) <= (len(train) + len(test)) // 4


def test_another_seed_is_another_partition() -> None:
    labels = even_labels(4, 25)
    for kind in ("iid", "dirichlet", "pathological", "label_sorted", "quantity"):
        one, other = deal(kind, labels, 4, 0), deal(kind, labels, 4, 1)
        assert any(not np.array_equal(a, b) for a, b in zip(one.train, other.train, strict=True)), kind


def test_names_are_padded_to_one_width() -> None:
    assert deal("iid", even_labels(2, 50), 10).names[-1] == "9"
    assert deal("iid", even_labels(2, 50), 11).names[:2] == ("00", "01")


@pytest.mark.parametrize("kind", ["iid", "label_sorted"])
def test_sizes_differ_by_at_most_one(kind: str) -> None:
    for rows in range(7, 60, 4):
        sizes = [len(r) for r in deal(kind, even_labels(1, rows), 7).train]
        assert max(sizes) - min(sizes) <= 1


def test_fully_sorted_clients_hold_one_class_each_and_unsorted_ones_all() -> None:
    labels = even_labels(5, 40)
    held = [{int(labels[i]) for i in rows} for rows in deal("label_sorted", labels, 5, s=1.0).train]
    assert held == [{0}, {1}, {2}, {3}, {4}]
    assert all(len(set(labels[rows])) == 5 for rows in deal("label_sorted", labels, 5, s=0.0).train)


@pytest.mark.parametrize(("classes", "count"), [(10, 8), (4, 8), (10, 3), (150, 20), (7, 7)])
def test_label_sorting_runs_from_even_to_sorted_on_train_and_test_rows(classes: int, count: int) -> None:
    """PF2LoRA's spec, 10.1.16: s is heterogeneity, 0 is iid, at 1 a client has at most ceil(K / M) + 1 labels."""
    labels, test_labels = even_labels(classes, 40), even_labels(classes, 20)
    held: dict[float, list[list[int]]] = {}
    for s in (0.0, 0.5, 1.0):
        shares = deal("label_sorted", labels, count, s=s, test_labels=test_labels)
        for known, rows in ((labels, shares.train), (test_labels, shares.test)):
            assert sorted(np.concatenate(rows)) == list(range(len(known)))  # disjoint, and nothing dropped
            held.setdefault(s, []).append([len(np.unique(known[share])) for share in rows])
    at_most = -(-classes // count) + 1
    assert max(map(max, held[1.0])) <= at_most
    if at_most < classes / 2:
        assert min(map(min, held[0.0])) > at_most
    even_share = 40 / count
    iid = deal("label_sorted", labels, count, s=0.0).train
    counts = np.stack([np.bincount(labels[rows], minlength=classes) for rows in iid])
    assert np.abs(counts - even_share).max() < 5 * even_share**0.5 + 1  # a draw without replacement scatters less
    sorted_half = deal("label_sorted", labels, count, s=0.5).train
    skew = [np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in part]) for part in (iid, sorted_half)]
    assert skew[0] < skew[1]


@pytest.mark.parametrize(("count", "each"), [(10, 2), (5, 3), (4, 5), (30, 1)])
def test_pathological_clients_hold_exactly_their_classes(count: int, each: int) -> None:
    labels = even_labels(10, 20)
    shares = deal("pathological", labels, count, classes_per_client=each)
    assert {len(set(labels[rows])) for rows in shares.train} == {each}
    for label in range(10):
        parts = [n for rows in shares.train if (n := int((labels[rows] == label).sum()))]
        assert max(parts) - min(parts) <= 1


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    labels = even_labels(10, 100)

    def largest_class(alpha: float) -> float:
        shares = deal("dirichlet", labels, 10, alpha=alpha)
        return float(np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in shares.train]))

    assert largest_class(0.1) > 0.4
    assert largest_class(1000.0) < 0.15


def test_dirichlet_mean_size_does_not_depend_on_the_place_in_the_list() -> None:
    """Rounding at the running sum alone would leave the first of 50 clients with no row of 20-row classes."""
    draws = [deal("dirichlet", even_labels(60, 20), 50, seed, alpha=50.0) for seed in range(20)]
    sizes = np.mean([[len(rows) for rows in draw.train] for draw in draws], axis=0)
    assert sizes.min() > 20
    assert sizes.max() < 28


@pytest.mark.parametrize("seed", range(5))
def test_the_design_s_dirichlet_case_succeeds(seed: int) -> None:
    shares = deal("dirichlet", even_labels(150, 100), 100, seed, alpha=0.1, min_rows=2)
    assert min(map(len, shares.train)) >= 2
    assert shares.redraws == 0


def test_dirichlet_redraws_and_counts_it() -> None:
    redraws = [deal("dirichlet", even_labels(2, 30), 5, seed, alpha=0.5, min_rows=2).redraws for seed in range(10)]
    assert 0 < max(redraws) <= 20


def test_quantity_skews_sizes_and_not_labels() -> None:
    labels = even_labels(2, 2000)
    shares = deal("quantity", labels, 5, alpha=0.7)
    sizes = [len(rows) for rows in shares.train]
    assert max(sizes) > 2 * min(sizes)
    largest = shares.train[int(np.argmax(sizes))]
    assert abs(labels[largest].mean() - 0.5) < 0.1


def test_personal_tests_follow_the_labels_of_the_training_rows() -> None:
    labels, test_labels = even_labels(6, 60), even_labels(6, 30)
    shares = deal("dirichlet", labels, 6, alpha=0.3, test_labels=test_labels)
    for train, test in zip(shares.train, shares.test, strict=True):
        half = np.bincount(labels[train], minlength=6) / 2
        assert np.abs(np.bincount(test_labels[test], minlength=6) - half).max() <= 1


def test_a_test_label_that_nobody_trains_on_is_in_no_personal_test() -> None:
    shares = deal("iid", np.zeros(20, np.int64), 2, test_labels=np.array([0, 0, 1]))
    assert sorted(np.concatenate(shares.test).tolist()) == [0, 1]


def test_largest_remainder_by_hand() -> None:
    shares = largest_remainder(10, np.array([5, 3, 1]), np.random.default_rng(0))  # 5.56, 3.33, 1.11
    assert shares.tolist() == [6, 3, 1]


def test_rows_without_labels() -> None:
    shares = deal("quantity", None, 3, alpha=5.0, train_rows=90, test_rows=30)
    assert sum(map(len, shares.train)) == 90
    assert all(abs(len(te) - len(tr) / 3) < 1 for tr, te in zip(shares.train, shares.test, strict=True))
    assert [len(rows) for rows in deal("iid", None, 4, train_rows=8, test_rows=4).test] == [1, 1, 1, 1]
    with pytest.raises(PartitionError, match="train_rows"):
        deal("iid", None, 4)


def test_summary_is_json() -> None:
    summary = deal("natural", np.array([0, 1, 1, 0, 1, 2]), 0, column=["x", "y", "y", "y", "y", "y"]).summary()
    assert json.loads(json.dumps(summary)) == summary
    first, second = summary["clients"]
    assert first == {"client": "0", "origin": "x", "train_rows": 1, "test_rows": 0, "label_counts": {"0": 1}}
    assert (second["train_rows"], second["test_rows"], sum(second["label_counts"].values())) == (4, 1, 4)


@pytest.mark.parametrize(
    ("kind", "labels", "count", "changes", "message"),
    [
        ("iid", even_labels(1, 3), 4, {}, "client 3 of 4 gets none of 3 rows"),
        ("iid", even_labels(1, 3), 0, {}, "0 clients; there must be at least one"),
        (
            "dirichlet",
            even_labels(2, 30),
            50,
            {"alpha": 0.01, "min_rows": 2},
            "alpha 0.01 and 50 clients .* at most 0 rows",
        ),
        ("quantity", even_labels(2, 30), 50, {"alpha": 0.01, "min_rows": 2}, "min_rows is 2; raise alpha"),
        ("pathological", even_labels(9, 5), 4, {}, "4 clients with 2 of 9 classes"),
        ("pathological", even_labels(2, 5), 4, {"classes_per_client": 3}, "must be in 1..2"),
        ("pathological", even_labels(2, 5), 6, {}, "label 0 has 5 rows for 6 clients"),
        ("dirichlet", None, 4, {}, "no labels; use iid, quantity or natural"),
        ("natural", even_labels(2, 5), 4, {}, "no client column; set data.columns.client"),
    ],
)
def test_refusals(kind: str, labels: np.ndarray | None, count: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        deal(kind, labels, count, **changes)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "label_sorted", "natural"])
def test_a_thousand_clients_take_under_a_second(kind: str) -> None:
    column = [str(i % 1000) for i in range(15000)]
    start = time.process_time()
    deal(kind, even_labels(150, 100), 1000, column=column, test_labels=even_labels(150, 30))
    assert time.process_time() - start < 1
