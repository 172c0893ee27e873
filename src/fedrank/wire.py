"""The wire: plans, adapters and updates as frames, one flat tensor per factor in module and id order; the reader checks everything."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fedrank import increments
from fedrank.adapter import FACTORS, Adapter, Block, split
from fedrank.frame import DTYPES, EXACT, SCHEMA, Dtype, Refused, Sizes, decode, encode, finite, pack, sizes, unpack
from fedrank.protocol import ClientId, ModelSpec, Plan, State, Update, rng

MAX_WIDTH = 1 << 16  # component ids are below this
MAX_METRIC = 1e30
RANGES = {
    "accuracy": (0.0, 1.0),
    "majority": (0.0, 1.0),
    "rows": (0.0, 1e15),
    "steps": (0.0, 1e15),
    "seconds": (0.0, 1e9),
    "forward_seconds": (0.0, 1e9),
    "backward_seconds": (0.0, 1e9),
    "download_seconds": (0.0, 1e9),
    "upload_seconds": (0.0, 1e9),
    "device_seconds": (0.0, 1e10),
    "device_joules": (0.0, 1e15),
    "peak_memory_bytes": (0.0, 1e18),
}

Kind = Literal["train", "evaluate", "update", "evaluation", "error"]


@dataclass(frozen=True, eq=False)
class Request:
    """What a client reads from the server's frame. base_updates: all that hold by round, None for one sent before."""

    kind: Kind
    round: int
    rounds: int
    client: ClientId
    plan: Plan
    adapter: Adapter
    base_updates: Mapping[int, Adapter | None]
    numerics: Mapping[str, Any]
    digest: str


@dataclass(frozen=True, eq=False)
class Reply:
    """What the server reads from a client's frame: an update, an evaluation, or an error's text."""

    update: Update | None
    metrics: Mapping[str, float]
    error: str | None
    numerics: Mapping[str, Any]
    sizes: Sizes


