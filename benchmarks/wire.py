"""How fast the wire packs and unpacks, and what the round loop costs per client beside training.

python benchmarks/wire.py [--results FILE]: a MiniLM adapter of rank 12 in the SVD form, no training at all.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np

from fedrank.adapter import Adapter, gaussian
from fedrank.client import Site
from fedrank.config import Rounds
from fedrank.engines.local import Local
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import Device, Job, ModelSpec, Module, Observe, Plan, State, Update, rng
from fedrank.selection import everything
from fedrank.server import Server
from fedrank.store import Store
from fedrank.wire import Wire

LINEARS = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "attention.output": (384, 384),
           "intermediate": (1536, 384), "output": (384, 1536)}  # fmt: skip
CLIENTS, ROUNDS = 50, 5


def minilm() -> ModelSpec:
    modules = tuple(Module(f"layer.{at}.{n}", *size, at) for at in range(6) for n, size in LINEARS.items())
    head = {"head.weight": np.zeros((150, 384), np.float32), "head.bias": np.zeros(150, np.float32)}
    return ModelSpec(modules, 6, head, 12, 2.0, "benchmark")


def seconds(*calls: Callable[[], Any], repeats: int = 30) -> list[list[float]]:
    """The times of each call, the calls taken in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, mine in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            mine.append(time.perf_counter() - started)
    return times


def throughput(spec: ModelSpec, adapter: Adapter) -> dict[str, Any]:
    """GB of float32 state per second, by dtype, beside a plain copy of the same bytes, all taken in turn."""
    numbers = sum(b.rank * (m.out + 1 + m.in_) for m in spec.modules for b in [adapter.blocks[m.name]])
    blob = np.ones(numbers, np.float32)
    state, plan, result = State(0, 1, adapter), Plan(train=everything(adapter)), {}
    for dtype in ("f32", "f16", "bf16", "int8"):
        wire = Wire(spec, adapter, dtype, "run", 0)  # type: ignore[arg-type]
        frame = wire.request("train", "0", plan, state)
        times = seconds(
            partial(wire.request, "train", "0", plan, state), partial(wire.open_request, frame), blob.copy
        )  # fmt: skip
        speeds = {
            name: {"median": blob.nbytes / statistics.median(t) / 1e9, "min": blob.nbytes / max(t) / 1e9, "max": blob.nbytes / min(t) / 1e9}
            for name, t in zip(("pack", "unpack", "copy"), times, strict=True)
        }  # fmt: skip
        result[dtype] = {"gb_per_second": speeds, "frame_bytes": len(frame)}
    return result


def large() -> tuple[ModelSpec, Adapter]:
    """An adapter of 100 MB, beyond any cache: 12 blocks of four 4096 x 4096 linears at rank 64."""
    modules = tuple(Module(f"layer.{at}.{n}", 4096, 4096, at) for at in range(12) for n in ("q", "k", "v", "o"))
    spec = ModelSpec(modules, 12, {}, 64, 2.0, "benchmark")
    return spec, gaussian(spec.shapes, 64, 2.0, rng(0, "benchmark"))


def overhead(spec: ModelSpec, start: Adapter) -> dict[str, float]:
    """Milliseconds per client of whole rounds in which training takes no time at all."""
    inside = {"seconds": 0.0}
    wire = Wire(spec, start, "f32", "run", 0)

    class Timed:
        """The wire, with its own time counted."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(wire, name)
            if name not in ("request", "open_request", "update", "open_reply"):
                return found

            def timed(*args: Any) -> Any:
                started = time.perf_counter()
                try:
                    return found(*args)
                finally:
                    inside["seconds"] += time.perf_counter() - started

            return timed

    def fit(job: Job, observe: Observe | None = None) -> Update:
        return Update(job.adapter, 100, {"loss": 1.0, "seconds": 0.0})

    timed: Any = Timed()
    method = FedAvg()
    devices = {f"{i:02d}": Device(f"{i:02d}", 100) for i in range(CLIENTS)}
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "run")

        def site(client: str) -> Site:
            return Site(devices[client], method, timed, store.private, None, 0, fit, None, nullcontext)

        engine = Local(devices, site, 0.0, 0)
        settings = Rounds(count=ROUNDS + 2, cohort=CLIENTS, evaluate_every=1000)
        server = Server(
            method, engine, timed, store, settings, 0, "train", lambda adapter, base: {"accuracy": 0.0, "loss": 0.0}
        )
        rounds = (e for e in server.play(State(0, ROUNDS + 2, start)) if e["event"] == "round")
        next(rounds)  # warm-up: caches, allocator, disk
        inside["seconds"], started = 0.0, time.perf_counter()
        for _ in range(ROUNDS):  # the last round, which is always evaluated, is not played
            next(rounds)
        whole = time.perf_counter() - started
    updates = CLIENTS * ROUNDS
    payload = sum(b.rank * (m.out + 1 + m.in_) * 4 for m in spec.modules for b in [start.blocks[m.name]])
    copies = 2 * statistics.median(seconds(np.ones(payload // 4, np.float32).copy)[0])
    return {
        "milliseconds_per_client": 1e3 * whole / updates,
        "of_which_wire": 1e3 * inside["seconds"] / updates,
        "two_copies": 1e3 * copies,
        "beyond_two_copies": 1e3 * (whole / updates - copies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "wire.json")
    args = parser.parse_args()
    np.ones(31 << 17)  # 32 MB freed, as after loading a model: glibc then keeps what is freed for the next frame
    spec = minilm()
    adapter = spec.with_head(gaussian(spec.shapes, 12, 2.0, rng(0, "benchmark")))
    runs = [overhead(spec, adapter) for _ in range(15)]
    result = {
        "command": "python benchmarks/wire.py",
        "machine": machine.describe(),
        "note": "32 MB were allocated and freed first, as after loading a model",
        "minilm_rank_12": throughput(spec, adapter),
        "large_100_mb": throughput(*large()),
        "loop": {k: {"median": statistics.median(r[k] for r in runs), "min": min(r[k] for r in runs), "max": max(r[k] for r in runs)}
                 for k in runs[0]},
    }  # fmt: skip
    args.results.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
