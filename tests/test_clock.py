"""The simulated clock: what a round takes on the clients' devices, who is late, and that the ledger says so to the bit."""

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrank
import toy
from fedrank import cost, experiment
from fedrank.client import Late, Site, handle
from fedrank.config import ConfigError, load
from fedrank.frame import unpack
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import Job, Load, Plan, Update
from fedrank.selection import suffix
from fedrank.store import Store, StoreError
from fedrank.training.tasks import Encoded

WALL = {"seconds", "wall_seconds", "train_seconds", "evaluation_seconds"}
MIXED = "engine.fleet={devices: {jetson-tx2: 1, phone: 1, laptop: 2}, jitter: 0.3, redraw: 2}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    toy.write(folder, train=toy.texts(64, 0), test=toy.texts(24, 1))
    return folder


def settings(texts: Path, *overrides: str) -> dict[str, Any]:
    base: dict[str, Any] = {
        "data": {"path": str(texts), "partition": {"kind": "quantity", "alpha": 1.0, "min_rows": 4}},
        "clients": {"count": 4}, "rounds": {"count": 2, "cohort": 4, "evaluate_every": 2}, "adapter": {"rank": 4},
        "local": {"batch_size": 8, "max_length": 16},
    }  # fmt: skip
    return load(base, overrides).model_dump(mode="json")


def rows(run: fedrank.Run, name: str = "clients") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / f"{name}.jsonl").read_text().splitlines()]


def modelled(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in WALL} for row in found]


@pytest.fixture(scope="module")
def played(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> fedrank.Run:
    return fedrank.run(settings(texts, MIXED, "rounds.count=3"), out=tmp_path_factory.mktemp("played") / "run")


# ---- what the ledger says


def test_a_client_s_row_is_what_the_model_of_costs_says(played: fedrank.Run) -> None:
    parts = experiment.prepare(played.config)
    wire = parts.server(Store(played.path)).wire
    for row in rows(played):
        device = parts.devices[row["client"]]
        plan = parts.method.plan(parts.begin, {row["client"]: device}, 0)[row["client"]]
        found = parts.cost(row["client"], wire.start, row["round"], plan, row["bytes_down"])
        assert found.bytes_up == row["bytes_up"]
        assert found.bytes_down == row["bytes_down"]
        assert {name: row[name] for name in found.metrics} == found.metrics
        assert row["device_seconds"] == pytest.approx(
            sum(row[f"{part}_seconds"] for part in ("download", "forward", "backward", "upload")), rel=1e-12
        )
        assert found.device.kind == device.kind


def test_a_round_lasts_as_long_as_its_slowest_client(played: fedrank.Run) -> None:
    clock = 0.0
    for row in played.rounds:
        mine = [r for r in rows(played) if r["round"] == row["round"]]
        assert len(mine) == 4
        slowest = max(r["device_seconds"] for r in mine)
        clock += slowest
        assert (row["round_seconds"], row["clock_seconds"]) == (slowest, clock)
        waits = [r["waiting_seconds"] for r in mine]
        assert min(waits) == 0.0 < max(waits)
        assert waits == [slowest - r["device_seconds"] for r in mine]
        assert row["waiting_seconds"] == pytest.approx(np.mean(waits), rel=1e-12)
        assert row["device_joules"] == pytest.approx(sum(r["device_joules"] for r in mine), rel=1e-12)
        assert row["peak_memory_bytes"] == max(r["peak_memory_bytes"] for r in mine)
    summary = played.summary
    assert summary["clock_seconds"] == clock
    assert summary["device_joules"] == pytest.approx(sum(row["device_joules"] for row in played.rounds), abs=1e-4)
    assert summary["peak_memory_bytes"] == max(row["peak_memory_bytes"] for row in played.rounds)
    assert summary["waiting_seconds"] == pytest.approx(np.mean([row["waiting_seconds"] for row in played.rounds]))


def test_rounds_differ_by_jitter(played: fedrank.Run) -> None:
    for client in {row["client"] for row in rows(played)}:
        mine = [row for row in rows(played) if row["client"] == client]
        assert len({row["forward_seconds"] for row in mine}) == len({row["upload_seconds"] for row in mine}) == 3
        for row in mine:  # one factor on both ways of the link, one on both ways through the model
            assert row["forward_seconds"] / row["backward_seconds"] == pytest.approx(
                mine[0]["forward_seconds"] / mine[0]["backward_seconds"], rel=0.05
            )


def test_modelled_time_is_equal_to_the_bit_and_survives_a_resume(
    played: fedrank.Run, texts: Path, tmp_path: Path
) -> None:
    run = fedrank.run(settings(texts, MIXED, "rounds.count=1"), out=tmp_path / "run")
    fedrank.resume(run.path, "rounds.count=2")
    fedrank.resume(run.path, "rounds.count=3")
    assert modelled(rows(run)) == modelled(rows(played))
    stopped = {"personal_accuracy", "personal_majority", "personal_clients", "evaluation_bytes", "accuracy", "loss"}
    one, two = (
        [{k: v for k, v in row.items() if k not in stopped} for row in modelled(r.rounds)] for r in (run, played)
    )
    assert one == two


def test_the_nominal_fleet(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "rounds.count=1"), out=tmp_path / "run")
    assert json.loads((run.path / "data.json").read_text())["fleet"]["kinds"] == {"laptop": 4}
    found = {row["client"]: row for row in rows(run)}
    by_rows = sorted(found.values(), key=lambda row: row["examples"])
    assert by_rows[0]["forward_seconds"] < by_rows[-1]["forward_seconds"]
    assert len({row["upload_seconds"] for row in found.values()}) == 1


