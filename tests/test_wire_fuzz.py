"""Readers of frames against noise: whatever comes in, it is read as what was asked for, or Refused."""

import json
import math
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrank.frame import CHECKSUM, Refused, pack, unpack
from fedrank.protocol import Plan, State, Update
from fedrank.selection import everything
from fedrank.wire import Reply, Request, Wire
from toy import arrays, drawn, sealed, small

SPEC = small({"0.m": (5, 3), "1.m": (4, 6)}, rank=3)
STATE = State(1, 5, drawn(SPEC, 1))
PLAN = Plan(
    {**everything(STATE.adapter), "1.m": np.array([0, 2])}, {"1.m": np.array([1])},
    arrays={"budget": np.array(3)}, returns={"keep": ("uint8", (1,))},
)  # fmt: skip
CHOOSING = Plan(everything(STATE.adapter), select=4)
NASTY: list[Any] = [
    None, True, -1, 0, 1.5, 10**400, math.inf, math.nan, "", "x", "\0", "f32", [], [[]], {}, {"x": 1}, 1 << 62, "B" * 5000,
]  # fmt: skip
ROUNDS = 1000  # of each of the four frames: 2,000 each way


def wire(dtype: str) -> Wire:
    return Wire(SPEC, drawn(SPEC, 0), dtype, "run", 7, {"threads": 1})


def request(dtype: str, plan: Plan) -> bytes:
    return wire(dtype).request("train", "c0", plan, STATE)


def answer(dtype: str, plan: Plan) -> bytes:
    told = wire(dtype).open_request(request(dtype, plan))
    adapter = STATE.adapter.take(
        plan.train if plan.select is None else {"0.m": np.array([0, 1, 2]), "1.m": np.array([2])}
    )
    back = {"keep": np.array([128], np.uint8)} if plan.returns else {}
    return wire(dtype).update(told, Update(adapter, 9, {"loss": 0.5}, back))


def read_request(frame: bytes, dtype: str, plan: Plan) -> Request:
    """On the client. What is read is the plan that was sent, with all its components, and finite."""
    found = wire(dtype).open_request(frame)
    assert found.digest == wire(dtype).digest("train", 2, "c0", plan)
    _check(arrays(found.adapter), arrays(STATE.adapter), dtype)
    return found


def read_answer(frame: bytes, dtype: str, plan: Plan) -> Reply:
    """On the server. What is read has the asked-for ids, dtypes and shapes, and is finite."""
    found = wire(dtype).open_reply(frame, "train", 2, "c0", plan, STATE.adapter)
    if found.error is not None:
        return found
    assert found.update is not None
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert found.update.examples > 0
    ids = found.update.adapter.ids
    if plan.select is not None:
        assert sum(map(len, ids.values())) == plan.select
    else:
        assert {n: i.tolist() for n, i in ids.items()} == {n: i.tolist() for n, i in plan.train.items()}
    _check(arrays(found.update.adapter), arrays(STATE.adapter.take(ids)), dtype)
    assert {n: (a.dtype.name, a.shape) for n, a in found.update.arrays.items()} == plan.returns
    return found


def _check(found: dict[str, np.ndarray], like: dict[str, np.ndarray], dtype: str) -> None:
    assert found.keys() == like.keys()
    for name, array in found.items():
        assert array.shape == like[name].shape
        assert array.dtype == (np.int64 if name.endswith("ids") else np.float64 if dtype == "f64" else np.float32)
        assert np.isfinite(array).all()


CASES = [
    pytest.param(write, read, dtype, plan, id=f"{write.__name__}-{dtype}")
    for write, read in ((request, read_request), (answer, read_answer))
    for dtype, plan in (("f32", PLAN), ("int8", CHOOSING))
]
Write, Read = Callable[[str, Plan], bytes], Callable[[bytes, str, Plan], Any]


def spoilt(frame: bytes, seed: str) -> Iterator[bytes]:
    """Frames with one to four bytes changed, cut out or put in; half of them where the header's text is."""
    draw = random.Random(seed)
    text = frame.index(b"  ", 8)  # the header is padded with blanks
    while True:
        body = bytearray(frame)
        for _ in range(draw.randint(1, 4)):
            at = min(draw.randrange(8, text if draw.random() < 0.5 else len(frame)), len(body) - 1)
            match draw.randrange(5):
                case 0:
                    body[at] = draw.randrange(256)
                case 1:
                    body[at] = ord(draw.choice('0123456789-.eE"[]{},:'))
                case 2:
                    del body[at : at + draw.choice((1, 1, 4, 100))]
                case 3:
                    body[at:at] = draw.randbytes(draw.choice((1, 1, 4, 100)))
                case 4:
                    del body[max(at, 12) :]  # a frame cut short
        if body != frame:
            yield bytes(body)


@pytest.mark.parametrize(("write", "read", "dtype", "plan"), CASES)
def test_the_frames_that_are_spoilt_are_good(write: Write, read: Read, dtype: str, plan: Plan) -> None:
    read(write(dtype, plan), dtype, plan)


@pytest.mark.parametrize(("write", "read", "dtype", "plan"), CASES)
def test_a_damaged_frame_is_refused(write: Write, read: Read, dtype: str, plan: Plan) -> None:
    for _, frame in zip(range(ROUNDS), spoilt(write(dtype, plan), "damage"), strict=False):
        with pytest.raises(Refused):
            read(frame, dtype, plan)


