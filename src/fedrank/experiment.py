"""A run from its config: its parts put together, played, and closed with a summary."""

import gc
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from safetensors.numpy import save

import fedrank
from fedrank import config as settings
from fedrank import ledger, privacy, remote
from fedrank.config import Config, ConfigError
from fedrank.export import adopt, export, obstacle, origin, read_peft
from fedrank.ledger import ASKED, OF_TEXTS, PERSONAL, Event
from fedrank.observe.watching import watching
from fedrank.parts import Parts, prepare
from fedrank.protocol import Method, State
from fedrank.server import Server
from fedrank.store import Store, StoreError
from fedrank.told import total as added
from fedrank.trace import span
from fedrank.training.data import ClientData

log = logging.getLogger(__name__)
Prepare = Callable[[Config, Method | None, ClientData | None], Parts]

# What does not touch the bits of a round already played; other data or another model is noticed by its hash.
CHANGEABLE = ("rounds.count", "rounds.cohort", "rounds.evaluate_every", "rounds.personal", "rounds.deadline", "rounds.minimum",
              "rounds.exactness",
              "engine.failure_rate", "engine.workers", "engine.fleet.csv", "engine.superlink", "engine.root_certificate",
              "engine.insecure", "data.path", "model.name",
              *(f"generation.{key}" for key in settings.Generation.model_fields),
              *(f"observe.{key}" for key in settings.Observe.model_fields))  # fmt: skip


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
    data: ClientData | None = None,
) -> Run:
    """Play a whole run: a config file, a preset's name or a mapping, with ``key=value`` overrides.

    method: an object of one's own instead of the config's method. data: clients that bring their own rows, instead of
    the config's data. Hand the same ones to `resume`. watch: called with every event. Raises ConfigError, DataError, ModelError or StoreError with what to mend.
    """
    named = [] if data is None else ["data.path=null", f"data.name={json.dumps(data.name)}"]
    raw = source.model_dump(mode="json", exclude_unset=True) if isinstance(source, Config) else source
    config = settings.load(raw, [*overrides, *named])
    path = default_out(config) if out is None else Path(out)
    _watched(start(config, path, method, data=data), watch)
    return Run(path)


def resume(
    path: str | Path,
    *overrides: str,
    method: Method | None = None,
    watch: Callable[[Event], None] = lambda event: None,
    data: ClientData | None = None,
) -> Run:
    """Go on with a stopped run from its last state, or extend a finished one (``rounds.count=+20``)."""
    _watched(go_on(Path(path), overrides, method, data), watch)
    return Run(Path(path))


def _watched(events: Iterable[Event], watch: Callable[[Event], None]) -> None:
    try:
        for event in events:
            watch(event)
    finally:
        gc.unfreeze()  # a run sets aside all there is, the caller's own objects too


def start(
    config: Config,
    path: Path,
    method: Method | None = None,
    imported: Path | None = None,
    data: ClientData | None = None,
    by: Prepare | None = None,
) -> Iterator[Event]:
    """Set up a new run directory and play. imported: the folder of a PEFT adapter to start from.

    by: how the parts are made; by default as the engine's kind says, here or on Flower.
    """
    found = None if imported is None else read_peft(imported)
    if by is None and config.engine.kind != "local":
        _named(config, method, data)
        yield from remote.start(config, path, imported)
        return
    privacy.accountable(config.privacy)
    with watching(config.observe, path) as told:
        with span("loading"):
            parts = (by or prepare)(config, method, data)  # before anything is written: most mistakes show here
        if found is not None:
            parts = replace(parts, begin=adopt(parts.method, parts.begin, found))
        facts = parts.facts | ({} if imported is None else {"imported": origin(imported)})
        facts |= {"pairs": True} if parts.machine.population.test.text_b is not None else {}
        facts |= {"code": code()}
        store = Store.create(path)
        with store.locked():
            store.save_state(parts.begin, parts.numerics)
            store.write("data.json", json.dumps(facts, indent=1))
            (path / "drawn.safetensors").unlink(missing_ok=True)  # of a start that was cut short
            if parts.machine.drawn:
                store.write("drawn.safetensors", save(parts.machine.drawn))
            store.write("config.yaml", settings.dump(parts.config))  # last: where it is, a run has begun
            yield told({"event": "start", "path": str(path), **parts.about})
            yield from _play(parts.server(store), parts.begin, parts, told)