def test_devices_carry_their_expected_load(texts: Path) -> None:
    parts = experiment.prepare(load(settings(texts, "local.epochs=2")))
    for device in parts.devices.values():
        assert device.load is not None
        assert device.load.rows == 2 * device.examples
        assert device.load.steps == 2 * -(-device.examples // 8)
        assert device.load.peak_tokens <= 8 * 16
        assert device.load.tokens <= device.load.rows * 16


@pytest.mark.parametrize("option", ["local.epochs=2", "local.steps=3"])
def test_the_load_is_what_training_goes_through(
    option: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and pairs of the very batches that are trained on, known before."""
    shapes: list[tuple[int, int]] = []
    whole = Encoded.batch

    def spy(self: Encoded, *args: Any) -> Any:
        found = whole(self, *args)
        shapes.append(tuple(found[0]["input_ids"].shape))
        return found

    predicted: list[Any] = []
    flops = cost.flops
    monkeypatch.setattr(cost, "flops", lambda *args: (predicted.append(args[3]), flops(*args))[1])
    config = settings(texts, option, "rounds={count: 2, cohort: 4, evaluate_every: 2}")

    def train(self: FedAvg, jobs: Iterable[Job]) -> Iterator[Update]:
        for job in jobs:
            with monkeypatch.context() as patch:
                patch.setattr(Encoded, "batch", spy)
                shapes.clear()
                update = job.fit(job)
            mine = predicted[-1]
            assert (mine.steps, mine.rows) == (len(shapes), sum(n for n, _ in shapes))
            assert (mine.tokens, mine.pairs) == (sum(n * k for n, k in shapes), sum(n * k * k for n, k in shapes))
            assert mine.peak_tokens == max(n * k for n, k in shapes)
            assert mine.peak_pairs == max(n * k * k for n, k in shapes)
            yield update

    monkeypatch.setattr(FedAvg, "train", train)
    run = fedrank.run(config, out=tmp_path / "run")
    assert [row["clients_ok"] for row in run.rounds] == [4, 4]
    assert len(predicted) == 8


# ---- deadlines


def test_slow_clients_miss_the_deadline(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("rounds.count=1", "rounds.evaluate_every=1", "engine.fleet={devices: {raspberry-pi-5: 1}, links: 1000}")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "all")
    whole_run = {row["client"]: row for row in rows(run)}
    seconds = {client: row["device_seconds"] for client, row in whole_run.items()}
    middle = sorted(seconds.values())[1]
    trained: list[str] = []
    whole = FedAvg.train

    def spy(self: FedAvg, jobs: Iterable[Job]) -> Iterable[Update]:
        jobs = list(jobs)
        trained.extend(job.device.id for job in jobs)
        return whole(self, jobs)

    monkeypatch.setattr(FedAvg, "train", spy)
    run = fedrank.run(settings(texts, *options, f"rounds.deadline={middle!r}"), out=tmp_path / "run")
    found = {row["client"]: row for row in rows(run)}
    ok = {client for client, row in found.items() if row["ok"]}
    assert ok == {client for client, taken in seconds.items() if taken <= middle} == set(trained)
    (row,) = run.rounds
    assert (row["clients_ok"], row["clients_failed"]) == (2, 2)
    assert row["round_seconds"] == row["clock_seconds"] == middle  # it was waited for the two until then
    for client, late in found.items():
        if client not in ok:
            assert late["error"] == f"no answer within the deadline of {middle:g} s"
            assert late["bytes_down"] > 0
            assert not late.keys() & {"waiting_seconds", "bytes_up"}
            for name in ("device_seconds", "forward_seconds", "upload_seconds", "peak_memory_bytes"):
                assert late[name] == whole_run[client][name]  # what it would have needed
            got = late["download_seconds"]
            assert late["device_joules"] == pytest.approx(3 * got + 9 * (middle - got), rel=1e-12)  # what it did take
    assert row["device_joules"] == pytest.approx(sum(r["device_joules"] for r in found.values()), rel=1e-12)
    assert row["peak_memory_bytes"] == max(found[client]["peak_memory_bytes"] for client in ok)


def test_with_all_in_time_a_round_ends_before_its_deadline(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "rounds.count=1", "rounds.deadline=1e6"), out=tmp_path / "run")
    (row,) = run.rounds
    assert row["round_seconds"] == max(r["device_seconds"] for r in rows(run)) < 1e6


def test_where_all_are_late_a_round_lasts_to_its_deadline(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "rounds.deadline=1e-6", MIXED), out=tmp_path / "run")
    assert [row["clients_ok"] for row in run.rounds] == [0, 0]
    assert [row["clock_seconds"] for row in run.rounds] == [1e-6, 2e-6]
    assert [row["waiting_seconds"] for row in run.rounds] == [None, None]
    assert run.rounds[-1]["personal_clients"] > 0  # evaluation is never late


def test_silent_clients_without_a_deadline(texts: Path, tmp_path: Path) -> None:
    options = ("engine.failure_rate=0.5", "rounds.count=4", "rounds.evaluate_every=4")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run")
    for row in run.rounds:
        mine = [r["device_seconds"] for r in rows(run) if r["round"] == row["round"] and r["ok"]]
        assert row["round_seconds"] == max(mine, default=0.0)
    assert {r["error"] for r in rows(run) if not r["ok"]} == {"no answer"}


def test_who_is_silent_within_the_deadline_is_not_said_to_be_late(texts: Path, tmp_path: Path) -> None:
    options = ("engine.failure_rate=0.5", "rounds={count: 4, evaluate_every: 4, cohort: 4, deadline: 1e6}")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run")
    silent = [row for row in rows(run) if not row["ok"]]
    assert {row["error"] for row in silent} == {"no answer within the deadline of 1e+06 s"}
    assert not any("device_seconds" in row for row in silent)  # nothing is known of their work


# ---- measured


def test_measured_time_is_wall_time(texts: Path, tmp_path: Path) -> None:
    options = ("rounds.count=1", "engine.fleet={devices: {raspberry-pi-5: 1}}")
    plain = {row["client"]: row for row in rows(fedrank.run(settings(texts, *options), out=tmp_path / "modelled"))}
    start = time.perf_counter()
    run = fedrank.run(settings(texts, *options, "engine.timing=measured"), out=tmp_path / "run")
    spent = time.perf_counter() - start
    for row in rows(run):
        other = plain[row["client"]]
        assert row["forward_seconds"] > 0
        assert row["backward_seconds"] > 0
        wall = row["forward_seconds"] + row["backward_seconds"]
        assert row["seconds"] <= wall < spent
        assert row["forward_seconds"] != other["forward_seconds"]
        for name in ("download_seconds", "upload_seconds", "peak_memory_bytes"):
            assert row[name] == other[name]
        moved = row["download_seconds"] + row["upload_seconds"]
        assert row["device_seconds"] == pytest.approx(wall + moved, rel=1e-12)
        assert row["device_joules"] == pytest.approx(9 * wall + 3 * moved, rel=1e-12)
    assert toy.same(run.state.adapter, fedrank.Run(tmp_path / "modelled").state.adapter)


def test_a_measured_client_is_late_after_its_work(texts: Path, tmp_path: Path) -> None:
    options = ("rounds.count=1", "engine.timing=measured", "rounds.deadline=1e-6")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run")
    assert run.rounds[0]["clients_ok"] == 0
    assert not list((run.path / "clients").rglob("*.safetensors"))  # and it keeps nothing of it


def test_the_speed_of_this_host_decides_nothing(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depths follow the devices: a host whose clock jumps plans the same, unless its own time is what is measured."""
    options = (MIXED, "method.name=legend", "rounds.count=3", "engine.timing=modelled")
    steady = fedrank.run(settings(texts, *options), out=tmp_path / "steady")
    ticks, draw = itertools.count(), np.random.default_rng(0)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) * 100.0 + draw.uniform(0, 90))
    jumpy = fedrank.run(settings(texts, *options), out=tmp_path / "jumpy")
    assert min(row["seconds"] for row in rows(jumpy)) > 9  # so it did jump
    assert toy.equal(jumpy.state, steady.state)
    assert modelled(rows(jumpy)) == modelled(rows(steady))
    assert modelled(jumpy.rounds) == modelled(steady.rounds)
    assert all(row["lowest_depth"] < row["highest_depth"] for row in steady.rounds)
    measured = fedrank.run(settings(texts, *options[:-1], "engine.timing=measured"), out=tmp_path / "measured")
    assert not toy.equal(measured.state, steady.state)


