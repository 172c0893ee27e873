"""Frames: what is written is read back, costs what was predicted, and anything else is refused."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import fedrank
from fedrank import cost
from fedrank.adapter import Adapter, Block
from fedrank.frame import CHECKSUM, DTYPES, EXACT, HEADER, MAX_HEADER, Refused, decode, encode, sizes, unpack
from fedrank.methods.fedara import FedARA
from fedrank.protocol import Device, Plan, State, Update, rng
from fedrank.selection import everything
from fedrank.wire import Reply, Request, Wire
from toy import arrays, drawn, forced, same, sealed, small

SPEC = small({"0.m": (5, 3), "1.m": (4, 6), "2.m": (3, 3)}, rank=4)
LOW = ("f16", "bf16", "int8")
STEP = {"f16": 2.0**-10, "bf16": 2.0**-7}  # the largest distance of two neighbours, relative to the value


def model(seed: int, form: str = "svd") -> Adapter:
    """Nothing is zero, the head neither; LoRA's form has no e."""
    adapter = drawn(SPEC, seed)
    if form == "lora":
        adapter = Adapter({n: Block(b.ids, b.B, None, b.A) for n, b in adapter.blocks.items()}, 2.0, {})
    head = rng(seed, "head").normal(size=(2, 3)).astype(np.float32)
    return replace(adapter, dense={"head.weight": head, "head.bias": head[:, 0].copy()})


def moved(adapter: Adapter, seed: int, by: float = 0.1) -> Adapter:
    """The adapter after a small random change."""
    change = model(seed)

    def add(a: np.ndarray | None, b: np.ndarray) -> np.ndarray | None:
        return None if a is None else (a + by * b).astype(np.float32)

    delta = change.take(adapter.ids).blocks
    blocks = {
        n: Block(b.ids, *(add(getattr(b, f), getattr(delta[n], f)) for f in "BeA")) for n, b in adapter.blocks.items()
    }
    return Adapter(blocks, 2.0, {n: add(t, change.dense[n]) for n, t in adapter.dense.items()})


def wire(dtype: str = "f32", form: str = "svd", **changes: Any) -> Wire:
    return replace(Wire(SPEC, model(0, form), dtype, "run", 7, {"threads": 1}), **changes)


STATE = State(3, 10, moved(model(0), 1))
PLAN = Plan(everything(STATE.adapter), arrays={"budget": np.array(5)}, returns={"keep": ("uint8", (2,))})
KEEP = {"keep": np.array([1, 2], np.uint8)}


def exchange(
    ends: Wire, plan: Plan, state: State, update: Update | None = None
) -> tuple[bytes, Request, Update, bytes, Reply]:
    """One train request and its answer: the frame down, what the client reads, its update, the frame up, what is read."""
    down = ends.request("train", "c0", plan, state)
    request = ends.open_request(down)
    if update is None:
        update = Update(moved(request.adapter.take(plan.train), 2, 0.01), 12, {"loss": 0.5})
    up = ends.update(request, update)
    reply = ends.open_reply(up, "train", state.round + 1, "c0", plan, request.adapter)
    return down, request, update, up, reply


def altered(frame: bytes, meta: Mapping[str, Any] = {}, drop: str = "", **tensors: np.ndarray) -> bytes:
    """The frame with other facts and tensors, sealed again."""
    facts, found = unpack(frame)
    found.pop(drop, None)
    return forced({**facts, **meta}, {**found, **tensors})


def forged(header: str, body: bytes = b"") -> bytes:
    """A frame of any header at all."""
    text = header.encode()
    size = HEADER * math.ceil((8 + len(text)) / HEADER) - 8
    return sealed(struct.pack("<Q", size) + text.ljust(size) + body + bytes(CHECKSUM))


def placed(*places: tuple[int, int]) -> bytes:
    """A frame of float32[2] tensors a, b, ... that says they lie at these places, and its checksum after the last."""
    entries: dict[str, Any] = {"__metadata__": {"fedrank": "{}"}}
    entries |= {n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in zip("ab", places, strict=True)}
    end = max(end for _, end in places)
    entries["checksum"] = {"dtype": "U64", "shape": [1], "data_offsets": [end, end + CHECKSUM]}
    return forged(json.dumps(entries), bytes(end))


