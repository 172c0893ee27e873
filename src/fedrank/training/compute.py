"""The type and the library of matrix products with frozen weights, chosen by measuring them here."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedrank.training.flow import sizes
from fedrank.training.quantised import held

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ROWS = 256  # of the products that are measured: a batch of short texts
SMALL = 2**16  # weights of fewer numbers gain nothing
LARGE = 100_000_000  # parameters: from here on weights are used as they lie in memory, and not copied to be faster
GAIN = {"bfloat16": 1.4, "onednn": 1.2}  # how much faster it has to be to be chosen: well above a measurement's noise


class Compute(NamedTuple):
    """dtype: of activations and of products with frozen weights. products: whose library computes these."""

    dtype: str
    products: str


def free_bytes(device: str) -> int:
    """Of a GPU's memory."""
    return int(torch.cuda.mem_get_info(device)[0])


def onednn(dtype: str = "float32") -> bool:
    """Whether torch's own entry to oneDNN's linear layer is here for this type; Inductor uses the same one."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    here = available and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return here and (dtype == "float32" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def choose(
    layers: Iterable[nn.Module], device: str, threads: int, dtype: str = "auto", library: str = "auto", parameters: int = 0
) -> Compute:  # fmt: skip
    """The fastest way on this machine to compute these layers; what is not "auto" is kept.

    On a CPU they are measured, on the layers' largest weight; torch gives bfloat16 to oneDNN in any case, but has it pack
    the weight for every product. A GPU computes in bfloat16 where it has units for it, and so do weights that are held in
    bfloat16; a CPU without AVX-512 takes ten times as long for it as for float32. parameters: of the model; a large one's
    weights are not packed unless onednn is asked for by name. ValueError where a library is asked for that is not here.
    """
    layers = list(layers)
    if dtype == "auto" and device == "cpu" and not onednn("bfloat16"):
        dtype = "float32"
    if dtype == "auto" and any(layer.weight.dtype == torch.bfloat16 for layer in layers):
        dtype = "bfloat16"
    if library == "auto" and parameters >= LARGE:
        library = "torch"
    kind = "float32" if dtype == "auto" else dtype
    if library == "onednn" and (device != "cpu" or not onednn(kind)):
        raise ValueError(
            f"onednn is not to be had for {kind} on this {device} with torch {torch.__version__}; auto or torch is"
        )
    dtypes = [kind for kind in DTYPES if dtype in ("auto", kind)]
    libraries = [whose for whose in ("torch", "onednn") if library in ("auto", whose)]
    largest = max(layers, key=lambda layer: math.prod(sizes(layer)))
    weight = torch.empty(sizes(largest)) if held(largest) else matrix(largest)
    if device != "cpu":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
        return Compute("bfloat16" if units and "bfloat16" in dtypes else dtypes[0], "torch")
    if weight.numel() < SMALL or not onednn(dtypes[-1]):
        libraries = libraries[:1]
    if weight.numel() < SMALL:
        dtypes = dtypes[:1]
    options = [
        Compute(kind, whose) for kind in dtypes for whose in (libraries[-1:] if kind == "bfloat16" else libraries)
    ]
    if len(options) == 1:
        return options[0]
    seconds = _seconds(options, weight, threads)
    best = options[0]
    for option in options[1:]:
        gain = GAIN[option.dtype if option.dtype != best.dtype else option.products]
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

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        return self.product(x, self.weight, self.bias if bias else None)

    def backward(self, grad: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)"""
        if self.compute.products == "torch":
            return grad @ self.weight
        self.turn()
        assert self._across is not None
        return self.product(grad, self._across)

    def turn(self) -> None:
        """Have the weight the other way round too, as a backward pass that gets here needs it."""
        if self._across is None and self.compute.products != "torch":
            with torch.inference_mode(False), torch.no_grad():
                whole = self.weights[0] if len(self.weights) == 1 else torch.cat(list(self.weights))
                self._across = self._packed(whole.t())

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b by the chosen library."""
        if self.compute.products == "torch":
            return functional.linear(x, weight, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found

    def _packed(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.dtype).contiguous()
        if self.compute.products == "torch":
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed


class Apart:
    """The same, of weights that are not copied: as they lie in memory, or, quantised, written out for every product.

    weights: what gives each of them, (out, in).
    """

    def __init__(
        self, weights: Sequence[Callable[[], Tensor]], outs: Sequence[int], biases: Sequence[Tensor | None], dtype: torch.dtype
    ) -> None:  # fmt: skip
        self.weights, self.outs, self.dtype = weights, list(outs), dtype
        self.biases = [None if bias is None else bias.detach().to(dtype) for bias in biases]

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        pairs = zip(self.weights, self.biases, strict=True)
        made = [functional.linear(x, weight().to(self.dtype), own if bias else None) for weight, own in pairs]
        return made[0] if len(made) == 1 else torch.cat(made, 1)

    def backward(self, grad: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)"""
        first, *rest = zip(torch.split(grad, self.outs, 1), self.weights, strict=True)
        found = first[0] @ first[1]().to(self.dtype)
        for part, weight in rest:
            found.addmm_(part, weight().to(self.dtype))
        return found

    def turn(self) -> None: ...

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)


class Increment(NamedTuple):
    """A base update of one layer: scale * (x A^T) Bt, or, without A, x Bt. A: (r, in). Bt: (r, out) or (in, out)."""

    scale: float
    A: Tensor | None
    Bt: Tensor


class Beside:
    """A product with increments that its weights do not hold. increments: of each of its layers."""

    def __init__(self, inner: "Product | Apart", increments: Sequence[Sequence[Increment]]) -> None:
        self.inner, self.outs, self.dtype = inner, inner.outs, inner.dtype
        self.product, self.turn = inner.product, inner.turn
        ends = np.cumsum(self.outs).tolist()
        self.increments = [
            (slice(end - out, end), one) for end, out, own in zip(ends, self.outs, increments, strict=True) for one in own
        ]  # fmt: skip

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        y = self.inner.forward(x, bias)
        for at, (scale, A, Bt) in self.increments:
            y[:, at].addmm_(x if A is None else x @ A.to(self.dtype).T, Bt.to(self.dtype), alpha=scale)
        return y

    def backward(self, grad: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)"""
        down = self.inner.backward(grad)
        for at, (scale, A, Bt) in self.increments:
            back = grad[:, at] @ Bt.to(self.dtype).T
            down.add_(back, alpha=scale) if A is None else down.addmm_(back, A.to(self.dtype), alpha=scale)
        return down


def matrix(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """(out, in) of the layer's weight, or of another one as it would hold it."""
    held = layer.weight if weight is None else weight
    assert isinstance(held, Tensor)
    return held.detach().t() if isinstance(layer, Conv1D) else held.detach()
