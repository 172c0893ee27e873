"""Adapted linear layers as one autograd function for each input: base, adapter, and both gradients, nothing else kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedrank.trace import span
from fedrank.training.frozen import Frozen, Product
from fedrank.training.hooks import Live
from fedrank.training.packing import layout
from fedrank.training.prefix import Prefix, laid
from fedrank.training.tasks import Encoded


class Piece(NamedTuple):
    """The components of one layer among those of its group. Bt, grad: (r, out)."""

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


class Linears(torch.autograd.Function):
    """All layers that read x: for each, x W^T + b + scale * sum over shares of x A^T diag(e) B^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, learning: Tensor | None, product: Product, shares: list[Share]
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        y = product.forward(rows)
        present = [(share, share.place.tokens) for share in shares if share.place.tokens is not None]
        kept: list[Tensor | None] = []
        for share, at in present:
            hidden = product.product(rows[at], share.A)
            weighted = hidden if share.e is None else hidden * share.e
            for piece in share.pieces:
                y[at, piece.out].addmm_(weighted[:, piece.components], piece.Bt, alpha=share.scale)
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
            parts = [grad[at] for grad in whole]
            if share.learns_B:
                weighted = hidden if share.e is None else hidden * share.e
                for piece in share.pieces:
                    if piece.grad is not None:
                        piece.grad.addmm_(weighted[:, piece.components].t(), parts[piece.layer], alpha=share.scale)
            if down is None and share.grad_A is None and share.grad_e is None:
                continue
            backs = [product.product(parts[piece.layer], piece.Bt) for piece in share.pieces]
            back = backs[0] if len(backs) == 1 else torch.cat(backs, 1)
            if share.grad_e is not None:
                share.grad_e.add_((back * hidden).sum(0, dtype=share.grad_e.dtype), alpha=share.scale)
            if share.e is not None:
                back *= share.e
            if share.grad_A is not None:
                share.grad_A.addmm_(back.t(), rows[at], alpha=share.scale)
            if down is not None:
                down[at].addmm_(back, share.A, alpha=share.scale)
        return None if down is None else down.view(shape), None, None, None


class Group:
    """Layers that read one input: the first of them that is called computes them all."""

    def __init__(self, product: Product, shares: list[Share], learning: Tensor | None) -> None:
        self.product, self.shares, self.learning = product, shares, learning
        self.read: Tensor | None = None
        self.made: list[Tensor | None] = []

    def __call__(self, at: int, x: Tensor) -> Tensor:
        if self.read is not x or self.made[at] is None:
            rows = x.to(self.product.dtype)
            made = Linears.apply(rows, self.learning, self.product, self.shares)  # type: ignore[no-untyped-call]
            self.read, self.made = x, list(made)
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
    place: Place = field(default_factory=Place)

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
        e, A, *grads = (view(flats, f, at[0], at[-1], inside if f == "A" else 1)
                        for flats in (self.values, self.grads) for f in "eA")  # fmt: skip
        assert A is not None
        flat = None if grads[0] is None else grads[0].view(-1)
        return Share(A, None if e is None else e.view(-1), pieces, self.live.scale, self.place, grads[1], flat)

    def resting(self, names: Sequence[str], outs: Sequence[int], dtype: torch.dtype) -> Iterator[Share]:
        """The frozen components of these layers."""
        for slot, name in enumerate(names):
            if part := self.live.frozen.get(name):
                first, rank = sum(outs[:slot]), len(part.A)
                piece = Piece(slot, slice(first, first + outs[slot]), slice(0, rank), part.Bt.to(dtype), None)
                e = None if part.e is None else part.e.to(dtype)
                yield Share(part.A.to(dtype), e, [piece], self.live.scale, self.place)


