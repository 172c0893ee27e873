"""The local step: how many, at which rate, with what drawn, and what comes of it; and the tasks it is made of."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import toy
from fedrank.adapter import Adapter, gaussian, kaiming
from fedrank.config import Local
from fedrank.protocol import Job, Plan, Update, rng
from fedrank.training import course, local, models, scoring, tasks
from fedrank.training.course import TrainingError
from fedrank.training.data import Rows
from fedrank.training.local import Trainer
from fedrank.training.scoring import Scorer, majority

ROWS = np.arange(20)


def start(form: Callable[..., Adapter] = kaiming) -> Adapter:
    spec = toy.encoder().spec
    return spec.with_head(form(spec.shapes, 2, spec.scale, rng(0, "start")))


def work(round: int = 1, client: str = "c0", learn: str = "BeAh", **settings: Any) -> Job:
    """A job on all components of two modules, with these local settings."""
    adapter = start()
    names = [name for name in adapter.blocks if name.endswith("query")][1:]
    adapter = adapter.take({name: np.arange(2) for name in names})
    job = toy.job(toy.encoder().spec, adapter, Plan(train=adapter.ids, learn=learn), print, client, round)
    return replace(job, local=Local(**{"batch_size": 8, **settings}))


def fit(job: Job, rows: np.ndarray = ROWS, lr: float = 1e-2, **more: Any) -> Update:
    return toy.trainer(lr).fit(job, rows, **more)


class Recorder:
    """The optimizer's arguments and the norms it was given, without changing what it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: list[float] = []
        self.decays: list[float] = []
        self.norms: list[float] = []
        self.sizes: list[int] = []
        recorder, real = self, torch.optim.AdamW

        class Spy(real):
            def __init__(self, params: Any, **options: Any) -> None:
                params = list(params)
                super().__init__(params, **options)
                recorder.rates.append(options["lr"])
                recorder.decays.append(options["weight_decay"])
                recorder.sizes.append(sum(p.numel() for p in params))

            def step(self, closure: Any = None) -> Any:
                grads = torch.cat([p.grad.reshape(-1) for g in self.param_groups for p in g["params"]])
                recorder.norms.append(float(grads.norm()))
                return super().step(closure)

        monkeypatch.setattr(torch.optim, "AdamW", Spy)


# ---- how much work


@pytest.mark.parametrize(
    ("settings", "steps", "seen"),
    [({}, 3, 20), ({"epochs": 2}, 6, 40), ({"steps": 2}, 2, 16), ({"steps": 7}, 7, 8 + 8 + 4 + 8 + 8 + 4 + 8),
     ({"steps": 2, "epochs": 5}, 2, 16), ({"batch_size": 64}, 1, 20), ({"batch_size": 20}, 1, 20)],
)  # fmt: skip
def test_epochs_or_exactly_so_many_steps(settings, steps, seen):
    update = fit(work(**settings))
    assert (update.metrics["steps"], update.metrics["rows_seen"]) == (steps, seen)
    assert update.examples == 20
    assert update.metrics["seconds"] > 0


def test_every_epoch_sees_every_row_once_in_its_own_order():
    job = work(epochs=3)
    batches = list(course.drawn_batches(ROWS, job.local, job))
    epochs = [np.concatenate(batches[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(ROWS) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    again = list(course.drawn_batches(ROWS, job.local, job))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    for other in (work(round=2), work(client="c1")):
        assert not np.array_equal(next(course.drawn_batches(ROWS, other.local, other)), batches[0])


# ---- at which rate


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.6, 0.1]),
        ("cosine", [1, 0.5 * (1 - math.cos(0.6 * math.pi)), 0.5 * (1 - math.cos(0.1 * math.pi))]),
    ],
)
def test_the_rate_falls_over_the_rounds_by_the_schedule(schedule, factors, monkeypatch):
    """Rounds 1, 5 and 10 of 10: what is left of the run is 1, .6 and .1."""
    seen = Recorder(monkeypatch)
    for round in (1, 5, 10):
        fit(work(round, schedule=schedule, steps=1), lr=1e-2)
    assert seen.rates == pytest.approx([1e-2 * factor for factor in factors])
    assert set(seen.decays) == {0.0}


