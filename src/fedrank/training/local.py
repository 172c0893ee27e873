"""The local step: train an adapter on a client's rows."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor

from fedrank import together
from fedrank.adapter import Adapter
from fedrank.increments import digest
from fedrank.protocol import Job, Lower, Observe, Update
from fedrank.trace import span
from fedrank.training import course, fused, prefix, tasks
from fedrank.training.compute import Compute, Increment
from fedrank.training.course import Ask, Course, TrainingError
from fedrank.training.frozen import Frozen, freeze
from fedrank.training.hooks import incremented, increments, mounted
from fedrank.training.models import Model, dropouts
from fedrank.training.prefix import Kept, Prefix
from fedrank.training.quantised import held
from fedrank.training.tasks import Encoded

log = logging.getLogger(__name__)

PLAIN = Compute("float32", "torch")


def numerics(
    threads: int,
    device: str,
    compute: Compute = PLAIN,
    packed: bool = False,
    stack: int = 1,
    prefix: bool = False,
) -> dict[str, Any]:
    """All that bit equality hangs on; two runs agree to the bit only where these agree."""
    return {
        "compute": compute.dtype,
        "products": compute.products,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "stack": stack,
        "rows": "packed" if packed else "padded",
        "prefix": "apart" if prefix else "in every pass",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def drawn(device: str, random: np.random.Generator) -> Iterator[None]:
    """torch draws from this while the block runs."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        seed = int(random.integers(1 << 62))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a stack trace for each kind of device
        if device != "cpu":
            torch.cuda.manual_seed_all(seed)
        yield