def go_on(
    path: Path,
    overrides: Iterable[str] = (),
    method: Method | None = None,
    data: ClientData | None = None,
    by: Prepare | None = None,
) -> Iterator[Event]:
    """Resume from the last committed state; what came after it is cut from the ledgers and played again."""
    store, overrides = Store.open(path), list(overrides)
    before = settings.load(path / "config.yaml")
    config = _changed(before, overrides)
    if by is None and config.engine.kind != "local":
        _named(config, method, data)
        yield from remote.go_on(config, path, overrides)
        return
    privacy.accountable(config.privacy)
    with store.locked(), ExitStack() as stack:
        told = stack.enter_context(watching(config.observe, path))
        state, numerics = store.state()
        if config.rounds.count < state.round:
            raise ConfigError(f"rounds.count={config.rounds.count}: {path} has played {state.round} rounds already")
        finished = config.rounds.count == state.round and (path / "summary.json").exists()
        if finished and config.generation != before.generation:
            raise ConfigError(
                f"generation: {path} has played all its rounds, so its global model is not asked again; "
                "rounds.count=+1 goes on"
            )
        if "object" in config.method and method is None:
            raise ConfigError(
                f"{path} was started with a method of one's own, {config.method['object']}; "
                "go on from Python: fedrank.resume(path, method=...)"
            )
        then = json.loads((path / "data.json").read_text())
        if then["rows"]["train"] is None and data is None and config.engine.kind != "flower":
            raise ConfigError(
                f"{path} was started with clients that bring their own rows, {then['data']}; "
                "go on from Python: fedrank.resume(path, data=...)"
            )
        parts = replace((by or prepare)(config, method, data), begin=store.state(0)[0])  # which an import may have made
        _same(path, config.method, parts.config.method, "method")
        _same(path, numerics, parts.numerics, "numerics")
        _same(path, _contents(then), _contents(parts.facts), "data and model")
        _same(path, then["fleet"], parts.facts["fleet"], "devices")
        played = {row["round"]: row for row in ledger.read(path / "rounds.jsonl")}
        unscored = "personal_clients" not in played.get(state.round, {})
        unwritten = config.generation.when == "end" and before.rounds.count != state.round
        if config.rounds.count == state.round and (unscored or unwritten):
            raise ConfigError(
                f"rounds.count={state.round}: that round was played as one that others follow, without the evaluation of the "
                f"last; {state.round + 1} or more"
            )
        for name in ("rounds.jsonl", "clients.jsonl", "ranks.jsonl"):
            ledger.cut(path / name, state.round)
        ledger.cut(path / ASKED, state.round + 1)  # who was asked in a killed round stays asked
        if config.rounds.count == state.round and any(row["round"] > state.round for row in ledger.read(path / ASKED)):
            raise ConfigError(
                f"rounds.count={state.round}: round {state.round + 1} was begun, and who answered it has told of its rows, which "
                "epsilon counts once it is played; a larger one"
            )
        store.write("config.yaml", settings.dump(parts.config))
        if config.rounds.count > state.round:  # what a finished run came to is no longer true
            for name in ("summary.json", "texts.jsonl", PERSONAL):
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / "adapter", ignore_errors=True)
            if then.get("code"):  # of a run that began before it was written down, it stays unknown
                codes = dict.fromkeys([*then["code"].split("+"), code()])
                store.write("data.json", json.dumps({**then, "code": "+".join(codes)}, indent=1))
        state = replace(state, rounds=config.rounds.count)
        store.save_state(state, numerics)  # and older ones go, which a kill may have left
        yield told({"event": "resume", "path": str(path), "round": state.round, **parts.about})
        yield from _play(parts.server(store), state, parts, told)


def _named(config: Config, method: Method | None, data: ClientData | None) -> None:
    """On Flower other processes build the run, from its config alone."""
    for what, given in (("a method of one's own", method), ("rows of one's own", data)):
        if given is not None:
            raise ConfigError(f"engine.kind={config.engine.kind}: {what} cannot be sent there; local")


