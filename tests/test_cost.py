"""What a plan costs, against what torch counts while it trains; bytes are held against frames in test_wire."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import toy
from fedrank import cost
from fedrank.adapter import Adapter, gaussian, kaiming
from fedrank.protocol import Device, Load, ModelSpec, Module, Passes, Plan, rng
from fedrank.training import flow, models, tasks
from fedrank.training.hooks import live, mounted

RANK = 4


@dataclass(frozen=True, eq=False)
class Built:
    """A random model with eager attention, whose every linear layer of the blocks is adapted."""

    network: nn.Module
    base: Any
    heads: Mapping[str, nn.Module]
    modules: Mapping[str, nn.Module]
    spec: ModelSpec
    device: str


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}),
    "llama": ("Llama", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "intermediate_size": 80, "pad_token_id": 0}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "pad_token_id": 0}),
    "bert-base": ("Bert", {}),
    "llama-1b": ("Llama", {"hidden_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 32, "num_key_value_heads": 8,
                           "intermediate_size": 8192, "pad_token_id": 0}),
}  # fmt: skip


@cache  # the largest is 0.4 GB; on the meta device there are shapes without numbers
def built(kind: str, head: str = "classify") -> Built:
    name, sizes = SHAPES[kind]
    device = "meta" if kind == "llama-1b" else "cpu"
    config = getattr(transformers, f"{name}Config")(vocab_size=260, num_labels=4, attn_implementation="eager", **sizes)
    tail = {"classify": "ForSequenceClassification", "mean": "Model", "generate": "ForCausalLM"}[head]
    if (name, head) == ("GPT2", "generate"):
        tail = "LMHeadModel"
    torch.manual_seed(0)
    with torch.device(device):
        base = getattr(transformers, f"{name}{tail}")(config)
        network = models.MeanPooled(base, 4) if head == "mean" else models.Logits(base)
    network.requires_grad_(False).eval()
    heads = models._heads(network, base, 4) if head != "generate" else {}
    modules = models._targets(base, "all", set(heads))
    dense = {f"{n}.{p}": np.zeros(t.shape, np.float32) for n, m in heads.items() for p, t in m.named_parameters()}
    listed = tuple(Module(n, *flow.sizes(m), flow.block(n) or 0) for n, m in modules.items())
    inside = {id(t) for m in heads.values() for t in m.parameters()}
    spec = ModelSpec(
        listed, 1 + max(m.block for m in listed), dense, RANK, 2.0, "test", flow.trace(network, base, heads),
        flow.attention(base), sum(t.numel() for t in network.parameters() if id(t) not in inside),
    )  # fmt: skip
    return Built(network, base, heads, modules, spec, device)


def start(spec: ModelSpec, form: str = "BA", rank: int = RANK) -> Adapter:
    return spec.with_head((gaussian if "e" in form else kaiming)(spec.shapes, rank, spec.scale, rng(0, "begin")))


def chosen(spec: ModelSpec, depth: int, ids: list[int], ends: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """These components of the modules of the last `depth` blocks whose names end so."""
    return {m.name: np.array(ids) for m in spec.modules if m.block >= spec.blocks - depth and (not ends or m.name.endswith(ends))}  # fmt: skip


def step(model: Built, adapter: Adapter, plan: Plan, rows: int, length: int) -> tuple[Any, Any]:
    """One forward and backward pass by this plan, as local training makes it; the counters of both."""
    mount = live(adapter.take(plan.train), adapter.take(plan.frozen), plan.learn, model.device)
    ids = torch.ones((rows, length), dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.zeros(rows, dtype=torch.long, device=model.device)
    if not model.heads:  # one token of each row is predicted
        inputs["at"] = torch.arange(length - 1, rows * length, length, device=model.device)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with mounted(model.modules, model.heads, mount):
        with forward:
            loss = tasks.loss(model.network(**inputs), labels)
        with backward:
            if loss.requires_grad:
                loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def load(rows: int, length: int, steps: int = 1) -> Load:
    tokens, pairs = rows * length, rows * length**2
    return Load(steps, steps * tokens, steps * pairs, tokens, pairs, steps * rows, rows)


QV = ("query", "value", "q_proj", "v_proj", "c_attn")

PLANS: dict[str, dict[str, Any]] = {
    "everything": {"train": (4, [0, 1, 2, 3])},
    "the last block": {"train": (1, [0, 1, 2, 3])},
    "two blocks, one component": {"train": (2, [2])},
    "query and value": {"train": (4, [0, 1, 2, 3], QV)},
    "query and value of two blocks": {"train": (2, [0, 1], QV)},
    "the second half of the feed-forward": {"train": (4, [0, 1], ("output.dense", "down_proj", "mlp.c_proj"))},
    "the output of attention": {"train": (3, [0, 1], ("attention.output.dense", "o_proj", "attn.c_proj"))},
    "a fold": {"train": (4, [0]), "frozen": (4, [1, 2, 3])},
    "frozen below": {"train": (1, [0, 1]), "frozen": (4, [2, 3])},
    "only B": {"train": (4, [0, 1, 2, 3]), "learn": "Bh"},
    "only B of the last two": {"train": (2, [0, 1, 2, 3]), "learn": "B"},
    "only A": {"train": (4, [0, 1]), "learn": "A"},
    "only e": {"train": (4, [0, 1]), "learn": "e", "form": "BeA"},
    "the singular form": {"train": (3, [0, 1, 2]), "form": "BeA"},
    "only the head": {"train": (0, [])},
    "only the head, all frozen": {"train": (0, []), "frozen": (4, [0, 1]), "learn": "h"},
}  # fmt: skip


def plan(spec: ModelSpec, what: str) -> tuple[Plan, Adapter]:
    given = PLANS[what]
    parts = {part: chosen(spec, *given[part]) if part in given else {} for part in ("train", "frozen")}
    return Plan(**parts, learn=given.get("learn", "BeAh")), start(spec, given.get("form", "BA"))


@pytest.mark.parametrize("what", PLANS)
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_flops_are_what_torch_counts(kind, what):
    model = built(kind)
    given, adapter = plan(model.spec, what)
    forward, backward = cost.flops(model.spec, adapter, given, load(3, 24))
    counted = step(model, adapter, given, 3, 24)
    assert forward == pytest.approx(counted[0], rel=0.02)  # the hook makes the head's product a second time
    assert backward == counted[1]


@pytest.mark.parametrize("head", ["mean", "generate"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_flops_with_other_heads(kind, head):
    if (kind, head) == ("bert", "generate"):
        pytest.skip("an encoder")
    model = built(kind, head)
    given, adapter = plan(model.spec, "two blocks, one component")
    found = cost.flops(model.spec, adapter, given, load(2, 16))
    assert found == pytest.approx(step(model, adapter, given, 2, 16), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 6, 12])
@pytest.mark.parametrize("ids", [[0], [0, 1, 2, 3]])
@pytest.mark.parametrize("ends", [(), QV])
def test_flops_of_bert_base(depth, ids, ends):
    model = built("bert-base")
    assert model.spec.blocks == 12
    given, adapter = Plan(chosen(model.spec, depth, ids, ends)), start(model.spec)
    found = cost.flops(model.spec, adapter, given, load(2, 32))
    assert found == pytest.approx(step(model, adapter, given, 2, 32), rel=0.002)


@pytest.mark.parametrize("ends", [(), QV])
def test_depth_alone_saves_less_than_half_of_the_compute(ends):
    """Backward costs what forward does, and only in the blocks that learn: (L + k) / 2L of full depth."""
    spec = built("bert-base").spec
    plans = {k: Plan(chosen(spec, k, [0, 1], ends)) for k in (1, 3, 6, 9, 12)}
    found = {k: sum(cost.flops(spec, start(spec), plan, load(2, 64))) for k, plan in plans.items()}
    for k, flops in found.items():
        assert flops / found[12] == pytest.approx((12 + k) / 24, abs=0.015)


def test_flops_of_a_larger_llama():
    model = built("llama-1b")
    given, adapter = Plan(chosen(model.spec, 2, [0, 1])), start(model.spec)
    found = cost.flops(model.spec, adapter, given, load(4, 128))
    assert found == pytest.approx(step(model, adapter, given, 4, 128), rel=0.002)


# ---- memory


def kept(model: Built, adapter: Adapter, plan: Plan, rows: int, length: int) -> int:
    """Bytes of all that the backward pass of one step needs, beside parameters: storages, each once."""
    mount = live(adapter.take(plan.train), adapter.take(plan.frozen), plan.learn, "cpu")
    given = [*model.network.state_dict(keep_vars=True).values(), *mount.values.values(), *mount.dense.values()]
    given += [
        t
        for part in (*mount.learning.values(), *mount.frozen.values())
        for t in (part.Bt, part.e, part.A)
        if t is not None
    ]
    ids = torch.ones((rows, length), dtype=torch.long)
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(rows, dtype=torch.long)
    if not model.heads:
        inputs["at"] = torch.arange(length - 1, rows * length, length)
    with mounted(model.modules, model.heads, mount), toy.saved_for_backward(given) as most:
        tasks.loss(model.network(**inputs), labels)
    return most()


def activations(spec: ModelSpec, adapter: Adapter, plan: Plan, rows: int, length: int) -> int:
    nothing = cost.peak_memory(spec, adapter, plan, load(0, 0))
    return cost.peak_memory(spec, adapter, plan, load(rows, length)) - nothing


@pytest.mark.parametrize("what", PLANS)
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_activations_are_what_torch_keeps(kind, what):
    model = built(kind)
    given, adapter = plan(model.spec, what)
    found = activations(model.spec, adapter, given, 8, 40)
    assert found == pytest.approx(kept(model, adapter, given, 8, 40), rel=0.02, abs=4096)  # the head's own are left out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_over_the_vocabulary_are_kept(kind):
    model = built(kind, "generate")
    given, adapter = plan(model.spec, "query and value of two blocks")
    found = activations(model.spec, adapter, given, 8, 40)
    at_head = (4 + cost.LOGIT) * 8 * 260  # of which backward keeps a quarter, the log-softmax
    assert found - at_head * 3 / 4 == pytest.approx(kept(model, adapter, given, 8, 40), rel=0.02)


@pytest.mark.parametrize("ends", [(), QV])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_costs_are_affine_in_depth(kind, ends):
    """Each further block costs the same backward FLOPs and the same memory; the forward pass is whole at every depth."""
    spec = built(kind).spec
    plans = [Plan(chosen(spec, depth, [0, 1], ends)) for depth in (1, 2, 3, 4)]
    memory = [cost.peak_memory(spec, start(spec), p, load(8, 40)) for p in plans]
    both = [cost.flops(spec, start(spec), p, load(8, 40)) for p in plans]
    for found in (memory, [backward for _, backward in both], [forward for forward, _ in both]):
        steps = np.diff(found)
        assert steps[0] > 0
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert both[3][0] < 1.1 * both[0][0]
    assert both[3][1] > 3 * both[0][1]


def test_memory_by_hand():
    """Two modules 2x3 and 3x2 of rank 2 with e, a head of 4: 6 numbers a component, gradients and two moments."""
    spec = replace(toy.small(), parameters=100)
    adapter, nothing = toy.drawn(spec), Load(0, 0, 0, 0, 0)
    every, two = {"0.m": np.array([0, 1]), "1.m": np.array([0, 1])}, np.array([0, 1])
    held = 100 + 4 + 4 * 6

    def memory(plan: Plan) -> float:
        return cost.peak_memory(spec, adapter, plan, nothing) / 4

    assert memory(Plan(every)) == held + 3 * (4 * 6 + 4)
    assert memory(Plan(every, learn="A")) == held + 3 * (2 * 3 + 2 * 2)
    assert memory(Plan(every, learn="e")) == held + 3 * 4
    assert memory(Plan({"0.m": two}, {"1.m": two}, learn="BeA")) == held + 3 * 2 * 6
    assert memory(Plan({"0.m": two}, learn="BeA")) == 104 + 4 * 2 * 6
    assert memory(Plan({"0.m": two}, learn="BeA", private=3)) == 104 + 4 * (2 * 6 + 3 * 5)
    assert memory(Plan({}, learn="")) == 104
    assert cost.trainable(spec, adapter, Plan({"0.m": two}, private=3)) == 2 * 6 + 3 * 5 + 4
    assert cost.trainable(spec, adapter, Plan({"0.m": np.array([], int)}, private=3, learn="BA")) == 0


# ---- what a plan says


def test_private_components_count_like_others_that_learn():
    spec = built("bert").spec
    two, more = Plan(chosen(spec, 2, [0, 1]), private=2), Plan(chosen(spec, 2, [0, 1, 2, 3]))
    assert cost.flops(spec, start(spec), two, load(2, 8)) == cost.flops(spec, start(spec), more, load(2, 8))
    one = replace(two, learn="h")  # only the client's own
    assert cost.flops(spec, start(spec), one, load(2, 8))[1] > 0


def test_passes_multiply():
    spec = built("bert").spec
    given = Plan(chosen(spec, 2, [0, 1]))
    forward, backward = cost.flops(spec, start(spec), given, load(2, 8))
    more = replace(given, passes=Passes(3.0, 4.5))
    assert cost.flops(spec, start(spec), more, load(2, 8)) == (3 * forward, 4.5 * backward)
    assert activations(spec, start(spec), more, 2, 8) == activations(spec, start(spec), given, 2, 8)


def test_what_is_kept_for_second_derivatives_is_as_it_was_counted():
    """And what the head reads has its gradients beside it."""
    spec = built("bert").spec
    twice = replace(spec, execution=replace(spec.execution, twice=(1000.0, 10.0, 7.0, 3.0)))
    given = Plan(chosen(spec, 2, [0, 1]))
    read = sum(map.out for map in spec.flow if map.rows)
    assert activations(twice, start(spec), given, 2, 8) == 16 * 1000 + 128 * 10 + 2 * 7 + 12 * 2 * read


def test_where_nothing_learns_there_is_no_backward_pass():
    spec = built("gpt2").spec
    given = Plan({}, chosen(spec, 4, [0, 1]), learn="BeA")
    forward, backward = cost.flops(spec, start(spec), given, load(2, 8))
    assert (forward > 0, backward) == (True, 0)
    assert cost.trainable(spec, start(spec), given) == 0
    assert activations(spec, start(spec), given, 2, 8) == 0


def test_flops_add_up_over_batches():
    spec, adapter = built("llama").spec, start(built("llama").spec)
    given = Plan(chosen(spec, 3, [0, 1]))
    parts = [cost.flops(spec, adapter, given, load(*shape)) for shape in ((2, 8), (1, 8), (2, 8), (2, 10))]
    whole = Load(4, 16 + 8 + 16 + 20, 128 + 64 + 128 + 200, 20, 200, 7)
    assert cost.flops(spec, adapter, given, whole) == tuple(map(sum, zip(*parts, strict=True)))


def test_a_block_costs_what_its_share_is():
    """The lean estimate of one block agrees with the whole plan's forward pass, less adapters and head."""
    spec = built("bert").spec
    token, pair = cost.block_flops(spec)
    forward, _ = cost.flops(spec, start(spec), Plan({}), load(3, 24))
    assert 4 * (token * 3 * 24 + pair * 3 * 24**2) == pytest.approx(forward, rel=0.005)