# ---- round trips


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Any plan of the modules, subsets of components, factors, arrays and a selection."""
    ids = st.sets(st.integers(0, 3))
    train, frozen = {}, {}
    for name in SPEC.shapes:
        if chosen := draw(ids):
            train[name] = np.array(sorted(chosen))
        if rest := draw(ids) - chosen:
            frozen[name] = np.array(sorted(rest))
    letters = st.sets(st.sampled_from("BeAh")).map("".join)
    back = {"keep": ("uint8", (3,)), "score": ("float64", ()), "none": ("int32", (0, 2))}
    there = {"budget": np.array(7), "votes": np.array([[0.5, 1.5]], np.float32), "mask": np.array([True, False])}
    count = sum(map(len, train.values()))
    return {
        "train": train, "frozen": frozen, "up": draw(letters), "down": draw(letters), "own": draw(letters),
        "since": draw(st.integers(-1, 3)), "select": draw(st.none() | st.integers(0, count)),
        "arrays": {n: there[n] for n in draw(st.sets(st.sampled_from(sorted(there))))},
        "returns": {n: back[n] for n in draw(st.sets(st.sampled_from(sorted(back))))},
    }  # fmt: skip


@pytest.mark.parametrize("form", ["svd", "lora"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_plan_travels_and_costs_what_was_predicted(dtype: str, form: str, data: st.DataObject) -> None:
    """The plan arrives whole, each end reads exactly the components and factors of the plan, and both frames
    have the bytes that `cost` says, whatever the dtype, the form, the selection and the arrays."""
    plan = Plan(**data.draw(plans()))
    state = State(3, 10, moved(model(0, form), 1))
    ends = wire(dtype, form)
    update_ids = plan.train
    if plan.select is not None:
        pairs = [(name, i) for name, ids in plan.train.items() for i in ids.tolist()]
        chosen = data.draw(st.permutations(pairs))[: plan.select]
        update_ids = {n: np.array(sorted(i for m, i in chosen if m == n), int) for n in plan.train}
    back = {name: np.zeros(shape, kind) for name, (kind, shape) in plan.returns.items()}
    trained = Update(moved(state.adapter.take(update_ids), 2), 3, {"loss": 1.0}, back)
    down, request, _, up, reply = exchange(ends, plan, state, trained)

    told = request.plan
    assert [told.learn, told.up, told.down, told.own, told.select, told.since] == [
        plan.learn, plan.up, plan.down, plan.own, plan.select, plan.since,
    ]  # fmt: skip
    assert told.returns == plan.returns
    for ours, theirs in ((plan.train, told.train), (plan.frozen, told.frozen), (plan.arrays, told.arrays)):
        assert {n: a.tolist() for n, a in ours.items()} == {n: a.tolist() for n, a in theirs.items()}
        assert all(theirs[n].shape == a.shape for n, a in ours.items())
    assert (request.round, request.rounds, request.client, request.adapter.scale) == (4, 10, "c0", 2.0)

    present = {n: np.union1d(plan.train.get(n, []), plan.frozen.get(n, [])).astype(int) for n in SPEC.shapes}
    for got, want in (
        (request.adapter, state.adapter.take(present).only(plan.sent)),
        (reply.update.adapter, trained.adapter.only(plan.up)),
    ):
        found, expected = arrays(got), arrays(want)
        assert found.keys() == expected.keys()
        assert all(found[name].shape == array.shape for name, array in expected.items())
        if dtype in EXACT:
            assert all(found[name].tobytes() == a.astype(found[name].dtype).tobytes() for name, a in expected.items())
    assert reply.update.arrays.keys() == plan.returns.keys()
    assert (reply.update.examples, reply.metrics) == (3, {"loss": 1.0})

    assert astuple(sizes(down)) == astuple(cost.down(state.adapter, plan, 3, dtype))
    assert astuple(sizes(up)) == astuple(cost.up(trained.adapter, plan, 3, dtype)) == astuple(reply.sizes)
    assert len(down) == sizes(down).frame


def test_f64_and_f32_are_exact() -> None:
    """In f64 also for values that f32 has not."""
    value = np.array([0.1, 1 / 3, 1e-300], np.float64)
    assert encode("e", value, np.array([3]), "f64", rng(0))["e"].tobytes() == value.tobytes()
    ends = wire("f32")
    _, request, update, _, reply = exchange(ends, replace(PLAN, returns={}), STATE)
    assert same(request.adapter, STATE.adapter)
    assert same(reply.update.adapter, update.adapter)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("form", "down"), [("svd", "BeAh"), ("lora", "BeAh"), ("svd", "Beh"), ("lora", "A")])
def test_low_precision_is_within_one_step_of_the_difference(dtype: str, form: str, down: str) -> None:
    """Down: of the difference to the start; up: to what was received, or to the start where it did not travel.
    A step is of the difference, not of the value."""
    state = State(3, 10, moved(model(0, form), 1))
    ends, plan = wire(dtype, form), Plan(everything(state.adapter), down=down, since=2)
    _, request, update, _, reply = exchange(ends, plan, state, Update(moved(state.adapter, 2, 0.01), 12))
    for got, want, held in (
        (request.adapter, state.adapter.only(down), ends.start),
        (reply.update.adapter, update.adapter, request.adapter.fill(ends.start)),
    ):
        for name, array in arrays(want).items():
            value, found, base = array.astype(float), arrays(got)[name].astype(float), arrays(held)[name].astype(float)
            change = value - base
            step = STEP[dtype] * np.abs(change) + 2.0**-24 if dtype != "int8" else np.abs(change).max() / 127
            slack = 1e-6 * (np.abs(value) + np.abs(change))
            assert (np.abs(found - value) <= step + slack).all(), name
            assert not name.endswith("/B") or (found != value).any()  # something was rounded


@pytest.mark.parametrize("dtype", LOW)
def test_what_did_not_change_costs_no_precision(dtype: str) -> None:
    """The frame holds differences: all zero where client and server hold the same."""
    ends, state = wire(dtype), State(0, 10, model(0))
    plan = Plan(everything(state.adapter))
    down, request, _, up, reply = exchange(ends, plan, state, Update(state.adapter, 1))
    assert same(request.adapter, state.adapter)
    assert same(reply.update.adapter, state.adapter)
    for frame in (down, up):
        assert not any(tensor.any() for name, tensor in unpack(frame)[1].items() if not name.startswith("plan"))


@pytest.mark.parametrize("dtype", LOW)
def test_a_frame_has_the_same_bits_each_time_it_is_written(dtype: str) -> None:
    """Rounding is addressed by round and client: the server can write a frame again and know what was received."""
    ends = wire(dtype)
    frame = ends.request("train", "c0", PLAN, STATE)
    assert frame == ends.request("train", "c0", PLAN, STATE)
    bodies = [
        unpack(ends.request("train", c, PLAN, replace(STATE, round=r)))[1]["B"]
        for c, r in (("c0", 3), ("c1", 3), ("c0", 4))
    ]
    assert len({body.tobytes() for body in bodies}) == 3


# ---- rounding


@pytest.mark.parametrize(("dtype", "value"), [("f16", 0.3001), ("f16", -1e-7), ("bf16", 0.3), ("bf16", -1.003), ("int8", 0.3), ("int8", -0.001)])  # fmt: skip
def test_rounding_is_right_on_average(dtype: str, value: float) -> None:
    """The mean of many roundings is the value, within five standard errors; each is one of two neighbours."""
    count = 40_000
    row = np.tile(np.array([1, value], np.float32), count)  # the 1 gives int8 its scale: a step of 1/127
    lengths = np.full(count, 2)
    found = decode("e", encode("e", row, lengths, dtype, rng(0, dtype)), lengths, dtype)[1::2].astype(float)
    assert len(np.unique(found)) == 2
    assert abs(found.mean() - float(np.float32(value))) < 5 * found.std() / math.sqrt(count)


def test_updates_far_below_a_step_survive_in_the_mean() -> None:
    """A thousandth of an int8 step: rounding to nearest would lose it in every single frame."""
    count, step = 200_000, 1 / 127
    row, lengths = np.tile(np.array([1, step / 1000], np.float32), count), np.full(count, 2)
    found = decode("e", encode("e", row, lengths, "int8", rng(1)), lengths, "int8")[1::2].astype(float)
    assert np.rint(row[1] / step) == 0
    assert found.mean() == pytest.approx(step / 1000, rel=5 / math.sqrt(count / 1000))


def test_roundings_of_different_clients_average_out() -> None:
    """The mean over 100 clients' frames is five times closer to the state than one frame."""
    ends, plan = wire("int8"), Plan(everything(STATE.adapter))
    found = [
        ends.open_request(ends.request("train", f"c{at}", plan, STATE)).adapter.blocks["1.m"].A for at in range(100)
    ]
    want = STATE.adapter.blocks["1.m"].A
    one, mean = (np.abs(a - want).mean() for a in (found[0], np.mean(found, axis=0, dtype=float)))
    assert mean < one / 5