# ---- the client's side


def test_the_clock_is_the_client_s_own(tmp_path: Path) -> None:
    """Without a modelled device there is no simulated time, and nobody is late."""
    f = toy.federation(FedAvg(), tmp_path / "run", rounds=1, alter=toy.unmodelled)
    events = f.play()
    assert all("device_seconds" not in event for event in events["client"])
    (row,) = events["round"]
    assert (row["round_seconds"], row["clock_seconds"], row["waiting_seconds"]) == (0.0, 0.0, None)
    frame = f.server.wire.request("train", "c0", Plan(f.begin.adapter.ids), f.begin)
    assert unpack(handle(frame, f.sites["c0"], 1e-9))[0]["kind"] == "update"


def slow(f: toy.Federation, **changes: Any) -> Site:
    """c0 on a device whose seconds are the model's."""
    site, spec, start = f.sites["c0"], f.server.wire.spec, f.begin.adapter
    device = replace(site.device, kind="slow", flops_per_second=1e6, up_bytes_per_second=1e6, down_bytes_per_second=1e6,
                     idle_watts=1.0, busy_watts=2.0, memory_bytes=1e9)  # fmt: skip
    device, work = replace(device, **changes), Load(2, 128, 1024, 64, 512, 16)

    def price(round: int, plan: Plan, size: int) -> cost.Cost:
        return cost.predict(spec, start, plan, work, device, size, cost.most_up(spec, start, plan, "f32").frame)

    return replace(site, cost=price)


