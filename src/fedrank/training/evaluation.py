"""Evaluation: all that is measured of an adapter, on the global test set or on a client's own rows."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedrank.adapter import Adapter
from fedrank.training import scoring, texts
from fedrank.training.clients import Held, Population
from fedrank.training.decoding import Asked, Decoder, Prompts
from fedrank.training.scoring import Scorer

Base = tuple[Adapter, ...]
Part = tuple[str, Adapter, Base, Any]  # what to do, with which adapter on which base, and on what
LARGEST = 65.0  # of a loss whose perplexity is told from others: numbers in a frame are finite


@dataclass(frozen=True, eq=False)
class Evaluation:
    """scorer, decoder: of this process. population: whose global test set.

    workers: how many processes share the work on that, through share. Whoever does which part of it, the numbers are put
    together in one order.
    """

    scorer: Scorer
    decoder: Decoder
    population: Population
    workers: int
    share: Callable[[Callable[[Part], Any]], Callable[[Iterable[Part]], Iterator[Any]]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_shared", self.share(self._part))  # before there are workers

    def everywhere(self, adapter: Adapter, base: Base, last: bool) -> dict[str, Any]:
        """The global model on all test rows. last: the run ends here. texts: what it wrote, if anything."""
        rows, whole = self.population.test, self.population.choices
        batches = self.scorer.test_batches
        found: dict[str, Any] = scoring.scores(self._dealt("counts", adapter, base, batches), len(rows))
        if rows.completion is not None:
            found["perplexity"] = perplexity(found["loss"])
        if whole is not None:
            batches, likelihood = self.scorer.batches(whole.encoded), np.empty(len(whole.encoded))
            for batch, part in zip(batches, self._dealt("likelihoods", adapter, base, batches), strict=True):
                likelihood[batch] = part
            found |= whole.right(np.arange(len(rows)), likelihood)
        if self._writes(last):
            asked, size = self.prompts, self.decoder.settings.batch_size
            batches = np.array_split(np.arange(len(asked)), -(-len(asked) // size))
            written = [text for part in self._dealt("texts", adapter, base, batches) for text in part]
            found |= texts.scores(written, asked.references)
            lines = zip(asked.text, written, asked.references, strict=True)
            found["texts"] = [{"prompt": p, "written": text, "references": own} for p, text, own in lines]
        return found

    def own(self, mine: Held, adapter: Adapter, base: Base, last: bool) -> dict[str, float]:
        """What a client predicts with, on its own test rows."""
        found = self.scorer.evaluate(adapter, mine.tested, mine.test, base)
        if mine.rows.label is not None:
            found["majority"] = scoring.majority(mine.rows.label[mine.test])
        if mine.rows.completion is not None:
            found["perplexity"] = perplexity(found["loss"])
        if mine.choices is not None:
            weights = self.scorer.likelihoods(adapter, mine.choices.encoded, mine.choices.of(mine.test), base)
            found |= mine.choices.right(mine.test, weights)
        if self._writes(last):
            asked = self.decoder.prompts(mine.rows.take(mine.test))
            found |= texts.scores(self.decoder.write(Asked(adapter, asked.ids, base)), asked.references)
        return found

    @cached_property
    def prompts(self) -> Prompts:
        """Of the global test set, those after which texts are written."""
        return self.decoder.prompts(self.population.test)

    def _writes(self, last: bool) -> bool:
        when = self.decoder.settings.when
        return when == "always" or (when == "end" and last)

    def _dealt(self, what: str, adapter: Adapter, base: Base, pieces: list[Any]) -> list[Any]:
        """What comes of each piece of the work, in their order; the workers get parts that take about equally long."""
        shares = 4 * self.workers
        found: list[Any] = [None] * len(pieces)
        for at, part in enumerate(self._shared((what, adapter, base, pieces[at::shares]) for at in range(shares))):  # type: ignore[attr-defined]
            found[at::shares] = part
        return found

    def _part(self, asked: Part) -> list[Any]:
        what, adapter, base, pieces = asked
        scorer = self.scorer
        with scorer.trainer.session():
            if what == "counts":
                return list(scorer.counts(adapter, scorer.trainer.test, pieces, base))
            if what == "likelihoods":
                assert self.population.choices is not None
                return [scorer.likelihoods(adapter, self.population.choices.encoded, rows, base) for rows in pieces]
            return [
                self.decoder.write(Asked(adapter, [self.prompts.ids[at] for at in batch], base, int(batch[0])))
                for batch in pieces
            ]


def perplexity(loss: float) -> float:
    """Of a mean loss per token, in nats."""
    return math.exp(min(loss, LARGEST))
