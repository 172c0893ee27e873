"""A run from its config: model, data, method and engine put together, played, and closed with a summary."""

import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

import fedrank
from fedrank import config as settings
from fedrank import ledger, methods
from fedrank.adapter import Adapter
from fedrank.client import MIN_TEST_ROWS, Site
from fedrank.config import Config, ConfigError
from fedrank.engines.local import Local as LocalEngine
from fedrank.export import export, obstacle
from fedrank.protocol import ClientId, Device, Method, ModelSpec, State, rng
from fedrank.server import Event, Server
from fedrank.store import Store, StoreError
from fedrank.wire import Wire

log = logging.getLogger(__name__)

# What does not touch the bits of a round already played; other data or another model is noticed by its hash.
CHANGEABLE = ("rounds.count", "rounds.cohort", "rounds.evaluate_every", "rounds.deadline", "engine.failure_rate",
              "engine.seconds_per_example", "data.path", "model.name")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished (or stopped) run: its directory and what it holds."""

    path: Path

    @property
    def config(self) -> Config:
        return settings.load(self.path / "config.yaml")

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return ledger.read(self.path / "rounds.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "summary.json").read_text()))

    @property
    def state(self) -> State:
        return Store.open(self.path).state()[0]


def run(
    source: str | Path | Mapping[str, Any] | Config,
    *overrides: str,
    out: str | Path | None = None,
    method: Method | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Play a whole run: a config file, a preset's name or a mapping, with ``key=value`` overrides.

    method: an object of one's own instead of the config's method; hand the same one to `resume`.
    watch: called with every event. Raises ConfigError, DataError, ModelError or StoreError with what to mend.
    """
    config = settings.load(source.model_dump(mode="json") if isinstance(source, Config) else source, overrides)
    path = default_out(config) if out is None else Path(out)
    for event in start(config, path, method):
        watch(event)
    return Run(path)


def resume(
    path: str | Path, *overrides: str, method: Method | None = None, watch: Callable[[Event], None] = lambda event: None
) -> Run:
    """Go on with a stopped run from its last state, or extend a finished one (``rounds.count=+20``)."""
    for event in go_on(Path(path), overrides, method):
        watch(event)
    return Run(Path(path))


def start(
    config: Config, path: Path, method: Method | None = None, first: Callable[[State], State] = lambda state: state
) -> Iterator[Event]:
    """Set up a new run directory and play. first: what to make of the method's first state (an import)."""
    parts = prepare(config, method)  # before anything is written: most mistakes show here
    parts = replace(parts, begin=first(parts.begin))
    store = Store.create(path)
    with store.locked():
        store.save_state(parts.begin, parts.numerics)
        store.write("data.json", json.dumps(parts.facts, indent=1))
        (path / "drawn.safetensors").unlink(missing_ok=True)  # of a start that was cut short
        if parts.drawn:
            store.write("drawn.safetensors", save(parts.drawn))
        store.write("config.yaml", settings.dump(parts.config))  # last: where it is, a run has begun
        yield {"event": "start", "path": str(path), **parts.about}
        yield from _play(parts.server(store), parts.begin, parts)


def go_on(path: Path, overrides: Iterable[str] = (), method: Method | None = None) -> Iterator[Event]:
    """Resume from the last committed state; what came after it is cut from the ledgers and played again."""
    store = Store.open(path)
    with store.locked():
        config = _changed(settings.load(path / "config.yaml"), overrides)
        state, numerics = store.state()
        if config.rounds.count < state.round:
            raise ConfigError(f"rounds.count={config.rounds.count}: {path} has played {state.round} rounds already")
        if "object" in config.method and method is None:
            raise ConfigError(
                f"{path} was started with a method of one's own, {config.method['object']}; "
                "go on from Python: fedrank.resume(path, method=...)"
            )
        parts = replace(prepare(config, method), begin=store.state(0)[0])  # which an import may have made
        _same(path, config.method, parts.config.method, "method")
        _same(path, numerics, parts.numerics, "numerics")
        then = json.loads((path / "data.json").read_text())
        _same(path, _contents(then), _contents(parts.facts), "data and model")
        for name in ("rounds.jsonl", "clients.jsonl"):
            ledger.cut(path / name, state.round)
        store.write("config.yaml", settings.dump(parts.config))
        if config.rounds.count > state.round:  # what a finished run came to is no longer true
            (path / "summary.json").unlink(missing_ok=True)
            shutil.rmtree(path / "adapter", ignore_errors=True)
        state = replace(state, rounds=config.rounds.count)
        store.save_state(state, numerics)  # and older ones go, which a kill may have left
        yield {"event": "resume", "path": str(path), "round": state.round, **parts.about}
        yield from _play(parts.server(store), state, parts)


