"""Scoring: what an adapter predicts right on given rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrank import together
from fedrank.adapter import Adapter
from fedrank.increments import digest
from fedrank.training import fused, tasks
from fedrank.training.course import TrainingError
from fedrank.training.hooks import Live, live
from fedrank.training.local import Trainer
from fedrank.training.prefix import Prefix
from fedrank.training.tasks import Encoded

EVALUATION_BATCH = 64
LOGITS = 2**27  # numbers of a batch's logits: half a gigabyte in float32


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores adapters on a trainer's frozen model, with what the trainer keeps of its test rows."""

    trainer: Trainer

    def evaluate(
        self, adapter: Adapter, encoded: Encoded, rows: np.ndarray, base_updates: tuple[Adapter, ...] = ()
    ) -> dict[str, float]:
        """Loss and accuracy of the adapter on these rows (of completion tokens where the task generates)."""
        found: dict[str, float] = together.ask(self.evaluate_all, (adapter, encoded, rows, base_updates))
        return found

    def evaluate_all(
        self, asked: list[tuple[Adapter, Encoded, np.ndarray, tuple[Adapter, ...]]]
    ) -> list[dict[str, float] | Exception]:
        """Of several adapters, each on its rows, in one pass over the frozen base where all rows are of one set."""
        (_, encoded, _, updates), *rest = asked
        if any(other[1] is not encoded or digest(other[3]) != digest(updates) for other in rest):
            return [together.outcome(partial(self.evaluate, *one)) for one in asked]
        found: list[Any] = [together.outcome(partial(self._live, one[0])) for one in asked]
        there = [at for at, on in enumerate(found) if isinstance(on, Live)]
        batches = [
            list(tasks.by_length(encoded, asked[at][2], EVALUATION_BATCH, self.most, len(asked))) for at in there
        ]
        counts = self._counts([found[at] for at in there], encoded, batches, updates)
        for at, own in zip(there, counts, strict=True):
            found[at] = together.outcome(partial(scores, own, len(asked[at][2])))
        return found

    def counts(
        self, adapter: Adapter, encoded: Encoded, batches: list[np.ndarray], base_updates: tuple[Adapter, ...] = ()
    ) -> list[tuple[float, int, int]]:
        """Summed loss, right predictions, and predictions of each batch."""
        return self._counts([self._live(adapter)], encoded, [batches], base_updates)[0]

    def likelihoods(
        self, adapter: Adapter, encoded: Encoded, rows: np.ndarray, base_updates: tuple[Adapter, ...] = ()
    ) -> np.ndarray:
        """(rows,): the logarithm of each completion's likelihood, what ends it included."""
        found: np.ndarray = together.ask(self.likelihoods_all, (adapter, encoded, rows, base_updates))
        return found

    def likelihoods_all(
        self, asked: list[tuple[Adapter, Encoded, np.ndarray, tuple[Adapter, ...]]]
    ) -> list[np.ndarray | Exception]:
        """Of several adapters, one after the other."""
        return [together.outcome(partial(self._likelihoods, *one)) for one in asked]

    def _likelihoods(
        self, adapter: Adapter, encoded: Encoded, rows: np.ndarray, updates: tuple[Adapter, ...]
    ) -> np.ndarray:
        batches, found = self.batches(encoded, rows), np.empty(len(encoded))
        parts = self._counts([self._live(adapter)], encoded, [batches], updates, tasks.likelihoods)[0]
        for batch, tokens in zip(batches, parts, strict=True):
            found[batch] = [part.sum() for part in np.split(tokens, np.cumsum(encoded.predictions[batch])[:-1])]
        own: np.ndarray = found[rows]
        return own

    def _live(self, adapter: Adapter) -> Live:
        return live(adapter, Adapter({}, adapter.scale, {}), "", self.trainer.device)

    def _counts(
        self, lives: list[Live], encoded: Encoded, batches: list[list[np.ndarray]], updates: tuple[Adapter, ...],
        read: Callable[[Tensor, Tensor], Any] = tasks.counts,
    ) -> list[list[Any]]:  # fmt: skip
        """Of each adapter on its batches; the k-th of all that have so many are one pass. read: what of logits and labels.

        What is kept of the test rows is kept in groups of its own, the same for whoever scores which of them; what is
        kept of others is for training.
        """
        counts: list[list[Any]] = [[] for _ in lives]
        if not lives:
            return counts
        trainer = self.trainer
        with torch.inference_mode(), fused.mounted(trainer.frozen, lives, *trainer.updated(updates)) as mounts:
            prefixes: list[Prefix] = []
            if encoded is trainer.test and (kept := trainer.kept.get(encoded)) is not None:
                groups = [self._groups_of(own) for own in batches]
                prefixes = fused.prefixes(trainer.frozen, kept, mounts, groups, updates, trainer.device)
            for at in range(max(map(len, batches))):
                here = [n for n, own in enumerate(batches) if at < len(own)]
                passed = [(mounts[n], batches[n][at]) for n in here]
                begun = [prefixes[n] for n in here] if prefixes else []
                outputs = fused.outputs(trainer.frozen, encoded, passed, mounts, trainer.device, begun)
                for n, (logits, labels) in zip(here, outputs, strict=True):
                    counts[n].append(read(logits, labels))
        return counts

    @cached_property
    def test_batches(self) -> list[np.ndarray]:
        """All test rows, in groups of like length."""
        return self.batches(self.trainer.test)

    def batches(self, encoded: Encoded, rows: np.ndarray | None = None) -> list[np.ndarray]:
        """These rows, or all, in groups of like length."""
        rows = np.arange(len(encoded)) if rows is None else rows
        return list(tasks.by_length(encoded, rows, EVALUATION_BATCH, self.most))

    @cached_property
    def most(self) -> int:
        """The predicted tokens of a pass, so that its logits over the vocabulary are not too many."""
        head = self.trainer.model.base.get_output_embeddings() if self.trainer.model.task == "generate" else None
        return LOGITS // (1 if head is None else head.out_features)

    @cached_property
    def _owner(self) -> np.ndarray:
        """(rows,): the group of each test row."""
        owner = np.empty(len(self.trainer.test), np.int64)
        for at, rows in enumerate(self.test_batches):
            owner[rows] = at
        return owner

    def _groups_of(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """The groups of test rows in which these are."""
        return [self.test_batches[at] for at in np.unique(self._owner[np.concatenate(batches)])] if batches else []


def scores(counts: Iterable[tuple[float, int, int]], rows: int) -> dict[str, float]:
    """Loss and accuracy from the counts of all batches, in their order."""
    losses, rights, knowns = zip((0.0, 0, 0), *counts, strict=True)
    if not sum(knowns):
        raise TrainingError("no rows to evaluate on")
    return {"loss": sum(losses) / sum(knowns), "accuracy": sum(rights) / sum(knowns), "rows": float(rows)}


def majority(labels: np.ndarray) -> float:
    """The share of the most frequent class."""
    return float(np.bincount(labels).max() / len(labels))
