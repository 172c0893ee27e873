"""Memory: checkpointing and offload change no bit of an update, and the peak is what was reckoned."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import toy
from fedrank import cost, parts
from fedrank.adapter import kaiming
from fedrank.config import ConfigError, Local, load
from fedrank.methods.pf2lora import PF2LoRA
from fedrank.protocol import Device, Execution, Job, ModelSpec, Plan, Update, rng
from fedrank.store import Store
from fedrank.training import frozen, models, prefix, quantised, tasks, tiny, workload
from fedrank.training.course import Ask, TrainingError
from fedrank.training.data import Rows
from fedrank.training.local import Trainer
from test_architectures import WORDS, rows, saved

SHARES = (np.arange(20), np.arange(20, 31), np.arange(31, 64))
TOP = (2,)  # the last of three blocks

# ---- gradient checkpointing


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    """GPT-2, whose blocks have dropout."""
    folder = saved("gpt2", tmp_path_factory.mktemp("gpt2"))
    return models.load(toy.settings(model={"name": str(folder)}, task="generate", local={"max_length": 24}), ())


@pytest.fixture(scope="module", params=["packed encoder", "padded encoder", "packed decoder", "padded decoder"])
def trainer(request: pytest.FixtureRequest, decoder: models.Model) -> Trainer:
    laid, kind = request.param.split()
    model, train = (toy.encoder(), toy.encoded("train")) if kind == "encoder" else (decoder, completions(decoder))
    found = Trainer(model, train, train, 1e-2, 1, "cpu")
    assert found.frozen.packs
    if laid == "padded":
        found.frozen.first = None
    return found


def completions(model: models.Model) -> tasks.Encoded:
    texts = [f"{word} {at % 7}:" for at in range(16) for word in WORDS]
    told = Rows(texts, completion=[text[::-1] * (1 + at % 3) for at, text in enumerate(texts)])
    return tasks.encode(told, model.tokenizer, "generate", 24)


def asks(spec: ModelSpec, blocks: tuple[int, ...] = (), clients: int = 3, **settings: Any) -> list[Ask]:
    """Of clients with unlike numbers of rows. blocks: those with components; all where none are named."""
    start = spec.with_head(kaiming(spec.shapes, 3, spec.scale, rng(0, "start")))
    plan = Plan({m.name: np.arange(3) for m in spec.modules if not blocks or m.block in blocks})
    local = Local(**{"batch_size": 8, **settings})
    jobs = (
        Job(plan, 2, 10, spec, start, (), {}, local, Device(f"c{at}", len(own)), 0, print)
        for at, own in enumerate(SHARES)
    )
    return [Ask(job, own, None, None) for job, own in zip(jobs, SHARES, strict=True)][:clients]


def same(ours: Update, theirs: Update) -> bool:
    return toy.same(ours.adapter, theirs.adapter) and ours.metrics["loss"] == theirs.metrics["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("blocks", [(), TOP])
def test_checkpointing_changes_no_bit(trainer, blocks, dropout):
    """Of several clients, who are stacked where nothing is dropped out."""
    plain, found = (
        trainer.fit_all(asks(trainer.model.spec, blocks, dropout=dropout, checkpoint=on)) for on in (False, True)
    )
    assert all(same(*pair) for pair in zip(found, plain, strict=True))
    assert not toy.same(found[0].adapter, found[1].adapter)


@pytest.mark.parametrize("family", ["llama", "mistral", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_nor_with_rotary_positions_and_windows(family, tmp_path):
    """What a decoder keeps for writing has no place in a pass that is made twice."""
    folder = str(saved(family, tmp_path))
    model = models.load(toy.settings(model={"name": folder}, task="generate", local={"max_length": 24}), ())
    one = Trainer(model, (train := completions(model)), train, 1e-2, 1, "cpu")
    for first in (one.frozen.first, None):
        one.frozen.first = first
        plain, found = (one.fit_all(asks(model.spec, clients=1, checkpoint=on))[0] for on in (False, True))
        assert same(found, plain)


@contextmanager
def passed(trainer: Trainer) -> Iterator[Counter[int]]:
    """How often each block's first norm computes."""
    found: Counter[int] = Counter()
    blocks = prefix.blocks(trainer.frozen.base, list(trainer.frozen.layers))

    def count(at: int) -> Any:
        return lambda *_: found.update([at])

    norms = {
        at: next(part for part in block.modules() if isinstance(part, torch.nn.LayerNorm))
        for at, block in blocks.items()
    }
    hooks = [norm.register_forward_hook(count(at)) for at, norm in norms.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("blocks", "times"), [((), [2, 2, 2]), ((1, 2), [1, 2, 2]), (TOP, [1, 1, 2])])
