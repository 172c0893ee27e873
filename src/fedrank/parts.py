"""The parts of a run, built from its config: data, model, method, fleet, and each client's side."""

import atexit
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import fedrank
from fedrank import config as settings
from fedrank import cost as costs
from fedrank import fleet, methods, robust
from fedrank.adapter import Adapter
from fedrank.aggregation import WEIGHTS
from fedrank.client import MIN_TEST_ROWS, Site
from fedrank.config import Config, ConfigError
from fedrank.engines.attack import attackers
from fedrank.engines.local import Local as LocalEngine
from fedrank.engines.workers import Workers, fitting, keep_few_kernels, page_out
from fedrank.protocol import ClientId, Device, Execution, Job, Load, Method, ModelSpec, Plan, State, rng
from fedrank.roster import Roster
from fedrank.server import Evaluate, Server
from fedrank.store import Store
from fedrank.trace import span
from fedrank.training import data as rows
from fedrank.training import partition, texts
from fedrank.training.data import ClientData, Dataset
from fedrank.wire import Wire

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything a config stands for, built.

    cost: client, an adapter of the method, round, plan and bytes down -> what that round costs that client.
    devices: of every client, as the server knows it. held: a client's rows. trainer: the model and the tokenised rows of this process.
    """

    config: Config
    method: Method
    spec: ModelSpec
    begin: State
    run_id: str
    fleet: fleet.Fleet
    devices: Mapping[ClientId, Device]
    held: Callable[[ClientId], Any]
    trainer: Any
    site: Callable[[ClientId, Wire, Store], Site]
    cost: Callable[[ClientId, Adapter, int, Plan, int], costs.Cost]
    evaluate: Evaluate
    workers: Workers
    numerics: dict[str, Any]
    drawn: dict[str, np.ndarray]  # frozen layers made from the seed, which an export must carry
    facts: dict[str, Any]  # what data and model were: a resumed run must find the same
    about: dict[str, Any]  # what is worth telling at the start

    def server(self, store: Store) -> Server:
        config = self.config
        wire = Wire(self.spec, self.begin.adapter, config.wire.dtype, self.run_id, config.seed, self.numerics)
        engine = LocalEngine(
            self.devices, lambda client: self.site(client, wire, store), config.engine.failure_rate, config.seed,
            config.engine.stack or 1, self.workers.share,
        )  # fmt: skip
        return Server(
            self.method, engine, wire, store, config.rounds, config.seed, config.adapter.head, self.evaluate,
            config.server, self.cost if config.engine.timing == "modelled" else None,
        )  # fmt: skip


@contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage is not looked for: of modules, rows and tokens nearly all stays, and looking takes long."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@cache
def _import() -> None:
    """torch is slow to import: a typo should not wait for it. Modules stay, so garbage is not looked for among them."""
    gc.collect()  # what is garbage by now would stay too
    import fedrank.training.local  # noqa: F401 - brings all that is large

    gc.freeze()
    atexit.register(gc.freeze)  # the interpreter's last look would take a second


@_uncollected()
def prepare(config: Config, method: Method | None = None, data: ClientData | None = None) -> Parts:
    """Load the data and the model, share the rows out, and build what the config names."""
    config, chosen = _chosen(config, method)
    if config.generation.when != "never":
        texts.check()
    keep_few_kernels()
    _import()
    from fedrank.training import (
        bilevel,
        clients,
        course,
        decoding,
        evaluation,
        fused,
        local,
        models,
        packing,
        quantised,
        scoring,
        tasks,
        twice,
        workload,
    )
    from fedrank.training.compute import choose

    if data is None:
        dataset, shares = _dealt(config)
        name, labels, people = dataset.name, dataset.labels, partial(clients.shared, dataset, shares)
    else:
        config = rows.natural(config, data)
        name, labels, people = data.name, tuple(data.labels), partial(clients.own, config, data)
    model = models.load(config, labels)
    engine = config.engine
    try:
        compute = choose(
            model.modules.values(),
            config.device,
            engine.threads,
            engine.compute,
            engine.products,
            model.spec.parameters,
        )
    except ValueError as error:
        raise ConfigError(f"engine.products: {error}") from None
    engine = engine.model_copy(update={"compute": compute.dtype, "products": compute.products})
    config = config.model_copy(update={"engine": engine})
    encode = partial(tasks.encode, tokenizer=model.tokenizer, task=config.task, max_length=config.local.max_length)
    with span("reading"):
        population = people(encode)
    test, names = population.tested, population.names
    _enough(config, len(names))
    hostile = attackers(engine.attack, len(names), config.seed)
    _cut(config, {"train": population.typical, "test": test})
    if population.choices is not None:
        _cut(config, {"test, each choice a row": population.choices.encoded})
    measured = engine.timing == "measured"
    workers = Workers(engine.workers or fitting(engine.threads, config.device, model.spec.parameters), engine.threads)
    if engine.stack is None:
        lengths = population.typical.lengths
        stack = 1 if measured else workload.stacking(model.spec.parameters, lengths, config, workers.count)
        engine = engine.model_copy(update={"stack": stack})
        config = config.model_copy(update={"engine": engine})
    trainer = local.Trainer(
        model, population.typical, test, config.local.lr or chosen.default_lr, engine.threads, config.device, compute, measured,
        engine.prefix_bytes if data is None else 0,  # rows that come and go are not kept
        engine.offload,
    )  # fmt: skip
    decoder = decoding.Decoder(trainer, config.generation, config.seed, population.test.turns is not None)
    judge = evaluation.Evaluation(scoring.Scorer(trainer), decoder, population, workers.count, workers.share)
    if config.generation.when != "never" and (prompts := judge.prompts).cut:
        log.warning("%d of %d prompts lose their start, for texts to fit behind", prompts.cut, len(prompts))
    if data is None and shares.test_from == "train" and dataset.train.completion is not None:  # clients' own tests
        if (choices := population.held(0).choices) is not None:
            _cut(config, {"train, each choice a row": choices.encoded})
        own = dataset.train.take(np.sort(shares.test.rows))
        if config.generation.when != "never" and len(own) and (prompts := decoder.prompts(own)).cut:
            log.warning("clients' own tests: %d of %d prompts lose their start", prompts.cut, len(prompts))
    two, begins = getattr(chosen, "lower", None), bool(trainer.kept)
    packed, dtype = trainer.frozen.packs, trainer.frozen.dtype
    if two is not None:  # its steps are the plain layers'
        packed, dtype = False, model.base.dtype
        rounded = config.model.quantise == "int8" and config.device != "cpu"  # there activations are of 8 bits too
        if two == "finite" and (rounded or dtype.itemsize < 4):
            raise ConfigError(
                f"method.derivative=finite: of a base held in {'int8' if rounded else dtype} its differences are noise; "
                "model.dtype=float32, or another derivative"
            )
    lying = trainer.frozen.size
    if two is not None or config.device != "cpu":  # what else passes have copies of is not paged out
        lying += sum(tensor.nbytes for tensor in trainer.frozen.unread(model.network))
    how = Execution(lying, dtype.itemsize, packed, config.local.checkpoint)
    spec = replace(model.spec, execution=how)
    if two is None:
        spec = replace(spec, flow=fused.trace(trainer.frozen, config.device))

    def held(client: ClientId) -> clients.Held:
        return population.held(names.index(client))

    def load(client: ClientId, round: int) -> Load:
        draw = partial(rng, config.seed, "job", round, client, "batches")  # the address of a job's
        mine = held(client)
        return workload.workload(mine.train, mine.encoded, config.local, draw, packed)

    def device(at: int) -> Device:
        """A round that is never played stands for those to come, but any rows may meet in their largest batch."""
        mine, client = population.held(at), names[at]
        size, length = min(config.local.batch_size, len(mine.train)), int(mine.encoded.lengths[mine.train].max())
        tokens, most = size * length, size * length**2
        if packed:
            tokens, most = packing.filled(tokens), size * packing.filled(length) ** 2
        read = size * int(mine.encoded.predictions[mine.train].max()) if mine.encoded.generates else size
        expected = replace(load(client, 0), peak_tokens=tokens, peak_pairs=most, peak_rows=read)
        return replace(machines.devices[client], load=expected)

    sizes = Roster(names, lambda at: len(population.held(at).train))
    machines = fleet.build(config.engine.fleet, sizes, config.seed)
    devices = Roster(names, device, kept=2 * config.rounds.cohort)

    def site(client: ClientId, wire: Wire, store: Store) -> Site:
        mine = held(client)
        return Site(
            devices[client], chosen, wire, store.private, config.local, config.seed,
            fit=partial(trainer.fit, rows=mine.train, encoded=mine.encoded),
            evaluate=partial(judge.own, mine) if len(mine.test) >= MIN_TEST_ROWS else None, session=trainer.session,
            cost=partial(cost, client, wire.start), measured=measured,
            attack=hostile.get(names.index(client)),
        )  # fmt: skip

    def cost(client: ClientId, start: Adapter, round: int, plan: Plan, bytes_down: int) -> costs.Cost:
        bytes_up = costs.most_up(spec, start, plan, config.wire.dtype).frame
        device = machines.at(client, round)
        return costs.predict(spec, start, plan, load(client, round), device, bytes_down, bytes_up)

    if workers.count > 1:
        trainer.frozen.ready()
    if config.device == "cpu":
        for parameter in trainer.frozen.unread(model.network):
            page_out(parameter.data_ptr(), parameter.nbytes)

    begin, plan, kept = _first(config, chosen, spec, devices)
    if two == "double":
        step = partial(_step, config, chosen, plan, begin, spec, next(iter(devices.values())), trainer)

        def count(_: None) -> tuple[float, float, float, float]:
            return twice.kept(model.network, population.typical, step)

        # Where there is a GPU, a process that is forked after a backward pass can make none, so workers' parents do not.
        with Workers(min(2, workers.count), engine.threads) as apart:
            try:
                (found,) = apart.share(count)([None])
            except (bilevel.DerivativeError, course.TrainingError) as error:
                raise ConfigError(f"method.derivative=double, tried on a few tokens: {error}") from None
        spec = replace(spec, execution=replace(how, twice=found))
    facts = {
        "data": name, "rows": {"train": population.train_rows, "test": len(population.test)},
        "hash": {"train": population.digest, "test": population.test.digest()}, "labels": list(labels),
        "model": {"name": config.model.name, "fingerprint": spec.fingerprint, "pooling": model.pooling,
                  "source": model.source, "base_class": type(model.base).__name__, "task": config.task,
                  "conv1d": any("Conv1D" in (type(m).__name__, getattr(getattr(m, "source_cls", None), "__name__", "")) for m in model.modules.values())},
        "partition": population.partition, **kept,
        "fleet": {"kinds": {kind: sum(n for _, n in mine) for kind, mine in machines.kinds.items()},
                  "hash": machines.digest()},
        **({"hostile": [names[at] for at in hostile]} if hostile else {}),
    }  # fmt: skip
    about = {
        "data": name, "train_rows": population.train_rows, "test_rows": len(population.test),
        "classes": len(labels), "hash": population.digest[:16], "model": config.model.name,
        "modules": len(spec.modules), "parameters": spec.parameters, "clients": len(devices), "method": config.method["name"],
        "redraws": population.partition["redraws"], "dropped": population.partition["dropped"],
        "majority": None if population.test.label is None else scoring.majority(population.test.label),
    }  # fmt: skip
    run_id = f"{rng(config.seed, 'run', settings.dump(_identity(config))).integers(1 << 62):016x}"
    drawn = {f"{n}.{p}": t.float().numpy(force=True) for n, m in model.drawn.items() for p, t in m.named_parameters()}
    numerics = {
        "fedrank": fedrank.__version__, "quantised": quantised.version(config.model.quantise, config.device),
        **local.numerics(engine.threads, config.device, compute, trainer.frozen.packs, engine.stack or 1, begins),
    }  # fmt: skip
    return Parts(
        config, chosen, spec, begin, run_id, machines, devices, held, trainer, site, cost, judge.everywhere, workers, numerics, drawn, facts, about,
    )  # fmt: skip


def _step(
    config: Config, method: Method, plan: Plan, begin: State, spec: ModelSpec, device: Device, trainer: Any, rows: Any
) -> None:
    """A client's step on these rows, in one batch."""
    local = config.local.model_copy(update={"steps": 1, "batch_size": len(rows)})
    fit = partial(trainer.fit, rows=np.arange(len(rows)), encoded=rows)
    with trainer.session():
        list(method.train([Job(plan, 1, begin.rounds, spec, begin.adapter, (), {}, local, device, config.seed, fit)]))


