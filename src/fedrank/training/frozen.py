"""The frozen base as it computes: the type and the library of its matrix products, chosen by measuring them here."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedrank.training import flow
from fedrank.training.models import Model

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ROWS = 256  # of the products that are measured: a batch of short texts
SMALL = 2**16  # weights of fewer numbers gain nothing
GAIN = {"bfloat16": 1.4, "onednn": 1.2}  # how much faster it has to be to be chosen: well above a measurement's noise


class Compute(NamedTuple):
    """dtype: of activations and of products with frozen weights. library: whose products these are."""

    dtype: str
    library: str


def onednn() -> bool:
    """Whether torch's own entry to oneDNN's linear layer is here; Inductor uses the same one."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def choose(layers: Iterable[nn.Module], device: str, threads: int, dtype: str = "auto", library: str = "auto") -> Compute:
    """The fastest way on this machine to compute these layers; what is not "auto" is kept.

    On a CPU all ways are measured, on the layers' largest weight. A GPU computes in bfloat16 where it has units for it.
    ValueError where a library is asked for that is not here.
    """
    if library == "onednn" and (device != "cpu" or not onednn()):
        raise ValueError(f"onednn is not to be had on {device} with torch {torch.__version__}; auto or torch is")
    dtypes = [kind for kind in DTYPES if dtype in ("auto", kind)]
    libraries = [whose for whose in ("torch", "onednn") if library in ("auto", whose)]
    weight = max((_matrix(layer) for layer in layers), key=Tensor.numel)
    if device != "cpu":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
        return Compute("bfloat16" if units and "bfloat16" in dtypes else dtypes[0], "torch")
    if weight.numel() < SMALL or not onednn():
        libraries = libraries[:1]
    if weight.numel() < SMALL:
        dtypes = dtypes[:1]
    options = [Compute(kind, whose) for kind in dtypes for whose in libraries]
    if len(options) == 1:
        return options[0]
    seconds = _seconds(options, weight, threads)
    best = options[0]
    for option in options[1:]:
        gain = GAIN[option.dtype if option.dtype != best.dtype else option.library]
        if seconds[option] * gain < seconds[best]:
            best = option
    return best


def _seconds(options: Sequence[Compute], weight: Tensor, threads: int) -> dict[Compute, float]:
    """The shortest of several products for each option, in turns."""
    x, before = torch.ones(ROWS, weight.shape[1]), torch.get_num_threads()
    works = {option: (Product([weight], [None], option), x.to(DTYPES[option.dtype])) for option in options}
    found = dict.fromkeys(options, float("inf"))
    torch.set_num_threads(threads)
    try:
        for _ in range(8):
            for option, (product, rows) in works.items():
                started = time.perf_counter()
                product.forward(rows)
                found[option] = min(found[option], time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return found


class Product:
    """The product with one frozen weight, or with several that read the same input: (rows, in) -> (rows, out)."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], compute: Compute) -> None:
        self.compute, self.dtype = compute, DTYPES[compute.dtype]
        self.outs = [len(weight) for weight in weights]
        self.weights = weights
        with torch.inference_mode(False), torch.no_grad():
            whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
            zeros = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            self.bias = None if all(b is None for b in biases) else torch.cat(zeros).to(self.dtype)
            self.weight = self._packed(whole)
        self._across: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)"""
        if self.compute.library == "torch":
            return grad @ self.weight
        if self._across is None:  # packed the other way round, where a backward pass gets here
            with torch.inference_mode(False), torch.no_grad():
                whole = self.weights[0] if len(self.weights) == 1 else torch.cat(list(self.weights))
                self._across = self._packed(whole.t())
        return self.product(grad, self._across)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b by the chosen library."""
        if self.compute.library == "torch":
            return functional.linear(x, weight, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found

    def _packed(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.dtype).contiguous()
        if self.compute.library == "torch":
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed


@dataclass(eq=False)
class Frozen:
    """A base model that computes in its own way. layers: the linear ones of its blocks, called through `groups`.

    groups: the names of layers that read one input, together.
    """

    network: nn.Module
    layers: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    groups: tuple[tuple[str, ...], ...]
    compute: Compute
    products: dict[tuple[str, ...], Product] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute.dtype]

    def product(self, names: tuple[str, ...], weights: Mapping[str, Tensor] = {}) -> Product:
        """Of the layers of one group, with other weights in their places where given."""
        layers = [self.layers[name] for name in names]
        biases = [layer.bias if isinstance(layer.bias, Tensor) else None for layer in layers]
        if any(name in weights for name in names):
            own = [weights.get(name, _matrix(layer)) for name, layer in zip(names, layers, strict=True)]
            return Product(own, biases, self.compute)
        if names not in self.products:
            self.products[names] = Product([_matrix(layer) for layer in layers], biases, self.compute)
        return self.products[names]


def freeze(model: Model, compute: Compute) -> Frozen:
    """The model as it computes: itself in float32, else a copy of all but its linear layers' weights."""
    paths = {module: path for path, module in model.network.named_modules()}
    inside = [linear for linear in model.spec.flow if flow.block(linear.name) is not None]
    layers = {linear.name: model.base.get_submodule(linear.name) for linear in inside}
    groups = [tuple(linear.name for linear in group) for _, group in groupby(inside, lambda it: (it.block, it.stage))]
    network = model.network
    if compute.dtype != "float32":
        network = _converted(network, [*layers.values(), *model.heads.values()], DTYPES[compute.dtype])
    there = {name: network.get_submodule(paths[layer]) for name, layer in (layers | model.heads).items()}
    heads = {name: there.pop(name) for name in model.heads}
    return Frozen(network, there, heads, tuple(groups), compute)


def _converted(network: nn.Module, kept: Iterable[nn.Module], dtype: torch.dtype) -> nn.Module:
    """A copy in this type, which shares the parameters of the layers that are kept as they are."""
    shared = {id(parameter): parameter for layer in kept for parameter in layer.parameters()}
    twin = copy.deepcopy(network, dict(shared))
    for module in twin.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None and id(tensor) not in shared and tensor.is_floating_point():
                    new = tensor.detach().to(dtype)
                    owned[name] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
    return twin


def _matrix(layer: nn.Module) -> Tensor:
    """(out, in)"""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach()
