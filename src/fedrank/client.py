"""The client: one function from frame to frame; its memory is in its own store."""

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedrank import privacy
from fedrank.adapter import Adapter, below, from_arrays, to_arrays
from fedrank.config import PrivacySettings
from fedrank.cost import Cost, up
from fedrank.frame import Refused
from fedrank.protocol import Device, Fit, Job, Method, Plan, Update
from fedrank.store import Private, StoreError
from fedrank.wire import Request, Wire

log = logging.getLogger(__name__)

MIN_TEST_ROWS = 5  # fewer say nothing about a client
STAYS = "the message stays with the client"


class Late(Exception):
    """This client would not answer within the deadline: nobody waits for it."""


class DeviceError(RuntimeError):
    """What was asked for is too much for this client's device."""


@dataclass(frozen=True, eq=False)
class Site:
    """All that a client brings: what it is, its method, its wire, its private store, and how it computes.

    evaluate: adapter, base updates, and whether the run ends here -> metrics on the client's own test rows; None where it
    has too few of them.
    session: entered for every frame, sets the worker's threads. cost: round, plan and bytes down -> what that round
    costs this client's device; None where no device is modelled. measured: its training is timed here instead. privacy:
    where it is local, nothing of the rows leaves this place unless it is clipped and noised. attack: what a simulated
    hostile client sends in the place of its update.
    """

    device: Device
    method: Method
    wire: Wire
    private: Private
    local: Any
    seed: int
    fit: Fit
    evaluate: Callable[[Adapter, tuple[Adapter, ...], bool], dict[str, float]] | None
    session: Callable[[], AbstractContextManager[None]]
    cost: Callable[[int, Plan, int], Cost] | None = None
    measured: bool = False
    privacy: PrivacySettings = PrivacySettings()
    attack: Callable[[Job, Update], Update] | None = None

    @property
    def withholds(self) -> bool:
        return self.privacy.kind == "local"


def handle(frame: bytes, site: Site, deadline: float | None = None) -> bytes:
    """Do what the frame asks and return the answer; what cannot be done is answered with an error frame.

    Refused is raised where the frame itself cannot be trusted: there is no one to answer. Late where the answer
    to a training request would take more than `deadline` seconds on the clock of this site's device.
    """
    request = site.wire.open_request(frame)
    if request.client != site.device.id:
        raise Refused(f"a frame for client {request.client!r} came to client {site.device.id!r}")
    with site.session():
        try:
            if request.kind == "evaluate":
                return site.wire.evaluation(request, _evaluate(request, site))
            return _train(request, site, len(frame), deadline)
        except Late:
            raise
        except Exception as error:  # whatever it is, the round goes on without this client, and says why
            where = traceback.extract_tb(error.__traceback__)[-1]
            # A device's limits are no fault.
            level = logging.INFO if isinstance(error, DeviceError) else logging.WARNING
            log.log(level, "client %s failed: %s: %s (%s, line %s)", request.client, type(error).__name__, error,
                    Path(where.filename).name, where.lineno)  # fmt: skip
            # Other libraries' messages may quote the client's own text, which must not leave it.
            ours = type(error).__module__.startswith("fedrank") and not site.withholds
            lost = isinstance(error, StoreError)  # the server then begins anew with this client
            kind = "Error" if site.withholds and not lost else type(error).__name__
            said = str(error).replace(str(site.private.root), "the client's store")  # where that is stays here too
            text = f"{kind}: {said if ours else STAYS}"
            return site.wire.error(request, text)


def _train(request: Request, site: Site, size: int, deadline: float | None) -> bytes:
    kept = _load(request, site)
    job = _job(request, site, kept)
    selects = request.plan.select is not None  # then it may answer with fewer components than it might
    # Nothing is trained that the memory would not hold, or, where the seconds are known beforehand, nobody would wait for.
    until = None if site.measured or selects else deadline
    cost = None if site.cost is None else _answering(site.cost(request.round, request.plan, size), until)
    started = time.perf_counter()
    update = next(iter(site.method.train([job])))
    if cost is not None:
        if site.measured:
            seconds = time.perf_counter() - started
            forward = update.metrics.get("forward_seconds", 0.0)
            cost = cost.timed(forward, seconds - forward)
        if selects:
            wire = site.wire
            cost = cost.sent(up(update.adapter, request.plan, len(wire.spec.modules), wire.dtype).frame)
        update = replace(update, metrics={**update.metrics, **_answering(cost, deadline).metrics})
    arrays = _keep(job, update, kept, site.wire.start)
    arrays |= {f"private/{name}": array for name, array in update.private.items()}
    site.private.save_base({round: update for round, update in request.base_updates.items() if update is not None})
    # Even an empty version is written where later rounds will ask for one, so that a lost one is missed.
    needed = arrays or _staying(request.plan, site.wire.start)
    site.private.save(site.device.id, request.round, request.plan.since, arrays if needed else None)
    if site.withholds:
        key = site.private.key(site.device.id)
        update = privacy.withheld(update, job.adapter, request.plan, site.privacy, key, request.round)
    return site.wire.update(request, update if site.attack is None else site.attack(job, update))