@pytest.mark.parametrize("dtype", LOW)
def test_the_largest_values_stay_finite(dtype: str) -> None:
    """Nothing rounds up to infinity, and what the dtype cannot hold becomes the largest that it can."""
    largest = {"f16": 65504.0, "bf16": float.fromhex("0x1.FEp127"), "int8": float(np.finfo(np.float32).max)}[dtype]
    values = np.array([1, -1, 0.9999, -0.9999, 0.99, 1.001, -1.001], float) * largest
    values = np.tile(np.clip(values, -3.4e38, 3.4e38).astype(np.float32), 200)
    lengths = np.full(200, 7)
    found = decode("e", encode("e", values, lengths, dtype, rng(0)), lengths, dtype)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, np.clip(values, -largest, largest), rtol=1 / 100)


def test_values_beyond_the_adapters_type_are_refused() -> None:
    """float64 can carry what the float32 state cannot hold."""
    ends = wire("f64")
    plan = Plan(everything(STATE.adapter))
    request = ends.open_request(ends.request("train", "c0", plan, STATE))
    block = STATE.adapter.blocks["1.m"]
    wide = replace(block, e=np.array([1, 1e300, 1, 1]))
    frame = ends.update(request, Update(Adapter({**STATE.adapter.blocks, "1.m": wide}, 2.0, STATE.adapter.dense), 1))
    with pytest.raises(Refused, match="'e' decodes to NaN or infinity"):
        ends.open_reply(frame, "train", 4, "c0", plan, request.adapter)