def _play(server: Server, state: State, parts: Parts, told: Callable[[Event], Event]) -> Iterator[Event]:
    last: Event = {}
    with parts.workers:
        for event in server.play(state):
            if event["event"] != "end":
                yield told(event)
            last = event
    summary = summarise(server.store.path, parts, last)
    server.store.write("summary.json", json.dumps(summary, indent=1))
    if why := obstacle(server.store.path):
        log.warning("no adapter is exported: %s", why)
    else:
        export(server.store.path, server.store.path / "adapter")
    yield told({"event": "end", **summary})


def _changed(config: Config, overrides: Iterable[str]) -> Config:
    raw = config.model_dump(mode="json")
    for item in overrides:
        key, _, value = item.partition("=")
        if key not in CHANGEABLE and (key in settings.known_keys() or key.startswith(("method.", "engine.fleet."))):
            raise ConfigError(f"{key!r} cannot be changed in a run that has begun; these can: {', '.join(CHANGEABLE)}")
        if key == "rounds.cohort" and config.privacy.kind != "none":
            raise ConfigError("rounds.cohort: epsilon hangs on it, so it cannot be changed in a private run")
        if key == "rounds.count" and value.startswith("+") and value[1:].isdigit():
            item = f"{key}={config.rounds.count + int(value[1:])}"
        settings.override(raw, item)
    return settings.load(raw)


def _contents(facts: dict[str, Any]) -> dict[str, Any]:
    """What data and model are, less where they are: a run may move to another folder or environment.

    Nor what the run started from, which is in its first state, whether rows are pairs, which is in their hash, and which code
    played it.
    """
    model = {key: value for key, value in facts["model"].items() if key not in ("name", "source")}
    return {**facts, "data": None, "model": model, "fleet": None, "imported": None, "pairs": None, "code": None}


def _same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    odd = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in {**then, **now} if then.get(k) != now.get(k)]
    if odd:
        short = "; ".join(text[:300] for text in odd)
        raise StoreError(f"{path} cannot go on to the same bits, its {what} differ here: {short}")


@cache
def code() -> str:
    """The hash of this package's own source, as it was when a run of this process first began."""
    root = Path(fedrank.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml"))
    return xxhash.xxh3_64_hexdigest(b"".join(path.read_bytes() for path in files))


def summarise(path: Path, parts: Parts, end: Event) -> dict[str, Any]:
    """What the run came to: the last scores and the sums of the ledger.

    code: the hash of the code that played it, of several with + between them; None where it is not known of all rounds.
    """
    rows, baselines = ledger.read(path / "rounds.jsonl"), path / "baselines.json"
    scored = [row for row in rows if row.get("accuracy") is not None or row.get("personal_accuracy") is not None]
    last = scored[-1] if scored else {}
    sums = ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "head_bytes_up", "head_bytes_down",
            "clients_ok", "clients_failed", "wall_seconds", "train_seconds", "device_joules")  # fmt: skip
    waits = [row["waiting_seconds"] for row in rows if row["waiting_seconds"] is not None]
    peaks = [row["peak_memory_bytes"] for row in rows]

    def total(name: str) -> float | int | None:
        """None where a private run does not tell."""
        found = added(row[name] for row in rows)
        return None if found is None else round(found, 4)

    return {
        "path": str(path), "version": fedrank.__version__,
        "code": json.loads((path / "data.json").read_text()).get("code"), "method": parts.config.method["name"],
        "rounds": rows[-1]["round"] if rows else 0,
        "accuracy": last.get("accuracy"), "loss": last.get("loss"),
        "personal_accuracy": end.get("personal_accuracy"), "personal_majority": end.get("personal_majority"),
        "personal_clients": end.get("personal_clients"), "personal_worst_decile": end.get("personal_worst_decile"),
        "majority": parts.about["majority"],
        **{name: last[name] for name in OF_TEXTS if name in last},
        **{name: end[name] for name in (f"personal_{score}" for score in OF_TEXTS) if name in end},
        **{name: total(name) for name in sums},
        **{name: rows[-1][name] for name in ("epsilon", "delta") if rows and name in rows[-1]},
        "clock_seconds": rows[-1]["clock_seconds"] if rows else 0.0,
        "waiting_seconds": sum(waits) / len(waits) if waits else None,
        "peak_memory_bytes": None if None in peaks else max(peaks, default=0.0),
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
