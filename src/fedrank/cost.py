"""What a plan costs a client: parameters, bytes, FLOPs, memory, seconds and joules, predicted before anything runs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from fedrank.adapter import Adapter
from fedrank.frame import CHECKSUM, DTYPES, HEADER, Dtype, Sizes
from fedrank.increments import after
from fedrank.protocol import Device, Linear, Load, ModelSpec, Plan

NUMBER = 4  # bytes: adapters and their optimizer are float32
LOGIT = 12  # bytes beside the logit itself: its log-softmax, and the gradients on both sides of that, in float32


def factors(adapter: Adapter, sent: str, ranks: Mapping[str, int], dtype: Dtype) -> int:
    """Bytes of the factors in `sent` of so many components per module; shapes and form from `adapter`.

    A component is out + 1 + in numbers (B column, e, A row); int8 adds an f32 scale per vector, one
    per module for e.
    """
    size, scale = np.dtype(DTYPES[dtype]).itemsize, 4 if dtype == "int8" else 0
    total = 0
    for name, rank in ranks.items():
        for f, rows in adapter.blocks[name].rows.items():
            if f in sent and rank:
                total += rank * math.prod(rows.shape[1:]) * size + scale * (1 if f == "e" else rank)
    return total


def dense(adapter: Adapter, sent: str, dtype: Dtype) -> int:
    """Bytes of the dense tensors; int8 adds an f32 scale per row."""
    if "h" not in sent:
        return 0
    size, scale = np.dtype(DTYPES[dtype]).itemsize, 4 if dtype == "int8" else 0
    return sum(t.size * size + scale * math.prod(t.shape[:-1]) for t in adapter.dense.values())


def block_flops(spec: ModelSpec) -> tuple[float, float]:
    """Forward FLOPs of one transformer block (the mean over blocks): per token, and per pair of tokens (attention)."""
    linear = sum(2.0 * map.out * map.in_ for map in spec.flow if 0 <= map.block < spec.blocks)
    return linear / spec.blocks, 4.0 * spec.attention.width


def down(adapter: Adapter, plan: Plan, modules: int, dtype: Dtype, base: Mapping[int, Adapter] | None = None) -> Sizes:
    """Bytes of the request by which this plan travels, for a model of so many adapted modules.

    base: the base updates that hold (`State.base_updates`), of which it takes along what the client lacks, in f32.
    """
    body, head = factors(adapter, plan.sent, _ranks(plan.present), dtype), dense(adapter, plan.sent, dtype)
    ids = sum(math.ceil(modules * plan.width / 8) for part in (plan.train, plan.frozen) if any(map(len, part.values())))
    arrays = sum(array.nbytes for array in plan.arrays.values())
    base = base or {}
    lacking = after(base, plan.since).values()
    for update in lacking:
        body += 4 * sum(
            b.rank * (b.B.shape[0] + b.A.shape[1])
            for b in update.blocks.values()
            if b.B is not None and b.A is not None
        )
        body += 4 * sum(tensor.size for tensor in update.dense.values())
    rounds = 8 * len(base) + 4 * modules * len(lacking)  # which round each is of; its rank in every module
    return Sizes(body, head, HEADER + body + head + ids + arrays + rounds + CHECKSUM)


def up(adapter: Adapter, plan: Plan, modules: int, dtype: Dtype) -> Sizes:
    """Bytes of the update that answers this plan (where it selects: of the components given in `adapter`)."""
    return _up(adapter, plan, modules, dtype, plan.train if plan.select is None else adapter.ids)


def most_up(spec: ModelSpec, adapter: Adapter, plan: Plan, dtype: Dtype) -> Sizes:
    """Bytes of the update that answers this plan; where it selects, of the longest answer that it allows."""
    chosen, left = dict[str, np.ndarray](), plan.select
    for name in sorted(plan.train, key=lambda name: -factors(adapter, plan.up, {name: 1}, dtype)):
        chosen[name] = plan.train[name][:left]
        left = None if left is None else left - len(chosen[name])
    return _up(adapter, plan, len(spec.modules), dtype, chosen)


def _up(adapter: Adapter, plan: Plan, modules: int, dtype: Dtype, chosen: Mapping[str, np.ndarray]) -> Sizes:
    ranks = {name: len(ids) for name, ids in chosen.items()}
    body, head = factors(adapter, plan.up, ranks, dtype), dense(adapter, plan.up, dtype)
    ids = 0 if plan.select is None else math.ceil(modules * plan.width / 8)
    arrays = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in plan.returns.values())
    return Sizes(body, head, HEADER + body + head + ids + arrays + CHECKSUM)


# ---- what training goes through


@dataclass(frozen=True)
class _Stage:
    """Maps that read the same input. needs: that input needs a gradient, as something before it learns."""

    maps: tuple[Linear, ...]
    needs: bool


@dataclass(frozen=True)
class _Part:
    """Components of one module, by number. learn: which of "BeA" do."""

    rank: int
    learn: str = ""


def _stages(spec: ModelSpec, plan: Plan, forms: str) -> Iterator[_Stage]:
    needs = False
    for _, maps in groupby(spec.flow, key=lambda map: (map.block, map.stage)):
        stage = _Stage(tuple(maps), needs)
        yield stage
        needs = needs or any(_learns(map, spec, plan, forms) for map in stage.maps)


def _forms(start: Adapter) -> str:
    """The factors that a method's components have."""
    return start.factors.removesuffix("h")


