"""Clients trained together, in groups of several sizes, and by a plain loop of PEFT: in turns, in one process.

python benchmarks/stacked.py DATA --device cuda: MiniLM, LoRA of rank 8 on all linear layers, the rows of DATA/clinc150,
once all have been seen to train the same in float32. Needs fedrank[quickstart] and peft.
python benchmarks/stacked.py DATA --device cpu --together 1,2,5,10 --clients 10 --batch 16 [--dataset 20news]: one core,
what `engine.stack` goes by there.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import machine
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional

from fedrank import config
from fedrank.adapter import Adapter
from fedrank.engines.workers import keep_memory
from fedrank.parts import prepare
from fedrank.protocol import Device, Job, Plan, rng
from fedrank.training.compute import DTYPES, Compute
from fedrank.training.course import Ask, drawn_batches
from fedrank.training.local import Trainer

RESULTS = Path(__file__).parent / "results"
APART = 0.01  # at most, in float32; AdamW makes much of gradients that are next to zero
EXACT = Compute("float32", "torch")
WANTED = {"1 together": 5.0, "peft": 8.0}  # times as fast on a GPU


def settings(args: argparse.Namespace) -> dict:
    return {
        "model": {"name": "minilm"}, "data": {"path": str(args.data / args.dataset), "test_limit": 64},
        "clients": {"count": args.clients}, "rounds": {"count": 1, "cohort": args.clients}, "device": args.device,
        "local": {"lr": 0.003, "batch_size": args.batch, "max_length": 64, "steps": args.steps}, "engine": {"stack": args.clients},
    }  # fmt: skip


def asks(trainer: Trainer, adapter: Adapter, chosen: config.Config, args: argparse.Namespace) -> list[Ask]:
    """Of each client, as many rows as it takes."""
    drawn = rng(0, "rows").permutation(len(trainer.train))[: args.clients * args.batch * 8]
    plan, spec, found = Plan(adapter.ids), trainer.model.spec, list[Ask]()
    for at, rows in enumerate(np.array_split(drawn, args.clients)):
        job = Job(plan, 1, 1, spec, adapter, (), {}, chosen.local, Device(str(at), len(rows)), 0, print)
        found.append(Ask(job, rows, None, None))
    return found


def numbers(adapter: Adapter) -> dict[str, np.ndarray]:
    factors = {f"{name}.{factor}": getattr(block, factor) for name, block in adapter.blocks.items() for factor in "AB"}
    return factors | dict(adapter.dense)


def peft_loop(trainer: Trainer, adapter: Adapter) -> Callable[[list[Ask]], list[dict[str, np.ndarray]]]:
    """The same training by PEFT's layers, a client after the other: the base in the same compute type, under autocast."""
    dtype = DTYPES[trainer.compute.dtype]
    network = copy.deepcopy(trainer.model.network).to(dtype)
    paths = {module: path for path, module in trainer.model.network.named_modules()}
    base = network.get_submodule(paths[trainer.model.base])
    if trainer.device == "cpu" and dtype != torch.float32:  # the backward pass of torch's own attention is slow there
        base.config._attn_implementation = "eager"
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=list(adapter.blocks)), base)
    network.to(trainer.device).eval()
    learning = {}
    for name in adapter.blocks:
        layer = base.get_submodule(name)
        learning |= {f"{name}.A": layer.lora_A["default"].weight, f"{name}.B": layer.lora_B["default"].weight}
    for name, head in trainer.model.heads.items():
        learning |= {f"{name}.{part}": it for part, it in network.get_submodule(paths[head]).named_parameters()}
    start = {name: torch.from_numpy(array).to(trainer.device) for name, array in numbers(adapter).items()}
    network.requires_grad_(False)
    parameters = list(learning.values())
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    def train(asked: list[Ask]) -> list[dict[str, np.ndarray]]:
        found = []
        for ask in asked:
            with torch.no_grad():
                for name, parameter in learning.items():
                    parameter.copy_(start[name])
            optimizer = torch.optim.AdamW(parameters, lr=ask.job.local.lr, weight_decay=0.0, fused=True)
            for batch in drawn_batches(ask.rows, ask.job.local, ask.job):
                inputs, labels = trainer.train.batch(batch, trainer.device)
                with torch.autocast(torch.device(trainer.device).type, dtype, enabled=dtype != torch.float32):
                    loss = functional.cross_entropy(network(**inputs).float(), labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, ask.job.local.clip)
                optimizer.step()
            found.append({name: parameter.numpy(force=True).copy() for name, parameter in learning.items()})
        return found

    return train


