"""LEGEND (reconstructed): LoRA depth by device capacity, ranks rise to the output (Liu et al., 2025, arXiv:2412.20004).

Only the paper's abstract was available: the equations are a reconstruction that agrees with it, and these points
were open. Ranks: one arithmetic sequence over the blocks, common to all clients, with alpha / rank the same in
every block. Depth: a suffix of the blocks, as deep as the deadline lets each client go, anew in every round.
Estimates: seconds of a whole round, so local steps are in them; the compute that a rank takes (g) is in f and b. A client's
first measured round replaces what its machine promised; one of which nothing is known gets the least depth. The
seconds of a transfer are shared out by bytes between the components, which grow with depth, and the rest of the
frame. Where no client is able to train all blocks, the deadline lets the deepest reach what it can; the blocks
below keep their start. Bytes are counted as float32, and in max_bytes with the head. A client that is fast, but
capped by its memory or by bytes, has no part in the blocks below: where all fast ones are, these may stay untrained.
Memory is each device's own cap, max_seconds and max_bytes are common to all. Left out of what the reconstruction
offers: ranks of each device's own, random depths, prefixes, a limit on how far a depth moves in a round, and
estimates from a total of seconds that is not told apart into forward and backward.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from fedrank import cost
from fedrank.adapter import Adapter, kaiming
from fedrank.aggregation import WEIGHTS, average
from fedrank.protocol import About, ClientId, Device, Job, Load, ModelSpec, Plan, State, Update, Updates, rng
from fedrank.selection import arithmetic, depths, everything, suffix

TIMINGS = ("forward_seconds", "backward_seconds", "upload_seconds", "download_seconds")  # of a client's round


@dataclass(frozen=True)
class LEGEND:
    """Each client trains the last k blocks, k by the seconds its rounds took; a block is averaged over its holders.

    budget: ranks of all blocks together (psi); None: the adapter's rank per block. least: the first block's rank.
    min_depth: k of the slowest. slack: added to the deadline, as a share. quantile: of the cohort's full rounds, the
    deadline's other anchor; 0 is the fastest client's. smoothing: rho of the moving averages. max_seconds,
    max_bytes: a client's local training and its two frames per round may not take more. Controls: depth "full",
    other rank orders, and download "full", in which the lower blocks' components are in the forward pass, frozen.
    """

    budget: int | None = None
    least: int = 2
    min_depth: int = 1
    slack: float = 0.05
    quantile: float = 0.0
    smoothing: float = 0.8
    depth: Literal["adaptive", "full"] = "adaptive"
    ranks: Literal["increasing", "uniform", "decreasing"] = "increasing"
    download: Literal["suffix", "full"] = "suffix"
    weights: Literal["examples", "uniform"] = "examples"
    max_seconds: float | None = None
    max_bytes: float | None = None

    default_lr: ClassVar[float] = 3e-3
    about: ClassVar[About] = About(
        paper="Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices", year=2025,
        url="https://arxiv.org/abs/2412.20004", differs=("depth", "data"),
        travels="B, A of a client's last blocks, and head, both ways",
        exact_start=False, exact_aggregation=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("least", "min_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.slack >= 0:
            raise ValueError(f"slack must not be negative, got {self.slack}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {self.quantile}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")
        for name in ("max_seconds", "max_bytes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        layer = np.unique([m.block for m in spec.modules], return_inverse=True)[1]
        layers = 1 + int(layer.max())
        if self.min_depth > layers:
            raise ValueError(f"method.min_depth={self.min_depth} is above the {layers} adapted blocks")
        budget = layers * spec.rank if self.budget is None else self.budget
        if budget < layers:
            raise ValueError(f"method.budget={budget} is below one rank for each of the {layers} adapted blocks")
        ranks = arithmetic(layers, budget, budget if self.ranks == "uniform" else self.least)
        ranks = ranks[::-1] if self.ranks == "decreasing" else ranks
        by_name = {m.name: int(ranks[at]) for m, at in zip(spec.modules, layer, strict=True)}
        adapter = spec.with_head(kaiming(spec.shapes, by_name, spec.scale, rng(seed, "begin")))
        numbers = np.bincount(layer, [by_name[m.name] * (m.out + m.in_) for m in spec.modules])
        sigma = numbers.sum() / budget  # numbers per unit of rank of a block
        arrays = {
            "layer": layer,  # of each module, in the adapter's order
            "units": np.cumsum(numbers[::-1]) / sigma,  # R(k), ranks in the last k = 1, 2, ... blocks
            "sigma": np.array(sigma),
            "flops": np.array(cost.block_flops(spec)) * (spec.blocks / layers),  # per block: of a token, of a pair
        }
        state = State(0, rounds, adapter, arrays=arrays)
        memory = []  # bytes at the peak by depth: in any case, per token, pair and row of the largest batch
        frames = []  # bytes up and down by depth; both are without components below min_depth, which nobody plans
        for depth in range(1, layers + 1):
            plan = self._suffix(state, depth) or Plan({})
            loads = [
                Load(0, 0, 0, peak_tokens=tokens, peak_pairs=pairs, peak_rows=rows)
                for tokens, pairs, rows in ((0, 0, 0), (1000, 0, 0), (0, 1000, 0), (0, 0, 1000))
            ]
            fixed, *more = (cost.peak_memory(spec, adapter, plan, load) for load in loads)
            memory.append([fixed, *((held - fixed) / 1000 for held in more)])
            frames.append([way(adapter, plan, len(spec.modules), "f32").frame for way in (cost.up, cost.down)])
        return replace(state, arrays={**arrays, "memory": np.array(memory), "frames": np.array(frames)})

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> dict[ClientId, Plan | None]:
        capacities = np.array([self._capacity(state, device) for device in cohort.values()])
        found = caps = self._caps(state, list(cohort.values()), capacities)
        if self.depth == "adaptive":
            found, _ = depths(_seconds(state, capacities), caps, self.min_depth, self.slack, self.quantile)
        plans: dict[int, Plan | None] = {k: self._suffix(state, k) for k in set(found.tolist())}
        return dict(zip(cohort, (plans[k] for k in found.tolist()), strict=True))

    def _suffix(self, state: State, depth: int) -> Plan | None:
        if depth < self.min_depth:
            return None  # not even that much is within its caps
        train = suffix(state.adapter, state.arrays["layer"], depth)
        rest = {name: ids for name, ids in everything(state.adapter).items() if name not in train}
        return Plan(train=train, frozen=rest if self.download == "full" else {})

    def _capacity(self, state: State, device: Device) -> Float[np.ndarray, "4"]:
        """[f, b, link, fixed] in seconds: as estimated, else as the machine promises, else NaN."""
        if (kept := state.arrays.get(f"capacity/{device.id}")) is not None:
            return kept
        load, flops = device.load, state.arrays["flops"]
        rates = (device.flops_per_second, device.up_bytes_per_second, device.down_bytes_per_second)
        if load is None or min(rates) <= 0 or not flops.any():
            return np.full(4, np.nan)
        layers, (up, down) = len(state.arrays["units"]), state.arrays["frames"][-1]
        forward = layers * float(flops @ [load.tokens, load.pairs]) / rates[0]  # and backward costs as much: no
        timings = (forward, forward, up / rates[1], down / rates[2])  # gradients of the frozen weights
        return self._observed(state, layers, state.adapter, timings)

    def _observed(self, state: State, depth: int, adapter: Adapter, timings: Sequence[float]) -> Float[np.ndarray, "4"]:
        """A round's `TIMINGS` at this depth, per block forward, per block backward, per unit of rank, and the rest."""
        forward, backward, up, down = timings
        units, sigma = state.arrays["units"], float(state.arrays["sigma"])
        rest = cost.up(adapter, Plan({}), 0, "f32").frame / (4 * sigma)  # a frame without components
        link = (up + down if self.download == "suffix" else up) / (units[depth - 1] + rest)
        fixed = link * rest + (0 if self.download == "suffix" else down)
        return np.array([forward / len(units), backward / depth, link, fixed])

    def _caps(self, state: State, devices: list[Device], capacities: Float[np.ndarray, "n 4"]) -> Int[np.ndarray, "n"]:
        """The largest depth within a device's memory and the caps on seconds and bytes; what is unknown is no cap."""
        units = state.arrays["units"]
        k = np.arange(1, len(units) + 1)
        peaks = np.array(
            [[1, d.load.peak_tokens, d.load.peak_pairs, d.load.peak_rows] if d.load else [1, 0, 0, 0] for d in devices]
        )
        needed = peaks @ state.arrays["memory"].T
        fits = needed <= np.array([[device.memory_bytes or np.inf] for device in devices])
        if self.max_seconds is not None:
            fits &= ~(capacities[:, :1] * len(units) + capacities[:, 1:2] * k > self.max_seconds)
        if self.max_bytes is not None:
            # A full download's last depth may be shorter than the one before: nothing is frozen there.
            fits &= np.maximum.accumulate(state.arrays["frames"].sum(axis=1)) <= self.max_bytes
        return np.asarray(fits.sum(axis=1))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Updates) -> State:
        adapter = average(state.adapter, updates, WEIGHTS[self.weights])
        layer = dict(zip(state.adapter.blocks, state.arrays["layer"].tolist(), strict=True))
        layers = len(state.arrays["units"])
        held, capacities = [], {}
        for client, update in updates:
            held.append(layers - min(layer[name] for name in update.adapter.blocks))
            timings = [update.metrics.get(name, -1.0) for name in TIMINGS]
            if min(timings) < 0:  # nothing was measured: what is known of this client stays
                continue
            now, name = self._observed(state, held[-1], update.adapter, timings), f"capacity/{client}"
            before = state.arrays.get(name, now)
            capacities[name] = before + (1 - self.smoothing) * (now - before)
        found = {"mean": np.mean(held), "lowest": min(held), "highest": max(held)}
        metrics = {f"{name}_depth": float(value) for name, value in found.items()}
        if capacities and self.depth == "adaptive":  # which these clients would have, were they drawn again
            seconds = _seconds(state, np.array(list(capacities.values())))
            caps = np.full(len(seconds), layers)
            metrics["estimated_deadline_seconds"] = depths(seconds, caps, self.min_depth, self.slack, self.quantile)[1]
        return state.next(adapter, arrays={**state.arrays, **capacities}, metrics=metrics)


def _seconds(state: State, capacities: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n layers"]:
    """t(k) = L f + k b + link R(k) + fixed, by client and depth."""
    units = state.arrays["units"]
    forward, backward, link, fixed = capacities.T[:, :, None]
    return np.asarray(len(units) * forward + np.arange(1, len(units) + 1) * backward + link * units + fixed)