def test_the_configs_rate_goes_before_the_methods(monkeypatch):
    seen = Recorder(monkeypatch)
    fit(work(lr=0.5, steps=1), lr=1e-2)
    assert seen.rates == [0.5]


def test_the_optimizer_sees_exactly_what_learns(monkeypatch):
    seen = Recorder(monkeypatch)
    job = work(steps=1)
    one = 2 * 2 * 32  # one factor of two modules of rank 2
    head = sum(t.size for t in job.adapter.dense.values())
    for learn in ("BeAh", "BeA", "B", "h"):
        fit(work(steps=1, learn=learn))
    assert seen.sizes == [2 * one + head, 2 * one, one, head]


@pytest.mark.parametrize("clip", [None, 1.0, 0.01])
def test_the_gradient_is_clipped_as_a_whole(clip, monkeypatch):
    seen = Recorder(monkeypatch)
    fit(work(clip=clip, steps=2))
    if clip is None:
        assert max(seen.norms) > 0.1
    else:
        assert max(seen.norms) <= clip * 1.001
    if clip == 0.01:
        assert seen.norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_observers_see_the_gradient_before_it_is_clipped():
    norms = {}
    for clip in (None, 0.001):
        seen: list[float] = []
        fit(work(clip=clip, steps=1), observe=lambda values, grads, seen=seen: seen.append(float(grads["B"].norm())))
        norms[clip] = seen
    assert norms[None] == norms[0.001]


def test_gradients_do_not_leak_into_the_next_step():
    seen: list[np.ndarray] = []
    fit(work(steps=2, lr=1e-30), observe=lambda values, grads: seen.append(grads["B"].clone().numpy()))
    job = work()
    second = list(course.drawn_batches(ROWS, job.local, job))[1]
    alone: list[np.ndarray] = []
    fit(
        work(steps=1, batch_size=64),
        rows=second,
        observe=lambda values, grads: alone.append(grads["B"].clone().numpy()),
    )
    np.testing.assert_allclose(seen[1], alone[0], rtol=1e-3, atol=1e-6)


# ---- what learns


@pytest.mark.parametrize("learn", ["BeAh", "BA", "A", "h"])
def test_only_what_the_plan_says_moves(learn):
    job = work(learn=learn, epochs=2)
    away = {n: replace(b, B=b.A.T[:32] + 0.1) for n, b in job.adapter.blocks.items()}  # where B = 0, A stands still
    job = replace(job, adapter=replace(job.adapter, blocks=away))
    update = fit(job)
    assert update.adapter.blocks.keys() == job.plan.train.keys()
    before, after = toy.arrays(job.adapter), toy.arrays(update.adapter)
    for name, array in after.items():
        part = "h" if name.startswith("dense/") else name.rpartition("/")[2]
        assert np.any(array != before[name]) == (part in learn), name


def test_an_update_holds_the_planned_components_only():
    job = work()
    module, other = job.plan.train
    plan = replace(job.plan, train={module: np.array([1])}, frozen={module: np.array([0]), other: np.array([0, 1])})
    update = fit(replace(job, plan=plan))
    assert {n: i.tolist() for n, i in update.adapter.ids.items()} == {module: [1]}


def test_training_lowers_the_loss_and_is_the_same_twice():
    job = replace(work(epochs=6), adapter=start(gaussian))
    job = replace(job, plan=Plan(train=job.adapter.ids))
    one, two = fit(job), fit(job)
    assert toy.same(one.adapter, two.adapter)
    before, after = (
        Scorer(toy.trainer(1e-2)).evaluate(a, toy.encoded("train"), ROWS)["loss"] for a in (job.adapter, one.adapter)
    )
    assert after < 0.8 * before


# ---- dropout


def layers() -> list[torch.nn.Dropout]:
    return [m for m in toy.encoder().network.modules() if isinstance(m, torch.nn.Dropout)]


