"""A config with all that it leaves open written out, and the method that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrank import config as settings
from fedrank import methods, robust
from fedrank.aggregation import WEIGHTS
from fedrank.config import Config, ConfigError
from fedrank.protocol import ClientId, Device, Method, ModelSpec, Plan, State, rng


def resolve(config: Config, method: Method | None = None) -> tuple[Config, Method]:
    """The config with all it leaves open written out; and the method that it names, or the one given."""
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
    return _written_out(config, chosen), chosen


def _written_out(config: Config, method: Method) -> Config:
    """The method's defaults, alpha, the whole paths."""
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
    if engine.root_certificate is not None:
        certificate = str(Path(engine.root_certificate).expanduser().absolute())
        engine = engine.model_copy(update={"root_certificate": certificate})
    if "object" not in chosen:
        chosen |= methods.values(method)
    parts = {"local": local, "adapter": adapter, "data": data, "model": model, "engine": engine, "method": chosen}
    return config.model_copy(update=parts)


def enough(config: Config, clients: int) -> None:
    """ConfigError where a round in which everyone answers lacks the updates that it needs."""
    server, most, needed = config.server, min(config.rounds.cohort, clients), robust.least(config.server)
    if config.rounds.minimum > most:
        raise ConfigError(
            f"rounds.minimum={config.rounds.minimum}: a round asks {most} clients at most, so it is never reached"
        )
    if most < needed:
        raise ConfigError(
            f"server.hostile={server.hostile}: {server.aggregation} then needs {needed} updates in a round, which has at "
            f"most {most}; a larger rounds.cohort, or fewer hostile ones"
        )


def run_id(config: Config, directory: str = "") -> str:
    """What a run's frames call it: by its config, less what a resumed run may change, and a name of its directory."""
    data, model = config.data.model_copy(update={"path": None}), config.model.model_copy(update={"name": ""})
    fixed: dict[str, Any] = {
        "rounds": settings.Rounds(), "engine": settings.EngineSettings(), "data": data, "model": model,
        "generation": settings.Generation(), "observe": settings.Observe(),
    }  # fmt: skip
    identity = settings.dump(config.model_copy(update=fixed)) + directory
    return f"{rng(config.seed, 'run', identity).integers(1 << 62):016x}"


def first(
    config: Config, method: Method, spec: ModelSpec, devices: Mapping[ClientId, Device]
) -> tuple[State, Plan, dict[str, Any]]:
    """The method's first state, a plan of one of these clients, and what of its function stays with the client."""
    try:
        begin = method.begin(spec, config.rounds.count, config.seed)
        one = next(iter(devices))
        plans = method.plan(begin, {one: devices[one]}, config.seed)
    except ValueError as error:  # hyper-parameters that do not fit the adapter
        raise ConfigError(f"method {config.method['name']}: {error}") from None
    plan = plans.get(one) or Plan({})
    own = set(plan.own) | set("h" * (config.adapter.head == "own"))
    kept = {"own": "".join(f for f in begin.adapter.factors if f in own), "private": plan.private}
    return begin, plan, kept | {"adapts": hasattr(method, "adapt")}
