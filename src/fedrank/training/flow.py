"""The flow of a model: every linear map of one traced forward pass, in the order of execution, for the costs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedrank.protocol import Attention, Linear

ROWS, LENGTH = 2, 4  # of the traced batch

Role = Literal["query", "key", "value", "fused", ""]
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("query", "query_proj", "q_proj", "q_lin"), "query"),
    **dict.fromkeys(("key", "key_proj", "k_proj", "k_lin"), "key"),
    **dict.fromkeys(("value", "value_proj", "v_proj", "v_lin"), "value"),
}


def block(name: str) -> int | None:
    """The index of the transformer block: the first number in the name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.shape[1], weight.shape[0]) if isinstance(module, Conv1D) else (weight.shape[0], weight.shape[1])


def attention(base: Any) -> Attention:
    """The heads of a Hugging Face model's blocks, by its config."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    head = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return Attention(heads * head, heads)


def trace(network: nn.Module, base: Any, heads: Mapping[str, nn.Module]) -> tuple[Linear, ...]:
    """Every linear map that a forward pass of `network` runs through, named as in `base` or `heads`.

    Products that are no modules of their own are not seen: XLNet's attention, rotary positions.
    """
    names = {module: name for name, module in base.named_modules()} | {layer: name for name, layer in heads.items()}
    known = storages(network)
    found: list[Linear] = []
    stages: list[Tensor] = []  # the inputs of the block so far: held, so that no later tensor takes their place
    passed: set[str] = set()  # the maps of the block so far

    def ran(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], _: Tensor) -> None:
        name, (out, in_), x = names[module], sizes(module), next(iter((*inputs, *named.values())))
        at, before = block(name), found[-1].block if found else -1
        where = at if at is not None else -1 if before < 0 else 1 + max(map.block for map in found if _inside(map))
        if where != before or name in passed:  # blocks that share weights run again
            stages.clear()
            passed.clear()
        passed.add(name)
        if not any(x is known for known in stages):
            stages.append(x)
        stage = next(n for n, known in enumerate(stages) if x is known)
        role = ROLES.get(name.rpartition(".")[2], "") if at is not None else ""
        found.append(Linear(name, out, in_, where, stage, role, x.numel() // in_ == ROWS))

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if found and storage._cdata not in known:
            known.add(storage._cdata)
            found[-1] = replace(found[-1], kept=found[-1].kept + storage.nbytes() / (ROWS * LENGTH))
        return tensor  # held by the graph, so that no later storage takes its place

    layers = [module for module in network.modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [layer.register_forward_hook(ran, with_kwargs=True) for layer in layers]
    padding = base.config.pad_token_id
    ids = torch.full((ROWS, LENGTH), 0 if padding else 1, device=next(network.parameters()).device)
    try:
        with _differentiable(base), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # A decoder's head reads the tokens before a label only: here one in each row.
            last = {} if heads else {"at": torch.arange(LENGTH - 1, ROWS * LENGTH, LENGTH, device=ids.device)}
            network(input_ids=ids, attention_mask=torch.ones_like(ids), **last).log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_fed(map, found) for map in found)


def storages(network: nn.Module) -> set[int]:
    """Where a network's tensors are.

    Not those of its state_dict: bitsandbytes writes states of 4 bits there that are gone at once, and a later tensor
    takes their place.
    """
    return {tensor.untyped_storage()._cdata for tensor in chain(network.parameters(), network.buffers())}


def _inside(map: Linear) -> bool:
    return block(map.name) is not None


def _fed(map: Linear, found: list[Linear]) -> Linear:
    """With its role where one map is query, key and value; what attention keeps is reckoned apart, by its shape."""
    if not map.role and map.stage == 0 and _inside(map):
        apart = any(other.role for other in found if other.block == map.block)
        map = map if apart else replace(map, role="fused")
    return replace(map, kept=0.0) if map.role or map.rows else map


@contextmanager
def _differentiable(base: Any) -> Iterator[None]:
    """A forward pass here records what its backward pass would need: as if everything below learnt."""
    table = base.get_input_embeddings().weight
    before = table.requires_grad
    table.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        table.requires_grad_(before)
