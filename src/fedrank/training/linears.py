"""Adapted linear layers as one autograd function for each input: base, adapter, and both gradients, nothing else kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedrank.training.compute import Apart, Beside, Product

Base = Product | Apart | Beside


class Piece(NamedTuple):
    """The components of one layer among those of its group. Bt, grad: (r, out), or (clients, r, out)."""

    layer: int
    out: slice
    components: slice
    Bt: Tensor
    grad: Tensor | None


@dataclass(eq=False)
class Place:
    """Where one client's tokens and rows are in a pass over several clients'; None: it has none in it."""

    tokens: slice | None = field(default_factory=lambda: slice(None))
    rows: slice | None = field(default_factory=lambda: slice(None))


@dataclass(eq=False)
class Share:
    """A client's components of the layers that read one input, which all learn or are all frozen. A: (r, in), e: (r,).

    Those of several clients with equally many tokens have one axis more, before the others, and are one batched product.
    Gradients are added into the tensors given for them; None: that factor does not learn.
    """

    A: Tensor
    e: Tensor | None
    pieces: list[Piece]
    scale: float
    place: Place
    grad_A: Tensor | None = None
    grad_e: Tensor | None = None

    @property
    def learns_B(self) -> bool:
        return any(piece.grad is not None for piece in self.pieces)

    def own(self, rows: Tensor, at: slice) -> Tensor:
        """(all tokens, width) -> (tokens, width), or (clients, tokens, width); what is added to it is added to `rows`."""
        return rows[at] if self.A.ndim == 2 else rows[at].view(len(self.A), -1, rows.shape[-1])

    def weighted(self, hidden: Tensor) -> Tensor:
        return hidden if self.e is None else hidden * self.e[..., None, :]


def _times(x: Tensor, weight: Tensor, product: Base) -> Tensor:
    """x W^T; of each client, where there are several."""
    return product.product(x, weight) if x.ndim == 2 else torch.bmm(x, weight.mT)


def _add(into: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """into += scale a b"""
    (into.addmm_ if into.ndim == 2 else into.baddbmm_)(a, b, alpha=scale)


class Linears(torch.autograd.Function):
    """All layers that read x: for each, x W^T + b + scale * sum over shares of x A^T diag(e) B^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, learning: Tensor | None, product: Base, shares: list[Share]) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        y = product.forward(rows)
        present = [(share, share.place.tokens) for share in shares if share.place.tokens is not None]
        kept: list[Tensor | None] = []
        for share, at in present:
            hidden, out = _times(share.own(rows, at), share.A, product), share.own(y, at)
            weighted = share.weighted(hidden)
            for piece in share.pieces:
                _add(out[..., piece.out], weighted[..., piece.components], piece.Bt, share.scale)
            kept.append(hidden if share.learns_B or share.grad_e is not None else None)
        read = rows if any(share.grad_A is not None for share, _ in present) else None
        ctx.save_for_backward(read, *kept)
        ctx.rest = product, present, x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in torch.split(y, product.outs, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *kept = ctx.saved_tensors
        product, present, shape = ctx.rest
        whole = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        down = None
        if ctx.needs_input_grad[0]:
            down = product.backward(whole[0] if len(whole) == 1 else torch.cat(whole, 1))
        for (share, at), hidden in zip(present, kept, strict=True):
            parts = [share.own(grad, at) for grad in whole]
            if share.learns_B:
                weighted = share.weighted(hidden)
                for piece in share.pieces:
                    if piece.grad is not None:
                        _add(piece.grad, weighted[..., piece.components].mT, parts[piece.layer], share.scale)
            if down is None and share.grad_A is None and share.grad_e is None:
                continue
            backs = [_times(parts[piece.layer], piece.Bt, product) for piece in share.pieces]
            back = backs[0] if len(backs) == 1 else torch.cat(backs, -1)
            if share.grad_e is not None:
                share.grad_e.add_((back * hidden).sum(-2, dtype=share.grad_e.dtype), alpha=share.scale)
            back = share.weighted(back)
            if share.grad_A is not None:
                _add(share.grad_A, back.mT, share.own(rows, at), share.scale)
            if down is not None:
                _add(share.own(down, at), back, share.A, share.scale)
        return None if down is None else down.view(shape), None, None, None


class Alone(torch.autograd.Function):
    """The frozen layers that read x, x W^T + b; or, of a gradient, x W. Any number of derivatives can be taken of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Base, back: bool, bias: bool) -> Tensor:
        ctx.rest = product, back
        return product.backward(x) if back else product.forward(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product, back = ctx.rest
        return Alone.apply(grad, product, not back, False), None, None, None  # type: ignore[no-untyped-call]


def adapted(learning: Tensor | None, product: Base, shares: list[Share], x: Tensor) -> tuple[Tensor, ...]:
    """What each layer makes of x with its adapters."""
    return Linears.apply(x, learning, product, shares)  # type: ignore[no-any-return, no-untyped-call]


def alone(product: Base, x: Tensor) -> tuple[Tensor, ...]:
    """What each frozen layer makes of x."""
    y: Tensor = Alone.apply(x.reshape(-1, x.shape[-1]), product, False, True)  # type: ignore[no-untyped-call]
    return tuple(part.view(*x.shape[:-1], -1) for part in torch.split(y, product.outs, 1))


class Group:
    """Layers that read one input, of this type: the first of them that is called has `compute` make all their outputs."""

    def __init__(self, dtype: torch.dtype, compute: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.dtype, self.compute = dtype, compute
        self.read: Tensor | None = None
        self.made: list[Tensor | None] = []

    def __call__(self, at: int, x: Tensor) -> Tensor:
        if self.read is not x or self.made[at] is None:
            self.read, self.made = x, list(self.compute(x.to(self.dtype)))
        found, self.made[at] = self.made[at], None
        if not any(part is not None for part in self.made):
            self.read = None
        assert found is not None
        return found
