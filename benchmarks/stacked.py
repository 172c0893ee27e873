"""Clients trained together against one by one, and against a plain loop of PEFT: made for a GPU, runs anywhere.

python benchmarks/stacked.py DATA --device cuda: MiniLM, LoRA of rank 8 on all linear layers, the rows of DATA/clinc150,
in turns. Needs fedrank[quickstart] and peft. Without a GPU, --device cpu shows that it runs; its ratios mean little.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
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
from fedrank.parts import prepare
from fedrank.protocol import Device, Job, Plan, rng
from fedrank.training.course import Ask, drawn_batches
from fedrank.training.frozen import DTYPES
from fedrank.training.local import Trainer

RESULTS = Path(__file__).parent / "results" / "stacked.json"


def settings(args: argparse.Namespace) -> dict:
    return {
        "model": {"name": "minilm"}, "data": {"path": str(args.data / "clinc150"), "test_limit": 64},
        "clients": {"count": args.clients}, "rounds": {"count": 1, "cohort": args.clients}, "device": args.device,
        "local": {"lr": 0.003, "batch_size": args.batch, "max_length": 64, "steps": args.steps}, "engine": {"stack": args.clients},
    }  # fmt: skip


def asks(trainer: Trainer, adapter, chosen: config.Config, args: argparse.Namespace) -> list[Ask]:
    """Of each client, as many rows as it takes."""
    order = np.array_split(
        rng(0, "rows").permutation(len(trainer.train))[: args.clients * args.batch * 8], args.clients
    )
    plan, spec = Plan({name: block.ids for name, block in adapter.blocks.items()}), trainer.model.spec
    return [
        Ask(
            Job(plan, 1, 1, spec, adapter, (), {}, chosen.local, Device(str(at), len(rows)), 0, print), rows, None, None
        )
        for at, rows in enumerate(order)
    ]


def peft_loop(trainer: Trainer, adapter) -> Callable[[list[Ask]], None]:
    """The same training by PEFT's layers, in the same compute type, a client after the other."""
    network = copy.deepcopy(trainer.model.network)
    paths = {module: path for path, module in trainer.model.network.named_modules()}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(adapter.blocks))
    inject_adapter_in_model(lora, network.get_submodule(paths[trainer.model.base]))
    for head in trainer.model.heads.values():
        network.get_submodule(paths[head]).requires_grad_(True)
    network.to(trainer.device).eval()
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in learning]
    dtype = DTYPES[trainer.compute.dtype]

    def train(asked: list[Ask]) -> None:
        for ask in asked:
            with torch.no_grad():
                for parameter, value in zip(learning, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(learning, lr=ask.job.local.lr, weight_decay=0.0)
            for batch in drawn_batches(ask.rows, ask.job.local, ask.job):
                inputs, labels = trainer.train.batch(batch, trainer.device)
                with torch.autocast(torch.device(trainer.device).type, dtype, enabled=dtype != torch.float32):
                    loss = functional.cross_entropy(network(**inputs).float(), labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learning, ask.job.local.clip)
                optimizer.step()

    return train


def timed(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cuda")
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
    ways = {
        "stacked": partial(trainer.fit_all, asked),
        "one by one": lambda: [trainer.fit_all([ask]) for ask in asked],
        "peft": partial(loop, asked),
    }
    short = [replace(ask, job=replace(ask.job, local=ask.job.local.model_copy(update={"steps": 2}))) for ask in asked]
    trainer.fit_all(short)
    trainer.fit_all(short[:1])
    loop(short[:1])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with trainer.session():
        for _ in range(args.repeats):
            for name, work in ways.items():
                seconds[name].append(timed(work, args.device))
    found = {
        "machine": machine.describe(), "compute": trainer.compute.dtype, "clients": args.clients, "batch": args.batch,
        "device": platform.processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "client_steps_per_second": {name: args.clients * args.steps / median(times) for name, times in seconds.items()},
        "stacked_over": {name: median(times) / median(seconds["stacked"]) for name, times in seconds.items()},
        "seconds": seconds,
    }  # fmt: skip
    print(
        json.dumps(
            {key: found[key] for key in ("device", "compute", "client_steps_per_second", "stacked_over")}, indent=1
        )
    )
    if args.device != "cpu":
        RESULTS.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
