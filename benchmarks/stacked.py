"""Clients trained together, in groups of several sizes, and by a plain loop of PEFT: in turns, in one process.

python benchmarks/stacked.py DATA --device cuda: MiniLM, LoRA of rank 8 on all linear layers, the rows of DATA/clinc150,
once all have been seen to train the same. Needs fedrank[quickstart] and peft.
python benchmarks/stacked.py DATA --device cpu --together 1,2,5,10 --clients 10 --batch 16 [--dataset 20news]: one core,
what `engine.stack` goes by there.
"""

import argparse
import copy
import json
import platform
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
from fedrank.parts import prepare
from fedrank.protocol import Device, Job, Plan, rng
from fedrank.training.course import Ask, drawn_batches
from fedrank.training.frozen import DTYPES
from fedrank.training.local import Trainer

RESULTS = Path(__file__).parent / "results"
APART = {"float32": 0.01, "bfloat16": 0.3}  # at most; AdamW makes much of gradients that are next to zero


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
    """The same training by PEFT's layers, in the same compute type, a client after the other."""
    network = copy.deepcopy(trainer.model.network)
    paths = {module: path for path, module in trainer.model.network.named_modules()}
    base = network.get_submodule(paths[trainer.model.base])
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=list(adapter.blocks)), base)
    network.to(trainer.device).eval()
    learning = {}
    for name in adapter.blocks:
        layer = base.get_submodule(name)
        learning |= {f"{name}.A": layer.lora_A["default"].weight, f"{name}.B": layer.lora_B["default"].weight}
    for name, head in trainer.model.heads.items():
        learning |= {f"{name}.{part}": it for part, it in network.get_submodule(paths[head]).named_parameters()}
    start = {name: torch.from_numpy(array).to(trainer.device) for name, array in numbers(adapter).items()}
    parameters, dtype = list(learning.values()), DTYPES[trainer.compute.dtype]
    network.requires_grad_(False)
    for parameter in parameters:
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
    """How far all numbers are from the others', as a share of how far training took them (roots of mean squares)."""

    def distance(many: Sequence[dict], beside: Sequence[dict]) -> float:
        squares = [((a[name] - b[name]) ** 2).sum() for a, b in zip(many, beside, strict=True) for name in start]
        return float(np.sqrt(sum(squares)))

    return distance(ones, others) / distance(ones, [start] * len(ones))


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
    loop = peft_loop(trainer, adapter)
    sizes = list(map(int, args.together.split(",")))

    def grouped(size: int, given: list[Ask]) -> list[dict[str, np.ndarray]]:
        groups = [given[at : at + size] for at in range(0, len(given), size)]
        return [numbers(update.adapter) for group in groups for update in trainer.fit_all(group)]

    trained = {f"{size} together": partial(grouped, size) for size in sizes} | {"peft": loop}
    most = f"{sizes[-1]} together"
    short = [replace(ask, job=replace(ask.job, local=ask.job.local.model_copy(update={"steps": 2}))) for ask in asked]
    found = {name: train(short) for name, train in trained.items()}
    distances = {name: apart(found[most], other, numbers(adapter)) for name, other in found.items()}
    if max(distances.values()) > APART[trainer.compute.dtype]:
        raise SystemExit(f"they do not train the same: {distances} of the way apart")
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    with trainer.session():
        for _ in range(args.repeats):
            for name, train in trained.items():
                seconds[name].append(timed(partial(train, asked), args.device))
    lengths, by = trainer.train.lengths, {name: median(times) for name, times in seconds.items()}
    result = {
        "machine": machine.describe(), "compute": trainer.compute, "clients": args.clients, "batch": args.batch,
        "tokens_of_a_batch": args.batch * float(np.concatenate([lengths[ask.rows] for ask in asked]).mean()),
        "device": platform.processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "client_steps_per_second": {name: args.clients * args.steps / taken for name, taken in by.items()},
        "faster_than": {name: taken / by[most] for name, taken in by.items()},
        "apart_after_two_steps": distances, "seconds": seconds,
    }  # fmt: skip
    shown = (
        "device",
        "compute",
        "tokens_of_a_batch",
        "client_steps_per_second",
        "faster_than",
        "apart_after_two_steps",
    )
    print(json.dumps({key: result[key] for key in shown}, indent=1))
    kept = RESULTS / f"stacked_{torch.device(args.device).type}.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    kept.write_text(json.dumps(before | {args.dataset: result}, indent=1))


if __name__ == "__main__":
    main()