def test_dropout_is_addressed_and_leaves_no_trace():
    rates, state = [layer.p for layer in layers()], torch.get_rng_state()
    one, other = fit(work(dropout=0.3)), fit(work(dropout=0.3, round=2))
    with torch.random.fork_rng():
        torch.manual_seed(99)  # whatever was drawn before
        two = fit(work(dropout=0.3))
    assert toy.same(one.adapter, two.adapter)
    assert not toy.same(one.adapter, other.adapter)
    assert not toy.same(one.adapter, fit(work()).adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.p for layer in layers()] == rates
    assert not any(m.training for m in toy.encoder().network.modules())


def test_dropout_reaches_rates_that_a_layer_hands_to_a_function(tmp_path):
    """As Llama's attention does, which has no layer of it."""
    model = toy.loaded("llama", tmp_path)
    data = tasks.encode(toy.texts(20, 0), model.tokenizer, "classify", 16)
    teacher = local.Trainer(model, data, data, 1e-2, 1, "cpu")
    rates = [getattr(*place) for place in models.dropouts(model.network)]
    adapter = model.spec.with_head(kaiming(model.spec.shapes, 2, model.spec.scale, rng(0, "start")))

    def trained(dropout: float) -> Any:
        job = toy.job(model.spec, adapter, Plan(adapter.ids), print)
        return teacher.fit(replace(job, local=Local(steps=1, batch_size=8, dropout=dropout)), np.arange(20)).adapter

    assert not toy.same(trained(0.3), trained(0.0))
    assert toy.same(trained(0.3), trained(0.3))
    assert [getattr(*place) for place in models.dropouts(model.network)] == rates


def test_dropout_is_off_by_default_whatever_the_model_says():
    assert max(layer.p for layer in layers()) > 0
    modes: list[bool] = []
    fit(work(steps=1), observe=lambda values, grads: modes.append(toy.encoder().network.training))
    fit(work(steps=1, dropout=0.2), observe=lambda values, grads: modes.append(toy.encoder().network.training))
    assert modes == [False, True]


def test_after_a_failure_the_model_is_as_before():
    rates = [layer.p for layer in layers()]

    def stop(values: Any, grads: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(work(dropout=0.3), observe=stop)
    assert not toy.encoder().network.training
    assert [layer.p for layer in layers()] == rates
    assert not any(m._forward_hooks for m in toy.encoder().network.modules())


# ---- what cannot be an update


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf).*a lower local\.lr than 1e\+37 may help"):
        fit(work(lr=1e37, clip=None, epochs=2))


def test_no_rows_to_evaluate_on_is_an_error():
    with pytest.raises(TrainingError, match="no rows"):
        Scorer(toy.trainer(1e-2)).evaluate(start(), toy.encoded("test"), np.arange(0))


# ---- numerics