# ---- on a device


NANO = Device("c7", 10, "nano", flops_per_second=2e9, memory_bytes=8e9, up_bytes_per_second=1e6,
              down_bytes_per_second=4e6, idle_watts=2.0, busy_watts=10.0)  # fmt: skip


def test_seconds_and_joules():
    spec = built("bert").spec
    given = Plan(chosen(spec, 2, [0, 1]))
    forward, backward = cost.flops(spec, start(spec), given, load(2, 8))
    found = cost.predict(spec, start(spec), given, load(2, 8), NANO, 8_000_000, 3_000_000)
    assert (found.forward_flops, found.backward_flops) == (forward, backward)
    assert (found.download_seconds, found.upload_seconds) == (2.0, 3.0)
    assert (found.forward_seconds, found.backward_seconds) == (forward / 2e9, backward / 2e9)
    assert found.seconds == 2.0 + forward / 2e9 + backward / 2e9 + 3.0
    assert found.joules == pytest.approx(10 * (forward + backward) / 2e9 + 2 * 5.0)
    assert found.peak_memory_bytes == cost.peak_memory(spec, start(spec), given, load(2, 8))
    assert found.parameters == cost.trainable(spec, start(spec), given)
    timed = found.timed(0.25, 0.5)
    assert (timed.seconds, timed.joules) == (5.75, 10 * 0.75 + 2 * 5.0)


