"""Rows of different lengths one after the other, without padding: their places, their attention, their mean."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

NAME = "fedrank"  # of this attention among those of transformers
# What some models' attention has beside softmax over the row: it would not show in a trial with short rows.
UNLIKE = {"attention_mask", "softcap", "s_aux", "position_bias"}
EVEN = 8  # all clients are filled up alike, to a multiple of this, for their products to be one
MOST = 1.1  # unless that takes more than so many times the tokens of filling up each by itself
STEP = 32  # tokens are filled up to a multiple of this, and tiles are at least so wide: softmax is slow on less

_packed: ContextVar["Packed"] = ContextVar("packed")


@dataclass(frozen=True, eq=False)
class Tiles:
    """Rows of like length side by side in tiles of one width, so that short ones fill the vectors of a product.

    owner: (tiles, width), the row at each place, -1 where there is none. tokens: (tiles * width,), the packed token at
    each place, any of the same client where there is none. A tile is one client's: what is no longer a number there, and
    times nothing still is none, stays there.
    """

    owner: Tensor
    tokens: Tensor
    biases: dict[tuple[bool, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, causal: bool, window: int | None, dtype: torch.dtype) -> Tensor:
        """(tiles, width, width): what is added to the scores so that no token sees another row, or, of its own, a later
        token or one that is `window` tokens back or more.
        """
        key = causal, window if window is not None and window < self.owner.shape[1] else None, dtype
        if key not in self.biases:  # one for all layers
            unseen = self.owner[:, :, None] != self.owner[:, None, :]
            if causal:
                unseen |= torch.ones_like(unseen[0]).triu(1)
            if key[1] is not None:
                unseen |= torch.ones_like(unseen[0]).tril(-key[1])
            self.biases[key] = unseen.new_zeros((), dtype=dtype).masked_fill(unseen, -torch.inf)
        return self.biases[key]

    def spread(self, part: Tensor) -> Tensor:
        """(heads, filled, size) -> (heads * tiles, width, size). No token sees what is at places without one."""
        return part.index_select(1, self.tokens).view(-1, self.owner.shape[1], part.shape[2])


@dataclass(frozen=True, eq=False)
class Packed:
    """Where packed rows are, shared by all layers of a pass.

    lengths: (rows,), tokens of each row. filled: all tokens, with those that only fill up, after each client's.
    at: (tokens of the rows,), where each is. filler: where those are that only fill up. tiles: the rows as attention
    computes them, by their length. places: (filled,), where each token is in the tiles one after the other, for those
    that fill up another of the same client. twice: a step is differentiated twice, so its attention has to be plain.
    """

    lengths: Tensor
    filled: int
    at: Tensor
    filler: Tensor
    tiles: tuple[Tiles, ...]
    places: Tensor
    twice: bool = False

    def gather(self, parts: Sequence[Tensor], heads: int) -> Tensor:
        """(heads * tiles, width, size) of each -> (heads, filled, size), of tokens that fill up anything."""
        flat = [part.view(heads, -1, part.shape[2]) for part in parts]
        return (flat[0] if len(flat) == 1 else torch.cat(flat, 1)).index_select(1, self.places)

    def mean(self, hidden: Tensor) -> Tensor:
        """(filled, width) -> (rows, width), the mean over each row's tokens."""
        owner = torch.repeat_interleave(self.lengths)
        sums = hidden.new_zeros(len(self.lengths), hidden.shape[-1]).index_add(0, owner, hidden[self.at])
        return sums / self.lengths[:, None]


