"""Adapters as forward hooks on a frozen model: tensors live outside it, unmounting leaves it bit for bit as it was."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedrank.adapter import FACTORS, Adapter, Block, split
from fedrank.training.compute import Increment


@dataclass(eq=False)
class Part:
    """Some components of one module on the device. Bt: (r, out), e: (r,) or None, A: (r, in)."""

    Bt: Tensor
    e: Tensor | None
    A: Tensor

    def add(self, x: Tensor, output: Tensor, scale: float) -> Tensor:
        """output + scale * B diag(e) A x, over the last axis, in the output's type."""
        A, Bt = self.A.to(output.dtype), self.Bt.to(output.dtype)
        weight = scale if self.e is None else (self.e * scale).to(output.dtype)
        hidden = functional.linear(x.to(output.dtype), A) * weight
        rows = output.reshape(-1, output.shape[-1])
        return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), Bt).view(output.shape)


@dataclass(eq=False)
class Live:
    """An adapter on the device, ready to mount.

    values, grads: factor (and "h.<name>") -> one flat tensor of what learns, in module and id order;
    the parts' tensors are views of them, so an optimizer sees a handful of tensors. learning: the parts
    in which something may learn, by module, in module order; flats: factor -> all their numbers in one tensor,
    starts: where in it each part's begin. frozen: the other parts. apart: the factors that learn are in the memory of the
    host, and layers see a copy.
    """

    scale: float
    device: str
    apart: bool = False
    learning: dict[str, Part] = field(default_factory=dict)
    frozen: dict[str, Part] = field(default_factory=dict)
    flats: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def learn(self, factor: str, flat: np.ndarray) -> Tensor:
        device = "cpu" if self.apart and factor in FACTORS else self.device
        value = torch.tensor(flat, dtype=torch.float32, device=device)
        value.grad = torch.zeros_like(value)
        self.values[factor], self.grads[factor] = value, value.grad
        return value

    def bind(self, values: Iterable[Tensor]) -> None:
        """Let the forward pass see these flat tensors, given in the order of `values`; gradients flow into them."""
        for name, flat in zip(self.values, values, strict=True):
            if name.startswith("h."):
                self.dense[name[2:]] = flat.view(self.dense[name[2:]].shape)
                continue
            factor = "Bt" if name == "B" else name
            shapes = [getattr(part, factor).shape for part in self.learning.values()]
            pieces = torch.split(flat, [shape.numel() for shape in shapes])  # one node of the graph, not one per piece
            for part, piece, shape in zip(self.learning.values(), pieces, shapes, strict=True):
                setattr(part, factor, piece.view(shape))

    def export(self, like: Adapter) -> Adapter:
        """The learnt values in the shape of `like`, all else as it is there."""
        flat = {name: value.cpu().numpy() for name, value in self.values.items()}
        rows = {f: iter(_pieces(flat[f], like, f)) for f in FACTORS if f in flat}
        blocks = {}
        for name, block in like.blocks.items():
            new = {f: next(rows[f]) if f in rows else part for f, part in block.rows.items()}
            blocks[name] = Block.of(block.ids, new)
        dense = {n: flat[f"h.{n}"].reshape(t.shape) if f"h.{n}" in flat else t for n, t in like.dense.items()}
        return Adapter(blocks, like.scale, dense)


def live(train: Adapter, frozen: Adapter, learn: str, device: str, apart: bool = False) -> Live:
    """The components of `train`, of which the factors in `learn` get gradients, and those of `frozen`."""
    result = Live(train.scale, device, apart)
    views: dict[str, list[Tensor | None]] = {}
    for f in FACTORS:
        if f not in train.factors:
            views[f] = [None] * len(train.blocks)
            continue
        present = [block.rows[f] for block in train.blocks.values()]
        flat = np.concatenate([part.reshape(-1) for part in present])
        shapes = [part.shape for part in present]
        if f in learn:
            value = result.learn(f, flat)
            views[f] = list(_leaves(value, shapes))
        else:
            value = torch.tensor(flat, dtype=torch.float32, device=device)
            views[f] = [part.view(shape) for part, shape in _cut(value, shapes)]
        result.flats[f], result.starts[f] = value, [0, *accumulate(part.size for part in present)]
    for at, name in enumerate(train.blocks):
        result.learning[name] = _part(name, views["B"][at], views["e"][at], views["A"][at])
    for name, block in frozen.blocks.items():
        there = {f: torch.tensor(part, dtype=torch.float32, device=device) for f, part in block.rows.items()}
        result.frozen[name] = _part(name, *map(there.get, FACTORS))
    for name, tensor in {**frozen.dense, **train.dense}.items():
        if "h" in learn:
            result.dense[name] = _leaves(result.learn(f"h.{name}", tensor.reshape(-1)), [tensor.shape])[0]
        else:
            result.dense[name] = torch.tensor(tensor, dtype=torch.float32, device=device)
    return result