@contextmanager
def mounted(frozen: Frozen, lives: Sequence[Live], weights: Mapping[str, Tensor] = {}) -> Iterator[list[Mount]]:
    """The adapters of one or more clients on the base while the block runs; the layers compute as `frozen` does.

    weights: other frozen weights, (out, in), in the place of these layers' own.
    """
    mounts, called = [_mount(live, frozen.dtype) for live in lives], list[tuple[nn.Module, Callable[..., Tensor]]]()
    for names in frozen.groups:
        product = frozen.product(names, weights)
        learning = [share for mount in mounts for share in mount.learning(names, product.outs)]
        resting = [share for mount in mounts for share in mount.resting(names, product.outs, frozen.dtype)]
        learns = any(share.learns_B or share.grad_A is not None or share.grad_e is not None for share in learning)
        recorded = torch.empty(0, device=lives[0].device, requires_grad=True) if learns else None
        group = Group(product, learning + resting, recorded)
        called += [(frozen.layers[name], partial(group, at)) for at, name in enumerate(names)]
    if any(live.dense for live in lives):
        called += [(layer, partial(_head, mounts, name)) for name, layer in frozen.heads.items()]
    for layer, forward in called:
        layer.forward = forward  # seen before the class's own; the module itself stays as it is
    try:
        yield mounts
    finally:
        for layer, _ in called:
            del layer.forward


def _mount(live: Live, dtype: torch.dtype) -> Mount:
    values = {f: flat.detach().to(dtype) for f, flat in live.flats.items()}
    grads = {f: g if f == "e" or dtype == g.dtype else torch.zeros_like(g, dtype=dtype) for f, g in live.grads.items()
             if f in values}  # fmt: skip
    return Mount(live, values, grads)


def _head(mounts: Sequence[Mount], name: str, x: Tensor) -> Tensor:
    """Each client's head on its own rows."""
    parts = []
    for mount in mounts:
        if mount.place.rows is not None:
            weight, bias = mount.live.dense[f"{name}.weight"], mount.live.dense.get(f"{name}.bias")
            parts.append(functional.linear(x[mount.place.rows].to(weight.dtype), weight, bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def outputs(
    frozen: Frozen, encoded: Encoded, steps: Sequence[tuple[Mount, np.ndarray]], mounts: Sequence[Mount], device: str,
    prefixes: Sequence[Prefix] = (),
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Logits and labels of each client's rows, from one pass over all of them. mounts: all that are there.

    prefixes: of each client, where the pass begins above what is frozen.
    """
    batches = [batch for _, batch in steps]
    counts, every = [len(batch) for batch in batches], np.concatenate(batches)
    lengths = encoded.lengths[every]
    begun = _begun(frozen, prefixes, batches, lengths, device) if prefixes else nullcontext()
    for mount in mounts:
        mount.place.tokens = mount.place.rows = None
    rows, tokens = 0, 0
    sizes = layout(lengths, counts)[1] if frozen.packs else [int(lengths.max()) * count for count in counts]
    for (mount, _), count, taken in zip(steps, counts, sizes, strict=True):
        mount.place.rows, mount.place.tokens = slice(rows, rows + count), slice(tokens, tokens + taken)
        rows, tokens = rows + count, tokens + taken
    with begun:
        logits, labels = frozen.logits(encoded, every, device, counts)
    if encoded.generates and frozen.packs:
        cuts = [(slice(None), mount.place.tokens) for mount, _ in steps]
        return [(logits[cut], labels[cut]) for cut in cuts]
    return [(logits[mount.place.rows], labels[mount.place.rows]) for mount, _ in steps]


def _begun(
    frozen: Frozen, prefixes: Sequence[Prefix], batches: Sequence[np.ndarray], lengths: np.ndarray, device: str
) -> AbstractContextManager[None]:
    """The pass over these batches begins with their states at the entrance of the lowest block with components."""
    with span("prefix"):
        states = torch.cat([prefix.states(batch) for prefix, batch in zip(prefixes, batches, strict=True)])
        counts = [len(batch) for batch in batches]
        return prefixes[0].blocks.starting(prefixes[0].at, laid(states, lengths, counts, frozen.packs, device))
