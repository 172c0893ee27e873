"""PF2LoRA's synthetic example: linear regression in which every client's true rank is known, and who learns it.

OMP_NUM_THREADS=1 python benchmarks/pf2lora_synthetic.py [--out FILE]

Prints the forecast (steps by methods) first. Client k has W*_k of rank q_k and sees X_k ~ N(0, 1), Y_k = W*_k X_k
+ noise. Matrices carry two leading axes, (seeds, clients), so that one product steps them all.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import yaml

from fedrank.protocol import rng

HERE = Path(__file__).parent
PROBE = 50  # steps by which the forecast guesses
Array = np.ndarray


# ---- the data


@dataclass(frozen=True, eq=False)
class Problem:
    """truth: W*, (seeds, clients, n, n). s, t: X X' / N and Y X' / N of every client, of the same shape."""

    targets: tuple[int, ...]
    truth: Array
    s: Array
    t: Array


def truth(size: int, shared: int, targets: tuple[int, ...], draw: np.random.Generator) -> Array:
    """(clients, n, n): each the shared components, some of them deleted or new ones of its own added."""
    extra = sum(max(0, q - shared) for q in targets)
    u, v = (np.linalg.qr(draw.normal(size=(size, size)))[0][:, : shared + extra].T for _ in range(2))
    spectrum, new, found = np.linspace(2.0, 1.0, shared), shared, []
    for q in targets:
        kept = np.sort(draw.choice(shared, min(q, shared), replace=False))
        own = np.arange(new, new + max(0, q - shared))
        new += len(own)
        values = np.concatenate([spectrum[kept], np.full(len(own), 1.5)])
        at = np.concatenate([kept, own])
        found.append((u[at].T * values) @ v[at])
    return np.stack(found)


def problem(study: dict[str, Any], targets: tuple[int, ...], samples: int, noise: float, seeds: int) -> Problem:
    """The same clients for every method. Without noise Y is W* X, and T is W* S."""
    size = study["size"]
    w, s, t = ([], [], [])
    for seed in range(seeds):
        draw = rng(seed, "synthetic", *targets)
        w.append(truth(size, study["shared"], targets, draw))
        x = draw.normal(size=(len(targets), size, samples))
        y = w[-1] @ x + noise * draw.normal(size=x.shape)
        s.append(x @ x.mT / samples)
        t.append(y @ x.mT / samples)
    return Problem(targets, np.stack(w), np.stack(s), np.stack(t))


# ---- the methods: f(W) = ||W X - Y||^2 / 2N, so that df/dW = W S - T


@dataclass(frozen=True, eq=False)
class Factors:
    """b, a: the upper level. d, c: the private one, of width 0 where there is none."""

    b: Array
    a: Array
    d: Array
    c: Array


def two_levels(x: Factors, p: Problem, eta: float, alpha: float, second_order: bool = True) -> Factors:
    """One local step: y+ = y - alpha grad_y f, then x along the gradient through that step (spec 3.1)."""
    at, ct, bt, dt = x.a.mT, x.c.mT, x.b.mT, x.d.mT
    common = x.b @ x.a
    slope = (common + x.d @ x.c) @ p.s - p.t
    d, c = x.d - alpha * slope @ ct, x.c - alpha * dt @ slope
    after = (common + d @ c) @ p.s - p.t
    top = after
    if second_order:
        top = after - alpha * ((after @ c.mT) @ x.c + x.d @ (d.mT @ after)) @ p.s
    return Factors(x.b - eta * top @ at, x.a - eta * bt @ top, d, c)


def descent(x: Factors, p: Problem, eta: float) -> Factors:
    """One step of gradient descent on the upper level alone."""
    slope = (x.b @ x.a) @ p.s - p.t
    return replace(x, b=x.b - eta * slope @ x.a.mT, a=x.a - eta * x.b.mT @ slope)


def maml(x: Factors, p: Problem, eta: float, alpha: float) -> Factors:
    """One step along (I - alpha H) grad f(x - alpha grad f(x)) (Per-FedAvg)."""
    slope = (x.b @ x.a) @ p.s - p.t
    there = descent(x, p, alpha)
    after = (there.b @ there.a) @ p.s - p.t
    vb, va = after @ there.a.mT, there.b.mT @ after
    turn = (vb @ x.a + x.b @ va) @ p.s
    hb, ha = turn @ x.a.mT + slope @ va.mT, vb.mT @ slope + x.b.mT @ turn
    return replace(x, b=x.b - eta * (vb - alpha * hb), a=x.a - eta * (va - alpha * ha))


@dataclass(frozen=True)
class Method:
    """What the methods differ in. private: r~, 0 for none. meta: Per-FedAvg. averaged: no for local training.

    cut: HETLoRA, every client at its target's rank.
    """

    rank: int
    private: int = 0
    second_order: bool = True
    meta: bool = False
    averaged: bool = True
    cut: bool = False

    def begin(self, p: Problem) -> Factors:
        """A and C drawn from N(0, 1/n), B = D = 0; A is common, and a client's own seed draws C."""
        seeds, clients, size, _ = p.truth.shape

        def drawn(rows: int, *address: str | int) -> Array:
            draws = [rng(seed, "start", *address).normal(size=(rows, size)) for seed in range(seeds)]
            return np.stack(draws) / size**0.5

        a = np.repeat(drawn(self.rank, "common")[:, None], clients, axis=1)
        c = np.stack([drawn(self.private, "private", k) for k in range(clients)], axis=1)
        x = Factors(np.zeros_like(a.mT), a, np.zeros_like(c.mT), c)
        return self.within(x, p)

    def within(self, x: Factors, p: Problem) -> Factors:
        """Cut to each client's own rank: components with b = a = 0, which gradients leave there."""
        if not self.cut:
            return x
        present = np.arange(self.rank) < np.array(p.targets)[:, None]
        return replace(x, b=x.b * present[:, None, :], a=x.a * present[:, :, None])

    def step(self, x: Factors, p: Problem, rate: float) -> Factors:
        if self.private:
            return two_levels(x, p, rate, rate, self.second_order)
        return maml(x, p, rate, rate) if self.meta else descent(x, p, rate)

    def merge(self, x: Factors, p: Problem) -> Factors:
        """Every client gets the mean of B and the mean of A; in HETLoRA weighted by ||B_k A_k||_F, and cut."""
        if not self.averaged:
            return x
        weight = np.linalg.norm(x.b @ x.a, axis=(2, 3), keepdims=True) if self.cut else np.ones_like(x.b[..., :1, :1])
        weight = weight / weight.sum(1, keepdims=True)
        b, a = (np.broadcast_to((weight * part).sum(1, keepdims=True), part.shape) for part in (x.b, x.a))
        return self.within(replace(x, b=b, a=a), p)

    def predict(self, x: Factors, p: Problem, rate: float) -> Array:
        """W_k of every client; in Per-FedAvg after one more step on its own data."""
        x = descent(x, p, rate) if self.meta else x
        return x.b @ x.a + x.d @ x.c


