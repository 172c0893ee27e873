"""Readers of frames against noise: whatever comes in, it is read as what was asked for, or Refused."""

import json
import math
import random
import resource
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrank import hello, increments, methods
from fedrank.adapter import Adapter
from fedrank.client import complete
from fedrank.config import Local
from fedrank.frame import CHECKSUM, OLDEST, SCHEMA, Refused, pack, unpack
from fedrank.protocol import Device, Job, Load, Plan, State, Update
from fedrank.selection import everything
from fedrank.store import CLIENT, Store
from fedrank.training import rehearsal
from fedrank.wire import Reply, Request, Wire
from toy import Arrived, arrays, drawn, sealed, small

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


@pytest.mark.parametrize(("write", "read", "dtype", "plan"), CASES)
def test_the_frames_that_are_spoilt_are_good(write: Write, read: Read, dtype: str, plan: Plan) -> None:
    read(write(dtype, plan), dtype, plan)


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


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=9000), st.booleans())
def test_noise_is_refused(noise: bytes, seal: bool) -> None:
    frame = sealed(noise + bytes(CHECKSUM)) if seal else noise
    for read in (read_request, read_answer):
        with pytest.raises(Refused):
            read(frame, "f32", PLAN)


@settings(max_examples=200, deadline=None)
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


# ---- exchanges of real methods, their frames mutated in every way


@dataclass(frozen=True, eq=False)
class Exchange:
    """What one method's server and client said to one another in a round, and what each knew."""

    wire: Wire
    state: State
    plan: Plan
    request: bytes
    answer: bytes
    told: Request

    def read_request(self, frame: bytes) -> None:
        """On the client: Refused, or it has read the plan that was sent, of the same ids, shapes and dtypes, finite."""
        found = self.wire.open_request(frame)
        assert found.digest == self.told.digest  # of run, round, client, kind and the whole plan
        assert math.isfinite(found.adapter.scale)
        alike(found.adapter, self.told.adapter)
        rounds = list(found.base_updates)  # numbers that the server alone knows, of rounds that have been
        assert rounds == sorted(set(rounds))
        assert all(0 <= round < found.round for round in rounds)
        for update, like in zip(found.base_updates.values(), self.told.base_updates.values(), strict=True):
            assert (update is None) == (like is None)
            if update is not None and like is not None:
                alike(update, like)

    def read_answer(self, frame: bytes) -> None:
        """On the server: Refused, an error's text, or an update of the ids, shapes and dtypes asked for, finite."""
        found = self.wire.open_reply(frame, "train", self.state.round + 1, "c0", self.plan, self.told.adapter)
        assert all(math.isfinite(value) for value in found.metrics.values())
        if found.update is None:
            assert found.error is not None
            assert len(found.error) <= 400
            return
        update, ids = found.update, self.plan.train
        assert update.examples > 0
        if self.plan.select is not None:
            ids = update.adapter.ids
            assert sum(map(len, ids.values())) <= self.plan.select
        assert update.adapter.ids.keys() == {name for name, own in ids.items() if len(own)}
        alike(update.adapter, self.state.adapter.take(ids).only(self.plan.up))  # KeyError for what it never had
        assert {name: (a.dtype.name, a.shape) for name, a in update.arrays.items()} == self.plan.returns
        assert all(np.isfinite(array).all() for array in update.arrays.values())


def alike(found: Adapter, like: Adapter) -> None:
    """Of the same ids, factors and shapes, of a type the wire has, and finite."""
    one, two = arrays(found), arrays(like)
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.shape == two[name].shape
        if name.endswith("/ids"):
            assert np.array_equal(array, two[name])
        else:
            assert array.dtype in (np.float32, np.float64)
            assert np.isfinite(array).all()


SIZES = {"0.m": (5, 3), "1.m": (4, 6)}