def _part(name: str, bt: Tensor | None, e: Tensor | None, a: Tensor | None) -> Part:
    if bt is None or a is None:
        raise ValueError(f"module {name!r}: the forward pass needs both B and A")
    return Part(bt, e, a)


def _cut(flat: Tensor, shapes: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    at = 0
    for shape in shapes:
        size = int(np.prod(shape))
        yield flat[at : at + size], shape
        at += size


def _leaves(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Views of a flat tensor as leaves whose gradients accumulate in the flat gradient."""
    assert flat.grad is not None
    leaves = []
    pieces = zip(_cut(flat.detach(), shapes), _cut(flat.grad, shapes), strict=True)
    for (value, shape), (grad, _) in pieces:
        leaf = value.view(shape).requires_grad_()
        leaf.grad = grad.view(shape)
        leaves.append(leaf)
    return leaves


def _pieces(flat: np.ndarray, like: Adapter, factor: str) -> list[np.ndarray]:
    shapes = [block.rows[factor].shape for block in like.blocks.values()]
    parts = split(flat, (int(np.prod(shape)) for shape in shapes))
    return [part.reshape(shape).copy() for part, shape in zip(parts, shapes, strict=True)]


def incremented(modules: Mapping[str, nn.Module], updates: Iterable[Adapter]) -> dict[str, Tensor]:
    """New weights: the modules' own with the increments of base updates (factors or whole) added, in their order."""
    result: dict[str, Tensor] = {}
    for update in updates:
        for name in (*update.blocks, *update.dense):
            weight = result.get(name, _weight(modules[name]))
            new = partial(torch.tensor, dtype=weight.dtype, device=weight.device)
            if name in update.dense:
                delta = new(update.dense[name])
            else:
                block = update.blocks[name]
                delta = update.scale * (new(block.B if block.e is None else block.B * block.e) @ new(block.A))
            result[name] = weight + (delta.T if isinstance(modules[name], Conv1D) else delta)  # Conv1D: (in, out)
    return result


@contextmanager
def swapped(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in these modules while the block runs; their own are put back, not computed back."""
    own = {name: _weight(modules[name]).data for name in weights}
    try:
        for name, weight in weights.items():
            _weight(modules[name]).data = weight
        yield
    finally:
        for name, weight in own.items():
            _weight(modules[name]).data = weight


def increments(modules: Mapping[str, nn.Module], updates: Iterable[Adapter]) -> dict[str, list[Increment]]:
    """Base updates as what is added to each module's product, for weights that cannot hold them exactly."""
    result: dict[str, list[Increment]] = {}
    for update in updates:
        for name, block in update.blocks.items():
            new = partial(torch.tensor, dtype=torch.float32, device=_weight(modules[name]).device)
            scaled = block.B if block.e is None else block.B * block.e
            result.setdefault(name, []).append(Increment(update.scale, new(block.A), new(scaled).T))
        for name, whole in update.dense.items():
            delta = torch.tensor(whole, dtype=torch.float32, device=_weight(modules[name]).device)
            result.setdefault(name, []).append(Increment(1.0, None, delta.T))
    return result


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def mounted(modules: Mapping[str, nn.Module], heads: Mapping[str, nn.Module], adapter: Live) -> Iterator[None]:
    """The adapter on the model while the block runs. heads: name of a dense linear layer -> the layer."""
    parts = [*adapter.learning.items(), *adapter.frozen.items()]
    hooks = [(modules[name], partial(_add, part, adapter.scale)) for name, part in parts]
    if adapter.dense:
        hooks += [(layer, partial(_replace, adapter.dense, name)) for name, layer in heads.items()]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(part: Part, scale: float, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return part.add(inputs[0], output, scale)


def _replace(
    dense: Mapping[str, Tensor], name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    return functional.linear(inputs[0], dense[f"{name}.weight"], dense.get(f"{name}.bias"))
