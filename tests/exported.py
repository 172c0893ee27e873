"""What an export is tried with: random models on disk, a pruned adapter, and run directories without a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fedrank import config
from fedrank.adapter import Adapter, Block
from fedrank.config import Config
from fedrank.protocol import State
from fedrank.store import Store
from fedrank.training import models, tiny
from fedrank.training.hooks import live, mounted

SIZES = {"vocab_size": 260, "pad_token_id": 0}
SHAPES = {
    "bert": (transformers.BertConfig, {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}),
    "llama": (
        transformers.LlamaConfig,
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    ),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 2}),
}  # fmt: skip


def saved_model(kind: str, folder: Path, task: str) -> Path:
    """A random model of this architecture on disk, with a tokenizer, as a user's own folder."""
    cls, sizes = SHAPES[kind]
    torch.manual_seed(0)
    settings = cls(**SIZES, **sizes, num_labels=4)
    auto = transformers.AutoModelForCausalLM if task == "generate" else transformers.AutoModelForSequenceClassification
    auto.from_config(settings).save_pretrained(folder)
    tiny.tokenizer(task).save_pretrained(folder)
    return folder


def pruned(spec: models.ModelSpec, rng: np.random.Generator) -> Adapter:
    """Ranks 0 to 5, ids with gaps, in the SVD form."""
    blocks = {}
    for at, (name, (out, in_)) in enumerate(spec.shapes.items()):
        if rank := at % 6:
            ids = np.sort(rng.choice(12, rank, replace=False))
            b, e, a = (rng.normal(size=size).astype(np.float32) for size in ((out, rank), rank, (rank, in_)))
            blocks[name] = Block(ids, b, e, a)
    dense = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in spec.dense.items()}
    return Adapter(blocks, 2 / 12, dense)


def a_run(
    folder: Path, model: models.Model, adapter: Adapter, settings: Config | None = None, labels: tuple[str, ...] = (),
    base_updates: dict[int, Adapter] | None = None, **facts: Any,
) -> Path:  # fmt: skip
    """The parts of a run directory that an export reads; settings: those of the config that a merged model needs."""
    store = Store.create(folder)
    store.write("config.yaml", "{}" if settings is None else config.dump(settings))
    conv1d = any(type(m).__name__ == "Conv1D" for m in model.modules.values())
    about = {
        "name": "own", "source": model.source, "pooling": model.pooling, "task": model.task, "conv1d": conv1d,
        "fingerprint": model.spec.fingerprint,
    }  # fmt: skip
    store.write("data.json", json.dumps({"model": about, "labels": labels, **facts}))
    state = State(1, 1, adapter)
    store.save_state(state if base_updates is None else replace(state, base_updates=base_updates), {})
    return folder


def logits(model: models.Model, adapter: Adapter, batch: Any) -> torch.Tensor:
    """fedrank's own, in float32."""
    mount = live(adapter, Adapter({}, adapter.scale, {}), "", "cpu")
    with torch.inference_mode(), mounted(model.modules, model.heads, mount):
        return model.network(**batch)
