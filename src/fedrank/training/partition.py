"""Who holds which rows: the ways in which federated experiments deal a training set out to clients."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedrank.protocol import rng

Kind = Literal["iid", "dirichlet", "pathological", "label_sorted", "quantity", "natural"]

REDRAWS = 20
NOBODY = -1  # the owner of a row that no client gets
HELD_OUT = 5  # one in so many of a natural client's own rows becomes its personal test


class PartitionError(ValueError):
    """The rows cannot be dealt out as asked: what was asked, what was reached, what to change."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Row indices per client. ``test`` points into the split named by ``test_from``.

    names: client ids. origin: a natural client's value in the data, empty where clients are drawn.
    redraws: draws thrown away for a client below min_rows. dropped: natural clients below min_rows.
    labels: (rows,) of the train split, None where it has none.
    """

    names: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    test_from: Literal["test", "train"]
    labels: np.ndarray | None
    origin: tuple[str, ...] = ()
    redraws: int = 0
    dropped: int = 0

    def summary(self) -> dict[str, Any]:
        """JSON-able; a client's label counts name only the labels it holds."""
        clients = [
            {
                "client": name,
                "origin": self.origin[i] if self.origin else None,
                "train_rows": len(self.train[i]),
                "test_rows": len(self.test[i]),
                "label_counts": self._label_counts(self.train[i]),
            }
            for i, name in enumerate(self.names)
        ]
        return {
            "clients": clients,
            "test_from": self.test_from,
            "redraws": self.redraws,
            "dropped": self.dropped,
        }

    def _label_counts(self, rows: np.ndarray) -> dict[str, int]:
        if self.labels is None:
            return {}
        present, counts = np.unique(self.labels[rows], return_counts=True)
        return {str(label): int(n) for label, n in zip(present, counts, strict=True)}


def partition(
    kind: Kind,
    labels: np.ndarray | None,
    count: int,
    seed: int,
    *,
    alpha: float,
    classes_per_client: int,
    s: float,
    min_rows: int,
    column: list[str] | None,
    test_labels: np.ndarray | None,
    test_rows: int,
    train_rows: int | None = None,
) -> Partition:
    """Deal the train rows out to ``count`` clients, or to the values of ``column`` where kind is natural.

    labels and test_labels: (rows,) of the train and the test split, None for task generate;
    train_rows and test_rows count the rows where they are None. alpha: of dirichlet and quantity.
    classes_per_client: of pathological. s: the sorted share of label_sorted. min_rows: below it
    dirichlet and quantity draw again, and natural drops the client.
    """
    if kind == "natural":
        return by_column(column, labels, min_rows, seed)
    if labels is None and kind in ("dirichlet", "pathological", "label_sorted"):
        raise PartitionError(f"{kind}: the rows have no labels; use iid, quantity or natural")
    if count < 1:
        raise PartitionError(f"{kind}: {count} clients; there must be at least one")
    total = train_rows if labels is None else len(labels)
    if total is None:
        raise PartitionError(f"{kind}: without labels, train_rows must say how many rows there are")
    one_class = np.zeros(total, np.int64)
    known = one_class if labels is None else labels
    redraws = 0
    first = rng(seed, "partition", 0)
    if kind == "dirichlet":
        owner, redraws = redrawn(kind, known, count, alpha, min_rows, seed)
    elif kind == "quantity":  # label skew over one class only: the sizes are skewed, the labels are not
        owner, redraws = redrawn(kind, one_class, count, alpha, min_rows, seed)
    elif kind == "pathological":
        owner = pathological(known, count, classes_per_client, first)
    else:
        owner = label_sorted(known, count, s if kind == "label_sorted" else 0.0, first)
    names = client_names(count)
    train = grouped(owner, count)
    for name, rows in zip(names, train, strict=True):
        if not len(rows):
            raise PartitionError(f"{kind}: client {name} of {count} gets none of {len(owner)} rows; use fewer clients")
    if labels is None or test_labels is None:
        known, test_labels = (
            one_class,
            np.zeros(test_rows if test_labels is None else len(test_labels), np.int64),
        )
    shares = personal_shares(owner, known, count, test_labels, rng(seed, "partition", "test"))
    return Partition(names, train, grouped(shares, count), "test", labels, redraws=redraws)


def client_names(count: int) -> tuple[str, ...]:
    width = len(str(count - 1))
    return tuple(f"{i:0{width}}" for i in range(count))


