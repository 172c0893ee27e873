"""Baselines on pooled rows: what a linear probe on the frozen model and TF-IDF reach without any federation."""

import importlib.util

import numpy as np
import torch

from fedrank.config import Config, ConfigError
from fedrank.training import data, models, tasks


def check(config: Config) -> None:
    """ConfigError where baselines cannot be had, before anything is run."""
    if config.task != "classify":
        raise ConfigError("--baselines: they classify; this config's task is generate")
    if config.engine.kind == "flower":
        raise ConfigError(
            "--baselines: they are fitted to the clients' rows, which with engine.kind=flower stay at the sites"
        )
    if config.privacy.kind != "none":
        raise ConfigError(
            f"--baselines: they are fitted to clients' rows without noise; privacy.kind is {config.privacy.kind}"
        )
    if config.data.split == "validation" and config.data.partition.kind == "natural":
        raise ConfigError(
            "--baselines: with data.split=validation natural clients are scored on their own rows; data.split=test"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("--baselines: they need scikit-learn; pip install 'fedrank[quickstart]'")


def baselines(config: Config) -> dict[str, float]:
    """Test accuracy of the majority class, of TF-IDF with logistic regression, and of a linear probe."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    dataset = data.configured(config)
    assert dataset.train.label is not None
    assert dataset.test.label is not None
    y, truth = dataset.train.label, dataset.test.label
    most = np.bincount(y).argmax()
    words = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000)
    )
    words.fit(_joined(dataset.train), y)
    model = models.load(config, dataset.labels)
    x, x_test = (features(model, rows, config) for rows in (dataset.train, dataset.test))
    probe = LogisticRegression(C=10, max_iter=2000).fit(x, y)
    return {
        "majority class of the train rows": float((truth == most).mean()),
        "TF-IDF and logistic regression": float(words.score(_joined(dataset.test), truth)),
        "linear probe on the frozen model": float(probe.score(x_test, truth)),
    }


def _joined(rows: data.Rows) -> list[str]:
    return rows.text if rows.text_b is None else [f"{a} {b}" for a, b in zip(rows.text, rows.text_b, strict=True)]


def features(model: models.Model, rows: data.Rows, config: Config) -> np.ndarray:
    """What the head sees of each row (rows, width): the input of the last linear layer."""
    encoded = tasks.encode(rows, model.tokenizer, config.task, config.local.max_length)
    (layer,) = model.heads.values()
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    result = None
    try:
        for batch in tasks.by_length(encoded, np.arange(len(encoded)), 64):
            inputs, _ = encoded.batch(batch, config.device)
            with torch.inference_mode():
                model.network(**inputs)
            found = seen.pop().cpu().numpy()
            if found.ndim == 3:  # a decoder's head sees every token; the last real one decides
                ends = inputs["attention_mask"].sum(1).cpu().numpy() - 1
                found = found[np.arange(len(found)), ends]
            result = np.zeros((len(encoded), found.shape[1]), np.float32) if result is None else result
            result[batch] = found
    finally:
        handle.remove()
    assert result is not None
    return result
