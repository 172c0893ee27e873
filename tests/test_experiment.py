"""The Python API: a run as a notebook starts it, what its directory holds, and that its ledger tells the truth."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

import fedrank
import toy
from fedrank import experiment, ledger
from fedrank.config import ConfigError, load
from fedrank.engines.local import Local
from fedrank.frame import sizes
from fedrank.methods.fedavg import FedAvg
from fedrank.products import Increment
from fedrank.protocol import ClientId, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.store import StoreError
from fedrank.training.partition import PartitionError

ROUND = {
    "round", "accuracy", "loss", "personal_accuracy", "bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down",
    "clients_ok", "clients_failed", "components", "modules_alive", "lowest_active_block", "wall_seconds", "train_seconds", "evaluation_seconds",
    "round_seconds", "clock_seconds", "waiting_seconds", "device_joules", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for split, count, seed in (("train", 64, 0), ("test", 48, 1)):
        rows = toy.texts(count, seed)
        lines = [
            json.dumps({"text": t, "label": int(y), "client": f"author {at % 3}"})
            for at, (t, y) in enumerate(zip(rows.text, rows.label, strict=True))
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def settings(texts: Path, *overrides: str) -> dict[str, Any]:
    base: dict[str, Any] = {
        "data": {"path": str(texts), "partition": {"kind": "iid"}}, "clients": {"count": 4},
        "rounds": {"count": 2, "cohort": 2, "evaluate_every": 1}, "adapter": {"rank": 4},
        "local": {"batch_size": 8, "max_length": 16},
    }  # fmt: skip
    return load(base, overrides).model_dump(mode="json")


def rows(run: fedrank.Run, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def played(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[fedrank.Run, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    config = settings(texts, "method={name: fedara, target_rank: 1, warmup: 0.0, settle: 0.0}", "rounds.count=3")
    run = fedrank.run(config, out=tmp_path_factory.mktemp("played") / "run", watch=events.append)
    return run, events


# ---- what a run leaves


def test_a_run_in_few_lines(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = fedrank.run({"data": {"path": str(texts)}}, "rounds.count=1", "clients.count=3", "local.max_length=16")
    assert run.path == Path("runs/fedavg-001")
    assert run.state.round == 1
    assert 0 <= run.summary["accuracy"] <= 1
    assert fedrank.run(run.config, out="again").summary["accuracy"] == run.summary["accuracy"]


def test_a_run_says_by_which_code_it_was_played(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another version went on with names both; where the first is not known, nothing is claimed."""
    run = fedrank.run(settings(texts, "rounds.count=1", "rounds.personal=0"), out=tmp_path / "run")
    first = experiment.code()
    assert run.summary["code"] == first
    assert fedrank.resume(run.path, "rounds.count=+1").summary["code"] == first
    monkeypatch.setattr(experiment, "code", lambda: "another")
    assert fedrank.resume(run.path, "rounds.count=+1").summary["code"] == f"{first}+another"
    facts = json.loads((run.path / "data.json").read_text())
    (run.path / "data.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "code"}))
    assert fedrank.resume(run.path, "rounds.count=+1").summary["code"] is None


def test_the_directory_is_complete(played: Any) -> None:
    run, _ = played
    names = {p.name for p in run.path.iterdir()}
    assert names == {
        "config.yaml", "data.json", "rounds.jsonl", "clients.jsonl", "ranks.jsonl", "personal.jsonl", "states",
        "clients", "spool", "summary.json", "adapter", ".lock",
    }  # fmt: skip
    assert list((run.path / "spool").iterdir()) == []
    adapter = {p.name for p in (run.path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "provenance.json"} <= adapter
    assert load(yaml.safe_load((run.path / "config.yaml").read_text())) == run.config


def test_the_ledgers_hold_the_named_fields(played: Any) -> None:
    run, _ = played
    assert [row["round"] for row in run.rounds] == [1, 2, 3]
    for row in run.rounds:
        assert row.keys() >= ROUND
        assert (row["clients_ok"], row["clients_failed"], row["lowest_active_block"]) == (2, 0, 0)
    components = [row["components"] for row in run.rounds]
    assert components == sorted(components, reverse=True)
    assert components[-1] == run.state.adapter.components == 18
    assert run.rounds[-1]["modules_alive"] == len(run.state.adapter.blocks)
    for row in rows(run, "clients"):
        assert row.keys() >= {
            "round", "client", "ok", "loss", "examples", "seconds", "bytes_up", "bytes_down", "device_seconds",
            "waiting_seconds", "device_joules", "peak_memory_bytes",
        }  # fmt: skip


def test_the_ranks_of_every_round_and_module(played: Any, texts: Path, tmp_path: Path) -> None:
    run, _ = played
    found = rows(run, "ranks")
    assert [(row["round"], row["client"]) for row in found] == [(1, None), (2, None), (3, None)]
    for row, played_row in zip(found, run.rounds, strict=True):
        assert sum(row["ranks"].values()) == played_row["components"]
    last = run.state.adapter.blocks
    assert found[-1]["ranks"] == {name: block.rank for name, block in last.items()}
    devices = "engine.fleet={devices: {phone: 1, laptop: 1}, ranks: {phone: 1, laptop: 4}}"
    mixed = fedrank.run(settings(texts, "method.name=fed_plora", "adapter.rank=4", devices), out=tmp_path / "run")
    differ = [row for row in rows(mixed, "ranks") if row["client"] is not None]
    assert differ
    assert {rank for row in differ for rank in row["ranks"].values()} == {1}  # who trains all four has no row


def test_what_a_client_selects_to_send_are_its_ranks(texts: Path, tmp_path: Path) -> None:
    devices = "engine.fleet={devices: {phone: 1}, ranks: {phone: 1}}"
    run = fedrank.run(settings(texts, "method.name=lora_a2", "adapter.rank=4", devices), out=tmp_path / "run")
    sent = [row["ranks"] for row in rows(run, "ranks") if row["client"] is not None]
    modules = len(run.state.adapter.blocks)
    assert [sum(ranks.values()) for ranks in sent] == [modules] * len(sent)
    assert any(set(ranks.values()) != {1} for ranks in sent)  # chosen over all modules


def test_every_client_has_its_own_scores_in_the_end(played: Any) -> None:
    run, _ = played
    found = rows(run, "personal")
    assert len(found) == run.summary["personal_clients"] > 0
    accuracies = sorted(row["accuracy"] for row in found)
    assert run.summary["personal_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert run.summary["personal_worst_decile"] == accuracies[0]  # of three clients, one is the worst tenth
    assert all(row.keys() >= {"client", "rows", "loss", "majority"} for row in found)


def test_the_summary_adds_the_ledger_up(played: Any) -> None:
    run, events = played
    summary = run.summary
    for name in ("bytes_up", "bytes_down", "adapter_bytes_up", "head_bytes_down", "clients_ok"):
        assert summary[name] == sum(row[name] for row in run.rounds)
        if name != "clients_ok":
            assert summary[name] == sum(row[name] for row in rows(run, "clients"))
    assert summary["accuracy"] == run.rounds[-1]["accuracy"]
    assert (summary["components_at_start"], summary["components"]) == (72, 18)
    assert (summary["method"], summary["rounds"], summary["majority"]) == ("fedara", 3, 0.25)
    assert events[-1] == {"event": "end", **summary}


def test_events_come_in_order(played: Any) -> None:
    _, events = played
    assert [e["event"] for e in events] == ["start", *["cohort", "client", "client", "round"] * 3, "end"]
    assert [e["round"] for e in events[1:-1]] == [t for t in (1, 2, 3) for _ in range(4)]
    assert [e["client"] for e in events if e["event"] == "client"] == [
        c for e in events if e["event"] == "cohort" for c in e["clients"]
    ]


def test_the_ledger_counts_frames(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down: dict[str, list[Any]] = {}
    up: dict[str, list[Any]] = {}
    whole = Local.exchange

    def spy(self: Local, requests: Iterable[Any], seconds: float | None) -> Iterator[Any]:
        def seen() -> Iterator[Any]:
            for name, build in requests:
                frame = build()
                down.setdefault(name, []).append(sizes(frame))
                yield name, lambda frame=frame: frame

        for name, reply in whole(self, seen(), seconds):
            up.setdefault(name, []).append(sizes(reply))
            yield name, reply

    monkeypatch.setattr(Local, "exchange", spy)
    run = fedrank.run(settings(texts, "rounds.count=1", "rounds.cohort=4"), out=tmp_path / "run")
    for row in rows(run, "clients"):
        for way, frames in (("down", down), ("up", up)):
            train = frames[row["client"]][0]
            found = tuple(row[f"{part}bytes_{way}"] for part in ("", "adapter_", "head_"))
            assert found == (train.frame, train.adapter, train.head)
    scored = sum(f[1].frame for frames in (down, up) for f in frames.values())
    assert run.rounds[0]["evaluation_bytes"] == scored  # evaluation frames are no part of bytes_up and bytes_down
    assert run.rounds[0]["bytes_up"] == sum(f[0].frame for f in up.values())


def test_personal_accuracy_is_the_plain_mean_over_clients_with_enough_rows(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedrank.training.scoring import Scorer

    scored: list[tuple[int, float]] = []
    whole = Scorer.evaluate

    def spy(self: Any, adapter: Any, encoded: Any, rows: Any, base: Any) -> dict[str, float]:
        found = whole(self, adapter, encoded, rows, base)
        if len(rows) < len(encoded):
            scored.append((len(rows), found["accuracy"]))
        return found

    monkeypatch.setattr(Scorer, "evaluate", spy)
    options = ("data.partition={kind: dirichlet, alpha: 0.2}", "rounds.count=1", "clients.count=6", "rounds.cohort=6")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run")
    facts = json.loads((run.path / "data.json").read_text())["partition"]["clients"]
    enough = [c["test_rows"] for c in facts if c["test_rows"] >= 5]
    assert min(c["test_rows"] for c in facts) < 5
    last = scored[-len(enough) :]
    assert [size for size, _ in last] == enough
    assert run.summary["personal_accuracy"] == pytest.approx(np.mean([accuracy for _, accuracy in last]))
    assert run.rounds[0]["personal_clients"] == len(enough)
    # A client's majority class, of its own test rows, whose label counts follow its train rows.
    assert run.summary["personal_majority"] > run.summary["majority"] == 0.25


# ---- a method of one's own


@dataclass(frozen=True)
class Half:
    """FedAvg in which the server goes half of the way."""

    way: float = 0.5

    default_lr: ClassVar[float] = 3e-3

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return FedAvg().begin(spec, rounds, seed)

    def plan(self, state: State, cohort: Any, seed: int) -> dict[ClientId, Plan]:
        return FedAvg().plan(state, cohort, seed)

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        return FedAvg().train(jobs)

    def merge(self, state: State, updates: Updates) -> State:
        there = FedAvg().merge(state, updates).adapter.dense
        dense = {n: t + np.float32(self.way) * (there[n] - t) for n, t in state.adapter.dense.items()}
        return state.next(type(state.adapter)(state.adapter.blocks, state.adapter.scale, dense))


def test_a_method_object(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts), out=tmp_path / "run", method=Half())
    assert run.summary["method"] == "Half"
    assert toy.same(
        run.state.adapter, fedrank.run(settings(texts), out=tmp_path / "again", method=Half()).state.adapter
    )
    assert fedrank.resume(run.path, "rounds.count=+1", method=Half()).state.round == 3
    whole = fedrank.run(settings(texts, "rounds.count=3"), out=tmp_path / "whole", method=Half())
    assert toy.equal(fedrank.Run(run.path).state, whole.state)


# ---- settings that change how a run goes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f64", "f16", "bf16", "int8"])
def test_every_wire_learns(dtype: str, texts: Path, tmp_path: Path) -> None:
    options = (f"wire.dtype={dtype}", "rounds={count: 5, cohort: 4, evaluate_every: 5}", "local.lr=0.02", "local.epochs=2",
               "model.pooling=mean")  # fmt: skip
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run")
    losses = [row["train_loss"] for row in run.rounds]
    assert losses[-1] < losses[0] - 0.05
    assert run.summary["accuracy"] > 0.4
    assert run.summary["clients_failed"] == 0
    width = {"f64": 8, "f16": 2, "bf16": 2}.get(dtype)
    if width:
        numbers = sum(b.B.size + b.A.size for b in run.state.adapter.blocks.values())
        assert run.rounds[0]["adapter_bytes_up"] == 4 * width * numbers


def test_failures_are_counted_and_the_run_goes_on(texts: Path, tmp_path: Path) -> None:
    options = ("engine.failure_rate=0.5", "rounds.count=4", "rounds.cohort=3", "rounds.evaluate_every=4")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run")
    for row in run.rounds:
        assert row["clients_ok"] + row["clients_failed"] == 3
    assert 0 < run.summary["clients_failed"] < 12
    failed = [row for row in rows(run, "clients") if not row["ok"]]
    assert {row["error"] for row in failed} == {"no answer"}
    assert all(row["bytes_down"] > 0 and "bytes_up" not in row for row in failed)  # it was sent all the same


def test_a_client_that_fails_once_may_succeed_later(texts: Path, tmp_path: Path) -> None:
    options = ("engine.failure_rate=0.5", "rounds.count=6", "rounds.cohort=4", "rounds.evaluate_every=6")
    found = rows(fedrank.run(settings(texts, *options), out=tmp_path / "run"), "clients")
    outcomes = {row["client"]: {r["ok"] for r in found if r["client"] == row["client"]} for row in found}
    assert sum(len(seen) == 2 for seen in outcomes.values()) >= 2


def test_overrides_of_a_config_object(texts: Path, tmp_path: Path) -> None:
    config = load(settings(texts))
    assert len(fedrank.run(config, "rounds.count=3", out=tmp_path / "run").rounds) == 3


def test_a_run_can_move(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with a relative path, resumed from elsewhere, its data moved; an extension takes the old end away."""
    shutil.copytree(texts, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    run = fedrank.run(settings(texts, "data.path=data"), out="run")
    assert fedrank.resume("run").state.round == 2
    before = experiment.prepare(run.config).run_id
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    seen: list[bool] = []
    extended = fedrank.resume(
        tmp_path / "run", "rounds.count=+1", f"data.path={tmp_path / 'moved'}",
        watch=lambda event: seen.append((tmp_path / "run" / "summary.json").exists()),
    )  # fmt: skip
    assert extended.state.round == 3
    assert seen[0] is False
    assert run.path == Path("run")
    monkeypatch.chdir(tmp_path)
    # Its frames, and what is drawn for them, stay the same.
    assert experiment.prepare(run.config).run_id == before
    fedrank.resume("run", "rounds.count=+1", "data.path=moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert fedrank.resume(tmp_path / "run", "rounds.count=+1").state.round == 5


def test_a_model_can_move(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.saved("bert", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run = fedrank.run(settings(texts, "model.name=model"), out="run")
    assert run.config.model.name == str(tmp_path / "model")
    before = experiment.prepare(run.config).run_id
    (tmp_path / "model").rename(tmp_path / "moved")
    monkeypatch.chdir(texts)
    extended = fedrank.resume(tmp_path / "run", "rounds.count=+1", f"model.name={tmp_path / 'moved'}")
    assert extended.state.round == 3
    assert extended.config.model.name == str(tmp_path / "moved")
    assert experiment.prepare(extended.config).run_id == before


def test_the_resolved_config_names_every_hyper_parameter(played: Any) -> None:
    """So that another version's defaults do not change a resumed run."""
    assert played[0].config.method == {
        "name": "fedara", "target_rank": 1, "warmup": 0.0, "settle": 0.0, "score": "adalora", "arbitration": "budget",
        "threshold": 0.5, "smoothing": 0.85,
    }  # fmt: skip


def test_a_merge_that_breaks_is_not_saved(texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FedAvg):
        def merge(self, state: State, updates: Updates) -> State:
            merged = super().merge(state, updates)
            name, block = next(iter(merged.adapter.blocks.items()))
            assert block.B is not None
            wrong = replace(block, B=block.B * np.float32(np.nan if state.round else 1))
            return replace(merged, adapter=replace(merged.adapter, blocks={**merged.adapter.blocks, name: wrong}))

    run = fedrank.run(settings(texts), out=tmp_path / "run", method=Broken())
    name = next(iter(run.state.adapter.blocks))
    assert f"round 2: Broken.merge made NaN or infinity in ['{name}']" in caplog.text
    assert run.state.round == len(run.rounds) > 1
    assert [row["clients_ok"] > 0 for row in run.rounds] == [True, *[False] * (len(run.rounds) - 1)]
    assert set(run.state.seen.values()) == {1}
    assert not run.state.adapter.odd()


def test_more_tokens_than_the_model_reads(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"local.max_length=300: tiny-encoder reads at most \d+ tokens"):
        fedrank.run(settings(texts, "local.max_length=300"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_there_is_no_global_accuracy_where_parts_are_private(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "adapter.head=own"), out=tmp_path / "run")
    assert all(row["accuracy"] is None and row["personal_accuracy"] is not None for row in run.rounds)
    assert run.summary["evaluation_bytes"] > sum(row["evaluation_bytes"] for row in run.rounds)


def test_more_clients_than_there_are_never_answer(texts: Path, tmp_path: Path) -> None:
    few = settings(texts, "rounds.cohort=10", "rounds.minimum=8")
    with pytest.raises(ConfigError, match=r"rounds\.minimum=8: a round asks 4 clients at most, so it is never reached"):
        fedrank.run(few, out=tmp_path / "run")


def test_a_round_without_updates_is_recorded_and_skipped(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "engine.failure_rate=1.0"), out=tmp_path / "run")
    assert [(row["clients_ok"], row["clients_failed"], row["train_loss"]) for row in run.rounds] == [(0, 2, None)] * 2
    store = experiment.Store.open(run.path)
    assert toy.same(store.state(2)[0].adapter, store.state(0)[0].adapter)
    assert run.summary["personal_accuracy"] is None
    assert run.summary["accuracy"] is not None  # the server's own test set needs no client


def test_validation_rows_come_from_train(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "data.split=validation", "rounds.count=1"), out=tmp_path / "run")
    assert json.loads((run.path / "data.json").read_text())["rows"] == {"train": 58, "test": 6}
    few = fedrank.run(settings(texts, "data.split=validation", "data.test_limit=4"), out=tmp_path / "few")
    assert json.loads((few.path / "data.json").read_text())["rows"] == {"train": 58, "test": 4}
    natural = settings(texts, "data.split=validation", "data.partition.kind=natural")
    assert len(experiment.prepare(load(natural)).trainer.test) == 12
    assert len(experiment.prepare(load(natural, ["data.test_limit=5"])).trainer.test) == 5
    lines = [json.dumps({"text": f"t{at}", "label": at % 2, "client": f"c{at // 3}"}) for at in range(18)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        PartitionError, match=r"data\.split=validation with partition natural: no client has so many rows"
    ):
        experiment.prepare(load(natural, [f"data.path={tmp_path}"]))


def test_what_a_config_was_not_told_stays_by_default(texts: Path) -> None:
    """An override may have a default of its own."""
    given = load({"data": {"path": str(texts)}, "clients": {"count": 2}, "local": {"max_length": 16}})
    assert given.server.lr == 1.0
    run = fedrank.run(
        given, "server.optimizer=fedadam", "rounds.count=1", "rounds.personal=0", out=texts.parent / "adam"
    )
    assert run.config.server.lr == 0.01


def test_natural_clients(texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, "data.partition.kind=natural", "rounds.cohort=9"), out=tmp_path / "run")
    facts = json.loads((run.path / "data.json").read_text())["partition"]
    assert [c["origin"] for c in facts["clients"]] == ["author 0", "author 1", "author 2"]
    assert facts["test_from"] == "train"
    assert run.rounds[0]["clients_ok"] == 3  # as many as there are, not clients.count, nor the cohort's size
    assert run.summary["personal_accuracy"] is None  # a fifth of 21 rows is under 5


def test_redraws_are_told(texts: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    options = ("data.partition={kind: dirichlet, alpha: 0.3, min_rows: 8}", "rounds.count=1")
    run = fedrank.run(settings(texts, *options), out=tmp_path / "run", watch=events.append)
    facts = json.loads((run.path / "data.json").read_text())["partition"]
    assert events[0]["redraws"] == facts["redraws"] > 0
    assert min(c["train_rows"] for c in facts["clients"]) >= 8


def test_generate(tmp_path: Path) -> None:
    for split, count in (("train", 16), ("test", 6)):
        lines = (json.dumps({"prompt": f"say {at}: ", "completion": "ab" * (1 + at % 3)}) for at in range(count))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    options = (
        "task=generate",
        "model.name=tiny-decoder",
        "local.lr=0.02",
        "rounds={count: 3, cohort: 4, evaluate_every: 1}",
    )
    run = fedrank.run(settings(tmp_path, *options), out=tmp_path / "run")
    losses = [row["loss"] for row in run.rounds]
    assert losses[-1] < losses[0]
    assert run.summary["majority"] is None
    assert run.state.adapter.dense == {}
    own = fedrank.run(settings(tmp_path, *options, "adapter.head=own", "rounds.count=1"), out=tmp_path / "own")
    assert own.summary["accuracy"] is not None  # there is no head that could be a client's own


# ---- imports


@dataclass(frozen=True)
class Odd(FedAvg):
    """Its clients count by something that no one knows."""

    weights: ClassVar[str] = "age"


def play(config: dict[str, Any], path: Path, folder: Path) -> list[dict[str, Any]]:
    return list(experiment.start(load(config), path, imported=folder))


@pytest.mark.parametrize("method", ["fedavg", "fedara"])
def test_an_import_starts_from_the_adapters_function(method: str, played: Any, texts: Path, tmp_path: Path) -> None:
    run, _ = played
    config = settings(texts, f"method.name={method}", "rounds.count=1")
    play(config, tmp_path / "run", run.path / "adapter")
    begun = experiment.Store.open(tmp_path / "run").state(0)[0].adapter
    source = run.state.adapter
    for name, delta in begun.delta().items():
        wanted = source.delta().get(name, np.zeros_like(delta))
        np.testing.assert_allclose(delta, wanted, atol=1e-6 * max(1.0, float(np.abs(wanted).max())))
    assert all(np.array_equal(begun.dense[name], tensor) for name, tensor in source.dense.items())


def test_floras_import_goes_into_the_base(played: Any, texts: Path, tmp_path: Path) -> None:
    """Its clients keep a B of zero, whatever their rank: the function goes on from the import's, to round-off."""
    run, _ = played
    config = settings(texts, "method.name=flora", "rounds={count: 2, exactness: true}")
    play(config, tmp_path / "run", run.path / "adapter")
    store = experiment.Store.open(tmp_path / "run")
    (begun, _), (last, _) = store.state(0), store.state()
    source = run.state.adapter.delta()
    found = {name: block.delta(begun.adapter.scale) for name, block in begun.base_updates[0].blocks.items()}
    found |= begun.base_updates[0].dense
    for name, wanted in source.items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-6 * max(1.0, float(np.abs(wanted).max())))
    assert not any(block.B.any() for state in (begun, last) for block in state.adapter.blocks.values())
    for row in ledger.read(store.path / "rounds.jsonl"):
        assert row["start_error"] == 0
        assert row["agg_fullmodel"] < 1e-5 * Increment().add(run.state.adapter).norm()


def test_what_stays_with_the_clients_starts_from_the_import_too(
    played: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that never travels is the imported one on every client, also after a resume."""
    run, _ = played
    heads: list[Any] = []

    def train(self: FedAvg, jobs: Iterable[Job]) -> Iterator[Update]:
        for job in jobs:
            heads.append(job.adapter.dense)
            yield job.fit(job)

    monkeypatch.setattr(FedAvg, "train", train)
    play(settings(texts, "adapter.head=frozen", "rounds.count=1"), tmp_path / "run", run.path / "adapter")
    fedrank.resume(tmp_path / "run", "rounds.count=+1")
    assert len(heads) == 4
    for head in heads:
        assert all(np.array_equal(head[name], tensor) for name, tensor in run.state.adapter.dense.items())


@pytest.mark.parametrize(
    ("method", "says"),
    [("fedavg", None), ("pf2lora", "the common adapter alone"), ("per_fedavg_lora", "the common start; each client")],
)
def test_what_is_exported_says_what_it_is_not(method: str, says: str | None, texts: Path, tmp_path: Path) -> None:
    run = fedrank.run(settings(texts, f"method.name={method}", "rounds.count=1"), out=tmp_path / "run")
    text = (run.path / "adapter" / "README.md").read_text()
    assert ("This is the common" in text) == (says is not None)
    assert (says or "") in text


def test_an_unknown_weight_is_found_before_anything_is_trained(texts: Path, tmp_path: Path) -> None:
    config = settings(texts, "rounds.exactness=true")
    with pytest.raises(
        ConfigError, match=r"rounds.exactness: Odd weighs clients by 'age'; known are examples, uniform"
    ):
        fedrank.run(config, out=tmp_path / "run", method=Odd())
    assert not (tmp_path / "run").exists()


def test_an_import_that_does_not_fit_leaves_nothing(played: Any, texts: Path, tmp_path: Path) -> None:
    run, _ = played
    with pytest.raises(StoreError, match=r"set adapter.rank=\d or more|modules that this run does not adapt"):
        play(settings(texts, "adapter.targets=[query]"), tmp_path / "run", run.path / "adapter")
    assert not (tmp_path / "run").exists()