def run(method: Method, p: Problem, rate: float, steps: int, interval: int) -> tuple[Array, Array]:
    """W_k of every seed and client after the last aggregation, and just before it."""
    x = method.begin(p)
    before = method.predict(x, p, rate)
    for t in range(1, steps + 1):
        x = method.step(x, p, rate)
        if t % interval == 0:
            if t + interval > steps:
                before = method.predict(x, p, rate)
            x = method.merge(x, p)
    return method.predict(x, p, rate), before


# ---- what is reported


def excess(w: Array, p: Problem) -> Array:
    """(seeds,): mean over clients of ||W_k - W*_k||_F^2 / 2, the population's excess risk as X ~ N(0, I)."""
    return np.asarray(0.5 * ((w - p.truth) ** 2).sum((2, 3)).mean(1))


def ranks(w: Array, threshold: float) -> Array:
    """(seeds, clients): singular values above `threshold` times the largest."""
    sizes = np.linalg.svd(w, compute_uv=False)
    return np.asarray((sizes > threshold * sizes[..., :1]).sum(-1))


def row(w: Array, before: Array, p: Problem, threshold: float) -> dict[str, Any]:
    """Excess risks, learned ranks, and the first seed's singular values, of one method."""
    found, error, sizes = ranks(w, threshold), excess(w, p), np.linalg.svd(w[0], compute_uv=False)[:, :8]
    return {
        "excess": float(error.mean()),
        "excess_deviation": float(error.std(ddof=1)) if len(error) > 1 else 0.0,
        "excess_before_aggregation": float(excess(before, p).mean()),
        "seeds_recovered": int((found == np.array(p.targets)).all(1).sum()),
        "rank_error": float(np.abs(found - np.array(p.targets)).mean()),
        "excess_by_seed": [float(f"{value:.3g}") for value in error],
        "ranks_by_seed": [",".join(map(str, one)) for one in found],
        "singular_values_of_seed_0": [" ".join(f"{value:.4f}" for value in one) for one in sizes],
    }


