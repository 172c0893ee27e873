"""What computes in one process and its workers: a frozen model, its clients' rows as tokens, training and evaluation."""

import atexit
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

import fedrank
from fedrank.client import MIN_TEST_ROWS, Site
from fedrank.config import Config, ConfigError
from fedrank.cost import Cost
from fedrank.engines.workers import Workers, fitting, keep_few_kernels, page_out
from fedrank.protocol import ClientId, Device, Execution, Job, Load, Method, ModelSpec, Plan, State, rng
from fedrank.store import Private
from fedrank.trace import span
from fedrank.training import texts
from fedrank.wire import Wire

log = logging.getLogger(__name__)


@contextmanager
def uncollected() -> Iterator[None]:
    """Garbage is not looked for: of modules, rows and tokens nearly all stays, and looking takes long."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def start(config: Config) -> None:
    """What has to be before anything large is loaded: what a config names is there, and torch is imported."""
    if config.generation.when != "never":
        texts.check()
    keep_few_kernels()
    _import()


@cache
def _import() -> None:
    """torch is slow to import: a typo should not wait for it. Modules stay, so garbage is not looked for among them."""
    gc.collect()  # what is garbage by now would stay too
    import fedrank.training.local  # noqa: F401 - brings all that is large

    gc.freeze()
    atexit.register(gc.freeze)  # the interpreter's last look would take a second


@dataclass(frozen=True, eq=False)
class Machine:
    """config: with what was tried here at the start written out. packed: rows of a batch lie one after the other.

    population: the clients whose rows are here, and the global test set; trainer: the model and these rows;
    judge: the evaluation; numerics: all that bit equality hangs on.
    """

    config: Config
    method: Method
    model: Any
    spec: ModelSpec
    population: Any
    trainer: Any
    judge: Any
    workers: Workers
    packed: bool
    numerics: dict[str, Any]

    def held(self, client: ClientId) -> Any:
        """A client's rows."""
        return self.population.held(self.population.names.index(client))

    def load(self, client: ClientId, round: int) -> Load:
        """What that round of a client's training goes through."""
        from fedrank.training import workload

        draw = partial(rng, self.config.seed, "job", round, client, "batches")  # the address of a job's
        mine = self.held(client)
        return workload.workload(mine.train, mine.encoded, self.config.local, draw, self.packed)

    def registered(self, device: Device) -> Device:
        """A client's device with the load that it expects.

        A round that is never played stands for those to come, but any rows may meet in their largest batch.
        """
        from fedrank.training import packing

        mine = self.held(device.id)
        size, length = min(self.config.local.batch_size, len(mine.train)), int(mine.encoded.lengths[mine.train].max())
        tokens, most = size * length, size * length**2
        if self.packed:
            tokens, most = packing.filled(tokens), size * packing.filled(length) ** 2
        read = size * int(mine.encoded.predictions[mine.train].max()) if mine.encoded.generates else size
        return replace(
            device,
            load=replace(self.load(device.id, 0), peak_tokens=tokens, peak_pairs=most, peak_rows=read),
        )

    def site(self, device: Device, wire: Wire, private: Private, cost: Callable[[int, Plan, int], Cost]) -> Site:
        """The client side of one of the population."""
        mine, config = self.held(device.id), self.config
        return Site(
            device, self.method, wire, private, config.local, config.seed,
            fit=partial(self.trainer.fit, rows=mine.train, encoded=mine.encoded),
            evaluate=partial(self.judge.own, mine) if len(mine.test) >= MIN_TEST_ROWS else None,
            session=self.trainer.session, cost=cost, measured=config.engine.timing == "measured", privacy=config.privacy,
        )  # fmt: skip

    @property
    def drawn(self) -> dict[str, np.ndarray]:
        """Frozen layers that were made from the seed, which an export must carry."""
        layers = self.model.drawn.items()
        return {f"{n}.{p}": t.float().numpy(force=True) for n, m in layers for p, t in m.named_parameters()}

    def facts(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """What data and model were: a resumed run must find the same. kept: what of a client's function stays there."""
        config, model, population = self.config, self.model, self.population
        conv1d = (
            "Conv1D" in (type(m).__name__, getattr(getattr(m, "source_cls", None), "__name__", ""))
            for m in model.modules.values()
        )
        return {
            "data": population.name, "rows": {"train": population.train_rows, "test": len(population.test)},
            "hash": {"train": population.digest, "test": population.test.digest()}, "labels": list(population.labels),
            "model": {"name": config.model.name, "fingerprint": self.spec.fingerprint, "pooling": model.pooling,
                      "source": model.source, "base_class": type(model.base).__name__, "task": config.task,
                      "conv1d": any(conv1d)},
            "partition": population.partition, **kept,
        }  # fmt: skip

    @property
    def about(self) -> dict[str, Any]:
        """What is worth telling at the start."""
        from fedrank.training import scoring

        config, population, label = self.config, self.population, self.population.test.label
        return {
            "data": population.name, "train_rows": population.train_rows, "test_rows": len(population.test),
            "classes": len(population.labels), "hash": population.digest[:16], "model": config.model.name,
            "modules": len(self.spec.modules), "parameters": self.spec.parameters, "method": config.method["name"],
            "redraws": population.partition["redraws"], "dropped": population.partition["dropped"],
            "majority": None if label is None or not len(label) else scoring.majority(label),
        }  # fmt: skip

    def counted(self, plan: Plan, begin: State, device: Device) -> "Machine":
        """With what a step that is differentiated twice keeps, which is found by trying; ConfigError where it fails."""
        if getattr(self.method, "lower", None) != "double":
            return self
        from fedrank.training import bilevel, course, models, twice

        step = partial(self._step, plan, begin, device)

        def count(_: None) -> tuple[float, float, float, float]:
            steps, most = self.trainer.stepping("double"), models.longest(self.model.base, self.model.tokenizer)
            return twice.kept(steps, most, self.population.typical, step)

        # Where there is a GPU, a process that is forked after a backward pass can make none, so workers' parents do not.
        with Workers(min(2, self.workers.count), self.workers.threads) as apart:
            try:
                (found,) = apart.share(count)([None])
            except (bilevel.DerivativeError, course.TrainingError) as error:
                raise ConfigError(f"method.derivative=double, tried on a few tokens: {error}") from None
        return replace(self, spec=replace(self.spec, execution=replace(self.spec.execution, twice=found)))

    def _step(self, plan: Plan, begin: State, device: Device, rows: Any) -> None:
        """A client's step on these rows, in one batch."""
        config = self.config
        local = config.local.model_copy(update={"steps": 1, "batch_size": len(rows)})
        fit = partial(self.trainer.fit, rows=np.arange(len(rows)), encoded=rows)
        job = Job(plan, 1, begin.rounds, self.spec, begin.adapter, (), {}, local, device, config.seed, fit)
        with self.trainer.session():
            list(self.method.train([job]))


@uncollected()
def build(
    config: Config, method: Method, labels: tuple[str, ...], people: Callable[[Any], Any], prefixes: bool
) -> Machine:
    """Load the model that a config names, and choose how it computes here.

    people: what makes tokens of rows -> the population. prefixes: hidden states of their rows may be kept on disk.
    """
    start(config)
    from fedrank.training import decoding, evaluation, fused, local, models, quantised, scoring, tasks, workload
    from fedrank.training.compute import choose

    model = models.load(config, labels)
    engine, parameters = config.engine, model.spec.parameters
    try:
        compute = choose(
            model.modules.values(), config.device, engine.threads, engine.compute, engine.products, parameters
        )
    except ValueError as error:
        raise ConfigError(f"engine.products: {error}") from None
    engine = engine.model_copy(update={"compute": compute.dtype, "products": compute.products})
    encode = partial(tasks.encode, tokenizer=model.tokenizer, task=config.task, max_length=config.local.max_length)
    with span("reading"):
        population = people(encode)
    test = population.tested
    cut(config, {"train": population.typical, "test": test})
    if population.choices is not None:
        cut(config, {"test, each choice a row": population.choices.encoded})
    measured = engine.timing == "measured"
    workers = Workers(engine.workers or fitting(engine.threads, config.device, parameters), engine.threads)
    if engine.stack is None:
        lengths = population.typical.lengths
        stack = 1 if measured else workload.stacking(parameters, lengths, config, workers.count)
        engine = engine.model_copy(update={"stack": stack})
    config = config.model_copy(update={"engine": engine})
    trainer = local.Trainer(
        model, population.typical, test, config.local.lr or method.default_lr, engine.threads, config.device, compute,
        measured, engine.prefix_bytes if prefixes else 0, engine.offload,
    )  # fmt: skip
    decoder = decoding.Decoder(trainer, config.generation, config.seed, population.test.turns is not None)
    judge = evaluation.Evaluation(scoring.Scorer(trainer), decoder, population, workers.count, workers.share)
    if config.generation.when != "never" and len(population.test) and (prompts := judge.prompts).cut:
        log.warning("%d of %d prompts lose their start, for texts to fit behind", prompts.cut, len(prompts))
    two, scores = getattr(method, "lower", None), trainer.frozen
    steps = trainer.stepping(two)
    lying = scores.size if steps is scores else scores.size + steps.size - scores.shared(steps)
    unread = [] if steps is not scores else list(scores.unread(model.network))  # passes have copies of these
    if config.device != "cpu":  # where they are not paged out
        lying += sum(tensor.nbytes for tensor in unread)
    spec = replace(
        model.spec, flow=fused.trace(steps, config.device, two is not None),
        execution=Execution(lying, steps.dtype.itemsize, steps.packs, config.local.checkpoint),
    )  # fmt: skip
    numerics = {
        "fedrank": fedrank.__version__, "quantised": quantised.version(config.model.quantise, config.device),
        **local.numerics(engine.threads, config.device, compute, trainer.frozen.packs, engine.stack or 1, bool(trainer.kept)),
    }  # fmt: skip
    if workers.count > 1:
        for one in (scores, steps):
            one.ready()
    if config.device == "cpu":
        for parameter in unread:
            page_out(parameter.data_ptr(), parameter.nbytes)
    return Machine(config, method, model, spec, population, trainer, judge, workers, steps.packs, numerics)


def cut(config: Config, sets: Mapping[str, Any]) -> None:
    """Say how much of the tokenised rows was left out."""
    for name, encoded in sets.items():
        parts = (
            f"{count} {what}"
            for count, what in zip(encoded.cut, ("prompts their start", "completions their end"), strict=True)
            if count
        )
        if lost := " and ".join(parts):
            log.warning(
                "%s: of %d rows, %s lost to local.max_length=%d", name, len(encoded), lost, config.local.max_length
            )
