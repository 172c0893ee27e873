"""What each client holds: its share of one data set, or rows of its own that are read when it is drawn."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedrank import together
from fedrank.config import Config
from fedrank.protocol import Job, Lower, Observe, Update, rng
from fedrank.roster import Names
from fedrank.training import partition
from fedrank.training.course import Ask, TrainingError
from fedrank.training.data import ClientData, Dataset, Rows, collect, label_id, limit
from fedrank.training.local import Trainer
from fedrank.training.sources import DataError, numbered
from fedrank.training.tasks import Encoded

TYPICAL = 8  # clients that stand for all, where not all can be looked at

Encode = Callable[[Rows], Encoded]


@dataclass(frozen=True, eq=False)
class Held:
    """One client's rows: those of `encoded` that it trains on, and those of `tested` that it is scored on.

    label: (rows of tested,), None for task generate.
    """

    encoded: Encoded
    train: np.ndarray
    tested: Encoded
    test: np.ndarray
    label: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Population:
    """All clients of a run, and the global test set.

    held: of a client's place. typical: rows like theirs. tested: the rows of `test`. train_rows: of all clients, None
    where that is not known. digest: names the training rows. partition: who holds what, as far as known, JSON-able.
    """

    names: Names
    held: Callable[[int], Held]
    typical: Encoded
    test: Rows
    tested: Encoded
    train_rows: int | None
    digest: str
    partition: dict[str, Any]


def shared(dataset: Dataset, shares: partition.Partition, encode: Encode) -> Population:
    """Clients that share out one data set."""
    train, test = encode(dataset.train), encode(dataset.test)
    label, tested = (dataset.test.label, test) if shares.test_from == "test" else (dataset.train.label, train)

    def held(at: int) -> Held:
        return Held(train, shares.train[at], tested, shares.test[at], label)

    return Population(
        shares.names, held, train, dataset.test, test, len(dataset.train), dataset.train.digest(), shares.summary()
    )


def own(config: Config, data: ClientData, encode: Encode) -> Population:
    """Clients that bring their own rows; those of the last cohorts are kept."""
    columns, ids = config.data.columns.model_dump(), {label: at for at, label in enumerate(data.labels)}

    def read(place: str, records: Iterable[Mapping[str, Any]]) -> Rows:
        rows, written = collect(place, numbered(place, records), config.task, columns)
        label = None if config.task == "generate" else np.array([label_id(one, ids) for one in written], np.int64)
        return replace(rows, label=label, client=None)

    test = limit(read(f"{data.name}, test", data.test), config.data.test_limit, config.seed, "test")

    def rows(at: int) -> Rows:
        found = read(f"{data.name}, client {at}", data.rows(at))
        if (found.text_b is None) != (test.text_b is None):
            raise DataError(f"{data.name}: client {at} and the test must both have the column text_b, or neither")
        return found

    @lru_cache(2 * config.rounds.cohort)
    def held(at: int) -> Held:
        mine = rows(at)
        encoded, order = encode(mine), rng(config.seed, "partition", "test", at).permutation(len(mine))
        tested, trained = np.split(order, [len(mine) // partition.HELD_OUT])
        return Held(encoded, np.sort(trained), encoded, np.sort(tested), mine.label)

    places = np.unique(np.linspace(0, data.clients - 1, TYPICAL, dtype=int)).tolist()
    some = [rows(at) for at in places]
    digest = hashlib.sha256("".join(one.digest() for one in some).encode()).hexdigest()
    summary = {"clients": {"count": data.clients}, "test_from": "train", "redraws": 0, "dropped": 0}
    typical = joined([encode(one) for one in some])
    return Population(Names(data.clients), held, typical, test, encode(test), None, digest, summary)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The rows of all of these, one part's after the other's."""
    if len(parts) == 1:
        return parts[0]
    fields = {name: np.concatenate([part.fields[name] for part in parts]) for name in parts[0].fields}
    starts = np.append(0, np.cumsum(np.concatenate([part.lengths for part in parts])))
    return Encoded(fields, starts, np.concatenate([part.labels for part in parts]), parts[0].pad)


@dataclass(frozen=True, eq=False)
class Apart:
    """Local training of clients that each have rows of their own: those of clients that meet are put together."""

    trainer: Trainer

    def fit(self, job: Job, held: Held, observe: Observe | None = None, lower: Lower | None = None) -> Update:
        update: Update = together.ask(self.fit_all, (held.encoded, Ask(job, held.train, observe, lower)))
        return update

    def fit_all(self, asked: list[tuple[Encoded, Ask]]) -> list[Update | TrainingError]:
        parts = [encoded for encoded, _ in asked]
        first = np.cumsum([0, *map(len, parts)])
        trainer = copy(self.trainer)  # the same frozen model, which is not loaded again, on these rows
        object.__setattr__(trainer, "train", joined(parts))
        return trainer.fit_all(
            [replace(ask, rows=ask.rows + at) for (_, ask), at in zip(asked, first[:-1], strict=True)]
        )
