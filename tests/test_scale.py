"""Many clients: the same cohorts, shares, devices and plans as ever, and nothing that is made for each one up front."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrank
import toy
from fedrank import experiment, fleet, methods, server
from fedrank.config import ConfigError, FleetSettings, load
from fedrank.methods import fed_plora
from fedrank.methods.pf2lora import PF2LoRA
from fedrank.protocol import Load, Plan, State, Updates
from fedrank.roster import Names, Roster
from fedrank.store import Store, StoreError
from fedrank.training.data import ClientData, natural
from fedrank.training.partition import LISTED, Kind, partition
from fedrank.training.sources import DataError


def named(*values: Any) -> str:
    """A short name of JSON-able values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


# ---- to the bit as before anything was lazy: these names were taken from the code before


def deal(kind: Kind) -> Any:
    draw = np.random.default_rng(7)
    labels, column = draw.integers(0, 5, 400), [f"u{n}" for n in draw.integers(0, 60, 400)]
    return partition(
        kind, labels, 13, 3, alpha=0.7, classes_per_client=2, s=0.6, min_rows=4, column=column,
        test_labels=draw.integers(0, 6, 150), test_rows=150,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("iid", "f585454f2974e7a7"),
        ("dirichlet", "aa8f26ebbebed850"),
        ("pathological", "c6ca5f6b921a2fe1"),
        ("label_sorted", "f6c3e7dfd7edaee7"),
        ("quantity", "af4d94725bc48f04"),
        ("natural", "b1bff6d736bf0fd5"),
    ],
)
def test_the_same_shares(kind: Kind, name: str) -> None:
    shares = deal(kind)
    rows = [[part.tolist() for part in parts] for parts in (shares.train, shares.test)]
    assert named(list(shares.names), rows, shares.summary()) == name


CSV = """kind,rank,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts,client,count
a,2,10,0.1,8,8,1,2,c07,
b,8,20,1,8,16,1,3,,2
c,,30,2,4,8,1,4,,1
a,2,10,0.1,8,8,1,2,c30,
"""


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (None, "da1099104734a219"),
        ({"devices": {"jetson-tx2": 3, "phone": 2, "laptop": 1}, "ranks": {"phone": 1}, "links": 2.0, "jitter": 0.2}, "14325b6539682047"),
        ({"csv": CSV, "ranks": {"c": 3}}, "51dda9bdf7f5e254"),
    ],
    ids=["nominal", "presets", "csv"],
)  # fmt: skip
def test_the_same_devices(settings: dict[str, Any] | None, name: str, tmp_path: Path) -> None:
    if settings and "csv" in settings:
        (tmp_path / "devices.csv").write_text(settings["csv"])
        settings = settings | {"csv": str(tmp_path / "devices.csv")}
    found = fleet.build(None if settings is None else FleetSettings(**settings), clients(40), 5)
    devices = {client: astuple(device) for client, device in found.devices.items()}
    assert named(list(devices), devices, astuple(found.at("c07", 9)), found.digest()) == name


def clients(count: int) -> dict[str, int]:
    return {f"c{at:02}": 3 + at % 7 for at in range(count)}


def test_the_same_cohorts() -> None:
    drawn = [server.sample([str(at) for at in range(30_000)], size, 1, 4) for size in (3, 1000)]
    assert (drawn[0], named(*drawn)) == (["4841", "11123", "13270"], "0f908a059efe4073")


OPTIONS: Mapping[str, list[dict[str, Any]]] = {
    "hetlora": [{"form": "uniform"}, {"form": "full"}],
    "fed_plora": [{"selection": s, "rest": r} for s in ("random", "weight_norm", "fixed") for r in ("freeze", "drop")],
    "legend": [{}, {"download": "full"}, {"depth": "full"}],
}
PLANS = {
    "fed_plora": "714ebe4ba050d7f3",
    "fedara": "d50196663a572d19",
    "fedavg": "d0fec75753159416",
    "feddpa": "f1f6356dbce1862d",
    "fedex_lora": "d0fec75753159416",
    "fedprox": "d0fec75753159416",
    "fedsa_lora": "7aa0a2372cf205f6",
    "ffa_lora": "5e81a87d50cbc36d",
    "flexlora": "87b993bde53d0309",
    "flora": "87573d992eac0c6c",
    "hetlora": "437343c8aa778b93",
    "legend": "92e8cd91dcd5a295",
    "local_only": "963cb2fbbfa14806",
    "lora_a2": "13ff02059032912c",
    "per_fedavg_lora": "80703db2f1ae50d8",
    "pf2lora": "c95b91170c0180b1",
    "raflora": "87b993bde53d0309",
    "rolora": "4a69e763161207ab",
}