def test_an_update_of_other_components_is_not_written() -> None:
    """As many, but others: the server would take them for the planned ones."""
    plan = Plan({"1.m": np.array([0, 2])})
    ends = wire()
    request = ends.open_request(ends.request("train", "c0", plan, STATE))
    other = STATE.adapter.take({"1.m": np.array([0, 1])})
    with pytest.raises(ValueError, match="other components than the plan trains"):
        ends.update(request, Update(other, 1))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_client_says_so(dtype: str, bad: float) -> None:
    """An infinity is not clipped into something that looks like an update."""
    ends = wire(dtype)
    request = ends.open_request(ends.request("train", "c0", Plan(everything(STATE.adapter)), STATE))
    block = STATE.adapter.blocks["1.m"]
    wrong = replace(block, e=np.array([1, bad, 1, 1], np.float32))
    with pytest.raises(ValueError, match="'e' holds NaN or infinity"):
        ends.update(request, Update(Adapter({**STATE.adapter.blocks, "1.m": wrong}, 2.0, STATE.adapter.dense), 1))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_rows_of_zeros(dtype: str) -> None:
    found = encode("e", np.zeros(6, np.float32), np.array([2, 4]), dtype, rng(0))
    assert not decode("e", found, np.array([2, 4]), dtype).any()


# ---- bytes


@pytest.mark.parametrize(("dtype", "q"), [("f64", 8), ("f32", 4), ("f16", 2), ("bf16", 2)])
@pytest.mark.parametrize(("form", "more"), [("svd", 1), ("lora", 0)])
def test_the_payload_is_the_formula_to_the_byte(dtype: str, q: int, form: str, more: int) -> None:
    """q * (out + 1 + in) per component in SVD form, q * (out + in) in LoRA's; the head apart."""
    state = State(3, 10, moved(model(0, form), 1).take({"0.m": np.array([1]), "2.m": np.array([0, 1, 3])}))
    down, _, _, up, _ = exchange(wire(dtype, form), Plan(everything(state.adapter)), state)
    expected = q * (1 * (5 + more + 3) + 3 * (3 + more + 3))
    for frame in (down, up):
        assert (sizes(frame).adapter, sizes(frame).head) == (expected, q * (6 + 2))


def test_int8_pays_its_scales() -> None:
    """One byte a number and an f32 scale per vector; e has one per module, the head one per row."""
    state = State(3, 10, STATE.adapter.take({"0.m": np.array([1]), "2.m": np.array([0, 1, 3])}))
    down, _, _, up, _ = exchange(wire("int8"), Plan(everything(state.adapter)), state)
    expected = 1 * (5 + 1 + 3) + 3 * (3 + 1 + 3) + 4 * (2 * 4 + 2)
    assert sizes(down).adapter == sizes(up).adapter == expected
    assert sizes(down).head == (6 + 2) + 4 * (2 + 1)


def test_fedara_pays_what_its_formula_says() -> None:
    """U = q (sum R p + H) + ceil(|G| / 8) in allocation rounds, without the mask outside them; D has no such mask."""
    method = FedARA(target_rank=1, warmup=0.1, settle=0.3)
    state = replace(
        method.begin(SPEC, 10, 0), adapter=STATE.adapter.without({"1.m": np.arange(4), "2.m": np.array([2])})
    )
    values = 4 * (4 * (5 + 1 + 3) + 3 * (3 + 1 + 3) + (6 + 2))
    for round, mask in ((0, 0), (4, math.ceil(7 / 8)), (8, 0)):
        now = replace(state, round=round)
        plan = method.plan(now, {"c0": Device("c0", 1)}, 0)["c0"]
        back = {name: np.zeros(shape, kind) for name, (kind, shape) in plan.returns.items()}
        down, _, _, up, _ = exchange(wire(), plan, now, Update(now.adapter, 1, {}, back))
        assert len(up) == values + mask + HEADER + CHECKSUM
        ids, budget = math.ceil(3 * 4 / 8), 8 if mask else 0
        assert len(down) == values + ids + budget + HEADER + CHECKSUM


