"""What `fedrank cost` says before a run is what the run's ledger says after it."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import fedrank
import toy
from fedrank import cli, cost, forecast, methods, units
from fedrank.config import Local, load
from fedrank.ledger import BYTES
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.legend import LEGEND
from fedrank.methods.lora_a2 import LoRAA2
from fedrank.methods.rolora import RoLoRA
from fedrank.parts import prepare
from fedrank.protocol import Device, Job, Passes, Plan, State, Update
from fedrank.training import local, models, workload
from fedrank.training.scoring import Scorer

FLEET = "engine.fleet={devices: {jetson-tx2: 1, phone: 1, gpu-server: 2}, jitter: 0.3, redraw: 2}"
COUNTS = ("clients_ok", "clients_failed", "clients_out", "components", "modules_alive", *BYTES)
CLOCK = ("round_seconds", "clock_seconds", "waiting_seconds", "device_joules", "peak_memory_bytes")
# Whose plans hang on what was learnt: how far a run's sums may be from the forecast's. FedARA's clients vote by
# sensitivities, those of LoRA-A2 choose by sizes; those of HetLoRA may prune, which the forecast leaves out.
LEARNT = {"fedara": 0.2, "lora_a2": 0.1, "hetlora": 0.1}
DEVICES = """kind,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts,count,rank
large,10,1,8,8,1,2,5,4
weak,5,1,4,6,1,3,3,2
slow,1e-4,1,8,8,1,2,2,4
small,10,0.0001,8,8,1,2,2,2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "texts").mkdir()
    toy.write(folder / "texts", train=toy.texts(192, 0), test=toy.texts(16, 1))
    settings = {
        "data": {"path": str(folder / "texts"), "partition": {"kind": "quantity", "alpha": 3.0, "min_rows": 4}},
        "clients": {"count": 6}, "rounds": {"count": 3, "cohort": 6, "evaluate_every": 3},
        "local": {"batch_size": 8, "max_length": 16},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A fleet with devices that are always late, and others without the memory."""
    path = tmp_path_factory.mktemp("devices") / "devices.csv"
    path.write_text(DEVICES)
    return ("clients.count=12", "rounds={count: 6, cohort: 5, evaluate_every: 6, deadline: 5}",
            f"engine.fleet={{csv: {path}, jitter: 0.3}}")  # fmt: skip


def told(*args: Any) -> dict[str, Any]:
    found = CliRunner().invoke(cli.app, ["cost", *map(str, args), "--json"])
    assert (found.exit_code, found.stderr) == (0, "")
    return dict(json.loads(found.stdout))


def clients(run: fedrank.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", toy.FIRST)
def test_every_round_is_the_ledger_s(name: str, config: Path, hard: tuple[str, ...], tmp_path: Path) -> None:
    """To the byte and the second, but for the methods whose plans hang on what was learnt: their sums nearly."""
    options = (f"method.name={name}", *(["method.target_rank=2"] if name == "fedara" else []), *hard)
    said = [e for e in forecast.rehearse(prepare(load(config, options))) if e["event"] == "round"]
    run = fedrank.run(config, *options, out=tmp_path / "run")
    assert {row["clients_failed"] for row in run.rounds} - {0}
    if name in LEARNT:
        near = partial(pytest.approx, rel=LEARNT[name])
        assert [row["components"] for row in said] == [row["components"] for row in run.rounds]
        for key in (*BYTES, "round_seconds", "device_joules"):
            assert sum(row[key] for row in said) == near(sum(row[key] for row in run.rounds)), key
    else:
        near = partial(pytest.approx, rel=1e-12)
        for ours, theirs in zip(said, run.rounds, strict=True):
            assert [ours[key] for key in COUNTS] == [theirs[key] for key in COUNTS]
            assert [ours[key] for key in CLOCK] == near([theirs[key] for key in CLOCK])


@pytest.fixture(scope="module")
def trainer() -> local.Trainer:
    """Of a model of its own, with eager attention: torch does not count the other."""
    model = models.load(toy.settings(), toy.LABELS)
    model.base.set_attn_implementation("eager")
    made = local.Trainer(model, toy.encoded("train"), toy.encoded("test"), 1e-3, 1, "cpu")
    assert made.frozen.first == 0  # which is found out by passes that are not to be counted
    return made


def counted(method: Any, state: State, plan: Plan, trainer: local.Trainer) -> tuple[float, int]:
    """The FLOPs of a round by this plan, as they are said and as torch counts them."""
    spec, settings, rows = trainer.model.spec, Local(batch_size=8), np.arange(48)
    device, fit = Device("c0", len(rows), rank=4), partial(trainer.fit, rows=rows)
    job = Job(plan, state.round + 1, 5, spec, state.adapter, (), {}, settings, device, 0, fit)
    with toy.flops() as counter:
        assert len(list(method.train([job]))) == 1
    load = workload.workload(rows, trainer.train, settings, partial(job.rng, "batches"), trainer.frozen.packs)
    return sum(cost.flops(spec, state.adapter, plan, load)), counter.get_total_flops()


@pytest.mark.parametrize("name", toy.FIRST)
def test_a_method_s_training_takes_the_flops_that_are_said(name: str, trainer: local.Trainer) -> None:
    """Within 2 %; of two levels, counted as if each pass made both levels' gradients, within a tenth."""
    method = methods.build({"name": name, **({"target_rank": 1} if name == "fedara" else {})})
    state = method.begin(trainer.model.spec, 5, 0)
    plan = method.plan(state, {"c0": Device("c0", 48, rank=4)}, 0)["c0"]
    assert plan is not None
    said, found = counted(method, state, plan, trainer)
    assert said == pytest.approx(found, rel=0.1 if plan.passes != Passes() else 0.02)


@pytest.mark.parametrize("method", [LoRAA2(), RoLoRA()])
def test_a_round_takes_the_flops_of_the_factor_that_learns(method: Any, trainer: local.Trainer) -> None:
    """Of B and A in turn: either takes less than both do."""
    begin, found = method.begin(trainer.model.spec, 5, 0), {}
    for round in (0, 1):
        state = replace(begin, round=round)
        plan = method.plan(state, {"c0": Device("c0", 48)}, 0)["c0"]
        said, found[plan.learn] = counted(method, state, plan, trainer)
        assert said == pytest.approx(found[plan.learn], rel=0.02)
    assert found.keys() == {"Bh", "Ah"}
    state = FedAvg().begin(trainer.model.spec, 5, 0)
    _, both = counted(FedAvg(), state, Plan(state.adapter.ids), trainer)
    assert max(found.values()) < both


@pytest.mark.parametrize("download", ["suffix", "full"])
def test_a_deeper_suffix_takes_more_flops_as_is_said(download: str, trainer: local.Trainer) -> None:
    method = LEGEND(download=download)
    state, found = method.begin(trainer.model.spec, 5, 0), []
    for depth in (1, 2, 3):
        plan = method._suffix(state, depth)
        assert plan is not None
        assert len({name.split(".")[2] for name in plan.train}) == depth
        said, counts = counted(method, state, plan, trainer)
        assert said == pytest.approx(counts, rel=0.02)
        found.append(counts)
    assert found == sorted(found)
    assert found[2] > 1.3 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("adapter.head=own",), ("method.name=ffa_lora", "wire.dtype=int8")], ids=str)