def text(plan: Plan | None) -> Any:
    if plan is None:
        return None
    ids = [[(name, rows.tolist(), rows.dtype.str) for name, rows in part.items()] for part in (plan.train, plan.frozen)]
    arrays = {name: array.tolist() for name, array in plan.arrays.items()}
    rest = (plan.learn, plan.up, plan.down, plan.own, plan.select, plan.since, plan.private, list(plan.passes))
    return [*ids, arrays, dict(plan.returns), *rest]


@pytest.mark.parametrize("method", methods.names())
def test_the_same_plans(method: str) -> None:
    """Of a first round, and of a later one in which some were seen, with B and A that differ from component to component."""
    spec = toy.small({f"{at}.m": (3, 2) for at in range(4)}, rank=6)
    machines = fleet.build(
        FleetSettings(devices={"jetson-tx2": 1, "phone": 1, "laptop": 1}, ranks={"phone": 2}), clients(9), 0
    )
    load = Load(2, 300, 9000, 100, 4000, 16)
    cohort = {client: replace(device, load=load) for client, device in machines.devices.items()}
    found = []
    for options in OPTIONS.get(method, [{}]):
        chosen = methods.build({"name": method, **options})
        begun = chosen.begin(spec, 12, 3)
        draw = np.random.default_rng(1)
        blocks = {
            n: replace(b, B=draw.normal(size=b.B.shape).astype(np.float32)) for n, b in begun.adapter.blocks.items()
        }
        later = replace(begun, round=5, seen={"c01": 5, "c02": 3}, adapter=replace(begun.adapter, blocks=blocks))
        for state in (begun, later):
            found.append({client: text(plan) for client, plan in chosen.plan(state, cohort, 3).items()})
    assert named(found) == PLANS[method]


def test_what_all_clients_share_is_reckoned_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()
    monkeypatch.setattr(
        fed_plora, "norms", lambda adapter: asked.update(["norms"]) or {n: i * 1.0 for n, i in adapter.ids.items()}
    )
    method = methods.build({"name": "fed_plora", "selection": "weight_norm"})
    machines = fleet.build(FleetSettings(devices={"phone": 1}, ranks={"phone": 2}), clients(9), 0)
    assert len(method.plan(method.begin(toy.small(rank=4), 3, 0), machines.devices, 0)) == 9
    assert asked == {"norms": 1}


# ---- the roster


def test_names_are_made_when_they_are_asked_for() -> None:
    many = Names(10**9)
    assert (len(many), many[0], many[-1], many[41:43]) == (10**9, "000000000", "999999999", ("000000041", "000000042"))
    assert [many.index(many[at]) for at in (0, 7, 10**9 - 1)] == [0, 7, 10**9 - 1]
    assert "999999999" in many
    for odd in ("7", "0000000007", "00000000x", "-00000001", "٠٠٠٠٠٠٠٠٠", 7):
        assert odd not in many
    assert list(Names(11)) == [f"{at:02}" for at in range(11)]
    with pytest.raises(IndexError):
        Names(3)[3]
    with pytest.raises(ValueError, match="'3' is none of the 3 clients"):
        Names(3).index("3")


def test_a_roster_keeps_the_last_ones() -> None:
    made: list[int] = []
    squares = Roster(Names(100), lambda at: made.append(at) or at * at, kept=2)
    assert [squares["03"], squares["04"], squares["03"], squares["05"], squares["04"]] == [9, 16, 9, 25, 16]
    assert made == [3, 4, 5, 4]
    assert ("99" in squares, "100" in squares, squares.get("100"), len(squares)) == (True, False, None, 100)