def test_a_plan_of_nothing() -> None:
    """No module at all: only the head travels, and nothing for the ids."""
    plan = Plan({})
    down, request, _, up, reply = exchange(wire(), plan, STATE, Update(Adapter({}, 2.0, STATE.adapter.dense), 1))
    assert (request.adapter.components, reply.update.adapter.components) == (0, 0)
    assert sizes(down).adapter == sizes(up).adapter == 0
    assert len(down) == len(up) == HEADER + CHECKSUM + sizes(up).head


def test_private_state_has_no_place_on_the_wire() -> None:
    ends = wire()
    request = ends.open_request(ends.request("train", "c0", PLAN, STATE))
    secret = np.frombuffer(b"only for this client", np.uint8)
    frame = ends.update(request, Update(STATE.adapter, 1, {}, KEEP, private={"diary": secret}))
    assert frame == ends.update(request, Update(STATE.adapter, 1, {}, KEEP))
    assert b"diary" not in frame
    assert secret.tobytes() not in frame


def test_frames_are_safetensors_files(tmp_path: Path) -> None:
    down, _, _, up, _ = exchange(wire(), PLAN, STATE, Update(STATE.adapter, 1, {}, KEEP))
    for name, frame in (("down", down), ("up", up)):
        (tmp_path / name).write_bytes(frame)
        with safe_open(tmp_path / name, "np") as file:
            assert {"B", "e", "A", "h.head.weight", "h.head.bias", "checksum"} < set(file.keys())
            assert json.loads(file.metadata()["fedrank"])["run"] == "run"
            assert file.get_tensor("checksum").tobytes() == xxhash.xxh3_64_digest(frame[:-CHECKSUM])


# ---- frames that are refused


def reading(frame: bytes, kind: str = "train", plan: Plan = PLAN, **changes: Any) -> Reply:
    """The server reads a client's answer."""
    ends = wire(**changes)
    return ends.open_reply(frame, kind, 4, "c0", plan, STATE.adapter)


def answer(plan: Plan = PLAN, adapter: Adapter = STATE.adapter, **changes: Any) -> bytes:
    ends = wire(**changes)
    request = ends.open_request(ends.request("train", "c0", plan, STATE))
    back = KEEP if "keep" in plan.returns else {}
    return ends.update(request, Update(adapter, 12, {"loss": 0.5}, back))


ASK = wire().request("train", "c0", PLAN, STATE)
ANSWER = answer()


