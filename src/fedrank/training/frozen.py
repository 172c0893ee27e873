"""The frozen base as it runs: its layers in groups; by trial, whether rows can be packed and a pass begin at a block."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedrank.trace import span
from fedrank.training import flow, packing, prefix, quantised
from fedrank.training.compute import DTYPES, LARGE, Apart, Compute, Product, matrix
from fedrank.training.models import Model, first_position
from fedrank.training.quantised import dense, held
from fedrank.training.tasks import Encoded

log = logging.getLogger(__name__)

# What a model raises that is built otherwise.
UNABLE = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(eq=False)
class Frozen:
    """A base model that computes in its own way. layers: the linear ones of its blocks, called through `groups`.

    groups: the names of layers that read one input, together. first: the position of a row's first token, where rows
    can be packed; None: they are padded. blocks: None where a forward pass cannot begin at one of them. copied: weights
    that are not quantised are copied to be faster.
    """

    network: nn.Module
    base: Any
    layers: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    groups: tuple[tuple[str, ...], ...]
    compute: Compute
    first: int | None
    blocks: prefix.Blocks | None
    copied: bool = True
    products: dict[tuple[str, ...], Product | Apart] = field(default_factory=dict)
    updated: dict[tuple[str, ...], Product | Apart] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # those that `updated` was made of

    @property
    def packs(self) -> bool:
        return self.first is not None

    def unread(self, network: nn.Module) -> Iterator[Tensor]:
        """The parameters of the model that this was made of which passes have copies of in the type that they compute in."""
        read = {id(layer.weight) for layer in self.layers.values() if not self._twin(layer)}
        for tensor in network.parameters():
            apart = type(tensor.data) is Tensor and tensor.is_floating_point() and tensor.dtype != self.dtype
            if apart and id(tensor) not in read:
                yield tensor

    def _twin(self, layer: nn.Module) -> bool:
        """Whether there is a copy of its weight in the type that is computed in; of a large model not if that is wider."""
        weight: Any = layer.weight
        if held(layer) or weight.dtype == self.dtype:
            return False
        return self.copied or bool(weight.dtype.itemsize > self.dtype.itemsize)

    @property
    def size(self) -> int:
        """Bytes that its weights take: those that passes go through, with copies that are made to be faster."""
        total, number = quantised.size(self.network), self.dtype.itemsize
        for names in self.groups:
            layers = [self.layers[name] for name in names]
            if any(map(held, layers)):
                continue
            weights = sum(matrix(layer).numel() for layer in layers)
            lies = not any(map(self._twin, layers))
            packed = 2 * (self.compute.products == "onednn")  # one for each way
            joined = self.copied and (len(layers) > 1 or isinstance(layers[0], Conv1D))
            total += weights * number * (packed or joined or not lies)
            total -= 0 if lies else sum(matrix(layer).nbytes for layer in layers)  # `unread`
        return total

    def shared(self, other: "Frozen") -> int:
        """Bytes of the weights of one model that passes of both read as they lie."""
        both = [
            layer
            for name, layer in self.layers.items()
            if not self._twin(layer) and not other._twin(other.layers[name])
        ]
        return sum(map(quantised.size, [*both, *self.heads.values()]))

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute.dtype]

    def ready(self) -> None:
        """Make all products now, before other processes share them."""
        for names in self.groups:
            self.product(names).turn()

    def logits(
        self, encoded: Encoded, rows: np.ndarray, device: str, counts: Sequence[int] = (), twice: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The network's logits of these rows, packed where it can be, and their labels. counts: each client's rows.

        twice: they are to be differentiated twice.
        """
        counts = counts or [len(rows)]
        if self.first is None:
            with span("data"):
                inputs, labels = encoded.batch(rows, device)
            with span("forward"):
                return self.network(**inputs), labels
        with span("data"):
            inputs, labels = encoded.packed(rows, counts, self.first, device)
            packed = packing.pack(encoded.lengths[rows], counts, device, twice)
        with span("forward"), packing.attention(self.base, packed):
            return self.network(**inputs, packed=packed), labels

    def product(self, names: tuple[str, ...], weights: Mapping[str, Tensor] = {}) -> Product | Apart:
        """Of the layers of one group, with other weights in their places where given; those of the last mapping are kept.

        weights: as the layers hold their own.
        """
        if self.weights is not weights and weights:
            self.weights, self.updated = weights, {}
        kept = self.updated if any(name in weights for name in names) else self.products
        if names not in kept:
            layers = [self.layers[name] for name in names]
            biases = [layer.bias if isinstance(layer.bias, Tensor) else None for layer in layers]
            if self.copied and not any(map(held, layers)):
                own = [matrix(layer, weights.get(name)) for name, layer in zip(names, layers, strict=True)]
                kept[names] = Product(own, biases, self.compute)
            else:
                given = [self._weight(layer, weights.get(name)) for name, layer in zip(names, layers, strict=True)]
                kept[names] = Apart(given, [flow.sizes(layer)[0] for layer in layers], biases, self.dtype)
        return kept[names]

    def _weight(self, layer: nn.Module, weight: Tensor | None) -> Callable[[], Tensor]:
        if held(layer):
            return partial(dense, layer)
        there = matrix(layer, weight)
        if self._twin(layer):
            there = there.to(self.dtype)
        return lambda: there  # else written out for each product, where it is narrower


