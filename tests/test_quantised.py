"""Bases in 8 and 4 bits and in bfloat16: what they compute, what is added beside them, what they take."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fedrank
import toy
from fedrank import config, parts
from fedrank.adapter import Adapter, gaussian, kaiming
from fedrank.config import Local
from fedrank.methods.fed_plora import FedPLoRA
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.pf2lora import PF2LoRA
from fedrank.protocol import Device, Job, Lower, Plan, State, Update, rng
from fedrank.selection import everything
from fedrank.store import Store
from fedrank.training import decoding, frozen, fused, models, quantised, tasks, tiny
from fedrank.training.compute import Apart, Beside, Compute, Increment, Product, matrix, onednn
from fedrank.training.course import Ask
from fedrank.training.data import Rows
from fedrank.training.frozen import freeze
from fedrank.training.hooks import incremented, increments, live, mounted
from fedrank.training.local import Trainer
from fedrank.training.models import Model, ModelError
from test_architectures import ENDS, WORDS, rows

# Rows of whole blocks of 64 numbers, which share a scale in 4 bits.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "intermediate_size": 128, "max_position_embeddings": 64, **ENDS}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, **ENDS}),  # Conv1D
}  # fmt: skip
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}
PLAIN = Compute("float32", "torch")
ROWS = np.arange(20)


def published(family: str, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A random model of this family on disk, its weights in this type."""
    name, sizes = SIZES[family]
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes))
    made.to(dtype).save_pretrained(folder, **how)
    tiny.tokenizer("generate").save_pretrained(folder)
    return folder


def loaded(folder: Path, **model: Any) -> Model:
    given = {"name": str(folder), **model}
    return models.load(toy.settings(model=given, task="generate", local={"max_length": 24}, adapter={"rank": 4}), ())


