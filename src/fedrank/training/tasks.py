"""Tasks: rows become token ids once, batches are padded to their longest row, logits become loss and counts."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedrank.training.data import Rows
from fedrank.training.instructions import Turn
from fedrank.training.packing import layout
from fedrank.training.sources import DataError

IGNORED = -100  # a position that has no label
AT_ONCE = 1024  # rows that are tokenised
LABELS = "labels"  # of tokens
PAIRS = 2**23  # of tokens in a pass without gradients: attention's scores of one head take 32 MiB in float32


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised rows, one after the other. fields: name -> (tokens,) ids; starts: (rows + 1,), where each row's begin.

    labels: (rows,), a class each, or (tokens,), a completion's token as it is, IGNORED elsewhere. pad: name -> the id of
    padding. cut: of how many rows `max_length` took a part of the prompt, and of how many one of the completion.
    """

    fields: Mapping[str, np.ndarray]
    starts: np.ndarray
    labels: np.ndarray
    pad: Mapping[str, int]
    cut: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def generates(self) -> bool:
        return len(self.labels) != len(self)

    @cached_property
    def predictions(self) -> np.ndarray:
        """(rows,): how many tokens of each row are predicted."""
        known = self.labels != IGNORED
        known[self.starts[:-1]] = False  # nothing before them is of their row
        return np.diff(np.concatenate([[0], np.cumsum(known)])[self.starts])

    def batch(self, rows: np.ndarray, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """These rows padded on the right to the longest of them, and their labels.

        Where they generate, `at` says after which of all tokens a label is predicted, row by row.
        """
        lengths = self.lengths[rows, None]
        place = np.arange(int(lengths.max()))
        there, at = place < lengths, np.minimum(self.starts[rows, None] + place, self.starts[-1] - 1)

        def padded(tokens: np.ndarray, fill: int) -> Tensor:
            return torch.from_numpy(np.where(there, tokens[at], fill).astype(np.int64)).to(device)

        inputs = {name: padded(tokens, self.pad[name]) for name, tokens in self.fields.items()}
        inputs["attention_mask"] = torch.from_numpy(there.astype(np.int64)).to(device)
        if not self.generates:
            return inputs, torch.from_numpy(self.labels[rows]).to(device)
        return _predicting(inputs, np.where(there, self.labels[at], IGNORED), device)

    def packed(
        self, rows: np.ndarray, counts: Sequence[int], first: int, device: str
    ) -> tuple[dict[str, Tensor], Tensor]:
        """These rows one after the other as one of a batch, each client's filled up, and their labels.

        counts: how many of the rows are each client's. first: the position of a row's first token.
        """
        lengths = self.lengths[rows]
        at, sizes = layout(lengths, counts)
        begins = np.cumsum(lengths) - lengths
        places = np.arange(len(at)) - np.repeat(begins, lengths)
        token = np.repeat(self.starts[rows], lengths) + places

        def whole(tokens: np.ndarray, fill: int) -> Tensor:
            result = np.full(sum(sizes), fill, np.int64)
            result[at] = tokens
            return torch.from_numpy(result)[None].to(device)

        inputs = {name: whole(tokens[token], self.pad[name]) for name, tokens in self.fields.items()}
        inputs["position_ids"] = whole(places + first, first)
        if not self.generates:
            return inputs, torch.from_numpy(self.labels[rows]).to(device)
        labels = self.labels[token]
        labels[begins] = IGNORED  # nothing before them is of their row
        spread = np.full((1, sum(sizes)), IGNORED, np.int64)
        spread[0, at] = labels
        return _predicting(inputs, spread, device)


def _predicting(inputs: dict[str, Tensor], labels: np.ndarray, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs with the places whose logits are wanted, and the labels there. labels: (rows, tokens)."""
    known = labels[:, 1:] != IGNORED
    rows, places = np.nonzero(known)
    at = torch.from_numpy(rows * labels.shape[1] + places).to(device)
    return inputs | {"at": at}, torch.from_numpy(labels[:, 1:][known].astype(np.int64)).to(device)


def encode(rows: Rows, tokenizer: Any, task: str, max_length: int) -> Encoded:
    """Tokenise rows for a task; texts are cut to `max_length` tokens, of a prompt the start goes first."""
    parts = (rows.take(np.arange(at, min(at + AT_ONCE, len(rows)))) for at in range(0, len(rows), AT_ONCE))
    if task != "generate":
        return _encoded((_texts(part, tokenizer, max_length) for part in parts), tokenizer, rows.label)
    cut = Counter[str]()
    found = _encoded((_prompts(part, tokenizer, max_length, cut) for part in parts), tokenizer, None)
    return replace(found, cut=(cut["prompts"], cut["completions"]))


def _texts(rows: Rows, tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    kept = tokenizer(rows.text, rows.text_b, truncation=True, max_length=max_length)
    return {name: kept[name] for name in tokenizer.model_input_names if name in kept and name != "attention_mask"}


def _prompts(rows: Rows, tokenizer: Any, max_length: int, cut: Counter[str]) -> dict[str, list[list[int]]]:
    ids, labels = [], []
    for head, tail in zip(*_tokens(rows, tokenizer), strict=True):
        kept = tail[: max_length - 1]  # at least one token to predict it from
        before = head[-(max_length - len(kept)) :]
        cut.update(prompts=len(before) < len(head), completions=len(kept) < len(tail))
        ids.append(before + kept)
        labels.append([IGNORED] * len(before) + kept)
    return {"input_ids": ids, LABELS: labels}


def _tokens(rows: Rows, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Of each row, its prompt's tokens and its completion's with what ends it."""
    assert rows.completion is not None
    if rows.turns is not None:
        if tokenizer.chat_template is None:
            raise DataError(
                "the model's tokenizer has no chat template, and data.instructions.template asks for one (auto does so for "
                "messages): take a model that was made for chats, or rows of another shape as plain text"
            )
        pairs = [_chatted(*row, tokenizer) for row in zip(rows.turns, rows.completion, strict=True)]
        heads, tails = (
            tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*pairs, strict=True)
        )
        return heads, tails
    tails = tokenizer(rows.completion, add_special_tokens=False)["input_ids"]
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    behind = special[::-1].index(0)  # what the tokenizer ends a text with is not between a prompt and its completion
    heads = tokenizer(rows.text, add_special_tokens=True)["input_ids"]
    return [head[: len(head) - behind] for head in heads], [[*tail, tokenizer.eos_token_id] for tail in tails]


def _chatted(turns: Sequence[Turn], completion: str, tokenizer: Any) -> tuple[str, str]:
    """The prompt as the tokenizer's chat template writes it, and the completion with what ends the turn."""
    messages = [{"role": role, "content": text} for role, text in turns]
    # Where a template knows of thoughts (Qwen 3), the prompt ends after empty ones, which are not to be learnt.
    written = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
    try:
        before = written(messages, add_generation_prompt=True)
        whole = written([*messages, {"role": "assistant", "content": completion}])
    except Exception as error:  # a template is a program of somebody else's
        raise DataError(f"the tokenizer's chat template: {' '.join(str(error).split())[:300]}") from None
    if not whole.startswith(before):
        raise DataError(
            f"the tokenizer's chat template ends a prompt with {before[-60:]!r}, but does not begin the assistant's turn so; "
            "it cannot be trained on"
        )
    return before, whole[len(before) :]


def prompt_tokens(rows: Rows, tokenizer: Any) -> list[list[int]]:
    """Of each row, the prompt's tokens, whole."""
    return _tokens(rows, tokenizer)[0]


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends the assistant's turn."""
    tail = tokenizer(_chatted((("user", "a"),), "b", tokenizer)[1], add_special_tokens=False)["input_ids"]
    return next((token for token in reversed(tail) if token in tokenizer.all_special_ids), None)


def _encoded(parts: Iterable[dict[str, list[list[int]]]], tokenizer: Any, labels: np.ndarray | None) -> Encoded:
    """labels: of the rows; None where each token has its own."""
    lengths, ids = list[int](), defaultdict[str, list[np.ndarray]](list)
    for part in parts:
        lengths += map(len, part["input_ids"])
        for name, lists in part.items():
            ids[name].append(np.fromiter(chain.from_iterable(lists), np.int32))
    fields = {name: np.concatenate(pieces) for name, pieces in ids.items()}
    found = fields.pop(LABELS, np.empty(0, np.int32)) if labels is None else labels
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Encoded(fields, starts, found, {name: fill.get(name, 0) for name in fields})


def mapped(encoded: Encoded) -> Encoded:
    """The same, with its ids in memory-mapped files without names, which processes forked later share."""
    fields = {}
    for name, ids in encoded.fields.items():
        with tempfile.TemporaryFile() as file:
            file.write(ids.tobytes())
            file.flush()
            fields[name] = np.memmap(file, ids.dtype, "r")
    return replace(encoded, fields=fields)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The rows of all of these, one part's after the other's."""
    fields = {name: np.concatenate([part.fields[name] for part in parts]) for name in parts[0].fields}
    starts = np.append(0, np.cumsum(np.concatenate([part.lengths for part in parts])))
    prompts, completions = (sum(counts) for counts in zip(*(part.cut for part in parts), strict=True))
    labels = np.concatenate([part.labels for part in parts])
    return Encoded(fields, starts, labels, parts[0].pad, (prompts, completions))


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over rows, or over the tokens of the completions."""
    return functional.cross_entropy(logits.float(), labels)


def counts(logits: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """Summed loss, right predictions, and predictions: of rows, or of completion tokens."""
    total = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return float(total), int((logits.argmax(-1) == labels).sum()), len(labels)


def likelihoods(logits: Tensor, labels: Tensor) -> np.ndarray:
    """(predictions,): the logarithm of each label's likelihood."""
    found: np.ndarray = -functional.cross_entropy(logits.float(), labels, reduction="none").double().cpu().numpy()
    return found


def shuffled(rows: np.ndarray, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch of batches in a drawn order."""
    order = generator.permutation(rows)
    for at in range(0, len(order), size):
        yield order[at : at + size]


def by_length(
    encoded: Encoded, rows: np.ndarray, size: int, most: int | None = None, beside: int = 1
) -> Iterator[np.ndarray]:
    """Batches of rows of like length, for evaluation. beside: how many such batches make a pass.

    size: rows of a pass. most: its predicted tokens. Where a batch has several rows, `PAIRS` bounds the pass too.
    """
    size, most = max(1, size // beside), None if most is None else most // beside
    order = rows[np.argsort(encoded.lengths[rows], kind="stable")]
    if most is None or not encoded.generates:
        most, tokens = len(order), np.zeros(len(order), np.int64)
    else:
        tokens = np.cumsum(encoded.predictions[order])
    at = 0
    while at < len(order):
        before = tokens[at - 1] if at else 0
        end = min(at + size, int(np.searchsorted(tokens, before + most, "right")))
        longest = encoded.lengths[order[at:end]].astype(np.int64)
        end = at + int(np.searchsorted(np.arange(1, end - at + 1) * longest**2, PAIRS // beside, "right"))
        end = max(at + 1, end)
        yield order[at:end]
        at = end
