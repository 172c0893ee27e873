"""LEGEND: the vectors, worked fleets and invariants of its specification, on small numbers or the tiny model."""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import toy
from fedrank import cost, methods
from fedrank.adapter import Adapter, Block
from fedrank.client import Site
from fedrank.config import Local, Rounds
from fedrank.engines import local
from fedrank.frame import CHECKSUM, HEADER, sizes
from fedrank.methods import legend
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.hetlora import HetLoRA
from fedrank.methods.legend import LEGEND
from fedrank.protocol import Attention, Device, Job, Linear, Load, ModelSpec, Module, Plan, State, Update, rng
from fedrank.selection import arithmetic, depths, everything, suffix
from fedrank.server import Server
from fedrank.store import Store
from fedrank.training import tasks
from fedrank.training.hooks import live, mounted
from fedrank.wire import Wire

EMPTY = HEADER + CHECKSUM  # bytes of a frame that carries nothing


def model(layers: int = 12, width: int = 1, rank: int = 8, parts: str = "qv", head: bool = False) -> ModelSpec:
    """Square query and value maps in every block: sigma = 2 * 2 * width numbers per unit of rank."""
    modules = tuple(Module(f"{at}.{part}", width, width, at) for at in range(layers) for part in parts)
    dense = {"head.weight": np.zeros((2, 2), np.float32)} if head else {}
    flow = tuple(Linear(m.name, m.out, m.in_, m.block, 0) for m in modules)
    return ModelSpec(modules, layers, dense, rank, 2.0, "small", flow, Attention(width, 1), 1000)


def knowing(state: State, capacities: Mapping[str, tuple[float, ...]]) -> State:
    """The state of a server that estimated f, b, link and fixed of these clients."""
    return replace(
        state, arrays={**state.arrays, **{f"capacity/{c}": np.array(v, float) for c, v in capacities.items()}}
    )


def planned(method: LEGEND, state: State, *names: str, **machine: Any) -> list[int]:
    """How many blocks each of these clients trains; 0: it sits out."""
    plans = method.plan(state, {name: Device(name, 4, **machine) for name in names}, 0)
    return [0 if plans[name] is None else depth_of(plans[name]) for name in names]


def depth_of(plan: Plan) -> int:
    return len({name.partition(".")[0] for name in plan.train})


def timed(update: Update, *seconds: float) -> Update:
    """An update whose client took so long forward, backward, up and down."""
    return replace(update, metrics=dict(zip(legend.TIMINGS, map(float, seconds), strict=True)))


# ---- 1: the rank distribution


@pytest.mark.parametrize(
    ("layers", "budget", "least", "ranks"),
    [
        (12, 96, 2, [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]), (12, 48, 2, [2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6]),
        (6, 48, 2, [2, 4, 7, 9, 12, 14]), (4, 16, 1, [1, 3, 5, 7]), (12, 12, 2, [1] * 12), (1, 8, 2, [8]),
        (24, 192, 2, [2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14]),
        (12, 270, 17, list(range(17, 29))), (3, 12, 9, [4, 4, 4]), (4, 10, 9, [2, 2, 3, 3]), (4, 11, 2, [2, 2, 3, 4]),
    ],
)  # fmt: skip
def test_01_ranks_rise_evenly(layers, budget, least, ranks):
    """x_l = r + 2 (psi / L - r) / (L - 1) l, rounded down, the rest to the largest fractions, ties to the later."""
    assert arithmetic(layers, budget, least).tolist() == ranks