@dataclass(frozen=True, eq=False)
class Wire:
    """Both ends' knowledge of one run, by which frames are written and checked.

    start: the adapter as ``begin`` made it; it says which factors and dense tensors exist, and low
    precision travels down as the difference to it (and up as the difference to what came down, or
    again to the start where nothing did).
    """

    spec: ModelSpec
    start: Adapter
    dtype: Dtype
    run: str
    seed: int
    numerics: Mapping[str, Any] = field(default_factory=dict)

    # ---- server to client

    def request(self, kind: Kind, client: ClientId, plan: Plan, state: State) -> bytes:
        """The server's frame for the round after `state`: the plan, and what of the adapter travels by it."""
        round, adapter = state.round + 1, state.adapter
        sent = adapter.take(plan.present).only(plan.sent)
        tensors = self._write(sent, self.start, "down", kind, round, client)
        for name, ids in (("plan.train", plan.train), ("plan.frozen", plan.frozen)):
            if any(map(len, ids.values())):
                tensors[name] = self._bits(ids, plan.width)
        tensors |= {f"arrays.{name}": array for name, array in plan.arrays.items()}
        tensors |= increments.write(state.base_updates, plan.since, self.spec)
        meta = self._meta(kind, round, client) | {
            "plan": _plan(plan),
            "digest": self.digest(kind, round, client, plan),
            "fingerprint": self.spec.fingerprint,
            "scale": float(adapter.scale),
            "rounds": state.rounds,
        }
        return pack(meta, tensors)

    def open_request(self, frame: bytes) -> Request:
        """Read on the client; Refused where the frame is not of this run or the base model differs."""
        meta, tensors = unpack(frame)
        kind, round, rounds, client, told, theirs, scale, numerics, digest = _fields(
            meta, kind=str, round=int, rounds=int, client=str, plan=dict, fingerprint=str, scale=float, numerics=dict,
            digest=str,
        )  # fmt: skip
        if meta.get("run") != self.run or kind not in ("train", "evaluate"):
            raise Refused(f"a {kind!r} frame of run {meta.get('run')!r} came to run {self.run!r}")
        if theirs != self.spec.fingerprint:
            raise Refused(f"the server's base model {theirs} is not this client's {self.spec.fingerprint}")
        if not math.isfinite(scale):
            raise Refused(f"the scale must be finite, got {scale}")
        width, learn, up, down, own, since, returns, private, passes = _fields(
            told, width=int, learn=str, up=str, down=str, own=str, since=int, returns=dict, private=int, passes=list
        )
        if len(passes) != 2 or not all(type(n) is float and math.isfinite(n) for n in passes):
            raise Refused(f"passes must be two finite numbers, got {passes!r}")
        select = None if told.get("select") is None else _fields(told, select=int)[0]
        returns = {name: _return(name, value) for name, value in returns.items()}
        train, frozen = (self._ids(tensors.pop(f"plan.{name}", None), width) for name in ("train", "frozen"))
        arrays = {n[len("arrays.") :]: tensors.pop(n) for n in list(tensors) if n.startswith("arrays.")}
        try:
            plan = Plan(
                train, frozen, learn, up, down, own, select, since, arrays, returns, private, (passes[0], passes[1])
            )
        except ValueError as error:
            raise Refused(f"not a plan: {error}") from None
        if self.digest(kind, round, client, plan) != digest:
            raise Refused("the plan does not fit its digest")
        base = increments.read(tensors, self.spec, scale)
        adapter = self._read(tensors, plan.present, plan.sent, self.start, scale)
        return Request(kind, round, rounds, client, plan, adapter, base, numerics, digest)

    # ---- client to server

    def update(self, request: Request, update: Update) -> bytes:
        """The client's frame: of its trained components, what the plan sends up."""
        if request.plan.select is None:
            planned = {name: ids for name, ids in request.plan.train.items() if len(ids)}
            found = update.adapter.ids
            if planned.keys() != found.keys() or not all(np.array_equal(found[n], i) for n, i in planned.items()):
                raise ValueError("the update has other components than the plan trains")
        up = update.adapter.only(request.plan.up)
        tensors = self._write(up, request.adapter, "up", "update", request.round, request.client)
        if request.plan.select is not None:
            tensors["ids"] = self._bits(update.adapter.ids, request.plan.width)
        tensors |= {f"arrays.{name}": np.asarray(array) for name, array in update.arrays.items()}
        meta = self._meta("update", request.round, request.client) | {
            "digest": request.digest,
            "examples": update.examples,
            "metrics": dict(update.metrics),
        }
        return pack(meta, tensors)

    def evaluation(self, request: Request, metrics: Mapping[str, float]) -> bytes:
        """The client's answer to an evaluation."""
        meta = self._meta("evaluation", request.round, request.client)
        return pack(meta | {"digest": request.digest, "metrics": dict(metrics)}, {})

    def error(self, round: int, client: ClientId, digest: str, text: str) -> bytes:
        """The client's word that it could not do its work."""
        return pack(self._meta("error", round, client) | {"digest": digest, "error": text[:400]}, {})

    def open_reply(
        self, frame: bytes, kind: Kind, round: int, client: ClientId, plan: Plan, reference: Adapter
    ) -> Reply:
        """Read on the server; Refused unless it answers exactly this request.

        reference: what this client received, to which low-precision values are differences.
        """
        meta, tensors = unpack(frame)
        got = tuple(_fields(meta, run=str, round=int, client=str, digest=str))
        digest = self.digest(kind, round, client, plan)
        if got != (self.run, round, client, digest):
            raise Refused(f"an answer to run, round, client, plan {got}, not to {(self.run, round, client, digest)}")
        numerics = meta.get("numerics")
        if not isinstance(numerics, dict):
            raise Refused("the reply has no numerics record")
        size = sizes(frame)
        if meta.get("kind") == "error" and not tensors:
            return Reply(None, {}, "".join(c for c in str(meta.get("error"))[:400] if c.isprintable()), numerics, size)
        expected = "update" if kind == "train" else "evaluation"
        if meta.get("kind") != expected:
            raise Refused(f"a frame of kind {meta.get('kind')!r} where {expected!r} was asked for")
        metrics = _metrics(meta.get("metrics"))
        if kind == "evaluate":
            if tensors:
                raise Refused(f"an evaluation carries no tensors, this one has {sorted(tensors)}")
            return Reply(None, metrics, None, numerics, size)
        examples = meta.get("examples")
        if type(examples) is not int or not 0 < examples < 1 << 53:
            raise Refused(f"examples must be a positive whole number, got {examples!r}")
        arrays = {n[len("arrays.") :]: tensors.pop(n) for n in list(tensors) if n.startswith("arrays.")}
        found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        if found != dict(plan.returns):
            raise Refused(f"arrays {found} came back, asked for were {dict(plan.returns)}")
        ids = dict(plan.train)
        if plan.select is not None:
            ids = self._chosen(tensors.pop("ids", None), plan)
        adapter = self._read(tensors, ids, plan.up, reference, reference.scale)
        return Reply(Update(adapter, examples, metrics, arrays), metrics, None, numerics, size)

    def digest(self, kind: Kind, round: int, client: ClientId, plan: Plan) -> str:
        """A short hash by which a reply names the request it answers."""
        state = hashlib.blake2b(digest_size=8)
        state.update(json.dumps([self.run, kind, round, client, _plan(plan)], sort_keys=True).encode())
        for ids in (plan.train, plan.frozen):
            state.update(self._bits(ids, plan.width).tobytes() + b"|")
        for name, array in sorted(plan.arrays.items()):
            state.update(f"{name}{array.dtype}{array.shape}".encode(errors="surrogatepass") + array.tobytes())
        return state.hexdigest()

    # ---- parts of a frame

    def _meta(self, kind: str, round: int, client: ClientId) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": kind, "run": self.run, "round": round, "client": client,
                "dtype": self.dtype, "numerics": dict(self.numerics)}  # fmt: skip

    def _bits(self, ids: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        """Id sets as bits: one row of `width` bits per module, packed without padding between rows."""
        grid = np.zeros((len(self.spec.modules), width), bool)
        sets = {at: ids[m.name] for at, m in enumerate(self.spec.modules) if len(ids.get(m.name, ()))}
        if sets:
            grid[np.repeat(list(sets), list(map(len, sets.values()))), np.concatenate(list(sets.values()))] = True
        return np.packbits(grid)

    def _ids(self, bits: np.ndarray | None, width: int) -> dict[str, np.ndarray]:
        if bits is None:
            return {}
        count = len(self.spec.modules)
        if not 0 < width <= MAX_WIDTH or bits.dtype != np.uint8 or bits.shape != (math.ceil(width * count / 8),):
            raise Refused(f"component ids {bits.dtype}{list(bits.shape)} do not fit {count} modules of {width}")
        grid = np.unpackbits(bits, count=width * count).reshape(count, width)
        return {m.name: np.flatnonzero(row) for m, row in zip(self.spec.modules, grid, strict=True) if row.any()}

    def _chosen(self, bits: np.ndarray | None, plan: Plan) -> dict[str, np.ndarray]:
        if bits is None:
            raise Refused("the ids of the chosen components are missing")
        ids = self._ids(bits, plan.width)
        extra = {name: i for name, i in ids.items() if np.setdiff1d(i, plan.train.get(name, [])).size}
        count = sum(map(len, ids.values()))
        assert plan.select is not None
        if extra or count > plan.select:
            raise Refused(
                f"{count} components came back ({sorted(extra)} not planned), asked for were at most {plan.select}"
            )
        return ids

    def _write(self, adapter: Adapter, reference: Adapter, *address: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name, chunks, lengths in self._flat(adapter):
            if self.dtype in EXACT:
                tensors[name] = [chunk.astype(DTYPES[self.dtype], copy=False) for chunk in chunks]
                continue
            values = np.concatenate([chunk.reshape(-1) for chunk in chunks])
            finite({name: values})  # before infinity is clipped
            values -= self._reference(name, adapter.ids, reference, values.size)
            generator = rng(self.seed, "rounding", *address, name)
            tensors |= encode(name, values, lengths, self.dtype, generator)
        return tensors

    def _read(
        self, tensors: dict[str, np.ndarray], ids: Mapping[str, np.ndarray], factors: str, reference: Adapter,
        scale: float,
    ) -> Adapter:  # fmt: skip
        """The adapter of exactly these components and factors; Refused where a tensor is missing, extra or odd."""
        ids = {m.name: np.asarray(ids[m.name]) for m in self.spec.modules if len(ids.get(m.name, ()))}
        if unknown := set(factors) - set("BeAh"):
            raise Refused(f"unknown factors {sorted(unknown)}")
        lengths = {f: self._lengths(f, ids) for f in FACTORS if f in factors and f in self.start.factors and ids}
        flat: dict[str, np.ndarray] = {}
        shapes = self.start.dense if "h" in factors else {}
        every = lengths | {f"h.{name}": _rows(tensor.shape) for name, tensor in shapes.items()}
        for name, rows in every.items():
            with np.errstate(over="ignore"):
                flat[name] = found = decode(name, tensors, rows, self.dtype)
                if self.dtype == "f32":
                    continue
                if self.dtype not in EXACT:
                    found += self._reference(name, ids, reference, found.size)
                if not np.isfinite(found.astype(np.float32)).all():  # adapters are float32, whatever travels
                    raise Refused(f"tensor {name!r} decodes to NaN or infinity")
        names = set(every) | ({f"{name}.scale" for name in every} if self.dtype == "int8" else set())
        if extra := set(tensors) - names:
            raise Refused(f"tensors {sorted(extra)} were not asked for")
        blocks = {}
        counts = {name: len(i) for name, i in ids.items()}
        pieces = {f: split(flat[f], (self._vector(f, n) * r for n, r in counts.items())) for f in lengths}
        for at, (name, i) in enumerate(ids.items()):
            part = {f: pieces[f][at] for f in lengths}
            blocks[name] = Block.of(i, {f: p if f == "e" else p.reshape(len(i), -1) for f, p in part.items()})
        dense = {name: flat[f"h.{name}"].reshape(tensor.shape) for name, tensor in shapes.items()}
        return Adapter(blocks, scale, dense)

    def _vector(self, factor: str, module: str) -> int:
        """Numbers per component."""
        out, in_ = self.spec.shapes[module]
        return {"B": out, "e": 1, "A": in_}[factor]

    def _lengths(self, factor: str, ids: Mapping[str, np.ndarray]) -> np.ndarray:
        """The lengths of the rows that a flat factor is made of: one per component; e is one row per module."""
        if factor == "e":
            return np.array([len(i) for i in ids.values()])
        shapes = self.spec.shapes
        side = 0 if factor == "B" else 1
        return np.repeat([shapes[name][side] for name in ids], [len(i) for i in ids.values()])

    def _flat(self, adapter: Adapter) -> list[tuple[str, list[np.ndarray], np.ndarray]]:
        """Each tensor of the frame: its name, its pieces in order, and the lengths of its rows."""
        ordered = {m.name: adapter.blocks[m.name] for m in self.spec.modules if m.name in adapter.blocks}
        ids = {name: block.ids for name, block in ordered.items()}
        result, rows = [], [block.rows for block in ordered.values()]
        for f in FACTORS:
            if parts := [present[f] for present in rows if f in present]:
                result.append((f, parts, self._lengths(f, ids)))
        for name, tensor in adapter.dense.items():
            result.append((f"h.{name}", [tensor.reshape(-1)], _rows(tensor.shape)))
        return result

    def _reference(self, name: str, ids: Mapping[str, np.ndarray], reference: Adapter, size: int) -> np.ndarray:
        """What the other end holds of this tensor, flat; zeros for components that it does not hold."""
        if name.startswith("h."):
            held = reference.dense.get(name[2:], self.start.dense.get(name[2:]))
            return np.zeros(size, np.float32) if held is None else held.reshape(-1)
        parts = []
        for module in self.spec.modules:
            wanted = ids.get(module.name, np.empty(0, int))
            part = np.zeros((len(wanted), self._vector(name, module.name)), np.float32)
            for adapter in (self.start, reference):
                block = adapter.blocks.get(module.name)
                if block is None or name not in block.rows:
                    continue
                rows = block.rows[name].reshape(block.rank, -1)
                _, mine, theirs = np.intersect1d(wanted, block.ids, assume_unique=True, return_indices=True)
                part[mine] = rows[theirs]
            parts.append(part.reshape(-1))
        return np.concatenate(parts)


def _rows(shape: tuple[int, ...]) -> np.ndarray:
    """Row lengths of a dense tensor: its last axis; a vector is one row."""
    return np.full(math.prod(shape[:-1]), shape[-1]) if shape else np.array([1])


def _plan(plan: Plan) -> dict[str, Any]:
    """The plan's JSON-able part; its ids and arrays travel as tensors."""
    returns = {name: [kind, list(shape)] for name, (kind, shape) in plan.returns.items()}
    return {"learn": plan.learn, "up": plan.up, "down": plan.down, "own": plan.own, "select": plan.select,
            "since": plan.since, "width": plan.width, "returns": returns, "private": plan.private,
            "passes": list(plan.passes)}  # fmt: skip


def _fields(record: Mapping[str, Any], **kinds: type) -> list[Any]:
    """These fields of a JSON object; Refused where one is missing or of another type."""
    for name, kind in kinds.items():
        if type(record.get(name)) is not kind:
            raise Refused(f"field {name!r} must be of type {kind.__name__}, got {record.get(name)!r}")
    return [record[name] for name in kinds]


def _return(name: str, value: Any) -> tuple[str, tuple[int, ...]]:
    match value:
        case [str(kind), [*shape]] if all(type(size) is int for size in shape):
            return kind, tuple(shape)
    raise Refused(f"array {name!r} must come back as a dtype and a shape, got {value!r}")


def _metrics(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, dict) or len(metrics) > 64:
        raise Refused("metrics must be a small object of numbers")
    for name, value in metrics.items():
        low, high = RANGES.get(name, (-MAX_METRIC, MAX_METRIC))
        if type(value) not in (int, float) or not low <= value <= high:  # NaN included; sums stay finite
            raise Refused(f"metric {name[:80]!r} must be a finite number from {low:g} to {high:g}, got {value!r}")
    return {name: float(value) for name, value in metrics.items()}
