"""Quantised bases: frozen weights held in 8 or 4 bits, written out for each product."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# What comes after the blocks: it learns, is drawn anew, or is too small to gain.
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "pooler", "embed_out")


class QuantisationError(ValueError):
    """A base that cannot be quantised as asked."""


def library(kind: str, device: str) -> str:
    return "torchao" if (kind, device) == ("int8", "cpu") else "bitsandbytes"


def version(kind: str, device: str) -> str:
    """Who quantises, for the record of what bits hang on."""
    if kind == "none":
        return kind
    return f"{kind} by {(package := library(kind, device))} {importlib.metadata.version(package)}"


def settings(kind: str, device: str) -> Any:
    """What transformers takes to quantise while it loads: torchao's int8 on a CPU, else bitsandbytes' int8 or 4-bit NormalFloat.

    QuantisationError where the library is not here.
    """
    package = library(kind, device)
    if missing := [name for name in (package, "accelerate") if importlib.util.find_spec(name) is None]:
        raise QuantisationError(
            f"model.quantise={kind} on {device} needs {' and '.join(missing)}: pip install 'fedrank[quantise]'"
        )
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(HEADS))
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(HEADS))
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=list(HEADS)
    )


def held(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer is quantised."""
    weight: Any = layer.weight
    return type(weight.data) is not Tensor or not weight.dtype.is_floating_point


def dense(layer: Any) -> Tensor:
    """(out, in), the weight of a quantised layer written out."""
    weight = layer.weight
    found: Tensor
    if type(weight.data) is not Tensor:  # torchao's
        found = weight.dequantize()
    elif (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        found = dequantize_4bit(weight.data, state)
    else:
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # a first pass moves them
        found = int8_vectorwise_dequant(weight.data, scales)
    return found


@cache
def sound(width: int) -> bool:
    """Whether weights of this many columns, in 4 bits, are written out right on this CPU, by a trial.

    With bitsandbytes 0.50 those that are no multiple of 64, its block, were not on CPUs with AVX-512; with AVX2 they are.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(8 * width, generator=torch.Generator().manual_seed(0))
    weight = (weight * torch.where(torch.arange(8 * width) // 64 % 2 == 0, 1.0, 0.1)).reshape(8, width)
    found = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    return bool((found - weight).norm() < 0.2 * weight.norm())


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of which one is made."""
    data: Any = tensor.detach()
    if type(data) is Tensor:
        yield data
    else:
        for name in data.__tensor_flatten__()[0]:
            yield from pieces(getattr(data, name))


def numbers(network: nn.Module) -> dict[int, int]:
    """How many numbers each parameter stands for, quantised or not, by its identity: shared ones are there once."""
    return {
        id(tensor): layer.in_features * layer.out_features
        if isinstance(layer, nn.Linear) and name == "weight"
        else tensor.numel()
        for layer in network.modules()
        for name, tensor in layer.named_parameters(recurse=False)
    }


def size(network: nn.Module) -> int:
    """Bytes of all that a network holds, each once."""
    tensors = {
        id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)
    }
    return sum(piece.nbytes for tensor in tensors.values() for piece in pieces(tensor))
