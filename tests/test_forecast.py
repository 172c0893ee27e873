"""What `fedrank cost` says before a run is what the run's ledger says after its first round."""

import json
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import fedrank
import toy
from fedrank import cli, cost, forecast, methods, views
from fedrank.config import Local, load
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.legend import LEGEND
from fedrank.methods.lora_a2 import LoRAA2
from fedrank.methods.rolora import RoLoRA
from fedrank.parts import prepare
from fedrank.protocol import Device, Job, Plan, State
from fedrank.training import local, models

FLEET = "engine.fleet={devices: {jetson-tx2: 1, phone: 1, gpu-server: 2}, jitter: 0.3, redraw: 2}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "texts").mkdir()
    toy.write(folder / "texts", train=toy.texts(96, 0), test=toy.texts(16, 1))
    settings = {
        "data": {"path": str(folder / "texts"), "partition": {"kind": "quantity", "alpha": 1.0, "min_rows": 4}},
        "clients": {"count": 6}, "rounds": {"count": 3, "cohort": 6, "evaluate_every": 3},
        "local": {"batch_size": 8, "max_length": 16},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def told(*args: Any) -> dict[str, Any]:
    found = CliRunner().invoke(cli.app, ["cost", *map(str, args), "--json"])
    assert found.exit_code == 0, found.output
    return dict(json.loads(found.stdout))


def first(run: fedrank.Run) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    return [row for row in rows if row["round"] == 1]


@pytest.mark.parametrize("name", toy.EVERY)
def test_every_client_s_numbers_are_the_ledger_s(name: str, config: Path, tmp_path: Path) -> None:
    options = (f"method.name={name}", FLEET, "rounds.count=1", "wire.dtype=int8")
    found = forecast.costs(prepare(load(config, options)))
    rows = first(fedrank.run(config, *options, out=tmp_path / "run"))
    assert len(rows) == len(found)
    for row in rows:
        most = found[row["client"]]
        assert row["bytes_down"] == most.bytes_down
        assert row["bytes_up"] <= most.bytes_up  # less where a client returned fewer components than it might
        said = most.sent(row["bytes_up"])
        assert {key: row[key] for key in said.metrics} == said.metrics


@pytest.fixture(scope="module")
def trainer() -> local.Trainer:
    """Of a model of its own, with eager attention: torch does not count the other."""
    model = models.load(toy.settings(), toy.LABELS)
    model.base.set_attn_implementation("eager")
    return local.Trainer(model, toy.encoded("train"), toy.encoded("test"), 1e-3, 1, "cpu")


def counted(method: Any, state: State, plan: Plan, trainer: local.Trainer) -> tuple[float, int]:
    """The FLOPs of a round by this plan, as they are said and as torch counts them."""
    spec, settings, rows = trainer.model.spec, Local(batch_size=8), np.arange(48)
    device, fit = Device("c0", len(rows), rank=4), partial(trainer.fit, rows=rows)
    job = Job(plan, state.round + 1, 5, spec, state.adapter, (), {}, settings, device, 0, fit)
    with FlopCounterMode(display=False) as counter:
        assert len(list(method.train([job]))) == 1
    load = local.workload(rows, trainer.train.lengths, settings, partial(job.rng, "batches"))
    return sum(cost.flops(spec, state.adapter, plan, load)), counter.get_total_flops()


@pytest.mark.parametrize("name", toy.EVERY)
def test_a_method_s_training_takes_the_flops_that_are_said(name: str, trainer: local.Trainer) -> None:
    """Within 2 %. Two levels are counted as if each pass made both levels' gradients: more, by as much as they take."""
    method = methods.build({"name": name, **({"target_rank": 1} if name == "fedara" else {})})
    state = method.begin(trainer.model.spec, 5, 0)
    plan = method.plan(state, {"c0": Device("c0", 48, rank=4)}, 0)["c0"]
    assert plan is not None
    said, found = counted(method, state, plan, trainer)
    assert said == pytest.approx(found, rel=0.12 if plan.passes != (1.0, 1.0) else 0.02)


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


@pytest.mark.parametrize("head", ["train", "own"])
def test_a_round_s_numbers_are_the_ledger_s(head: str, config: Path, tmp_path: Path) -> None:
    options = (FLEET, f"adapter.head={head}")
    found = told(config, *options)
    run = fedrank.run(config, *options, out=tmp_path / "run")
    row, one = run.rounds[0], found["round"]
    for name in ("bytes_down", "bytes_up", "peak_memory_bytes"):
        assert one[name] == row[name]
    assert one["seconds"] == one["slowest_seconds"] == row["round_seconds"]
    assert one["joules"] == row["device_joules"]
    assert one["clients"] == row["clients_ok"]
    assert found["run"] == {name: 3 * one[name] for name in ("bytes_down", "bytes_up", "seconds", "joules")}
    assert found["run"]["bytes_up"] == run.summary["bytes_up"]  # fedavg's plans are the same in every round
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    devices = prepare(load(config, options)).devices
    for kind, said in kinds.items():
        mine = [r for r in first(run) if devices[r["client"]].kind == kind]
        assert said["clients"] == len(mine)
        assert said["seconds"] == pytest.approx(np.mean([r["device_seconds"] for r in mine]), rel=1e-12)
        assert said["joules"] == pytest.approx(np.mean([r["device_joules"] for r in mine]), rel=1e-12)
        assert said["bytes_up"] == mine[0]["bytes_up"]
        assert said["peak_memory_bytes"] == max(r["peak_memory_bytes"] for r in mine)
    assert sum(kind["clients"] for kind in kinds.values()) == 6


def test_a_part_of_the_fleet_is_expected_to_cost_its_share(config: Path) -> None:
    whole, part = told(config, FLEET), told(config, FLEET, "rounds.cohort=2")
    for name in ("bytes_down", "bytes_up", "joules", "clients"):
        assert part["round"][name] == pytest.approx(whole["round"][name] / 3)
    assert part["round"]["slowest_seconds"] == whole["round"]["slowest_seconds"]
    assert part["round"]["seconds"] < whole["round"]["seconds"]
    seconds = [c.seconds for c in forecast.costs(prepare(load(config, (FLEET,)))).values()]
    assert part["round"]["seconds"] == pytest.approx(np.mean([max(pair) for pair in combinations(seconds, 2)]))


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_the_expected_maximum_is_the_mean_over_all_subsets(size: int) -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    mean = np.mean([max(subset) for subset in combinations(values, size)])
    assert forecast.expected_maximum(values, size) == pytest.approx(mean, rel=1e-12)


def test_deadlines_and_memory(config: Path, tmp_path: Path) -> None:
    seconds = sorted(c.seconds for c in forecast.costs(prepare(load(config, (FLEET,)))).values())
    options = (FLEET, "rounds.count=1", f"rounds.deadline={seconds[3]!r}")
    found = told(config, *options)
    run = fedrank.run(config, *options, out=tmp_path / "run")
    row, one = run.rounds[0], found["round"]
    assert sum(kind["late"] for kind in found["kinds"]) == row["clients_failed"] == 2
    assert one["seconds"] == row["round_seconds"] == seconds[3]
    for ours, theirs in (("bytes_down", "bytes_down"), ("bytes_up", "bytes_up"), ("joules", "device_joules")):
        assert one[ours] == row[theirs]

    columns = "kind,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts,count"
    path = tmp_path / "devices.csv"
    path.write_text(columns + "\nsmall,10,0.0001,8,8,1,2,2\nlarge,10,1,8,8,1,2,4\n")
    found = told(config, "rounds.count=1", f"engine.fleet={{csv: {path}}}")
    assert {kind["kind"]: kind["too_small"] for kind in found["kinds"]} == {"small": 2, "large": 0}
    run = fedrank.run(config, "rounds.count=1", f"engine.fleet={{csv: {path}}}", out=tmp_path / "small")
    assert (run.rounds[0]["clients_ok"], run.rounds[0]["clients_failed"]) == (4, 2)
    assert found["round"]["joules"] == run.rounds[0]["device_joules"]
    assert found["round"]["seconds"] == run.rounds[0]["round_seconds"]


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


def test_nothing_is_written_or_trained(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedrank.training.local import Trainer

    monkeypatch.setattr(Trainer, "fit", None)
    monkeypatch.chdir(tmp_path)
    told(config)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(config: Path) -> None:
    found = CliRunner().invoke(cli.app, ["cost", str(config), "engine.fleet.devices={lap: 1}"])
    assert found.exit_code == 2
    assert "no device kind 'lap'" in found.stderr
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 µs"), (3e-5, "30 µs"), (0.0042, "4.2 ms"), (1.5, "1.5 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h"),
     (216000, "2.5 days"), (None, "–")],
)  # fmt: skip
def test_durations_for_people(seconds: float | None, text: str) -> None:
    assert views.duration(None if seconds is None else float(seconds)) == text


@pytest.mark.parametrize(("joules", "text"), [(0.0, "0 mJ"), (0.0123, "12 mJ"), (1.0, "1.0 J"), (44.2, "44 J"), (2470.0, "2.5 kJ"), (9e12, "9000 GJ")])  # fmt: skip
def test_energy_for_people(joules: float, text: str) -> None:
    assert views.energy(joules) == text