def test_the_frames_that_are_spoilt_below_are_good() -> None:
    assert wire().open_request(altered(ASK)).client == "c0"
    assert reading(altered(ANSWER)).update.examples == 12
    assert wire().open_request(sealed(ASK)).round == 4


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (b"", "too short"),
        (ASK[:2000], "too short"),
        (ASK[:-1], "checksum"),
        (ASK + b"\0", "checksum"),
        (bytes([ASK[0] ^ 1]) + ASK[1:], "checksum"),
        (sealed(struct.pack("<Q", 2 << 30) + ASK[8:]), "a header of 2147483648 bytes is over the limit"),
        (sealed(struct.pack("<Q", MAX_HEADER + 1) + ASK[8:] + bytes(2 * MAX_HEADER)), "over the limit"),
        (sealed(struct.pack("<Q", 5) + ASK[8:]), "not a frame"),
        (sealed(ASK[:-100]), "not a frame"),  # the header names more than there is
        (sealed(ASK + bytes(100)), "not a frame"),  # and less
        (forged("{}"), "not a frame"),
        (forged("[1]"), "not a frame"),
        (forged('{"__metadata__": {"fedrank": "1"}, "checksum": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}'), "schema version None"),
        (forged("[" * 100_000), "RecursionError"),
        (forged(json.dumps({"__metadata__": {"fedrank": "[" * 100_000}})), "RecursionError"),
        (forged('{"__metadata__": {"fedrank": "{}"}, "B": {"dtype": "F32", "shape": [1099511627776, 4096], "data_offsets": [0, 4]}}'), "not a frame"),
        (forged('{"__metadata__": {"fedrank": "{}"}, "B": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), "not a frame"),
        (forged('{"__metadata__": {"fedrank": "{}"}, "B": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'), "not a frame"),
        (forged('{"__metadata__": {"fedrank": "{}"}, "__metadata__": {"fedrank": "{}"}, "B": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}'), "a key comes twice"),
        *((placed(*places), why) for places, why in [
            (((0, 8), (0, 8)), "'b' of float32.2. does not lie at"),  # one on top of the other
            (((8, 16), (0, 8)), "'a' of float32.2. does not lie at"),  # in another order than named
            (((0, 8), (12, 20)), "'b' of float32.2. does not lie at"),  # a gap
            (((0, 4), (4, 12)), "'a' of float32.2. does not lie at"),  # less than its shape
            (((0, 8), (8, 16)), "schema version None"),  # as it should be, but for the rest
        ]),
        *((altered(ASK, {"schema": n}), f"schema version {n}, this fedrank {fedrank.__version__} speaks 1 to 2") for n in (0, 3)),
        (altered(ASK, {"schema": None}), "schema version None"),
    ],
)  # fmt: skip
def test_no_frame_at_all(spoilt: bytes, why: str) -> None:
    """Refused by both ends, before anything of it is used."""
    with pytest.raises(Refused, match=why):
        wire().open_request(spoilt)
    with pytest.raises(Refused, match=why):
        reading(spoilt)


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"run": "other"}, "of run 'other' came to run 'run'"),
        ({"kind": "update"}, "a 'update' frame"),
        ({"kind": "evaluate"}, "digest"),
        ({"round": 5}, "digest"),
        ({"client": "c1"}, "digest"),
        ({"digest": "0" * 16}, "digest"),
        ({"fingerprint": "other weights"}, "base model other weights is not this client's small"),
        ({"round": math.inf}, "'round' must be of type int, got inf"),
        ({"round": True}, "'round' must be of type int"),
        ({"rounds": "10"}, "'rounds' must be of type int"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"scale": None}, "'scale' must be of type float"),
        ({"numerics": []}, "'numerics' must be of type dict"),
        ({"plan": None}, "'plan' must be of type dict"),
    ],
)
def test_a_request_of_something_else(meta: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        wire().open_request(altered(ASK, meta))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("width", 0, "do not fit"),
        ("width", 1 << 40, "do not fit"),
        ("width", -4, "do not fit"),
        ("width", 4.0, "'width' must be"),
        ("learn", 5, "'learn' must be"),
        ("since", 1.5, "'since' must be"),
        ("since", 2, "digest"),
        ("up", "B", "digest"),
        ("own", "h", "digest"),
        ("select", "all", "'select' must be"),
        ("select", 3, "digest"),
        ("returns", [], "'returns' must be"),
        ("returns", {}, "digest"),
        ("returns", {"keep": ["uint8", [2.0]]}, "array 'keep' must come back as"),
        ("returns", {"keep": "uint8"}, "array 'keep' must come back as"),
        ("passes", [1.0], "two finite numbers"),
        ("passes", [1.0, -1.0], "two finite numbers"),
        ("passes", [1.0, 1], "two finite numbers"),
        ("passes", [1.0, 2.0], "digest"),
    ],
)
def test_a_request_with_another_plan(field: str, value: Any, why: str) -> None:
    told = unpack(ASK)[0]["plan"]
    with pytest.raises(Refused, match=why):
        wire().open_request(altered(ASK, {"plan": {**told, field: value}}))


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("plan.train", np.array([255, 7], np.uint8), "digest"),
        ("plan.train", np.array([255], np.uint8), "do not fit"),
        ("plan.train", np.array([255, 15], np.int32), "do not fit"),
        ("plan.frozen", np.array([255, 15], np.uint8), "planned to learn and to be frozen"),
        ("arrays.budget", np.array(6), "digest"),
        ("arrays.more", np.array(6), "digest"),
        ("B", np.zeros(48, np.float64), r"float64\[48\], asked for was float32\[48\]"),
        ("B", np.zeros((4, 12), np.float32), "asked for was"),
        ("e", np.zeros(11, np.float32), "asked for was"),
        ("h.head.weight", np.zeros((2, 3), np.float32), "asked for was"),
        ("h.other", np.zeros(2, np.float32), r"\['h.other'\] were not asked for"),
        ("A.scale", np.zeros(12, np.float32), r"\['A.scale'\] were not asked for"),
        ("ids", np.zeros(2, np.uint8), r"\['ids'\] were not asked for"),
        ("A", np.full(48, np.nan, np.float32), "'A' holds NaN"),
        ("arrays.budget", np.array(np.inf), "'arrays.budget' holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_belong_into_a_request(name: str, tensor: np.ndarray, why: str) -> None:
    with pytest.raises(Refused, match=why):
        wire().open_request(altered(ASK, **{name: tensor}))


@pytest.mark.parametrize("name", ["B", "e", "A", "h.head.weight", "plan.train", "arrays.budget"])
def test_tensors_that_a_request_lacks(name: str) -> None:
    with pytest.raises(Refused):
        wire().open_request(altered(ASK, drop=name))


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"run": "other"}, "an answer to run"),
        ({"round": 3}, "an answer to run"),
        ({"round": 5}, "an answer to run"),
        ({"client": "c1"}, "an answer to run"),
        ({"digest": "0" * 16}, "an answer to run"),
        ({"kind": "evaluation"}, "kind 'evaluation' where 'update' was asked for"),
        ({"kind": None}, "kind None"),
        ({"numerics": None}, "no numerics record"),
        *[
            ({"examples": n}, "examples must be a positive whole number")
            for n in (0, -1, 1.5, True, None, "9", 1 << 53)
        ],
        ({"metrics": {"loss": math.nan}}, "metric 'loss' must be a finite number"),
        ({"metrics": {"loss": -math.inf}}, "must be a finite number"),
        ({"metrics": {"loss": 10**400}}, "must be a finite number"),
        ({"metrics": {"loss": "low"}}, "must be a finite number"),
        ({"metrics": {"loss": True}}, "must be a finite number"),
        ({"metrics": {"accuracy": 1e30}}, "'accuracy' must be a finite number from 0 to 1"),
        ({"metrics": {"seconds": -1.0}}, "'seconds' must be a finite number from 0"),
        ({"round": 4.0}, "'round' must be of type int"),
        ({"schema": True}, "schema version True"),
        ({"kind": "error"}, "kind 'error' where 'update' was asked for"),
        ({"metrics": [1]}, "metrics must be a small object"),
        ({"metrics": {str(n): 1.0 for n in range(65)}}, "metrics must be a small object"),
    ],
)
def test_an_answer_to_something_else(meta: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        reading(altered(ANSWER, meta))


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("B", np.zeros(48, np.float16), "asked for was"),
        ("B", np.zeros(47, np.float32), "asked for was"),
        ("B", np.zeros(49, np.float32), "asked for was"),
        ("A", np.zeros((48, 1), np.float32), "asked for was"),
        ("e", np.array([np.inf] * 12, np.float32), "'e' holds NaN or infinity"),
        ("h.head.bias", np.zeros(3, np.float32), "asked for was"),
        ("h.other", np.zeros(2, np.float32), "were not asked for"),
        ("ids", np.array([255, 240], np.uint8), "were not asked for"),
        ("private.diary", np.zeros(2, np.float32), "were not asked for"),
        ("plan.train", np.array([255, 240], np.uint8), "were not asked for"),
        ("arrays.keep", np.zeros(2, np.int8), "came back, asked for were"),
        ("arrays.keep", np.zeros(3, np.uint8), "came back, asked for were"),
        ("arrays.keep", np.zeros((1, 2), np.uint8), "came back, asked for were"),
        ("arrays.more", np.zeros(2, np.uint8), "came back, asked for were"),
    ],
)
def test_tensors_that_do_not_belong_into_an_answer(name: str, tensor: np.ndarray, why: str) -> None:
    with pytest.raises(Refused, match=why):
        reading(altered(ANSWER, **{name: tensor}))


