"""Adapted linear layers as one autograd function for each input: base, adapter, and both gradients, nothing else kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedrank.training.frozen import Frozen, Product
from fedrank.training.hooks import Live, Part


class Piece(NamedTuple):
    """The components of one layer among those of its group. Bt, grad: (r, out)."""

    layer: int
    out: slice
    components: slice
    Bt: Tensor
    grad: Tensor | None


@dataclass(eq=False)
class Share:
    """Components of the layers that read one input, all of which learn or are all frozen. A: (r, in), e: (r,).

    Gradients are added into the tensors given for them; None: that factor does not learn.
    """

    A: Tensor
    e: Tensor | None
    pieces: list[Piece]
    grad_A: Tensor | None = None
    grad_e: Tensor | None = None

    @property
    def learns_B(self) -> bool:
        return any(piece.grad is not None for piece in self.pieces)


class Linears(torch.autograd.Function):
    """All layers that read x: for each, x W^T + b + scale * sum over shares of x A^T diag(e) B^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, learning: Tensor | None, product: Product, shares: list[Share], scale: float
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        y = product.forward(rows)
        kept: list[Tensor | None] = []
        for share in shares:
            hidden = product.product(rows, share.A)
            weighted = hidden if share.e is None else hidden * share.e
            for piece in share.pieces:
                y[:, piece.out].addmm_(weighted[:, piece.components], piece.Bt, alpha=scale)
            kept.append(hidden if share.learns_B or share.grad_e is not None else None)
        read = rows if any(share.grad_A is not None for share in shares) else None
        ctx.save_for_backward(read, *kept)
        ctx.rest = product, shares, scale, x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in torch.split(y, product.outs, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *kept = ctx.saved_tensors
        product, shares, scale, shape = ctx.rest
        parts = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        down = None
        if ctx.needs_input_grad[0]:
            down = product.backward(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        for share, hidden in zip(shares, kept, strict=True):
            if share.learns_B:
                weighted = hidden if share.e is None else hidden * share.e
                for piece in share.pieces:
                    if piece.grad is not None:
                        piece.grad.addmm_(weighted[:, piece.components].t(), parts[piece.layer], alpha=scale)
            if down is None and share.grad_A is None and share.grad_e is None:
                continue
            backs = [product.product(parts[piece.layer], piece.Bt) for piece in share.pieces]
            back = backs[0] if len(backs) == 1 else torch.cat(backs, 1)
            if share.grad_e is not None:
                share.grad_e.add_((back * hidden).sum(0, dtype=share.grad_e.dtype), alpha=scale)
            if share.e is not None:
                back *= share.e
            if share.grad_A is not None:
                share.grad_A.addmm_(back.t(), rows, alpha=scale)
            if down is not None:
                down.addmm_(back, share.A, alpha=scale)
        return None if down is None else down.view(shape), None, None, None, None


class Group:
    """Layers that read one input: the first of them that is called computes them all."""

    def __init__(self, product: Product, shares: list[Share], scale: float, learning: Tensor | None) -> None:
        self.product, self.shares, self.scale, self.learning = product, shares, scale, learning
        self.read: Tensor | None = None
        self.made: list[Tensor | None] = []

    def __call__(self, at: int, x: Tensor) -> Tensor:
        if self.read is not x or self.made[at] is None:
            self.read, self.made = (
                x,
                list(
                    Linears.apply(  # type: ignore[no-untyped-call]
                        x.to(self.product.dtype), self.learning, self.product, self.shares, self.scale
                    )
                ),
            )
        found, self.made[at] = self.made[at], None
        if not any(part is not None for part in self.made):
            self.read = None
        assert found is not None
        return found


@dataclass(eq=False)
class Mount:
    """An adapter on its base, in the base's type. values, grads: factor -> the flat tensor that the layers see."""

    live: Live
    values: dict[str, Tensor]
    grads: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.parts = list(self.live.learning.values())

    def refresh(self) -> None:
        """Let the layers see what the optimizer made."""
        for factor, value in self.values.items():
            if factor in self.grads and value is not self.live.values[factor]:
                value.copy_(self.live.values[factor])

    def collect(self) -> None:
        """The gradients of a backward pass, where the optimizer looks for them."""
        for factor, grad in self.grads.items():
            if grad is not self.live.grads[factor]:
                self.live.grads[factor].copy_(grad)
                grad.zero_()

    def learning(self, names: Sequence[str], outs: Sequence[int]) -> Iterator[Share]:
        """The components that learn in these layers; of layers that follow one another in the adapter, together."""
        order = {name: at for at, name in enumerate(self.live.learning)}
        run: list[int] = []
        for slot, name in [*enumerate(names), (len(names), "")]:
            if run and order.get(name) != order[names[run[-1]]] + 1:
                yield self._share([order[names[s]] for s in run], run, outs)
                run = []
            if name in order:
                run.append(slot)

    def _share(self, at: list[int], slots: list[int], outs: Sequence[int]) -> Share:
        def view(flats: Mapping[str, Tensor], factor: str, first: int, last: int, width: int) -> Tensor | None:
            if factor not in flats:
                return None
            starts = self.live.starts[factor]
            return flats[factor][starts[first] : starts[last + 1]].view(-1, width)

        inside, pieces, done = self.parts[at[0]].A.shape[1], [], 0
        for index, slot in zip(at, slots, strict=True):
            rank, first = len(self.parts[index].A), sum(outs[:slot])
            bt = view(self.values, "B", index, index, outs[slot])
            assert bt is not None
            grad = view(self.grads, "B", index, index, outs[slot])
            pieces.append(Piece(slot, slice(first, first + outs[slot]), slice(done, done + rank), bt, grad))
            done += rank
        A, e, *grads = (view(flats, f, at[0], at[-1], inside if f == "A" else 1)
                        for flats in (self.values, self.grads) for f in "Ae")  # fmt: skip
        assert A is not None
        return Share(
            A, None if e is None else e.view(-1), pieces, grads[0], None if grads[1] is None else grads[1].view(-1)
        )


def _resting(
    parts: Mapping[str, Part], names: Sequence[str], outs: Sequence[int], dtype: torch.dtype
) -> Iterator[Share]:
    """The frozen components of these layers."""
    for slot, name in enumerate(names):
        if part := parts.get(name):
            first, rank = sum(outs[:slot]), len(part.A)
            piece = Piece(slot, slice(first, first + outs[slot]), slice(0, rank), part.Bt.to(dtype), None)
            yield Share(part.A.to(dtype), None if part.e is None else part.e.to(dtype), [piece])


@contextmanager
def mounted(frozen: Frozen, live: Live, weights: Mapping[str, Tensor] = {}) -> Iterator[Mount]:
    """The adapter on the base while the block runs; the layers compute as `frozen` does.

    weights: other frozen weights, (out, in), in the place of these layers' own.
    """
    dtype = frozen.dtype
    values = {f: flat.detach().to(dtype) for f, flat in live.flats.items()}
    grads = {f: g if f == "e" or dtype == g.dtype else torch.zeros_like(g, dtype=dtype) for f, g in live.grads.items()
             if f in values}  # fmt: skip
    mount, called = Mount(live, values, grads), list[tuple[nn.Module, Callable[..., Tensor]]]()
    for names in frozen.groups:
        product = frozen.product(names, weights)
        learning = list(mount.learning(names, product.outs))
        shares = learning + list(_resting(live.frozen, names, product.outs, dtype))
        recorded = torch.empty(0, device=live.device, requires_grad=True) if learning and grads else None
        group = Group(product, shares, live.scale, recorded)
        called += [(frozen.layers[name], partial(group, at)) for at, name in enumerate(names)]
    called += [(layer, partial(_head, live.dense, name)) for name, layer in frozen.heads.items() if live.dense]
    for layer, forward in called:
        layer.forward = forward  # seen before the class's own; the module itself stays as it is
    try:
        yield mount
    finally:
        for layer, _ in called:
            del layer.forward


def _head(dense: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = dense[f"{name}.weight"]
    return functional.linear(x.to(weight.dtype), weight, dense.get(f"{name}.bias"))