def filled(tokens: int) -> int:
    """The tokens with those that fill up: for every number of tokens kernels are made and kept, which costs more."""
    step = max(STEP, 1 << tokens.bit_length() >> 4)  # an eighth of the power of two below
    return -(-tokens // step) * step


def layout(lengths: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """(tokens,): the place of each token, and (clients,): the tokens of each client, filled up alike or as their sum is.

    counts: how many of the rows are each client's, whose tokens lie together.
    """
    own = [int(part.sum()) for part in np.split(lengths, np.cumsum(counts)[:-1])]
    sizes, even = [filled(tokens) for tokens in own], -(-max(own) // EVEN) * EVEN
    if len(own) > 1 and even * len(own) <= MOST * sum(sizes):
        sizes = [even] * len(own)
    else:
        sizes[-1] += filled(sum(sizes)) - sum(sizes)
    begins = np.cumsum(sizes) - sizes
    return np.concatenate([begin + np.arange(tokens) for begin, tokens in zip(begins, own, strict=True)]), sizes


def tiled(lengths: np.ndarray, counts: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
    """Rows of like length, and where in their tiles each begins; the number of these, and their width.

    Rows stay in their order; a tile takes as many of one client as it holds.
    """
    clients = np.repeat(np.arange(len(counts)), counts)
    doublings = np.ceil(np.log2(np.maximum(lengths, STEP) / STEP)).astype(int)
    for doubling in np.unique(doublings):
        rows = np.flatnonzero(doublings == doubling)
        width, starts, used = filled(int(lengths[rows].max())), list[int](), 0
        others = np.diff(clients[rows], prepend=-1) > 0
        for length, other in zip(lengths[rows].tolist(), others.tolist(), strict=True):
            if other or used % width + length > width:
                used += -used % width
            starts.append(used)
            used += length
        count = -(-used // width)
        step = max(1, 1 << count.bit_length() >> 3)  # as for tokens: kernels are made for every number of tiles
        yield rows, np.array(starts), -(-count // step) * step, width


def pairs(lengths: np.ndarray) -> int:
    """The scores of the attention of a client's rows: those of their tiles."""
    return sum(count * width**2 for _, _, count, width in tiled(lengths, [len(lengths)]))


def pack(lengths: np.ndarray, counts: Sequence[int], device: str, twice: bool = False) -> Packed:
    def there(part: np.ndarray) -> Tensor:
        return torch.from_numpy(part).to(device)

    at, sizes = layout(lengths, counts)
    everywhere = np.zeros(sum(sizes), np.int64)
    begins, tiles, done = np.cumsum(lengths) - lengths, [], 0
    for rows, starts, count, width in tiled(lengths, counts):
        own = lengths[rows]
        within = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)  # a token's place in its row
        places, packed = np.repeat(starts, own) + within, at[np.repeat(begins[rows], own) + within]
        owner, tokens = np.full(count * width, -1), np.zeros((count, width), np.int64)
        opens = starts % width == 0
        tokens[starts[opens] // width] = at[begins[rows[opens]], None]
        owner[places], tokens.reshape(-1)[places] = np.repeat(rows, own), packed
        everywhere[packed] = done + places
        tiles.append(Tiles(there(owner.reshape(count, width)), there(tokens.reshape(-1))))
        done += count * width
    filler = np.setdiff1d(np.arange(sum(sizes)), at)
    everywhere[filler] = everywhere[at[np.searchsorted(at, filler) - 1]]
    return Packed(there(lengths), sum(sizes), there(at), there(filler), tuple(tiles), there(everywhere), twice)


class Attention(torch.autograd.Function):
    """Softmax attention of every packed row to itself. query, key, value: (heads, filled, width of a head).

    Exact: all scores of a tile are made and kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Packed, causal: bool, window: int | None, scale: float,
        drop: float,
    ) -> Tensor:  # fmt: skip
        """(filled, heads, width of a head)"""
        made, saved = list[Tensor](), list[Tensor | None]()
        for tiles in packed.tiles:
            q, k, v = (tiles.spread(part) for part in (query, key, value))
            q *= scale
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.view(len(query), -1, *scores.shape[1:]).add_(tiles.bias(causal, window, scores.dtype))
            shares = torch.softmax(scores, -1)
            kept = torch.empty_like(shares).bernoulli_(1 - drop).div_(1 - drop) if drop else None
            made.append(torch.bmm(shares if kept is None else shares * kept, v))
            saved += [q, k, v, shares, kept]
        ctx.save_for_backward(*saved)
        ctx.rest = packed, scale
        return packed.gather(made, len(query)).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale = ctx.rest
        made: list[list[Tensor]] = [[], [], []]
        saved = iter(ctx.saved_tensors)
        for tiles, (q, k, v, shares, kept) in zip(packed.tiles, zip(*[saved] * 5, strict=True), strict=True):
            g = tiles.spread(grad.transpose(0, 1))
            of_shares = torch.bmm(g, v.transpose(1, 2))
            if kept is not None:
                of_shares *= kept
            of_value = torch.bmm((shares if kept is None else shares * kept).transpose(1, 2), g)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_query = torch.bmm(of_scores, k).mul_(scale)
            of_key = torch.bmm(of_scores.transpose(1, 2), q)
            for part, into in zip((of_query, of_key, of_value), made, strict=True):
                into.append(part)
        found = [packed.gather(parts, grad.shape[1]).index_fill_(1, packed.filler, 0) for parts in made]
        return (*found, None, None, None, None, None)


def plainly(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, causal: bool, window: int | None, scale: float, drop: float
) -> Tensor:  # fmt: skip
    """The same, of which any number of derivatives can be taken; it keeps more."""
    made = []
    for tiles in packed.tiles:
        q, k, v = (tiles.spread(part) for part in (query * scale, key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(len(query), -1, *tiles.owner.shape[1:] * 2)
        shares = torch.softmax(scores + tiles.bias(causal, window, scores.dtype), -1)
        made.append(torch.bmm(functional.dropout(shares, drop).flatten(0, 1), v))
    return packed.gather(made, len(query)).transpose(0, 1)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, sliding_window: int | None = None,
    **rest: Any,
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
    compute = plainly if packed.twice else Attention.apply
    mixed: Tensor = compute(query[0], key[0], value[0], packed, causal, sliding_window, scale, dropout)
    return mixed[None], None


AttentionInterface.register(NAME, attend)


def again(base: Any) -> AbstractContextManager[None]:
    """The attention that this model has now, for a part of the pass that is computed once more when that is over."""
    packed = _packed.get(None)
    return nullcontext() if packed is None else attention(base, packed)


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
