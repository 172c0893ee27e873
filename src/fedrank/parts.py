"""The parts of a run, built from its config: data, model, method, fleet, and each client's side."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fedrank import cost as costs
from fedrank import fleet, machine, privacy, resolve
from fedrank.adapter import Adapter
from fedrank.client import Site
from fedrank.config import Config
from fedrank.engines.attack import attackers
from fedrank.engines.local import Local as LocalEngine
from fedrank.engines.workers import Workers
from fedrank.fleet import Fleet
from fedrank.machine import Machine
from fedrank.protocol import ClientId, Device, Engine, Job, Method, ModelSpec, Plan, State, Update
from fedrank.roster import Roster
from fedrank.server import Evaluate, Server
from fedrank.store import Store
from fedrank.trace import span
from fedrank.training import data as rows
from fedrank.training import partition
from fedrank.training.data import ClientData, Dataset
from fedrank.wire import Wire

log = logging.getLogger(__name__)
Attack = Callable[[Job, Update], Update]
Costs = Callable[[ClientId, Adapter, int, Plan, int], costs.Cost]


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything a config stands for, built.

    begin: the method's first state. carrier: makes the engine. fleet, devices: of every client of this process, as the
    server knows it. cost: client, an adapter of the method, round, plan and bytes down -> what that round costs that client; None
    where no device is modelled. hostile: what simulated hostile clients, by their places, make of an update. facts: what data and model were: a resumed run must find the same. about: what is worth
    telling at the start.
    """

    machine: Machine
    begin: State
    carrier: Callable[["Parts", Wire, Store], Engine]
    evaluate: Evaluate | None
    fleet: Fleet
    devices: Mapping[ClientId, Device]
    cost: Costs | None
    hostile: Mapping[int, Attack]
    facts: dict[str, Any]
    about: dict[str, Any]

    @property
    def config(self) -> Config:
        return self.machine.config

    @property
    def method(self) -> Method:
        return self.machine.method

    @property
    def spec(self) -> ModelSpec:
        return self.machine.spec

    @property
    def trainer(self) -> Any:
        """The model and the tokenised rows of this process."""
        return self.machine.trainer

    @property
    def workers(self) -> Workers:
        return self.machine.workers

    @property
    def numerics(self) -> dict[str, Any]:
        return self.machine.numerics

    @property
    def clients(self) -> int:
        """How many there are; of sites, which come and go, how many the run is planned for."""
        return len(self.devices) or self.config.clients.count

    @property
    def run_id(self) -> str:
        return resolve.run_id(self.config)

    def name(self, store: Store) -> str:
        """What frames call the run in this directory: sites keep what is theirs of it apart from others of its config."""
        return resolve.run_id(self.config, store.name) if self.config.engine.kind == "flower" else self.run_id

    def held(self, client: ClientId) -> Any:
        """A client's rows."""
        return self.machine.held(client)

    def site(self, client: ClientId, wire: Wire, store: Store) -> Site:
        """The client side of one of the devices' clients."""
        assert self.cost is not None
        made = self.machine.site(self.devices[client], wire, store.private, partial(self.cost, client, wire.start))
        return replace(made, attack=self.hostile.get(self.machine.population.names.index(client)))

    def server(self, store: Store) -> Server:
        config, timed = self.config, self.config.engine.timing == "modelled"
        wire = Wire(self.spec, self.begin.adapter, config.wire.dtype, self.name(store), config.seed, self.numerics)
        return Server(
            self.method, self.carrier(self, wire, store), wire, store, config.rounds, config.seed, config.adapter.head,
            self.evaluate, config.server, self.cost if timed else None, config.privacy, self.clients,
        )  # fmt: skip


@machine.uncollected()
def prepare(config: Config, method: Method | None = None, data: ClientData | None = None) -> Parts:
    """Load the data and the model, share the rows out, and build what the config names."""
    config, chosen = resolve.resolve(config, method)
    machine.start(config)
    from fedrank.training import clients

    if data is None:
        dataset, shares = _dealt(config)
        labels, people = dataset.labels, partial(clients.shared, dataset, shares)
    else:
        config = rows.natural(config, data)
        labels, people = tuple(data.labels), partial(clients.own, config, data)
    made = machine.build(config, chosen, labels, people, prefixes=data is None)  # rows that come and go are not kept
    config, population, names = made.config, made.population, made.population.names
    resolve.enough(config, len(names))
    hostile = attackers(config.engine.attack, len(names), config.seed)
    if data is None and shares.test_from == "train" and dataset.train.completion is not None:  # clients' own tests
        if (choices := population.held(0).choices) is not None:
            machine.cut(config, {"train, each choice a row": choices.encoded})
        own = dataset.train.take(np.sort(shares.test.rows))
        if config.generation.when != "never" and len(own) and (prompts := made.judge.decoder.prompts(own)).cut:
            log.warning("clients' own tests: %d of %d prompts lose their start", prompts.cut, len(prompts))
    sizes = Roster(names, lambda at: len(population.held(at).train))
    machines = fleet.build(config.engine.fleet, sizes, config.seed)
    devices = Roster(names, lambda at: made.registered(machines.devices[names[at]]), kept=2 * config.rounds.cohort)
    begin, plan, kept = resolve.first(config, chosen, made.spec, devices)
    privacy.check(config.privacy, chosen, config.method["name"], begin, devices, config.seed)
    made = made.counted(plan, begin, next(iter(devices.values())))

    spec = made.spec

    def cost(client: ClientId, start: Adapter, round: int, plan: Plan, bytes_down: int) -> costs.Cost:
        bytes_up = costs.most_up(spec, start, plan, config.wire.dtype).frame
        device = machines.at(client, round)
        return costs.predict(spec, start, plan, made.load(client, round), device, bytes_down, bytes_up)

    facts = made.facts(kept) | {
        "fleet": {"kinds": {kind: sum(n for _, n in mine) for kind, mine in machines.kinds.items()},
                  "hash": machines.digest()},
        **({"hostile": [names[at] for at in hostile]} if hostile else {}),
    }  # fmt: skip
    everywhere = made.judge.everywhere if len(population.test) else None
    return Parts(
        made, begin, here, everywhere, machines, devices, cost, hostile, facts, made.about | {"clients": len(devices)}
    )


def here(parts: Parts, wire: Wire, store: Store, site: Callable[[ClientId, Wire, Store], Site] | None = None) -> Engine:
    """The engine on which every client runs on this machine. site: its client sides, where they are not the parts' own."""
    config, made = parts.config, site or parts.site
    return LocalEngine(
        parts.devices, lambda client: made(client, wire, store), config.engine.failure_rate, config.seed,
        config.engine.stack or 1, parts.workers.share,
    )  # fmt: skip


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