def _answering(cost: Cost, deadline: float | None) -> Cost:
    """The cost, where the device has the memory and answers within the deadline."""
    if cost.stop(deadline) is None:
        return cost
    if cost.fits:
        raise Late(f"{cost.seconds:.3g} s, with a deadline of {deadline:g} s")
    needed, has = cost.peak_memory_bytes, cost.device.memory_bytes
    raise DeviceError(f"out of memory: needs {needed / 1e9:.3g} GB, {cost.device.kind} has {has / 1e9:.3g} GB")


def _evaluate(request: Request, site: Site) -> dict[str, float]:
    if site.evaluate is None or site.withholds:
        return {"rows": 0.0}
    job = _job(request, site, _load(request, site))
    adapt = getattr(site.method, "adapt", None)
    last = request.round > request.rounds
    return site.evaluate(job.adapter if adapt is None else adapt(job), job.base_updates, last)


def _load(request: Request, site: Site) -> dict[str, np.ndarray]:
    """What the client kept in the last round that was merged; StoreError where it is needed and not there."""
    since = request.plan.since
    kept = site.private.load(site.device.id, since)
    factors = _staying(request.plan, site.wire.start)
    if kept is None and since >= 0 and (factors or request.plan.private):
        lost = f"factors {factors}" if factors else "private components"
        raise StoreError(
            f"{lost} do not travel, and {site.private.root} holds no version of round {since}: "
            "it was lost, or the plan of that round let them travel"
        )
    return kept or {}


def _job(request: Request, site: Site, kept: Mapping[str, np.ndarray]) -> Job:
    adapter = complete(request.adapter, request.plan, kept, site.wire.start)
    base = tuple(
        site.private.base(round, adapter.scale) if update is None else update
        for round, update in request.base_updates.items()
    )
    return Job(
        request.plan, request.round, request.rounds, site.wire.spec, adapter, base, below("private/", kept), site.local,
        site.device, site.seed, site.fit,
    )  # fmt: skip


def complete(adapter: Adapter, plan: Plan, kept: Mapping[str, np.ndarray], start: Adapter) -> Adapter:
    """The received adapter with the factors that did not travel, from the client's store, else as begun."""
    if all(f in plan.sent for f in "BeAh"):
        return adapter
    held = _held(kept, start)
    return adapter.fill(held.fill(start).union(start.without(held.ids)))


def _keep(job: Job, update: Update, kept: Mapping[str, np.ndarray], start: Adapter) -> dict[str, np.ndarray]:
    """What later requests need not carry: the client's own factors as trained, others as received.

    Components that had no part in this round stay as they were kept.
    """
    plan = job.plan
    # A factor of its own that never learnt is as begin() made it: there is nothing to keep.
    learnt = {*plan.learn, *(name.partition("/")[0] for name in kept)}
    # What was frozen in a round is kept as received: no one has changed it, so it need not be sent again.
    factors = [
        f for f in start.factors if (f in learnt if f in plan.own else f not in plan.down or f not in plan.learn)
    ]
    if not factors:
        return {}
    trained = update.adapter.only("".join(f for f in plan.own if f in plan.learn))
    now = trained.fill(job.adapter).union(job.adapter.without(trained.ids))
    held = now.union(_held(kept, start).without(now.ids).fill(start))
    held = held.only("".join(factors))
    return to_arrays(replace(held, blocks={name: block for name, block in held.blocks.items() if block.rows}))


def _staying(plan: Plan, start: Adapter) -> str:
    """The factors that no later request of such a plan carries: the client has to keep them."""
    return "".join(f for f in start.factors if f in plan.own or f not in plan.down)


def _held(kept: Mapping[str, np.ndarray], start: Adapter) -> Adapter:
    """What the client's store holds of the adapter."""
    found = from_arrays(kept, start.scale)
    return found.without(found.without(start.ids).ids)