def test_late_is_told_from_failed(tmp_path: Path) -> None:
    f = toy.federation(FedAvg(), tmp_path / "run")
    plan = Plan(f.begin.adapter.ids)
    frame = f.server.wire.request("train", "c0", plan, f.begin)
    seconds = slow(f).cost(1, plan, len(frame)).seconds
    with pytest.raises(Late):
        handle(frame, slow(f), seconds * 0.999)
    reply = f.server.wire.open_reply(handle(frame, slow(f), seconds), "train", 1, "c0", plan, f.begin.adapter)
    assert reply.metrics["device_seconds"] == seconds
    small = handle(frame, slow(f, memory_bytes=1e5), None)
    reply = f.server.wire.open_reply(small, "train", 1, "c0", plan, f.begin.adapter)
    assert reply.error is not None
    assert reply.error.startswith("DeviceError: out of memory: needs 0.000")
    assert reply.error.endswith("GB, slow has 0.0001 GB")


@dataclass(frozen=True)
class First(FedAvg):
    """Of every module only the first component is sent."""

    def train(self, jobs: Iterable[Job]) -> Iterator[Update]:
        for job in jobs:
            update = job.fit(job)
            yield replace(update, adapter=update.adapter.take({n: ids[:1] for n, ids in update.adapter.ids.items()}))


def test_a_client_that_selects_is_late_by_what_it_sends(tmp_path: Path) -> None:
    """It might send four components per module, and sends one."""
    f = toy.federation(FedAvg(), tmp_path / "run")
    site, plan = slow(f, up_bytes_per_second=1e3), Plan(f.begin.adapter.ids, select=10**6)
    site = replace(site, method=First())
    frame = f.server.wire.request("train", "c0", plan, f.begin)
    most = site.cost(1, plan, len(frame)).seconds
    reply = f.server.wire.open_reply(handle(frame, site, 0.9 * most), "train", 1, "c0", plan, f.begin.adapter)
    seconds = reply.metrics["device_seconds"]
    assert seconds < 0.9 * most
    with pytest.raises(Late):
        handle(frame, site, seconds * 0.999)


CSV = "kind,rank,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts,client\n"