@pytest.mark.parametrize(("write", "read", "dtype", "plan"), CASES)
def test_a_damaged_frame_with_a_good_checksum(write: Write, read: Read, dtype: str, plan: Plan) -> None:
    """The checksum is no defence against malice: behind it everything is checked again."""
    refused = 0
    for _, frame in zip(range(ROUNDS), spoilt(write(dtype, plan), "malice"), strict=False):
        try:
            read(sealed(frame), dtype, plan)
        except Refused:
            refused += 1
    assert 0 < refused < ROUNDS  # a changed value of a tensor can be read


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from nodes(child, (*path, key))


def planted(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else at this path."""
    copy = json.loads(json.dumps(value))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return copy


@pytest.mark.parametrize(("write", "read", "dtype", "plan"), CASES)
def test_every_fact_of_a_frame_may_be_anything(write: Write, read: Read, dtype: str, plan: Plan) -> None:
    """Each field of the facts, at any depth, replaced by values of every kind."""
    meta, tensors = unpack(write(dtype, plan))
    refused = 0
    for path in nodes(meta):
        for value in NASTY:
            try:
                read(pack(planted(meta, path, value), tensors), dtype, plan)
            except Refused:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(("write", "read", "dtype", "plan"), CASES)
def test_every_entry_of_a_header_may_be_anything(write: Write, read: Read, dtype: str, plan: Plan) -> None:
    """The same for the table of tensors, whose offsets, shapes and dtypes a sender may invent."""
    frame = write(dtype, plan)
    (size,) = struct.unpack("<Q", frame[:8])
    header, body = json.loads(frame[8 : 8 + size]), frame[8 + size :]
    refused = 0
    for path in nodes(header):
        for value in (*NASTY, "F64", "I8", "BF16", "F8_E4M3", [0], [1 << 40, 1 << 40], [4, 0], [0, 1 << 40]):
            text = json.dumps(planted(header, path, value)).encode()
            try:
                read(sealed(struct.pack("<Q", len(text)) + text + body), dtype, plan)
            except Refused:
                refused += 1
    assert refused > 100


@settings(max_examples=200)
@given(st.binary(max_size=9000), st.booleans())
def test_noise_is_refused(noise: bytes, seal: bool) -> None:
    frame = sealed(noise + bytes(CHECKSUM)) if seal else noise
    for read in (read_request, read_answer):
        with pytest.raises(Refused):
            read(frame, "f32", PLAN)


@settings(max_examples=200)
@given(st.binary(max_size=3000), st.integers(0, 4000))
def test_noise_behind_a_plausible_length_is_refused(noise: bytes, size: int) -> None:
    for read in (read_request, read_answer):
        with pytest.raises(Refused):
            read(sealed(struct.pack("<Q", size) + noise + bytes(3000)), "f32", PLAN)


@pytest.mark.parametrize(
    "shape", [["x", 300_000_000], [1 << 62, "x"], ["x", 1 << 62], [[9] * 9, 1 << 62], [9] * 200_000, [2.0], [True], {}, "27", None]
)  # fmt: skip
def test_a_shape_of_anything_is_refused_at_once(shape: Any) -> None:
    """Before a product is formed, which strings and lists turn into copies of themselves."""
    frame = request("f32", PLAN)
    (size,) = struct.unpack("<Q", frame[:8])
    header = json.loads(frame[8 : 8 + size])
    header["B"]["shape"] = shape
    text = json.dumps(header).encode()
    frame = sealed(struct.pack("<Q", len(text)) + text + frame[8 + size :])
    tracemalloc.start()
    for read in (read_request, read_answer):
        with pytest.raises(Refused) as error:
            read(frame, "f32", PLAN)
        assert len(str(error.value)) <= 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("name", ["arrays.\ud800", "\udfff", "", "B.scale"])
def test_a_tensor_of_any_name_is_refused(name: str) -> None:
    meta, tensors = unpack(request("f32", PLAN))
    with pytest.raises(Refused):
        read_request(pack(meta, tensors | {name: np.zeros(3, np.float32)}), "f32", PLAN)


def test_what_a_refusal_quotes_is_cut() -> None:
    meta, tensors = unpack(request("f32", PLAN))
    with pytest.raises(Refused) as error:
        read_answer(pack(meta | {"run": "x" * 900_000}, tensors), "f32", PLAN)
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize("field", ["shape", "width", "header"])
def test_a_claim_of_size_costs_no_memory(field: str) -> None:
    """A few kilobytes that claim terabytes are refused within a few megabytes."""
    frame = request("f32", PLAN)
    if field == "shape":
        text = frame.replace(b'"shape":[27]', b'"shape":[1099511627776]', 1)
        assert text != frame
        frame = sealed(text)
    elif field == "width":
        meta, tensors = unpack(frame)
        frame = pack({**meta, "plan": {**meta["plan"], "width": 1 << 45}}, tensors)
    else:
        frame = sealed(struct.pack("<Q", 1 << 45) + frame[8:])
    tracemalloc.start()
    with pytest.raises(Refused):
        read_request(frame, "f32", PLAN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
