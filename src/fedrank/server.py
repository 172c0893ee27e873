"""The server: one loop over rounds — choose a cohort, plan, exchange, check, merge, evaluate, save."""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from fedrank import exactness, ledger, optimizer, privacy, robust, roster
from fedrank import frame as frames
from fedrank.adapter import Adapter
from fedrank.config import PrivacySettings, Rounds, ServerSettings
from fedrank.cost import Cost
from fedrank.frame import EXACT, Refused, Sizes
from fedrank.ledger import Event
from fedrank.protocol import ClientId, Device, Engine, Method, Plan, Silence, State, Update, Updates, rng
from fedrank.selection import everything
from fedrank.store import Spool, Store, StoreError
from fedrank.trace import span
from fedrank.wire import Kind, Reply, Wire

log = logging.getLogger(__name__)
Evaluate = Callable[[Adapter, tuple[Adapter, ...], bool], Mapping[str, Any]]


def sample(clients: Sequence[ClientId], size: int, seed: int, round: int) -> list[ClientId]:
    """The clients of a round of 1..: drawn without replacement, in the order of registration."""
    drawn = rng(seed, "cohort", round).choice(len(clients), min(size, len(clients)), replace=False)
    return [clients[i] for i in sorted(drawn.tolist())]


@dataclass(frozen=True, eq=False)
class Server:
    """The parts of one run.

    evaluate: adapter, base updates, and whether the run ends here -> the global model's scores on the server's test set,
    and the texts that it wrote, if any; None where there is neither. cost: client, first adapter, round, plan and bytes
    down -> what that round takes on its device, where devices are modelled. clients: how many there are, or, where they
    come and go, how many the run is planned for: a constant, on which the rate of central privacy's cohorts hangs.
    """

    method: Method
    engine: Engine
    wire: Wire
    store: Store
    rounds: Rounds
    seed: int
    head: str
    evaluate: Evaluate | None
    optimizer: ServerSettings = ServerSettings()
    cost: Callable[[ClientId, Adapter, int, Plan, int], Cost] | None = None
    privacy: PrivacySettings = PrivacySettings()
    clients: int = 0

    def play(self, state: State) -> Iterator[Event]:
        """Play the rounds that are left, one event per client and round; each round is committed by its State."""
        self.store.clear_spool()  # of a round that a kill left unfinished
        played = [row for row in ledger.read(self.store.path / "rounds.jsonl") if row["round"] <= state.round]
        clock = next((row["clock_seconds"] or 0.0 for row in reversed(played)), 0.0)
        fleet = None
        while state.round < state.rounds:
            started = time.perf_counter()
            fleet = self.engine.fleet()
            cohort = self._drawn(state.round + 1, fleet)
            if self.privacy.kind == "local":  # before they are asked: who answers a killed round has told of itself
                ledger.append(self.store.path / ledger.ASKED, [{"round": state.round + 1, "clients": list(cohort)}])
            state, row, rows, ranks = yield from self.train(state, clock, cohort)
            clock = row["clock_seconds"]
            trained = time.perf_counter()
            scores = self._scores(state, cohort)
            ended = time.perf_counter()
            row |= scores
            row |= {"wall_seconds": round(ended - started, 4), "evaluation_seconds": round(ended - trained, 4)}
            if self.privacy.kind != "none":
                row = self._released([*played, row], {*state.metrics, *scores})
                rows = [{name: row[name] for name in (*privacy.WHO, *ledger.BYTES) if name in row} for row in rows]
            ledger.append(self.store.path / "clients.jsonl", rows)
            ledger.append(self.store.path / "ranks.jsonl", ranks())
            ledger.append(self.store.path / "rounds.jsonl", [row])
            played.append(row)
            self.store.save_state(state, self.wire.numerics)
            self.store.clear_spool()
            yield {"event": "round", "rounds": state.rounds, **row}
        # Scored are those of the last round: a site that has left since is not waited for.
        if self.rounds.personal == 0:
            fleet = {}
        elif fleet is None:  # no round was left to play
            fleet = self.engine.fleet()
        everyone = roster.names(fleet)
        if self.rounds.personal is not None:
            everyone = sample(everyone, self.rounds.personal, self.seed, 0)
        rows = self._scored(state, fleet, everyone)
        if told := ledger.each(rows):
            self.store.write(ledger.PERSONAL, "".join(f"{json.dumps(row)}\n" for row in told))
        yield {
            "event": "end",
            "round": state.round,
            **ledger.personal(rows),
            "personal_worst_decile": ledger.worst_decile(told),
        }

    def train(
        self, state: State, clock: float, cohort: Mapping[ClientId, Device]
    ) -> Generator[Event, None, tuple[State, Event, list[Event], Callable[[], list[Event]]]]:
        """One round, neither evaluated nor saved: the state after it, its row, its clients' rows, and what reads its ranks'.

        clock: the simulated seconds before it.
        """
        t = state.round + 1
        plans = self._plans(state, cohort, training=True)
        yield {"event": "cohort", "round": t, "rounds": state.rounds, "clients": list(cohort)}
        rows = []
        for row in self._exchange("train", state, plans, cohort):
            if not row["ok"]:
                row |= self._unanswered(row, plans[row["client"]])
            rows.append(row)
            yield {**row, "event": "client"}
        clocked = ledger.clocked(rows, clock, self.rounds.deadline)  # a client that is refused was waited for
        arrived = tuple(sorted(row["client"] for row in rows if row["ok"]))
        refused = robust.screen(self._spooled(state, plans, arrived), state.adapter, self.optimizer)
        yield from _drop(rows, "refused", refused)
        if sum(row["ok"] for row in rows) < self.rounds.minimum:
            yield from _drop(rows, "not merged", dict.fromkeys(arrived, "fewer answered than rounds.minimum"))
        arrived, merged = tuple(sorted(row["client"] for row in rows if row["ok"])), replace(state, metrics={})
        if arrived or self.privacy.kind == "central":  # that nobody came is not to be seen
            found = self._merge(state, plans, arrived)
            if odd := _odd(found):  # whoever sent it would end the run, and end it again whenever it is resumed
                log.warning("round %d: %s.merge made NaN or infinity in %s", t, type(self.method).__name__, odd[:3])
                yield from _drop(rows, "refused", dict.fromkeys(arrived, "the merge was not finite"))
                arrived = ()
            else:
                merged = found
        lost = {row["client"] for row in rows if row.get("error", "").startswith(StoreError.__name__)}
        for client in lost & merged.seen.keys():
            log.warning("client %s has lost what it kept, and begins anew", client)
        seen = {client: round for client, round in merged.seen.items() if client not in lost}
        after = replace(merged, round=t, seen={**seen, **dict.fromkeys(arrived, t)})
        row = ledger.of_round(rows, after, self.wire.spec.modules) | clocked | {"clients_out": len(cohort) - len(plans)}
        if self.privacy.kind != "none":
            row["noise_multiplier"] = privacy.multiplier(self.privacy, self._common(state))
        return after, row, rows, partial(self._ranks, state, plans, arrived, after)

    def cohort(self, round: int) -> dict[ClientId, Device]:
        """Who is asked in a round of 1..."""
        return self._drawn(round, self.engine.fleet())

    def _drawn(self, round: int, fleet: Mapping[ClientId, Device]) -> dict[ClientId, Device]:
        """fleet: as it was looked at once: sites come and go."""
        clients = roster.names(fleet)
        if self.privacy.kind == "central":  # of the seed, who took part would be known, and sampling hide nobody
            drawn = privacy.poisson(clients, self._expected / self.clients, self.store.key, round)
        else:
            drawn = sample(clients, self.rounds.cohort, self.seed, round)
        return {client: fleet[client] for client in drawn}

    @property
    def _expected(self) -> float:
        """The size of a cohort in the mean, were all clients there."""
        return float(min(self.rounds.cohort, self.clients))

    def _common(self, state: State) -> Plan:
        """What a round of a private run asks of a client, whoever is drawn, or nobody."""
        one = Device("site", 1)
        return self._plans(state, {one.id: one})[one.id]

    @span("planning")
    def _plans(self, state: State, cohort: Mapping[ClientId, Device], training: bool = False) -> dict[ClientId, Plan]:
        """The method's plans, with what the server knows: the last round merged, and whose the head is."""
        plans = self.method.plan(state, cohort, self.seed)
        if missing := sorted(cohort.keys() - plans.keys()):
            raise ValueError(f"{type(self.method).__name__}.plan left out clients {missing[:5]}")
        result = {}
        for client in cohort:
            given = plans[client]
            if given is None and training:  # it sits this round out
                continue
            plan, since = given or Plan({}), state.seen.get(client, -1)
            if plan.since != since:
                plan = replace(plan, since=since)
            if self.head != "train":  # it stays where it is: trained there, or as begin() made it
                learn = plan.learn if self.head == "own" else plan.learn.replace("h", "")
                up, down = plan.up.replace("h", ""), plan.down.replace("h", "")
                plan = replace(plan, learn=learn, up=up, down=down, own=plan.own + "h")
            result[client] = plan
        return result

    def _exchange(
        self, kind: Kind, state: State, plans: Mapping[ClientId, Plan], devices: Mapping[ClientId, Device]
    ) -> Iterator[dict[str, Any]]:
        """Send every plan and check what comes back; one row per client, those that stayed silent last."""
        t, sizes = state.round + 1, dict[ClientId, Sizes]()

        def build(client: ClientId) -> Callable[[], bytes]:
            def request() -> bytes:
                frame = self.wire.request(kind, client, plans[client], state)
                sizes[client] = frames.sizes(frame)
                return frame

            return request

        answered = set()
        deadline = self.rounds.deadline if kind == "train" else None
        for client, frame in self.engine.exchange(((c, build(c)) for c in plans), deadline):
            row: dict[str, Any] = {"round": t, "client": client, "ok": False}
            if client not in plans or client in answered:
                log.warning("round %d: an answer from client %r that was not awaited is dropped", t, client)
                continue
            answered.add(client)
            row |= self._down(sizes.get(client))
            if isinstance(frame, str):  # why none will come
                yield row | {"error": str(frame)} | ({} if isinstance(frame, Silence) else {"bytes_up": 0})
                continue
            row |= {"bytes_up": len(frame)}
            try:
                reply = self._open(kind, state, client, plans[client], frame)
                if reply.update is not None and reply.update.examples > devices[client].examples:
                    raise Refused(f"{reply.update.examples} examples, more than the client registered")
                if reply.update is not None and (size := robust.largest(reply.update.adapter)) > robust.LARGEST:
                    raise Refused(f"numbers of up to {size:.4g}; an update's are at most {robust.LARGEST:g}")
            except Refused as error:
                yield row | {"error": str(error)}
                continue
            row |= {"adapter_bytes_up": reply.sizes.adapter, "head_bytes_up": reply.sizes.head}
            if reply.error is not None:
                yield row | {"error": reply.error}
                continue
            self._compare(client, reply.numerics)
            if reply.update is not None:
                self.store.spool(client, frame)
                row["examples"] = self._counted(reply.update).examples
            yield row | {"ok": True, **{n: v for n, v in reply.metrics.items() if n not in (*row, "error", "event")}}
        for client in plans:
            if client not in answered:
                down = self._down(sizes.get(client))
                what = "no answer" if deadline is None else f"no answer within the deadline of {deadline:g} s"
                yield {"round": t, "client": client, "ok": False, **down, "error": what}

    def _down(self, size: Sizes | None) -> dict[str, int]:
        """size: None where nothing was sent."""
        if size is None:
            return {}
        return {"bytes_down": size.frame, "adapter_bytes_down": size.adapter, "head_bytes_down": size.head}

    def _open(self, kind: Kind, state: State, client: ClientId, plan: Plan, frame: bytes) -> Reply:
        received = state.adapter
        if self.wire.dtype not in EXACT and kind == "train":
            # In low precision the client did not receive the state itself: read what its frame told it.
            received = self.wire.open_request(self.wire.request(kind, client, plan, state)).adapter
        return self.wire.open_reply(frame, kind, state.round + 1, client, plan, received)

    def _spooled(self, state: State, plans: Mapping[ClientId, Plan], arrived: tuple[ClientId, ...]) -> Spool:
        def read(client: ClientId, frame: bytes) -> Update:
            update = self._open("train", state, client, plans[client], frame).update
            assert update is not None  # it was checked on arrival
            return self._counted(update)

        return self.store.spooled(arrived, read)

    def _ranks(
        self, state: State, plans: Mapping[ClientId, Plan], arrived: tuple[ClientId, ...], after: State
    ) -> list[Event]:
        """Components by module: after the round (client null), and of clients that came back and had trained others than there
        were.

        Of one that selects what it sends, those that it sent.
        """
        rows: list[Event] = [{"round": after.round, "client": None, "ranks": _counts(after.adapter.ids)}]
        if self.privacy.kind != "none":  # who was drawn is told nowhere
            return rows
        trained = {client: _counts(plans[client].train) for client in arrived if plans[client].select is None}
        for client, update in self._spooled(state, plans, tuple(c for c in arrived if c not in trained)):
            trained[client] = _counts(update.adapter.ids)
        whole = _counts(state.adapter.ids)
        return rows + [
            {"round": after.round, "client": client, "ranks": ranks}
            for client, ranks in trained.items()
            if ranks != whole
        ]

    def _counted(self, update: Update) -> Update:
        """The update with as many examples as it may count for."""
        most = self.optimizer.max_examples
        return update if most is None or update.examples <= most else replace(update, examples=most)

    @span("aggregation")
    def _merge(self, state: State, plans: Mapping[ClientId, Plan], arrived: tuple[ClientId, ...]) -> State:
        updates: Updates = self._spooled(state, plans, arrived)
        if self.privacy.kind == "central":
            plan = self._common(state)
            updates = privacy.Noised(
                updates, state.adapter, plan.up, plan.returns, self._expected, self.privacy, self.store.key, state.round + 1
            )  # fmt: skip
        returned = {name for plan in plans.values() for name in plan.returns}
        with np.errstate(over="ignore", invalid="ignore"):  # it is looked for in what comes out
            merged = self.method.merge(state, robust.centred(updates, self.optimizer, returned))
            if self.rounds.exactness:  # of the method's own mean; against the plain one where another centre is taken
                merged = exactness.noted(self.method, state, merged, plans, updates)
            return optimizer.step(state, merged, self.optimizer)

    def _compare(self, client: ClientId, theirs: Mapping[str, Any]) -> None:
        """Other numerics are no fault, but end the claim that this run can be repeated to the bit."""
        ours = self.wire.numerics
        if odd := {k: (ours.get(k), theirs.get(k)) for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)}:
            log.warning(
                "client %s computes otherwise than the server, bit equality is not claimed: %s", client, str(odd)[:400]
            )

    # ---- what goes into the ledger

    def _released(self, rows: Sequence[Event], known: Collection[str]) -> Event:
        """The last row, of a round whose clients are protected. known: what follows from noised sums, and the server's scores.

        Where they protect themselves, who took part and what travelled is no secret of theirs. Epsilon is of what was
        written down when it was asked, never of who would be asked today.
        """
        asked = defaultdict[int, set[ClientId]](set)
        if self.privacy.kind == "local":
            known = {*known, *ledger.BYTES, "clients_ok", "clients_failed", "clients_out"}
            for one in ledger.read(self.store.path / ledger.ASKED):
                asked[one["round"]].update(one["clients"])
            if lost := [row["round"] for row in rows if row["round"] not in asked]:
                raise StoreError(
                    f"{self.store.path / ledger.ASKED} does not say who was asked in round {lost[0]}, so epsilon is not known"
                )
        told = [(row["noise_multiplier"], asked[row["round"]]) for row in rows]
        spent = privacy.epsilon(self.privacy, self._expected / self.clients, told)
        found = {"epsilon": spent if math.isfinite(spent) else None, "delta": self.privacy.delta}
        return privacy.released(rows[-1], known) | found

    def _unanswered(self, row: Event, plan: Plan) -> dict[str, float]:
        """What the round would have taken a client that was late or lacks the memory, and the joules it did take.

        By the client's own rule (`Cost.stop`); where it selects what it sends, for its longest answer, as its own is not
        known. Nothing is known of a client that failed otherwise, or where no device is modelled.
        """
        if self.cost is None or "bytes_down" not in row:
            return {}
        cost = self.cost(row["client"], self.wire.start, row["round"], plan, row["bytes_down"])
        stop = cost.stop(self.rounds.deadline)
        return {} if stop is None else cost.metrics | {"device_joules": cost.joules_by(stop)}

    @span("evaluation")
    def _scores(self, after: State, cohort: Mapping[ClientId, Device]) -> dict[str, Any]:
        """The evaluations of this round, where it is one that is evaluated; the last always is."""
        if after.round % self.rounds.evaluate_every and after.round != after.rounds:
            return {}
        scores: dict[str, Any] = {}
        asked = self._plans(after, cohort).values() or [self._common(after)]  # a cohort may be empty
        head = self.head == "own" and after.adapter.dense
        mine = any(head or set(plan.own) & set("BeA") for plan in asked)
        if self.evaluate is not None and not mine:  # with private parts there is no one global model
            scores = dict(self.evaluate(after.adapter, tuple(after.base_updates.values()), after.round == after.rounds))
            scores.pop("rows", None)
            if (texts := scores.pop("texts", None)) is not None:
                self.store.write("texts.jsonl", "".join(f"{json.dumps(one)}\n" for one in texts))
        personal = ledger.personal(self._scored(after, cohort, tuple(cohort)[: self.rounds.personal]))
        if self.evaluate is None and not mine:
            scores = {"accuracy": personal.pop("mean_accuracy"), "loss": personal.pop("mean_loss")}
        return scores | {k: v for k, v in personal.items() if not k.startswith("mean_")}

    @span("evaluation")
    def _scored(
        self, state: State, fleet: Mapping[ClientId, Device], clients: Sequence[ClientId]
    ) -> list[dict[str, Any]]:
        """Every client's scores on its own test rows."""
        ids: dict[str, np.ndarray] = {}
        present, rows = everything(state.adapter), list[dict[str, Any]]()
        for at in range(0, len(clients), self.rounds.cohort):  # a method plans for cohorts, never for the whole fleet
            plans = self._plans(state, {client: fleet[client] for client in clients[at : at + self.rounds.cohort]})
            plans = {c: replace(p, train=ids, frozen=present, up="", returns={}) for c, p in plans.items()}
            rows += self._exchange("evaluate", state, plans, fleet)
        return rows


def _counts(ids: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: len(mine) for name, mine in ids.items()}


def _drop(
    rows: Iterable[Event], what: Literal["refused", "not merged"], why: Mapping[ClientId, str]
) -> Iterator[Event]:
    """Make failures of these clients' rows that are in order; an event for each."""
    for row in rows:
        if row["ok"] and row["client"] in why:
            row |= {"ok": False, "error": f"{what}: {why[row['client']]}"}
            name = what.replace(" ", "_")
            yield {"event": name, "round": row["round"], "client": row["client"], "error": row["error"]}


def _odd(merged: State) -> list[str]:
    """Where a merge holds NaN or infinity: modules, dense tensors, arrays of the method and of the server's optimizer."""
    parts = (merged.adapter, *merged.base_updates.values())
    return [name for part in parts for name in part.odd()] + [
        name for name, array in merged.arrays.items() if not np.isfinite(array).all()
    ]