# ---- clients that bring their own rows

WORDS = ("ab", "cd", "ef", "gh")


def rows(at: int, count: int = 4) -> Iterator[dict[str, Any]]:
    draws = np.random.default_rng(at).integers(0, 4, (count, 6)).tolist()
    return ({"text": "".join(WORDS[y][letter % 2] for letter in letters), "label": y} for y, *letters in draws)


def own(clients: int = 12, **changes: Any) -> ClientData:
    return ClientData(
        "own", clients, **{"rows": rows, "test": list(rows(-1 % 999, 20)), "labels": tuple("0123"), **changes}
    )


@pytest.mark.parametrize("name", ["Ward 1", ".a", "a/b", ""])
def test_a_client_s_name_that_no_folder_may_have_is_told_before_a_round(name: str) -> None:
    with pytest.raises(DataError, match=r"own: client id .* must be letters, digits"):
        natural(settings(), own(1, names=(name,)))


def settings(*overrides: str) -> Any:
    base = {"local": {"max_length": 16, "batch_size": 3}, "adapter": {"rank": 4}, "clients": {"count": 3},
            "rounds": {"count": 2, "cohort": 3, "evaluate_every": 5, "personal": 0}, "data": {"name": "own"},
            "engine": {"compute": "float32", "products": "torch", "workers": 1}}  # fmt: skip
    return load(base, overrides)


@pytest.mark.parametrize(
    "options",
    [("engine.stack=3",), pytest.param(("method={name: pf2lora, derivative: first}",), marks=pytest.mark.slow)],
)
def test_own_rows_give_the_bits_of_the_same_rows_in_one_file(options: tuple[str, ...], tmp_path: Path) -> None:
    train = [row | {"client": f"{at:02}"} for at in range(12) for row in rows(at)]
    for split, these in (("train", train), ("test", own().test)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, these)))
    one = fedrank.run(settings(*options), out=tmp_path / "own", data=own())
    where = (f"data={{path: {tmp_path}, partition: {{kind: natural}}}}", *options)
    other = fedrank.run(settings(*where), out=tmp_path / "file")
    assert toy.equal(one.state, other.state)
    kept = [{k: v for k, v in row.items() if "seconds" not in k or k == "clock_seconds"} for row in one.rounds]
    assert kept == [{k: row[k] for k in mine} for mine, row in zip(kept, other.rounds, strict=True)]
    assert one.config.clients.count == 12
    assert (one.config.data.partition.kind, one.config.data.name) == ("natural", "own")


def test_a_run_on_own_rows_goes_on_to_the_same_bits_with_them_alone(tmp_path: Path) -> None:
    whole = fedrank.run(settings("rounds.count=2"), out=tmp_path / "whole", data=own())
    part = fedrank.run(settings("rounds.count=1"), out=tmp_path / "part", data=own())
    with pytest.raises(
        ConfigError, match=r"bring their own rows, own; go on from Python: fedrank.resume\(path, data=...\)"
    ):
        fedrank.resume(part.path, "rounds.count=2")
    with pytest.raises(StoreError, match="data and model differ"):
        fedrank.resume(part.path, "rounds.count=2", data=own(rows=lambda at: rows(at + 1)))
    with pytest.raises(StoreError, match="data and model differ"):
        fedrank.resume(part.path, "rounds.count=2", data=own(clients=13))
    assert toy.equal(fedrank.resume(part.path, "rounds.count=2", data=own()).state, whole.state)