def _parts(map: Linear, plan: Plan, forms: str) -> list[_Part]:
    train, frozen = (len(ids.get(map.name, ())) for ids in (plan.train, plan.frozen))
    learn = "".join(f for f in plan.learn if f in forms)
    parts = [_Part(train, learn), _Part(frozen), _Part(plan.private if train else 0, "BA")]
    return [part for part in parts if part.rank]


def _is_head(map: Linear, spec: ModelSpec, plan: Plan) -> bool:
    return "h" in plan.learn and f"{map.name}.weight" in spec.dense


def _learns(map: Linear, spec: ModelSpec, plan: Plan, forms: str) -> bool:
    return _is_head(map, spec, plan) or any(part.learn for part in _parts(map, plan, forms))


def _attends(stage: _Stage, spec: ModelSpec, plan: Plan, forms: str) -> tuple[bool, ...]:
    """Whether query, key and value, as this stage makes them, need gradients."""
    learn = {map.role for map in stage.maps if _learns(map, spec, plan, forms)}
    return tuple(stage.needs or bool(learn & {role, "fused"}) for role in ("query", "key", "value"))


def flops(spec: ModelSpec, start: Adapter, plan: Plan, load: Load) -> tuple[float, float]:
    """FLOPs of the forward and of the backward passes of one round of a client's training: its matrix products.

    Backward makes no weight gradients of the frozen base and stops below the lowest map that learns: input
    gradients only where something before the map learns, attention's only for those of Q, K and V that need them.
    The optimizer and element-wise work are left out. start: any adapter of the method, for its factors.
    """
    forms, forward, backward = _forms(start), 0, 0
    again = 0  # what checkpointing computes a second time: the blocks that learn, or pass gradients on
    for stage in _stages(spec, plan, forms):
        before, inside = forward, 0 <= stage.maps[0].block < spec.blocks
        for map in stage.maps:
            count = 2 * (load.rows if map.rows else load.tokens)
            weight = count * map.out * map.in_
            forward += weight
            backward += weight * (stage.needs + _is_head(map, spec, plan))
            parts = _parts(map, plan, forms)
            forward += sum(count * part.rank * (map.out + map.in_) for part in parts)
            for part in parts:
                hidden = stage.needs or bool(set(part.learn) & set("eA"))  # A x needs a gradient
                backward += count * part.rank * map.out * (("B" in part.learn) + hidden)
                backward += count * part.rank * map.in_ * (("A" in part.learn) + stage.needs)
        if any(map.role for map in stage.maps):
            product, (q, k, v) = 2 * load.pairs * spec.attention.width, _attends(stage, spec, plan, forms)
            forward += 2 * product
            backward += product * (v + (q or k) + q + k)
        if inside and spec.execution.checkpoint and stage.maps[0].block >= _lowest(spec, plan, forms):
            again += forward - before
    return (forward + again) * plan.passes.forward, backward * plan.passes.backward


def _lowest(spec: ModelSpec, plan: Plan, forms: str) -> int:
    """The lowest block in which something learns; their number where nothing does."""
    return min(
        (map.block for map in spec.flow if map.block >= 0 and _learns(map, spec, plan, forms)), default=spec.blocks
    )