@dataclass(frozen=True)
class Pair:
    """A model on disk that is quantised when it is loaded, and one whose plain weights are what that writes out."""

    family: str
    kind: str
    place: Path

    @property
    def folder(self) -> Path:
        return self.place / "model"

    @property
    def written(self) -> Path:
        return self.place / "written"

    @cached_property
    def ours(self) -> Model:
        return loaded(self.folder, quantise=self.kind)

    @cached_property
    def plain(self) -> Model:
        return loaded(self.written)

    def both(self, **sections: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of a run over the one and over the other."""
        found = settings(self.place / "data", {"name": str(self.written)}, **sections)
        return {**found, "model": {"name": str(self.folder), "quantise": self.kind}}, found


@pytest.fixture(scope="module", params=toy.grouped(["llama int8", "llama nf4", "gpt2 nf4"]))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, kind = request.param.split()
    return made(family, kind, tmp_path_factory.mktemp("pair"))


def made(family: str, kind: str, place: Path) -> Pair:
    for library in (LIBRARIES[kind], "accelerate"):
        pytest.importorskip(library)
    pair = Pair(family, kind, place)
    published(family, pair.folder)
    plain = loaded(pair.folder)
    for name, layer in plain.modules.items():
        matrix(layer).copy_(quantised.dense(pair.ours.modules[name]))
    plain.base.save_pretrained(pair.written)
    plain.tokenizer.save_pretrained(pair.written)
    (place / "data").mkdir()
    rows(place / "data")
    return pair


def settings(data: Path, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "task": "generate", "model": model, "clients": {"count": 3},
        "data": {"path": str(data), "partition": {"kind": "iid"}},
        "rounds": {"count": 3, "cohort": 3, "evaluate_every": 3}, "adapter": {"rank": 4},
        "local": {"max_length": 24, "batch_size": 4, "lr": 0.005}, **sections,
    }  # fmt: skip


def trainer(model: Model, **given: Any) -> Trainer:
    texts = [f"{word} {at % 7}:" for at in range(6) for word in WORDS]
    train = tasks.encode(Rows(texts, completion=[t[::-1] for t in texts]), model.tokenizer, "generate", 24)
    return Trainer(model, train, train, 1e-2, 1, "cpu", **given)


def factors(model: Model, seed: int = 0, *names: str) -> Adapter:
    """Components in these modules, or in all, that add something."""
    shapes = {name: model.spec.shapes[name] for name in names or model.spec.shapes}
    found = gaussian(shapes, 3, model.spec.scale, rng(seed, "factors"))
    draw = rng(seed, "B")
    blocks = {
        n: replace(b, e=None, B=draw.normal(0, 0.02, b.B.shape).astype(np.float32)) for n, b in found.blocks.items()
    }
    return replace(found, blocks=blocks)


def near(ours: Adapter, theirs: Adapter, **tolerance: float) -> None:
    found, expected = toy.arrays(ours), toy.arrays(theirs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, **{"rtol": 1e-3, "atol": 1e-4, **tolerance})


def held(model: Model) -> dict[str, list[bytes]]:
    """All the bytes of a model."""
    return {
        name: [piece.reshape(-1).view(torch.uint8).numpy().tobytes() for piece in quantised.pieces(tensor)]
        for name, tensor in model.network.state_dict(keep_vars=True).items()
    }


# ---- what is quantised


def test_all_linears_of_the_blocks_are_and_nothing_else(pair):
    plain = loaded(pair.folder)
    assert pair.ours.modules.keys() == plain.modules.keys()
    assert all(quantised.held(layer) for layer in pair.ours.modules.values())
    inside = {f"{name}.weight" for name in pair.ours.modules}
    theirs = dict(plain.base.named_parameters())
    for name, tensor in pair.ours.base.named_parameters():
        assert name in inside or torch.equal(tensor, theirs[name]), name
    head = pair.ours.base.get_output_embeddings()
    assert not quantised.held(head)
    assert head.weight.dtype == torch.float32


def test_weights_written_out_are_near_those_on_disk(pair):
    plain, most = loaded(pair.folder), {"int8": 0.01, "nf4": 0.11}[pair.kind]
    for name, layer in pair.ours.modules.items():
        expected, found = matrix(plain.modules[name]), quantised.dense(layer)
        assert found.shape == expected.shape == pair.ours.spec.shapes[name]
        error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
        assert most / 10 < error < most


def test_the_library_computes_with_the_same_weights(pair):
    """Its own layers, without ours around them; so a written-out weight is not our reading of it alone."""
    batch = {"input_ids": torch.randint(4, 260, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    with torch.inference_mode():
        torch.testing.assert_close(pair.ours.network(**batch), pair.plain.network(**batch), rtol=1e-4, atol=1e-5)


def test_it_counts_the_same_numbers_and_takes_fewer_bytes(pair):
    ours, plain = pair.ours.spec, loaded(pair.folder).spec
    assert ours.parameters == plain.parameters
    assert plain.execution.base_bytes == 4 * plain.parameters
    linear = sum(out * in_ for out, in_ in plain.shapes.values())
    saved, bits = plain.execution.base_bytes - ours.execution.base_bytes, {"int8": 8, "nf4": 4}[pair.kind]
    assert saved == pytest.approx(linear * (32 - bits) / 8, rel=0.1)  # scales take some


def test_a_pass_keeps_as_much_as_with_plain_weights_each_time_that_it_is_traced(pair):
    for bilevel in (False, True):
        expected = fused.trace(freeze(pair.plain, PLAIN, "cpu"), "cpu", bilevel)
        for _ in range(10):
            assert fused.trace(freeze(pair.ours, PLAIN, "cpu"), "cpu", bilevel) == expected


def test_each_way_has_its_own_fingerprint_and_always_the_same(pair):
    again, plain = loaded(pair.folder, quantise=pair.kind), loaded(pair.folder)
    assert again.spec.fingerprint == pair.ours.spec.fingerprint
    assert len({model.spec.fingerprint for model in (pair.ours, pair.plain, plain)}) == 3
    if pair.family == "llama":
        other = loaded(pair.folder, quantise=next(kind for kind in LIBRARIES if kind != pair.kind))
        assert other.spec.fingerprint not in (pair.ours.spec.fingerprint, plain.spec.fingerprint)


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize(("name", "pooling"), [("bert", "cls"), ("bert", "mean"), ("llama", "cls")])
def test_heads_are_left_to_learn(name, pooling, kind, tmp_path):
    pytest.importorskip(LIBRARIES[kind])
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    about = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}[name](**ENDS, **sizes, num_labels=4)
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(about).save_pretrained(tmp_path)
    toy.encoder().tokenizer.save_pretrained(tmp_path)
    given = {"name": str(tmp_path), "quantise": kind, "pooling": pooling}
    model = models.load(toy.settings(model=given), toy.LABELS)
    assert all(layer.weight.dtype == torch.float32 and not quantised.held(layer) for layer in model.heads.values())
    train = tasks.encode(toy.texts(40, 0), model.tokenizer, "classify", 16)
    start = model.spec.lora(0)
    update = Trainer(model, train, train, 1e-2, 1, "cpu").fit(
        toy.job(model.spec, start, Plan(everything(start)), print), ROWS
    )
    assert all(np.abs(t - model.spec.dense[n]).max() > 0 for n, t in update.adapter.dense.items())


# ---- what is refused


def test_what_a_library_leaves_as_it_is_is_said(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ModelError, match=r"c_attn is a Conv1D.*device cpu leaves as it is; model\.quantise=nf4 takes"):
        loaded(published("gpt2", tmp_path), quantise="int8")


@pytest.mark.parametrize(
    ("kind", "lacking"), [("int8", "torchao"), ("nf4", "bitsandbytes"), ("int8", "accelerate"), ("nf4", "accelerate")]
)
def test_a_library_that_is_not_here_is_named_with_what_brings_it(kind, lacking, tmp_path, monkeypatch):
    here = importlib.util.find_spec
    folder = published("llama", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == lacking else here(name, *rest))
    with pytest.raises(
        ModelError, match=rf"model\.quantise={kind} on cpu needs {lacking}: pip install 'fedrank\[quantise\]'"
    ):
        loaded(folder, quantise=kind)


def test_widths_that_a_library_gets_wrong_are_refused(tmp_path, monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    folder, right = published("llama", tmp_path), functional.dequantize_4bit

    def wrong(*given, **named):  # rows of 128 begin where another's scale is
        found = right(*given, **named)
        return found.roll(64) if found.shape[-1] == 128 else found

    assert quantised.sound.__wrapped__(64)
    assert loaded(folder, quantise="nf4")
    monkeypatch.setattr(functional, "dequantize_4bit", wrong)
    quantised.sound.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"weights of 128 columns .* \(model\.layers\.0\.mlp\.down_proj\)"):
            models.load(  # whether it has an adapter or not
                toy.settings(
                    model={"name": str(folder), "quantise": "nf4"}, task="generate", local={"max_length": 24},
                    adapter={"targets": ["q_proj"]},
                ), ()
            )  # fmt: skip
    finally:
        quantised.sound.cache_clear()


def test_what_quantises_is_part_of_the_numerics(pair):
    ours, plain = (parts.prepare(config.load(raw)).numerics["quantised"] for raw in pair.both())
    assert plain == "none"
    assert ours == f"{pair.kind} by {LIBRARIES[pair.kind]} {importlib.metadata.version(LIBRARIES[pair.kind])}"


@pytest.mark.parametrize(
    "given", [{"quantise": "int8"}, {"quantise": "nf4"}, {"dtype": "bfloat16"}, {"dtype": "float32"}]
)
@pytest.mark.parametrize("name", ["tiny-encoder", "tiny-decoder"])
def test_a_model_without_files_is_not_held_otherwise(name, given):
    with pytest.raises(ModelError, match=rf"{name}: it is drawn in float32 and has no files"):
        loaded(Path(name), **given)


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_a_model_of_two_halves_is_refused(task, tmp_path):
    sizes = transformers.T5Config(
        vocab_size=260, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    transformers.T5ForConditionalGeneration(sizes).save_pretrained(tmp_path)
    tiny.tokenizer(task).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="t5 has an encoder and a decoder; one of them is needed"):
        models.load(toy.settings(model={"name": str(tmp_path)}, task=task), toy.LABELS)


# ---- training


def fitted(model: Model, learn: str = "BA", updates: tuple[Adapter, ...] = ()) -> tuple[Update, list[Any]]:
    """One client's round of FedAvg, and the gradient of each of its steps."""
    seen: list[Any] = []
    adapter, plan = factors(model), Plan(everything(factors(model)), learn=learn)
    job = replace(toy.job(model.spec, adapter, plan, print), base_updates=updates)

    def observe(values: Any, grads: Any) -> None:
        seen.append({name: grad.numpy().copy() for name, grad in grads.items()})

    one = trainer(model)
    (update,) = FedAvg().train([replace(job, fit=lambda job: one.fit(job, ROWS, observe))])
    return update, seen


@pytest.mark.parametrize("learn", ["BA", "A"])
def test_it_trains_as_its_written_out_weights_do(pair, learn):
    (ours, grads), (theirs, expected) = fitted(pair.ours, learn), fitted(pair.plain, learn)
    near(ours.adapter, theirs.adapter)
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)
    assert len(grads) == len(expected) == 3
    for step, other in zip(grads, expected, strict=True):
        assert set(step) == set(learn)
        for name, grad in step.items():
            np.testing.assert_allclose(grad, other[name], rtol=1e-2, atol=1e-4 * np.abs(grad).max())


