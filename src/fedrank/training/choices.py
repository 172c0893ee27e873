"""Multiple choice: each choice after its prompt, and which of them the model finds the likeliest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedrank.training.data import Rows
from fedrank.training.tasks import Encoded


@dataclass(frozen=True, eq=False)
class Choices:
    """encoded: every choice of every row as a row of its own. starts: (rows + 1,), where each row's begin.

    answer: (rows,), the place of the right one. sizes: (choices,), bytes of each.
    """

    encoded: Encoded
    starts: np.ndarray
    answer: np.ndarray
    sizes: np.ndarray

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The choices of these rows, one row's after the other's."""
        return np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])

    def right(self, rows: np.ndarray, likelihood: np.ndarray) -> dict[str, float]:
        """The shares of these rows whose right choice is the likeliest, as it is, and by the byte.

        likelihood: of each choice that `of` gives, the logarithm.
        """
        counts = self.starts[rows + 1] - self.starts[rows]
        parts = np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1])
        even = likelihood / self.sizes[self.of(rows)]
        found = {"choice_accuracy": likelihood, "choice_accuracy_per_byte": even}
        return {
            name: float(np.mean([values[part].argmax() == right for part, right in zip(parts, self.answer[rows], strict=True)]))
            for name, values in found.items()
        }  # fmt: skip


def laid_out(rows: Rows, encode: Callable[[Rows], Encoded]) -> Choices:
    """Of rows that have choices."""
    assert rows.choices is not None
    assert rows.answer is not None
    counts = [len(own) for own in rows.choices]
    each = rows.take(np.repeat(np.arange(len(rows)), counts))
    texts = [choice for own in rows.choices for choice in own]
    encoded = encode(Rows(each.text, completion=texts, turns=each.turns))
    sizes = np.array([len(text.encode()) for text in texts])
    return Choices(encoded, np.concatenate([[0], np.cumsum(counts)]), rows.answer, sizes)