def _play(server: Server, state: State, parts: "Parts") -> Iterator[Event]:
    last: Event = {}
    for event in server.play(state):
        if event["event"] != "end":
            yield event
        last = event
    summary = summarise(server.store.path, parts, last)
    server.store.write("summary.json", json.dumps(summary, indent=1))
    if why := obstacle(server.store.path):
        log.warning("no adapter is exported: %s", why)
    else:
        export(server.store.path, server.store.path / "adapter")
    yield {"event": "end", **summary}


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything a config stands for, built."""

    config: Config
    method: Method
    spec: ModelSpec
    begin: State
    run_id: str
    devices: dict[ClientId, Device]
    site: Callable[[ClientId, Wire, Store], Site]
    evaluate: Callable[[Adapter, tuple[Adapter, ...]], Mapping[str, float]] | None
    numerics: dict[str, Any]
    drawn: dict[str, np.ndarray]  # frozen layers made from the seed, which an export must carry
    facts: dict[str, Any]  # what data and model were: a resumed run must find the same
    about: dict[str, Any]  # what is worth telling at the start

    def server(self, store: Store) -> Server:
        config = self.config
        wire = Wire(self.spec, self.begin.adapter, config.wire.dtype, self.run_id, config.seed, self.numerics)
        engine = LocalEngine(
            self.devices,
            cache(lambda client: self.site(client, wire, store)),
            lambda device: _rows_seen(device, config.local) * config.engine.seconds_per_example,
            config.engine.failure_rate,
            config.seed,
        )
        return Server(
            self.method, engine, wire, store, config.rounds, config.seed, config.adapter.head, self.evaluate,
            config.server,
        )  # fmt: skip


def prepare(config: Config, method: Method | None = None) -> Parts:
    """Load the data and the model, share the rows out, and build what the config names."""
    if method is not None:  # recorded, so that it is not resumed as another one
        config = config.model_copy(update={"method": {"name": type(method).__name__, "object": repr(method)}})
    try:
        chosen = methods.build(config.method) if method is None else method
        methods.check(type(chosen))
    except (TypeError, AttributeError) as error:  # what an entry point named is not there, or is no method
        raise ConfigError(f"method.name={config.method['name']}: {error}") from None
    if config.server.optimizer != "none" and not getattr(getattr(chosen, "about", None), "averages", False):
        raise ConfigError(
            f"server.optimizer={config.server.optimizer}: {config.method['name']} makes no mean of its updates "
            "(or does not say so in about.averages), so there is no change to step by"
        )
    config = _resolved(config, chosen)
    # torch is slow to import: a typo above should not wait for it
    from fedrank.training import data, local, models, partition, tasks

    dataset = data.configured(config)
    for notice in dataset.notices:
        log.warning("%s", notice)
    p = config.data.partition
    shares = partition.partition(
        p.kind, dataset.train.label, config.clients.count, config.seed, alpha=p.alpha,
        classes_per_client=p.classes_per_client, s=p.s, min_rows=p.min_rows, column=dataset.train.client,
        test_labels=dataset.test.label, test_rows=len(dataset.test), train_rows=len(dataset.train),
    )  # fmt: skip
    model = models.load(config, dataset.labels)
    encode = partial(tasks.encode, tokenizer=model.tokenizer, task=config.task, max_length=config.local.max_length)
    train, test = encode(dataset.train), encode(dataset.test)
    trainer = local.Trainer(
        model, train, test, config.local.lr or chosen.default_lr, config.engine.threads, config.device
    )
    own_rows, own_set = (dataset.test, test) if shares.test_from == "test" else (dataset.train, train)
    index = {name: at for at, name in enumerate(shares.names)}
    devices = {name: Device(name, len(rows)) for name, rows in zip(shares.names, shares.train, strict=True)}

    def personal(rows: np.ndarray, adapter: Adapter, base: tuple[Adapter, ...]) -> dict[str, float]:
        found = trainer.evaluate(adapter, own_set, rows, base)
        return found if own_rows.label is None else found | {"majority": local.majority(own_rows.label[rows])}

    def site(client: ClientId, wire: Wire, store: Store) -> Site:
        at = index[client]
        mine = shares.test[at]
        return Site(
            devices[client], chosen, wire, store.private, config.local, config.seed,
            fit=partial(trainer.fit, rows=shares.train[at]),
            evaluate=partial(personal, mine) if len(mine) >= MIN_TEST_ROWS else None, session=trainer.session,
        )  # fmt: skip

    def evaluate(adapter: Adapter, base: tuple[Adapter, ...]) -> Mapping[str, float]:
        with trainer.session():
            return trainer.evaluate(adapter, test, np.arange(len(test)), base)

    spec = model.spec
    try:
        begin = chosen.begin(spec, config.rounds.count, config.seed)
        plans = chosen.plan(begin, dict([*devices.items()][:1]), config.seed)
    except ValueError as error:  # hyper-parameters that do not fit the adapter
        raise ConfigError(f"method {config.method['name']}: {error}") from None
    own = {f for plan in plans.values() if plan for f in plan.own} | set("h" * (config.adapter.head == "own"))
    facts = {
        "data": dataset.name, "rows": {"train": len(dataset.train), "test": len(dataset.test)},
        "hash": {"train": dataset.train.digest(), "test": dataset.test.digest()}, "labels": list(dataset.labels),
        "model": {"name": config.model.name, "fingerprint": spec.fingerprint, "pooling": model.pooling,
                  "source": model.source, "base_class": type(model.base).__name__, "task": config.task,
                  "conv1d": any(type(m).__name__ == "Conv1D" for m in model.modules.values())},
        "partition": shares.summary(), "own": "".join(f for f in begin.adapter.factors if f in own),
    }  # fmt: skip
    about = {
        "data": dataset.name, "train_rows": len(dataset.train), "test_rows": len(dataset.test),
        "classes": len(dataset.labels), "hash": dataset.train.digest()[:16], "model": config.model.name,
        "modules": len(spec.modules), "clients": len(devices), "method": config.method["name"],
        "redraws": shares.redraws, "dropped": shares.dropped,
        "majority": None if dataset.test.label is None else local.majority(dataset.test.label),
    }  # fmt: skip
    run_id = f"{rng(config.seed, 'run', settings.dump(_identity(config))).integers(1 << 62):016x}"
    drawn = {f"{n}.{p}": t.numpy(force=True) for n, m in model.drawn.items() for p, t in m.named_parameters()}
    numerics = {"fedrank": fedrank.__version__} | local.numerics(config.engine.threads, config.device)
    return Parts(
        config, chosen, spec, begin, run_id, devices, site, evaluate, numerics, drawn, facts, about,
    )  # fmt: skip


def _rows_seen(device: Device, local: settings.Local) -> int:
    """The rows that a client goes through in one round."""
    return device.examples * local.epochs if local.steps is None else local.steps * local.batch_size


def _resolved(config: Config, method: Method) -> Config:
    """The config with what it leaves open written out: the method's defaults, alpha, the whole paths."""
    lr, alpha = config.local.lr or method.default_lr, config.adapter.alpha or 2.0 * config.adapter.rank
    local, adapter = config.local.model_copy(update={"lr": lr}), config.adapter.model_copy(update={"alpha": alpha})
    data, model, chosen = config.data, config.model, dict(config.method)
    if data.path is not None:  # a run can be resumed from another folder
        data = data.model_copy(update={"path": str(Path(data.path).expanduser().absolute())})
    if model.name not in settings.OWN_MODELS and (folder := Path(model.name).expanduser()).is_dir():
        model = model.model_copy(update={"name": str(folder.absolute())})
    if "object" not in chosen:
        chosen |= methods.values(method)
    parts = {"local": local, "adapter": adapter, "data": data, "model": model, "method": chosen}
    return config.model_copy(update=parts)