def grouped(owner: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Each client's rows, ascending. owner: (rows,) -> per client (its rows,)."""
    owned = np.flatnonzero(owner != NOBODY)
    order = owned[np.argsort(owner[owned], kind="stable")]
    return tuple(np.split(order, np.cumsum(np.bincount(owner[owned], minlength=count))[:-1]))


# -- who owns which row: every function returns owner, (rows,) of client indices -------------------


def label_sorted(labels: np.ndarray, count: int, s: float, random: np.random.Generator) -> np.ndarray:
    """A share ``s`` of the rows in consecutive chunks by label, the rest iid, all clients of one size."""
    order = random.permutation(len(labels))
    chosen = order[: round(s * len(labels))]
    clients, chunks = np.arange(count), even(len(chosen), count)
    owner = np.empty(len(labels), np.int64)
    owner[chosen[np.argsort(labels[chosen], kind="stable")]] = np.repeat(clients, chunks)
    owner[order[len(chosen) :]] = np.repeat(clients, even(len(labels), count) - chunks)
    return owner


def even(rows: int, count: int) -> np.ndarray:
    """Sizes that differ by at most one, the larger first."""
    return rows // count + (np.arange(count) < rows % count)


def redrawn(
    kind: Kind, labels: np.ndarray, count: int, alpha: float, min_rows: int, seed: int
) -> tuple[np.ndarray, int]:
    """The first draw that gives every client ``min_rows``, and the number of draws thrown away."""
    reached = 0
    for redraws in range(REDRAWS + 1):
        owner = dirichlet(labels, count, alpha, rng(seed, "partition", redraws))
        smallest = int(np.bincount(owner, minlength=count).min())
        if smallest >= max(min_rows, 1):
            return owner, redraws
        reached = max(reached, smallest)
    raise PartitionError(
        f"{kind}: with alpha {alpha:g} and {count} clients over {len(labels)} rows the smallest client got "
        f"at most {reached} rows in {REDRAWS + 1} draws, and min_rows is {min_rows}; raise alpha or use fewer clients"
    )


def dirichlet(labels: np.ndarray, count: int, alpha: float, random: np.random.Generator) -> np.ndarray:
    """Each label's rows in shares ~ Dir(alpha) over the clients (Hsu et al., 2019; Li et al., 2022).

    Shares are rounded at their running sum, which with many clients starves those at its start:
    so each label has the clients in another order.
    """
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(random.dirichlet(np.full(count, alpha)))[:-1] * len(rows)
        share = np.searchsorted(ends.astype(np.int64), np.arange(len(rows)), side="right")
        owner[rows] = random.permutation(count)[share]
    return owner


def pathological(labels: np.ndarray, count: int, each: int, random: np.random.Generator) -> np.ndarray:
    """Exactly ``each`` classes per client (after McMahan et al., 2017), a class's rows even among its holders."""
    classes, rows_of = np.unique(labels, return_counts=True)
    if not 1 <= each <= len(classes) <= count * each:
        raise PartitionError(
            f"pathological: {count} clients with {each} of {len(classes)} classes each; classes_per_client must "
            f"be in 1..{len(classes)} and times the clients reach {len(classes)}, or some rows would have no client"
        )
    holders: list[list[int]] = [[] for _ in classes]
    for client in random.permutation(count):
        # The classes with the fewest holders so far: all get covered, and by equally many.
        fewest = np.lexsort((random.random(len(classes)), np.array([len(h) for h in holders])))[:each]
        for c in fewest:
            holders[c].append(int(client))
    owner = np.empty(len(labels), np.int64)
    for label, size, held_by in zip(classes, rows_of, holders, strict=True):
        if size < len(held_by):
            raise PartitionError(
                f"pathological: label {label} has {size} rows for {len(held_by)} clients; "
                "use fewer clients or fewer classes_per_client"
            )
        rows = random.permutation(np.flatnonzero(labels == label))
        owner[rows] = np.array(held_by)[np.arange(size) % len(held_by)]
    return owner


def by_column(column: list[str] | None, labels: np.ndarray | None, min_rows: int, seed: int) -> Partition:
    """The data's own clients. Their personal test is cut from their own rows, which nobody else can stand for."""
    if column is None:
        raise PartitionError("natural: the rows have no client column; set data.columns.client, or another kind")
    values, value = np.unique(column, return_inverse=True)
    sizes = np.bincount(value)
    kept = np.flatnonzero(sizes >= max(min_rows, 1))
    if not len(kept):
        raise PartitionError(
            f"natural: the largest of {len(values)} clients has {max(sizes, default=0)} rows, "
            f"under min_rows {min_rows}; lower it"
        )
    client_of = np.full(len(values), NOBODY)
    client_of[kept] = np.arange(len(kept))
    random = rng(seed, "partition", "test")
    train, test = [], []
    for rows in grouped(client_of[value], len(kept)):
        test_rows, train_rows = np.split(random.permutation(rows), [len(rows) // HELD_OUT])
        train.append(np.sort(train_rows))
        test.append(np.sort(test_rows))
    return Partition(
        names=client_names(len(kept)),
        train=tuple(train),
        test=tuple(test),
        test_from="train",
        labels=labels,
        origin=tuple(str(values[i]) for i in kept),
        dropped=len(values) - len(kept),
    )


# -- personal test shares --------------------------------------------------------------------------


def personal_shares(
    owner: np.ndarray, labels: np.ndarray, count: int, test_labels: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Who owns which test row: a label's test rows follow the clients' train rows of that label."""
    test_owner = np.full(len(test_labels), NOBODY)
    for label in np.unique(test_labels):
        held = np.bincount(owner[labels == label], minlength=count)
        if held.any():  # a label that nobody trains on is in nobody's test
            rows = random.permutation(np.flatnonzero(test_labels == label))
            test_owner[rows] = np.repeat(np.arange(count), largest_remainder(len(rows), held, random))
    return test_owner


def largest_remainder(rows: int, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Whole shares of ``rows`` in proportion to integer weights; equal remainders go by chance."""
    shares, remainders = np.divmod(rows * weights, weights.sum())
    left = rows - shares.sum()
    shares[np.lexsort((random.random(len(weights)), -remainders))[:left]] += 1
    return shares
