"""Adapters mounted on the frozen base, of one client or of several: who computes which layers, on whose tokens."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional

from fedrank.adapter import Adapter
from fedrank.increments import digest
from fedrank.protocol import Linear
from fedrank.trace import span
from fedrank.training import flow
from fedrank.training.compute import Beside, Increment
from fedrank.training.frozen import Frozen
from fedrank.training.hooks import Live
from fedrank.training.linears import Base, Group, Piece, Place, Share, adapted, alone
from fedrank.training.packing import layout
from fedrank.training.prefix import Kept, Prefix, chunked, laid, lowest
from fedrank.training.tasks import Encoded

Called = tuple[nn.Module, Callable[..., Tensor]]  # what a layer computes while it is mounted


@dataclass(eq=False)
class Mount:
    """An adapter on its base, in the base's type. values, grads: factor -> the flat tensor that the layers see.

    place: of its frozen components and its head; learns: of what learns, nowhere while `whole` stands for it.
    whole: the adapters of all clients, where these are alike: flat tensors with an axis of clients before.
    """

    live: Live
    values: dict[str, Tensor]
    grads: dict[str, Tensor]
    place: Place = field(default_factory=Place)
    learns: Place = field(default_factory=Place)
    whole: "Mount | None" = None

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
        def view(flats: Mapping[str, Tensor], factor: str, first: int, last: int) -> Tensor | None:
            if factor not in flats:
                return None
            starts = self.live.starts[factor]
            return flats[factor][..., starts[first] : starts[last + 1]]

        def matrix(flats: Mapping[str, Tensor], factor: str, first: int, last: int, width: int) -> Tensor | None:
            flat = view(flats, factor, first, last)
            return None if flat is None else flat.view(*flat.shape[:-1], -1, width)

        inside, pieces, done = self.parts[at[0]].A.shape[1], [], 0
        for index, slot in zip(at, slots, strict=True):
            rank, first = len(self.parts[index].A), sum(outs[:slot])
            bt = matrix(self.values, "B", index, index, outs[slot])
            assert bt is not None
            grad = matrix(self.grads, "B", index, index, outs[slot])
            pieces.append(Piece(slot, slice(first, first + outs[slot]), slice(done, done + rank), bt, grad))
            done += rank
        A, grad_A = (matrix(flats, "A", at[0], at[-1], inside) for flats in (self.values, self.grads))
        e, grad_e = (view(flats, "e", at[0], at[-1]) for flats in (self.values, self.grads))
        assert A is not None
        return Share(A, e, pieces, self.live.scale, self.learns, grad_A, grad_e)

    def resting(self, names: Sequence[str], outs: Sequence[int], dtype: torch.dtype) -> Iterator[Share]:
        """The frozen components of these layers."""
        for slot, name in enumerate(names):
            if part := self.live.frozen.get(name):
                first, rank = sum(outs[:slot]), len(part.A)
                piece = Piece(slot, slice(first, first + outs[slot]), slice(0, rank), part.Bt.to(dtype), None)
                e = None if part.e is None else part.e.to(dtype)
                yield Share(part.A.to(dtype), e, [piece], self.live.scale, self.place)


@contextmanager
def mounted(
    frozen: Frozen,
    lives: Sequence[Live],
    weights: Mapping[str, Tensor] = {},
    beside: Mapping[str, Sequence[Increment]] = {},
) -> Iterator[list[Mount]]:
    """The adapters of one or more clients on the base while the block runs; the layers compute as `frozen` does.

    weights: other frozen weights, as the layers hold theirs, in the place of these. beside: what is added to a layer's
    product.
    """
    mounts, called = _mounts(lives, frozen.dtype), list[Called]()
    ones = [*mounts, *([mounts[0].whole] if mounts[0].whole else [])]
    for names, product in _products(frozen, weights, beside):
        learning = [share for mount in ones for share in mount.learning(names, product.outs)]
        resting = [share for mount in mounts for share in mount.resting(names, product.outs, frozen.dtype)]
        learns = any(share.learns_B or share.grad_A is not None or share.grad_e is not None for share in learning)
        recorded = torch.empty(0, device=lives[0].device, requires_grad=True) if learns else None
        called += _called(frozen, names, Group(product.dtype, partial(adapted, recorded, product, learning + resting)))
    if any(live.dense for live in lives):
        called += [(layer, partial(_head, mounts, name)) for name, layer in frozen.heads.items()]
    with _calling(called):
        yield mounts


@contextmanager
def unmounted(
    frozen: Frozen, weights: Mapping[str, Tensor] = {}, beside: Mapping[str, Sequence[Increment]] = {}
) -> Iterator[None]:
    """The layers compute as `frozen` does, without adapters, which hooks may add; a step can be differentiated again."""
    found = _products(frozen, weights, beside)
    with _calling([one for names, it in found for one in _called(frozen, names, Group(it.dtype, partial(alone, it)))]):
        yield


def _products(
    frozen: Frozen, weights: Mapping[str, Tensor], beside: Mapping[str, Sequence[Increment]]
) -> Iterator[tuple[tuple[str, ...], Base]]:
    for names in frozen.groups:
        inner, added = frozen.product(names, weights), [beside.get(name, ()) for name in names]
        yield names, Beside(inner, added) if any(added) else inner


def _called(frozen: Frozen, names: Sequence[str], group: Group) -> list[Called]:
    return [(frozen.layers[name], partial(group, at)) for at, name in enumerate(names)]


@contextmanager
def _calling(called: Sequence[Called]) -> Iterator[None]:
    for layer, forward in called:
        layer.forward = forward  # seen before the class's own; the module itself stays as it is
    try:
        yield
    finally:
        for layer, _ in called:
            del layer.forward


def _mounts(lives: Sequence[Live], dtype: torch.dtype) -> list[Mount]:
    """Adapters that are alike are put together too, for passes in which their clients have equally many tokens."""
    first = lives[0]
    alike = all((one.scale, one.starts, list(one.learning), one.grads.keys())
                == (first.scale, first.starts, list(first.learning), first.grads.keys()) for one in lives)  # fmt: skip
    apart = [_mount(live, dtype) for live in lives]
    if len(lives) == 1 or not alike or not first.learning:
        return apart
    values = {f: torch.stack([mount.values[f] for mount in apart]) for f in apart[0].values}
    grads = {f: torch.stack([mount.grads[f] for mount in apart]) for f in apart[0].grads}
    whole = Mount(first, values, grads)

    for at, mount in enumerate(apart):
        mount.whole = whole
        mount.values = {factor: flat[at] for factor, flat in values.items()}
        mount.grads = {factor: flat[at] for factor, flat in grads.items()}
    return apart


def _mount(live: Live, dtype: torch.dtype) -> Mount:
    values = {f: flat.to(live.device, dtype, copy=live.apart and f in live.grads) for f, flat in live.flats.items()}
    grads = {}
    for f in values.keys() & live.grads.keys():
        own, kind = live.grads[f], torch.float32 if f == "e" else dtype
        there = kind == own.dtype and not live.apart
        grads[f] = own if there else torch.zeros_like(own, dtype=kind, device=live.device)
    return Mount(live, values, grads)


def _head(mounts: Sequence[Mount], name: str, x: Tensor) -> Tensor:
    """Each client's head on its own rows."""
    parts = []
    for mount in mounts:
        if mount.place.rows is not None:
            weight, bias = mount.live.dense[f"{name}.weight"], mount.live.dense.get(f"{name}.bias")
            parts.append(functional.linear(x[mount.place.rows], weight, bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def trace(frozen: Frozen, device: str, bilevel: bool = False) -> tuple[Linear, ...]:
    """Every linear map of a pass as it is computed here, without an adapter, for the costs. bilevel: in bilevel steps."""
    with unmounted(frozen) if bilevel else mounted(frozen, [Live(1.0, device)]):
        return flow.trace(frozen.network, frozen.base, frozen.heads)


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
    sizes = layout(lengths, counts)[1] if frozen.packs else [int(lengths.max()) * count for count in counts]
    whole = mounts[0].whole
    together = whole is not None and len(steps) == len(mounts) and len(set(sizes)) == 1
    if whole is not None:
        whole.learns.tokens = slice(0, sum(sizes)) if together else None
    for mount in mounts:
        mount.place.tokens = mount.place.rows = mount.learns.tokens = None
    rows, tokens = 0, 0
    for (mount, _), count, taken in zip(steps, counts, sizes, strict=True):
        mount.place.rows, mount.place.tokens = slice(rows, rows + count), slice(tokens, tokens + taken)
        mount.learns.tokens = None if together else mount.place.tokens
        rows, tokens = rows + count, tokens + taken
    with begun:
        logits, labels = frozen.logits(encoded, every, device, counts)
    own = [int(encoded.predictions[batch].sum()) for batch in batches] if encoded.generates else counts
    return list(zip(torch.split(logits, own), torch.split(labels, own), strict=True))


def _begun(
    frozen: Frozen, prefixes: Sequence[Prefix], batches: Sequence[np.ndarray], lengths: np.ndarray, device: str
) -> AbstractContextManager[None]:
    """The pass over these batches begins with their states at the entrance of the lowest block with components."""
    with span("prefix"):
        states = torch.cat([prefix.states(batch) for prefix, batch in zip(prefixes, batches, strict=True)])
        counts = [len(batch) for batch in batches]
        return prefixes[0].blocks.starting(prefixes[0].at, laid(states, lengths, counts, frozen.packs, device))


def prefixes(
    frozen: Frozen, kept: Kept | None, mounts: Sequence[Mount], batches: Sequence[Iterable[np.ndarray]],
    updates: Sequence[Adapter], device: str,
) -> list[Prefix]:  # fmt: skip
    """What is frozen below the lowest block of the mounted adapters, of each; nothing where no pass begins there.

    batches: of each, the rows that are computed together where they are not kept. updates: of the base.
    """
    blocks, found = frozen.blocks, list[Prefix]()
    if kept is None or blocks is None:
        return found
    at = lowest([name for mount in mounts for name in mount.live.learning], blocks.modules)
    if at == min(blocks.modules):
        return found
    for mount, own in zip(mounts, batches, strict=True):
        state = xxhash.xxh3_128(digest(updates).encode())
        for name, part in mount.live.frozen.items():
            if lowest([name], blocks.modules) < at:
                state.update(f"{name} {mount.live.scale}".encode())
                for factor in (part.Bt, part.e, part.A):
                    state.update(b"" if factor is None else factor.numpy(force=True).tobytes())
        run = partial(_alone, frozen, kept.encoded, mount, mounts, device)
        found.append(Prefix(kept, blocks, at, chunked(own, at, state.hexdigest()), run, frozen.packs))
    return found


def _alone(
    frozen: Frozen, encoded: Encoded, mount: Mount, mounts: Sequence[Mount], device: str, rows: np.ndarray
) -> None:
    outputs(frozen, encoded, [(mount, rows)], mounts, device)