def test_what_does_not_fit_a_device_fails_there(texts: Path, tmp_path: Path) -> None:
    names = experiment.prepare(load(settings(texts))).devices
    client = list(names)[1]
    (tmp_path / "devices.csv").write_text(CSV + f"small,2,10,0.0001,8,8,1,2,{client}\nlarge,8,10,1,8,8,1,2,\n")
    run = fedrank.run(settings(texts, f"engine.fleet={{csv: {tmp_path / 'devices.csv'}}}"), out=tmp_path / "run")
    failed = [row for row in rows(run) if not row["ok"]]
    assert [row["client"] for row in failed] == [client, client]
    assert all("out of memory: needs" in row["error"] and "small has 0.0001 GB" in row["error"] for row in failed)
    assert all(row["peak_memory_bytes"] > 1e5 and row["device_seconds"] > 0 for row in failed)
    assert all(
        row["device_joules"] == row["download_seconds"] * 1.0 for row in failed
    )  # it is refused once it is there
    assert all(row["clients_ok"] == 3 and row["round_seconds"] > 0 for row in run.rounds)
    assert experiment.prepare(run.config).devices[client].rank == 2


def test_legend_asks_of_a_device_what_it_has_the_memory_for(tmp_path: Path) -> None:
    """A client of nine rows trains on eight and one, and needs less where the longest is alone; it cannot count on it."""
    long = toy.texts(64, 0)
    long = replace(long, text=[text * (3 if at % 16 == 5 else 1) for at, text in enumerate(long.text)])
    (texts := tmp_path / "texts").mkdir()
    toy.write(texts, train=long, test=toy.texts(24, 1))
    options = ("seed=1", "rounds.count=3", "local.max_length=32", "method={name: legend, depth: full}")
    parts = experiment.prepare(load(settings(texts, *options)))
    layer, layers = parts.begin.arrays["layer"], (3, 2, 1, 0)
    held, lines = {}, [CSV.strip()]
    for (client, device), depth in zip(parts.devices.items(), layers, strict=True):
        plan = Plan(suffix(parts.begin.adapter, layer, min(depth + 1, 3)))
        needs = [parts.cost(client, parts.begin.adapter, round, plan, 0).peak_memory_bytes for round in range(1, 21)]
        held[client] = max(needs) + (1 if depth == 3 else -1)  # all but a byte of what another block would take
        lines.append(f"box,,10,{held[client] / 1e9!r},8,8,1,2,{client}")
        if depth == 1:
            assert (device.examples, min(needs) < max(needs)) == (9, True)
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    boxes = f"engine.fleet={{csv: {tmp_path / 'boxes.csv'}}}"
    run = fedrank.run(settings(texts, *options, boxes), out=tmp_path / "run")
    assert [(r["clients_ok"], r["clients_failed"], r["clients_out"]) for r in run.rounds] == [(3, 0, 1)] * 3
    sigma = 4 * float(parts.begin.arrays["sigma"])
    ranks = dict(zip(parts.devices, (12, 10, 6, 0), strict=True))
    for row in rows(run):
        assert row["adapter_bytes_up"] / sigma == ranks[row["client"]]
        assert row["peak_memory_bytes"] <= held[row["client"]]


# ---- resuming


def test_a_fleet_cannot_change_in_a_run_that_has_begun(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(CSV + "one,2,10,1,8,8,1,2,\n")
    run = fedrank.run(settings(texts, "rounds.count=1", f"engine.fleet={{csv: {path}}}"), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"'engine.fleet.jitter' cannot be changed"):
        fedrank.resume(run.path, "engine.fleet.jitter=1")
    with pytest.raises(ConfigError, match=r"'engine.fleet.devices.laptop' cannot be changed"):
        fedrank.resume(run.path, "engine.fleet.devices.laptop=1")
    path.rename(tmp_path / "moved.csv")
    assert fedrank.resume(run.path, f"engine.fleet.csv={tmp_path / 'moved.csv'}", "rounds.count=+1").state.round == 2
    (tmp_path / "moved.csv").write_text(CSV + "one,2,11,1,8,8,1,2,\n")
    with pytest.raises(StoreError, match=r"its devices differ here: hash"):
        fedrank.resume(run.path, "rounds.count=+1")


def test_a_file_of_devices_is_found_from_elsewhere(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "devices.csv").write_text(CSV + "one,2,10,1,8,8,1,2,\n")
    monkeypatch.chdir(tmp_path)
    run = fedrank.run(settings(texts, "rounds.count=1", "engine.fleet={csv: devices.csv}"), out=tmp_path / "run")
    monkeypatch.chdir(texts)
    assert fedrank.resume(run.path, "rounds.count=+1").state.round == 2
