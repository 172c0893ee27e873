"""The fleet: who has which device, and how it is in which round."""

import csv
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from fedrank import roster
from fedrank.config import ConfigError, FleetSettings, hint
from fedrank.devices import MEGABIT, MODES, PRESETS, Mode
from fedrank.protocol import ClientId, Device, rng
from fedrank.roster import Roster

NOMINAL = "laptop"  # every client's device where no fleet is given
DIGESTED, HINTED = 8192, 1000  # clients at a time; clients among which the nearest name is looked for


@dataclass(frozen=True, eq=False)
class Fleet:
    """Every client's device, and how it changes from round to round.

    examples: every client, by its number of training rows. machines: those that there are, as the server knows them: at
    their full rate. dealt: (clients,), which of them each client has. modes: by kind; a client of another kind has only
    the one. jitter: sigma of the lognormal factors, of median 1, on a client's compute time and on its link rates in
    each round. redraw: rounds between new draws of the power mode; 0: drawn once.
    """

    examples: Mapping[ClientId, int]
    machines: tuple[Device, ...]
    dealt: np.ndarray
    modes: Mapping[str, tuple[Mode, ...]]
    jitter: float
    redraw: int
    seed: int

    @cached_property
    def devices(self) -> Roster[Device]:
        clients = roster.names(self.examples)

        def device(at: int) -> Device:
            return replace(self.machines[int(self.dealt[at])], id=clients[at], examples=self.examples[clients[at]])

        return Roster(clients, device)

    @cached_property
    def kinds(self) -> dict[str, list[tuple[Device, int]]]:
        """The machines of each kind and how many clients have them, in the order in which clients first do."""
        found: dict[str, list[tuple[Device, int]]] = {}
        which, first, counts = np.unique(self.dealt, return_index=True, return_counts=True)
        for at in np.argsort(first):
            machine = self.machines[which[at]]
            found.setdefault(machine.kind, []).append((machine, int(counts[at])))
        return found

    def digest(self) -> str:
        """Names the devices, by their numbers, and whose they are."""
        rests = [json.dumps(astuple(machine))[len('[""') :] for machine in self.machines]
        digest, clients = hashlib.sha256(b"["), roster.names(self.examples)
        for start in range(0, len(clients), DIGESTED):
            named = zip(clients[start : start + DIGESTED], self.dealt[start : start + DIGESTED].tolist(), strict=True)
            rows = ", ".join(f'["{client}"{rests[at]}' for client, at in named)
            digest.update((", " * (start > 0) + rows).encode())
        digest.update(b"]")
        return digest.hexdigest()

    def at(self, client: ClientId, round: int) -> Device:
        """The device as it is in that round (1, 2, ...)."""
        device = self.devices[client]
        if modes := self.modes.get(device.kind):
            draw = (round - 1) // self.redraw if self.redraw else 0
            mode = modes[rng(self.seed, "fleet", "mode", client, draw).integers(len(modes))]
            rate = device.flops_per_second * mode.speed
            device = replace(device, flops_per_second=rate, busy_watts=mode.busy_watts)
        normal = rng(self.seed, "fleet", "jitter", client, round).standard_normal(2)
        slower, faster = (_lognormal(self.jitter, float(z)) for z in normal)
        return _linked(replace(device, flops_per_second=device.flops_per_second / slower), faster)


def _lognormal(sigma: float, z: float) -> float:
    """Rounded: exp differs in its last bit between machines, and simulated time must not. Never 0."""
    return max(round(math.exp(sigma * z), 6), 1e-6)


def _linked(device: Device, factor: float) -> Device:
    up, down = device.up_bytes_per_second * factor, device.down_bytes_per_second * factor
    return replace(device, up_bytes_per_second=up, down_bytes_per_second=down)


def build(settings: FleetSettings | None, clients: Mapping[ClientId, int], seed: int) -> Fleet:
    """The fleet that a config names, for these clients and their numbers of training rows.

    Kinds are dealt out by addressed chance, whatever data a client has, in the shares given. Without settings every
    client has one nominal device of no rank of its own and of unlimited memory. ConfigError says what is wrong.
    """
    if settings is None:
        nominal = replace(PRESETS[NOMINAL], rank=None, memory_bytes=0.0)
        return Fleet(clients, (nominal,), np.zeros(len(clients), np.uint8), {}, 0.0, 0, seed)
    if settings.csv is not None:
        rows = read(Path(settings.csv), clients)
    else:
        rows = [Row(_known(kind, PRESETS, "devices"), share) for kind, share in settings.devices.items()]
    kinds = {row.device.kind: row.device for row in rows}
    for kind, rank in settings.ranks.items():
        _known(kind, kinds, "ranks")
        rows = [replace(row, device=replace(row.device, rank=rank)) if row.device.kind == kind else row for row in rows]
    machines = tuple(_linked(row.device, settings.links) for row in rows)
    modes = {} if settings.csv is not None else MODES
    return Fleet(
        clients, machines, _deal(rows, roster.names(clients), seed), modes, settings.jitter, settings.redraw, seed
    )


def _known(kind: str, kinds: Mapping[str, Device], key: str) -> Device:
    if kind not in kinds:
        raise ConfigError(f"engine.fleet.{key}: no device kind {kind!r}{hint(kind, kinds)} (known: {', '.join(kinds)})")
    return kinds[kind]