def test_blocks_below_what_learns_are_not_computed_again(trainer, blocks, times):
    with passed(trainer) as plainly:
        trainer.fit_all(asks(trainer.model.spec, blocks, 1))
    with passed(trainer) as again:
        trainer.fit_all(asks(trainer.model.spec, blocks, 1, checkpoint=True))
    assert [plainly[at] for at in range(3)] == [3, 3, 3]
    assert [again[at] for at in range(3)] == [3 * count for count in times]


@pytest.mark.parametrize("broken", [False, True])
def test_afterwards_blocks_compute_as_before(trainer, broken):
    (ask,) = asks(trainer.model.spec, clients=1, checkpoint=True)
    if broken:
        found = trainer.fit_all([replace(ask, rows=np.array([10**6]))])[0]
        assert isinstance(found, IndexError)
    else:
        trainer.fit_all([ask])
    assert not any("forward" in vars(module) for module in trainer.frozen.network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("derivative", ["first", "finite"])
def test_two_levels_are_checkpointed_too(trainer, derivative, dropout):
    plain, found = (
        two_levels(trainer, PF2LoRA(private_rank=1, derivative=derivative), dropout=dropout, checkpoint=on)
        for on in (False, True)
    )
    assert same(found, plain)
    assert found.private.keys() == plain.private.keys()
    assert all(np.array_equal(array, plain.private[name]) for name, array in found.private.items())


def two_levels(trainer: Trainer, method: PF2LoRA, **settings: Any) -> Update:
    spec, device, own = trainer.model.spec, Device("c0", 20), SHARES[0]
    state = method.begin(spec, 3, 0)
    plan = method.plan(state, {"c0": device}, 0)["c0"]

    def fit(job: Job, **given: Any) -> Update:
        return trainer.fit(job, rows=own, **given)

    local = Local(**{"batch_size": 8, **settings})
    (update,) = method.train([Job(plan, 1, 3, spec, state.adapter, (), {}, local, device, 0, fit)])
    return update


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("blocks", [(), (1, 2), TOP])
def test_what_is_computed_again_is_counted(kind, blocks, decoder, tmp_path):
    """Attention in plain products, as torch counts no others."""
    if kind == "encoder":
        model, train = models.load(toy.settings(), toy.LABELS), toy.encoded("train")
        model.base.set_attn_implementation("eager")
    else:
        model, train = decoder, completions(decoder)
    one = Trainer(model, train, train, 1e-2, 1, "cpu")
    assert one.frozen.packs
    counted = {}
    for on in (False, True):
        (ask,) = asks(model.spec, blocks, 1, checkpoint=on)
        with toy.flops() as counter:
            one.fit_all([ask])
        spec = replace(model.spec, execution=Execution(checkpoint=on))
        mine = workload.workload(ask.rows, train, ask.job.local, partial(ask.job.rng, "batches"), True)
        counted[on] = counter.get_total_flops()
        assert sum(cost.flops(spec, ask.job.adapter, ask.job.plan, mine)) == pytest.approx(counted[on], rel=0.02)
    assert counted[True] > 1.05 * counted[False]


# ---- offload


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    (folder / "data").mkdir(exist_ok=True)
    return {
        "task": "generate", "model": {"name": "tiny-decoder"}, "clients": {"count": 3},
        "data": {"path": str(rows(folder / "data")), "partition": {"kind": "iid"}}, "rounds": {"count": 2, "cohort": 3},
        "local": {"max_length": 24, "batch_size": 4}, "adapter": {"rank": 4}, **sections,
    }  # fmt: skip


def played(raw: dict[str, Any], path: Path) -> tuple[parts.Parts, Any, list[Any]]:
    """A run in this process: its parts, its last state, its events."""
    made, store = parts.prepare(load(raw)), Store.create(path)
    store.save_state(made.begin, made.numerics)
    events = list(made.server(store).play(made.begin))
    return made, store.state()[0], events


@pytest.mark.parametrize(("method", "compute"), [("fedara", "float32"), ("flora", "bfloat16")])
def test_offload_changes_no_bit(method, compute, tmp_path):
    states = [
        played(
            settings(tmp_path, method={"name": method}, engine={"offload": on, "compute": compute}), tmp_path / f"{on}"
        )[1]
        for on in (False, True)
    ]
    assert toy.equal(*states)


@pytest.mark.parametrize("method", ["pf2lora", "per_fedavg_lora"])
@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"engine": {"offload": True}}, r"engine\.offload: .* learns on two levels"),
        ({"local": {"checkpoint": True}}, r"local\.checkpoint: it has no second derivative"),
    ],
)
def test_what_two_levels_cannot_do_is_told_before_a_run_begins(method, sections, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        parts.prepare(load(settings(tmp_path, method={"name": method}, **sections)))


def test_two_levels_of_which_one_is_empty_may(tmp_path):
    local = {"max_length": 24, "batch_size": 4, "checkpoint": True}
    raw = settings(tmp_path, method={"name": "pf2lora", "private_rank": 0}, engine={"offload": True}, local=local)
    rows = [event for event in played(raw, tmp_path / "run")[2] if event["event"] == "round"]
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows] == [(3, 0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pf2lora", "per_fedavg_lora"])
@pytest.mark.parametrize("derivative", ["first", "finite"])
def test_checkpoints_of_two_levels_are_evaluated_too(method, derivative, tmp_path):
    local = {"max_length": 24, "batch_size": 4, "checkpoint": True}
    found = played(settings(tmp_path, method={"name": method, "derivative": derivative}, local=local), tmp_path / "run")
    assert found[2][-1]["event"] == "end"
    assert found[2][-1]["personal_accuracy"] is not None


def test_offload_with_two_levels_is_not_trained(decoder):
    train = completions(decoder)
    one = Trainer(decoder, train, train, 1e-2, 1, "cpu", offload=True)
    with pytest.raises(TrainingError, match=r"engine\.offload"):
        two_levels(one, PF2LoRA(private_rank=1))


# ---- the peak


@dataclass(frozen=True)
class Shelf:
    """A decoder of two million parameters on disk, in both types, and rows of 100 to 190 tokens for it."""

    folder: Path

    def settings(self, dtype: str = "float32") -> dict[str, Any]:
        return {
            "task": "generate", "model": {"name": str(self.folder / dtype)}, "clients": {"count": 2},
            "data": {"path": str(self.folder / "data"), "partition": {"kind": "iid"}},
            "rounds": {"count": 3, "cohort": 2}, "local": {"max_length": 192, "lr": 0.001, "batch_size": 8},
            "engine": {"threads": 1, "workers": 1, "stack": 1, "compute": "float32", "products": "torch"},
        }  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    sizes = transformers.LlamaConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=704,
        vocab_size=2000, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(sizes)
    return shelf_of(made, "generate", tmp_path_factory.mktemp("shelf"), (torch.float32, torch.bfloat16))


def shelf_of(made: Any, task: str, folder: Path, dtypes: tuple[torch.dtype, ...]) -> Shelf:
    draw = np.random.default_rng(0)
    for dtype in dtypes:
        place = folder / str(dtype).removeprefix("torch.")
        made.to(dtype).save_pretrained(place)
        tiny.tokenizer(task).save_pretrained(place)

    def text(least: int, most: int) -> str:
        return "".join(draw.choice(list("abcdefgh "), draw.integers(least, most)))

    lines = [{"prompt": text(60, 110), "completion": text(40, 80)} for _ in range(24)]
    if task == "classify":
        lines = [{"text": "".join(line.values()), "label": str(at % 2)} for at, line in enumerate(lines)]
    (folder / "data").mkdir()
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Shelf(folder)


def allocated(work: Any) -> int:
    """The most bytes of torch's allocator that this work holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def peaks(raw: dict[str, Any], *overrides: str, padded: bool = False) -> tuple[int, int, int]:
    """Of a client's largest batch: what is reckoned, what is allocated, and the base beside that."""
    made = parts.prepare(load(raw, overrides))
    trainer, spec, client = made.trainer, made.spec, next(iter(made.devices))
    if padded:
        trainer.frozen.first = None
        spec = replace(spec, execution=replace(spec.execution, scores=False))
    packs = trainer.frozen.packs
    assert spec.execution.scores == packs
    device, held, local = made.devices[client], made.held(client), made.config.local.model_copy(update={"steps": 1})
    plan = made.method.plan(made.begin, {client: device}, 0)[client]
    own = held.train[np.argsort(-held.encoded.lengths[held.train])[: local.batch_size]]
    assert held.encoded.lengths[own].max() > 160

    def fit(job: Job, **given: Any) -> Update:
        return trainer.fit(job, rows=own, encoded=held.encoded, **given)

    job = Job(plan, 1, 3, spec, made.begin.adapter, (), {}, local, device, 0, fit)
    batch = workload.workload(own, held.encoded, local, lambda epoch: rng(0, epoch), packs)

    def work() -> None:
        with trainer.session():
            assert len(list(made.method.train([job]))) == 1

    work()  # what is made at a first pass is part of the base
    base = spec.execution.base_bytes
    return cost.peak_memory(spec, made.begin.adapter, plan, batch), allocated(work), base


CASES: dict[str, tuple[str, ...]] = {
    "float32": (),
    "FedARA": ("method.name=fedara",),
    "FLoRA": ("method.name=flora",),
    "two levels": ("method.name=pf2lora",),
    "a step ahead": ("method.name=per_fedavg_lora",),
    "one derivative of two levels": ("method.name=pf2lora", "method.derivative=first"),
    "differences of two levels": ("method.name=pf2lora", "method.derivative=finite"),
    "two levels in bfloat16": ("method.name=pf2lora", "engine.compute=bfloat16"),
    "one derivative of two levels in bfloat16": (
        "method.name=pf2lora",
        "method.derivative=first",
        "engine.compute=bfloat16",
    ),
    "differences of two levels, in float32": (
        "method.name=pf2lora",
        "method.derivative=finite",
        "engine.compute=bfloat16",
    ),
    "int8 under two levels": ("method.name=pf2lora", "model.quantise=int8"),
    "nf4 under two levels": ("method.name=pf2lora", "model.quantise=nf4"),
    "weights packed": ("engine.products=onednn",),
    "bfloat16": ("engine.compute=bfloat16",),
    "checkpoints": ("local.checkpoint=true",),
    "checkpoints in bfloat16": ("local.checkpoint=true", "engine.compute=bfloat16"),
    "checkpoints and packed weights": ("local.checkpoint=true", "engine.products=onednn"),
    "int8": ("model.quantise=int8",),
    "int8 in bfloat16": ("model.quantise=int8", "engine.compute=bfloat16"),
    "nf4": ("model.quantise=nf4",),
    "nf4 in bfloat16": ("model.quantise=nf4", "engine.compute=bfloat16"),
}
QUICK = ("float32", "two levels", "bfloat16", "checkpoints", "int8", "nf4", "FedARA")


@pytest.mark.slow
@pytest.mark.parametrize("what", [pytest.param(w, marks=[] if w in QUICK else toy.EXHAUSTIVE) for w in CASES])
def test_the_peak_is_what_was_reckoned(what, shelf):
    """Within a tenth."""
    if "model.quantise=int8" in CASES[what]:
        pytest.importorskip("torchao")
    if "model.quantise=nf4" in CASES[what]:
        pytest.importorskip("bitsandbytes")
    reckoned, taken, base = peaks(shelf.settings(), *CASES[what])
    assert reckoned == pytest.approx(taken + base, rel=0.1)


def test_differences_of_gradients_hold_the_base_in_both_types(shelf):
    """They are taken in float32, and scores come from copies in the type that is computed in."""
    made = [
        parts.prepare(load(shelf.settings(), ("engine.compute=bfloat16", *method)))
        for method in ((), ("method.name=pf2lora",), ("method.name=pf2lora", "method.derivative=finite"))
    ]
    one, two, three = (each.spec for each in made)
    plain, groups = 4 * one.parameters, made[0].trainer.frozen.groups
    together = 4 * sum(np.prod(one.shapes[name]) for names in groups if len(names) > 1 for name in names)
    assert one.execution.base_bytes == two.execution.base_bytes == pytest.approx(plain / 2)
    assert three.execution.base_bytes == pytest.approx(1.5 * plain + together)  # layers that read one input are copied
    assert [spec.execution.number for spec in (one, two, three)] == [2, 2, 4]


@pytest.mark.parametrize("held", ["int8", "bfloat16"])
def test_what_scores_and_differences_read_as_it_lies_counts_once(held, shelf, monkeypatch):
    if held == "int8":
        pytest.importorskip("torchao")
    monkeypatch.setattr(frozen, "LARGE", 1)
    raw = shelf.settings("bfloat16" if held == "bfloat16" else "float32")
    more = ("model.quantise=int8",) if held == "int8" else ()
    made = parts.prepare(
        load(raw, ("engine.compute=bfloat16", "method.name=pf2lora", "method.derivative=finite", *more))
    )
    scores, steps = made.trainer.frozen, made.trainer.exact
    there = {
        piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes()
        for network in (scores.network, steps.network)
        for tensor in network.state_dict(keep_vars=True).values()
        for piece in quantised.pieces(tensor)
    }
    assert made.spec.execution.base_bytes == pytest.approx(sum(there.values()), rel=0.02)


@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_so_it_is_of_padded_rows(checkpoint, shelf):
    """Whose attention keeps no scores."""
    reckoned, taken, base = peaks(shelf.settings(), f"local.checkpoint={checkpoint}".lower(), padded=True)
    assert reckoned == pytest.approx(taken + base, rel=0.1)


def test_so_it_is_of_weights_held_in_bfloat16(shelf):
    reckoned, taken, base = peaks(shelf.settings("bfloat16"), "engine.compute=bfloat16")
    assert reckoned == pytest.approx(taken + base, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", pytest.param("bert", marks=toy.EXHAUSTIVE), pytest.param("words", marks=toy.EXHAUSTIVE)]
)
def test_so_it_is_of_two_levels_on_other_models(family, tmp_path):
    """And where the vocabulary outweighs the blocks."""
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes, task = {
        "gpt2": (transformers.GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=256, vocab_size=2000, **ends), "generate"),
        "bert": (transformers.BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
                                         max_position_embeddings=256, pad_token_id=0, num_labels=2), "classify"),
        "words": (transformers.LlamaConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                                           max_position_embeddings=256, vocab_size=30000, **ends), "generate"),
    }[family]  # fmt: skip
    made = {"generate": transformers.AutoModelForCausalLM, "classify": transformers.AutoModelForSequenceClassification}
    torch.manual_seed(0)
    found = shelf_of(made[task].from_config(sizes), task, tmp_path, (torch.float32,))
    reckoned, taken, base = peaks({**found.settings(), "task": task}, "method.name=pf2lora")
    assert reckoned == pytest.approx(taken + base, rel=0.1)


def test_checkpoints_take_less_than_half(shelf):
    (more, taken, base), (less, now, _) = (
        peaks(shelf.settings(), f"local.checkpoint={on}") for on in ("false", "true")
    )
    assert now < taken / 2
    assert less - base < (more - base) / 2


def test_each_way_to_hold_a_base_takes_less_than_the_one_before(shelf):
    """Nothing is trained here; quantised embeddings and output layers stay in float32."""
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    bases = [
        parts.prepare(load(shelf.settings(dtype), overrides)).spec
        for dtype, overrides in (
            ("float32", ()),
            ("bfloat16", ("engine.compute=bfloat16",)),
            ("float32", ("model.quantise=int8",)),
            ("float32", ("model.quantise=nf4",)),
        )
    ]
    assert len({spec.parameters for spec in bases}) == 1
    sizes = [spec.execution.base_bytes for spec in bases]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.45 * sizes[0]