def _cut(config: Config, sets: Mapping[str, Any]) -> None:
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


def _enough(config: Config, clients: int) -> None:
    """Whether a round in which everyone answers has the updates that the server's rule needs."""
    server, most, needed = config.server, min(config.rounds.cohort, clients), robust.least(config.server)
    if most < needed:
        raise ConfigError(
            f"server.hostile={server.hostile}: {server.aggregation} then needs {needed} updates in a round, which has at "
            f"most {most}; a larger rounds.cohort, or fewer hostile ones"
        )


def _dealt(config: Config) -> tuple[Dataset, partition.Partition]:
    """The data set that a config names, and who holds which of its rows."""
    with span("reading"):
        dataset = rows.configured(config)
    for notice in dataset.notices:
        log.warning("%s", notice)
    p = config.data.partition
    shares = partition.partition(
        p.kind, dataset.train.label, config.clients.count, config.seed, alpha=p.alpha,
        classes_per_client=p.classes_per_client, s=p.s, min_rows=p.min_rows, column=dataset.train.client,
        test_labels=dataset.test.label, test_rows=len(dataset.test), train_rows=len(dataset.train),
        groups=None if dataset.train.completion is None else dataset.train.group, validation=config.data.split == "validation",
    )  # fmt: skip
    if config.data.split == "validation" and p.kind == "natural" and dataset.dev is None:
        if not len(shares.test.rows):
            raise partition.PartitionError(
                "data.split=validation with partition natural: no client has so many rows, or prompts, that a fifth can be "
                "held out; give more rows, or a dev file"
            )
        held_out = dataset.train.take(np.sort(shares.test.rows))
        dataset = replace(dataset, test=rows.limit(held_out, config.data.test_limit, config.seed, "test"))
    return dataset, shares