def test_its_weights_do_not_change(pair):
    before = held(pair.ours)
    written = {name: quantised.dense(layer).clone() for name, layer in pair.ours.modules.items()}
    fitted(pair.ours)
    trainer(pair.ours).frozen.ready()
    with torch.inference_mode():
        pair.ours.network(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert all(torch.equal(quantised.dense(layer), written[name]) for name, layer in pair.ours.modules.items())
    assert held(pair.ours) == before == held(loaded(pair.folder, quantise=pair.kind))


def test_clients_that_are_stacked_train_as_one_by_one(pair):
    one, adapter = trainer(pair.ours), factors(pair.ours)
    jobs = [toy.job(pair.ours.spec, adapter, Plan(everything(adapter)), print, client) for client in ("c0", "c1")]
    updates = (factors(pair.ours, 1),)
    asks = [
        Ask(replace(job, base_updates=updates), own, None, None)
        for job, own in zip(jobs, (ROWS[:12], ROWS[8:]), strict=True)
    ]
    for found, ask in zip(one.fit_all(asks), asks, strict=True):
        near(found.adapter, one.fit_all([ask])[0].adapter)


def test_bfloat16_is_near(pair):
    ours, plain = (
        trainer(pair.ours, compute=Compute(dtype, "torch")).fit(
            toy.job(pair.ours.spec, factors(pair.ours), Plan(everything(factors(pair.ours))), print), ROWS
        )
        for dtype in ("bfloat16", "float32")
    )
    assert ours.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=0.01)


