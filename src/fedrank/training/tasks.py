"""Tasks: rows become token ids once, batches are padded to their longest row, logits become loss and counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedrank.training.data import Rows

IGNORED = -100  # a position that has no label


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised rows. fields: name -> one list of ids per row. labels: a class per row, or one id per token."""

    fields: dict[str, list[list[int]]]
    labels: list[Any]
    pad: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.fields["input_ids"]], int)

    def batch(self, rows: np.ndarray, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """These rows padded on the right to the longest of them, and their labels."""
        longest = max(len(self.fields["input_ids"][i]) for i in rows)
        inputs = {
            name: _padded([column[i] for i in rows], self.pad[name], longest, device)
            for name, column in self.fields.items()
        }
        if isinstance(self.labels[0], list):
            return inputs, _padded([self.labels[i] for i in rows], IGNORED, longest, device)
        return inputs, torch.tensor([self.labels[i] for i in rows], device=device)


def _padded(rows: list[list[int]], fill: int, length: int, device: str) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], device=device)


def encode(rows: Rows, tokenizer: Any, task: str, max_length: int) -> Encoded:
    """Tokenise rows for a task; texts are cut to `max_length` tokens, of a prompt the start goes first."""
    if task == "generate":
        return _prompts(rows, tokenizer, max_length)
    assert rows.label is not None
    kept = tokenizer(rows.text, rows.text_b, truncation=True, max_length=max_length)
    fields = {name: kept[name] for name in tokenizer.model_input_names if name in kept}
    return Encoded(fields, rows.label.tolist(), _pads(tokenizer, fields))


def _prompts(rows: Rows, tokenizer: Any, max_length: int) -> Encoded:
    assert rows.completion is not None
    ids, labels = [], []
    heads = tokenizer(rows.text, add_special_tokens=True)["input_ids"]
    tails = tokenizer(rows.completion, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for head, tail in zip(heads, tails, strict=True):
        tail = (tail + end)[: max_length - 1]  # at least one token to predict it from
        head = head[-(max_length - len(tail)) :]
        ids.append(head + tail)
        labels.append([IGNORED] * len(head) + tail)
    fields = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return Encoded(fields, labels, _pads(tokenizer, fields))


def _pads(tokenizer: Any, fields: dict[str, Any]) -> dict[str, int]:
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    return {name: fill.get(name, 0) for name in fields}


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over rows, or over the tokens of the completions."""
    if labels.ndim == 2:
        logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


def counts(logits: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """Summed loss, right predictions, and predictions: of rows, or of completion tokens."""
    if labels.ndim == 2:
        logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    total = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    known = labels != IGNORED
    right = (logits.argmax(-1) == labels) & known
    return float(total), int(right.sum()), int(known.sum())


def shuffled(rows: np.ndarray, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch of batches in a drawn order."""
    order = generator.permutation(rows)
    for at in range(0, len(order), size):
        yield order[at : at + size]


def by_length(encoded: Encoded, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of rows of like length, for evaluation."""
    order = rows[np.argsort(encoded.lengths[rows], kind="stable")]
    for at in range(0, len(order), size):
        yield order[at : at + size]