def exchange(
    name: str,
    dtype: str,
    round: int = 1,
    run: str = "run",
    sizes: Mapping[str, tuple[int, int]] = SIZES,
    **settings: Any,
) -> Exchange:
    """A method's round after `round`, with a client that trains nothing; it has base updates where the method makes any."""
    method, spec = methods.build({"name": name, **settings}), small(sizes, rank=3)
    state = method.begin(spec, 5, 0)
    wire = Wire(spec, state.adapter, dtype, run, 7, {"threads": 1})
    cohort = {"c0": Device("c0", 9, rank=2)}
    for _ in range(round + 1):
        plan = method.plan(state, cohort, 0)["c0"]
        request = wire.request("train", "c0", plan, state)
        told = wire.open_request(request)
        adapter = complete(told.adapter, plan, {}, wire.start)
        job = Job(
            plan, told.round, 5, spec, adapter, (), {}, Local(batch_size=4, epochs=2), cohort["c0"], 7, rehearsal.fit
        )
        (update,) = method.train([job])
        done = Exchange(wire, state, plan, request, wire.update(told, update), told)
        merged = method.merge(state, Arrived({"c0": update, "c1": update}))
        state = replace(merged, round=state.round + 1)
    return done


SAID: dict[str, Callable[[], Exchange]] = {
    "fedavg-f32": partial(exchange, "fedavg", "f32"), "fedavg-f16": partial(exchange, "fedavg", "f16"),
    "fedara-f64": partial(exchange, "fedara", "f64", target_rank=1),  # e, arrays both ways
    "fedara-int8": partial(exchange, "fedara", "int8", target_rank=1),
    "lora_a2-f32": partial(exchange, "lora_a2", "f32", round=2),  # the client's own choice of components
    "lora_a2-bf16": partial(exchange, "lora_a2", "bf16"), "lora_a2-int8": partial(exchange, "lora_a2", "int8"),
    "flora-f32": partial(exchange, "flora", "f32", sizes={"0.m": (40, 30), "1.m": (30, 50)}),  # base updates as factors
    "flora-whole": partial(exchange, "flora", "f32", round=2),  # and as matrices
    "fed_plora-bf16": partial(exchange, "fed_plora", "bf16"), "pf2lora-f32": partial(exchange, "pf2lora", "f32"),
}  # fmt: skip
said = cache(lambda name: SAID[name]())


