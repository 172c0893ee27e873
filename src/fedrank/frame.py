"""Frames: facts and arrays as bytes and back, and arrays in the wire's dtypes.

A frame is one safetensors file: a JSON header padded to a fixed size, the tensors, and last a 64-bit
XXH3 hash of all bytes before it. Nothing in it is ever executed.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import xxhash

import fedrank
from fedrank.adapter import FACTORS

SCHEMA, OLDEST = 2, 1  # of frames: the newest, which is written where it is understood, and the oldest that is read
OTHER = "the frame has schema version"  # how every version begins to refuse one that it does not read
HEADER = 2048  # bytes; the header grows in steps of this, so that a frame's length can be predicted
MAX_HEADER = 1 << 20
CHECKSUM = 8  # bytes
MAX_AXES = 8

Dtype = Literal["f64", "f32", "f16", "bf16", "int8"]
DTYPES: Mapping[str, Any] = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8}  # fmt: skip
EXACT = ("f64", "f32")
_CODES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8,
          "U8": np.uint8, "I64": np.int64, "I32": np.int32, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES = {np.dtype(kind): code for code, kind in _CODES.items()}


def printable(text: str) -> str:
    """It without what would move a terminal's cursor, or could not be written at all: other machines may send any text."""
    return "".join(character for character in text if character.isprintable())


class Refused(ValueError):
    """A frame that is damaged, of another run or round, not what was asked for, or not fit to be sent."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text[:400]))  # it may quote the frame, and is logged


def pack(meta: Mapping[str, Any], tensors: Mapping[str, np.ndarray | list[np.ndarray]]) -> bytes:
    """One frame of these JSON-able facts and arrays; a list of arrays is written as one flat tensor, uncopied.

    Refused where an array holds NaN or infinity, as its reader would refuse it.
    """
    header: dict[str, Any] = {}
    at, parts = 0, list[Any]()
    for name, value in tensors.items():
        # ascontiguousarray would make a scalar one-dimensional
        chunks = [np.asarray(chunk, order="C") for chunk in (value if isinstance(value, list) else [value])]
        dtype, size = chunks[0].dtype, sum(chunk.nbytes for chunk in chunks)
        if dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has dtype {dtype}; the wire knows {', '.join(map(str, _NAMES))}")
        shape = [size // dtype.itemsize] if isinstance(value, list) else list(chunks[0].shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
        parts += [chunk.reshape(-1).view(np.uint8).data for chunk in chunks if chunk.size]
    header["checksum"] = {"dtype": "U64", "shape": [1], "data_offsets": [at, at + CHECKSUM]}
    facts = {"__metadata__": {"fedrank": json.dumps(meta, sort_keys=True, separators=(",", ":"))}}
    text = json.dumps(facts | header, separators=(",", ":")).encode()
    size = HEADER * math.ceil((8 + len(text)) / HEADER) - 8
    pieces = [struct.pack("<Q", size), text.ljust(size), *parts]
    checksum = xxhash.xxh3_64()
    for piece in pieces:
        checksum.update(piece)
    frame = b"".join([*pieces, checksum.digest()])
    finite(_views(frame, 8 + size, header))  # looked for in the frame, where a tensor is one piece
    return frame


def unpack(frame: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and arrays of a frame; Refused where it is damaged or of a schema that is not read here."""
    if len(frame) < HEADER + CHECKSUM:
        raise Refused(f"a frame of {len(frame)} bytes is too short")
    if xxhash.xxh3_64_digest(memoryview(frame)[:-CHECKSUM]) != frame[-CHECKSUM:]:
        raise Refused("the checksum does not fit: the frame was damaged on its way")
    (size,) = struct.unpack("<Q", frame[:8])
    if size > min(MAX_HEADER, len(frame) - 8):
        raise Refused(f"a header of {size} bytes is over the limit")
    try:
        header = json.loads(frame[8 : 8 + size], object_pairs_hook=_object)
        meta = json.loads(header.pop("__metadata__")["fedrank"], object_pairs_hook=_object)
        tensors = _views(frame, 8 + size, header)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Refused(f"not a frame: {type(error).__name__}: {error}") from None
    told = meta if isinstance(meta, dict) else {}
    numbers = type(told.get("schema")) is type(told.get("newest", 0)) is int
    if not numbers or not OLDEST <= spoken(told) <= SCHEMA:
        theirs = f" (fedrank {told['version']!s:.40})" if "version" in told else ""
        raise Refused(
            f"{OTHER} {told.get('schema')!r}{theirs}, this fedrank {fedrank.__version__} speaks {OLDEST} to {SCHEMA}"
        )
    tensors.pop("checksum", None)
    finite(tensors)
    return meta, tensors


