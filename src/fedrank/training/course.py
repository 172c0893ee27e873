"""One client's local training in progress: its adapter on the device, its optimizer, its batches, what came of them."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from fedrank.adapter import Adapter
from fedrank.config import Local
from fedrank.protocol import Job, Lower, Observe, Update
from fedrank.trace import span
from fedrank.training import bilevel, tasks
from fedrank.training.fused import Mount
from fedrank.training.hooks import Live, live
from fedrank.training.tasks import Encoded


class TrainingError(RuntimeError):
    """Local training that cannot give an update."""


@dataclass(frozen=True, eq=False)
class Ask:
    """What a method asks of `fit`, and the client's rows. encoded: what they are rows of; None: the trainer's."""

    job: Job
    rows: np.ndarray
    observe: Observe | None
    lower: Lower | None
    encoded: Encoded | None = None


@dataclass(eq=False)
class Course:
    """The training that was asked for. two: both levels, where there are two."""

    ask: Ask
    train: Adapter
    live: Live
    rate: float
    optimizer: torch.optim.Optimizer | None
    two: bilevel.Bilevel | None
    batches: Iterator[np.ndarray]
    failure: Exception | None = None
    seconds: float = 0.0
    forward_seconds: float | None = None
    seen: int = 0
    losses: list[Tensor] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether its steps are plain ones, of one level."""
        return self.two is None or self.two.single

    @property
    def visits_all(self) -> bool:
        """Whether each of its rows is in one of its batches."""
        local = self.ask.job.local
        return local.steps is None or local.steps * local.batch_size >= len(self.ask.rows)

    def fail(self, error: Exception) -> None:
        """It ends here, and its update is this exception; others that are trained together with it go on."""
        self.failure, self.batches = error, iter(())

    def step(self, loss: Tensor, mount: Mount | None, rows: int) -> None:
        """After a backward pass over these rows: clip, let the optimizer step, and begin anew."""
        self.losses.append(loss.detach())
        self.seen += rows
        if mount is not None:
            mount.collect()
        values = self.live.values
        if self.ask.observe is not None:
            self.ask.observe(values, self.live.grads)
        with span("optimizer"):
            if self.ask.job.local.clip is not None:
                torch.nn.utils.clip_grad_norm_(values.values(), self.ask.job.local.clip)
            if self.optimizer is not None:
                self.optimizer.step()
            for grad in self.live.grads.values():
                grad.zero_()
            if mount is not None:
                mount.refresh()

    def update(self) -> Update:
        """TrainingError where the loss is no longer a number."""
        if self.failure is not None:
            raise self.failure
        mean = float(torch.stack(self.losses).double().mean())
        if not math.isfinite(mean):
            raise TrainingError(f"the loss became {mean}; a lower local.lr than {self.rate:g} may help")
        metrics = {
            "loss": mean, "steps": float(len(self.losses)), "seconds": self.seconds, "rows_seen": float(self.seen)
        }  # fmt: skip
        if self.forward_seconds is not None:
            metrics["forward_seconds"] = self.forward_seconds
        private = {} if self.two is None else self.two.private
        return Update(self.live.export(self.train), examples=len(self.ask.rows), metrics=metrics, private=private)


def begin(ask: Ask, lr: float, device: str, offload: bool = False) -> Course:
    """A fresh AdamW sees exactly the tensors that learn. lr: where the config names none. offload: `hooks.Live.apart`."""
    lower = ask.lower
    if offload and lower is not None and (lower.private is None or lower.private.components):
        raise TrainingError("engine.offload: what learns on two levels learns where the model is; set it to false")
    started, job = time.perf_counter(), ask.job
    local: Local = job.local
    train = job.adapter.take(job.plan.train)
    on = live(train, job.adapter.take(job.plan.frozen), job.plan.learn, device, offload)
    rate = (local.lr or lr) * schedule(local.schedule, job.round, job.rounds)
    values = list(on.values.values())
    optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.0, fused=True) if values else None
    two = None if ask.lower is None else bilevel.begin(on, ask.lower, job.plan.learn, device, optimizer)
    drawn = drawn_batches(ask.rows, local, job)
    return Course(ask, train, on, rate, optimizer, two, drawn, seconds=time.perf_counter() - started)


def drawn_batches(rows: np.ndarray, local: Local, job: Job, stream: str = "batches") -> Iterator[np.ndarray]:
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


def schedule(kind: str, round: int, rounds: int) -> float:
    """The learning rate's factor in a round of 1..rounds: it falls over the run, not within a round."""
    left = 1 - (round - 1) / rounds
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[kind]
