"""Many clients: the same cohorts, shares, devices and plans as ever, and nothing that is made for each one up front."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from fedrank import fleet, methods, server
from fedrank.config import FleetSettings
from fedrank.protocol import Load, Plan
from fedrank.training.partition import Kind, partition


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
        ("natural", "1e763b47cbd81519"),
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
    "fed_plora": "0c24dbf0f0a6a635",
    "fedara": "c05bff3622b6e8c3",
    "fedavg": "9e90c76768dabf8d",
    "feddpa": "d64fbd1d30df48a9",
    "fedex_lora": "9e90c76768dabf8d",
    "fedprox": "9e90c76768dabf8d",
    "fedsa_lora": "73619ac53f515f01",
    "ffa_lora": "6718f8f7bba562a0",
    "flexlora": "beb9bb839f300293",
    "flora": "2cef841286c7f697",
    "hetlora": "1410ef07a5bb7f01",
    "legend": "2b04d9e795270d03",
    "local_only": "45b2560b8ade41ab",
    "lora_a2": "81e64f10a64a8dc3",
    "per_fedavg_lora": "3ba6299a249adad2",
    "pf2lora": "454eddf4c1240979",
    "raflora": "beb9bb839f300293",
    "rolora": "1f5a566af7bb4b01",
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
