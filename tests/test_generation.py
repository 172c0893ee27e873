"""Written texts, their scores, multiple choice, and when a run writes what."""

import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedrank
import toy
from fedrank import config, experiment
from fedrank.adapter import Adapter, kaiming
from fedrank.config import ConfigError, Generation
from fedrank.frame import Refused
from fedrank.protocol import Plan, State, rng
from fedrank.selection import everything
from fedrank.training import evaluation, models, tasks, texts
from fedrank.training.choices import Choices, laid_out
from fedrank.training.data import Rows
from fedrank.training.decoding import Asked, Decoder
from fedrank.training.hooks import live, mounted
from fedrank.training.local import Trainer
from fedrank.training.models import ModelError
from fedrank.training.scoring import Scorer
from fedrank.wire import RANGES, Wire

for library in texts.NEEDED:
    pytest.importorskip(library, reason="scoring texts needs fedrank[generate]")

BY_TEXT = ("exact_match", "bleu", "rouge_l")
BY_CHOICE = ("choice_accuracy", "choice_accuracy_per_byte")

# ---- scores of texts


def test_the_same_text_is_as_good_as_can_be() -> None:
    same = ["the cat sat on the mat", "a dog barked at the old moon"]
    assert texts.scores(same, [[one] for one in same]) == pytest.approx(
        {"exact_match": 1.0, "bleu": 100.0, "rouge_l": 1.0}
    )


def test_nothing_alike_scores_nothing() -> None:
    assert texts.scores(["one two three four"], [["a b c d"]]) == {"exact_match": 0.0, "bleu": 0.0, "rouge_l": 0.0}
    assert texts.scores([""], [["a b c d"]]) == {"exact_match": 0.0, "bleu": 0.0, "rouge_l": 0.0}


@pytest.mark.parametrize(
    ("written", "reference", "bleu", "rouge_l"),
    [
        # Of 1 to 4 words 5/6, 3/5 and 1/4 are right, and 0/3, for which 1/2 of one is counted; the longest common
        # subsequence is "the cat on the mat".
        ("the cat sat on the mat", "the cat is on the mat", 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25, 5 / 6),
        # All right, but shorter by two of six words.
        ("the cat sat on", "the cat sat on the mat", 100 * math.exp(1 - 6 / 4), 2 * 1 * (4 / 6) / (1 + 4 / 6)),
        # Longer by two: 6/8, 5/7, 4/6 and 3/5 are right, which is 3/14 in all.
        ("the cat sat on the mat all day", "the cat sat on the mat", 100 * (3 / 14) ** 0.25, 6 / 7),
    ],
)  # fmt: skip
def test_bleu_and_rouge_by_hand(written: str, reference: str, bleu: float, rouge_l: float) -> None:
    assert texts.scores([written], [[reference]]) == pytest.approx(
        {"exact_match": 0.0, "bleu": bleu, "rouge_l": rouge_l}
    )


def test_bleu_counts_words_over_all_texts_and_rouge_is_a_mean_of_them() -> None:
    found = texts.scores(["a b c d e", "a b c d x y"], [["a b c d e"], ["a b c d e f"]])
    right = ((5 + 4) / (5 + 6)) * ((4 + 3) / (4 + 5)) * ((3 + 2) / (3 + 4)) * ((2 + 1) / (2 + 3))
    assert found == pytest.approx({"exact_match": 0.5, "bleu": 100 * right**0.25, "rouge_l": (1 + 4 / 6) / 2})


def test_the_best_reference_counts_whichever_it_is() -> None:
    good, bad = "the cat sat on the mat", "nothing of the kind at all here"
    best = texts.scores([good], [[good]])
    assert texts.scores([good], [[bad, good]]) == texts.scores([good], [[good, bad]]) == best
    # BLEU takes a word from any of them; ROUGE-L is against one at a time.
    half = texts.scores(["a b c d e f g h"], [["a b c d e", "d e f g h"]])
    assert half["rouge_l"] == pytest.approx(2 * 5 / (8 + 5))
    assert half["bleu"] > max(texts.scores(["a b c d e f g h"], [[one]])["bleu"] for one in ("a b c d e", "d e f g h"))


