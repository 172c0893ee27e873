"""Adapters in PEFT's format: written from a run directory, and read to start a run from."""

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

from fedrank.adapter import Adapter, Block, below, from_arrays, recompress
from fedrank.client import complete
from fedrank.config import hint
from fedrank.products import Increment
from fedrank.protocol import ClientId, Method, Plan, State
from fedrank.store import Store, StoreError, write

log = logging.getLogger(__name__)

PREFIX = "base_model.model."


def export(run: Path, out: Path, round: int | None = None, client: ClientId | None = None) -> Path:
    """Write the adapter of a run (after `round` rounds; default: its last) as PEFT loads it, with the head.

    e is folded into B, modules without components are left out, ranks and alphas go module by module.
    A head on mean pooling is no part of the base model: it is written beside, as head.safetensors.
    client: with this client's own parts. StoreError where parts are the clients' own and none is named.
    """
    state, _ = Store.open(run).state(round)
    facts = json.loads((run / "data.json").read_text())
    model = facts["model"]
    if client is not None:
        state = replace(state, adapter=_adapted(Store(run), state, facts, client))
    elif why := obstacle(run):
        raise StoreError(f"{run}: {why}")
    elif limit := _limit(facts):
        log.warning("%s: %s", out, limit)
    state = replace(state, adapter=whole(state))
    ranks = {name: block.rank for name, block in state.adapter.blocks.items()}
    if not ranks:
        raise StoreError(f"{run}: the adapter has no components to export")
    top, scale = max(ranks.values()), state.adapter.scale
    inside = model["task"] == "classify" and model["pooling"] != "mean"
    head = {n: np.ascontiguousarray(t) for n, t in state.adapter.dense.items()}
    if inside and (run / "drawn.safetensors").exists():  # layers that the base model's own files lack
        head |= load_file(run / "drawn.safetensors")
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
    for name, block in state.adapter.blocks.items():
        assert block.B is not None
        assert block.A is not None
        b = block.B if block.e is None else block.B * block.e
        tensors[f"{PREFIX}{name}.lora_A.weight"] = block.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b)
    if inside:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in head.items()}
    elif head:
        write(out / "head.safetensors", save(head))
    write(out / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write(out / "adapter_config.json", json.dumps(settings, indent=1).encode())
    write(out / "README.md", _readme(model, bool(head) and not inside, state.round, _limit(facts, client)).encode())
    return out


def obstacle(run: Path) -> str | None:
    """Why the run's adapter is no function that one could export; None where it is."""
    if own := json.loads((run / "data.json").read_text()).get("own", ""):
        parts = ", ".join("the head" if f == "h" else f for f in own)
        return f"each client keeps {parts} to itself, so there is no one function to export; name a client (--client)"
    return None


def _limit(facts: Mapping[str, Any], client: ClientId | None = None) -> str:
    """What an exported adapter is not; empty where clients predict with just this one."""
    if client is not None or not facts.get("adapts"):
        return ""
    if facts.get("private"):
        return "the common adapter alone; each client predicts with one of its own beside it (fedrank export --client)"
    return "the common start; each client predicts after training of its own from it"


def _adapted(store: Store, state: State, facts: Mapping[str, Any], client: ClientId) -> Adapter:
    """What this client predicts with: the shared parts, and its own from its private store, where that is here."""
    own = facts.get("own", "")
    if not own and not facts.get("private"):
        raise StoreError(f"{store.path}: no part of the adapter is a client's own; export it without a client")
    if client not in state.seen:
        raise StoreError(f"{store.path}: client {client!r} has trained in no round{hint(client, state.seen)}")
    kept = store.private.load(client, since := state.seen[client])
    if kept is None:
        raise StoreError(f"{store.private.root} holds no version of round {since} of client {client!r}")
    plan = Plan(state.adapter.ids, own=own, since=since)
    adapter = complete(state.adapter.only(plan.sent), plan, kept, store.state(0)[0].adapter)
    return adapter.union(from_arrays(below("private/", kept), adapter.scale))  # the second level, where there is one


def whole(state: State) -> Adapter:
    """The adapter that gives a pristine base the function of this state: base updates become components."""
    if not state.base_updates:
        return state.adapter
    found = Increment(state.adapter.scale).add(state.adapter).add_base(state.base_updates.values()).adapter()
    return replace(recompress(found.astype(np.float32)), dense=state.adapter.dense)


def _readme(model: dict[str, Any], beside: bool, rounds: int, limit: str) -> str:
    kind = {"generate": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification"}[model["task"]]
    kind, classes = ("AutoModel", "") if beside else (kind, ", num_labels=N" if model["task"] == "classify" else "")
    tail = (
        "\nThe classes' head is head.safetensors: a linear layer on the mean of the last hidden states.\n"
        if beside
        else ""
    )
    limit = f"This is {limit}.\n\n" if limit else ""
    return (
        f"# Adapter trained with fedrank, {rounds} rounds\n\n{limit}Base model: `{model['name']}`\n\n```python\n"
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f"base = {kind}.from_pretrained({model['source']!r}{classes})\n"
        f'model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")\n```\n{tail}'
    )


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
    if (folder / "head.safetensors").exists():
        dense |= load_file(folder / "head.safetensors")
    return Adapter(blocks, scale, dense)


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
