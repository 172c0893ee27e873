"""The parts of a run whose clients are elsewhere: the server's model, its own test rows, and a Flower grid."""

import json
from dataclasses import replace
from functools import partial

from fedrank import fleet, hello, machine, parts, privacy, resolve
from fedrank.config import Config, ConfigError
from fedrank.engines import nodes
from fedrank.engines.flower import Grid
from fedrank.engines.local import fails
from fedrank.frame import Refused
from fedrank.hello import Registration, Setup
from fedrank.parts import Parts
from fedrank.protocol import ClientId, Device, Engine, Method
from fedrank.roster import Names, Roster
from fedrank.store import Store
from fedrank.training import data as rows
from fedrank.training.data import ClientData
from fedrank.wire import Wire

REGISTERED = "registered.json"  # the sites of a private run, which are no more than it is planned for


@machine.uncollected()
def prepare(
    config: Config, method: Method | None = None, data: ClientData | None = None, *, grid: Grid | None
) -> Parts:
    """What the server of a Flower run needs; on the simulation runtime, what a run on this machine does.

    grid: None where nothing is played.
    """
    if config.engine.kind == "flower-simulation":
        engine = config.engine.model_copy(update={"stack": 1})
        return _carried(parts.prepare(config.model_copy(update={"engine": engine}), method, data), grid)
    config, chosen = resolve.resolve(config, method)
    if "object" in config.method:
        raise ConfigError("method: the sites build it by its name; publish it under the entry point fedrank.methods")
    resolve.enough(config, config.rounds.cohort)
    machine.start(config)
    from fedrank.training import clients

    engine = config.engine.model_copy(update={"stack": 1})
    config = config.model_copy(update={"engine": engine})
    test, labels = rows.central(config)
    people = partial(clients.elsewhere, "sites", labels, test)
    made = machine.build(config, chosen, labels, people, prefixes=False)
    planned = Roster(Names(config.clients.count), lambda at: Device("site", 1))
    begin, _, kept = resolve.first(made.config, chosen, made.spec, planned)
    privacy.check(config.privacy, chosen, config.method["name"], begin, planned, config.seed)
    everywhere = made.judge.everywhere if len(made.population.test) else None
    facts = made.facts(kept) | {"fleet": {"kinds": {}, "hash": ""}}
    nobody = fleet.build(None, {}, config.seed)
    return Parts(
        made, begin, partial(_sites, grid=grid), everywhere, nobody, {}, None, {}, facts, made.about | {"clients": None}
    )


def _sites(made: Parts, wire: Wire, store: Store, grid: Grid | None) -> Engine:
    assert grid is not None

    most = None if made.config.privacy.kind == "none" else made.clients
    path, named = store.path / REGISTERED, dict[int, ClientId]()
    registered = set(json.loads(path.read_text()) if path.exists() else ())

    def admit(frame: bytes, node: int) -> Registration:
        found = hello.read_registration(frame, wire.run)
        if found.fingerprint != made.spec.fingerprint:
            raise Refused(
                f"client {found.device.id} has base model {found.fingerprint}, not {made.spec.fingerprint}"
                f"{hello.versions(found.version)}"
            )
        client = found.device.id
        if most is not None and named.setdefault(node, client) != client:
            raise Refused(
                f"client {client}: its node has registered as {named[node]}, and each is one site of a private run"
            )
        if most is not None and client not in registered:
            if len(registered) >= most:
                raise Refused(
                    f"client {client}: the run is planned for clients.count={most} sites, and as many have registered"
                )
            registered.add(client)
            store.write(REGISTERED, json.dumps(sorted(registered)))
        return found

    rounds = made.config.rounds
    told = hello.write_setup(setup(made, wire.run))
    return nodes.Sites(grid, told, admit, rounds.minimum, rounds.deadline, wire.schemas)


def setup(made: Parts, run: str) -> Setup:
    """What a site is told of the run, by this id."""
    config, start = made.config, made.begin.adapter
    own = made.method.begin(made.spec, config.rounds.count, config.seed).adapter
    imported = None if hello.begun(own) == hello.begun(start) else start
    labels = tuple(made.machine.population.labels)
    return Setup(run, hello.told(config), labels, made.spec.fingerprint, hello.begun(start), imported)


def _carried(made: Parts, grid: Grid | None) -> Parts:
    """A run on this machine, with Flower's simulation runtime as the carrier."""
    rate, seed = made.config.engine.failure_rate, made.config.seed

    def carrier(parts: Parts, wire: Wire, store: Store) -> Engine:
        assert grid is not None
        return nodes.Simulated(grid, parts.devices, partial(fails, rate=rate, seed=seed))

    return replace(made, carrier=carrier)