def test_kinds_and_totals_are_the_ledger_s(options: tuple[str, ...], config: Path, hard: tuple[str, ...], tmp_path: Path) -> None:  # fmt: skip
    options = (*options, *hard)
    found = told(config, *options)
    run = fedrank.run(config, *options, out=tmp_path / "run")
    devices = prepare(load(config, options)).devices
    for said in found["kinds"]:
        mine = [r for r in clients(run) if devices[r["client"]].kind == said["kind"]]
        assert said["drawn"] == len(mine) > 0
        assert said["clients"] == sum(device.kind == said["kind"] for device in devices.values())
        for name in ("bytes_down", "bytes_up", "device_seconds", "forward_seconds", "device_joules"):
            assert said[name] == pytest.approx(np.mean([r.get(name, 0.0) for r in mine]), rel=1e-12)
        for name in ("bytes_down", "bytes_up", "device_joules"):
            assert said["run"][name] == pytest.approx(sum(r.get(name, 0.0) for r in mine), rel=1e-12)
        spent, would = said["run"]["spent_seconds"], sum(r["device_seconds"] for r in mine)
        assert spent == pytest.approx({"slow": 5 * len(mine), "small": spent}.get(said["kind"], would), rel=1e-12)
        if said["kind"] == "small":
            assert 0 < spent < 0.9 * would  # its downloads, before it saw that its memory is short
        assert said["peak_memory_bytes"] == max(r["peak_memory_bytes"] for r in mine)
        assert (said["late"], said["too_small"]) == {
            "slow": (len(mine), 0),
            "small": (0, len(mine)),
        }.get(said["kind"], (0, 0))
    one, total = found["round"], run.summary
    for name in ("bytes_down", "bytes_up", "device_joules"):
        assert sum(kind["run"][name] for kind in found["kinds"]) == pytest.approx(found["run"][name], rel=1e-12)
    for name in ("bytes_down", "bytes_up", "adapter_bytes_down", "adapter_bytes_up", "clients_ok", "clients_failed"):
        assert (found["run"][name], one[name]) == (total[name], total[name] / 6)
    assert found["run"]["clock_seconds"] == 6 * one["round_seconds"] == total["clock_seconds"]
    assert found["run"]["device_joules"] == pytest.approx(sum(row["device_joules"] for row in run.rounds), rel=1e-12)
    assert one["waiting_seconds"] == pytest.approx(total["waiting_seconds"], rel=1e-12)
    assert one["peak_memory_bytes"] == max(r["peak_memory_bytes"] for r in clients(run))
    assert one["slowest_seconds"] == max(r["device_seconds"] for r in clients(run))