@dataclass(frozen=True)
class Row:
    """A device and its share of the clients, or the one client that it belongs to."""

    device: Device
    share: float
    client: ClientId | None = None


def _deal(rows: Sequence[Row], clients: Sequence[ClientId], seed: int) -> np.ndarray:
    """(clients,), whose row each one's device is: the one that names it, else one by chance."""
    dealt, free = np.zeros(len(clients), np.min_scalar_type(len(rows))), np.ones(len(clients), bool)
    for at, row in enumerate(rows):
        if row.client is not None:
            place = clients.index(row.client)
            dealt[place], free[place] = at, False
    left = np.array([at for at, row in enumerate(rows) if row.client is None], int)
    rest = np.flatnonzero(free)
    if len(rest) and not len(left):
        raise ConfigError(f"engine.fleet.csv: no row is left for client {clients[rest[0]]!r}; add one without a client")
    counts = shares([rows[at].share for at in left], len(rest), [rows[at].device.rank for at in left])
    dealt[rest[rng(seed, "fleet", "kinds").permutation(len(rest))]] = np.repeat(left, counts)
    return dealt


def shares(weights: Sequence[float], count: int, ranks: Sequence[int | None]) -> list[int]:
    """Whole numbers in these proportions that sum to `count`: largest remainders, ties to the lowest rank, then order."""
    whole = sum(weights)
    exact = [count * weight / whole for weight in weights]
    result = [math.floor(part + 1e-9) for part in exact]
    order = sorted(range(len(weights)), key=lambda at: (round(result[at] - exact[at], 9), ranks[at] or math.inf, at))
    for at in order[: count - sum(result)]:
        result[at] += 1
    return result


# ---- one's own devices

NUMBERS = {
    "gigaflops_per_second": ("flops_per_second", 1e9), "memory_gigabytes": ("memory_bytes", 1e9),
    "up_megabits_per_second": ("up_bytes_per_second", MEGABIT),
    "down_megabits_per_second": ("down_bytes_per_second", MEGABIT),
    "idle_watts": ("idle_watts", 1.0), "busy_watts": ("busy_watts", 1.0),
}  # fmt: skip
COLUMNS = ("kind", "count", "client", "rank", *NUMBERS)


def read(path: Path, clients: Collection[ClientId]) -> list[Row]:
    """The rows of a CSV file of devices; ConfigError names the file, line and column of a mistake.

    Columns: ``kind``, a word of one's own; ``gigaflops_per_second``, what it reaches in training;
    ``memory_gigabytes``; ``up_megabits_per_second``, ``down_megabits_per_second``; ``idle_watts``, ``busy_watts``. And,
    where wanted: ``rank``, the largest LoRA rank (empty: the adapter's); ``count``, its share of the clients
    (empty: 1); ``client``, the one client that has it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            for name in header:
                if name not in COLUMNS:
                    raise ConfigError(f"{path}:1: unknown column {name!r}{hint(name, COLUMNS)}")
            if missing := [name for name in ("kind", *NUMBERS) if name not in header]:
                raise ConfigError(f"{path}:1: column {missing[0]!r} is missing")
            rows = list[Row]()
            named = set[ClientId]()
            for record in reader:
                rows.append(_row(f"{path}:{reader.line_num}", record, clients, named))
                named.add(rows[-1].client or "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"engine.fleet.csv: {path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise ConfigError(f"{path}:2: no devices")
    return rows


def _row(
    where: str, row: Mapping[str | None, str | None], clients: Collection[ClientId], named: AbstractSet[ClientId]
) -> Row:
    if None in row or None in row.values():
        raise ConfigError(f"{where}: this line has not as many cells as there are columns")
    cells = {str(name): str(cell).strip() for name, cell in row.items()}
    if not cells["kind"]:
        raise ConfigError(f"{where}: kind: it is empty; any word will do")
    client = cells.get("client") or None
    if client in named:
        raise ConfigError(f"{where}: client: {client!r} has a device already")
    if client is not None and client not in clients:
        raise ConfigError(f"{where}: client: {client!r} is none of this run's{hint(client, islice(clients, HINTED))}")
    rank = _number(where, "rank", cells["rank"]) if cells.get("rank") else None
    if rank is not None and rank != int(rank):
        raise ConfigError(f"{where}: rank: it must be a whole number, got {cells['rank']!r}")
    share = _number(where, "count", cells["count"]) if cells.get("count") else 1.0
    if client is not None and cells.get("count"):
        raise ConfigError(f"{where}: count: a device of one client has no share of the others; leave it empty")
    numbers = {field: _number(where, name, cells[name]) * unit for name, (field, unit) in NUMBERS.items()}
    if numbers["idle_watts"] > numbers["busy_watts"]:
        raise ConfigError(f"{where}: idle_watts: {cells['idle_watts']} is more than busy_watts, {cells['busy_watts']}")
    return Row(Device("", 0, cells["kind"], None if rank is None else int(rank), None, **numbers), share, client)


def _number(where: str, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{where}: {column}: it must be a number above 0, got {cell!r}")
    return value