def freeze(model: Model, compute: Compute, device: str) -> Frozen:
    """The model as it computes: itself in float32, else a copy of all but its linear layers' weights."""
    paths = {module: path for path, module in model.network.named_modules()}
    inside = [linear for linear in model.spec.flow if flow.block(linear.name) is not None]
    layers = {linear.name: model.base.get_submodule(linear.name) for linear in inside}
    groups = [tuple(linear.name for linear in group) for _, group in groupby(inside, lambda it: (it.block, it.stage))]
    network, apart = model.network, {id(tensor) for head in model.heads.values() for tensor in head.parameters()}
    others = [tensor for tensor in network.parameters() if tensor.is_floating_point() and id(tensor) not in apart]
    if any(tensor.dtype != DTYPES[compute.dtype] for tensor in others):
        network = _converted(network, [*layers.values(), *model.heads.values()], DTYPES[compute.dtype])
    there = {name: network.get_submodule(paths[layer]) for name, layer in (layers | model.heads).items()}
    heads = {name: there.pop(name) for name in model.heads}
    base = network.get_submodule(paths[model.base])
    if (blocks := _blocks(model, list(layers), device)) is not None:
        stem = tuple(network.get_submodule(paths[module]) for module in blocks.stem)
        blocks = prefix.Blocks(prefix.blocks(base, list(there)), blocks.tuples, stem)
    # A large one's weights are not held twice, unless the way to compute asks for it.
    copied = model.spec.parameters < LARGE or compute.products == "onednn"
    groups = list(dict.fromkeys(groups))  # blocks that share their weights are one
    return Frozen(network, base, there, heads, tuple(groups), compute, _first(model, device), blocks, copied)


def _trial(model: Model) -> Encoded:
    """Three rows of different lengths, without padding's ids."""
    own = model.base.config.get_text_config().pad_token_id
    padding = [pad for pad in (model.tokenizer.pad_token_id, own) if pad is not None]
    ids = np.setdiff1d(np.arange(13, dtype=np.int32), padding)[-10:]
    return Encoded({"input_ids": ids}, np.array([0, 2, 7, 10]), np.zeros(3, np.int64), {"input_ids": 0})


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != torch.float32:
        return float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _blocks(model: Model, names: Sequence[str], device: str) -> prefix.Blocks | None:
    """The blocks of these layers; None where a trial that begins at one of them is not what a whole pass is."""
    modules, inputs = prefix.blocks(model.base, names), _trial(model).batch(np.arange(3), device)[0]
    order, tuples, first, last = list[nn.Module](), list[bool](), modules[min(modules)], modules[max(modules)]
    dropouts = [module for module in model.network.modules() if isinstance(module, nn.Dropout)]
    watch = [module.register_forward_pre_hook(lambda it, _: order.append(it)) for module in (*dropouts, first)]
    watch.append(last.register_forward_hook(lambda it, _, output: tuples.append(isinstance(output, tuple))))
    with torch.inference_mode():
        try:
            expected = model.network(**inputs)
        finally:
            for handle in watch:
                handle.remove()
        try:
            blocks = prefix.Blocks(modules, tuples[0], order[: order.index(first)])
            for at in list(modules)[len(modules) // 2 :: max(1, len(modules) // 4)]:
                states = blocks.entering(at, lambda: model.network(**inputs))
                if states.shape != (*inputs["input_ids"].shape, model.base.config.get_text_config().hidden_size):
                    raise ValueError(f"block {at} is given {tuple(states.shape)}")
                with blocks.starting(at, states.clone()):
                    if not _alike(model.network(**inputs), expected):
                        raise ValueError(f"a pass that begins at block {at} gives something else")
        except UNABLE as error:
            log.info("no pass begins above frozen blocks: %s: %s", type(error).__name__, error)
            return None
    return blocks


def _first(model: Model, device: str) -> int | None:
    """The position that a packed row's first token must be given for the model to compute as with padded rows.

    None where that cannot be had: its pooling reads a fixed place, its attention cannot be replaced, or a trial fails.
    A GPU's own attention is faster than what packing saves.
    """
    able = (
        getattr(model.base, "_supports_attention_backend", False)
        and "position_ids" in signature(model.base.forward).parameters
    )
    if device != "cpu" or not able or (model.task != "generate" and model.pooling != "mean"):
        return None
    rows = _trial(model)
    packed = packing.pack(rows.lengths, [3], device)
    with torch.inference_mode():
        inputs = rows.batch(np.arange(3), device)[0]
        expected = model.network(**inputs)
        if model.task == "generate":
            expected = expected[inputs["attention_mask"].bool()]
        why = "they give something else"
        for first in sorted({0, first_position(model.base)}):
            try:
                with packing.attention(model.base, packed):
                    found = model.network(**rows.packed(np.arange(3), [3], first, device)[0], packed=packed)
            except UNABLE as error:
                why = f"{type(error).__name__}: {error}"
                continue
            found = found[0, : rows.starts[-1]] if model.task == "generate" else found
            if _alike(found, expected):
                return first
    log.info("rows are padded, not packed: %s", why)
    return None


def _converted(network: nn.Module, kept: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module:
    """A copy in this type, which shares the parameters of the layers that are kept as they are.

    As where transformers loads in a type: what a state does not hold, such as rotary frequencies, is not rounded.
    """
    shared = {id(parameter): parameter for layer in kept for parameter in layer.parameters()}
    states = {id(state): state for layer in kept if (state := getattr(layer, "state", None)) is not None}  # of 8 bits
    twin = copy.deepcopy(network, {**shared, **states})
    held = {id(tensor) for tensor in twin.state_dict(keep_vars=True).values()} - shared.keys()
    twin._apply(  # type: ignore[no-untyped-call]
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() and id(tensor) in held else tensor
    )
    return twin
