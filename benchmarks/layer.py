"""One adapted layer, forward and backward: fedrank's autograd function against PEFT's layer, in turns, same shapes.

python benchmarks/layer.py: MiniLM's query, key and value together, and its widest layer, LoRA of rank 8, one thread.
Writes results/layer.json.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import machine
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from fedrank.training.compute import DTYPES, Compute, Product, choose
from fedrank.training.linears import Linears, Piece, Place, Share

RESULTS = Path(__file__).parent / "results" / "layer.json"
RANK, SCALE, REPEATS, CALLS = 8, 2.0, 15, 20
SHAPES = {"query, key, value": (384, (384, 384, 384)), "intermediate": (384, (1536,))}
ROWS = (192, 1024)  # tokens: a batch of 16 sentences of clinc150, or of 16 texts of 64 tokens

Work = Callable[[Tensor], None]


def drawn(*shape: int) -> Tensor:
    """The same factor for everyone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) / 20


def peft(layers: list[nn.Linear], autocast: bool) -> tuple[Work, list[Tensor]]:
    """PEFT's layers, and their outputs' last values."""
    network = nn.ModuleDict({f"layer{at}": nn.Linear(it.in_features, it.out_features) for at, it in enumerate(layers)})
    for own, layer in zip(network.values(), layers, strict=True):
        own.load_state_dict(layer.state_dict())
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(network)), network)
    for own in network.values():  # as one draws them for fedrank's
        own.lora_A["default"].weight.data = drawn(RANK, own.in_features)
        own.lora_B["default"].weight.data = drawn(own.out_features, RANK)
    made: list[Tensor] = []

    def work(x: Tensor) -> None:
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made[:] = [layer(x) for layer in network.values()]
            sum(part.float().sum() for part in made).backward()
        network.zero_grad()

    return work, made


def fedrank(layers: list[nn.Linear], compute: Compute) -> tuple[Work, list[Tensor]]:
    """One autograd function for them all."""
    dtype, outs = DTYPES[compute.dtype], [layer.out_features for layer in layers]
    product = Product([layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers], compute)
    product.turn()
    A = drawn(RANK, layers[0].in_features).repeat(len(layers), 1).to(dtype)
    pieces, first = [], 0
    for at, out in enumerate(outs):
        bt = drawn(out, RANK).t().contiguous().to(dtype)
        pieces.append(Piece(at, slice(first, first + out), slice(at * RANK, (at + 1) * RANK), bt, torch.zeros_like(bt)))
        first += out
    share, learning = Share(A, None, pieces, SCALE, Place(), torch.zeros_like(A)), torch.empty(0, requires_grad=True)
    made: list[Tensor] = []

    def work(x: Tensor) -> None:
        x.grad = None
        made[:] = Linears.apply(x.to(dtype), learning, product, [share])
        sum(part.float().sum() for part in made).backward()
        share.grad_A.zero_()
        for piece in share.pieces:
            piece.grad.zero_()

    return work, made


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {"machine": machine.describe(), "rank": RANK, "shapes": {}}
    for name, (inside, outs) in SHAPES.items():
        layers = [nn.Linear(inside, out) for out in outs]
        fastest = choose(layers, "cpu", 1)
        exact = choose(layers, "cpu", 1, dtype="float32")
        ways = {
            "peft, float32": peft(layers, False), "peft, bfloat16 autocast": peft(layers, True),
            "fedrank, float32 by torch": fedrank(layers, Compute("float32", "torch")),
            "fedrank, float32": fedrank(layers, exact), "fedrank": fedrank(layers, fastest),
        }  # fmt: skip
        for rows in ROWS:
            x, seconds = torch.randn(rows, inside, requires_grad=True), {way: list[float]() for way in ways}
            for repeat in range(REPEATS + 1):
                for way, (work, _) in ways.items():
                    started = time.perf_counter()
                    for _ in range(CALLS):
                        work(x)
                    if repeat:  # the first one makes kernels
                        seconds[way].append((time.perf_counter() - started) / CALLS)
            exactly, wanted = None, None
            for way, (work, made) in ways.items():  # all compute the same
                work(x)
                outputs = torch.cat([part.detach().float() for part in made], 1)
                exactly, wanted = (outputs, x.grad) if exactly is None else (exactly, wanted)
                near = 1e-4 if "float32" in way else 0.03
                for got, right in ((outputs, exactly), (x.grad, wanted)):
                    assert (got - right).norm() < near * right.norm(), way
            found["shapes"][f"{name}, {rows} tokens"] = {
                way: {"milliseconds": 1e3 * median(times), "least": 1e3 * min(times), "most": 1e3 * max(times),
                      "over_fedrank": median(times) / median(seconds["fedrank"])}
                for way, times in seconds.items()
            }  # fmt: skip
    for shape, rows in found["shapes"].items():
        print(shape, {way: round(row["milliseconds"], 2) for way, row in rows.items()})
    RESULTS.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
