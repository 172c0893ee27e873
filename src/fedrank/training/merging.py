"""Merged models: an increment added once to the pristine base, and written as a folder that transformers loads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedrank.config import Config
from fedrank.products import Increment
from fedrank.training import models, pooled, quantised
from fedrank.training.hooks import swapped
from fedrank.training.models import Model, ModelError


def pristine(config: Config, labels: tuple[str, ...], fingerprint: str) -> Model:
    """The base model as the run held it; a quantised one written out, since that is what the run computed with.

    ModelError where its weights here are not those that the run began with.
    """
    held = config.model.quantise != "none"
    there = models.load(config if held else config.model_copy(update={"device": "cpu"}), labels)
    if there.spec.fingerprint != fingerprint:
        raise ModelError(
            f"model.name={config.model.name}: its weights here have fingerprint {there.spec.fingerprint}, the run's had "
            f"{fingerprint}; an increment belongs on the base that it was trained on"
        )
    if not held:
        return there
    plain = config.model.model_copy(update={"quantise": "none"})
    found = models.load(config.model_copy(update={"device": "cpu", "model": plain}), labels)
    for name, layer in there.network.named_modules():
        if isinstance(layer, nn.Linear) and quantised.held(layer):
            weight: Any = found.network.get_submodule(name).weight
            weight.data = quantised.dense(layer).to("cpu", weight.dtype)
    return found


def save(
    model: Model, increment: Increment, head: Mapping[str, np.ndarray], labels: tuple[str, ...], max_length: int, out: Path
) -> None:  # fmt: skip
    """Write the base with the increment in its weights and the classes' head, and its tokenizer.

    Sums are in float64, and rounded once to the type in which the base is held. The base itself stays as it is. labels,
    max_length: of a classifier, whose tokenizer then cuts at that length where it is asked to cut.
    """
    weights = {name: _sum(model.modules[name], increment.scale * part.product()) for name, part in increment.modules.items()}  # fmt: skip
    for name, layer in model.heads.items():
        for part, parameter in layer.named_parameters():
            parameter.data = torch.tensor(head[f"{name}.{part}"]).to(parameter.dtype)
    network, tokenizer, classifies = model.base, model.tokenizer, model.task == "classify"
    with swapped(model.modules, weights):
        if model.pooling == "mean" and classifies:
            network = _pooled(model, len(labels))
        if classifies:
            network.config.id2label = dict(enumerate(labels))
            network.config.label2id = {label: at for at, label in enumerate(labels)}
            network.config.problem_type = "single_label_classification"
            tokenizer.model_max_length, tokenizer.padding_side = max_length, "right"
        else:
            network.config.get_text_config().use_cache = True  # which training goes without
        network.save_pretrained(out)
    for file in out.glob("*.safetensors"):  # others may read them, too
        shutil.copymode(out / "config.json", file)
    if network is not model.base:
        shutil.copyfile(pooled.__file__, out / "pooled.py")
    tokenizer.save_pretrained(out)


def _sum(module: nn.Module, delta: np.ndarray) -> Tensor:
    """The module's weight with this added; delta: (out, in), which a Conv1D holds the other way round."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    added = torch.from_numpy(np.ascontiguousarray(delta.T if isinstance(module, Conv1D) else delta, np.float64))
    return (weight.double() + added).to(weight.dtype)


def _pooled(model: Model, classes: int) -> Any:
    """The same network under a class that comes with the folder: transformers has none with such a head."""
    encoder = {key: value for key, value in model.base.config.to_dict().items() if key != "_name_or_path"}
    settings = pooled.MeanPooledConfig(encoder, num_labels=classes, pad_token_id=model.base.config.pad_token_id)
    settings.auto_map = {
        "AutoConfig": "pooled.MeanPooledConfig",
        "AutoModelForSequenceClassification": "pooled.MeanPooledForSequenceClassification",
    }
    with torch.device("meta"):
        made = pooled.MeanPooledForSequenceClassification(settings)
    made.encoder, made.head = model.base, model.heads["head"]
    return made