def trainable(spec: ModelSpec, start: Adapter, plan: Plan) -> int:
    """The numbers that learn by this plan: components, the client's private ones, and the head."""
    forms, dense = _forms(start), sum(tensor.size for tensor in spec.dense.values())
    learn = "".join(f for f in plan.learn if f in forms)
    own = _numbers(spec, dict.fromkeys((n for n, ids in plan.train.items() if len(ids)), plan.private), "BA")
    return _numbers(spec, _ranks(plan.train), learn) + own + ("h" in plan.learn) * dense


def _ranks(ids: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: len(i) for name, i in ids.items()}


def _numbers(spec: ModelSpec, ranks: Mapping[str, int], factors: str) -> int:
    sizes = {name: {"B": out, "e": 1, "A": in_} for name, (out, in_) in spec.shapes.items()}
    return sum(rank * sizes[name][f] for name, rank in ranks.items() for f in factors)


def peak_memory(spec: ModelSpec, start: Adapter, plan: Plan, load: Load) -> int:
    """Bytes that training holds at its peak: the largest batch's backward pass, about to begin.

    The base, the head and the components; a gradient and AdamW's two moments of all that learns, and where activations
    are of a lower type a copy of both in it; and the activations that backward needs, which are those above the lowest map
    that learns, or, where a step is differentiated twice, as they were counted. Base updates, and components folded into the base, are
    reckoned as merged in place. Left out: dropout's masks, the gradients on their way, and what the runtime itself takes.
    """
    forms, how, learn = _forms(start), spec.execution, trainable(spec, start, plan)
    base = NUMBER * spec.parameters if how.base_bytes is None else how.base_bytes
    held = sum(tensor.size for tensor in spec.dense.values())
    held += sum(_numbers(spec, _ranks(ids), forms) for ids in (plan.train, plan.frozen))
    held += _numbers(spec, dict.fromkeys((n for n, ids in plan.train.items() if len(ids)), plan.private), "BA")
    copies = how.number * (held + learn) if how.number < NUMBER else 0
    return base + NUMBER * (held + 3 * learn) + copies + math.ceil(_activations(spec, plan, load, forms))


def _activations(spec: ModelSpec, plan: Plan, load: Load, forms: str) -> float:
    """Bytes that the backward pass of the largest batch needs, beside parameters."""
    how, kept, enters, logits = spec.execution, dict[int, float](), dict[int, float](), 0.0
    for stage in _stages(spec, plan, forms):
        first = stage.maps[0]
        kept[first.block] = kept.get(first.block, 0.0) + _kept(stage, spec, plan, load, forms)
        enters.setdefault(first.block, how.number * load.peak_tokens * first.in_)
        read = [map.out for map in stage.maps if map.rows and (stage.needs or _learns(map, spec, plan, forms))]
        logits += load.peak_rows * sum(read)
    if how.twice is not None:
        token, pair, row, rest = how.twice
        return token * load.peak_tokens + pair * load.peak_pairs + row * load.peak_rows + rest + LOGIT * logits
    at_head = (how.number + LOGIT) * logits
    if not how.checkpoint:
        return sum(kept.values()) + at_head
    learning = [block for block in kept if _lowest(spec, plan, forms) <= block < spec.blocks]
    # One block's are all there when its backward pass begins, and the gradients of its widest maps come beside them.
    widest = max(sum(map.out for map in stage.maps if not map.rows) for stage in _stages(spec, plan, forms))
    largest = max((kept[block] for block in learning), default=0.0) + how.number * load.peak_tokens * widest
    kept |= {block: enters[block] for block in learning}
    return sum(kept.values()) + max(at_head, largest + how.number * logits)  # one block at a time is there once more


def _kept(stage: _Stage, spec: ModelSpec, plan: Plan, load: Load, forms: str) -> float:
    """Bytes that backward needs of one stage."""
    total, number = 0.0, spec.execution.number
    maps = [(map, _parts(map, plan, forms)) for map in stage.maps if not map.rows]
    if any(_is_head(map, spec, plan) or any("A" in part.learn for part in parts) for map, parts in maps):
        total += number * load.peak_tokens * maps[0][0].in_
    for map, parts in maps:
        total += (
            number * load.peak_tokens * sum(part.rank * (("B" in part.learn) + ("e" in part.learn)) for part in parts)
        )
        if stage.needs or _learns(map, spec, plan, forms):
            total += load.peak_tokens * map.kept
    if any(map.role for map in stage.maps):
        q, k, v = _attends(stage, spec, plan, forms)
        total += number * load.peak_tokens * spec.attention.width * (q + k + (q or k))
        total += number * load.peak_pairs * spec.attention.heads * (q or k or v) * spec.execution.scores
    return total