def _chosen(config: Config, method: Method | None) -> tuple[Config, Method]:
    """The method that a config names, or the one given; and the config with all it leaves open written out."""
    if method is not None:  # recorded, so that it is not resumed as another one
        config = config.model_copy(update={"method": {"name": type(method).__name__, "object": repr(method)}})
    try:
        chosen = methods.build(config.method) if method is None else method
        methods.check(type(chosen))
    except (TypeError, AttributeError) as error:  # what an entry point named is not there, or is no method
        raise ConfigError(f"method.name={config.method['name']}: {error}") from None
    if (two := getattr(chosen, "lower", None)) is not None:
        if config.engine.offload:
            raise ConfigError(
                f"engine.offload: {config.method['name']} learns on two levels, which learn where the model is; false"
            )
        if two == "double" and config.local.checkpoint:  # it would compute again from what was bound since
            raise ConfigError(
                "local.checkpoint: it has no second derivative; method.derivative=finite or first needs none"
            )
    server, averages = config.server, getattr(getattr(chosen, "about", None), "averages", False)
    none = f"{config.method['name']} makes no mean of its updates (or does not say so in about.averages), so there is"
    if server.optimizer != "none" and not averages:
        raise ConfigError(f"server.optimizer={server.optimizer}: {none} no change to step by")
    if server.aggregation != "mean" and not averages:
        raise ConfigError(
            f"server.aggregation={server.aggregation}: {none} none to take another for; "
            "server.max_norm and server.max_norm_ratio are for every method"
        )
    counted = getattr(chosen, "weights", "examples")
    if config.rounds.exactness and counted not in WEIGHTS:
        known = ", ".join(WEIGHTS)
        raise ConfigError(f"rounds.exactness: {config.method['name']} weighs clients by {counted!r}; known are {known}")
    return _resolved(config, chosen), chosen


