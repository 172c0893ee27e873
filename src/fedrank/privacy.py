"""Client-level differential privacy: clipped and noised sums or updates, Poisson cohorts, and what they add up to."""

import hashlib
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fedrank import aggregation
from fedrank.adapter import Adapter, Block, split, to_arrays
from fedrank.config import ConfigError, PrivacySettings
from fedrank.protocol import Address, ClientId, Device, Method, Plan, State, Total, Update

STEP = 1e-3  # of the accountant's grid of privacy losses; it rounds up, so a coarser one only tells a larger epsilon
PUBLIC = ("round", "components", "modules_alive", "lowest_active_block", "noise_multiplier")
WHO = ("round", "client", "ok", "error")


class PrivacyError(ValueError):
    """A method wants of clients' updates what no noise covers."""


# ---- randomness that the run's seed does not give away


def uniform(key: bytes, count: int, *address: Address) -> Float[np.ndarray, "n"]:
    """Numbers in (0, 1), of 53 bits, that only who has the key can make again: SHAKE-256 keyed by its prefix."""
    stream = hashlib.shake_256(key + json.dumps(address).encode()).digest(8 * count)
    return ((np.frombuffer(stream, "<u8") >> 11) + 0.5) * 2.0**-53


def normal(key: bytes, count: int, *address: Address) -> Float[np.ndarray, "n"]:
    """Standard normal numbers of such, by Box and Muller (1958)."""
    one, two = uniform(key, 2 * -(-count // 2), *address).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log(one)), 2 * np.pi * two
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def poisson(clients: Iterable[ClientId], rate: float, key: bytes, round: int) -> list[ClientId]:
    """The clients of a round, each drawn by itself with this probability: it may be none. In the order of registration.

    A draw hangs on the client's id alone: who else is there, or was when a killed round was played before, changes none.
    """
    stream, drawn = hashlib.shake_256(key + json.dumps(("cohort", round)).encode()), list[ClientId]()
    for client in clients:
        (own := stream.copy()).update(client.encode())
        if ((int.from_bytes(own.digest(8), "little") >> 11) + 0.5) * 2.0**-53 < rate:
            drawn.append(client)
    return drawn


# ---- adapters as vectors


def each(fn: Callable[..., np.ndarray], one: Adapter, *others: Adapter) -> Adapter:
    """fn of the arrays that correspond, of adapters with the same components; parts that `one` lacks are left out."""
    blocks = {
        name: Block.of(b.ids, {f: fn(rows, *(o.blocks[name].rows[f] for o in others)) for f, rows in b.rows.items()})
        for name, b in one.blocks.items()
    }
    dense = {name: fn(tensor, *(o.dense[name] for o in others)) for name, tensor in one.dense.items()}
    return Adapter(blocks, one.scale, dense)


def numbers(adapter: Adapter) -> list[np.ndarray]:
    """Its arrays in the order of `each`."""
    rows = [rows for block in adapter.blocks.values() for rows in block.rows.values()]
    return [*rows, *adapter.dense.values()]


def shrink(change: Adapter, bound: float) -> float:
    """The factor that makes a longer change just so long: all factors and dense tensors are one vector."""
    length = math.sqrt(math.fsum(float(np.vdot(part, part)) for part in numbers(change)))
    return 1.0 if length <= bound else bound / length


def noised(adapter: Adapter, std: float, key: bytes, *address: Address) -> Adapter:
    """With independent normal noise on every number.

    The numbers are a part of the noise's address: a round that is played again with another outcome gets other noise,
    since the difference of two releases under the same would lay the change bare.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, array in to_arrays(adapter).items():
        digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    sizes = [part.size for part in numbers(adapter)]
    pieces = iter(split(normal(key, sum(sizes), *address, digest.hexdigest()), sizes))
    return each(lambda part: part + std * next(pieces).reshape(part.shape), adapter)


# ---- central: the server clips what arrived, and noises the sum


@dataclass(frozen=True, eq=False)
class Noised:
    """Updates of which one sum of the changes, and one of the votes, can be had, clipped and noised; nothing else.

    before: the adapter that they change. up: the factors that travel. returns: the arrays, which are votes. expected: the
    cohort's size in the mean, a constant, by which every mean divides: how many came is nobody's to know.
    """

    updates: Iterable[tuple[ClientId, Update]]
    before: Adapter
    up: str
    returns: Collection[str]
    expected: float
    settings: PrivacySettings
    key: bytes = field(repr=False)
    round: int
    asked: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        raise PrivacyError("it counts the updates that arrived")

    def __iter__(self) -> Iterator[tuple[ClientId, Update]]:
        raise PrivacyError("it reads clients' updates one by one")

    def total(self, fn: Callable[[Update], Adapter], weight: Callable[[Update], float]) -> Total:
        """expected * start + the sum of clip(fn(update) - start) + noise, start being fn of an update that changes nothing.

        Every weight is `expected`, whatever `weight` says: clients count alike, and a component that one did not send, or
        a client that failed, is no change of it. Noise is on all that may travel, sent or not.
        """
        start = fn(Update(self.before.only(self.up), 1)).astype(np.float64)
        votes = start.dense.keys() & set(self.returns)
        if votes and (start.blocks or len(votes) < len(start.dense)):
            raise PrivacyError("it sums votes and factors in one")
        what = "votes" if votes else "changes"
        if what in self.asked:
            raise PrivacyError(f"it takes a second sum of clients' {what}")
        self.asked.add(what)
        bound, noise = _mechanism(self.settings, sum(start.dense[name].size for name in votes))

        def changes() -> Iterator[tuple[Adapter, float]]:
            yield each(np.zeros_like, start), 1.0
            for _, update in self.updates:
                part = fn(update)
                change = each(np.subtract, part, start.take(part.ids))
                yield change, shrink(change, bound)

        sums = noised(aggregation.total(changes()).sums, bound * noise, self.key, what, self.round)
        sums = each(lambda change, at: change + self.expected * at, sums, start)
        weights = {name: np.full(block.rank, self.expected) for name, block in sums.blocks.items()}
        weights |= {name: np.array(self.expected) for name in sums.dense}
        return Total(sums, weights, self.expected)


def _mechanism(settings: PrivacySettings, bits: int) -> tuple[float, float]:
    """The bound on one client's part, and the noise multiplier: of its vote on so many bits, of its change where 0.

    A vote is 1/2 for a bit that is set and -1/2 for one that is not, so all have the length sqrt(bits) / 2.
    """
    bound, noise = (math.sqrt(bits) / 2, settings.votes_noise) if bits else (settings.clip, settings.noise)
    assert bound is not None  # the config was checked
    assert noise is not None
    return bound, noise


# ---- local: the client clips and noises before anything leaves it


def withheld(
    update: Update, received: Adapter, plan: Plan, settings: PrivacySettings, key: bytes, round: int
) -> Update:
    """What may leave a client: its change, clipped and noised; its votes, the noise's sign; no count, no metric.

    received: the adapter it started from.
    """
    if plan.select is not None or any(array.dtype != np.uint8 for array in update.arrays.values()):
        raise PrivacyError(
            "the server asks for what no noise covers: a choice by the rows, or arrays that are no votes"
        )
    sent = update.adapter.only(plan.up).astype(np.float64)
    start = received.take(sent.ids)
    bound, noise = _mechanism(settings, 0)
    change = each(np.subtract, sent, start)
    factor = shrink(change, bound)
    change = each(lambda part: factor * part, change)
    adapter = each(np.add, noised(change, bound * noise, key, "changes", round), start)
    votes = {name: _turned(mask, settings, key, name, round) for name, mask in update.arrays.items()}
    return Update(adapter.astype(np.float32), 1, {}, votes)


def _turned(mask: UInt8[np.ndarray, "n"], settings: PrivacySettings, key: bytes, *address: Address) -> np.ndarray:
    """The packed bit mask with its votes noised and rounded to bits again: each is turned with the same probability."""
    ballot = np.unpackbits(mask) - 0.5
    bound, noise = _mechanism(settings, ballot.size)
    found = noised(Adapter({}, 1.0, {"votes": ballot}), bound * noise, key, "votes", *address)
    return np.packbits(found.dense["votes"] > 0)


# ---- what is told, and what it adds up to


def multiplier(settings: PrivacySettings, plan: Plan) -> float:
    """The noise multiplier of a round: of the one normal mechanism that tells as much as its changes and votes together."""
    noises = [settings.noise, *(settings.votes_noise for _ in plan.returns)]
    if not all(noises):
        return 0.0
    return 1 / math.sqrt(sum(noise**-2 for noise in noises if noise is not None))


def epsilon(settings: PrivacySettings, rate: float, rounds: Iterable[tuple[float, Collection[ClientId]]]) -> float:
    """The epsilon at `delta` of rounds so far, each its `multiplier` and who was asked; infinite where one had no noise.

    central: of one client more or less, every one drawn with probability `rate` in each round (Poisson), the adversary
    seeing everything but who. local: of the client that was asked most, whatever other rows it might have had: two
    clipped changes are up to 2 * clip apart, and nothing is won by sampling. By privacy loss distributions (Koskela,
    Jälkö and Honkela, 2020), which are tight where Rényi accounting is not: at rate 0.05, noise 1 and 50 rounds 2.67
    where that gives 3.18.
    """
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=STEP)
    rounds = list(rounds)
    if any(noise == 0 for noise, _ in rounds):
        return math.inf
    if settings.kind == "central":
        for noise, count in Counter(noise for noise, _ in rounds).items():
            accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), count)
    else:
        told = dict[ClientId, float]()  # normal mechanisms add up in the square of what they tell
        for noise, clients in rounds:
            told |= {client: told.get(client, 0.0) + (2 / noise) ** 2 for client in clients}
        if not told:
            return 0.0
        accountant.compose(dp_event.GaussianDpEvent(max(told.values()) ** -0.5))
    return float(accountant.get_epsilon(settings.delta))


def released(row: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A round's row with null for all but what follows from noised sums: of `known` names, and what is `PUBLIC`."""
    return {name: value if name in PUBLIC or name in known else None for name, value in row.items()}


# ---- before a run


def accountable(settings: PrivacySettings) -> None:
    """ConfigError where epsilon could not be told here; sites do not have to."""
    if settings.kind != "none" and importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError("privacy.kind: the accountant needs dp-accounting: pip install 'fedrank[privacy]'; or none")


def check(
    settings: PrivacySettings, method: Method, name: str, begin: State, devices: Mapping[ClientId, Device], seed: int
) -> None:
    """ConfigError where this method cannot be made private: its merge is tried on an update that changes nothing, once for
    every kind of plan in these rounds."""
    if settings.kind == "none":
        return
    assert settings.delta is not None
    if settings.delta * len(devices) >= 1:
        raise ConfigError(
            f"privacy.delta={settings.delta:g}: it must be below one over the {len(devices)} clients, or all of one "
            "client's rows could be told and that be called private"
        )
    first, tried, voted = next(iter(devices)), set[tuple[Any, ...]](), False
    for round in range(begin.rounds):
        state = replace(begin, round=round)
        plan = method.plan(state, {first: devices[first]}, seed)[first] or Plan({})
        if (shape := (plan.up, tuple(plan.returns), plan.select is None)) in tried:
            continue
        tried.add(shape)
        voted = voted or bool(plan.returns)
        try:
            _try(settings, method, state, plan)
        except PrivacyError as error:
            raise ConfigError(f"privacy.kind={settings.kind}: method {name} has no private form: {error}") from None
    if settings.votes_noise is not None and not voted:
        raise ConfigError(f"privacy.votes_noise: clients of {name} cast no votes in these rounds; leave it out")


def _try(settings: PrivacySettings, method: Method, state: State, plan: Plan) -> None:
    if not plan.up:
        raise PrivacyError("nothing of it travels, so there is nothing to protect")
    if odd := [n for n, (kind, shape) in plan.returns.items() if kind != "uint8" or len(shape) != 1]:
        raise PrivacyError(f"its clients send {odd[0]!r}, which is no packed bit mask")
    if plan.returns and settings.votes_noise is None:
        raise ConfigError("privacy.votes_noise: clients of this method vote; give the noise multiplier of their votes")
    arrays = {name: np.zeros(shape, kind) for name, (kind, shape) in plan.returns.items()}
    still = Update(state.adapter.take(plan.train).only(plan.up), 1, _Unsaid(), arrays)
    if settings.kind == "central":
        method.merge(state, Noised([("", still)], state.adapter, plan.up, plan.returns, 1.0, settings, b"", 0))
        return
    if plan.select is not None:
        raise PrivacyError("its clients choose what they send by their own rows")
    method.merge(state, _Tried(still))


class _Unsaid(Mapping[str, float]):
    """The metrics of a client that tells none: whoever asks for one by its name is refused."""

    def __getitem__(self, name: str) -> float:
        raise PrivacyError(f"its merge reads clients' {name!r}, which does not travel")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class _Tried:
    """One update that arrived."""

    update: Update

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[ClientId, Update]]:
        yield "", self.update

    def total(self, fn: Callable[[Update], Adapter], weight: Callable[[Update], float]) -> Total:
        return aggregation.total([(fn(self.update), weight(self.update))])
