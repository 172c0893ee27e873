"""Adapters as hooks: the same function and gradients as weights with the increment in them, and nothing left behind."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import toy
from fedrank.adapter import Adapter, Block
from fedrank.protocol import rng
from fedrank.training import tasks
from fedrank.training.hooks import Live, live, mounted
from fedrank.training.models import Model

KINDS = ("bert", "llama", "gpt2")


@pytest.fixture(scope="module", params=KINDS)
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
    blocks = {
        n: Block(b.ids, b.B / 4, None if form == "lora" else b.e, b.A / 4) for n, b in adapter.blocks.items()
    }  # fmt: skip
    return Adapter(blocks, adapter.scale, dense)


def nothing(like: Adapter) -> Adapter:
    return Adapter({}, like.scale, {})


def logits(model: Model, inputs: dict[str, torch.Tensor], on: Live | None = None) -> torch.Tensor:
    with torch.inference_mode():
        if on is None:
            return model.network(**inputs)
        with mounted(model.modules, model.heads, on):
            return model.network(**inputs)


def names(model: Model) -> Iterator[tuple[str, str, bool]]:
    """Adapted module -> the name of its weight in the network, and whether it is stored transposed."""
    owners = {id(module): name for name, module in model.network.named_modules()}
    for name, module in model.modules.items():
        yield name, f"{owners[id(module)]}.weight", type(module).__name__ == "Conv1D"


def head_names(model: Model) -> dict[str, str]:
    owners = {id(module): name for name, module in model.network.named_modules()}
    return {f"{n}.{p}": f"{owners[id(m)]}.{p}" for n, m in model.heads.items() for p, _ in m.named_parameters()}


def reference(model: Model, tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The network's weights with the increments written in, as functions of the factors."""
    weights = dict(model.network.named_parameters())
    found = {}
    for name, weight, transposed in names(model):
        if f"{name}/B" in tensors:
            b, a = tensors[f"{name}/B"], tensors[f"{name}/A"]
            e = tensors.get(f"{name}/e", torch.ones(len(a)))
            delta = scale * (b @ torch.diag(e) @ a)
            found[weight] = weights[weight] + (delta.T if transposed else delta)
    for name, weight in head_names(model).items():
        found[weight] = tensors[f"dense/{name}"]
    return found


def leaves(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(t, requires_grad=True) for n, t in toy.arrays(adapter).items() if not n.endswith("/ids")}


@pytest.mark.parametrize("form", ["svd", "lora"])
def test_mounting_equals_writing_the_increment_into_the_weights(model, batch, form):
    adapter = some(model, form)
    merged = copy.deepcopy(model.network)
    state = merged.state_dict()
    for name, weight, transposed in names(model):
        delta = torch.tensor(adapter.delta()[name])
        state[weight] += delta.T if transposed else delta
    for name, weight in head_names(model).items():
        state[weight] = torch.tensor(adapter.dense[name])
    merged.load_state_dict(state)
    with torch.inference_mode():
        expected = merged(**batch[0])
    found = logits(model, batch[0], live(nothing(adapter), adapter, "", "cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits(model, batch[0]), atol=0.1)  # it does do something


def hooks(model: Model) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules()]


def test_unmounting_restores_the_base_bit_for_bit(model, batch):
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    plain, there = logits(model, batch[0]), hooks(model)
    adapter = some(model)
    on = live(adapter, nothing(adapter), "BeAh", "cpu")
    with mounted(model.modules, model.heads, on):
        assert list(model.network.state_dict()) == list(before)  # parameters live outside the model
        tasks.loss(model.network(**batch[0]), batch[1]).backward()
    with pytest.raises(RuntimeError, match="stop"), mounted(model.modules, model.heads, on):
        raise RuntimeError("stop")
    after = model.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model, batch[0]), plain)
    assert hooks(model) == there
    assert all(p.grad is None and not p.requires_grad for p in model.network.parameters())


@pytest.mark.parametrize("form", ["svd", "lora"])
def test_flat_gradients_are_autograds(model, batch, form):
    adapter = some(model, form)
    on = live(adapter, nothing(adapter), "BeAh", "cpu")
    with mounted(model.modules, model.heads, on):
        tasks.loss(model.network(**batch[0]), batch[1]).backward()
    tensors = leaves(adapter)
    output = torch.func.functional_call(model.network, reference(model, tensors, adapter.scale), (), batch[0])
    tasks.loss(output, batch[1]).backward()
    factors = "BeA" if form == "svd" else "BA"
    heads = {f"h.{name}" for name in adapter.dense}
    assert on.grads.keys() == on.values.keys() == {*factors, *heads}
    for f in factors:
        rows = [tensors[f"{name}/{f}"].grad for name in adapter.blocks]
        expected = torch.cat([(g.T if f == "B" else g).reshape(-1) for g in rows])
        torch.testing.assert_close(on.grads[f], expected, rtol=1e-3, atol=1e-5)
    for name in adapter.dense:
        torch.testing.assert_close(
            on.grads[f"h.{name}"], tensors[f"dense/{name}"].grad.reshape(-1), rtol=1e-3, atol=1e-5
        )