def test_base_updates_are_beside_weights_that_cannot_hold_them(pair):
    part, whole = factors(pair.ours, 1), factors(pair.ours, 2, *list(pair.ours.modules)[:5])
    whole = Adapter({}, whole.scale, dict(whole.delta()))
    weights, beside = trainer(pair.ours).updated((part, whole))
    assert not weights
    assert beside.keys() == pair.ours.modules.keys()
    assert {name: len(found) for name, found in beside.items()} == {name: 1 + (name in whole.dense) for name in beside}
    weights, beside = trainer(pair.plain).updated((part, whole))
    assert weights.keys() == pair.plain.modules.keys()
    assert not beside
    ours, theirs = (fitted(model, updates=(part, whole))[0] for model in (pair.ours, pair.plain))
    near(ours.adapter, theirs.adapter)
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)
    assert abs(ours.metrics["loss"] - fitted(pair.ours)[0].metrics["loss"]) > 1e-3


def asked(method: Any, model: Model, plan: Plan, adapter: Adapter, fit: Any, **local: Any) -> Update:
    """What this method makes of a client's round. fit: of a job."""
    device = Device("c0", len(ROWS))
    job = Job(plan, 1, 3, model.spec, adapter, (), {}, Local(batch_size=8, **local), device, 0, fit)
    (update,) = method.train([job])
    return update


def test_what_is_not_trained_may_be_folded_or_frozen(pair):
    adapter, one, found = factors(pair.ours), trainer(pair.ours), dict[str, Update]()
    for rest in ("freeze", "fold"):
        method = FedPLoRA(rest=rest)
        plan = method.plan(State(0, 3, adapter), {"c0": Device("c0", len(ROWS), rank=2)}, 0)["c0"]
        assert plan.frozen.keys() == plan.train.keys()
        found[rest] = asked(method, pair.ours, plan, adapter, lambda job: one.fit(job, ROWS))
        assert bool(one.working) == (rest == "fold")
    near(found["fold"].adapter, found["freeze"].adapter)
    assert found["fold"].metrics["loss"] == pytest.approx(found["freeze"].metrics["loss"], rel=1e-5)


def bilevel(model: Model, derivative: str) -> tuple[Update, dict[str, torch.Tensor]]:
    """A client's round of two levels, and the upper gradient of its first step."""
    one, adapter, seen = trainer(model), factors(model), list[dict[str, torch.Tensor]]()

    def observe(values: Any, grads: Any) -> None:
        seen.append({name: grad.clone() for name, grad in grads.items()})

    def fit(job: Job, lower: Lower) -> Update:
        return one.fit(job, ROWS, observe, lower)

    plan = Plan(everything(adapter), private=1)
    return asked(PF2LoRA(private_rank=1, derivative=derivative), model, plan, adapter, fit, steps=2), seen[0]


@pytest.mark.parametrize("derivative", ["first", "finite", "double"])
def test_two_levels(pair, derivative):
    (ours, grads), (theirs, expected) = (bilevel(model, derivative) for model in (pair.ours, pair.plain))
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)
    for name, grad in expected.items():
        assert torch.linalg.vector_norm(grads[name] - grad) < 1e-3 * torch.linalg.vector_norm(grad)
    assert held(pair.ours) == held(loaded(pair.folder, quantise=pair.kind))


@pytest.mark.parametrize("derivative", ["first", "finite", "double"])
def test_two_levels_over_updates_of_the_base(pair, derivative):
    """Beside quantised weights, within the others."""
    found = []
    for model in (pair.ours, pair.plain):
        adapter, one = factors(model), trainer(model)
        job = toy.job(model.spec, adapter, Plan(everything(adapter)), print)
        job = replace(job, base_updates=(factors(model, 1),), local=Local(batch_size=8, steps=2))
        private = kaiming(model.spec.shapes, 1, model.spec.scale, rng(0, "private"))
        found.append(one.fit(job, ROWS, lower=Lower(0.1, private, derivative)))
        assert [bool(part) for part in one.updated(job.base_updates)] == [model is pair.plain, model is pair.ours]
    ours, theirs = found
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)
    near(ours.adapter, theirs.adapter, atol=1e-3)


# ---- whole runs