def header_of(frame: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The table of tensors, the facts, and the body of a frame."""
    (size,) = struct.unpack("<Q", frame[:8])
    header = json.loads(frame[8 : 8 + size])
    return header, json.loads(header.pop("__metadata__")["fedrank"]), frame[8 + size :]


def written(header: dict[str, Any] | str, facts: dict[str, Any] | str, body: bytes) -> bytes:
    """The inverse, of anything; a text stands as it is."""
    facts = facts if isinstance(facts, str) else json.dumps(facts)
    table = header if isinstance(header, str) else json.dumps(header)[1:-1]
    text = (json.dumps({"__metadata__": {"fedrank": facts}})[:-1] + f", {table}}}").encode(errors="surrogatepass")
    size = 2048 * math.ceil((8 + len(text)) / 2048) - 8
    return struct.pack("<Q", size) + text.ljust(size) + body


TRICKS = ("../../x", "/etc/passwd", "..", ".base", "a\0b", "c0/../c1", "C:\\x", "x" * 5000, "\ud800", "")
EDITS: list[Any] = [
    *NASTY,
    *TRICKS,
    -(1 << 63),
    1 << 63,
    2 << 30,
    1e308,
    5e-324,
    "F64",
    "BF16",
    "c1",
    [0, 8],
    [1 << 31] * 8,
]


def edited(frame: bytes, other: bytes, draw: random.Random) -> bytes:
    """One entry of the header or of the facts is another one, is gone, comes twice, or is what it is in another frame."""
    header, facts, body = header_of(frame)
    theirs = header_of(other)
    at = draw.randrange(2)
    ours, source = (header, facts)[at], theirs[at]
    path = draw.choice(list(nodes(ours)))
    match draw.randrange(5):
        case 0:  # a key comes twice, with another value
            (text,) = (json.dumps(part)[1:-1] for part in [ours])
            twice = f"{text}, {json.dumps(draw.choice(list(ours)))}: {json.dumps(draw.choice(EDITS))}"
            return written(twice, facts, body) if at == 0 else written(header, f"{{{twice}}}", body)
        case 1:
            new = planted(ours, path, draw.choice(EDITS))
        case 2:  # a number a little off
            new = planted(ours, path, draw.choice((-1, 0, 1, 2, 7, 8, 1 << 16, 1 << 31)))
        case 3:  # another name
            node = json.loads(json.dumps(ours))
            key = draw.choice(list(node))
            name = draw.choice([*TRICKS, *source, f"arrays.{draw.choice(TRICKS)}", "ids", "e", "B.scale", "base.ranks"])
            new = {name if k == key else k: v for k, v in node.items()}
        case _:
            key = draw.choice(list(source))
            new = {**ours, key: source[key]} if draw.random() < 0.7 else {k: v for k, v in ours.items() if k != key}
    return written(new, facts, body) if at == 0 else written(header, new, body)


# NaN, infinity, the largest and the smallest numbers, and all bits set, by their width in bytes.
ODD = {
    8: [np.float64(x).tobytes() for x in (np.nan, -np.inf, 1.7e308, 1e39, 5e-324)] + [bytes(8), b"\xff" * 8],
    4: [np.float32(x).tobytes() for x in (np.nan, -np.inf, 3.4e38, 1e-45)] + [bytes(4), b"\xff" * 4],
    2: [np.float16(x).tobytes() for x in (np.nan, -np.inf, 65504)] + [b"\x80\x7f", b"\x7f\x7f", bytes(2), b"\xff" * 2],
    1: [b"\x80", b"\x7f", bytes(1), b"\xff"],
}


def mutated(frame: bytes, others: list[bytes], seed: str) -> Iterator[bytes]:
    """Frames with flipped bits, bytes overwritten, cut out, doubled or put in, cut short, spliced, odd numbers, edits."""
    draw = random.Random(seed)
    text = frame.index(b"  ", 8)  # the header is padded with blanks
    while True:
        body, other = bytearray(frame), draw.choice(others)
        kind = draw.randrange(12)
        if kind < 6:
            for _ in range(draw.randint(1, 3)):
                at = min(draw.randrange(text if draw.random() < 0.5 else len(frame)), len(body) - 1)
                size = draw.choice((1, 1, 4, 8, 100, 2048))
                match kind:
                    case 0:
                        body[at] ^= 1 << draw.randrange(8)
                    case 1:
                        body[at : at + size] = draw.randbytes(len(body[at : at + size]))
                    case 2:
                        body[at] = ord(draw.choice('0123456789-.eE"[]{},:'))
                    case 3:
                        del body[at : at + size]
                    case 4:
                        body[at:at] = draw.choice((draw.randbytes(size), bytes(body[at : at + size]), bytes(size)))
                    case 5 if len(body) > 12:  # cut short
                        del body[max(at, 12) :]
        elif kind == 6:  # the start of one and the end of another, at the same place or at any
            at = draw.randrange(1, len(frame))
            body[at:] = other[at if draw.random() < 0.7 else draw.randrange(len(other)) :]
        elif kind == 7:  # a number of a tensor is another one: ids, arrays and scales too
            header, _, numbers = header_of(frame)
            entry = draw.choice(list(header.values()))
            start, end = entry["data_offsets"]
            if end > start:
                width = (end - start) // math.prod(entry["shape"])
                at = len(frame) - len(numbers) + start + width * draw.randrange((end - start) // width)
                body[at : at + width] = draw.choice(ODD[width]) if draw.random() < 0.7 else draw.randbytes(width)
        else:
            body = bytearray(edited(frame, other, draw))
        if body != frame and body not in others:
            yield bytes(body)


WAYS = ("request", "answer")


def each(way: str, count: int, seal: bool) -> Iterator[tuple[Callable[[bytes], None], bytes]]:
    """So many mutated frames one way, of all exchanges alike, and how each is read."""
    everything = [said(name) for name in SAID]
    others = [getattr(one, kind) for one in everything for kind in WAYS]
    others += [getattr(exchange("fedavg", "f32", round=2), way), getattr(exchange("fedavg", "f32", run="other"), way)]
    for name, one in zip(SAID, everything, strict=True):
        read, stream = getattr(one, f"read_{way}"), mutated(getattr(one, way), others, f"{name} {way} {seal}")
        for frame in islice(stream, -(-count // len(SAID))):
            yield read, sealed(frame) if seal else frame


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAID)
def test_what_was_said_is_read(name: str, way: str) -> None:
    getattr(said(name), f"read_{way}")(getattr(said(name), way))


amount = pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])


@amount
@pytest.mark.parametrize("way", WAYS)
def test_a_mutated_frame_is_refused_by_its_checksum(way: str, count: int) -> None:
    seen = 0
    for read, frame in each(way, count, seal=False):
        short = len(frame) < 2048 + CHECKSUM
        with pytest.raises(Refused, match="too short" if short else "checksum"):
            read(frame)
        seen += 1
    assert seen >= count


@amount
@pytest.mark.parametrize("way", WAYS)
def test_a_mutated_frame_with_a_checksum_that_fits(way: str, count: int) -> None:
    """The checksum is no defence against malice: behind it everything is checked again, and only values may differ.

    Each is read within a second or two, and all together take no more memory than a few frames.
    """
    refused, seen, slowest, longest = Counter[str](), 0, 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read, frame in each(way, count, seal=True):
        clock = time.perf_counter()
        try:
            read(frame)
        except Refused as error:
            refused[str(error)[:20]] += 1
            longest = max(longest, len(str(error)))
        slowest, seen = max(slowest, time.perf_counter() - clock), seen + 1
    assert seen >= count
    assert 0.5 * count < refused.total() < 0.99 * count  # a changed value of a tensor can be read
    assert len(refused) > 10  # by many of the checks
    assert slowest < 5
    assert longest <= 400
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (64 << 10) * (1 if sys.platform == "linux" else 1024)  # KiB, on macOS bytes


# ---- the two frames of a greeting

RUN = "0123456789abcdef"
HELD = Load(1, 2, 3, 4, 5, 6, 7)
DEVICE = Device("north", 5, "laptop", None, HELD, 1.0, 0.0, 2.0, 2.0, 1.0, 3.0)
TOLD = {"task": "classify", "data": {"labels": ["bad", "good"]}, "local": {"steps": 2}}


def setup(rank: int) -> bytes:
    """Of a run that starts from an imported adapter; of rank 0, from the method's own."""
    start = replace(drawn(small(SIZES, rank), 1), dense={"bias": np.ones(2, np.float32)}) if rank else None
    return hello.write_setup(hello.Setup(RUN, TOLD, ("bad", "good"), "print", "start", start))


def read_setup(frame: bytes) -> None:
    """On the client: Refused, or a folder's name, texts, and an adapter whose factors are of one rank each, and finite."""
    found = hello.read_setup(frame)
    assert len(found.run) == 16
    assert all(type(label) is str for label in found.labels)
    assert OLDEST <= found.schema <= SCHEMA
    assert len(found.version or "") <= 40
    if found.imported is None:
        return
    assert math.isfinite(found.imported.scale)
    assert not found.imported.odd()
    for block in found.imported.blocks.values():
        assert block.ids.dtype.kind == "i"
        assert np.all(np.diff(block.ids) > 0)
        assert {factor: rows.ndim for factor, rows in block.rows.items()} in (
            {"B": 2, "A": 2},
            {"B": 2, "e": 1, "A": 2},
        )
        assert {len(rows) for rows in block.rows.values()} == {len(block.ids)}


def read_registration(frame: bytes) -> None:
    """On the server: Refused, or a device that is called as a folder may be, has rows, and is of finite numbers."""
    device = hello.read_registration(frame, RUN).device
    assert CLIENT.fullmatch(device.id)
    assert device.examples > 0
    assert device.rank is None or device.rank > 0
    for field in fields(Device):
        if field.type is float:
            assert 0 <= getattr(device, field.name) < math.inf
    assert all(type(count) is int and count >= 0 for count in asdict(device.load).values())


GREETINGS: dict[str, tuple[bytes, Callable[[bytes], None]]] = {
    "setup": (setup(0), read_setup), "setup-1": (setup(1), read_setup), "setup-3": (setup(3), read_setup),
    "registration": (hello.write_registration(hello.Registration(RUN, DEVICE, "print", {"cpu": "x"})), read_registration),
}  # fmt: skip
greeting = pytest.mark.parametrize("name", GREETINGS)


def spoilt(name: str, count: int, seal: bool) -> Iterator[bytes]:
    """So many mutated frames of a greeting, some with pieces of others."""
    others = [frame for frame, _ in GREETINGS.values()]
    for frame in islice(mutated(GREETINGS[name][0], others, f"{name} {seal}"), count):
        yield sealed(frame) if seal else frame


@greeting
def test_a_greeting_is_read(name: str) -> None:
    frame, read = GREETINGS[name]
    read(frame)


@greeting
def test_a_mutated_greeting_is_refused_by_its_checksum(name: str) -> None:
    for frame in spoilt(name, 1000, seal=False):
        with pytest.raises(Refused, match="too short" if len(frame) < 2048 + CHECKSUM else "checksum"):
            GREETINGS[name][1](frame)


@pytest.mark.parametrize("count", [500, pytest.param(2500, marks=pytest.mark.slow)])
@greeting
def test_a_mutated_greeting_with_a_checksum_that_fits(name: str, count: int) -> None:
    refused = Counter[str]()
    for frame in spoilt(name, count, seal=True):
        try:
            GREETINGS[name][1](frame)
        except Refused as error:
            refused[str(error)[:20]] += 1
    assert 0.3 * count < refused.total() < 0.99 * count  # another text can be read
    assert len(refused) > 5


@greeting
def test_every_fact_of_a_greeting_may_be_anything(name: str) -> None:
    frame, read = GREETINGS[name]
    meta, tensors = unpack(frame)
    refused = 0
    for path, value in product(nodes(meta), NASTY):
        try:
            read(pack(planted(meta, path, value), tensors))
        except Refused:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("ids/0.m", np.array(0)), ("ids/0.m", np.array([[0]])), ("ids/0.m", np.zeros(1, np.float32)), ("ids/0.m", np.zeros(1, bool)),
        ("B/0.m", np.array(1.0)), ("B/0.m", np.ones(1)), ("B/0.m", np.ones((5, 2))), ("B/0.m", np.ones((5, 1), np.int64)),
        ("e/0.m", np.array(1.0)), ("e/0.m", np.ones((1, 1))), ("A/0.m", np.ones(1)), ("A/0.m", np.ones((1, 3, 1))),
        ("h/bias", np.array([True])), ("B/0.m", None), ("A/0.m", None),
    ],
)  # fmt: skip
def test_what_is_no_adapter_to_start_from(name: str, array: np.ndarray | None) -> None:
    """A tensor of other axes or of another type; None: without it."""
    meta, tensors = unpack(setup(1))
    changed = {key: value for key, value in {**tensors, name: array}.items() if value is not None}
    with pytest.raises(Refused, match="not an adapter to start from"):
        hello.read_setup(pack(meta, changed))