def test_joules_of_a_client_that_stops_before_its_end():
    """3 s of download, 1 + 2 s of computing, 4 s of upload, at 2 idle and 5 busy watts."""
    device = replace(NANO, idle_watts=2.0, busy_watts=5.0)
    found = cost.Cost(device, 0, 0, 0, 0.0, 0.0, 0, 0.0, 0.0, 3.0, 4.0, 0.0).timed(1.0, 2.0)
    joules = {0.0: 0.0, 1.5: 3.0, 3.0: 6.0, 4.0: 11.0, 6.0: 21.0, 8.0: 25.0, 10.0: 29.0, math.inf: 29.0}
    assert {seconds: found.joules_by(seconds) for seconds in joules} == joules
    assert found.joules == 29.0


@pytest.mark.parametrize(
    ("deadline", "has", "stop"),
    [(None, 100.0, None), (10.0, 100.0, None), (9.9, 100.0, 9.9), (None, 99.0, 3.0), (2.0, 99.0, 2.0)],
)
def test_when_a_client_stops(deadline, has, stop):
    """It downloads for 3 of 10 s, and needs 100 bytes."""
    device = replace(NANO, memory_bytes=has)
    found = cost.Cost(device, 0, 0, 0, 0.0, 0.0, 100, 0.0, 0.0, 3.0, 4.0, 0.0).timed(1.0, 2.0)
    assert found.stop(deadline) == stop


