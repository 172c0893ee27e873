"""What each client holds: its share of one data set, or rows of its own that are read when it is drawn."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedrank.config import Config
from fedrank.protocol import rng
from fedrank.roster import Names
from fedrank.training import partition, tasks
from fedrank.training.choices import Choices, laid_out
from fedrank.training.data import ClientData, Dataset, Rows, collect, label_ids, limit
from fedrank.training.sources import DataError, numbered
from fedrank.training.tasks import Encoded

TYPICAL = 8  # clients that stand for all, where not all can be looked at

Encode = Callable[[Rows], Encoded]


@dataclass(frozen=True, eq=False)
class Held:
    """One client's rows: those of `encoded` that it trains on, and those of `tested` that it is scored on.

    rows: those of `tested` as scoring needs them. choices: of these, where they have any.
    """

    encoded: Encoded
    train: np.ndarray
    tested: Encoded
    test: np.ndarray
    rows: Rows
    choices: Choices | None = None


@dataclass(frozen=True, eq=False)
class Population:
    """All clients of a run, and the global test set.

    name: what the data is called. labels: the class names. held: of a client's place. typical: rows like theirs. tested, choices: of the rows of `test`. train_rows: of all clients, None
    where that is not known. digest: names the training rows. partition: who holds what, as far as known, JSON-able.
    """

    name: str
    labels: tuple[str, ...]
    names: Sequence[str]
    held: Callable[[int], Held]
    typical: Encoded
    test: Rows
    tested: Encoded
    choices: Choices | None
    train_rows: int | None
    digest: str
    partition: dict[str, Any]


def shared(dataset: Dataset, shares: partition.Partition, encode: Encode) -> Population:
    """Clients that share out one data set."""
    train, test = tasks.mapped(encode(dataset.train)), tasks.mapped(encode(dataset.test))
    choices = _choices(dataset.test, encode)
    tested, rows, chosen = test, _scored(dataset.test), choices
    if shares.test_from == "train":
        tested, rows, chosen = train, _scored(dataset.train), _choices(dataset.train, encode)

    def held(at: int) -> Held:
        return Held(train, shares.train[at], tested, shares.test[at], rows, chosen)

    return Population(
        dataset.name, dataset.labels, shares.names, held, train, dataset.test, test, choices, len(dataset.train), dataset.train.digest(), shares.summary()
    )  # fmt: skip


def _scored(rows: Rows) -> Rows:
    """What scoring needs of them: of rows to classify not the texts, which are let go once they are tokens."""
    return rows if rows.completion is not None else Rows([], label=rows.label)


def _choices(rows: Rows, encode: Encode) -> Choices | None:
    return None if rows.choices is None else laid_out(rows, encode)


def elsewhere(name: str, labels: tuple[str, ...], test: Rows | None, encode: Encode) -> Population:
    """No client: their rows are elsewhere, and at most the global test set is here."""
    rows = Rows([], label=np.empty(0, np.int64)) if test is None else test
    tested = encode(rows)

    def held(at: int) -> Held:
        raise IndexError(f"client {at} is elsewhere")

    choices = _choices(rows, encode)
    summary = {"clients": [], "test_from": "train", "redraws": 0, "dropped": 0}
    return Population(name, labels, (), held, tested, rows, tested, choices, None, "", summary)


def own(config: Config, data: ClientData, encode: Encode) -> Population:
    """Clients that bring their own rows; those of the last cohorts are kept."""
    columns = config.data.columns.model_dump()
    called: Sequence[str] | range = data.names or range(data.clients)

    def read(place: str, records: Iterable[Mapping[str, Any]]) -> Rows:
        rows, written = collect(place, numbered(place, records), config.task, columns, config.data.instructions)
        label = None if config.task == "generate" else label_ids(written, data.labels)
        return replace(rows, label=label, client=None)

    def mine(at: int) -> Rows:
        return read(f"{data.name}, client {called[at]}", data.rows(at))

    test = read(f"{data.name}, test", data.test) if data.test else mine(0).take(np.empty(0, int))
    test = limit(test, config.data.test_limit, config.seed, "test")

    def rows(at: int) -> Rows:
        found = mine(at)
        if (found.text_b is None) != (test.text_b is None):
            what = "the test" if data.test else f"client {called[0]}"
            raise DataError(f"{data.name}: client {called[at]} and {what} must both have the column text_b, or neither")
        return found

    @lru_cache(2 * config.rounds.cohort)
    def held(at: int) -> Held:
        its = rows(at)
        encoded, draw = encode(its), rng(0, "partition", "test", called[at])
        if its.completion is None:
            tested, trained = np.split(draw.permutation(len(its)), [len(its) // partition.HELD_OUT])
        else:  # whole prompts
            tests = partition.fifths(its.group, draw) == 0
            tested, trained = np.flatnonzero(tests), np.flatnonzero(~tests)
        return Held(encoded, np.sort(trained), encoded, np.sort(tested), _scored(its), _choices(its, encode))

    places = np.unique(np.linspace(0, data.clients - 1, TYPICAL, dtype=int)).tolist()
    some = [rows(at) for at in places]
    digest = hashlib.sha256("".join(one.digest() for one in some).encode()).hexdigest()
    summary = {"clients": {"count": data.clients}, "test_from": "train", "redraws": 0, "dropped": 0}
    typical = tasks.joined([encode(one) for one in some])
    choices = _choices(test, encode)
    return Population(
        data.name,
        tuple(data.labels),
        data.names or Names(data.clients),
        held,
        typical,
        test,
        encode(test),
        choices,
        None,
        digest,
        summary,
    )