def test_an_answer_to_anything_else_is_refused() -> None:
    """Of another method, plan, type, round, run or client, whole as it is."""
    everything = {name: said(name) for name in SAID}
    more = {
        "round": exchange("fedavg", "f32", round=2), "run": exchange("fedavg", "f32", run="other"),
        "rank": exchange("fedavg", "f32", round=0),
    }  # fmt: skip
    for (mine, one), (theirs, other) in product(everything.items(), {**everything, **more}.items()):
        if mine != theirs:
            with pytest.raises(Refused):
                one.read_answer(other.answer)
    one = said("fedavg-f32")
    with pytest.raises(Refused, match="an answer to run, round, client, plan"):
        one.wire.open_reply(one.answer, "train", one.state.round + 1, "c1", one.plan, one.told.adapter)


# ---- what names and claims reach

_opened: list[str] | None = None  # the paths opened or made while it is a list


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir"):
        _opened.append(f"{event} {args[0]}")


sys.addaudithook(_audit)


@pytest.mark.parametrize("trick", TRICKS)
def test_no_name_in_a_frame_reaches_the_file_system(trick: str) -> None:
    """Of a client, run, tensor, module, array, metric or tensor to send back: read as a text, or Refused."""
    global _opened
    one = said("fedara-f64")
    frames = []
    for frame in (one.request, one.answer):
        header, facts, body = header_of(frame)
        frames += [written(header, {**facts, key: trick}, body) for key in ("client", "run", "kind", "fingerprint")]
        frames += [written({trick if k == key else k: v for k, v in header.items()}, facts, body) for key in header]
        frames += [
            written({f"arrays.{trick}" if k == key else k: v for k, v in header.items()}, facts, body) for key in header
        ]
        frames.append(written(header, {**facts, "metrics": {trick: 1.0}, "numerics": {trick: trick}}, body))
        if "plan" in facts:
            frames.append(
                written(header, {**facts, "plan": {**facts["plan"], "returns": {trick: ["uint8", [1]]}}}, body)
            )
    _opened = []
    try:
        for frame in frames:
            for read in (one.read_request, one.read_answer):
                with suppress(Refused):
                    read(sealed(frame))
        assert _opened == []
    finally:
        _opened = None