def test_the_numerics_record_says_what_the_bits_hang_on():
    found = local.numerics(3, "cpu")
    assert found == {
        "compute": "float32", "products": "torch", "device": "cpu", "threads": 3, "stack": 1, "rows": "padded",
        "prefix": "in every pass",
        "torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def test_a_session_sets_the_threads_and_puts_them_back():
    before = torch.get_num_threads()
    trainer = replace(toy.trainer(1e-2), threads=2)
    with trainer.session():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before

    def failing() -> None:
        with trainer.session():
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        failing()
    assert torch.get_num_threads() == before


# ---- evaluation


def test_accuracy_and_loss_do_not_depend_on_padding_or_batches(monkeypatch):
    trainer, adapter = toy.trainer(1e-2), start(gaussian)
    test, rows = toy.encoded("test"), np.arange(40)
    together = Scorer(trainer).evaluate(adapter, test, rows)
    assert together["rows"] == 40
    alone = [Scorer(trainer).evaluate(adapter, test, rows[i : i + 1]) for i in rows]
    assert together["accuracy"] == pytest.approx(np.mean([found["accuracy"] for found in alone]))
    assert together["loss"] == pytest.approx(np.mean([found["loss"] for found in alone]), rel=1e-5)
    monkeypatch.setattr(scoring, "EVALUATION_BATCH", 7)
    smaller = Scorer(trainer).evaluate(adapter, test, rng(0, "order").permutation(rows))
    assert smaller["accuracy"] == together["accuracy"]
    assert smaller["loss"] == pytest.approx(together["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def decoder() -> models.Model:
    return models.load(toy.settings(model={"name": "tiny-decoder"}, task="generate"), ())


def test_evaluation_of_a_decoder_does_not_depend_on_padding_either():
    model = models.load(toy.settings(model={"name": "tiny-decoder"}), toy.LABELS)
    encoded = tasks.encode(toy.texts(12, 0), model.tokenizer, "classify", 16)
    trainer = Trainer(model, encoded, encoded, 1e-2, 1, "cpu")
    adapter = toy.drawn(replace(model.spec, rank=1, scale=0.1))
    adapter = replace(adapter, dense=model.spec.dense)
    together = Scorer(trainer).evaluate(adapter, encoded, np.arange(12))
    alone = [Scorer(trainer).evaluate(adapter, encoded, np.array([i])) for i in range(12)]
    assert together["loss"] == pytest.approx(np.mean([found["loss"] for found in alone]), rel=1e-5)
    assert together["accuracy"] == pytest.approx(np.mean([found["accuracy"] for found in alone]))


def test_batches_by_length_hold_every_row_once():
    encoded = toy.encoded("test")
    batches = list(tasks.by_length(encoded, np.arange(40), 16))
    assert [len(batch) for batch in batches] == [16, 16, 8]
    order = np.concatenate(batches)
    assert sorted(order) == list(range(40))
    assert np.all(np.diff(encoded.lengths[order]) >= 0)


def test_nor_do_they_hold_more_pairs_of_tokens_than_a_pass_may(monkeypatch):
    encoded, rows = toy.encoded("test"), np.arange(40)
    monkeypatch.setattr(tasks, "PAIRS", most := 600)
    batches = list(tasks.by_length(encoded, rows, 16))
    pairs = [len(batch) * int(encoded.lengths[batch].max()) ** 2 for batch in batches]
    assert max(pairs) <= most
    assert sorted(np.concatenate(batches)) == rows.tolist()
    following = [int(encoded.lengths[batch[0]]) for batch in batches[1:]]
    assert all(
        len(batch) == 16 or (len(batch) + 1) * one**2 > most for batch, one in zip(batches, following, strict=False)
    )
    three = list(tasks.by_length(encoded, rows, 16, beside=3))  # of three clients in one pass
    assert max(map(len, three)) <= 16 // 3
    assert 3 * max(len(batch) * int(encoded.lengths[batch].max()) ** 2 for batch in three) <= most
    monkeypatch.setattr(tasks, "PAIRS", 1)
    assert [len(batch) for batch in tasks.by_length(encoded, rows, 16)] == [1] * 40


def test_majority():
    assert majority(np.array([0, 2, 2, 2])) == 0.75


# ---- the task generate


def prompts(model: models.Model, max_length: int = 32) -> tasks.Encoded:
    rows = Rows(["say aa", "say bbbb"], completion=["aa", "bbbb"])
    return tasks.encode(rows, model.tokenizer, "generate", max_length)


def test_only_the_completion_and_its_end_are_predicted(decoder):
    encoded, end = prompts(decoder), decoder.tokenizer.eos_token_id
    inputs, labels = encoded.batch(np.arange(2), "cpu")
    assert encoded.lengths.tolist() == [6 + 3, 8 + 5]
    assert encoded.predictions.tolist() == [3, 5]
    ids = inputs["input_ids"]
    assert labels.tolist() == ids[0, 6:9].tolist() + ids[1, 8:].tolist()
    assert inputs["at"].tolist() == [5, 6, 7, *(13 + at for at in range(7, 12))]  # each after the token before it
    assert labels[[2, -1]].tolist() == [end, end]
    assert inputs["attention_mask"][0].tolist() == [1] * 9 + [0] * 4


def test_a_row_s_first_token_is_never_predicted():
    """Packed, the one before it would be another row's."""
    ids = np.arange(6, dtype=np.int32)
    encoded = tasks.Encoded({"input_ids": ids}, np.array([0, 2, 6]), ids, {"input_ids": 0})
    assert encoded.predictions.tolist() == [1, 3]
    for inputs, labels in (encoded.batch(np.arange(2), "cpu"), encoded.packed(np.arange(2), [2], 0, "cpu")):
        assert labels.tolist() == [1, 3, 4, 5]
        assert inputs["input_ids"].flatten()[inputs["at"] + 1].tolist() == labels.tolist()


def test_the_loss_is_of_the_completions_tokens_only(decoder):
    inputs, labels = prompts(decoder).batch(np.arange(2), "cpu")
    at = inputs.pop("at").tolist()
    everywhere = torch.log_softmax(decoder.network(**inputs).flatten(0, 1).double(), -1)
    terms = [-everywhere[place, label] for place, label in zip(at, labels.tolist(), strict=True)]
    logits = decoder.network(**inputs, at=torch.tensor(at))
    assert logits.shape == (3 + 5, 260)
    assert float(tasks.loss(logits, labels)) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)
    total, right, known = tasks.counts(logits, labels)
    assert (known, total) == (8, pytest.approx(float(torch.stack(terms).sum()), rel=1e-5))
    assert right == sum(
        int(everywhere[place].argmax()) == label for place, label in zip(at, labels.tolist(), strict=True)
    )


def test_right_predictions_are_counted():
    logits = torch.nn.functional.one_hot(torch.tensor([1, 0, 3]), 4).float()
    assert tasks.counts(logits, torch.tensor([1, 2, 3]))[1:] == (2, 3)


@pytest.mark.parametrize("max_length", [4, 6, 9])
def test_long_prompts_lose_their_start_and_keep_a_token_before_the_completion(max_length, decoder):
    encoded = prompts(decoder, max_length)
    whole = prompts(decoder, 99)
    for at in range(2):
        labels, all_labels = (part.labels[part.starts[at] : part.starts[at + 1]] for part in (encoded, whole))
        assert len(labels) == min(max_length, len(all_labels))
        assert labels[0] == tasks.IGNORED
        tail = [i for i in labels if i != tasks.IGNORED]
        full = [i for i in all_labels if i != tasks.IGNORED]
        assert tail == full[: max_length - 1]


def test_the_tiny_decoder_learns_to_complete(decoder):
    encoded = prompts(decoder)
    trainer = Trainer(decoder, encoded, encoded, 2e-2, 1, "cpu")
    adapter = kaiming(decoder.spec.shapes, 4, decoder.spec.scale, rng(0, "start"))
    job = toy.job(decoder.spec, adapter, Plan(train=adapter.ids), print, round=1)
    job = replace(job, local=Local(steps=25))
    before = Scorer(trainer).evaluate(adapter, encoded, np.arange(2))
    after = Scorer(trainer).evaluate(trainer.fit(job, np.arange(2)).adapter, encoded, np.arange(2))
    assert after["loss"] < before["loss"] - 0.2  # its output layer is frozen and small
    assert after["rows"] == 2


def test_pairs_of_texts_are_encoded_together(tmp_path):
    model = toy.loaded("bert", tmp_path)
    model.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    rows = Rows(["ab", "c"], text_b=["d", "efg"], label=np.array([0, 1]))
    encoded = tasks.encode(rows, model.tokenizer, "classify", 16)
    single = tasks.encode(Rows(["ab", "c"], label=np.array([0, 1])), model.tokenizer, "classify", 16)
    assert np.all(encoded.lengths > single.lengths)
    inputs, _ = encoded.batch(np.arange(2), "cpu")
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}


def test_texts_are_cut_to_the_longest_length():
    encoded = tasks.encode(Rows(["a" * 99], label=np.array([0])), toy.encoder().tokenizer, "classify", 16)
    assert encoded.lengths.tolist() == [16]