def test_devices_of_one_kind_may_differ_in_memory(config: Path, tmp_path: Path) -> None:
    """One of six clients has a small box: it is drawn in each of three rounds, and never late."""
    head = "kind,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts,client"
    client, path = next(iter(prepare(load(config)).devices)), tmp_path / "boxes.csv"
    lines = [f"box,10,0.0001,8,8,1,2,{client}", "box,10,8,8,8,1,2,"]
    for rows in (lines, lines[::-1]):
        path.write_text("\n".join([head, *rows]))
        (kind,) = told(config, f"engine.fleet.csv={path}")["kinds"]
        assert (kind["drawn"], kind["late"], kind["too_small"]) == (18, 0, 3)
        assert kind["memory_bytes"] == 1e5


def test_failures_are_left_out_and_time_is_modelled(config: Path) -> None:
    plain = told(config, FLEET)
    assert told(config, FLEET, "engine.failure_rate=0.5", "engine.timing=measured", "rounds.exactness=true") == plain


def test_who_sits_out_or_is_never_drawn(config: Path) -> None:
    found = told(config, "engine.fleet.devices={laptop: 5, phone: 1}", "rounds={count: 1, cohort: 1}")
    drawn, other = sorted(found["kinds"], key=lambda kind: -kind["drawn"])
    assert (drawn["drawn"], drawn["bytes_up"]) == (1, found["run"]["bytes_up"])
    assert (other["drawn"], other["bytes_up"], other["peak_memory_bytes"]) == (0, None, None)
    assert set(other["run"].values()) == {0}
    caps = ("method={name: legend, max_bytes: 1}", "rounds.count=2")
    found = told(config, FLEET, *caps)
    assert sum(kind["sitting_out"] for kind in found["kinds"]) == found["run"]["clients_out"] == 12
    assert found["run"]["bytes_down"] == found["run"]["clock_seconds"] == found["round"]["slowest_seconds"] == 0