@pytest.mark.parametrize(("has", "fits"), [(0.0, True), (99.0, False), (100.0, True)])
def test_what_fits_a_device(has, fits):
    device = replace(NANO, memory_bytes=has)
    assert cost.Cost(device, 0, 0, 0, 0.0, 0.0, 100, 0.0, 0.0, 0.0, 0.0, 0.0).fits is fits


@pytest.mark.parametrize("name", ["flops_per_second", "up_bytes_per_second", "down_bytes_per_second", "idle_watts", "busy_watts"])  # fmt: skip
def test_what_is_unknown_of_a_device_is_named(name):
    spec = built("bert").spec
    with pytest.raises(ValueError, match=rf"device 'c7' \(nano\): {name} is 0.0, which means unknown"):
        cost.predict(spec, start(spec), Plan({}), load(2, 8), replace(NANO, **{name: 0.0}), 1, 1)


# ---- the longest answer


@pytest.mark.parametrize("up", ["BeAh", "B", "eA"])
def test_the_longest_answer_is_that_of_the_largest_components(up):
    """Of modules of 6, 10 and 4 numbers a component, two components each: three at most come back."""
    spec = toy.small({"0.m": (2, 3), "1.m": (1, 8), "2.m": (1, 2)})
    adapter, given = toy.drawn(spec), Plan({m.name: np.array([0, 1]) for m in spec.modules}, up=up, select=3)
    found = cost.most_up(spec, adapter, given, "f32")
    sizes = [
        cost.up(adapter.take({n: np.array(i) for n, i in picked.items()}), given, 3, "f32").frame
        for picked in (
            {"0.m": [0, 1], "1.m": [1]},
            {"0.m": [0], "1.m": [0, 1]},
            {"1.m": [0, 1], "2.m": [0]},
            {"0.m": [1]},
        )
    ]
    assert found.frame == max(sizes)
    whole = replace(given, select=None)
    assert cost.most_up(spec, adapter, whole, "f32") == cost.up(adapter, whole, 3, "f32")
    assert (
        cost.most_up(spec, adapter, replace(given, select=99), "f32").adapter
        == cost.up(adapter, whole, 3, "f32").adapter
    )


