"""The client: one function from frame to frame; its memory is in its own store."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrank.adapter import FACTORS, Adapter, Block
from fedrank.protocol import Device, Fit, Job, Method, Plan
from fedrank.store import Private
from fedrank.wire import Refused, Request, Wire

MIN_TEST_ROWS = 5  # fewer say nothing about a client


@dataclass(frozen=True, eq=False)
class Site:
    """All that a client brings: what it is, its method, its wire, its private store, and how it computes.

    evaluate: adapter -> metrics on the client's own test rows; None where it has too few of them.
    session: entered for every frame, sets the worker's threads.
    """

    device: Device
    method: Method
    wire: Wire
    private: Private
    local: Any
    seed: int
    fit: Fit
    evaluate: Callable[[Adapter], dict[str, float]] | None
    session: Callable[[], AbstractContextManager[None]]


def handle(frame: bytes, site: Site) -> bytes:
    """Do what the frame asks and return the answer; what cannot be done is answered with an error frame.

    Refused is raised where the frame itself cannot be trusted: there is no one to answer.
    """
    request = site.wire.open_request(frame)
    if request.client != site.device.id:
        raise Refused(f"a frame for client {request.client!r} came to client {site.device.id!r}")
    with site.session():
        try:
            if request.kind == "evaluate":
                return site.wire.evaluation(request, _evaluate(request, site))
            return _train(request, site)
        except (RuntimeError, ValueError, ArithmeticError, OSError, MemoryError) as error:
            text = f"{type(error).__name__}: {error}"
            return site.wire.error(request.round, request.client, request.digest, text)


def _job(request: Request, site: Site) -> Job:
    kept = site.private.load(site.device.id, request.plan.since)
    adapter = _complete(request.adapter, request.plan, kept, site.wire.start)
    private = {name.split("/", 1)[1]: array for name, array in kept.items() if name.startswith("private/")}
    return Job(
        request.plan, request.round, request.rounds, site.wire.spec, adapter, private, site.local, site.device,
        site.seed, site.fit,
    )  # fmt: skip


def _train(request: Request, site: Site) -> bytes:
    job = _job(request, site)
    update = next(iter(site.method.train([job])))
    # What later requests will not carry is kept: the client's own factors as trained, others as received.
    later = "".join(f for f in "BeAh" if f not in request.plan.down)
    own = "".join(f for f in later if f in request.plan.own)
    received = "".join(f for f in later if f not in own)
    arrays = _pack(job.adapter, received) | _pack(update.adapter, "".join(f for f in own if f in request.plan.learn))
    arrays |= {f"private/{name}": array for name, array in update.private.items()}
    site.private.save(site.device.id, request.round, request.plan.since, arrays)
    return site.wire.update(request, update)


def _evaluate(request: Request, site: Site) -> dict[str, float]:
    if site.evaluate is None:
        return {"examples": 0}
    job = _job(request, site)
    adapt = getattr(site.method, "adapt", None)
    return site.evaluate(job.adapter if adapt is None else adapt(job))


def _pack(adapter: Adapter, factors: str) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, block in adapter.blocks.items():
        for f in FACTORS:
            factor = getattr(block, f)
            if f in factors and factor is not None:
                arrays |= {f"{f}/{name}": factor, f"ids/{name}": block.ids}
    if "h" in factors:
        arrays |= {f"h/{name}": tensor for name, tensor in adapter.dense.items()}
    return arrays


def _complete(adapter: Adapter, plan: Plan, kept: Mapping[str, np.ndarray], start: Adapter) -> Adapter:
    """The received adapter with the factors that did not travel, from the client's store, else as begun."""
    if all(f in plan.sent for f in "BeAh"):
        return adapter
    blocks: dict[str, Block] = {}
    for name, block in start.blocks.items():
        begun = Adapter({name: block}, start.scale, {})
        if f"ids/{name}" in kept:
            stored = Block(kept[f"ids/{name}"], *(kept.get(f"{f}/{name}") for f in FACTORS))
            common = {name: np.intersect1d(stored.ids, block.ids)}
            held = Adapter({name: stored}, start.scale, {}).take(common).fill(begun)
            begun = begun.without(common).union(held)
        blocks |= begun.blocks
    head = {n.split("/", 1)[1]: array for n, array in kept.items() if n.startswith("h/")}
    return adapter.fill(Adapter(blocks, start.scale, {**start.dense, **head}))