def spoken(meta: Mapping[str, Any]) -> int:
    """The schema that both ends of a frame speak, where there is one.

    It is the frame's; of one that also names the newest that its writer speaks, the newest up to there.
    """
    return max(int(meta["schema"]), min(int(meta.get("newest", 0)), SCHEMA))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key comes twice, since readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _views(frame: bytes, at: int, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors where they lie in the frame (the safetensors library would copy each); they must fill it in order."""
    body, tensors = at, {}
    for name, entry in header.items():
        dtype, shape, (start, end) = np.dtype(_CODES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if len(shape) > MAX_AXES or any(type(n) is not int or not 0 <= n <= len(frame) for n in [start, end, *shape]):
            raise ValueError(f"tensor {name[:80]!r} has an impossible shape or place")
        count = math.prod(shape)
        if body + start != at or body + end > len(frame) or end - start != count * dtype.itemsize:
            raise ValueError(f"tensor {name[:80]!r} of {dtype}{shape} does not lie at {[start, end]}")
        tensors[name] = np.frombuffer(frame, dtype, count, at).reshape(shape)
        at = body + end
    if at != len(frame):
        raise ValueError(f"{len(frame) - at} bytes belong to no tensor")
    return tensors


def finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Refused where one of these arrays, of the wire's types, holds NaN or infinity."""
    for name, array in tensors.items():
        if _NAMES[array.dtype] in _FLOATS and not np.isfinite(array).all():
            raise Refused(f"tensor {name!r} holds NaN or infinity")


@dataclass(frozen=True)
class Sizes:
    """Bytes of one frame: the factors B, e, A and the base updates; the dense tensors; everything."""

    adapter: int
    head: int
    frame: int


def sizes(frame: bytes) -> Sizes:
    """What the bytes of a frame of this module are spent on, read from its header."""
    totals = {"adapter": 0, "head": 0}
    for name, entry in _header(frame).items():
        part = "head" if name.startswith("h.") else "adapter" if name.split(".")[0] in (*FACTORS, "W") else None
        if part:
            start, end = entry["data_offsets"]
            totals[part] += end - start
    return Sizes(totals["adapter"], totals["head"], len(frame))


def digest(frame: bytes) -> str:
    """What a request calls itself, read from its header: the same on every machine, for the same run and plan."""
    return str(json.loads(_header(frame)["__metadata__"]["fedrank"])["digest"])


def _header(frame: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", frame[:8])
    return dict(json.loads(frame[8 : 8 + size]))


def encode(
    name: str, values: np.ndarray, lengths: np.ndarray, dtype: Dtype, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """A flat array in the wire's dtype; low precision is rounded stochastically, so its mean is exact.

    int8 has one f32 scale per row (the rows' `lengths` sum to the array's size).
    """
    if dtype in EXACT:
        return {name: values.astype(DTYPES[dtype], copy=False)}
    values = values.astype(np.float32)
    if dtype == "int8":
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int)
        scales = (np.maximum.reduceat(np.abs(values), starts) / 127).astype(np.float32)
        steps = _round(values / np.repeat(np.where(scales > 0, scales, 1), lengths), generator)
        return {name: np.clip(steps, -127, 127).astype(np.int8), f"{name}.scale": scales}
    if dtype == "bf16":  # the low 16 bits of an f32, plus 16 random ones, carry into the rest
        limit = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
        bits = np.clip(values, -limit, limit).view(np.uint32)  # at the limit all 16 are 0: nothing reaches infinity
        noise = generator.integers(0, 1 << 16, values.size, np.uint16)
        return {name: (bits + noise >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)}
    limit = np.float32(np.finfo(np.float16).max)
    values = np.clip(values, -limit, limit)
    exponent = np.maximum(np.frexp(values)[1], -13)  # below, f16 is subnormal and its steps stay the same
    step = np.ldexp(np.float32(1), exponent - 11)
    return {name: (_round(values / step, generator) * step).astype(np.float16)}


def _round(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One of the two whole numbers beside each value, the nearer the likelier."""
    low = np.floor(values)
    return np.asarray(low + (generator.random(values.size, np.float32) < values - low))


def decode(name: str, tensors: Mapping[str, np.ndarray], lengths: np.ndarray, dtype: Dtype) -> np.ndarray:
    """The flat values of a tensor; Refused unless its dtype and size are the ones asked for."""
    values = _vector(tensors, name, DTYPES[dtype], int(lengths.sum()))
    if dtype in EXACT:
        return values
    if dtype == "int8":
        return np.asarray(values * np.repeat(_vector(tensors, f"{name}.scale", np.float32, len(lengths)), lengths))
    return values.astype(np.float32)


def _vector(tensors: Mapping[str, np.ndarray], name: str, kind: Any, size: int) -> np.ndarray:
    if name not in tensors:
        raise Refused(f"tensor {name!r} is missing")
    array = tensors[name]
    if array.dtype != np.dtype(kind) or array.shape != (size,):
        raise Refused(f"tensor {name!r} is {array.dtype}{list(array.shape)}, asked for was {np.dtype(kind)}[{size}]")
    return array
