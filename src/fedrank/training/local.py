"""The local step: train an adapter on a client's rows, or count what it predicts right."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
import xxhash
from torch import Tensor

from fedrank.adapter import Adapter
from fedrank.config import Local
from fedrank.protocol import Address, Job, Load, Lower, Observe, Update
from fedrank.trace import span
from fedrank.training import bilevel, fused, tasks
from fedrank.training.frozen import Compute, Frozen, freeze
from fedrank.training.hooks import Live, incremented, live, mounted, swapped
from fedrank.training.models import Model
from fedrank.training.packing import filled
from fedrank.training.tasks import Encoded

EVALUATION_BATCH = 64
EXACT = Compute("float32", "torch")


class TrainingError(RuntimeError):
    """Local training that cannot give an update."""


def numerics(threads: int, device: str, compute: Compute = EXACT, packed: bool = False) -> dict[str, Any]:
    """All that bit equality hangs on; two runs agree to the bit only where these agree."""
    return {
        "compute": compute.dtype,
        "products": compute.library,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "stack": 1,
        "rows": "packed" if packed else "padded",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


@dataclass(frozen=True, eq=False)
class Trainer:
    """One frozen model and its tokenised data, shared by all clients of this process.

    compute: how the model does; bilevel steps, which are differentiated twice, take the plain layers in float32.
    timed: forward passes are.
    """

    model: Model
    train: Encoded
    test: Encoded
    lr: float
    threads: int
    device: str
    compute: Compute = EXACT
    timed: bool = False
    working: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def frozen(self) -> Frozen:
        return freeze(self.model, self.compute, self.device)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The worker's threads, which are part of its numerics; the caller's number is put back."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def fit(self, job: Job, rows: np.ndarray, observe: Observe | None = None, lower: Lower | None = None) -> Update:
        """Train the job's planned components on these rows; a fresh AdamW sees exactly those tensors.

        With a lower level each step is a bilevel one, whose lower batches are drawn apart.
        """
        local: Local = job.local
        train, frozen = job.adapter.take(job.plan.train), job.adapter.take(job.plan.frozen)
        adapter = live(train, frozen, job.plan.learn, self.device)
        rate = (local.lr or self.lr) * _schedule(local.schedule, job.round, job.rounds)
        values = list(adapter.values.values())
        optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.0) if values else None
        two = None if lower is None else bilevel.begin(adapter, lower, job.plan.learn, self.device, optimizer)
        others = _batches(rows, local, job, "lower batches")
        started, losses, seen = time.perf_counter(), [], 0
        on = self._mounted(adapter, job.base_updates) if two is None or two.single else self._twice(two, job)
        network = self.frozen.network if two is None or two.single else self.model.network
        with (
            self._training(network, local.dropout, job),
            on as mount,
            self._watched(network) as forward,
        ):
            for at, batch in enumerate(_batches(rows, local, job)):
                if mount is None:
                    assert two is not None
                    inner, outer = partial(self._again, next(others), job, at), partial(self._plainly, batch)
                    with span("both levels"):
                        loss = two.step(inner, outer)
                else:
                    loss = self._loss(batch)
                    with span("backward"):
                        loss.backward()  # type: ignore[no-untyped-call]
                        mount.collect()
                losses.append(loss.detach())
                if observe is not None:
                    observe(adapter.values, adapter.grads)
                with span("optimizer"):
                    if local.clip is not None:
                        torch.nn.utils.clip_grad_norm_(values, local.clip)
                    if optimizer is not None:
                        optimizer.step()
                    for grad in adapter.grads.values():
                        grad.zero_()
                    if mount is not None:
                        mount.refresh()
                seen += len(batch)
        mean = float(torch.stack(losses).double().mean())
        if not math.isfinite(mean):
            raise TrainingError(f"the loss became {mean}; a lower local.lr than {rate:g} may help")
        metrics = {
            "loss": mean,
            "steps": float(len(losses)),
            "seconds": time.perf_counter() - started,
            "rows_seen": float(seen),
        }
        if self.timed:
            metrics["forward_seconds"] = sum(forward)
        private = {} if two is None else two.private
        return Update(adapter.export(train), examples=len(rows), metrics=metrics, private=private)

    def _loss(self, batch: np.ndarray) -> torch.Tensor:
        """The loss of what is mounted, on these rows."""
        return tasks.loss(*self.frozen.logits(self.train, batch, self.device))

    def _plainly(self, batch: np.ndarray) -> torch.Tensor:
        """The loss of what is mounted on the plain layers, on these rows."""
        inputs, labels = self.train.batch(batch, self.device)
        return tasks.loss(self.model.network(**inputs), labels)

    def _again(self, batch: np.ndarray, job: Job, step: int) -> torch.Tensor:
        """The same, with dropout that is the same every time and takes nothing from the draws of plain training."""
        with self._drawn(job, "lower dropout", step):
            return self._plainly(batch)

    @contextmanager
    def _drawn(self, job: Job, *address: Address) -> Iterator[None]:
        """torch's generators at this address while the block runs."""
        with torch.random.fork_rng(devices=[] if self.device == "cpu" else [self.device]):
            torch.manual_seed(int(job.rng(*address).integers(1 << 62)))
            yield

    def evaluate(
        self, adapter: Adapter, encoded: Encoded, rows: np.ndarray, base_updates: tuple[Adapter, ...] = ()
    ) -> dict[str, float]:
        """Loss and accuracy of the adapter on these rows (of completion tokens where the task generates)."""
        return scores(
            self.counts(adapter, encoded, tasks.by_length(encoded, rows, EVALUATION_BATCH), base_updates), len(rows)
        )

    def counts(
        self, adapter: Adapter, encoded: Encoded, batches: Iterable[np.ndarray], base_updates: tuple[Adapter, ...] = ()
    ) -> list[tuple[float, int, int]]:
        """Summed loss, right predictions, and predictions of each batch."""
        mount = live(adapter, Adapter({}, adapter.scale, {}), "", self.device)
        with torch.inference_mode(), self._mounted(mount, base_updates):
            return [tasks.counts(*self.frozen.logits(encoded, batch, self.device)) for batch in batches]

    @contextmanager
    def _watched(self, network: torch.nn.Module) -> Iterator[list[float]]:
        """The seconds of each forward pass of the network while a block runs; none where this is not wanted."""
        seconds: list[float] = []
        if not self.timed:
            yield seconds
            return

        def now() -> float:
            if self.device != "cpu":
                torch.cuda.synchronize(self.device)
            return time.perf_counter()

        before = network.register_forward_pre_hook(lambda *_: seconds.append(-now()))
        after = network.register_forward_hook(lambda *_: seconds.append(now()))
        try:
            yield seconds
        finally:
            before.remove()
            after.remove()

    def _mounted(self, adapter: Live, updates: tuple[Adapter, ...]) -> AbstractContextManager[fused.Mount]:
        return fused.mounted(self.frozen, adapter, self._updated(updates))

    @contextmanager
    def _twice(self, two: bilevel.Bilevel, job: Job) -> Iterator[None]:
        """Both levels on the plain layers, which can be differentiated twice."""
        modules, heads = self.model.modules, self.model.heads
        with (
            mounted(modules, heads, two.upper),
            mounted(modules, heads, two.lower) if two.lower else nullcontext(),
            swapped(modules, self._updated(job.base_updates)),
        ):
            yield

    def _updated(self, updates: tuple[Adapter, ...]) -> dict[str, Tensor]:
        """The weights of the base with these increments, added up from its own; the last sum is kept."""
        if not updates:
            return {}
        key = _digest(updates)
        if key not in self.working:
            self.working.clear()  # one copy of the base at a time
            self.working[key] = incremented(self.model.modules, updates)
        return self.working[key]

    @contextmanager
    def _training(self, network: torch.nn.Module, dropout: float, job: Job) -> Iterator[None]:
        """Training mode with the base's dropout at this rate, its draws addressed; back to eval after."""
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Dropout)]
        rates = [layer.p for layer in layers]
        with self._drawn(job, "dropout"):
            try:
                for layer in layers:
                    layer.p = dropout
                network.train(dropout > 0)
                yield
            finally:
                network.eval()
                for layer, rate in zip(layers, rates, strict=True):
                    layer.p = rate