def _first(
    config: Config, method: Method, spec: ModelSpec, devices: Mapping[ClientId, Device]
) -> tuple[State, Plan, dict[str, Any]]:
    """The method's first state, a client's plan, and what of a client's function stays with the client."""
    try:
        begin = method.begin(spec, config.rounds.count, config.seed)
        first = next(iter(devices))
        plans = method.plan(begin, {first: devices[first]}, config.seed)
    except ValueError as error:  # hyper-parameters that do not fit the adapter
        raise ConfigError(f"method {config.method['name']}: {error}") from None
    plan = plans.get(first) or Plan({})
    own = set(plan.own) | set("h" * (config.adapter.head == "own"))
    kept = {"own": "".join(f for f in begin.adapter.factors if f in own), "private": plan.private}
    return begin, plan, kept | {"adapts": hasattr(method, "adapt")}


def _resolved(config: Config, method: Method) -> Config:
    """The config with what it leaves open written out: the method's defaults, alpha, the whole paths."""
    lr, alpha = config.local.lr or method.default_lr, config.adapter.alpha or 2.0 * config.adapter.rank
    local, adapter = config.local.model_copy(update={"lr": lr}), config.adapter.model_copy(update={"alpha": alpha})
    data, model, engine, chosen = config.data, config.model, config.engine, dict(config.method)
    if data.path is not None:  # a run can be resumed from another folder
        data = data.model_copy(update={"path": str(Path(data.path).expanduser().absolute())})
    if model.name not in settings.OWN_MODELS and (folder := Path(model.name).expanduser()).is_dir():
        model = model.model_copy(update={"name": str(folder.absolute())})
    if engine.fleet is not None and engine.fleet.csv is not None:
        csv = str(Path(engine.fleet.csv).expanduser().absolute())
        engine = engine.model_copy(update={"fleet": engine.fleet.model_copy(update={"csv": csv})})
    if "object" not in chosen:
        chosen |= methods.values(method)
    parts = {"local": local, "adapter": adapter, "data": data, "model": model, "engine": engine, "method": chosen}
    return config.model_copy(update=parts)


def _identity(config: Config) -> Config:
    """The config less what a resumed run may change, so that its frames still belong to it."""
    data, model = config.data.model_copy(update={"path": None}), config.model.model_copy(update={"name": ""})
    fixed: dict[str, Any] = {
        "rounds": settings.Rounds(), "engine": settings.EngineSettings(), "data": data, "model": model,
        "generation": settings.Generation(),
    }  # fmt: skip
    return config.model_copy(update=fixed)
