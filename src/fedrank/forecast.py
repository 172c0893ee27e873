"""What a run will cost, before anything runs: the plans of its first round, priced on every client's device."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fedrank.config import Config
from fedrank.cost import Cost, down
from fedrank.parts import Parts, prepare
from fedrank.protocol import ClientId, Method
from fedrank.server import planned


def costs(parts: Parts) -> dict[ClientId, Cost]:
    """What the first round would cost each client that it plans for; a client that would sit it out is absent.

    Plans are made as the server makes them, for one cohort after another in the clients' order.
    """
    config, begin = parts.config, parts.begin
    result = {}
    clients, size = list(parts.devices), config.rounds.cohort
    for at in range(0, len(clients), size):
        cohort = {client: parts.devices[client] for client in clients[at : at + size]}
        plans = planned(parts.method, begin, cohort, config.seed, config.adapter.head, training=True)
        for client, plan in plans.items():
            sent = down(begin.adapter, plan, len(parts.spec.modules), config.wire.dtype)
            result[client] = parts.cost(client, begin.adapter, begin.round + 1, plan, sent.frame)
    return result


def forecast(config: Config, method: Method | None = None) -> dict[str, Any]:
    """Bytes, seconds, joules and memory: of a client by kind of device, of a round, and of all rounds.

    The model's, whatever `engine.timing` says. Rounds are taken to be like the first: what a method changes in its
    plans as it goes on is not foreseen, nor are failures, nor evaluation. A client that is late or lacks the memory
    counts as sending nothing and taking no energy.
    """
    parts = prepare(config, method)
    config, found = parts.config, costs(parts)
    deadline = config.rounds.deadline
    clients, size = len(parts.devices), min(config.rounds.cohort, len(parts.devices))
    late = {client for client, cost in found.items() if deadline is not None and cost.seconds > deadline}
    small = {client for client, cost in found.items() if cost.peak_memory_bytes > cost.device.memory_bytes > 0}
    ok = [cost for client, cost in found.items() if client not in late | small]

    kinds = []
    for kind in dict.fromkeys(device.kind for device in parts.devices.values()):
        names = [client for client, device in parts.devices.items() if device.kind == kind]
        mine = [found[client] for client in names if client in found]
        kinds.append({
            "kind": kind, "clients": len(names), "memory_bytes": parts.devices[names[0]].memory_bytes,
            "sitting_out": len(names) - len(mine), "late": len(late.intersection(names) - small),
            "too_small": len(small.intersection(names)),
            "parameters": _mean(mine, lambda cost: cost.parameters),
            "bytes_down": _mean(mine, lambda cost: cost.bytes_down),
            "bytes_up": _mean(mine, lambda cost: cost.bytes_up),
            "flops": _mean(mine, lambda cost: cost.forward_flops + cost.backward_flops),
            "compute_seconds": _mean(mine, lambda cost: cost.forward_seconds + cost.backward_seconds),
            "link_seconds": _mean(mine, lambda cost: cost.download_seconds + cost.upload_seconds),
            "seconds": _mean(mine, lambda cost: cost.seconds), "joules": _mean(mine, lambda cost: cost.joules),
            "peak_memory_bytes": max((cost.peak_memory_bytes for cost in mine), default=0),
        })  # fmt: skip

    share = size / clients
    lengths = [cost.seconds for cost in ok]
    if deadline is not None:
        lengths += [deadline] * len(late - small)
    round = {
        "clients": share * len(found),
        "bytes_down": share * sum(cost.bytes_down for cost in found.values()),
        "bytes_up": share * sum(cost.bytes_up for cost in ok),
        "seconds": expected_maximum([*lengths, *[0.0] * (clients - len(lengths))], size),
        "slowest_seconds": max((cost.seconds for cost in found.values()), default=0.0),
        "joules": share * math.fsum(cost.joules for cost in ok),
        "peak_memory_bytes": max((cost.peak_memory_bytes for cost in found.values()), default=0),
    }  # fmt: skip
    rounds = config.rounds.count
    run = {name: rounds * round[name] for name in ("bytes_down", "bytes_up", "seconds", "joules")}
    return {"method": config.method["name"], "clients": clients, "cohort": size, "rounds": rounds, "kinds": kinds,
            "round": round, "run": run}  # fmt: skip


def expected_maximum(values: Sequence[float], size: int) -> float:
    """The mean, over all subsets of this size, of their largest value."""
    total, share = [], size / len(values)  # of the subsets: those in which this value, in falling order, is the largest
    for left, value in zip(range(len(values), 0, -1), sorted(values, reverse=True), strict=True):
        total.append(value * share)
        share *= (left - size) / (left - 1) if left > 1 else 0.0
    return math.fsum(total)


def _mean(costs: Sequence[Cost], of: Callable[[Cost], float]) -> float:
    return math.fsum(map(of, costs)) / len(costs) if costs else 0.0
