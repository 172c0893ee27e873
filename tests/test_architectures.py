"""Decoders of every family: trained, pruned, written in PEFT's format and decoded, at tiny random size."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fedrank
import toy
from fedrank import config, ledger
from fedrank.adapter import Adapter
from fedrank.protocol import State
from fedrank.training import fused, models, tiny
from fedrank.training.compute import Compute
from fedrank.training.data import Rows
from fedrank.training.decoding import Asked, Decoder
from fedrank.training.frozen import freeze
from fedrank.training.hooks import live, mounted
from fedrank.training.local import Trainer
from fedrank.training.tasks import encode
from toy import equal

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 260}
GROUPED: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **ENDS}),  # Conv1D
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 6}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 6}),  # capped scores: its rows are padded
    "gemma3": ("Gemma3Text", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "opt": ("OPT", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
                    "max_position_embeddings": 64, "word_embed_proj_dim": 32, **ENDS}),
}  # fmt: skip
LINEARS = {
    "gpt2": {"c_attn", "c_proj", "c_fc"}, "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}  # fmt: skip
GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
WORDS = ("red", "green", "blue", "grey")
METHODS = {"legend": {}, "fed_plora": {}, "pf2lora": {"private_rank": 1}, "flora": {}, "fedex_lora": {}}


def saved(family: str, folder: Path) -> Path:
    """A random model of this family on disk, as its authors would publish it."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**sizes)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tiny.tokenizer("generate").save_pretrained(folder)
    return folder


def rows(folder: Path) -> Path:
    lines = [{"prompt": f"{word} {at % 7}:", "completion": word[::-1]} for at in range(12) for word in WORDS]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@dataclass(frozen=True)
class Played:
    """A family's model on disk, and a run of FedARA over it that pruned whole modules."""

    family: str
    folder: Path
    settings: dict[str, Any]
    run: fedrank.Run
    model: models.Model

    @property
    def adapter(self) -> Adapter:
        return self.run.state.adapter


# Mistral's windows and Qwen's and Gemma's heads are in Gemma 2 and 3, too.
MARKS = (
    dict.fromkeys(FAMILIES, (pytest.mark.slow,))
    | {"gpt2": (), "llama": ()}
    | dict.fromkeys(("mistral", "qwen3", "gemma"), toy.EXHAUSTIVE)
)


@pytest.fixture(scope="module", params=toy.grouped(pytest.param(name, marks=marks) for name, marks in MARKS.items()))
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    place = tmp_path_factory.mktemp(request.param)
    folder = saved(request.param, place / "model")
    (place / "data").mkdir()
    settings: dict[str, Any] = {
        "task": "generate", "model": {"name": str(folder)}, "clients": {"count": 3},
        "data": {"path": str(rows(place / "data")), "partition": {"kind": "iid"}},
        "rounds": {"count": 6, "cohort": 3, "evaluate_every": 6}, "local": {"max_length": 24, "batch_size": 4, "lr": 0.02},
        "adapter": {"rank": 4}, "method": {"name": "fedara", "target_rank": 1},
    }  # fmt: skip
    run = fedrank.run(settings, out=place / "run")
    return Played(request.param, folder, settings, run, models.load(run.config, ()))


def test_adapters_are_on_all_linears_of_the_blocks(played: Played) -> None:
    leaves = {name.rpartition(".")[2] for name in played.model.modules}
    assert leaves == LINEARS.get(played.family, GATED)
    assert len(played.model.modules) == 3 * len(leaves) + 3 * (
        played.family == "gpt2"
    )  # two of which are called c_proj


def test_it_learns(played: Played) -> None:
    losses = [row["train_loss"] for row in played.run.rounds]
    assert losses[-1] < losses[0] - 0.2  # its output layer is frozen, and small
    assert played.run.summary["perplexity"] == pytest.approx(np.exp(played.run.summary["loss"]))


def test_modules_are_pruned(played: Played) -> None:
    summary = played.run.summary
    assert 0 < summary["modules_alive"] < summary["modules"]
    assert summary["components"] == summary["components_at_start"] // 4