# ---- the study


@dataclass(frozen=True)
class Cell:
    """One run: a method on one problem of a table. interval: local steps between two aggregations."""

    table: str
    targets: tuple[int, ...]
    samples: int
    interval: int
    method: str

    def __str__(self) -> str:
        ranks = ",".join(map(str, self.targets))
        return f"{self.table:12} ({ranks:19}) N={self.samples:<4} I={self.interval:<2} {self.method:19}"

    def play(self, study: dict[str, Any], steps: int) -> tuple[dict[str, Any], float]:
        """Its row and its seconds."""
        table, method = study["tables"][self.table], Method(**study["methods"][self.method])
        p = problem(study, self.targets, self.samples, table["noise"], table["seeds"])
        clock = time.perf_counter()
        w, before = run(method, p, study["rate"], steps, self.interval)
        return row(w, before, p, table["threshold"]), time.perf_counter() - clock


def cells(study: dict[str, Any]) -> list[Cell]:
    return [
        Cell(name, tuple(targets), samples, interval, method)
        for name, table in study["tables"].items() for targets in table["targets"]
        for samples in table["samples"] for interval in table["intervals"] for method in table["methods"]
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pf2lora_synthetic.json")
    args = parser.parse_args()
    study = yaml.safe_load((HERE / "pf2lora_synthetic.yaml").read_text())
    steps = {name: table["steps"] for name, table in study["tables"].items()}
    todo, seconds = cells(study), 0.0
    for cell in todo:
        expected = cell.play(study, PROBE)[1] / PROBE * steps[cell.table]
        seconds += expected
        print(f"{cell} {steps[cell.table]} steps, about {expected:.0f} s", flush=True)
    total = sum(steps[cell.table] for cell in todo)
    print(f"forecast: {len(todo)} runs, {total} steps, {seconds:.0f} s in all", flush=True)
    result: dict[str, Any] = {
        "study": study, "command": "OMP_NUM_THREADS=1 python benchmarks/pf2lora_synthetic.py", "machine": machine.describe() | {"threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "forecast": {"runs": len(todo), "steps": total, "seconds": round(seconds)},
        "tables": {name: [] for name in study["tables"]},
    }  # fmt: skip
    started = time.perf_counter()
    for cell in todo:
        found, took = cell.play(study, steps[cell.table])
        result["tables"][cell.table].append(asdict(cell) | found | {"seconds": round(took, 1)})
        print(f"{cell} excess {found['excess']:.3g}, ranks in {found['seeds_recovered']} seeds of "
              f"{len(found['excess_by_seed'])}, off by {found['rank_error']:.2f}", flush=True)  # fmt: skip
    result["seconds"] = round(time.perf_counter() - started)
    args.out.write_text(json.dumps(result, indent=1))
    print(f"{result['seconds']} s, {args.out}")


if __name__ == "__main__":
    main()
