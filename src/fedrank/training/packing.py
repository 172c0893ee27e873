"""Rows of different lengths one after the other, without padding: their places, their attention, their mean."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

NAME = "fedrank"  # of this attention among those of transformers
# What some models' attention has beside softmax over the row: it would not show in a trial with short rows.
UNLIKE = {"attention_mask", "sliding_window", "softcap", "s_aux", "position_bias"}
STEP = 32  # tokens are filled up to a multiple of this

_packed: ContextVar["Packed"] = ContextVar("packed")


@dataclass(frozen=True, eq=False)
class Packed:
    """Where packed rows are, shared by all layers of a pass.

    lengths: (rows,), tokens of each row. filled: all tokens, with those that only fill up, after each client's.
    padded: (rows * longest,), the token at each place of the padded layout, any where there is none.
    at: (tokens of the rows,), where each is. real: (tokens of the rows,), each token's place in the padded layout; None
    where both layouts are the same.
    """

    lengths: Tensor
    filled: int
    padded: Tensor
    at: Tensor
    real: Tensor | None
    biases: dict[tuple[bool, torch.dtype], Tensor | None] = field(default_factory=dict)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(rows, longest)"""
        return len(self.lengths), len(self.padded) // len(self.lengths)

    def mean(self, hidden: Tensor) -> Tensor:
        """(filled, width) -> (rows, width), the mean over each row's tokens."""
        owner = torch.repeat_interleave(self.lengths)
        sums = hidden.new_zeros(len(self.lengths), hidden.shape[-1]).index_add(0, owner, hidden[self.at])
        return sums / self.lengths[:, None]

    def bias(self, causal: bool, dtype: torch.dtype) -> Tensor | None:
        """(rows or 1, 1 or longest, longest): what is added to the scores so that no token sees what it must not."""
        if (causal, dtype) not in self.biases:  # one for all layers
            longest, found = self.shape[1], None
            at = torch.arange(longest, device=self.lengths.device)
            if self.real is not None:
                found = (at >= self.lengths[:, None])[:, None, :]
            if causal:
                later = (at > at[:, None])[None]
                found = later if found is None else found | later
            made = None if found is None else found.new_zeros((), dtype=dtype).masked_fill(found, -torch.inf)
            self.biases[causal, dtype] = made
        return self.biases[causal, dtype]

    def spread(self, part: Tensor) -> Tensor:
        """(heads, filled, width) -> (heads * rows, longest, width), anything at places without a token."""
        if self.real is None:
            return part.clone(memory_format=torch.contiguous_format).view(-1, self.shape[1], part.shape[2])
        return part.index_select(1, self.padded).view(-1, self.shape[1], part.shape[2])

    def spread_zeros(self, part: Tensor) -> Tensor:
        """The same, with zeros at places without a token."""
        if self.real is None:
            return self.spread(part)
        found = part.new_zeros(len(part), len(self.padded), part.shape[2])
        found.index_copy_(1, self.real, part.index_select(1, self.at))
        return found.view(-1, self.shape[1], part.shape[2])

    def gather(self, part: Tensor, heads: int) -> Tensor:
        """(heads * rows, longest, width) -> (filled, heads, width), zeros for what only fills up."""
        flat = part.view(heads, -1, part.shape[2]).transpose(0, 1)
        if self.real is None:
            return flat.contiguous()
        found = part.new_zeros(self.filled, heads, part.shape[2])
        return found.index_copy_(0, self.at, flat.index_select(0, self.real))


def filled(tokens: int) -> int:
    """The tokens with those that fill up: a kernel is made for every number of tokens, which costs more than these."""
    return -(-tokens // STEP) * STEP


def layout(lengths: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """(tokens,): the place of each token, and (clients,): the tokens of each client, filled up.

    counts: how many of the rows are each client's, whose tokens lie together.
    """
    own = [int(part.sum()) for part in np.split(lengths, np.cumsum(counts)[:-1])]
    sizes = [filled(tokens) for tokens in own]
    begins = np.cumsum(sizes) - sizes
    return np.concatenate([begin + np.arange(tokens) for begin, tokens in zip(begins, own, strict=True)]), sizes


def pack(lengths: np.ndarray, counts: Sequence[int], dtype: torch.dtype, device: str) -> Packed:
    # torch's softmax in bfloat16 is several times slower where a row of scores does not fill its vectors.
    rows, vector = len(lengths), 32 if dtype == torch.bfloat16 else 1
    longest = -(-int(lengths.max()) // vector) * vector
    at, sizes = layout(lengths, counts)
    there = np.arange(longest) < lengths[:, None]
    starts = at[np.cumsum(lengths) - lengths]
    padded = np.where(there, starts[:, None] + np.arange(longest), starts[:, None]).reshape(-1)
    same = sum(sizes) == len(at) == rows * longest
    real = None if same else torch.from_numpy(np.flatnonzero(there)).to(device)
    return Packed(
        torch.from_numpy(lengths).to(device), sum(sizes), torch.from_numpy(padded).to(device),
        torch.from_numpy(at).to(device), real,
    )  # fmt: skip


class Attention(torch.autograd.Function):
    """Softmax attention of every packed row to itself. query, key, value: (heads, filled, width of a head).

    Exact: all scores are made, a head at a time of every row together, and kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: Packed,
        bias: Tensor | None,
        scale: float,
        drop: float,
    ) -> Tensor:
        """(filled, heads, width of a head)"""
        heads = query.shape[0]
        rows, longest = packed.shape
        q, k, v = (packed.spread(part) for part in (query, key, value))
        q *= scale
        scores = torch.bmm(q, k.transpose(1, 2))
        if bias is not None:
            scores.view(heads, rows, longest, longest).add_(bias)
        shares = torch.softmax(scores, -1)
        kept = torch.empty_like(shares).bernoulli_(1 - drop).div_(1 - drop) if drop else None
        mixed = torch.bmm(shares if kept is None else shares * kept, v)
        ctx.save_for_backward(q, k, v, shares, kept)
        ctx.rest = packed, heads, scale
        return packed.gather(mixed, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, shares, kept = ctx.saved_tensors
        packed, heads, scale = ctx.rest
        g = packed.spread_zeros(grad.transpose(0, 1))
        of_shares = torch.bmm(g, v.transpose(1, 2))
        if kept is not None:
            of_shares *= kept
        of_value = torch.bmm((shares if kept is None else shares * kept).transpose(1, 2), g)
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_query = torch.bmm(of_scores, k).mul_(scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), q)
        found = [packed.gather(part, heads).transpose(0, 1) for part in (of_query, of_key, of_value)]
        return (*found, None, None, None, None)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it, for the rows of the `packed` block around the call. query: (1, heads, tokens, width)."""
    if odd := [
        name
        for name, value in {**rest, "attention_mask": attention_mask}.items()
        if name in UNLIKE and value is not None
    ]:
        raise ValueError(f"packed rows have no attention with {odd}")
    packed = _packed.get()
    if key.shape[1] != query.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = packed.bias(causal, query.dtype)
    mixed: Tensor = Attention.apply(  # type: ignore[no-untyped-call]
        query[0], key[0], value[0], packed, bias, scale, dropout
    )
    return mixed[None], None


AttentionInterface.register(NAME, attend)


@contextmanager
def attention(base: Any, packed: Packed) -> Iterator[None]:
    """The attention of a Hugging Face model is that of these packed rows while the block runs."""
    before, token = base.config._attn_implementation, _packed.set(packed)
    base.config._attn_implementation = NAME
    try:
        yield
    finally:
        base.config._attn_implementation = before
        _packed.reset(token)