def _identity(config: Config) -> Config:
    """The config less what a resumed run may change, so that its frames still belong to it."""
    data, model = config.data.model_copy(update={"path": None}), config.model.model_copy(update={"name": ""})
    fixed = {"rounds": settings.Rounds(), "engine": settings.EngineSettings(), "data": data, "model": model}
    return config.model_copy(update=fixed)


def _changed(config: Config, overrides: Iterable[str]) -> Config:
    raw = config.model_dump(mode="json")
    for item in overrides:
        key, _, value = item.partition("=")
        if key not in CHANGEABLE and (key in settings.known_keys() or key.startswith("method.")):
            raise ConfigError(f"{key!r} cannot be changed in a run that has begun; these can: {', '.join(CHANGEABLE)}")
        if key == "rounds.count" and value.startswith("+") and value[1:].isdigit():
            item = f"{key}={config.rounds.count + int(value[1:])}"
        settings.override(raw, item)
    return settings.load(raw)


def _contents(facts: dict[str, Any]) -> dict[str, Any]:
    """What data and model are, less where they are: a run may move to another folder or environment."""
    model = {key: value for key, value in facts["model"].items() if key not in ("name", "source")}
    return {**facts, "data": None, "model": model}


def _same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    odd = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in {**then, **now} if then.get(k) != now.get(k)]
    if odd:
        short = "; ".join(text[:300] for text in odd)
        raise StoreError(f"{path} cannot go on to the same bits, its {what} differ here: {short}")