@dataclass(frozen=True, eq=False)
class Trainer:
    """One frozen model and its tokenised data, shared by all clients of this process.

    compute: how the model does, but for differences of gradients, which are taken in float32.
    timed: forward passes are. prefix_bytes: what may be kept on disk of the hidden states below the lowest block with
    components; where those of all tokens would not fit, no pass begins above them. offload: what the optimizer reads and
    writes is in the memory of the host.
    """

    model: Model
    train: Encoded
    test: Encoded
    lr: float
    threads: int
    device: str
    compute: Compute = PLAIN
    timed: bool = False
    prefix_bytes: int = 0
    offload: bool = False
    working: dict[str, tuple[dict[str, Tensor], dict[str, list[Increment]]]] = field(default_factory=dict)

    @cached_property
    def frozen(self) -> Frozen:
        return freeze(self.model, self.compute, self.device)

    @cached_property
    def exact(self) -> Frozen:
        return freeze(self.model, Compute("float32", self.compute.products), self.device)

    def stepping(self, derivative: str | None) -> Frozen:
        """What steps go through: in float32 where the difference of two gradients is to be more than their rounding."""
        return self.exact if derivative == "finite" and self.compute.dtype != "float32" else self.frozen

    @cached_property
    def kept(self) -> dict[Encoded, Kept]:
        """Where hidden states are kept, of both sets or of none; made before workers are, so that they share it."""
        if self.frozen.blocks is None:
            return {}
        width, dtype = self.model.base.config.get_text_config().hidden_size, self.frozen.dtype
        tokens = int(self.train.starts[-1] + self.test.starts[-1])
        if not (needed := tokens * width * dtype.itemsize):  # a server without rows
            return {}
        if needed > self.prefix_bytes:
            log.info("no pass begins above frozen blocks: %d bytes, more than engine.prefix_bytes", needed)
            return {}
        return {one: Kept(one, width, dtype) for one in (self.train, self.test)}

    @contextmanager
    def session(self) -> Iterator[None]:
        """The worker's threads, which are part of its numerics; the caller's number is put back."""
        if together.meeting():  # who called it has entered a session, and computes
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def fit(
        self, job: Job, rows: np.ndarray, observe: Observe | None = None, lower: Lower | None = None,
        encoded: Encoded | None = None,
    ) -> Update:  # fmt: skip
        """Train the job's planned components on these rows, of a client's own where given; a fresh AdamW sees just those.

        With a lower level each step is a bilevel one, whose lower batches are drawn apart. In a meeting it is done
        together with the other clients that are there.
        """
        update: Update = together.ask(self.fit_all, Ask(job, rows, observe, lower, encoded))
        return update

    def fit_all(self, asks: list[Ask]) -> list[Update | Exception]:
        """Several clients' trainings, stacked over one pass of the frozen base where they go through it alike.

        What one of them alone gets wrong is its own outcome.
        """
        sets = [self.train if ask.encoded is None else ask.encoded for ask in asks]
        encoded = sets[0]
        if any(other is not encoded for other in sets):
            encoded, firsts = tasks.joined(sets), np.cumsum([0, *map(len, sets)])
            asks = [replace(ask, rows=ask.rows + first) for ask, first in zip(asks, firsts[:-1], strict=True)]
        courses = [together.outcome(partial(course.begin, ask, self.lr, self.device, self.offload)) for ask in asks]
        stacks: dict[Any, list[Course]] = {}
        for at, one in enumerate(courses):
            if isinstance(one, Exception):
                continue
            job = one.ask.job
            # What is drawn in a pass, and what is timed, has to be one client's.
            alone = not one.single or job.local.dropout > 0 or self.timed
            alike = at if alone else (digest(job.base_updates), tuple(one.live.learning), job.plan.learn)
            stacks.setdefault(alike, []).append(one)
        for stack in stacks.values():
            try:
                if stack[0].single:
                    self._train(stack, encoded)
                else:
                    self._train_twice(stack[0], encoded)
            except Exception as error:  # of a pass that all of these share
                for one in stack:
                    one.fail(error)
        return [one if isinstance(one, Exception) else together.outcome(one.update) for one in courses]

    def _train(self, stack: list[Course], encoded: Encoded) -> None:
        """All steps of these clients; the k-th steps of all that have so many are one pass."""
        job, frozen, learning = stack[0].ask.job, self.frozen, list(stack[0].live.learning)  # alike in all of them
        with (
            self._training(frozen, job, learning),
            fused.mounted(frozen, [one.live for one in stack], *self.updated(job.base_updates)) as mounts,
            self._watched(frozen.network) as forward,
            self._kept(frozen.base, learning, job),
        ):
            prefixes: list[Prefix] = []
            if all(one.visits_all for one in stack):  # else more would be computed for rows that nobody sees
                chunks = [prefix.batches(encoded, one.ask.rows, frozen.packs) for one in stack]
                kept = self.kept.get(encoded)
                prefixes = fused.prefixes(frozen, kept, mounts, chunks, job.base_updates, self.device)
            while True:
                started = time.perf_counter()
                steps = [(at, batch) for at, one in enumerate(stack) if (batch := next(one.batches, None)) is not None]
                if not steps:
                    break
                passed = [(mounts[at], batch) for at, batch in steps]
                begun = [prefixes[at] for at, _ in steps] if prefixes else []
                outputs = fused.outputs(frozen, encoded, passed, mounts, self.device, begun)
                found = [tasks.loss(logits, labels) for logits, labels in outputs]
                with span("backward"):
                    torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]
                for (at, batch), loss in zip(steps, found, strict=True):
                    try:
                        stack[at].step(loss, mounts[at], len(batch))
                    except Exception as error:
                        stack[at].fail(error)
                seconds, rows = time.perf_counter() - started, sum(len(batch) for _, batch in steps)
                for at, batch in steps:
                    stack[at].seconds += seconds * len(batch) / rows
        if self.timed:
            stack[0].forward_seconds = sum(forward)

    def _train_twice(self, one: Course, encoded: Encoded) -> None:
        """A client's bilevel steps, on layers that can be differentiated twice, with the adapters as hooks on them."""
        job, two = one.ask.job, one.two
        assert two is not None
        frozen, twice = self.stepping(two.rule.derivative), two.rule.derivative == "double"
        if job.local.checkpoint and twice:  # it would compute again from what was bound since
            raise TrainingError(
                "local.checkpoint: it has no second derivative; method.derivative: finite or first needs none"
            )
        others, started = course.drawn_batches(one.ask.rows, job.local, job, "lower batches"), time.perf_counter()
        learning = [*two.upper.learning, *(two.lower.learning if two.lower else ())]
        with (
            self._training(frozen, job, learning),
            fused.unmounted(frozen, *self.updated(job.base_updates)),
            mounted(frozen.layers, frozen.heads, two.upper),
            mounted(frozen.layers, frozen.heads, two.lower) if two.lower else nullcontext(),
            self._watched(frozen.network) as forward,
            self._kept(frozen.base, list(two.upper.learning), job),
        ):
            for at, (batch, other) in enumerate(zip(one.batches, others, strict=True)):
                with span("both levels"):
                    lower = partial(self._lower, frozen, encoded, other, twice, job, at)
                    loss = two.step(lower, partial(self._upper, frozen, encoded, batch))
                one.step(loss, None, len(batch) + len(other))
        one.seconds += time.perf_counter() - started
        if self.timed:
            one.forward_seconds = sum(forward)

    def _kept(self, base: Any, learning: list[str], job: Job) -> AbstractContextManager[None]:
        """What passes through this base keep for backward, as the config wants it."""
        if not job.local.checkpoint:
            return nullcontext()
        blocks = prefix.blocks(base, list(self.frozen.layers))
        return prefix.checkpointed(base, blocks, prefix.lowest(learning, blocks), job.local.dropout > 0)

    def _upper(self, frozen: Frozen, encoded: Encoded, batch: np.ndarray, twice: bool = False) -> torch.Tensor:
        """The loss of what is mounted, on these rows."""
        return tasks.loss(*frozen.logits(encoded, batch, self.device, twice=twice))

    def _lower(
        self, frozen: Frozen, encoded: Encoded, batch: np.ndarray, twice: bool, job: Job, step: int
    ) -> torch.Tensor:
        """The same, with dropout that is the same every time and takes nothing from the draws of plain training."""
        with drawn(self.device, job.rng("lower dropout", step)):
            return self._upper(frozen, encoded, batch, twice)

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
        after = network.register_forward_hook(lambda *_: seconds.append(now()), always_call=True)
        try:
            yield seconds
        finally:
            before.remove()
            after.remove()

    def updated(self, updates: tuple[Adapter, ...]) -> tuple[dict[str, Tensor], dict[str, list[Increment]]]:
        """The weights of the base with these increments, added up from its own; the last sum is kept.

        Weights of fewer bits than an increment's cannot hold it: then it is computed beside them.
        """
        if not updates:
            return {}, {}
        key = digest(updates)
        if key not in self.working:
            self.working.clear()  # one copy of the base at a time
            modules = self.model.modules
            exact = all(layer.weight.dtype == torch.float32 and not held(layer) for layer in modules.values())
            self.working[key] = (incremented(modules, updates), {}) if exact else ({}, increments(modules, updates))
        return self.working[key]

    @contextmanager
    def _training(self, frozen: Frozen, job: Job, learning: Sequence[str]) -> Iterator[None]:
        """Training mode with the job's dropout of the base, its draws addressed; then eval.

        What is frozen below the lowest block that learns has none, whether it is kept or not, but for what a model drops
        outside of its blocks by a function.
        """
        network, dropout = frozen.network, job.local.dropout
        still = [] if frozen.blocks is None else frozen.blocks.below(prefix.lowest(learning, frozen.blocks.modules))
        places = dropouts(network)
        rates = [getattr(*place) for place in places]
        with drawn(self.device, job.rng("dropout")):
            try:
                for module, name in places:
                    setattr(module, name, dropout)
                network.train(dropout > 0)
                for module in still:
                    module.eval()
                yield
            finally:
                network.eval()
                for (module, name), rate in zip(places, rates, strict=True):
                    setattr(module, name, rate)