def scores(counts: Iterable[tuple[float, int, int]], rows: int) -> dict[str, float]:
    """Loss and accuracy from the counts of all batches, in their order."""
    losses, rights, knowns = zip((0.0, 0, 0), *counts, strict=True)
    if not sum(knowns):
        raise TrainingError("no rows to evaluate on")
    return {"loss": sum(losses) / sum(knowns), "accuracy": sum(rights) / sum(knowns), "rows": float(rows)}


def _batches(rows: np.ndarray, local: Local, job: Job, stream: str = "batches") -> Iterator[np.ndarray]:
    return batches(rows, local, partial(job.rng, stream))


def batches(rows: np.ndarray, local: Local, draw: Callable[[int], np.random.Generator]) -> Iterator[np.ndarray]:
    """`local.epochs` epochs, each in an order drawn for it, or exactly `local.steps` batches over as many as that takes."""
    done = 0
    for epoch in count():
        if local.steps is None and epoch == local.epochs:
            return
        for batch in tasks.shuffled(rows, local.batch_size, draw(epoch)):
            if done == local.steps:
                return
            done += 1
            yield batch


def workload(
    rows: np.ndarray,
    lengths: np.ndarray,
    local: Local,
    draw: Callable[[int], np.random.Generator],
    packed: bool = False,
) -> Load:
    """What a round's training on these rows goes through; a batch is packed, or padded to its longest row."""
    parts = [lengths[batch] for batch in batches(rows, local, draw)]
    tokens = [filled(int(part.sum())) if packed else len(part) * int(part.max()) for part in parts]
    pairs = [len(part) * int(part.max()) ** 2 for part in parts]
    return Load(len(parts), sum(tokens), sum(pairs), max(tokens), max(pairs), sum(map(len, parts)))


def _schedule(kind: str, round: int, rounds: int) -> float:
    """The learning rate's factor in a round of 1..rounds: it falls over the run, not within a round."""
    left = 1 - (round - 1) / rounds
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[kind]


def _digest(updates: tuple[Adapter, ...]) -> str:
    """Names a sequence of base updates by its numbers."""
    state = xxhash.xxh3_128()
    for update in updates:
        state.update(f"{update.scale}".encode())
        for name, block in update.blocks.items():
            parts = [part for part in (block.B, block.e, block.A) if part is not None]
            state.update(f"{name}{[part.shape for part in parts]}".encode())
            for part in parts:
                state.update(part.tobytes(order="A"))
        for name, tensor in update.dense.items():
            state.update(name.encode() + tensor.tobytes())
    return state.hexdigest()


def majority(labels: np.ndarray) -> float:
    """The share of the most frequent class."""
    return float(np.bincount(labels).max() / len(labels))