# ---- the flow


def test_the_flow_of_a_block():
    found = [map for map in built("llama").spec.flow if map.block == 1]
    ends = [map.name.rpartition(".")[2] for map in found]
    assert ends == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [map.stage for map in found] == [0, 0, 0, 1, 2, 2, 3]
    assert [map.role for map in found] == ["query", "key", "value", "", "", "", ""]
    assert {(map.out, map.in_) for map in found[:3]} == {(32, 32), (16, 32)}
    assert [map.role for map in built("gpt2").spec.flow if map.stage == 0 and map.block < 4] == ["fused"] * 4


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_flow_holds_every_adapted_map_once_and_the_head_last(kind):
    spec = built(kind).spec
    inside = [map for map in spec.flow if map.block < spec.blocks]
    assert [(map.name, map.out, map.in_, map.block) for map in inside] == [(m.name, m.out, m.in_, m.block) for m in spec.modules]  # fmt: skip
    after = spec.flow[len(inside) :]
    assert {map.block for map in after} == {4}
    assert [map.rows for map in after] == {"bert": [True, True], "llama": [False], "gpt2": [False]}[kind]
    assert f"{after[-1].name}.weight" in spec.dense


def test_blocks_that_share_weights_run_as_often_as_they_do():
    config = transformers.AlbertConfig(
        vocab_size=260, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=48, num_labels=4, attn_implementation="eager",
    )  # fmt: skip
    base = transformers.AlbertForSequenceClassification(config).requires_grad_(False).eval()
    found = flow.trace(models.Logits(base), base, {"classifier": base.classifier})
    assert [map.block for map in found] == [-1, *[0] * 18, 1, 1]
    assert [map.stage for map in found[1:19]] == [0, 0, 0, 1, 2, 3] * 3
    assert [map.role for map in found[1:7]] * 3 == [map.role for map in found[1:19]]


def test_tracing_leaves_the_model_as_it_was():
    model = built("bert")
    assert not any(t.requires_grad for t in model.network.parameters())
    assert not any(m._forward_hooks for m in model.network.modules())


def test_a_loaded_model_has_its_flow():
    spec = toy.encoder().spec
    assert {m.name for m in spec.modules} < {map.name for map in spec.flow}
    assert spec.flow[-1].name == "head"
    assert (spec.attention.width, spec.attention.heads) == (32, 2)
    network = toy.encoder().network
    assert spec.parameters == sum(t.numel() for t in network.parameters()) - sum(t.size for t in spec.dense.values())