@pytest.mark.parametrize("trick", [*TRICKS, "ok/../../x", "."])
def test_no_client_id_leads_out_of_a_run(trick: str, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    for write in (
        lambda: store.spool(trick, b"frame"), lambda: store.private.save(trick, 1, -1, {"x": np.zeros(1)}),
        lambda: store.private.load(trick, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="client id"):
            write()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("depth", [10, 300, 600, *range(900, 1010, 3), 5000, 100_000])
@pytest.mark.parametrize("field", ["client", "numerics", "metrics", "plan", "examples"])
def test_json_of_any_depth_ends(field: str, depth: int) -> None:
    """At the reader's own limit too, whose exceptions quote what they refuse."""
    one = said("fedavg-f32")
    for read, frame in ((one.read_request, one.request), (one.read_answer, one.answer)):
        header, facts, body = header_of(frame)
        for value in ("[" * depth + "]" * depth, '{"x":' * depth + "1" + "}" * depth):
            text = json.dumps({**facts, field: "here"}).replace('"here"', value)
            with suppress(Refused):
                read(sealed(written(header, text, body)))


def test_a_key_that_comes_twice_is_refused() -> None:
    """JSON's readers differ in which they take: a check by one and a use by another would see different frames."""
    one = said("fedavg-f32")
    header, facts, body = header_of(one.answer)
    text, table = json.dumps(facts), json.dumps(header)[1:-1]
    one.read_answer(sealed(written(table, text, body)))
    for spoilt in (
        written(table, text.replace('"round"', '"round": 9, "round"'), body),
        written(f'{table}, "B": {json.dumps(header["B"])}', text, body),
        written(table.replace('"shape"', '"shape": [1], "shape"', 1), text, body),
    ):
        with pytest.raises(Refused, match="a key comes twice"):
            one.read_answer(sealed(spoilt))


def test_ranks_of_base_updates_do_not_wrap_around() -> None:
    """Sixteen ranks of 2^30 times 2^30 numbers each: in 64 bits their sum is 0, as many as came."""
    tensors = {"base.rounds": np.arange(16), "base.ranks": np.full((16, 1), 1 << 30, np.int32)}
    assert int((tensors["base.ranks"].astype(np.int64) << 30).sum()) == 0
    with pytest.raises(Refused, match=r"0 numbers of float32, its ranks ask for 1\.8446744\d+e\+19"):
        increments.read(tensors, small({"0.m": (1 << 30, 1 << 30)}), 1.0)


@pytest.mark.parametrize("change", [-9, 9, 1 << 62])
def test_base_updates_of_rounds_that_have_not_been(change: int) -> None:
    one = said("flora-f32")
    meta, tensors = unpack(one.request)
    tensors["base.rounds"] = tensors["base.rounds"] + change
    with pytest.raises(Refused, match=r"base updates of rounds -?\d+ to -?\d+ came in round \d"):
        one.wire.open_request(pack(meta, tensors))