# ---- all of it on a device


@dataclass(frozen=True)
class Cost:
    """What one round costs one client, on its device as it is then. parameters: those that learn; bytes: of whole frames."""

    device: Device
    parameters: int
    bytes_down: int
    bytes_up: int
    forward_flops: float
    backward_flops: float
    peak_memory_bytes: int
    forward_seconds: float
    backward_seconds: float
    download_seconds: float
    upload_seconds: float
    joules: float

    @property
    def seconds(self) -> float:
        """From the first byte down to the last byte up; nothing overlaps."""
        return self.download_seconds + self.forward_seconds + self.backward_seconds + self.upload_seconds

    @property
    def fits(self) -> bool:
        """Whether the device has the memory; where that is unknown it has."""
        return not self.peak_memory_bytes > self.device.memory_bytes > 0

    @property
    def metrics(self) -> dict[str, float]:
        """The clock's part, by the names that it has in an update's metrics and in the ledger."""
        return {
            "forward_seconds": self.forward_seconds, "backward_seconds": self.backward_seconds,
            "download_seconds": self.download_seconds, "upload_seconds": self.upload_seconds,
            "device_seconds": self.seconds, "device_joules": self.joules,
            "peak_memory_bytes": float(self.peak_memory_bytes),
        }  # fmt: skip

    def sent(self, bytes_up: int) -> "Cost":
        """The same work, its answer of so many bytes."""
        upload = bytes_up / self.device.up_bytes_per_second
        return replace(self, bytes_up=bytes_up, upload_seconds=upload).timed(
            self.forward_seconds, self.backward_seconds
        )

    def timed(self, forward_seconds: float, backward_seconds: float) -> "Cost":
        """The same work, its training timed otherwise; energy follows."""
        computing, moving = forward_seconds + backward_seconds, self.download_seconds + self.upload_seconds
        joules = self._joules(computing, moving)
        return replace(self, forward_seconds=forward_seconds, backward_seconds=backward_seconds, joules=joules)

    def stop(self, deadline: float | None) -> float | None:
        """When it ends without an answer: at the deadline, or, lacking the memory, once the request is there; else None."""
        deadline = math.inf if deadline is None else deadline
        if not self.fits:
            return min(self.download_seconds, deadline)
        return deadline if self.seconds > deadline else None

    def joules_by(self, seconds: float) -> float:
        """What it has taken so many seconds after its start, if it stops then."""
        ahead = max(min(seconds, self.seconds) - self.download_seconds, 0.0)
        computing = min(ahead, self.forward_seconds + self.backward_seconds)
        return self._joules(computing, min(seconds, self.seconds) - computing)

    def _joules(self, computing: float, moving: float) -> float:
        return self.device.busy_watts * computing + self.device.idle_watts * moving


def predict(
    spec: ModelSpec, start: Adapter, plan: Plan, load: Load, device: Device, bytes_down: int, bytes_up: int
) -> Cost:
    """What a round of this plan costs on this device, for frames of so many bytes.

    Joules: the busy watts while it computes, the idle watts while it transfers. ValueError names the device where
    one of its rates or powers is unknown.
    """
    for name in ("flops_per_second", "up_bytes_per_second", "down_bytes_per_second", "idle_watts", "busy_watts"):
        if not getattr(device, name) > 0:
            kind = f" ({device.kind})" if device.kind else ""
            raise ValueError(f"device {device.id!r}{kind}: {name} is {getattr(device, name)}, which means unknown")
    forward, backward = flops(spec, start, plan, load)
    untimed = Cost(
        device, trainable(spec, start, plan), bytes_down, bytes_up, forward, backward, peak_memory(spec, start, plan, load),
        0.0, 0.0, bytes_down / device.down_bytes_per_second, bytes_up / device.up_bytes_per_second, 0.0,
    )  # fmt: skip
    return untimed.timed(forward / device.flops_per_second, backward / device.flops_per_second)
