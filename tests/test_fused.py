"""The fused layers: the same function and the same gradients as the plain hooks, with less kept for backward."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import toy
from fedrank.adapter import Adapter, Block
from fedrank.protocol import rng
from fedrank.training import compute, fused, hooks, tasks
from fedrank.training.compute import Compute, choose, onednn
from fedrank.training.frozen import Frozen, freeze
from fedrank.training.hooks import Live, live
from fedrank.training.models import Model

LIBRARIES = {dtype: ("torch", "onednn") if onednn(dtype) else ("torch",) for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module", params=("bert", "llama", "gpt2"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return toy.loaded(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def batch(model: Model) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    encoded = tasks.encode(toy.texts(8, 0), model.tokenizer, "classify", 16)
    return encoded.batch(np.arange(8), "cpu")


def some(model: Model, form: str = "svd") -> Adapter:
    """An adapter of three components a module, nothing zero; lora has no e."""
    adapter = toy.drawn(replace(model.spec, rank=3, scale=0.5))
    draw = rng(0, "head")
    dense = {n: t + draw.normal(size=t.shape).astype(np.float32) for n, t in model.spec.dense.items()}
    blocks = {n: Block(b.ids, b.B / 4, None if form == "lora" else b.e, b.A / 4) for n, b in adapter.blocks.items()}
    return Adapter(blocks, adapter.scale, dense)


def parted(model: Model, how: str) -> tuple[Adapter, Adapter]:
    """What learns and what is frozen of an adapter."""
    whole = some(model, "lora" if how == "lora" else "svd")
    names = list(whole.blocks)
    if how == "folded":  # some of a module's components learn, others are frozen, and some modules have one kind only
        train = whole.take({name: np.array([0, 2]) for name in names[::2]})
        return train, whole.take({name: np.array([1]) for name in names[1:]})
    if how == "ragged":
        train = whole.take({name: np.arange(1 + at % 3) for at, name in enumerate(names) if at % 4 != 1})
        return train, replace(whole, blocks={}, dense={})
    if how == "top":
        train = whole.take({m.name: np.arange(3) for m in model.spec.modules if m.block == model.spec.blocks - 1})
        return train, replace(whole, blocks={}, dense={})
    return whole, replace(whole, blocks={}, dense={})


def plain(model: Model, on: Live, batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with hooks.mounted(model.modules, model.heads, on):
        logits = model.network(**batch[0])
        tasks.loss(logits, batch[1]).backward()
    return logits.detach()


def ours(base: Frozen, on: Live, batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with fused.mounted(base, [on]) as (mount,):
        logits = base.network(**batch[0])
        tasks.loss(logits, batch[1]).backward()
        mount.collect()
    return logits.detach()


@pytest.mark.parametrize("library", LIBRARIES["float32"])
@pytest.mark.parametrize("learn", ["BeAh", "B", "eA", "Bh"])
@pytest.mark.parametrize("how", ["svd", "lora", "folded", "ragged", "top"])
def test_the_same_function_and_gradients_as_the_plain_hooks(model, batch, how, learn, library):
    train, frozen = parted(model, how)
    one, two = (live(train, frozen, learn, "cpu") for _ in range(2))
    expected, found = plain(model, one, batch), ours(freeze(model, Compute("float32", library), "cpu"), two, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert list(one.grads) == list(two.grads)
    for name, grad in one.grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(two.grads[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES["bfloat16"])
@pytest.mark.parametrize("how", ["svd", "lora", "folded"])
def test_bfloat16_is_near_in_function_and_gradients(model, batch, how, library):
    train, frozen = parted(model, how)
    one, two = (live(train, frozen, "BeAh", "cpu") for _ in range(2))
    expected, found = plain(model, one, batch), ours(freeze(model, Compute("bfloat16", library), "cpu"), two, batch)
    assert torch.linalg.vector_norm(found - expected) < 0.05 * torch.linalg.vector_norm(expected)
    for name, grad in one.grads.items():
        assert (two.grads[name].dtype, two.values[name].dtype) == (torch.float32, torch.float32)
        assert torch.nn.functional.cosine_similarity(two.grads[name], grad, 0) > 0.99, name


def test_updated_weights_are_made_ready_once_and_used(model):
    base = freeze(model, Compute("float32", "torch"), "cpu")
    names = base.groups[0]
    x = torch.ones(2, base.product(names).weights[0].shape[1])
    weights = {names[0]: base.layers[names[0]].weight.detach() + 1}
    own, other = base.product(names), base.product(names, weights)
    assert base.product(names, weights) is other
    assert base.product(names) is own
    assert not torch.allclose(other.forward(x), own.forward(x))
    assert base.product(names, dict(weights)) is not other
    assert base.product(base.groups[-1], weights) is base.product(base.groups[-1])


SLOW, PACKED, SHORT = Compute("float32", "torch"), Compute("float32", "onednn"), Compute("bfloat16", "onednn")


@pytest.mark.parametrize(
    ("seconds", "asked", "chosen"),
    [
        ((1.0, 0.9, 0.8), {}, SLOW),  # less than measurements differ by
        ((1.0, 0.8, 0.7), {}, PACKED),
        ((1.0, 0.8, 0.5), {}, SHORT),
        ((1.0, 0.9, 0.6), {}, SHORT),
        ((1.0, 0.8, 0.5), {"dtype": "float32"}, PACKED),
        ((1.0, 0.8, 0.5), {"dtype": "float32", "library": "torch"}, SLOW),
        ((1.0, 2.0, 3.0), {"library": "onednn"}, PACKED),
        ((1.0, 2.0, 3.0), {"dtype": "bfloat16"}, SHORT),
    ],
)
def test_what_is_clearly_faster_computes(monkeypatch, seconds, asked, chosen):
    measured = dict(zip((SLOW, PACKED, SHORT), seconds, strict=True))
    monkeypatch.setattr(compute, "onednn", lambda dtype="": True)
    monkeypatch.setattr(compute, "_seconds", lambda options, *_: {option: measured[option] for option in options})
    assert choose([torch.nn.Linear(512, 256)], "cpu", 1, **asked) == chosen


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({}, PACKED),
        ({"dtype": "bfloat16"}, Compute("bfloat16", "torch")),
        ({"library": "onednn"}, PACKED),
        ({"library": "torch"}, SLOW),
    ],
)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_cpu_without_units_for_bfloat16_computes_in_it_only_when_told(monkeypatch, held, asked, chosen):
    """Where such products are packed by nobody, and slow."""
    monkeypatch.setattr(compute, "onednn", lambda dtype="float32": dtype == "float32")
    monkeypatch.setattr(compute, "_seconds", lambda options, *_: {one: 1.0 - 0.5 * (one == PACKED) for one in options})
    layer = torch.nn.Linear(512, 256, dtype=held)
    assert choose([layer], "cpu", 1, **asked) == chosen
    with pytest.raises(ValueError, match="onednn is not to be had for bfloat16 on this cpu"):
        choose([layer], "cpu", 1, "bfloat16", "onednn")


def test_nothing_is_gained_on_a_small_model_and_a_library_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(compute, "_seconds", None)  # not measured
    assert choose([torch.nn.Linear(32, 32)], "cpu", 1) == SLOW
    with pytest.raises(ValueError, match="onednn is not to be had for float32 on this cuda"):
        choose([torch.nn.Linear(32, 32)], "cuda", 1, library="onednn")


def test_what_no_state_holds_is_not_rounded(tmp_path):
    """As where transformers loads in a type: at position 500 a rounded rotary frequency is another angle."""
    model = toy.loaded("llama", tmp_path)
    base = freeze(model, Compute("bfloat16", "torch"), "cpu").base
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    own, found = (dict(it.named_buffers()) for it in (model.base, base))
    assert any("inv_freq" in name for name in found)
    for name, buffer in found.items():
        assert torch.equal(buffer, own[name]), name
