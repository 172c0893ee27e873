"""The pooled baselines: they learn what can be learnt, and the probe sees what the model's head sees."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedrank.config import ConfigError, load
from fedrank.training import data, models, probe, tasks

pytest.importorskip("sklearn", reason="the baselines need scikit-learn")


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    toy.write(tmp_path, train=toy.texts(96, 0), test=toy.texts(48, 1))
    return {"data": {"path": str(tmp_path)}, "local": {"max_length": 16}}


def test_the_baselines_learn(config: dict[str, Any]) -> None:
    found = probe.baselines(load(config))
    assert list(found) == [
        "majority class of the train rows", "TF-IDF and logistic regression", "linear probe on the frozen model",
    ]  # fmt: skip
    majority, *others = found.values()
    test = data.configured(load(config)).test.label
    assert test is not None
    assert majority == pytest.approx(float(np.bincount(test).max() / len(test)), abs=0.1)
    assert all(majority + 0.1 < value <= 1 for value in others)


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny-decoder"])
def test_the_head_on_the_features_gives_the_logits(name: str, config: dict[str, Any]) -> None:
    """Row by row and without padding, so for a decoder the last real token is the one taken."""
    settings = load(config | {"model": {"name": name}})
    dataset = data.configured(settings)
    model = models.load(settings, dataset.labels)
    found = probe.features(model, dataset.test, settings)
    (layer,) = model.heads.values()
    encoded = tasks.encode(dataset.test, model.tokenizer, "classify", 16)
    for row in (0, 7, 31):
        inputs, _ = encoded.batch(np.array([row]), "cpu")
        with torch.inference_mode():
            torch.testing.assert_close(
                layer(torch.from_numpy(found[row])), model.network(**inputs)[0], atol=1e-5, rtol=0
            )


def test_what_they_cannot_do_is_said_first(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="they classify; this config's task is generate"):
        probe.check(load(config | {"task": "generate"}))
    natural = ["data.split=validation", "data.partition.kind=natural"]
    with pytest.raises(ConfigError, match=r"natural clients are scored on their own rows; data\.split=test"):
        probe.check(load(config, natural))
    probe.check(load(config))