def played(raw: dict[str, Any], path: Path) -> tuple[parts.Parts, State, list[Any]]:
    """A run in this process: its parts, its last state, its events."""
    made, store = parts.prepare(config.load(raw)), Store.create(path)
    store.save_state(made.begin, made.numerics)
    events = list(made.server(store).play(made.begin))
    return made, store.state()[0], [event for event in events if event["event"] == "round"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_updates_of_three_rounds_are_beside_the_weights_and_give_what_merged_ones_do(pair, method, tmp_path):
    ours, plain = pair.both(method={"name": method})
    made, state, told = played(ours, tmp_path / "ours")
    other, expected, heard = played(plain, tmp_path / "plain")
    assert [row["clients_failed"] for row in told] == [0, 0, 0]
    assert [row["train_loss"] for row in told] == pytest.approx([row["train_loss"] for row in heard], rel=1e-4)
    assert told[-1]["loss"] == pytest.approx(heard[-1]["loss"], rel=1e-4)
    assert told[-1]["train_loss"] < told[0]["train_loss"] - 0.1
    assert list(state.base_updates) == list(expected.base_updates) == [1, 2, 3]
    for part, one in zip(state.base_updates.values(), expected.base_updates.values(), strict=True):
        near(part, one, atol=1e-3)
    near(state.adapter, expected.adapter, atol=1e-3)
    updates = tuple(state.base_updates.values())
    assert [bool(part) for part in made.trainer.updated(updates)] == [False, True]
    assert [bool(part) for part in other.trainer.updated(updates)] == [True, False]
    assert held(made.trainer.model) == held(pair.ours)


@pytest.mark.slow
def test_fedara_prunes_and_exports_what_peft_reads(pair, tmp_path):
    peft = pytest.importorskip("peft")
    ours, _ = pair.both(
        method={"name": "fedara", "target_rank": 1}, rounds={"count": 6, "cohort": 3, "evaluate_every": 6}
    )
    run = fedrank.run({**ours, "local": {**ours["local"], "lr": 0.02}}, out=tmp_path / "run")
    assert 0 < run.summary["modules_alive"] < run.summary["modules"]
    assert run.summary["components"] == run.summary["components_at_start"] // 4
    about = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert about["fan_in_fan_out"] == (pair.family == "gpt2")
    assert about["base_model_name_or_path"] == str(pair.folder)
    on = live(run.state.adapter, Adapter({}, run.state.adapter.scale, {}), "", "cpu")
    batch = {"input_ids": torch.randint(4, 260, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    base = transformers.AutoModelForCausalLM.from_pretrained(pair.written).eval()
    with torch.inference_mode():
        before = base(**batch).logits
        found = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()(**batch).logits
        with mounted(pair.ours.modules, {}, on):
            expected = pair.ours.network(**batch)
        with fused.mounted(freeze(pair.ours, PLAIN, "cpu"), [on]):
            together = pair.ours.network(**batch)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_it_writes_what_its_written_out_weights_do(pair):
    texts, before = [], held(pair.ours)
    for model in (pair.ours, pair.plain):
        generation = config.Generation(when="end", max_tokens=6)
        decoder = decoding.Decoder(trainer(model), generation, 0)
        prompts = decoder.prompts(Rows(["red 1:", "a longer prompt:"], completion=["a", "b"]))
        texts.append(decoder.write(decoding.Asked(factors(model), prompts.ids, (factors(model, 1),))))
    assert texts[0] == texts[1]
    assert held(pair.ours) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    ["llama nf4", *(pytest.param(one, marks=toy.EXHAUSTIVE) for one in ("llama int8", "gpt2 nf4"))],
    indirect=True,
)
@pytest.mark.parametrize("method", [pytest.param("flora", marks=toy.EXHAUSTIVE), "pf2lora"])
def test_runs_repeat_in_workers_and_resume_to_the_same_bits(pair, method, tmp_path):
    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 1:
            raise Stop

    ours, _ = pair.both(method={"name": method})
    run = fedrank.run(ours, "engine.stack=1", out=tmp_path / "one")
    spread = fedrank.run(ours, "engine.stack=1", "engine.workers=2", out=tmp_path / "two")
    assert toy.equal(spread.state, run.state)
    with pytest.raises(Stop):
        fedrank.run(ours, "engine.stack=1", out=tmp_path / "stopped", watch=stop)
    assert toy.equal(fedrank.resume(tmp_path / "stopped").state, run.state)


# ---- products


LAYERS = ((5, 7), (3, 7), (4, 7))


def group(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights of layers that read one input, and their biases; one has none."""
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=draw) for shape in LAYERS]
    return weights, [torch.randn(5, generator=draw), None, torch.randn(4, generator=draw)]


def apart(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], dtype: torch.dtype = torch.float32) -> Apart:  # fmt: skip
    return Apart([lambda weight=weight: weight for weight in weights], [len(w) for w in weights], biases, dtype)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_not_copied_compute_as_those_that_are(count, bias):
    weights, biases = group()
    weights, biases = weights[:count], biases[:count] if bias else [None] * count
    one, other = apart(weights, biases), Product(weights, biases, PLAIN)
    x = torch.randn(6, 7)
    torch.testing.assert_close(one.forward(x), other.forward(x))
    grad = torch.randn(6, sum(one.outs))
    torch.testing.assert_close(one.backward(grad), other.backward(grad))
    assert (one.outs, one.dtype) == (other.outs, other.dtype)
    small = torch.randn(2, 7)
    torch.testing.assert_close(one.product(x, small), other.product(x, small))


def test_such_a_weight_is_asked_for_in_every_product():
    """So that a quantised one is written out, used and let go."""
    weights, biases = group()
    asked: list[int] = []
    given = [lambda at=at: (asked.append(at), weights[at])[1] for at in range(3)]
    one = Apart(given, [5, 3, 4], biases, torch.float32)
    assert asked == []
    one.forward(torch.randn(2, 7))
    one.backward(torch.randn(2, 12))
    assert asked == [0, 1, 2, 0, 1, 2]


def test_they_are_computed_in_the_type_that_is_asked_for():
    weights, biases = group()
    one = apart(weights, biases, torch.bfloat16)
    x = torch.randn(6, 7)
    found = one.forward(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), apart(weights, biases).forward(x), rtol=0.05, atol=0.1)


def some(kind: str) -> list[list[Increment]]:
    """Of each layer of the group: factors, a whole matrix, both, or nothing for one of them."""
    draw = torch.Generator().manual_seed(1)

    def parts(out: int) -> Increment:
        return Increment(0.5, torch.randn(2, 7, generator=draw), torch.randn(2, out, generator=draw))

    def whole(out: int) -> Increment:
        return Increment(1.0, None, torch.randn(out, 7, generator=draw).T)

    found = {
        "factors": [[parts(out)] for out, _ in LAYERS],
        "whole": [[whole(out)] for out, _ in LAYERS],
        "both": [[parts(5), whole(5), parts(5)], [], [whole(4)]],
    }
    return found[kind]


@pytest.mark.parametrize("kind", ["factors", "whole", "both"])
@pytest.mark.parametrize("how", ["copied", "packed", "as they lie"])
def test_increments_beside_weights_are_increments_of_them(kind, how):
    if how == "packed" and not onednn():
        pytest.skip("no oneDNN here")
    (weights, biases), added = group(), some(kind)
    inner = (
        apart(weights, biases)
        if how == "as they lie"
        else Product(weights, biases, Compute("float32", {"copied": "torch", "packed": "onednn"}[how]))
    )
    sums = [
        weight + sum((one.scale * (one.Bt.T if one.A is None else one.Bt.T @ one.A) for one in own), torch.zeros(()))
        for weight, own in zip(weights, added, strict=True)
    ]
    found, expected = Beside(inner, added), Product(sums, biases, PLAIN)
    x, grad = torch.randn(6, 7), torch.randn(6, 12)
    torch.testing.assert_close(found.forward(x), expected.forward(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.backward(grad), expected.backward(grad), rtol=1e-4, atol=1e-4)
    through = x.clone().requires_grad_()
    (torch.nn.functional.linear(through, torch.cat(sums)) * grad).sum().backward()
    torch.testing.assert_close(found.backward(grad), through.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SIZES)
def test_base_updates_as_increments_are_what_merging_adds(family, tmp_path):
    """Also to Conv1D's weights, which are stored (in, out), and of components with e."""
    model = loaded(published(family, tmp_path))
    singular = toy.drawn(replace(model.spec, rank=2))
    parts = [replace(singular, dense={}), factors(model, 1)]
    parts.append(Adapter({}, parts[1].scale, dict(list(parts[1].delta().items())[:4])))
    merged, beside = incremented(model.modules, parts), increments(model.modules, parts)
    assert merged.keys() == beside.keys()
    for name, layer in model.modules.items():
        added = sum(one.scale * (one.Bt.T if one.A is None else one.Bt.T @ one.A) for one in beside[name])
        torch.testing.assert_close(matrix(layer) + added, matrix(layer, merged[name]), rtol=1e-4, atol=1e-4)


# ---- the frozen base


@pytest.mark.parametrize("family", SIZES)
def test_a_large_models_weights_are_used_as_they_lie(family, tmp_path, monkeypatch):
    model = loaded(published(family, tmp_path))
    near_by = trainer(model)
    assert near_by.frozen.copied
    monkeypatch.setattr(frozen, "LARGE", 1)
    one = trainer(model)
    assert not one.frozen.copied
    for names in one.frozen.groups:
        product = one.frozen.product(names)
        assert isinstance(product, Apart)
        pointers = [weight().data_ptr() for weight in product.weights]
        assert pointers == [model.modules[name].weight.data_ptr() for name in names]
    job = toy.job(model.spec, factors(model), Plan(everything(factors(model))), print)
    for updates in ((), (factors(model, 1),)):
        ours, theirs = (who.fit(replace(job, base_updates=updates), ROWS) for who in (one, near_by))
        near(ours.adapter, theirs.adapter)
    assert freeze(model, Compute("float32", "onednn"), "cpu").copied  # it was asked for by name


def test_nor_is_a_large_one_in_bfloat16_held_in_float32_where_that_computes(tmp_path, monkeypatch):
    model = loaded(published("llama", tmp_path, torch.bfloat16))
    near_by = trainer(model)
    assert {near_by.frozen.product(names).weight.dtype for names in near_by.frozen.groups} == {torch.float32}
    monkeypatch.setattr(frozen, "LARGE", 1)
    one, inside = trainer(model), {id(layer.weight) for layer in model.modules.values()}
    pointers = [weight().data_ptr() for names in one.frozen.groups for weight in one.frozen.product(names).weights]
    assert pointers == [model.modules[name].weight.data_ptr() for names in one.frozen.groups for name in names]
    assert not inside & {id(tensor) for tensor in one.frozen.unread(model.network)}
    linear = sum(out * in_ for out, in_ in model.spec.shapes.values())
    assert one.frozen.size == 2 * linear + 4 * (model.spec.parameters - linear)
    job = toy.job(model.spec, factors(model), Plan(everything(factors(model))), print)
    ours, theirs = (who.fit(job, ROWS) for who in (one, near_by))
    near(ours.adapter, theirs.adapter)


@pytest.mark.parametrize("family", SIZES)
def test_the_bytes_of_a_frozen_base(family, tmp_path, monkeypatch):
    """What passes go through, with the copies made to be faster; what is copied in another type is no longer read."""
    model = loaded(published(family, tmp_path))
    linear, whole = (4 * n for n in (sum(out * in_ for out, in_ in model.spec.shapes.values()), model.spec.parameters))
    joined = sum(
        4 * matrix(model.modules[name]).numel()
        for group in freeze(model, PLAIN, "cpu").groups
        for name in group
        if len(group) > 1 or family == "gpt2"
    )

    def size(dtype: str, library: str) -> int:
        return freeze(model, Compute(dtype, library), "cpu").size

    assert size("float32", "torch") == whole + joined
    halved = whole / 2 + sum(2 * layer.bias.numel() for layer in model.modules.values() if layer.bias is not None)
    assert size("bfloat16", "torch") == halved  # biases are copied, and stay
    if onednn():
        assert size("float32", "onednn") == whole + 2 * linear
        assert size("bfloat16", "onednn") == halved + linear / 2
    monkeypatch.setattr(frozen, "LARGE", 1)
    assert size("float32", "torch") == whole
    assert size("bfloat16", "torch") == halved


def test_what_no_pass_reads_is_what_there_are_copies_of_in_another_type(pair):
    plain = loaded(pair.folder)
    every, inside = list(plain.network.parameters()), {id(layer.weight) for layer in pair.ours.modules.values()}
    for model, dtype, expected in (
        (plain, "float32", []),
        (plain, "bfloat16", every),
        (pair.ours, "float32", []),
        (pair.ours, "bfloat16", [t for t in pair.ours.network.parameters() if id(t) not in inside]),
    ):
        found = list(freeze(model, Compute(dtype, "torch"), "cpu").unread(model.network))
        assert [id(tensor) for tensor in found] == [id(tensor) for tensor in expected]


# ---- checkpoints in bfloat16, in parts, and mapped from their files


@pytest.mark.parametrize(
    ("on_disk", "asked", "held_in"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "auto", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_the_type_in_memory(on_disk, asked, held_in, tmp_path):
    model = loaded(published("llama", tmp_path, getattr(torch, on_disk)), dtype=asked)
    assert {tensor.dtype for tensor in model.network.parameters()} == {getattr(torch, held_in)}
    assert model.spec.execution.base_bytes == model.spec.parameters * {"bfloat16": 2, "float32": 4}[held_in]


def test_weights_in_bfloat16_hold_no_updates_and_compute_as_the_same_in_float32(tmp_path):
    folder = published("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "data").mkdir()
    rows(tmp_path / "data")

    def run(dtype: str) -> tuple[parts.Parts, State, list[Any]]:
        model = {"name": str(folder), "dtype": dtype}
        given = settings(tmp_path / "data", model, method={"name": "flora"}, engine={"compute": "float32"})
        return played(given, tmp_path / dtype)

    (made, state, told), (other, expected, heard) = run("auto"), run("float32")
    assert made.spec.fingerprint != other.spec.fingerprint
    assert [row["train_loss"] for row in told] == pytest.approx([row["train_loss"] for row in heard], rel=1e-4)
    for part, one in zip(state.base_updates.values(), expected.base_updates.values(), strict=True):
        near(part, one, atol=1e-3)
    updates = tuple(state.base_updates.values())
    assert [bool(part) for part in made.trainer.updated(updates)] == [False, True]
    assert [bool(part) for part in other.trainer.updated(updates)] == [True, False]


def test_differences_on_such_a_base_are_taken_in_float32(tmp_path):
    """Of bfloat16's three digits none would be left."""
    model = loaded(published("llama", tmp_path, torch.bfloat16))
    assert model.base.dtype == torch.bfloat16
    adapter, found = factors(model), dict[str, torch.Tensor]()
    job = replace(toy.job(model.spec, adapter, Plan(everything(adapter)), print), local=Local(batch_size=8, steps=1))
    lower = Lower(1.0, kaiming(model.spec.shapes, 1, model.spec.scale, rng(0, "private")))
    for derivative, compute in (("finite", "bfloat16"), ("double", "float32"), ("first", "float32")):
        one = trainer(model, compute=Compute(compute, "torch"))
        one.fit(
            job, ROWS, lambda _, grads, of=derivative: found.update({of: torch.cat(list(grads.values()))}),
            replace(lower, derivative=derivative),
        )  # fmt: skip
    finite, double, first = (found[name] for name in ("finite", "double", "first"))
    assert torch.linalg.vector_norm(finite - double) < 0.02 * torch.linalg.vector_norm(first - double)


def test_such_a_base_computes_in_bfloat16_unless_told(tmp_path):
    folder = published("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "data").mkdir()
    rows(tmp_path / "data")
    made, _, told = played(settings(tmp_path / "data", {"name": str(folder)}), tmp_path / "run")
    quick = onednn("bfloat16")  # this CPU has units for it
    assert made.config.engine.compute == ("bfloat16" if quick else "float32")
    assert made.spec.execution.number == (2 if quick else 4)
    assert told[-1]["train_loss"] < told[0]["train_loss"] - 0.1


def test_8_bits_of_a_gpu_are_written_out_after_a_pass_too():
    """By which their library moves the scales; it does so on a CPU as well."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.randn(96, 64)
    held, scales, _ = bnb.functional.int8_vectorwise_quant(plain)
    layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(held, requires_grad=False, has_fp16_weights=False, CB=held, SCB=scales)
    assert quantised.held(layer)
    before = quantised.dense(layer)
    assert (before - plain).abs().max() < 0.02 * plain.abs().max()
    layer(torch.ones(1, 64))
    assert layer.weight.SCB is None
    assert torch.equal(quantised.dense(layer), before)
    twin = frozen._converted(torch.nn.Sequential(layer, torch.nn.LayerNorm(96)), [layer], torch.bfloat16)
    assert twin[0].state.CB.data_ptr() == layer.state.CB.data_ptr()
    assert twin[1].weight.dtype == torch.bfloat16
    assert torch.equal(quantised.dense(twin[0]), before)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_checkpoint_in_parts_is_the_same_model(kind, tmp_path):
    if kind == "int8":
        pytest.importorskip("torchao")
    whole, split = published("llama", tmp_path / "whole"), published("llama", tmp_path / "split", max_shard_size="50KB")
    assert len(list(split.glob("*.safetensors"))) > 5
    assert (split / "model.safetensors.index.json").exists()
    one, other = (loaded(folder, quantise=kind) for folder in (whole, split))
    assert one.spec.fingerprint == other.spec.fingerprint


MAPPED = """
import json, sys
from fedrank import config
from fedrank.training import models

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 for name, value in lines.items()}

def load(name):
    given = {"name": name, "dtype": sys.argv[3]}
    raw = {"task": "generate", "model": given, "data": {"name": "x"}, "local": {"max_length": 24}}
    return models.load(config.load(raw), ())

load(sys.argv[1])  # what is imported on the way
before = memory()
model = load(sys.argv[2])
after = memory()
print(json.dumps({name: after[name] - before[name] for name in after} | {"bytes": model.spec.execution.base_bytes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells what memory is whose")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_of_the_files_type_stay_in_the_files(dtype, tmp_path):
    """Only what is read of them comes to memory, where it can be let go; 200 MB in several files."""
    small = published("llama", tmp_path / "small")
    sizes = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2304, **ENDS}
    torch.manual_seed(0)
    large = tmp_path / "large"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(large, max_shard_size="50MB")
    tiny.tokenizer("generate").save_pretrained(large)
    assert len(list(large.glob("*.safetensors"))) >= 4
    paths = os.pathsep.join(filter(None, (str(Path(fedrank.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    told = subprocess.run(
        [sys.executable, "-c", MAPPED, str(small), str(large), dtype],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shutil.rmtree(large)
    found = json.loads(told.stdout.splitlines()[-1])
    if dtype == "auto":
        assert found["bytes"] > 180e6
        assert found["RssFile"] > 0.8 * found["bytes"]  # the fingerprint reads them all
        assert found["RssAnon"] < 0.1 * found["bytes"]
    else:
        assert found["RssAnon"] > 0.8 * found["bytes"]