def summarise(path: Path, parts: Parts, end: Event) -> dict[str, Any]:
    """What the run came to: the last scores and the sums of the ledger."""
    rows, baselines = ledger.read(path / "rounds.jsonl"), path / "baselines.json"
    scored = [row for row in rows if row.get("accuracy") is not None or row.get("personal_accuracy") is not None]
    last = scored[-1] if scored else {}
    sums = ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "head_bytes_up", "head_bytes_down",
            "clients_ok", "clients_failed", "wall_seconds", "train_seconds")  # fmt: skip
    return {
        "path": str(path), "version": fedrank.__version__, "method": parts.config.method["name"],
        "rounds": rows[-1]["round"] if rows else 0,
        "accuracy": last.get("accuracy"), "loss": last.get("loss"),
        "personal_accuracy": end.get("personal_accuracy"), "personal_majority": end.get("personal_majority"),
        "majority": parts.about["majority"],
        **{name: round(sum(row[name] for row in rows), 4) for name in sums},
        "evaluation_bytes": sum(row.get("evaluation_bytes", 0) for row in rows) + end.get("evaluation_bytes", 0),
        "components": rows[-1]["components"] if rows else parts.begin.adapter.components,
        "components_at_start": parts.begin.adapter.components,
        "modules_alive": rows[-1]["modules_alive"] if rows else len(parts.begin.adapter.blocks),
        "modules": len(parts.spec.modules), "python": platform.python_version(), "numerics": parts.numerics,
        **({"baselines": json.loads(baselines.read_text())} if baselines.exists() else {}),
    }  # fmt: skip


def default_out(config: Config) -> Path:
    name = str(config.method["name"])
    return next(p for n in range(1, 1_000_000) if not (p := Path("runs") / f"{name}-{n:03d}").exists())
