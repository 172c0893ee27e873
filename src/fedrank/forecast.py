"""What a run will cost, before anything runs: the real server plays every round, with clients that train nothing."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedrank import privacy, remote
from fedrank.client import Site
from fedrank.config import Config, ConfigError, PrivacySettings
from fedrank.cost import Cost
from fedrank.ledger import Event
from fedrank.parts import Parts, here, prepare
from fedrank.protocol import ClientId, Device, Method, Plan, State
from fedrank.server import Server
from fedrank.store import Store
from fedrank.training.data import ClientData
from fedrank.wire import Wire

SUMS = ("bytes_down", "bytes_up", "adapter_bytes_down", "adapter_bytes_up", "clients_ok", "clients_failed",
        "clients_out")  # fmt: skip
MEANS = ("parameters", "flops", "bytes_down", "bytes_up", "forward_seconds", "backward_seconds", "download_seconds",
         "upload_seconds", "device_seconds", "device_joules")  # fmt: skip
SPENT = ("bytes_down", "bytes_up", "spent_seconds", "device_joules")


class ForecastError(ValueError):
    """A method that does not get through its rounds without training."""


def forecast(
    config: Config,
    method: Method | None = None,
    watch: Callable[[Event], None] = lambda event: None,
    data: ClientData | None = None,
) -> dict[str, Any]:
    """Bytes, seconds, joules and memory: of the run, of a round in the mean, and of a client by kind of device.

    By the model of the devices, whatever `engine.timing` says: the ledger's numbers, unless the method's plans hang on
    what its clients learn. Failures and evaluation are left out. A kind's means are over the clients of it that were
    asked to train, None where none was; its `run` adds up what they spent. Of a private run also the epsilon that it
    comes to; of one on Flower, whose sites' rows and devices are theirs, nothing else. watch: called with every event of
    the rounds.
    """
    privacy.accountable(config.privacy)
    if config.engine.kind == "flower":
        if config.privacy.kind == "none":
            raise ConfigError(
                "engine.kind=flower: what a run costs hangs on the sites' rows and devices; engine.kind=local on data like theirs"
            )
        return _apart(config, method)
    engine = config.engine.model_copy(
        update={"failure_rate": 0.0, "timing": "modelled", "threads": 1, "workers": 1, "stack": 1}
    )
    rounds = config.rounds.model_copy(update={"exactness": False})
    parts = prepare(config.model_copy(update={"engine": engine, "rounds": rounds}), method, data)
    devices = parts.fleet.devices
    drawn, asked, played = Counter[str](), dict[str, list[Event]](), list[Event]()
    cohorts = list[list[ClientId]]()
    for event in rehearse(parts):
        match event["event"]:
            case "cohort":
                drawn.update(devices[client].kind for client in event["clients"])
                cohorts.append(event["clients"])
            case "client":
                asked.setdefault(devices[event["client"]].kind, []).append(event)
            case "round":
                played.append(event)
        watch(event)

    kinds = [_kind(kind, machines, drawn[kind], asked.get(kind, [])) for kind, machines in parts.fleet.kinds.items()]
    run = {name: sum(row[name] for row in played) for name in SUMS}
    run["device_joules"] = math.fsum(row["device_joules"] for row in played)
    run["clock_seconds"] = played[-1]["clock_seconds"]
    mean = {name: total / len(played) for name, total in run.items()}
    mean["round_seconds"] = mean.pop("clock_seconds")
    round = mean | {
        "slowest_seconds": max((event["device_seconds"] for mine in asked.values() for event in mine), default=0.0),
        "waiting_seconds": _mean([row["waiting_seconds"] for row in played if row["waiting_seconds"] is not None]),
        "peak_memory_bytes": max((kind["peak_memory_bytes"] or 0.0 for kind in kinds), default=0.0),
    }
    cohort = min(config.rounds.cohort, len(parts.devices))
    found = {
        "method": parts.config.method["name"], "clients": len(parts.devices), "cohort": cohort,
        "rounds": config.rounds.count, "kinds": kinds, "round": round, "run": run,
    }  # fmt: skip
    if config.privacy.kind == "none":
        return found
    return found | _spent(config, parts, zip((row["noise_multiplier"] for row in played), cohorts, strict=True))


def _spent(config: Config, parts: Parts, told: Iterable[tuple[float, Collection[ClientId]]]) -> dict[str, Any]:
    spent = privacy.epsilon(config.privacy, min(config.rounds.cohort, parts.clients) / parts.clients, told)
    return {"epsilon": spent if math.isfinite(spent) else None, "delta": config.privacy.delta}


def _apart(config: Config, method: Method | None) -> dict[str, Any]:
    """The epsilon of a private run on Flower, from its plans; local: of a client that is asked in every round."""
    remote.check()
    from fedrank import central  # it needs flwr

    parts, one, told = central.prepare(config, method, grid=None), Device("site", 1), []
    for round in range(config.rounds.count):
        state = replace(parts.begin, round=round)
        plan = parts.method.plan(state, {one.id: one}, config.seed)[one.id] or Plan({})
        told.append((privacy.multiplier(config.privacy, plan), [one.id]))
    return {
        "method": parts.config.method["name"], "clients": parts.clients, "cohort": config.rounds.cohort,
        "rounds": config.rounds.count, **_spent(config, parts, told),
    }  # fmt: skip


def _kind(kind: str, machines: Sequence[tuple[Device, int]], drawn: int, asked: Sequence[Event]) -> dict[str, Any]:
    """The row of a kind of device: how often its clients were drawn, and what those that were asked went through."""
    small = sum(not event["fits"] for event in asked)
    return {
        "kind": kind, "clients": sum(count for _, count in machines),
        "memory_bytes": min(machine.memory_bytes for machine, _ in machines),
        "drawn": drawn, "sitting_out": drawn - len(asked), "too_small": small,
        "late": sum(not event["ok"] for event in asked) - small,
        **{name: _mean([event.get(name, 0.0) for event in asked]) for name in MEANS},
        "peak_memory_bytes": max((event["peak_memory_bytes"] for event in asked), default=None),
        "run": {name: math.fsum(event.get(name, 0.0) for event in asked) for name in SPENT},
    }  # fmt: skip


def rehearse(parts: Parts) -> Iterator[Event]:
    """The events of a run whose clients train nothing, without its evaluations; nothing of it stays on disk.

    A client's event has `parameters`, `flops`, whether it `fits` its device's memory, and the seconds that it spent
    before it answered or stopped, beside the ledger's numbers. ForecastError where one fails.
    """
    from fedrank.training import rehearsal  # torch is slow to import

    costs: dict[ClientId, Cost] = {}

    def site(client: ClientId, wire: Wire, store: Store) -> Site:
        real = parts.site(client, wire, store)

        def cost(round: int, plan: Plan, bytes_down: int) -> Cost:
            assert parts.cost is not None
            costs[client] = parts.cost(client, wire.start, round, plan, bytes_down)
            return costs[client]

        return replace(real, fit=rehearsal.fit, cost=cost, privacy=PrivacySettings())  # there is nothing to protect

    with TemporaryDirectory(prefix="fedrank-") as folder:
        played = replace(parts, carrier=partial(here, site=site)).server(Store.create(Path(folder)))
        for event in _rounds(played, parts.begin):
            if event["event"] == "client":
                if not (event["ok"] or "device_seconds" in event):
                    raise ForecastError(
                        f"{parts.config.method['name']} cannot be played without its training: round {event['round']}, "
                        f"client {event['client']}: {event['error']}"
                    )
                cost = costs.pop(event["client"])
                flops = cost.forward_flops + cost.backward_flops
                spent = event["device_seconds"] if event["ok"] else cost.stop(parts.config.rounds.deadline)
                event |= {"parameters": cost.parameters, "flops": flops, "fits": cost.fits, "spent_seconds": spent}
            yield event


def _rounds(server: Server, state: State) -> Iterator[Event]:
    clock = 0.0
    while state.round < state.rounds:
        state, row, _, _ = yield from server.train(state, clock, server.cohort(state.round + 1))
        server.store.clear_spool()
        clock = row["clock_seconds"]
        yield {"event": "round", "rounds": state.rounds, **row}


def _mean(values: Sequence[float | int]) -> float | None:
    return math.fsum(values) / len(values) if values else None
