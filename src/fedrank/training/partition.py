"""Who holds which rows: the ways in which federated experiments deal a training set out to clients."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, overload

import numpy as np

from fedrank.protocol import rng
from fedrank.roster import Names

Kind = Literal["iid", "dirichlet", "pathological", "label_sorted", "quantity", "natural"]

REDRAWS = 20
NOBODY = -1  # the owner of a row that no client gets
HELD_OUT = 5  # one in so many of a natural client's own rows becomes its personal test
LISTED = 10_000  # of more clients a summary says how many they are and names what they hold by a hash


class PartitionError(ValueError):
    """The rows cannot be dealt out as asked: what was asked, what was reached, what to change."""


@dataclass(frozen=True, eq=False)
class Shares(Sequence[np.ndarray]):
    """Row indices per client, one client's after the other's. rows: (rows,); starts: (clients + 1,), where each begins."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> list[np.ndarray]: ...
    def __getitem__(self, at: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(at, slice):
            return [self[place] for place in range(len(self))[at]]
        place = range(len(self))[at]
        return self.rows[self.starts[place] : self.starts[place + 1]]

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)


@dataclass(frozen=True, eq=False)
class Partition:
    """Row indices per client. ``test`` points into the split named by ``test_from``.

    names: client ids. origin: (clients,), a natural client's value in the data.
    redraws: draws thrown away for a client below min_rows. dropped: natural clients below min_rows.
    labels: (rows,) of the train split, None where it has none.
    """

    names: Names
    train: Shares
    test: Shares
    test_from: Literal["test", "train"]
    labels: np.ndarray | None
    origin: np.ndarray | None = None
    redraws: int = 0
    dropped: int = 0

    def summary(self) -> dict[str, Any]:
        """JSON-able; a client's label counts name only the labels it holds."""
        return {
            "clients": self._listed() if len(self.names) <= LISTED else self._counted(),
            "test_from": self.test_from,
            "redraws": self.redraws,
            "dropped": self.dropped,
        }

    def _listed(self) -> list[dict[str, Any]]:
        return [
            {
                "client": name,
                "origin": None if self.origin is None else str(self.origin[i]),
                "train_rows": len(self.train[i]),
                "test_rows": len(self.test[i]),
                "label_counts": self._label_counts(self.train[i]),
            }
            for i, name in enumerate(self.names)
        ]

    def _counted(self) -> dict[str, Any]:
        found: dict[str, Any] = {"count": len(self.names)}
        digest = hashlib.sha256()
        for name, shares in (("train", self.train), ("test", self.test)):
            found[f"{name}_rows"] = {"least": int(shares.sizes.min()), "most": int(shares.sizes.max())}
            for part in (shares.starts, shares.rows):
                digest.update(part.astype("<i8").tobytes())
        return found | {"hash": digest.hexdigest()}

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
    groups: np.ndarray | None = None,
    validation: bool = False,
) -> Partition:
    """Deal the train rows out to ``count`` clients, or to the values of ``column`` where kind is natural.

    labels and test_labels: (rows,) of the train and the test split, None for task generate;
    train_rows and test_rows count the rows where they are None. alpha: of dirichlet and quantity.
    classes_per_client: of pathological. s: the sorted share of label_sorted. min_rows: below it
    dirichlet and quantity draw again, and natural drops the client. groups: (rows,) of the train split; natural
    clients train on or are tested on the whole of one, whose rows are next to the same. validation: natural clients leave
    their tests alone, and hold out as much again.
    """
    if kind == "natural":
        return by_column(column, labels, min_rows, groups, validation)
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
    names, train = Names(count), grouped(owner, count)
    if not train.sizes.all():
        name = names[int(train.sizes.argmin())]
        raise PartitionError(f"{kind}: client {name} of {count} gets none of {len(owner)} rows; use fewer clients")
    if labels is None or test_labels is None:
        known, test_labels = (
            one_class,
            np.zeros(test_rows if test_labels is None else len(test_labels), np.int64),
        )
    shares = personal_shares(owner, known, count, test_labels, rng(seed, "partition", "test"))
    return Partition(names, train, grouped(shares, count), "test", labels, redraws=redraws)


def grouped(owner: np.ndarray, count: int) -> Shares:
    """Each client's rows, ascending. owner: (rows,), the client of each row or NOBODY."""
    owned = np.flatnonzero(owner != NOBODY)
    order = owned[np.argsort(owner[owned], kind="stable")]
    return Shares(order, np.append(0, np.cumsum(np.bincount(owner[owned], minlength=count))))


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


def by_column(
    column: list[str] | None,
    labels: np.ndarray | None,
    min_rows: int,
    groups: np.ndarray | None = None,
    validation: bool = False,
) -> Partition:
    """The data's own clients. Their personal test is cut from their own rows, which nobody else can stand for.

    It is the same whatever the seed: what is tuned with one must not be tested on what another trained on.
    """
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
    owner, random = client_of[value], rng(0, "partition", "test")
    own, held_out = grouped(owner, len(kept)), np.full(len(owner), NOBODY)
    for start, end in pairwise(own.starts.tolist()):
        rows = own.rows[start:end]
        part = fifths(np.arange(len(rows)) if groups is None else groups[rows], random)
        if validation:
            owner[rows[part == 0]] = NOBODY
        tested = rows[part == validation]
        held_out[tested] = owner[tested]
    return Partition(
        names=Names(len(kept)),
        train=grouped(np.where(held_out == NOBODY, owner, NOBODY), len(kept)),
        test=grouped(held_out, len(kept)),
        test_from="train",
        labels=labels,
        origin=values[kept],
        dropped=len(values) - len(kept),
    )


def fifths(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(rows,): 0 for the fifth of a client's rows that it is tested on, 1 for its validation, more for the rest.

    Groups stay whole, so that a fifth may be less: it takes the first ones drawn that fit into it.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order, part = random.permutation(len(sizes)), np.full(len(sizes), 2)
    done = 0
    for fifth in (0, 1):
        ends = np.cumsum(sizes[order[done:]])
        taken = int(np.searchsorted(ends, len(groups) // HELD_OUT, "right"))
        part[order[done : done + taken]] = fifth
        done += taken
    return part[group]


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