def test_a_method_that_needs_its_training_says_so(config: Path) -> None:
    @dataclass(frozen=True)
    class Odd(FedAvg):
        def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
            return (replace(u, metrics={"loss": u.metrics["entropy"]}) for u in (job.fit(job) for job in jobs))

    with pytest.raises(forecast.ForecastError, match="Odd cannot be played without its training: round 1, client 0"):
        forecast.forecast(load(config), Odd())


def test_a_person_reads_it_in_80_columns(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    kinds = "{jetson-agx-xavier: 1, jetson-xavier-nx: 1, raspberry-pi-5: 1}"
    found = CliRunner().invoke(cli.app, ["cost", str(config), f"engine.fleet.devices={kinds}", "rounds.deadline=1e-3"])
    assert found.exit_code == 0, found.output
    assert "…" not in found.output
    for word in ("jetson-agx-xavier", "jetson-xavier-nx", "raspberry-pi-5", "lost", "energy", "3 rounds", "8 GB"):
        assert word in found.output
    plain = CliRunner().invoke(cli.app, ["cost", str(config)])
    assert "laptop" in plain.output
    assert "lost" not in plain.output
    assert "clients added up" in found.output  # which one kind's totals would only repeat
    assert "clients added up" not in plain.output
    rare = CliRunner().invoke(
        cli.app, ["cost", str(config), f"engine.fleet.devices={kinds}", "rounds={count: 1, cohort: 1}"]
    )
    assert rare.output.count("–") == 14  # seven numbers of each of the two kinds that were not drawn


def test_nothing_is_trained_evaluated_or_left_behind(
    config: Path, hard: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what, name in ((local.Trainer, "fit"), (Scorer, "evaluate"), (Scorer, "counts")):
        monkeypatch.setattr(what, name, lambda *args, **more: pytest.fail("a forecast trains nothing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    told(config, *hard, "method.name=flora")
    assert list(tmp_path.glob("fedrank*")) == []
    during = []

    def stop(event: dict[str, Any]) -> None:
        during.extend(tmp_path.glob("fedrank*"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forecast.forecast(load(config), watch=stop)
    assert len(during) == 1
    assert list(tmp_path.glob("fedrank*")) == []


def test_mistakes_are_one_line(config: Path) -> None:
    found = CliRunner().invoke(cli.app, ["cost", str(config), "engine.fleet.devices={lap: 1}"])
    assert found.exit_code == 2
    assert "no device kind 'lap'" in found.stderr
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (3e-5, "30 µs"), (0.0042, "4.2 ms"), (1.5, "1.5 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h"),
     (216000, "2.5 days"), (None, "–")],
)  # fmt: skip
def test_durations_for_people(seconds: float | None, text: str) -> None:
    assert units.duration(None if seconds is None else float(seconds)) == text


@pytest.mark.parametrize(("joules", "text"), [(0.0, "0 mJ"), (0.0123, "12 mJ"), (1.0, "1.0 J"), (44.2, "44 J"), (2470.0, "2.5 kJ"), (9e12, "9000 GJ")])  # fmt: skip
def test_energy_for_people(joules: float, text: str) -> None:
    assert units.energy(joules) == text


def test_workers_change_no_forecast() -> None:
    raw = {
        "model": {"name": "tiny-encoder"}, "data": {"name": "docstrings", "train_limit": 80, "test_limit": 20},
        "clients": {"count": 4}, "rounds": {"count": 2, "cohort": 3}, "local": {"max_length": 16},
    }  # fmt: skip
    one, two = (forecast.forecast(load({**raw, "engine": {"workers": workers}})) for workers in (1, 2))
    assert one == two