@pytest.mark.parametrize("name", ["B", "e", "A", "h.head.bias", "arrays.keep"])
def test_tensors_that_an_answer_lacks(name: str) -> None:
    with pytest.raises(Refused, match=r"missing|came back"):
        reading(altered(ANSWER, drop=name))


def test_factors_that_were_not_to_travel() -> None:
    """A client that was asked for B alone, and sends A too, is refused."""
    plan = replace(PLAN, up="B")
    frame = altered(ANSWER, {"digest": wire().digest("train", 4, "c0", plan)})
    with pytest.raises(Refused, match=r"\['A', 'e', 'h.head.bias', 'h.head.weight'\] were not asked for"):
        reading(frame, plan=plan)


def test_an_answer_in_another_dtype() -> None:
    """Neither an f64 client in an f32 run nor an f32 client in an int8 run."""
    with pytest.raises(Refused, match="asked for was"):
        reading(answer(dtype="f64"))
    with pytest.raises(Refused, match="asked for was"):
        reading(ANSWER, dtype="int8")


def test_an_answer_of_another_form() -> None:
    """The run is of plain LoRA, which has no e."""
    with pytest.raises(Refused, match=r"\['e'\] were not asked for"):
        reading(ANSWER, form="lora")


def test_int8_scales_must_be_there_and_sane() -> None:
    frame = answer(dtype="int8")
    with pytest.raises(Refused, match=r"'A.scale' is missing"):
        reading(altered(frame, drop="A.scale"), dtype="int8")
    with pytest.raises(Refused, match=r"'A.scale' holds NaN"):
        reading(altered(frame, **{"A.scale": np.full(12, np.nan, np.float32)}), dtype="int8")
    huge = {"A": np.full(48, 127, np.int8), "A.scale": np.full(12, 3e38, np.float32)}
    with pytest.raises(Refused, match="'A' decodes to NaN or infinity"):
        reading(altered(frame, **huge), dtype="int8")