def apart(ones: Sequence[dict], others: Sequence[dict], start: dict) -> float:
    """How far a client's numbers are from the other's, as a share of how far training took them; of all clients, the most."""

    def distance(one: dict, other: dict) -> float:
        return float(np.sqrt(sum(((one[name] - other[name]) ** 2).sum() for name in start)))

    return max(distance(one, other) / distance(one, start) for one, other in zip(ones, others, strict=True))


def timed(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--dataset", default="clinc150")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--together", default="1,32", help="the sizes of groups; the last one is compared with the others"
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compute", default="auto")
    args = parser.parse_args()
    parts = prepare(config.load(settings(args), [f"engine.compute={args.compute}"]))
    trainer, adapter = parts.trainer, parts.begin.adapter
    asked = asks(trainer, adapter, parts.config, args)
    sizes = list(map(int, args.together.split(",")))

    def grouped(trainer: Trainer, size: int, given: list[Ask]) -> list[dict[str, np.ndarray]]:
        found = []
        for at in range(0, len(given), size):
            for update in trainer.fit_all(given[at : at + size]):
                if isinstance(update, Exception):
                    raise update
                found.append(numbers(update.adapter))
        return found

    def ways(trainer: Trainer) -> dict[str, Callable[[list[Ask]], list[dict[str, np.ndarray]]]]:
        together = {f"{size} together": partial(grouped, trainer, size) for size in sizes}
        return together | {"peft": peft_loop(trainer, adapter)}

    if args.device == "cpu":  # as a worker
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        keep_memory()
    most = f"{sizes[-1]} together"
    short = [replace(ask, job=replace(ask.job, local=ask.job.local.model_copy(update={"steps": 2}))) for ask in asked]
    with trainer.session():
        found = {name: train(short) for name, train in ways(replace(trainer, compute=EXACT)).items()}
    distances = {name: apart(found[most], other, numbers(adapter)) for name, other in found.items()}
    if not max(distances.values()) < APART:
        raise SystemExit(f"they do not train the same: {distances} of the way apart")
    trained = ways(trainer)
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    with trainer.session():
        for train in trained.values():
            train(short)
        for _ in range(args.repeats):
            for name, train in trained.items():
                seconds[name].append(timed(partial(train, asked), args.device))
    lengths, by = trainer.train.lengths, {name: median(times) for name, times in seconds.items()}
    result = {
        "machine": machine.describe(), "compute": trainer.compute, "clients": args.clients, "batch": args.batch,
        "tokens_of_a_batch": args.batch * float(np.concatenate([lengths[ask.rows] for ask in asked]).mean()),
        "device": machine.describe()["processor"] if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "client_steps_per_second": {name: args.clients * args.steps / taken for name, taken in by.items()},
        "faster_than": {name: taken / by[most] for name, taken in by.items()},
        "apart_after_two_steps_in_float32": distances, "seconds": seconds,
    }  # fmt: skip
    if args.device != "cpu":
        result["met"] = {name: result["faster_than"][name] >= times for name, times in WANTED.items() if name in by}
    shown = (
        "device",
        "compute",
        "tokens_of_a_batch",
        "client_steps_per_second",
        "faster_than",
        "met",
    )
    print(json.dumps({key: result[key] for key in shown if key in result}, indent=1))
    kept = RESULTS / f"stacked_{torch.device(args.device).type}.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    kept.write_text(json.dumps(before | {f"{args.dataset}, {trainer.compute.dtype}": result}, indent=1))


if __name__ == "__main__":
    main()