@given(st.integers(1, 40), st.integers(0, 1000), st.integers(1, 30))
def test_01_ranks_are_whole_rise_and_sum_up_to_the_budget(layers, more, least):
    ranks = arithmetic(layers, layers + more, least)
    assert ranks.sum() == layers + more
    assert ranks.dtype == int
    assert ranks.min() >= 1
    assert all(a <= b for a, b in pairwise(ranks))
    assert ranks[0] >= min(least, (layers + more) // layers)


def test_01_less_than_one_rank_per_layer_is_refused():
    with pytest.raises(ValueError, match="11 ranks cannot give each of 12 layers one"):
        arithmetic(12, 11)


def test_01_the_budget_and_the_first_rank_are_settings():
    """Ranks 17 to 28, of which the last 6, 9 and 12 blocks hold 153, 216 and 270."""
    state = LEGEND(budget=270, least=17).begin(model(), 3, 0)
    assert [state.adapter.blocks[f"{at}.v"].rank for at in range(12)] == list(range(17, 29))
    assert state.arrays["units"][[5, 8, 11]].tolist() == [153, 216, 270]
    assert state.arrays["sigma"] == 4


# ---- 2, 3: depths under a common deadline

Fleet = tuple[np.ndarray, np.ndarray, np.ndarray, int]  # f, b, link of each client, and the layers


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    count, layers = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    numbers = st.lists(st.floats(0, 1), min_size=count, max_size=count)
    f, ratio, link = (np.array(draw(numbers)) for _ in range(3))
    return 10 ** (2 * f - 2), 10 ** (2 * f - 2) * (0.8 + 1.2 * ratio), 10 ** (3 * link - 4), layers


def seconds_of(fleet: Fleet, budget: int = 8) -> np.ndarray:
    """t(k) = L f + k b + link R(k)."""
    f, b, link, layers = fleet
    units = np.cumsum(arithmetic(layers, budget * layers)[::-1])
    return (layers * f)[:, None] + np.outer(b, np.arange(1, layers + 1)) + np.outer(link, units)


def uncapped(seconds: np.ndarray) -> np.ndarray:
    return np.full(len(seconds), seconds.shape[1])


def at(seconds: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Each client's seconds at its depth."""
    return seconds[np.arange(len(found)), found - 1]


NEAR = 1 + 1e-9  # sums in another order


@given(fleets(), st.integers(1, 12), st.floats(0, 0.5))
@trials(deadline=None)
def test_02_depths_are_the_largest_that_meet_the_deadline(fleet, least, slack):
    t, least = seconds_of(fleet), min(least, fleet[3])
    found, deadline = depths(t, uncapped(t), least, slack)
    assert found.min() >= least
    assert at(t, found).max() <= deadline * NEAR
    assert found.max() == fleet[3]  # so every layer has a holder
    for row, k in zip(t, found, strict=True):
        assert k == fleet[3] or row[k] > deadline
    assert at(t, found).max() <= t[:, -1].max()  # never slower than all at full depth
    assert deadline == pytest.approx(max(t[:, least - 1].max(), t[:, -1].min()) * (1 + slack))


@given(fleets(), st.integers(1, 12), st.floats(0, 0.5), st.data())
@trials(deadline=None)
def test_02_depths_keep_to_caps_which_shorten_no_ones_round(fleet, least, slack, data):
    t, least = seconds_of(fleet), min(least, fleet[3])
    caps = np.array(data.draw(st.lists(st.integers(0, fleet[3]), min_size=len(t), max_size=len(t))))
    found, deadline = depths(t, caps, least, slack)
    joins = caps >= least
    assert np.array_equal(found > 0, joins)
    if not joins.any():
        assert np.isnan(deadline)
        return
    t, caps, found = t[joins], caps[joins], found[joins]
    assert at(t, found).max() <= deadline * NEAR
    assert all(k == cap or row[k] > deadline for row, k, cap in zip(t, found, caps, strict=True))
    assert np.all(found <= caps)
    assert found.max() == caps.max() or caps.max() == fleet[3]  # where none can do all, the deepest does what it can
    assert deadline >= t[:, -1].min() * (1 + slack)  # of full rounds, though no one may be able to play one
    if caps.max() == fleet[3]:
        assert deadline == depths(t, uncapped(t), least, slack)[1]


@given(fleets(), st.integers(0, 7), st.tuples(*[st.floats(0.1, 1)] * 3))
@trials(deadline=None)
def test_02_a_faster_client_is_never_shallower(fleet, which, share):
    f, b, link, layers = fleet
    which %= len(f)
    faster = (np.append(x, x[which] * y) for x, y in zip((f, b, link), share, strict=True))
    t = seconds_of((*faster, layers))
    found, _ = depths(t, uncapped(t))
    assert found[-1] >= found[which]


@given(fleets(), st.floats(1e-3, 1e3), st.floats(0, 0.5))
@trials(deadline=None)
def test_02_depths_have_no_unit_of_time_and_follow_the_clients(fleet, unit, slack):
    t = seconds_of(fleet)
    found, deadline = depths(t, uncapped(t), 1, slack)
    scaled, later = depths(t * unit, uncapped(t), 1, slack)
    np.testing.assert_array_equal(scaled, found)
    assert later == pytest.approx(deadline * unit)
    order = rng(0, "order").permutation(len(t))
    np.testing.assert_array_equal(depths(t[order], uncapped(t), 1, slack)[0], found[order])


@given(fleets())
@trials(deadline=None)
def test_02_equal_clients_train_everything_and_no_one_waits(fleet):
    t = np.tile(seconds_of(fleet)[:1], (5, 1))
    found, deadline = depths(t, uncapped(t))
    assert set(found) == {fleet[3]}
    np.testing.assert_array_equal(at(t, found), np.full(5, deadline))


@given(fleets(), st.floats(0, 0.5))
@trials(deadline=None)
def test_03_no_one_waits_as_long_as_one_more_layer_would_take(fleet, slack):
    """T - t(k) < b + link r_{L-k-1} for every client below full depth."""
    _, b, link, layers = fleet
    t, ranks = seconds_of(fleet), arithmetic(layers, 8 * layers)
    found, deadline = depths(t, uncapped(t), 1, slack)
    for i, k in enumerate(found):
        if k < layers:
            assert deadline - t[i, k - 1] < (b[i] + link[i] * ranks[layers - k - 1]) * NEAR


def test_02_by_hand():
    """Full rounds take 3, 6, 9: the deadline is max(slowest at k = 1: 3, fastest at k = 3: 3) = 3, then 6, 9."""
    t = np.array([[1.0, 2, 3], [2, 4, 6], [3, 6, 9]])
    assert [(d.tolist(), s) for d, s in [depths(t, uncapped(t))]] == [([3, 1, 1], 3)]
    assert depths(t, uncapped(t), 2)[0].tolist() == [3, 3, 2]  # the slowest does two layers in 6
    assert depths(t, uncapped(t), 1, 0.4)[0].tolist() == [3, 2, 1]  # until 4.2
    assert depths(t, uncapped(t), 1, 0.0, 0.5)[0].tolist() == [3, 3, 2]  # the median of full rounds is 6
    assert depths(t, uncapped(t), 1, 0.0, 1.0)[0].tolist() == [3, 3, 3]
    # 0.1 + 0.2 is a little more than 0.3, and no reason to leave a layer out
    assert depths(np.array([[0.1, 0.2, 0.3], [0.1, 0.1 + 0.2, 0.4]]), np.array([3, 3]))[0].tolist() == [3, 2]
    # a fast client short of memory does not shorten the round of the others
    assert depths(t[[0, 1]], np.array([1, 3]))[0].tolist() == [1, 1]
    assert depths(t[[1, 2]], np.array([1, 3])) == (pytest.approx([1, 2]), 6)
    # no one can do all three: the deepest does its two, and the round is as long as that takes
    assert depths(t[[1, 2]] + [[0], [1]], np.array([1, 2])) == (pytest.approx([1, 2]), 7)
    # of two that are capable of as much, the faster one
    assert depths(t, np.array([1, 2, 2])) == (pytest.approx([1, 2, 1]), 4)
    # one that can do nothing at all sits out, and sets no deadline
    assert depths(t, np.array([0, 3, 3])) == (pytest.approx([0, 3, 2]), 6)
    # one of which nothing is known gets the least depth
    t[0] = np.nan
    assert depths(t, uncapped(t)) == (pytest.approx([1, 3, 2]), 6)
    assert np.isnan(depths(t[:1], uncapped(t[:1]))[1])


FLEETS = [  # speed factors, links in 0.01 s per rank, depths, rounds of FedLoRA and LEGEND, mean waits, bytes
    ((1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1), (12, 12, 12, 12, 12, 12), 2.96, 2.96, 0, 0, 1.00),
    ((1, 1, 1.5, 1.5, 2, 2), (1, 1, 1, 1, 1, 1), (12, 12, 6, 6, 3, 3), 4.96, 2.96, 1.00, 0.03, 0.71),
    ((1, 1, 1, 1, 1, 1), (1, 1, 2, 2, 5, 5), (12, 12, 6, 6, 2, 2), 6.80, 2.96, 2.24, 0.17, 0.67),
    ((1, 1, 1.5, 1.5, 2, 2), (1, 1, 2, 2, 5, 5), (12, 12, 3, 3, 1, 1), 8.80, 2.96, 3.24, 0.13, 0.52),
    ((1, 1, 2, 2, 4, 4), (1, 1, 1, 1, 1, 1), (12, 12, 9, 9, 1, 1), 8.96, 4.47, 3.33, 0.54, 0.68),
    ((1, 1, 1, 1, 10, 10), (1, 1, 1, 1, 1, 1), (12, 12, 12, 12, 1, 1), 20.96, 10.97, 12.0, 5.34, 0.72),
]


@pytest.mark.parametrize("fleet", FLEETS, ids=lambda fleet: "-".join(map(str, fleet[2])))
def test_worked_fleets(fleet):
    """f = b = speed / 12, psi = 96, no slack: depths, seconds of a round, mean waits, bytes against full depth."""
    speeds, links, expected, full_round, round_, full_wait, wait, share = fleet
    clients = [f"c{i}" for i in range(6)]
    known = {c: (s / 12, s / 12, link / 100, 0.0) for c, s, link in zip(clients, speeds, links, strict=True)}
    method, spec = LEGEND(slack=0.0), model()
    state = knowing(method.begin(spec, 3, 0), known)
    assert tuple(planned(method, state, *clients)) == expected

    def times(ranks: list[int], ks: tuple[int, ...]) -> np.ndarray:
        held = [sum(ranks[12 - k :]) for k in ks]
        return np.array(
            [f * 12 + k * b + link * r for (f, b, link, _), k, r in zip(known.values(), ks, held, strict=True)]
        )

    full, mine = times([8] * 12, (12,) * 6), times([2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14], expected)
    assert (round(full.max(), 2), round(mine.max(), 2)) == (full_round, round_)
    assert (round(np.mean(full.max() - full), 2), round(np.mean(mine.max() - mine), 2)) == (full_wait, wait)
    plans = method.plan(state, {c: Device(c, 4) for c in clients}, 0)
    bytes_up = [cost.up(state.adapter, plan, 24, "f32").adapter for plan in plans.values()]
    uniform = FedAvg().begin(spec, 3, 0).adapter
    whole = cost.up(uniform, Plan(everything(uniform)), 24, "f32").adapter
    assert round(sum(bytes_up) / (6 * whole), 2) == share
    # and with full depth for all, the round is FedLoRA's
    everyone = LEGEND(depth="full", ranks="uniform")
    assert planned(everyone, knowing(everyone.begin(spec, 3, 0), known), *clients) == [12] * 6


def on_the_clock(method: Any, path: Path, speeds: tuple[float, ...], links: tuple[float, ...]) -> dict[str, Any]:
    """Two rounds of clients that send real frames and take so many seconds for them; the last round's row.

    Of no one anything is known before. Blocks have as many numbers as BERT-base's query and value together, so
    that frames are little else than components.
    """
    spec = model(width=1536, parts="q")
    begin = method.begin(spec, 2, 0)
    tiers = {1: 8, 2: 6, 5: 4}  # ranks by link, for methods that cut them
    devices = {f"c{at}": Device(f"c{at}", 4, rank=tiers[link]) for at, link in enumerate(links)}
    wire, store = Wire(spec, begin.adapter, "f32", "toy", 0, {}), Store.create(path)

    def fit(job: Job, observe: Any = None) -> Update:
        at = int(job.device.id[1:])
        transfer = links[at] / 100 * sum(map(len, job.plan.train.values()))
        seconds = (speeds[at], speeds[at] * depth_of(job.plan) / 12, 0.7 * transfer, 0.3 * transfer)
        update = timed(Update(job.adapter.take(job.plan.train), 4), *seconds)
        return replace(update, metrics={**update.metrics, "device_seconds": sum(seconds)})

    sites = {
        name: Site(device, method, wire, store.private, Local(), 0, fit, None, nullcontext)
        for name, device in devices.items()
    }
    engine = local.Local(devices, sites.__getitem__, 0.0, 0)
    server = Server(method, engine, wire, store, Rounds(count=2, cohort=6), 0, "train", None)
    return [event for event in server.play(begin) if event["event"] == "round"][-1]


@pytest.mark.parametrize("fleet", FLEETS, ids=lambda fleet: "-".join(map(str, fleet[2])))
def test_worked_fleets_in_the_server_s_ledger(fleet, tmp_path):
    """Estimated from rounds at depth 1; and HetLoRA, which only sends less, is in between."""
    speeds, links, expected, full_round, round_, full_wait, wait, share = fleet
    full, cut, mine = (
        on_the_clock(method, tmp_path / type(method).__name__, speeds, links)
        for method in (FedAvg(), HetLoRA(), LEGEND(slack=0.0))
    )
    assert (round(full["round_seconds"], 2), round(mine["round_seconds"], 2)) == (full_round, round_)
    assert (round(full["waiting_seconds"], 2), round(mine["waiting_seconds"], 2)) == (full_wait, wait)
    assert round(mine["adapter_bytes_up"] / full["adapter_bytes_up"], 2) == share
    assert (mine["lowest_depth"], mine["mean_depth"]) == (min(expected), np.mean(expected))
    assert mine["estimated_deadline_seconds"] == pytest.approx(round_, abs=0.01)
    for name in ("round_seconds", "waiting_seconds"):
        if len({*zip(speeds, links, strict=True)}) == 1:
            assert mine[name] == pytest.approx(cut[name]) == full[name]
        else:
            assert mine[name] < cut[name] <= full[name]


# ---- 4: aggregation over the holders of a block


def held(state: State, depth: int, fill: float, client_examples: int = 1) -> Update:
    """An update of the last `depth` blocks in which every number is `fill`."""
    part = state.adapter.take(suffix(state.adapter, state.arrays["layer"], depth))
    blocks = {n: Block(b.ids, np.full_like(b.B, fill), None, np.full_like(b.A, fill)) for n, b in part.blocks.items()}
    return Update(
        Adapter(blocks, part.scale, {n: np.full_like(t, fill) for n, t in part.dense.items()}), client_examples
    )


def levels(state: State) -> list[float]:
    """The number of which each block of a merged adapter consists; nan where there are several."""
    found = {}
    for (name, block), layer in zip(state.adapter.blocks.items(), state.arrays["layer"], strict=True):
        values = np.unique(np.concatenate([block.A.ravel(), block.B.ravel()]))
        found.setdefault(int(layer), set()).add(values[0] if len(values) == 1 else np.nan)
        assert name.startswith(f"{layer}.")
    return [min(values) if len(values) == 1 else np.nan for values in found.values()]


def test_04_a_block_is_averaged_over_its_holders_never_over_all():
    """Depths 3, 2, 1; examples 1, 1, 2; values 6, 3, 1: 6; (6 + 3) / 2; (6 + 3 + 2) / 4, and the head so too."""
    method, spec = LEGEND(), model(layers=4, head=True)
    state = method.begin(spec, 3, 0)
    updates = toy.Arrived({"a": held(state, 3, 6), "b": held(state, 2, 3), "c": held(state, 1, 1, 2)})
    found = method.merge(state, updates)
    assert levels(found)[1:] == [6, 4.5, 2.75]
    for name in ("0.q", "0.v"):  # no holder: as it was
        assert np.array_equal(found.adapter.blocks[name].A, state.adapter.blocks[name].A)
        assert not found.adapter.blocks[name].B.any()
    assert set(found.adapter.dense["head.weight"].ravel()) == {2.75}
    assert {k: found.metrics[k] for k in ("mean_depth", "lowest_depth", "highest_depth")} == {
        "mean_depth": 2, "lowest_depth": 1, "highest_depth": 3,
    }  # fmt: skip
    assert levels(LEGEND(weights="uniform").merge(state, updates))[1:] == [6, 4.5, pytest.approx(10 / 3)]


def test_04_one_holder_is_copied_and_equal_updates_are_a_fixed_point():
    method, spec = LEGEND(), model(layers=3, width=4, head=True)
    state = method.begin(spec, 3, 0)
    draw = rng(0, "drawn")

    def shaken(depth: int) -> Adapter:
        part = state.adapter.take(suffix(state.adapter, state.arrays["layer"], depth))
        return replace(
            part,
            blocks={n: replace(b, B=draw.normal(size=b.B.shape).astype(np.float32)) for n, b in part.blocks.items()},
        )

    alone, common = shaken(3), shaken(3)
    top_ = common.take(suffix(common, state.arrays["layer"], 1))
    found = method.merge(state, toy.Arrived({"a": Update(alone, 3)})).adapter
    assert toy.same(found, alone)
    found = method.merge(state, toy.Arrived({"a": Update(common, 3), "b": Update(top_, 5), "c": Update(common, 7)}))
    for name, block in found.adapter.blocks.items():
        np.testing.assert_array_equal(block.B, common.blocks[name].B)


@given(st.permutations([(3, 1.0, 2), (1, 4.0, 1), (2, -2.0, 5)]))
@trials(deadline=None, max_examples=6)
def test_04_who_is_called_what_does_not_matter(order):
    method = LEGEND()
    state = method.begin(model(layers=3), 3, 0)
    updates = {f"c{i}": held(state, *args) for i, args in enumerate(order)}
    assert levels(method.merge(state, toy.Arrived(updates))) == pytest.approx([1, -8 / 7, -0.5])


# ---- 5: layers below the suffix run without a graph


def shaken(adapter: Adapter) -> Adapter:
    """B away from zero, so that every gradient is."""
    draw = rng(0, "B")
    blocks = {n: replace(b, B=draw.normal(size=b.B.shape).astype(np.float32)) for n, b in adapter.blocks.items()}
    return replace(adapter, blocks=blocks)


def passed(train: Adapter, frozen: Adapter) -> tuple[dict[str, torch.Tensor], list[bool], int, int]:
    """One batch there and back: gradients; which layers' outputs have a graph; bytes kept for it; FLOPs."""
    encoder, on, graphs = toy.encoder(), live(train, frozen, "BeAh", "cpu"), []

    def look(module: Any, inputs: Any, output: Any) -> None:
        graphs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    handles = [layer.register_forward_hook(look) for layer in encoder.base.encoder.layer]
    inputs, labels = toy.encoded("train").batch(np.arange(8), "cpu")
    saving = toy.saved_for_backward([*encoder.network.parameters(), *on.values.values()])
    with mounted(encoder.modules, encoder.heads, on), saving as most, FlopCounterMode(display=False) as flops:
        tasks.loss(encoder.network(**inputs), labels).backward()
    for handle in handles:
        handle.remove()
    return on.grads, graphs, most(), flops.get_total_flops()


@pytest.mark.parametrize("download", ["suffix", "full"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_05_gradients_are_of_the_suffix_and_the_head_alone(download, k):
    method = LEGEND(download=download)
    state = method.begin(toy.encoder().spec, 3, 0)
    plan, adapter = method._suffix(state, k), shaken(state.adapter)
    train, frozen = adapter.take(plan.train), adapter.take(plan.frozen)
    grads, graphs, _, _ = passed(train, frozen)
    assert graphs == [at >= 3 - k for at in range(3)]
    assert {m.block for m in toy.encoder().spec.modules if m.name in train.blocks} == set(range(3 - k, 3))
    assert grads.keys() == {"B", "A", "h.head.weight", "h.head.bias"}
    assert grads["A"].numel() == sum(block.A.size for block in train.blocks.values())
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    rows = np.split(grads["A"].numpy(), np.cumsum([block.A.size for block in train.blocks.values()])[:-1])
    assert all(np.any(row) for row in rows)  # of each module
    assert len(frozen.blocks) == (6 * (3 - k) if download == "full" else 0)


def test_05_memory_and_compute_grow_by_as_much_with_every_layer():
    """At equal ranks both are affine in depth; training the first layer instead costs a pass through all."""
    state = LEGEND(ranks="uniform").begin(toy.encoder().spec, 3, 0)
    adapter, nothing = shaken(state.adapter), Adapter({}, state.adapter.scale, {})
    layer = state.arrays["layer"]
    found = [passed(adapter.take(suffix(adapter, layer, k)), nothing)[2:] for k in (1, 2, 3)]
    for one, two, three in zip(*found, strict=True):
        assert two - one == three - two > one / 4
    prefix = {m.name: np.arange(4) for m in toy.encoder().spec.modules if m.block == 0}
    assert all(a > b for a, b in zip(passed(adapter.take(prefix), nothing)[2:], found[1], strict=True))
    # what the server reckons with is about what autograd keeps
    length = toy.encoded("train").lengths[:8].max()
    reckoned = state.arrays["memory"][:, 1:] @ [8 * length, 8 * length**2, 8]
    assert found[1][0] - found[0][0] == pytest.approx(reckoned[1] - reckoned[0], rel=0.2)


# ---- 6: bytes


@pytest.mark.parametrize(
    ("k", "held", "params", "share", "compute"),
    [(1, 14, 43_008, 0.146, 0.542), (3, 39, 119_808, 0.406, 0.625), (6, 69, 211_968, 0.719, 0.750),
     (9, 87, 267_264, 0.906, 0.875), (12, 96, 294_912, 1, 1)],
)  # fmt: skip
def test_06_bytes_of_a_depth(k, held, params, share, compute):
    """sigma = 2 (768 + 768) = 3,072 numbers per rank; 4 sigma R(k) bytes each way, and what full_down adds."""
    spec = model(width=768)
    state = LEGEND().begin(spec, 3, 0)
    assert (float(state.arrays["sigma"]), state.arrays["units"][k - 1]) == (3072, held)
    uniform = FedAvg().begin(spec, 3, 0).adapter
    assert round(4 * params / cost.up(uniform, Plan(everything(uniform)), 24, "f32").adapter, 3) == share
    wire = Wire(spec, state.adapter, "f32", "toy", 0, {})
    for download, down in (("suffix", 4 * params), ("full", 4 * 294_912)):
        plan = LEGEND(download=download)._suffix(state, k)
        frame = wire.request("train", "c0", plan, state)
        assert sizes(frame) == cost.down(state.adapter, plan, 24, "f32")
        assert sizes(frame).adapter == down
        request = wire.open_request(frame)
        update = Update(request.adapter.take(request.plan.train), 1)
        assert sizes(wire.update(request, update)).adapter == 4 * params
    time = legend._seconds(state, np.array([[1.0, 1.0, 0.0, 0.0]]))[0]
    assert round(time[k - 1] / time[-1], 3) == compute


def test_06_blocks_of_other_sizes_count_by_their_bytes():
    modules = (Module("0.q", 3, 5, 0), Module("1.q", 3, 5, 1), Module("1.f", 7, 2, 1), Module("2.f", 7, 4, 2))
    state = LEGEND().begin(replace(model(layers=3), modules=modules), 3, 0)
    ranks = arithmetic(3, 24).tolist()
    assert state.arrays["sigma"] == (8 * ranks[0] + 17 * ranks[1] + 11 * ranks[2]) / 24
    for k in (1, 2, 3):
        plan = LEGEND()._suffix(state, k)
        bytes_up = cost.up(state.adapter, plan, 4, "f32").adapter
        assert 4 * state.arrays["sigma"] * state.arrays["units"][k - 1] == pytest.approx(bytes_up)


# ---- 7: the start


@pytest.mark.parametrize("download", ["suffix", "full"])
def test_07_the_first_forward_is_the_frozen_models(download):
    method, encoder = LEGEND(download=download), toy.encoder()
    state = method.begin(encoder.spec, 3, 0)
    inputs, _ = toy.encoded("train").batch(np.arange(8), "cpu")
    with torch.inference_mode():
        bare = encoder.network(**inputs)
        for k in (1, 2, 3):
            plan = method._suffix(state, k)
            on = live(state.adapter.take(plan.train), state.adapter.take(plan.frozen), "BeAh", "cpu")
            with mounted(encoder.modules, encoder.heads, on):
                assert torch.equal(encoder.network(**inputs), bare)


def test_07_ranks_differ_by_block_and_the_scale_is_common():
    adapter = LEGEND().begin(toy.encoder().spec, 3, 0).adapter
    by_block = [{b.rank for n, b in adapter.blocks.items() if f".{at}." in n} for at in range(3)]
    assert by_block == [{2}, {4}, {6}]  # 3 blocks of rank 4: 12
    assert adapter.scale == toy.encoder().spec.scale
    block = adapter.blocks["encoder.layer.2.output.dense"]
    assert block.A.shape == (6, 64)
    assert 0.9 / 8 < np.abs(block.A).max() <= 1 / 8


# ---- 8: capacity estimates


def capacity(state: State, client: str = "a") -> np.ndarray:
    return state.arrays[f"capacity/{client}"]


@pytest.mark.parametrize("download", ["suffix", "full"])
def test_08_observations_at_any_depth_are_comparable(download):
    """f = T_fwd / L, b = T_bwd / k, link = T_comm / (R(k) + rest), where the rest of a frame is counted in ranks."""
    method, spec = LEGEND(download=download), model(layers=4, width=2, rank=4, head=True)
    state = method.begin(spec, 3, 0)
    assert arithmetic(4, 16).tolist() == [2, 3, 5, 6]
    sigma, rest = 8, (EMPTY + 4 * 4) / (4 * 8)
    assert state.arrays["sigma"] == sigma
    f, b, up, down = 0.5, 0.7, 0.01, 0.002  # seconds per block, per block, per unit of rank up, down
    for k, held_ranks in ((1, 6), (2, 11), (3, 14), (4, 16)):
        travels_down = held_ranks if download == "suffix" else 16
        seconds = (4 * f, k * b, up * (held_ranks + rest), down * (travels_down + rest))
        found = method.merge(state, toy.Arrived({"a": timed(held(state, k, 1), *seconds)}))
        if download == "suffix":
            expected = [f, b, up + down, (up + down) * rest]
        else:  # what comes down is the same at every depth
            expected = [f, b, up, up * rest + down * (16 + rest)]
        np.testing.assert_allclose(capacity(found), expected)
        predicted = legend._seconds(found, capacity(found)[None])[0, k - 1]
        assert predicted == pytest.approx(sum(seconds))


def test_08_without_a_head_on_the_wire_there_is_none_in_the_rest():
    method = LEGEND()
    state = method.begin(model(layers=4, width=2, rank=4, head=True), 3, 0)
    update = timed(held(state, 1, 1), 1, 1, 3, 0)
    update = replace(update, adapter=replace(update.adapter, dense={}))
    found = capacity(method.merge(state, toy.Arrived({"a": update})))
    assert found[3] / found[2] == pytest.approx(EMPTY / 32)


@pytest.mark.parametrize(("settings", "rho"), [({}, 0.8), ({"smoothing": 0.5}, 0.5), ({"smoothing": 0.0}, 0.0)])
def test_08_estimates_are_moving_averages(settings, rho):
    method = LEGEND(**settings)
    state = method.begin(model(layers=4), 9, 0)

    def seen(state: State, seconds: float, *names: str) -> State:
        return method.merge(state, toy.Arrived({n: timed(held(state, 2, 1), *[seconds] * 4) for n in names}))

    first = seen(state, 1, "a", "b")
    assert set(first.arrays) - set(state.arrays) == {"capacity/a", "capacity/b"}
    np.testing.assert_array_equal(capacity(seen(first, 1, "a")), capacity(first))  # constant: a fixed point
    after = first
    for t in range(1, 6):  # the step from 1 to 2, of which 1 - rho^t is seen after t rounds
        after = seen(after, 2, "a")
        np.testing.assert_allclose(capacity(after), capacity(first) * (2 - rho**t))
        np.testing.assert_array_equal(capacity(after, "b"), capacity(first, "b"))  # absent: unchanged


@pytest.mark.parametrize("broken", [{}, {"forward_seconds": 1.0}, dict.fromkeys(legend.TIMINGS, -1.0)])
def test_08_a_client_without_timings_stays_at_what_is_known(broken):
    method = LEGEND()
    state = method.begin(model(layers=4), 9, 0)
    update = replace(held(state, 2, 1), metrics={"seconds": 3.0, **broken})
    found = method.merge(state, toy.Arrived({"a": update}))
    assert found.arrays.keys() == state.arrays.keys()
    assert "estimated_deadline_seconds" not in found.metrics
    known = knowing(state, {"a": (1, 2, 3, 4)})
    np.testing.assert_array_equal(capacity(method.merge(known, toy.Arrived({"a": update}))), [1, 2, 3, 4])


def test_08_a_machine_is_taken_at_its_word_until_it_is_measured():
    """A block takes 2 * 2 * 4 = 16 FLOPs a token and 4 * 2 a pair: 400 for 10 tokens and 30 pairs; 100 a second."""
    method, spec = LEGEND(), model(layers=4, width=2, rank=4, head=True)
    state = method.begin(spec, 9, 0)
    load = Load(steps=1, tokens=10, pairs=30, peak_tokens=10, peak_pairs=30)
    machine = Device("a", 4, load=load, flops_per_second=100.0, up_bytes_per_second=1e4, down_bytes_per_second=2e4)
    rest, frame = (EMPTY + 16) / 32, EMPTY + 16 + 4 * 8 * 16
    up, down = frame / 1e4, (frame + 6) / 2e4  # which of 8 * 6 components, in a bit each
    link = (up + down) / (16 + rest)
    np.testing.assert_allclose(method._capacity(state, machine), [4, 4, link, link * rest])
    full = LEGEND(download="full")._capacity(state, machine)
    np.testing.assert_allclose(full, [4, 4, 0.0032, 0.0032 * rest + down])
    # b takes 5 s a block, so 20 + 5 k and 0.4 for its frames, until the 32.4 of a's full round and 5 % more
    slow = replace(machine, id="b", flops_per_second=80.0, load=replace(load, pairs=10, tokens=20))
    plans = method.plan(state, {"a": machine, "b": slow}, 0)
    assert [depth_of(plans[c]) for c in "ab"] == [4, 2]
    np.testing.assert_array_equal(method._capacity(knowing(state, {"a": (1, 2, 3, 4)}), machine), [1, 2, 3, 4])
    for unknown in ({"load": None}, {"flops_per_second": 0.0}, {"up_bytes_per_second": 0.0}):
        assert np.isnan(method._capacity(state, replace(machine, **unknown))).all()
        plans = method.plan(state, {"a": machine, "b": replace(slow, **unknown)}, 0)
        assert [depth_of(plans[c]) for c in "ab"] == [4, 1]
    flat = LEGEND().begin(replace(spec, flow=(), attention=Attention(0, 0)), 9, 0)
    assert np.isnan(method._capacity(flat, machine)).all()  # a model of unknown costs


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({}, 8.4), ({"slack": 0.0}, 8), ({"slack": 0.0, "min_depth": 2}, 9), ({"slack": 0.0, "quantile": 0.5}, 10),
     ({"depth": "full"}, None)],
)  # fmt: skip
def test_08_the_deadline_that_follows_from_the_estimates(settings, seconds):
    """Four blocks in 4 + k seconds, and in half as much again: full rounds of 8 and 12, the slower's least ones 7.5 and 9."""
    method = LEGEND(**settings)
    state = method.begin(model(layers=4), 9, 0)
    updates = {"a": timed(held(state, 4, 1), 4, 4, 0, 0), "b": timed(held(state, 2, 1), 6, 3, 0, 0)}
    found = method.merge(state, toy.Arrived(updates)).metrics.get("estimated_deadline_seconds")
    assert found == (None if seconds is None else pytest.approx(seconds))


# ---- 9: the modelled clock alone decides


def test_09_the_hosts_speed_changes_nothing():
    method = LEGEND()
    state = method.begin(model(layers=4), 9, 0)
    update = timed(held(state, 2, 1), 1, 2, 3, 4)
    found = [
        method.merge(state, toy.Arrived({"a": replace(update, metrics={**update.metrics, "seconds": seconds})}))
        for seconds in (0.1, 100.0)
    ]
    assert toy.equal(*found)


# ---- knobs and caps


@pytest.mark.parametrize(("knobs", "found"), [({}, 4), ({"slack": 0.0}, 3), ({"slack": 0.0, "quantile": 1.0}, 4)])
def test_slack_and_quantile_lengthen_the_round(knobs, found):
    """By the fast one's 8 s another, which takes 5.6 + 0.7 k, does three blocks; by 8.4 s, 5 % more, all four."""
    method = LEGEND(**knobs)
    state = knowing(method.begin(model(layers=4), 3, 0), {"a": (1, 1, 0, 0), "b": (1.4, 0.7, 0, 0)})
    assert planned(method, state, "a", "b") == [4, found]


def travel(spec: ModelSpec, state: State, plan: Plan) -> tuple[bytes, bytes]:
    """The frames of a client's round, there and back."""
    wire = Wire(spec, state.adapter, "f32", "toy", 0, {})
    frame = wire.request("train", "a", plan, state)
    request = wire.open_request(frame)
    return frame, wire.update(request, Update(request.adapter.take(plan.train), 1))


def test_caps_on_memory_seconds_and_bytes():
    """Memory as the costs have it, by which a client would refuse what it cannot hold."""
    spec = model(layers=4, width=2, rank=4, head=True)
    state = LEGEND().begin(spec, 3, 0)
    known = knowing(state, dict.fromkeys("ab", (1.0, 0.5, 0.0, 0.0)))
    load = Load(steps=3, tokens=30, pairs=90, peak_tokens=10, peak_pairs=30)
    held_ranks = {1: 6, 2: 11, 3: 14, 4: 16}
    for k, ranks in held_ranks.items():
        assert planned(LEGEND(max_seconds=4 + 0.5 * k), known, "a") == [k]
        assert planned(LEGEND(max_seconds=3.99 + 0.5 * k), known, "a") == [k - 1]
        for download, more in (("suffix", 0), ("full", 4 * 8 * (16 - ranks))):
            method = LEGEND(download=download)
            begin = method.begin(spec, 3, 0)
            frames = float(sum(map(len, travel(spec, begin, method._suffix(begin, k)))))
            assert frames == pytest.approx(2 * (EMPTY + 16 + 4 * 8 * ranks) + more, abs=2 * 6)  # and which these are
            aware = knowing(begin, {"a": (1.0, 0.5, 0.0, 0.0)})
            need = float(cost.peak_memory(spec, state.adapter, method._suffix(begin, k), load))
            assert planned(method, aware, "a", memory_bytes=need + 1, load=load) == [k]
            assert planned(method, aware, "a", memory_bytes=need - 1, load=load) == [k - 1]
            assert planned(replace(method, max_bytes=frames), aware, "a") == [k]
            assert planned(replace(method, max_bytes=frames - 1), aware, "a") == [k - 1]
    # the other's plan is not touched by one that sits out; an unknown speed is no cap; depth "full" keeps to caps
    plans = LEGEND().plan(known, {"a": Device("a", 4, memory_bytes=10.0), "b": Device("b", 4)}, 0)
    assert (plans["a"], depth_of(plans["b"])) == (None, 4)
    assert planned(LEGEND(max_seconds=1e-9), state, "a") == [1]
    assert planned(LEGEND(max_seconds=5.0, depth="full"), known, "a") == [2]
    assert planned(LEGEND(depth="full"), state, "a", memory_bytes=10.0) == [0]
    for depth in ("adaptive", "full"):
        assert planned(LEGEND(depth=depth, min_depth=3, max_seconds=5.0), known, "a") == [0]
    assert planned(LEGEND(min_depth=3), state, "a") == [3]


# ---- whole rounds


def clocked(speeds: Mapping[str, float]) -> Any:
    """Sites whose training reports the modelled seconds of machines this much slower than one second per block."""

    def alter(site: Site) -> Site:
        def fit(job: Job, observe: Any = None) -> Update:
            blocks, speed = {name.split(".")[2] for name in job.plan.train}, speeds[job.device.id]
            return replace(
                found := site.fit(job),
                metrics={**found.metrics, **timed(found, 3 * speed, len(blocks) * speed, 0, 0).metrics},
            )

        return replace(toy.unmodelled(site), fit=fit)

    return alter


def test_clients_go_as_deep_as_their_rounds_allow(tmp_path):
    """Three blocks take 3 s forward and k s back, times 1, 1, 1.4, 2: the slowest needs 8 s for one block.

    Within 8 s the fast ones do all three (6 s), the third one two (4.2 + 2.8 = 7 s; 8.4 s for three).
    """
    speeds = {"c0": 1.0, "c1": 1.0, "c2": 1.4, "c3": 2.0}
    f = toy.federation(LEGEND(slack=0.0), tmp_path / "run", rounds=3, alter=clocked(speeds))
    events = f.play()
    up = {(e["round"], e["client"]): e["adapter_bytes_up"] for e in events["client"]}
    sigma = 4 * float(f.begin.arrays["sigma"])
    assert [up[1, c] / sigma for c in toy.CLIENTS] == [6, 6, 6, 6]  # of no one anything is known
    for round in (2, 3):
        assert [up[round, c] / sigma for c in toy.CLIENTS] == [12, 12, 10, 6]
    rows = [(r["lowest_depth"], r["mean_depth"], r["highest_depth"]) for r in events["round"]]
    assert rows == [(1, 1, 1), (1, 2.25, 3), (1, 2.25, 3)]
    assert [r["estimated_deadline_seconds"] for r in events["round"]] == pytest.approx([8, 8, 8])


def test_depths_differ_and_change_and_a_resumed_run_knows_why(tmp_path):
    """The toy devices differ in speed, and change their power mode from round to round."""
    f, left = toy.federation(LEGEND(), tmp_path / "run", rounds=4), tmp_path / "left"

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "cohort" and event["round"] == 3:
            shutil.copytree(f.store.path, left)

    events = f.play(watch=stop)
    by_units = {round(4 * float(f.begin.arrays["sigma"]) * u): k for k, u in enumerate(f.begin.arrays["units"], 1)}
    found = {(e["round"], e["client"]): by_units[e["adapter_bytes_up"]] for e in events["client"]}
    assert set(found.values()) == {1, 2, 3}
    for row in events["round"]:
        mine = [depth for (round, _), depth in found.items() if round == row["round"]]
        assert (min(mine), np.mean(mine), max(mine)) == tuple(row[f"{n}_depth"] for n in ("lowest", "mean", "highest"))
        assert min(mine) < max(mine)
    by_client = {c: [found[t, c] for t in range(1, 5)] for c in toy.CLIENTS}
    assert any(len(set(depths)) > 1 for depths in by_client.values())
    again = toy.federation(LEGEND(), left, rounds=4)
    stopped = again.last
    capacities = {f"capacity/{client}" for client in toy.CLIENTS}
    assert stopped.round == 2
    assert capacities <= stopped.arrays.keys()
    again.play(stopped)
    assert toy.equal(again.last, f.last)
    forgetful = replace(stopped, arrays={n: a for n, a in stopped.arrays.items() if n not in capacities})
    plans = [LEGEND().plan(state, f.server.engine.fleet(), 0) for state in (stopped, forgetful)]
    known, promised = ({c: len(plan.train) // 6 for c, plan in found.items()} for found in plans)
    assert known == {c: found[3, c] for c in toy.CLIENTS} != promised


def test_full_download_mounts_the_lower_blocks_frozen(tmp_path):
    method = LEGEND(download="full")
    seen: list[Job] = []

    def note(site: Site) -> Site:
        return replace(toy.unmodelled(site), fit=lambda job, observe=None: (seen.append(job), site.fit(job))[1])

    f = toy.federation(method, tmp_path / "run", rounds=2, alter=note)
    rows = f.play()["client"]
    sigma = 4 * float(f.begin.arrays["sigma"])
    assert {(e["adapter_bytes_down"] / sigma, e["adapter_bytes_up"] / sigma) for e in rows} == {(12, 6)}
    assert all(job.adapter.components == f.begin.adapter.components for job in seen)
    lower = [n for n in f.begin.adapter.blocks if "layer.2" not in n]
    assert all(np.array_equal(f.last.adapter.blocks[n].A, f.begin.adapter.blocks[n].A) for n in lower)


def test_full_depth_and_uniform_ranks_are_fedavg_to_the_bit(tmp_path):
    ours = toy.federation(LEGEND(depth="full", ranks="uniform"), tmp_path / "ours", cohort=3)
    theirs = toy.federation(FedAvg(), tmp_path / "theirs", cohort=3)
    ours.play(), theirs.play()
    assert toy.same(ours.begin.adapter, theirs.begin.adapter)
    assert toy.same(ours.last.adapter, theirs.last.adapter)
    assert not toy.same(ours.last.adapter, ours.begin.adapter)
    one, two = (method.begin(toy.encoder().spec, 3, 1).adapter for method in (LEGEND(ranks="uniform"), FedAvg()))
    assert toy.same(one, two)


@pytest.mark.parametrize(
    ("ranks", "found"), [("increasing", [2, 4, 6]), ("uniform", [4, 4, 4]), ("decreasing", [6, 4, 2])]
)
def test_rank_orders_spend_the_same_budget(ranks, found):
    adapter = LEGEND(ranks=ranks).begin(model(layers=3, rank=4), 3, 0).adapter
    assert [adapter.blocks[f"{at}.v"].rank for at in range(3)] == found


def test_blocks_without_adapters_are_no_layers():
    """Adapters in blocks 1 and 3 of 0..3: two layers, of which the last is block 3."""
    spec = replace(model(layers=4), modules=tuple(m for m in model(layers=4).modules if m.block in (1, 3)))
    method = LEGEND()
    state = method.begin(spec, 3, 0)
    assert state.adapter.blocks["1.q"].rank + state.adapter.blocks["3.q"].rank == 16
    assert set(method._suffix(state, 1).train) == {"3.q", "3.v"}
    np.testing.assert_allclose(state.arrays["flops"], 2 * np.array(cost.block_flops(spec)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"least": 0}, "least"), ({"min_depth": 0}, "min_depth"), ({"slack": -0.1}, "slack"),
        ({"slack": float("nan")}, "slack"),
        ({"quantile": 1.1}, "quantile"), ({"smoothing": 1.0}, "smoothing"), ({"max_bytes": 0.0}, "max_bytes"),
        ({"max_seconds": -1.0}, "max_seconds"), ({"depth": "deep"}, "depth"), ({"ranks": "random"}, "ranks"),
        ({"download": "none"}, "download"), ({"weights": "norm"}, "weights"), ({"bugdet": 3}, "budget"),
    ],
)  # fmt: skip
def test_a_bad_hyper_parameter_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        methods.build({"name": "legend", **settings})


def test_settings_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match=r"budget=11 .* 12 adapted blocks"):
        LEGEND(budget=11).begin(model(), 3, 0)
    with pytest.raises(ValueError, match=r"min_depth=13 .* 12 adapted blocks"):
        LEGEND(min_depth=13).begin(model(), 3, 0)
    assert LEGEND(budget=12, min_depth=12).begin(model(), 3, 0).adapter.components == 24