def test_peft_gives_the_same_logits_as_ours(played: Played) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(played.folder).eval()
    batch = {"input_ids": torch.randint(4, 260, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    with torch.inference_mode():
        before = base(**batch).logits
        theirs = peft.PeftModel.from_pretrained(base, played.run.path / "adapter").eval()
        found = theirs(**batch).logits
        on = live(played.adapter, Adapter({}, played.adapter.scale, {}), "", "cpu")
        with mounted(played.model.modules, {}, on):
            ours = played.model.network(**batch)
        with fused.mounted(freeze(played.model, Compute("float32", "torch"), "cpu"), [on]):
            together = played.model.network(**batch)
    assert (ours - before).abs().max() > 1e-2  # the adapter does something
    assert (ours - found).abs().max() < 1e-5
    assert (together - found).abs().max() < 1e-5
    assert len({n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}) == len(played.adapter.blocks)


def test_rows_are_packed_where_attention_can_be(played: Played) -> None:
    """And packed rows, longer than a window, give what padded ones do."""
    model, frozen = played.model, freeze(played.model, Compute("float32", "torch"), "cpu")
    assert (frozen.first is None) == (played.family == "gemma2")
    data = encode(Rows(["a", "bb b", "c" * 9], completion=["x", "yy", "zzz"]), model.tokenizer, "generate", 24)
    on = live(played.adapter, Adapter({}, played.adapter.scale, {}), "", "cpu")
    found = []
    with torch.inference_mode(), fused.mounted(frozen, [on]) as mounts:
        for first in (frozen.first, None):
            frozen.first = first
            ((logits, labels),) = fused.outputs(frozen, data, [(mounts[0], np.arange(3))], mounts, "cpu")
            assert len(logits) == len(labels) == 2 + 3 + 4
            found.append(logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_texts_are_those_of_one_prompt_at_a_time_without_us(played: Played) -> None:
    peft = pytest.importorskip("peft")
    settings = config.load({**played.settings, "generation": {"when": "end", "max_tokens": 7, "batch_size": 3}})
    data = encode(Rows(["a"], completion=["b"]), played.model.tokenizer, "generate", 24)
    decoder = Decoder(Trainer(played.model, data, data, 0.1, 1, "cpu"), settings.generation, 0)
    prompts = decoder.prompts(Rows(["red 1:", "a longer prompt:", "x", "grey 3:"], completion=list("abcd")))
    ours = decoder.write(Asked(played.adapter, prompts.ids))
    base = transformers.AutoModelForCausalLM.from_pretrained(played.folder).eval()
    theirs = peft.PeftModel.from_pretrained(base, played.run.path / "adapter").eval()
    for ids, text in zip(prompts.ids, ours, strict=True):
        whole = torch.from_numpy(ids)[None].long()
        with torch.inference_mode():
            for _ in range(7):
                logits = theirs(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -1]
                if (best := int(logits.argmax())) == played.model.tokenizer.eos_token_id:
                    break
                whole = torch.cat([whole, torch.tensor([[best]])], 1)
        assert text == played.model.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_it_repeats_and_resumes_to_the_same_bits(played: Played, tmp_path: Path) -> None:
    half = fedrank.run({**played.settings}, "rounds.count=6", out=tmp_path / "again")
    assert equal(half.state, played.run.state)
    stopped = tmp_path / "stopped"

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 3:
            raise Stop

    with pytest.raises(Stop):
        fedrank.run({**played.settings}, out=stopped, watch=stop)
    state: State = fedrank.resume(stopped).state
    assert equal(state, played.run.state)
    assert [row["train_loss"] for row in ledger.read(stopped / "rounds.jsonl")] == [
        row["train_loss"] for row in played.run.rounds
    ]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_learn_on_it_too(played: Played, method: str, tmp_path: Path) -> None:
    settings = {**played.settings, "method": {"name": method, **METHODS[method]}}
    run = fedrank.run(settings, "rounds.count=3", "rounds.evaluate_every=3", "local.lr=0.005", out=tmp_path / "run")
    losses = [row["train_loss"] for row in run.rounds]
    assert run.summary["clients_failed"] == 0
    assert losses[-1] < losses[0]
    assert run.summary["personal_perplexity"] > 1