def test_a_fifth_of_a_client_s_rows_is_its_own_test(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    data = own(rows=lambda at: rows(at, 26))
    fedrank.run(
        settings("rounds={count: 1, cohort: 2, personal: 2}"), out=tmp_path / "run", data=data, watch=seen.append
    )
    assert {event["examples"] for event in seen if event["event"] == "client"} == {21}
    assert seen[-1]["personal_accuracy"] is not None


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"clients": 0}, (), "own: 0 clients"),
        ({"labels": ()}, (), "own: no labels"),
        ({"labels": ("a", "a")}, (), "own: a label is repeated"),
        ({"rows": lambda at: ()}, (), "own, client 0:1: no rows"),
        ({"rows": lambda at: [{"text": "a", "label": "nine"}]}, (), "own, client 0, row 1: unknown label 'nine'"),
        ({"rows": lambda at: [{"text": "a", "text_b": "b", "label": 1}]}, (), "client 0 and the test must both"),
        ({}, ("data.train_limit=5",), "data.train_limit: .* each client of own brings its own rows"),
        ({}, ("data.split=validation",), "data.split"),
    ],
)
def test_own_rows_are_checked(
    changes: dict[str, Any], overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        fedrank.run(settings(*overrides), out=tmp_path / "run", data=own(**changes))
    assert not (tmp_path / "run").exists()


# ---- a million of them


def resident() -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def test_a_million_clients_are_no_objects(tmp_path: Path) -> None:
    """An object of 100 bytes each, or a call each of anything here, would be over the bounds many times."""
    experiment.prepare(settings(), data=own())  # what the first run of a process loads is not counted
    asked, before = Counter[int](), resident()
    data = own(1_000_000, rows=lambda at: asked.update([at]) or rows(at))
    fleet = "engine.fleet={devices: {phone: 2, jetson-tx2: 1}, jitter: 0.1}"
    parts = experiment.prepare(settings(fleet, "method.name=legend"), data=data)
    assert (len(parts.devices), sum(asked.values())) == (1_000_000, 9)  # some typical ones, and the first again
    asked.clear()
    server = parts.server(Store.create(tmp_path / "run"))
    playing = server.train(parts.begin, 0.0, server.cohort(1))
    drawn = next(playing)["clients"]
    while (event := next(playing, None)) is not None and event["event"] == "client":
        assert event["ok"]
    assert {at: n for at, n in asked.items() if at} == dict.fromkeys(
        map(int, drawn), 1
    )  # once, whatever is asked of them
    assert list((tmp_path / "run" / "clients").glob("*")) == []
    assert resident() - before < 60
    assert len(json.dumps(parts.facts)) < 3000


def test_of_many_clients_a_summary_says_how_many_and_names_what_they_hold() -> None:
    count = LISTED + 1
    found = []
    for seed in (0, 0, 1):
        shares = partition(
            "iid", np.arange(3 * count) % 5, count, seed, alpha=1.0, classes_per_client=1, s=0.0, min_rows=1, column=None,
            test_labels=np.arange(50) % 5, test_rows=50,
        )  # fmt: skip
        found.append(shares.summary()["clients"])
    assert found[0] == found[1] != found[2]
    assert {name: found[0][name] for name in ("count", "train_rows", "test_rows")} == {
        "count": count, "train_rows": {"least": 3, "most": 3}, "test_rows": {"least": 0, "most": 1}
    }  # fmt: skip


@pytest.mark.parametrize("method", [{"name": "pf2lora", "derivative": "first"}, {"name": "fedavg"}])
def test_private_state_is_on_disk_for_those_that_have_it_alone(method: dict[str, Any], tmp_path: Path) -> None:
    run = fedrank.run(
        settings(f"method={json.dumps(method)}", "rounds.count=1"),
        out=tmp_path / "run",
        data=own(1000),
    )
    folders = {path.name for path in (run.path / "clients").glob("*")}
    assert folders == (set(run.state.seen) if method["name"] == "pf2lora" else set())


def test_what_is_remembered_of_a_client_holds_no_frame(tmp_path: Path) -> None:
    """A view of a few numbers would keep all of the frame that they came in, for as long as the run goes."""
    held: list[np.ndarray] = []

    @dataclass(frozen=True)
    class Watched(PF2LoRA):
        def merge(self, state: State, updates: Updates) -> State:
            held.extend(update.arrays["ranks"] for _, update in updates)
            return super().merge(state, updates)

    toy.federation(Watched(derivative="first"), tmp_path / "run", rounds=1).play()
    assert len(held) == len(toy.CLIENTS)
    assert all(array.base is None for array in held)