def test_gradients_add_up_over_batches_in_the_same_memory(model, batch):
    adapter = some(model)
    on = live(adapter, nothing(adapter), "BeA", "cpu")
    kept, grads = dict(on.grads), []
    with mounted(model.modules, model.heads, on):
        for _ in range(2):
            tasks.loss(model.network(**batch[0]), batch[1]).backward()
            grads.append({f: g.clone() for f, g in on.grads.items()})
    assert all(on.grads[f] is kept[f] and on.values[f].grad is kept[f] for f in "BeA")
    assert all(torch.allclose(grads[1][f], 2 * grads[0][f], rtol=1e-5) for f in "BeA")


@pytest.mark.parametrize("learn", ["", "h", "B", "eA", "BA", "BeA", "BeAh"])
def test_only_what_learns_has_gradients_and_moves(learn):
    model = toy.encoder()
    inputs, labels = toy.encoded("train").batch(np.arange(8), "cpu")
    adapter = some(model)
    on = live(adapter, nothing(adapter), learn, "cpu")
    expected = {f for f in learn if f != "h"} | ({f"h.{n}" for n in adapter.dense} if "h" in learn else set())
    assert on.values.keys() == on.grads.keys() == expected
    with mounted(model.modules, model.heads, on):
        loss = tasks.loss(model.network(**inputs), labels)
        assert loss.requires_grad == bool(learn)
        if learn:
            loss.backward()
            torch.optim.SGD(on.values.values(), lr=1.0).step()
            moved = tasks.loss(model.network(**inputs), labels)
            assert moved != loss  # the mounted parts see the step: they are views
    after = on.export(adapter)
    for name, array in toy.arrays(adapter).items():
        part = "h" if name.startswith("dense/") else name.rpartition("/")[2]
        assert np.array_equal(toy.arrays(after)[name], array) == (part not in learn), name


def test_frozen_components_take_part_but_do_not_learn():
    model = toy.encoder()
    inputs, labels = toy.encoded("train").batch(np.arange(8), "cpu")
    whole = some(model)
    train = whole.take({name: np.array([0, 2]) for name in list(whole.blocks)[::2]})
    frozen = whole.without(train.ids)
    on = live(train, frozen, "BeA", "cpu")
    all_frozen = live(nothing(whole), whole, "", "cpu")
    torch.testing.assert_close(logits(model, inputs, on), logits(model, inputs, all_frozen), rtol=1e-4, atol=1e-5)
    with mounted(model.modules, model.heads, on):
        tasks.loss(model.network(**inputs), labels).backward()
    assert on.grads["e"].numel() == 2 * len(train.blocks)
    assert not any(t.requires_grad for p in on.frozen.values() for t in (p.Bt, p.e, p.A))
    full = live(whole, nothing(whole), "BeA", "cpu")
    with mounted(model.modules, model.heads, full):
        tasks.loss(model.network(**inputs), labels).backward()
    wide = dict(zip(whole.blocks, full.grads["e"].reshape(-1, 3), strict=True))
    expected = torch.cat([wide[name][[0, 2]] for name in train.blocks])
    torch.testing.assert_close(on.grads["e"], expected, rtol=1e-3, atol=1e-5)


def test_export_of_what_was_not_trained_is_what_came_in():
    adapter = some(toy.encoder())
    assert toy.same(live(adapter, nothing(adapter), "BeAh", "cpu").export(adapter), adapter)


def test_the_given_arrays_are_not_touched():
    model, adapter = toy.encoder(), some(toy.encoder())
    before = {name: array.copy() for name, array in toy.arrays(adapter).items()}
    names = list(model.network.state_dict())
    on = live(adapter, nothing(adapter), "BeAh", "cpu")
    for value in on.values.values():
        with torch.no_grad():
            value.add_(1.0)
    assert all(np.array_equal(array, before[name]) for name, array in toy.arrays(adapter).items())
    assert list(model.network.state_dict()) == names


@pytest.mark.parametrize("missing", ["B", "A"])
def test_a_forward_pass_without_b_or_a_is_refused(missing):
    adapter = some(toy.encoder()).only("BeA".replace(missing, ""))
    with pytest.raises(ValueError, match="needs both B and A"):
        live(adapter, nothing(adapter), "e", "cpu")


def test_without_a_dense_head_the_models_own_is_used():
    model = toy.encoder()
    inputs, _ = toy.encoded("train").batch(np.arange(8), "cpu")
    adapter = some(model)
    bare, given = (replace(adapter, dense=d) for d in ({}, model.spec.dense))
    one, two = (logits(model, inputs, live(nothing(a), a, "", "cpu")) for a in (bare, given))
    assert torch.equal(one, two)
