"""The wire: plans, adapters and updates as frames; the reader checks everything."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from fedrank import increments
from fedrank.adapter import Adapter
from fedrank.frame import SCHEMA, Dtype, Refused, Sizes, pack, printable, sizes, spoken, unpack
from fedrank.layout import Layout
from fedrank.protocol import ClientId, ModelSpec, Passes, Plan, State, Update, rng
from fedrank.trace import span

MAX_METRIC = 1e30
RANGES = {
    "accuracy": (0.0, 1.0),
    "majority": (0.0, 1.0),
    "perplexity": (1.0, MAX_METRIC),
    "choice_accuracy": (0.0, 1.0),
    "choice_accuracy_per_byte": (0.0, 1.0),
    "exact_match": (0.0, 1.0),
    "bleu": (0.0, 100.0),
    "rouge_l": (0.0, 1.0),
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
    """What a client reads from the server's frame, and the schema in which it answers.

    base_updates: all that hold by round, None for one sent before.
    """

    kind: Kind
    round: int
    rounds: int
    client: ClientId
    plan: Plan
    adapter: Adapter
    base_updates: Mapping[int, Adapter | None]
    numerics: Mapping[str, Any]
    digest: str
    schema: int


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

    start: the adapter as ``begin`` made it. schemas: those that clients speak, as they register; the newest where none is.
    """

    spec: ModelSpec
    start: Adapter
    dtype: Dtype
    run: str
    seed: int
    numerics: Mapping[str, Any] = field(default_factory=dict)
    schemas: dict[ClientId, int] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.spec, self.start, self.dtype)

    # ---- server to client

    @span("wire")
    def request(self, kind: Kind, client: ClientId, plan: Plan, state: State) -> bytes:
        """The server's frame for the round after `state`: the plan, and what of the adapter travels by it."""
        round, adapter = state.round + 1, state.adapter
        sent = adapter.take(plan.present).only(plan.sent)
        draw = partial(rng, self.seed, "rounding", "down", kind, round, client)
        tensors = self.layout.write(sent, self.start, draw)
        for name, ids in (("plan.train", plan.train), ("plan.frozen", plan.frozen)):
            if any(map(len, ids.values())):
                tensors[name] = self.layout.bits(ids, plan.width)
        tensors |= {f"arrays.{name}": array for name, array in plan.arrays.items()}
        tensors |= increments.write(state.base_updates, plan.since, self.spec)
        meta = self._meta(kind, round, client, self.schemas.get(client, SCHEMA)) | {
            "plan": _plan(plan),
            "digest": self.digest(kind, round, client, plan),
            "fingerprint": self.spec.fingerprint,
            "scale": float(adapter.scale),
            "rounds": state.rounds,
        }
        return pack(meta, tensors)

    @span("wire")
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
        if len(passes) != 2 or not all(type(n) is float and 0 <= n < math.inf for n in passes):
            raise Refused(f"passes must be two finite numbers of at least 0, got {passes!r}")
        select = None if told.get("select") is None else _fields(told, select=int)[0]
        returns = {name: _return(name, value) for name, value in returns.items()}
        train, frozen = (self.layout.ids(tensors.pop(f"plan.{name}", None), width) for name in ("train", "frozen"))
        arrays = {n[len("arrays.") :]: tensors.pop(n) for n in list(tensors) if n.startswith("arrays.")}
        try:
            plan = Plan(train, frozen, learn, up, down, own, select, since, arrays, returns, private, Passes(*passes))
        except ValueError as error:
            raise Refused(f"not a plan: {error}") from None
        if self.digest(kind, round, client, plan) != digest:
            raise Refused("the plan does not fit its digest")
        base = increments.read(tensors, self.spec, scale)
        if base and not 0 <= min(base) <= max(base) < round:
            raise Refused(f"base updates of rounds {min(base)} to {max(base)} came in round {round}")
        adapter = self.layout.read(tensors, plan.present, plan.sent, self.start, scale)
        return Request(kind, round, rounds, client, plan, adapter, base, numerics, digest, spoken(meta))

    # ---- client to server

    @span("wire")
    def update(self, request: Request, update: Update) -> bytes:
        """The client's frame: of its trained components, what the plan sends up."""
        if request.plan.select is None:
            planned = {name: ids for name, ids in request.plan.train.items() if len(ids)}
            found = update.adapter.ids
            if planned.keys() != found.keys() or not all(np.array_equal(found[n], i) for n, i in planned.items()):
                raise ValueError("the update has other components than the plan trains")
        up = update.adapter.only(request.plan.up)
        draw = partial(rng, self.seed, "rounding", "up", "update", request.round, request.client)
        tensors = self.layout.write(up, request.adapter, draw)
        if request.plan.select is not None:
            tensors["ids"] = self.layout.bits(update.adapter.ids, request.plan.width)
        tensors |= {f"arrays.{name}": np.asarray(array) for name, array in update.arrays.items()}
        meta = self._answer("update", request) | {"examples": update.examples, "metrics": dict(update.metrics)}
        return pack(meta, tensors)

    @span("wire")
    def evaluation(self, request: Request, metrics: Mapping[str, float]) -> bytes:
        """The client's answer to an evaluation."""
        return pack(self._answer("evaluation", request) | {"metrics": dict(metrics)}, {})

    def error(self, request: Request, text: str) -> bytes:
        """The client's word that it could not do its work."""
        return pack(self._answer("error", request) | {"error": text[:400]}, {})

    @span("wire")
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
            return Reply(None, {}, printable(str(meta.get("error"))[:400]), numerics, size)
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
        # Copied: a method may remember them for as long as the run goes, and a view would hold the whole frame.
        arrays = {n[len("arrays.") :]: tensors.pop(n).copy() for n in list(tensors) if n.startswith("arrays.")}
        found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        if found != dict(plan.returns):
            raise Refused(f"arrays {found} came back, asked for were {dict(plan.returns)}")
        ids = dict(plan.train)
        if plan.select is not None:
            ids = self._chosen(tensors.pop("ids", None), plan)
        adapter = self.layout.read(tensors, ids, plan.up, reference, reference.scale)
        return Reply(Update(adapter, examples, metrics, arrays), metrics, None, numerics, size)

    def digest(self, kind: Kind, round: int, client: ClientId, plan: Plan) -> str:
        """A short hash by which a reply names the request it answers."""
        state = hashlib.blake2b(digest_size=8)
        state.update(json.dumps([self.run, kind, round, client, _plan(plan)], sort_keys=True).encode())
        for ids in (plan.train, plan.frozen):
            state.update(self.layout.bits(ids, plan.width).tobytes() + b"|")
        for name, array in sorted(plan.arrays.items()):
            state.update(f"{name}{array.dtype}{array.shape}".encode(errors="surrogatepass") + array.tobytes())
        return state.hexdigest()

    # ---- parts of a frame

    def _answer(self, kind: Kind, request: Request) -> dict[str, Any]:
        return self._meta(kind, request.round, request.client, request.schema) | {"digest": request.digest}

    def _meta(self, kind: Kind, round: int, client: ClientId, schema: int) -> dict[str, Any]:
        return {"schema": schema, "kind": kind, "run": self.run, "round": round, "client": client,
                "dtype": self.dtype, "numerics": dict(self.numerics)}  # fmt: skip

    def _chosen(self, bits: np.ndarray | None, plan: Plan) -> dict[str, np.ndarray]:
        if bits is None:
            raise Refused("the ids of the chosen components are missing")
        ids = self.layout.ids(bits, plan.width)
        extra = {name: i for name, i in ids.items() if np.setdiff1d(i, plan.train.get(name, [])).size}
        count = sum(map(len, ids.values()))
        assert plan.select is not None
        if extra or count > plan.select:
            raise Refused(
                f"{count} components came back ({sorted(extra)} not planned), asked for were at most {plan.select}"
            )
        return ids


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
