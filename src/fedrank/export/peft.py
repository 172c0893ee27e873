"""Adapters in PEFT's format: written, and read to start a run from."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedrank.adapter import Adapter, Block, recompress
from fedrank.products import Increment
from fedrank.protocol import Method, State
from fedrank.store import StoreError, write
from fedrank.told import last

log = logging.getLogger(__name__)

PREFIX, HEAD = "base_model.model.", "head.safetensors"


def write_peft(out: Path, adapter: Adapter, model: Mapping[str, Any], drawn: Path | None) -> None:
    """Write an adapter, e folded into B; modules without components are left out, ranks and alphas go module by module.

    model: what the run knows of its base. drawn: a file of layers that the base's own files lack. A head on mean pooling
    is no part of the base model: it is written beside, as head.safetensors. Every module has alpha / rank = the scale, the
    largest rank too, so that readers which know of no pattern (older vLLM) scale all of them right.
    """
    ranks, scale = {name: block.rank for name, block in adapter.blocks.items()}, adapter.scale
    top = max(ranks.values())
    inside = model["task"] == "classify" and model["pooling"] != "mean"
    head = {n: np.ascontiguousarray(t) for n, t in adapter.dense.items()}
    if inside and drawn is not None:
        head |= load_file(drawn)
    heads = sorted({name.rpartition(".")[0] for name in head}) if inside else []
    kind = "CAUSAL_LM" if model["task"] == "generate" else "SEQ_CLS" if inside else "FEATURE_EXTRACTION"
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": kind, "base_model_name_or_path": model["source"], "r": top,
        "lora_alpha": scale * top, "rank_pattern": {n: r for n, r in ranks.items() if r != top},
        "alpha_pattern": {n: scale * r for n, r in ranks.items() if r != top}, "target_modules": list(ranks),
        "fan_in_fan_out": model["conv1d"], "use_rslora": False, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True, "modules_to_save": heads or None,
    }  # fmt: skip
    tensors = {}
    for name, block in adapter.blocks.items():
        assert block.B is not None
        assert block.A is not None
        b = block.B if block.e is None else block.B * block.e
        tensors[f"{PREFIX}{name}.lora_A.weight"] = block.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b)
    if inside:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in head.items()}
    elif head:
        write(out / HEAD, save(head))
    write(out / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write(out / "adapter_config.json", json.dumps(settings, indent=1).encode())


def read_peft(folder: Path) -> Adapter:
    """A PEFT LoRA adapter. StoreError where it is none, or of a form that LoRA factors alone do not give."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"{folder} is no PEFT adapter (adapter_config.json, adapter_model.safetensors): {error}"
        ) from None
    odd = [key for key in ("use_rslora", "use_dora", "lora_bias") if settings.get(key)]
    start = str(settings.get("init_lora_weights"))
    odd += [start] if start.startswith(("pissa", "olora", "corda", "loftq")) else []  # these change the base model
    if settings.get("peft_type") != "LORA" or odd:
        raise StoreError(f"{folder} is {settings.get('peft_type')} with {odd}; plain LoRA can be imported")
    tensors = {name: _single(tensor) for name, tensor in tensors.items()}
    blocks, scale, suffix = {}, None, ".lora_A.weight"
    if other := [k for k in tensors if ".lora_" in k and not k.endswith((suffix, suffix.replace("A", "B")))]:
        raise StoreError(f"{folder}: {other[0]} is neither lora_A nor lora_B of a linear layer; it cannot be imported")
    for key in (k for k in tensors if k.endswith(suffix)):
        name = key.removeprefix(PREFIX).removesuffix(suffix)
        if (pair := key.replace(suffix, suffix.replace("A", "B"))) not in tensors or "lora_alpha" not in settings:
            raise StoreError(f"{folder}: {pair} or lora_alpha is missing")
        a, b = tensors[key], tensors[pair]
        alpha = _pattern(settings.get("alpha_pattern"), name, float(settings["lora_alpha"]))
        own = alpha / len(a)
        scale = own if scale is None else scale
        blocks[name] = Block(np.arange(len(a)), b * np.asarray(own / scale, b.dtype), None, a)
    if scale is None:
        raise StoreError(f"{folder} holds no lora_A tensors")
    dense = {k.removeprefix(PREFIX): t for k, t in tensors.items() if ".lora_" not in k}
    if (folder / HEAD).exists():
        dense |= {name: _single(tensor) for name, tensor in load_file(folder / HEAD).items()}
    return Adapter(blocks, scale, dense)


def _single(tensor: np.ndarray) -> np.ndarray:
    """In float32 at least, as adapters are trained: halves are kept exactly, and what comes after is not rounded to them."""
    return tensor.astype(np.float32) if tensor.itemsize < 4 else tensor


def origin(folder: Path) -> dict[str, Any]:
    """What a run tells of the adapter that it starts from: the hash of its tensors' file, and its base, by its last name."""
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    return {
        "sha256": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "base": last(base),
    }


def _pattern(pattern: dict[str, Any] | None, name: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):  # as PEFT reads them: expressions for the end of the name
            return float(value)
    return default


def adopt(method: Method, state: State, imported: Adapter) -> State:
    """A method's first state with an imported adapter in it, its increment kept exactly.

    Each module's increment is rewritten as rank-one components by its SVD, in the method's own form
    (with or without e); components beyond its rank stay as the method began them, but add nothing. A method
    that defines ``adopt(state, increment) -> State`` is given the increment instead, as B and A at its scale.
    StoreError where a module is unknown or the increment needs more components than there are.
    """
    blocks, shapes = dict(state.adapter.blocks), state.adapter.shapes
    if unknown := sorted(imported.blocks.keys() - blocks.keys()):
        raise StoreError(f"the adapter has modules that this run does not adapt: {unknown[:3]}; see adapter.targets")
    if odd := [name for name, shape in imported.shapes.items() if shape != shapes[name]]:
        raise StoreError(f"modules have other sizes in the adapter than in the model: {odd[:3]}")
    if (own := getattr(method, "adopt", None)) is not None:
        state = own(state, Increment(state.adapter.scale).add(imported).adapter())
    else:
        for name, found in recompress(imported).blocks.items():
            blocks[name] = _begun(name, blocks[name], found, imported.scale / state.adapter.scale)
    dense = dict(state.adapter.dense)
    for name, tensor in imported.dense.items():
        if name in dense and dense[name].shape == tensor.shape:
            dense[name] = tensor
        else:
            log.warning("the adapter's %s %s is not this run's, and not imported", name, list(tensor.shape))
    return replace(state, adapter=Adapter(blocks, state.adapter.scale, dense))


def _begun(name: str, begun: Block, found: Block, scale: float) -> Block:
    """A module's first components with a function in SVD form for their own."""
    left, size, right, b, a = found.B, found.e, found.A, begun.B, begun.A
    assert left is not None
    assert size is not None
    assert right is not None
    assert b is not None
    assert a is not None
    if (r := found.rank) > begun.rank:
        raise StoreError(
            f"module {name!r} needs {r} components and has {begun.rank} here; set adapter.rank={r} or more, "
            "and where the method gives its modules unequal ranks, its own settings"
        )
    b, a, size = b.copy(), a.copy(), size * scale
    a[:r] = right
    if begun.e is None:
        b[:, :r] = left * size
        return Block(begun.ids, b, None, a)
    e = begun.e.copy()
    b[:, :r], e[:r] = left, size
    return Block(begun.ids, b, e, a)