def test_texts_may_have_differing_numbers_of_references() -> None:
    one, two = "the cat sat on the mat", "a dog barked at the old moon"
    references = [["no", one, "not this"], [two]]
    assert texts.scores([one, two], references) == pytest.approx({"exact_match": 1.0, "bleu": 100.0, "rouge_l": 1.0})
    swapped = texts.scores([two, one], references[::-1])
    assert swapped == pytest.approx({"exact_match": 1.0, "bleu": 100.0, "rouge_l": 1.0})


def test_an_exact_match_is_to_the_letter_but_for_the_space_around() -> None:
    found = texts.scores(["a b", "a b", "A b", "a  b"], [["x", " a b\n"], ["a b"], ["a b"], ["a b"]])
    assert found["exact_match"] == 0.5


def test_libraries_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts.check()
    known = importlib.util.find_spec

    def without(*missing: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else known(name, *a))

    without("sacrebleu", "rouge_score")
    both = (
        r"^generation\.when: scoring texts needs sacrebleu and rouge_score: pip install 'fedrank\[generate\]'; or never"
    )
    with pytest.raises(ConfigError, match=both):
        texts.check()
    without("rouge_score")
    folder = held(tmp_path)
    with pytest.raises(ConfigError, match=r"scoring texts needs rouge_score: pip"):
        fedrank.run(settings(folder), "generation.when=end", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    experiment.prepare(config.load(settings(folder)))  # who writes nothing needs nothing


# ---- a model, and what it writes

BASE = config.load({"task": "generate", "model": {"name": "tiny-decoder"}, "data": {"name": "x"}})


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load(BASE, ())


def adapter(model: models.Model) -> Adapter:
    """One that does something."""
    return toy.drawn(replace(model.spec, rank=2, scale=0.3))


def trainer(model: models.Model) -> Trainer:
    encoded = tasks.encode(Rows(["a"], completion=["b"]), model.tokenizer, "generate", 64)
    return Trainer(model, encoded, encoded, 0.1, 1, "cpu")


def decoder(model: models.Model, seed: int = 0, **settings: Any) -> Decoder:
    return Decoder(trainer(model), Generation(**{"max_tokens": 8, **settings}), seed)


def some(count: int) -> Rows:
    """Prompts of differing lengths."""
    return Rows(["p" * (1 + at % 5) + f" {at}:" for at in range(count)], completion=[str(at) for at in range(count)])


def greedy(model: models.Model, ids: np.ndarray, count: int) -> list[int]:
    """The likeliest tokens after these, one at a time, on the plain model."""
    on = live(adapter(model), Adapter({}, 1.0, {}), "", "cpu")
    whole = torch.from_numpy(ids)[None].long()
    with torch.inference_mode(), mounted(model.modules, {}, on):
        for _ in range(count):
            best = model.base(input_ids=whole).logits[0, -1].argmax()
            whole = torch.cat([whole, best[None, None]], 1)
    found: list[int] = whole[0, len(ids) :].tolist()
    return found


def test_rows_of_one_prompt_are_its_references(model: models.Model) -> None:
    rows = Rows(["bb", "a", "bb", "ccc"], completion=["1", "2", "3", "4"])
    found = decoder(model).prompts(rows)
    assert (found.text, found.references, found.cut) == (["a", "bb", "ccc"], [["2"], ["1", "3"], ["4"]], 0)
    assert [model.tokenizer.decode(ids) for ids in found.ids] == found.text
    assert len(found) == 3


def test_so_many_prompts_are_drawn_and_the_same_every_time(model: models.Model) -> None:
    rows = some(40)
    found = [decoder(model, seed, prompts=7).prompts(rows).text for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == len(set(found[2])) == 7
    assert set(found[0]) < set(rows.text)
    assert len(decoder(model, prompts=40).prompts(rows)) == len(decoder(model, prompts=99).prompts(rows)) == 40
    twice = Rows(rows.text * 2, completion=["x"] * 80)
    assert {tuple(own) for own in decoder(model, prompts=7).prompts(twice).references} == {("x", "x")}


def test_a_prompt_loses_its_start_where_the_text_would_not_fit_behind_it(model: models.Model) -> None:
    rows = Rows(["0123456789", "012345", "x"], completion=["a", "b", "c"])
    assert models.longest(model.base, model.tokenizer) == 256
    found = decoder(model, max_tokens=250).prompts(rows)
    assert [model.tokenizer.decode(ids) for ids in found.ids] == ["x", "012345", "456789"]
    assert (found.text, found.cut) == (["x", "012345", "0123456789"], 1)
    assert decoder(model, max_tokens=247).prompts(rows).cut == 1
    assert decoder(model, max_tokens=246).prompts(rows).cut == 0
    for count in (256, 300):
        with pytest.raises(ModelError, match=f"generation.max_tokens={count}: the model reads at most 256 tokens"):
            decoder(model, max_tokens=count).prompts(rows)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}[CLS]{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_s_prompt_ends_where_the_assistant_begins(model: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)
    found = decoder(model).prompts(Rows(["user: q"], completion=["a"], turns=[(("user", "q"),)]))
    assert [model.tokenizer.decode(ids) for ids in found.ids] == ["<user>q[CLS]<assistant>"]
    assert (found.text, found.references) == (["user: q"], [["a"]])


def test_a_text_is_of_the_likeliest_tokens_and_as_long_as_asked(model: models.Model) -> None:
    writer = decoder(model, max_tokens=6)
    asked = writer.prompts(some(9))
    found = writer.write(Asked(adapter(model), asked.ids))
    tokens = [greedy(model, ids, 6) for ids in asked.ids]
    assert found == [model.tokenizer.decode(own, skip_special_tokens=True).strip() for own in tokens]
    assert len(set(found)) > 1
    assert {len(own) for own in tokens} == {6}


def test_a_text_stops_where_it_ends() -> None:
    """Whoever says so: the model's own settings for generation, or the template by which turns end."""
    own = models.load(BASE, ())
    asked, tokens = decoder(own).prompts(some(9)), own.tokenizer
    whole = [greedy(own, ids, 8) for ids in asked.ids]
    at = max(whole[0].index(token) for token in whole[0])
    assert at > 0
    end = whole[0][at]
    tokens.add_tokens(tokens.convert_ids_to_tokens([end]), special_tokens=True)
    ends = [one.index(end) if end in one else 8 for one in whole]
    assert decoder(own).ends == {tokens.eos_token_id}
    for told in (end, [end, tokens.eos_token_id]):
        own.base.generation_config.eos_token_id = told
        writer = decoder(own)
        assert writer.ends == {tokens.eos_token_id, end}
        stopped = [tokens.decode(one[:last]).strip() for one, last in zip(whole, ends, strict=True)]
        assert writer.write(Asked(adapter(own), asked.ids)) == stopped
    own.base.generation_config.eos_token_id = None
    own.base.generation_config.bad_words_ids = [[end]]  # nor does anything else of them count
    before = own.base.generation_config
    assert decoder(own, max_tokens=8).write(Asked(adapter(own), asked.ids)) == [
        tokens.decode(one, skip_special_tokens=True).strip() for one in whole
    ]
    assert own.base.generation_config is before
    tokens.chat_template = CHAT
    assert decoder(own).ends == {tokens.eos_token_id}  # rows are plain
    assert replace(decoder(own), chats=True).ends == {tokens.eos_token_id, tokens.convert_tokens_to_ids("[CLS]")}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_texts_do_not_depend_on_batches(model: models.Model, size: int) -> None:
    asked = decoder(model).prompts(some(9))
    whole = decoder(model, batch_size=9).write(Asked(adapter(model), asked.ids))
    assert decoder(model, batch_size=size).write(Asked(adapter(model), asked.ids)) == whole


def test_draws_are_the_seed_s(model: models.Model) -> None:
    asked = decoder(model).prompts(some(9))

    def written(seed: int, **settings: Any) -> list[str]:
        return decoder(model, seed, temperature=1.0, batch_size=4, **settings).write(Asked(adapter(model), asked.ids))

    torch.manual_seed(3)
    before, one = torch.get_rng_state(), written(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)  # whatever was drawn before
    assert written(0) == one
    assert written(1) != one
    plain = decoder(model).write(Asked(adapter(model), asked.ids))
    assert one != plain
    assert written(0, top_k=1) == written(1, top_p=1e-6) == plain


def test_draws_are_addressed_by_the_number_of_a_batch_s_first_prompt(model: models.Model) -> None:
    writer = decoder(model, temperature=1.0, batch_size=4)
    asked = writer.prompts(some(12))
    whole = writer.write(Asked(adapter(model), asked.ids))
    assert writer.write(Asked(adapter(model), asked.ids[4:8], first=4)) == whole[4:8]
    assert writer.write(Asked(adapter(model), asked.ids[4:8])) != whole[4:8]


def test_texts_are_written_on_the_base_as_it_was_updated(model: models.Model) -> None:
    writer, moved = decoder(model), adapter(model)
    asked, still = writer.prompts(some(9)), kaiming(model.spec.shapes, 2, model.spec.scale, rng(0, "still"))
    there = writer.write(Asked(still, asked.ids, (moved,)))
    assert there == writer.write(Asked(moved, asked.ids)) != writer.write(Asked(still, asked.ids))


def test_several_adapters_write_each_its_own_and_one_s_failure_is_its_own(model: models.Model) -> None:
    writer, moved = decoder(model), adapter(model)
    ids = writer.prompts(some(4)).ids
    asked = [Asked(moved, ids), Asked(moved.only("A"), ids), Asked(moved, ids[:2])]
    first, second, third = writer.write_all(asked)
    assert isinstance(first, list)
    assert isinstance(second, ValueError)
    assert first == writer.write(Asked(moved, ids))
    assert third == first[:2]


# ---- multiple choice


def multiple(*rows: tuple[str, tuple[str, ...], int]) -> Rows:
    prompts, choices, answers = zip(*rows, strict=True)
    right = [own[at] for own, at in zip(choices, answers, strict=True)]
    return Rows(list(prompts), completion=right, choices=list(choices), answer=np.array(answers))


THREE = multiple(("a:", ("x", "yy"), 0), ("bb:", ("é", "w", "vvv"), 2), ("c:", ("zz", "z"), 1))


def test_every_choice_is_a_row_after_its_prompt(model: models.Model) -> None:
    found = laid_out(THREE, partial(tasks.encode, tokenizer=model.tokenizer, task="generate", max_length=32))
    assert (found.starts.tolist(), found.sizes.tolist()) == ([0, 2, 5, 7], [1, 2, 2, 1, 3, 2, 1])
    ids, starts = found.encoded.fields["input_ids"], found.encoded.starts
    rows = [model.tokenizer.decode(ids[a:b]) for a, b in pairwise(starts)]
    assert rows == [f"{text}[SEP]" for text in ("a:x", "a:yy", "bb:é", "bb:w", "bb:vvv", "c:zz", "c:z")]
    assert found.of(np.array([2, 0])).tolist() == [5, 6, 0, 1]
    chat = replace(THREE, turns=[(("user", text),) for text in THREE.text])
    tokens = models.tiny.tokenizer("generate")
    tokens.chat_template = CHAT
    whole = laid_out(chat, partial(tasks.encode, tokenizer=tokens, task="generate", max_length=64)).encoded
    assert tokens.decode(whole.fields["input_ids"][: whole.starts[1]]) == "<user>a:[CLS]<assistant>x[CLS]"


def test_a_choice_s_likelihood_is_the_sum_over_its_tokens_and_its_end(model: models.Model) -> None:
    found = laid_out(THREE, partial(tasks.encode, tokenizer=model.tokenizer, task="generate", max_length=32))
    scorer, rows = Scorer(trainer(model)), found.of(np.array([1, 0]))
    ours = scorer.likelihoods(adapter(model), found.encoded, rows)
    by_hand, on = [], live(adapter(model), Adapter({}, 1.0, {}), "", "cpu")
    with torch.inference_mode(), mounted(model.modules, {}, on):
        for prompt, choice in (("bb:", "é"), ("bb:", "w"), ("bb:", "vvv"), ("a:", "x"), ("a:", "yy")):
            head, tail = (model.tokenizer(text)["input_ids"] for text in (prompt, choice))
            tail = [*tail, model.tokenizer.eos_token_id]
            logits = model.base(input_ids=torch.tensor([head + tail])).logits[0].double()
            ahead = logits.log_softmax(-1)[len(head) - 1 : -1]
            by_hand.append(float(ahead.gather(1, torch.tensor(tail)[:, None]).sum()))
    assert ours.tolist() == pytest.approx(by_hand, rel=1e-5)
    alone = [scorer.likelihoods(adapter(model), found.encoded, rows[at : at + 1])[0] for at in range(5)]
    assert ours.tolist() == pytest.approx(alone, rel=1e-6)


def test_by_the_byte_a_long_choice_is_as_good_as_a_short_one() -> None:
    answer, sizes = np.array([1, 0, 1]), np.array([1, 4, 1, 4, 2, 2])
    choices = Choices(tasks.Encoded({}, np.zeros(7, int), np.zeros(0), {}), np.array([0, 2, 4, 6]), answer, sizes)
    likelihood = np.array([-2.0, -4.0, -2.0, -4.0, -3.0, -1.0])
    assert choices.right(np.arange(3), likelihood) == pytest.approx(dict(zip(BY_CHOICE, (2 / 3, 2 / 3), strict=True)))
    assert choices.right(np.array([0]), likelihood[:2]) == dict(zip(BY_CHOICE, (0.0, 1.0), strict=True))
    assert choices.right(np.array([2, 1]), likelihood[[4, 5, 2, 3]]) == dict(zip(BY_CHOICE, (1.0, 0.5), strict=True))


def test_a_model_that_knows_nothing_takes_the_shortest_choice_but_by_the_byte_the_longest(model: models.Model) -> None:
    rows = multiple(*((f"{at}:", ("a", "bcdefghi"), 1) for at in range(5)))
    found = laid_out(rows, partial(tasks.encode, tokenizer=model.tokenizer, task="generate", max_length=32))
    still = kaiming(model.spec.shapes, 2, model.spec.scale, rng(0, "still"))
    weights = Scorer(trainer(model)).likelihoods(still, found.encoded, found.of(np.arange(5)))
    assert found.right(np.arange(5), weights) == dict(zip(BY_CHOICE, (0.0, 1.0), strict=True))


# ---- runs


def held(folder: Path, **splits: list[Mapping[str, Any]]) -> Path:
    """Each split as JSON lines; by default words to be turned round, for some of which two ways are right."""
    words = ("red", "green", "blue", "grey")
    pairs = [(f"{word} {at % 5}:", word[::-1] + "!" * (at % 2)) for at in range(8) for word in words]
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for split, rows in ({"train": lines, "test": lines} | splits).items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "task": "generate", "model": {"name": "tiny-decoder"}, "clients": {"count": 3}, "adapter": {"rank": 4},
        "data": {"path": str(folder), "partition": {"kind": "iid"}},
        "rounds": {"count": 4, "cohort": 2, "evaluate_every": 2},
        "local": {"max_length": 24, "batch_size": 8, "lr": 0.02},
        "engine": {"compute": "float32", "products": "torch", "workers": 1},
        "generation": {"max_tokens": 6, "prompts": 7}, **sections,
    }  # fmt: skip


@dataclass(frozen=True)
class Runs:
    never: fedrank.Run
    end: fedrank.Run
    always: fedrank.Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("runs")
    whole = settings(held(place))
    return Runs(*(fedrank.run(whole, f"generation.when={when}", out=place / when) for when in Runs.__annotations__))


def having(run: fedrank.Run, *names: str) -> list[int]:
    """The rounds whose rows have all of these; there is none that has some of them only."""
    there = {row["round"]: [name in row for name in names] for row in run.rounds}
    assert all(all(found) == any(found) for found in there.values())
    return [round for round, found in there.items() if all(found)]


@pytest.mark.parametrize(("when", "rounds"), [("never", []), ("end", [4]), ("always", [2, 4])])
def test_texts_are_scored_when_the_config_says(runs: Runs, when: str, rounds: list[int]) -> None:
    run: fedrank.Run = getattr(runs, when)
    assert having(run, *BY_TEXT, *(f"personal_{name}" for name in BY_TEXT)) == rounds
    assert having(run, "perplexity", "personal_perplexity") == [2, 4]
    scores = {f"{whose}{name}" for whose in ("", "personal_") for name in BY_TEXT}
    assert scores & run.summary.keys() == (scores if rounds else set())
    assert (run.path / "texts.jsonl").exists() == bool(rounds)
    for row in run.rounds:
        if "bleu" in row:
            assert 0 <= row["bleu"] <= 100
            assert 0 <= row["exact_match"] <= 1
            assert 0 <= row["rouge_l"] <= 1


@pytest.mark.parametrize("when", ["never", "end", "always"])
def test_perplexity_is_that_of_the_mean_loss_of_a_token(runs: Runs, when: str) -> None:
    run: fedrank.Run = getattr(runs, when)
    for found in (*(row for row in run.rounds if "perplexity" in row), run.summary):
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert run.summary["personal_perplexity"] > 1
    assert run.summary["clients_failed"] == 0


def test_perplexity_is_a_number_whatever_the_loss() -> None:
    assert (evaluation.perplexity(0.0), evaluation.perplexity(math.log(7))) == (1.0, pytest.approx(7))
    assert evaluation.perplexity(1e9) == evaluation.perplexity(evaluation.LARGEST) < RANGES["perplexity"][1]


def test_what_was_written_is_kept_beside_what_was_right(runs: Runs) -> None:
    for run in (runs.end, runs.always):
        kept = [json.loads(line) for line in (run.path / "texts.jsonl").read_text().splitlines()]
        assert [list(one) for one in kept] == [["prompt", "written", "references"]] * 7
        lines = [
            json.loads(line) for line in (Path(run.config.data.path or "") / "test.jsonl").read_text().splitlines()
        ]
        for one in kept:
            assert one["references"] == [line["completion"] for line in lines if line["prompt"] == one["prompt"]]
        found = texts.scores([one["written"] for one in kept], [one["references"] for one in kept])
        assert {name: run.summary[name] for name in BY_TEXT} == found
    assert (runs.end.path / "texts.jsonl").read_text() == (runs.always.path / "texts.jsonl").read_text()


def test_texts_of_an_end_that_was_none_are_gone(tmp_path: Path) -> None:
    run = fedrank.run(settings(held(tmp_path)), "generation.when=end", "rounds.count=1", out=tmp_path / "run")
    before = (run.path / "texts.jsonl").read_text()
    fedrank.resume(run.path, "rounds.count=+1", "generation.when=never")
    assert not (run.path / "texts.jsonl").exists()
    fedrank.resume(run.path, "rounds.count=+1", "generation.when=end")
    assert (run.path / "texts.jsonl").read_text() != before


def test_a_finished_run_is_not_asked_for_texts(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"has played all its rounds, .*rounds\.count=\+1 goes on"):
        fedrank.resume(runs.never.path, "generation.when=end")


def test_one_that_died_over_its_texts_goes_on_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fedrank.Run(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "summarise", None)  # it ends before it is summed up
        with pytest.raises(TypeError):
            fedrank.run(settings(held(tmp_path)), "generation.when=end", out=run.path)
    assert not (run.path / "summary.json").exists()
    fedrank.resume(run.path, "generation.when=never")
    assert run.summary["rounds"] == 4


def test_writing_leaves_training_as_it_is(runs: Runs) -> None:
    assert toy.equal(runs.never.state, runs.end.state)
    assert toy.equal(runs.never.state, runs.always.state)
    for name in ("loss", "accuracy", "perplexity", "train_loss", "personal_accuracy"):
        assert [row.get(name) for row in runs.never.rounds] == [row.get(name) for row in runs.always.rounds]
    for name in BY_TEXT:
        assert runs.end.summary[name] == runs.always.summary[name]
        assert runs.end.summary[f"personal_{name}"] == runs.always.summary[f"personal_{name}"]


def test_what_is_evaluated_in_parts_is_what_is_written_at_once(tmp_path: Path) -> None:
    drawn = {"when": "always", "max_tokens": 6, "prompts": 9, "batch_size": 3, "temperature": 1.0}
    parts = experiment.prepare(config.load(settings(held(tmp_path), generation=drawn)))
    found = parts.evaluate(parts.begin.adapter, (), False)["texts"]
    writer = Decoder(parts.trainer, parts.config.generation, parts.config.seed)
    ids = [np.array(writer.trainer.model.tokenizer(one["prompt"])["input_ids"]) for one in found]
    assert [one["written"] for one in found] == writer.write(Asked(parts.begin.adapter, ids))


def test_only_what_generates_can_write() -> None:
    for when in ("end", "always"):
        with pytest.raises(ConfigError, match=f"generation.when={when}: task classify writes no texts; with it, never"):
            config.load({"data": {"name": "docstrings"}, "generation": {"when": when}})
    assert config.load({"data": {"name": "docstrings"}, "generation": {"max_tokens": 3}}).generation.when == "never"


@pytest.mark.parametrize(
    ("key", "value"),
    [("when", "often"), ("prompts", 0), ("max_tokens", 0), ("temperature", -1), ("temperature", math.inf), ("top_p", 0),
     ("top_p", 1.1), ("top_k", -1), ("batch_size", 0)],
)  # fmt: skip
def test_settings_that_cannot_be(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"generation.{key}"):
        config.load({"task": "generate", "data": {"path": "x"}, "generation": {key: value}})


def test_texts_that_do_not_fit_are_told_of_before_a_run_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = settings(held(tmp_path), generation={"when": "end", "prompts": 7})
    with caplog.at_level(logging.WARNING, "fedrank"):
        experiment.prepare(config.load(whole, ["generation.max_tokens=245"]))
        assert not caplog.records
        experiment.prepare(config.load(whole, ["generation.max_tokens=255"]))
    assert caplog.messages == ["7 of 7 prompts lose their start, for texts to fit behind"]
    caplog.clear()
    long = [{"prompt": f"{at} " + "x" * 18, "completion": "y", "client": f"c{at % 2}"} for at in range(40)]
    own = whole | {"data": {"path": str(held(tmp_path, train=long)), "partition": {"kind": "natural"}}}
    with caplog.at_level(logging.WARNING, "fedrank"):
        experiment.prepare(config.load(own, ["generation.max_tokens=240"]))
    assert caplog.messages == ["clients' own tests: 7 of 7 prompts lose their start"]
    with pytest.raises(ModelError, match=r"generation\.max_tokens=256: the model reads at most 256 tokens"):
        fedrank.run(whole, "generation.max_tokens=256", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    experiment.prepare(config.load(whole, ["generation.max_tokens=256", "generation.when=never"]))


@pytest.mark.slow
def test_where_no_model_is_everyone_s_only_clients_write(tmp_path: Path) -> None:
    whole = settings(held(tmp_path), method={"name": "fedsa_lora"})
    run = fedrank.run(whole, "generation.when=end", "rounds.count=2", out=tmp_path / "run")
    assert {f"personal_{name}" for name in (*BY_TEXT, "perplexity")} <= run.summary.keys()
    assert not {*BY_TEXT, "perplexity"} & run.summary.keys()
    assert not (run.path / "texts.jsonl").exists()


# ---- choices in a run


def picked(folder: Path) -> Path:
    """Of two choices that are equally long, the prompt's last letter says which is right, by its place or its text."""
    draw, rows = np.random.default_rng(0), []
    for at in range(160):
        right, places = ("aa", "bb")[at % 2], draw.permutation(["aa", "bb"]).tolist()
        answer = places.index(right) if at % 3 else right
        rows.append({"prompt": f"{at // 2 % 40} {'xy'[at % 2]}:", "choices": places, "answer": answer})
    return held(folder, train=rows[:120], test=rows[120:])


def test_training_makes_the_right_choice_the_likeliest(tmp_path: Path) -> None:
    played, local = {"count": 4, "cohort": 3, "evaluate_every": 4}, {"max_length": 24, "batch_size": 4, "lr": 0.01}
    whole = settings(picked(tmp_path), rounds=played, local=local)
    made = experiment.prepare(config.load(whole))
    before, run = made.evaluate(made.begin.adapter, (), False), fedrank.run(whole, out=tmp_path / "run")
    for name in BY_CHOICE:
        assert before[name] < 0.75
        for score in (name, f"personal_{name}"):
            assert run.rounds[-1][score] == run.summary[score] > 0.9
    assert not having(run, *BY_TEXT)


# ---- the same from any number of workers


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_likelihoods_are_made_in_the_same_batches_whoever_makes_them(tmp_path: Path) -> None:
    """Bits may hang on what a row is computed with."""
    made = experiment.prepare(config.load(settings(picked(tmp_path))))
    judge = made.evaluate.__self__
    asked = []

    def seen(part: Any) -> Any:
        what, _, _, pieces = part
        if what == "likelihoods":
            asked.extend(piece.tolist() for piece in pieces)
        return judge._part(part)

    for workers in (1, 2, 3):
        asked.clear()
        one = replace(judge, workers=workers, share=lambda work: lambda parts: map(seen, parts))
        found = one.everywhere(made.begin.adapter, (), False)
        assert sorted(asked) == sorted(batch.tolist() for batch in one.scorer.batches(one.population.choices.encoded))
        assert 0 <= found["choice_accuracy"] <= 1
    assert len(asked) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_write_and_choose_the_same_to_the_bit(tmp_path: Path) -> None:
    folder = picked(tmp_path)
    drawn = {"when": "always", "max_tokens": 5, "temperature": 0.8, "batch_size": 3, "prompts": 10}
    whole = settings(folder, generation=drawn, rounds={"count": 2, "cohort": 3, "evaluate_every": 1})
    one, two = (fedrank.run(whole, f"engine.workers={n}", "engine.stack=1", out=tmp_path / str(n)) for n in (1, 2))
    assert toy.equal(one.state, two.state)
    for ours, theirs in zip(one.rounds, two.rounds, strict=True):
        same = [name for name in ours if not name.endswith("seconds") or name == "clock_seconds"]
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        assert {*BY_TEXT, *BY_CHOICE} <= set(same)
    assert (one.path / "texts.jsonl").read_bytes() == (two.path / "texts.jsonl").read_bytes()
    for name in (*BY_TEXT, *BY_CHOICE, "perplexity"):
        assert one.summary[name] == two.summary[name]
        assert one.summary[f"personal_{name}"] == two.summary[f"personal_{name}"]


# ---- what was cut


def test_rows_that_are_too_long_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "p", "completion": "c"}
    train = [row] * 20 + [row | {"prompt": "p" * 11}] * 3 + [row | {"prompt": "pp", "completion": "c" * 30}] * 2
    test = [row] * 9 + [row | {"completion": "c" * 12}]
    whole = settings(held(tmp_path, train=train, test=test), local={"max_length": 12})
    with caplog.at_level(logging.WARNING, "fedrank"):
        experiment.prepare(config.load(whole))
    assert [record.getMessage() for record in caplog.records] == [
        "train: of 25 rows, 5 prompts their start and 2 completions their end lost to local.max_length=12",
        "test: of 10 rows, 1 completions their end lost to local.max_length=12",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedrank"):
        experiment.prepare(config.load(whole, ["local.max_length=33"]))
    assert not caplog.records


def test_so_are_choices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong choice is no row of its own, but takes part in the scores as it was left."""
    row = {"prompt": "p", "choices": ["c", "c" * 12], "answer": "c"}
    whole = settings(held(tmp_path, train=[row] * 20, test=[row] * 10), local={"max_length": 12})
    with caplog.at_level(logging.WARNING, "fedrank"):
        experiment.prepare(config.load(whole))
    assert [record.getMessage() for record in caplog.records] == [
        "test, each choice a row: of 20 rows, 10 completions their end lost to local.max_length=12"
    ]


# ---- over the wire


def evaluated(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """What a server reads of what a client scored."""
    spec = toy.small()
    begin = toy.drawn(spec)
    ends, state, plan = (
        Wire(spec, begin, "f32", "run", 0),
        State(1, 3, begin),
        Plan({}, everything(begin), learn="", up=""),
    )
    frame = ends.evaluation(ends.open_request(ends.request("evaluate", "c0", plan, state)), metrics)
    return ends.open_reply(frame, "evaluate", 2, "c0", plan, begin).metrics


BOUNDS = {
    "bleu": (0, 100), "exact_match": (0, 1), "rouge_l": (0, 1), "perplexity": (1, 1e30),
    **dict.fromkeys(BY_CHOICE, (0, 1)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "bounds"), BOUNDS.items())
def test_scores_out_of_their_range_are_refused(name: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    for value in (low, (low + high) / 2, high):
        assert evaluated({"accuracy": 0.5, name: value}) == {"accuracy": 0.5, name: value}
    for value in (low - 1, high * 1.01):
        why = f"metric '{name}' must be a finite number from {low:g} to {high:g}, got"
        with pytest.raises(Refused, match=re.escape(why)):
            evaluated({"accuracy": 0.5, name: value})