# ---- a client's own choice of components


SELECT = replace(PLAN, train={"0.m": np.array([0, 2, 3]), "2.m": np.array([1])}, frozen={}, select=2, returns={})


def chosen(**ids: list[int]) -> Adapter:
    return STATE.adapter.take({f"{name[1]}.m": np.array(part) for name, part in ids.items()})


def test_a_client_may_choose_among_what_it_trained() -> None:
    for adapter in (chosen(m0=[0, 3]), chosen(m0=[2], m2=[1]), chosen(m2=[1])):
        assert same(reading(answer(SELECT, adapter), plan=SELECT).update.adapter, adapter)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ({"m0": [0, 1]}, r"\['0.m'\] not planned"),
        ({"m0": [0], "m1": [1]}, r"\['1.m'\] not planned"),
        ({"m0": [0, 2, 3]}, "3 components came back"),
    ],
)
def test_ids_that_were_never_asked_for(ids: dict[str, list[int]], why: str) -> None:
    with pytest.raises(Refused, match=why):
        reading(answer(SELECT, chosen(**ids)), plan=SELECT)


def test_a_choice_needs_its_ids() -> None:
    frame = answer(SELECT, chosen(m0=[0, 3]))
    with pytest.raises(Refused, match="ids of the chosen components are missing"):
        reading(altered(frame, drop="ids"), plan=SELECT)
    with pytest.raises(Refused, match="do not fit"):
        reading(altered(frame, ids=np.zeros(9, np.uint8)), plan=SELECT)
    other = unpack(answer(SELECT, chosen(m0=[2], m2=[1])))[1]["ids"]
    with pytest.raises(Refused, match="asked for was"):  # as many components, but of other sizes
        reading(altered(frame, ids=other), plan=SELECT)


# ---- evaluations and errors


def test_an_evaluation_carries_numbers_only() -> None:
    ends, plan = wire(), Plan({}, everything(STATE.adapter), learn="", up="")
    request = ends.open_request(ends.request("evaluate", "c0", plan, STATE))
    assert same(request.adapter, STATE.adapter)
    frame = ends.evaluation(request, {"accuracy": 0.5, "rows": 7})
    reply = reading(frame, "evaluate", plan)
    assert (reply.metrics, reply.update, reply.error) == ({"accuracy": 0.5, "rows": 7.0}, None, None)
    with pytest.raises(Refused, match=r"an evaluation carries no tensors, this one has \['B'\]"):
        reading(altered(frame, B=np.zeros(1, np.float32)), "evaluate", plan)
    with pytest.raises(Refused, match="an answer to run"):
        reading(frame, "train", plan)


def test_an_error_is_told_in_400_characters() -> None:
    request = wire().open_request(ASK)
    reply = reading(wire().error(request, "out of memory" + "!" * 1000))
    assert reply.update is None
    assert reply.error == ("out of memory" + "!" * 1000)[:400]
    with pytest.raises(Refused, match="an answer to run"):
        reading(wire().error(replace(request, round=3), "late"))


def test_the_digest_names_the_request() -> None:
    """Other ids, arrays, settings, round, client, kind or run: another digest. The order of modules: the same."""
    plan = Plan({"0.m": np.array([0, 1]), "1.m": np.array([0])}, arrays={"x": np.array([1])})
    digests = [
        wire().digest("train", 4, "c0", plan),
        wire(run="other").digest("train", 4, "c0", plan),
        wire().digest("evaluate", 4, "c0", plan),
        wire().digest("train", 5, "c0", plan),
        wire().digest("train", 4, "c1", plan),
        *(
            wire().digest("train", 4, "c0", replace(plan, **change))
            for change in (
                {"train": {"0.m": np.array([0, 1])}}, {"train": {}, "frozen": plan.train}, {"frozen": {"2.m": np.array([0])}},
                {"arrays": {"x": np.array([2])}}, {"arrays": {"x": np.array([1], np.int32)}}, {"arrays": {"y": np.array([1])}},
                {"up": "B"}, {"down": "B"}, {"own": "B"}, {"learn": "B"}, {"select": 2}, {"since": 0}, {"returns": {"x": ("uint8", ())}},
            )
        ),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert wire().digest("train", 4, "c0", replace(plan, train=dict(reversed(plan.train.items())))) == digests[0]
