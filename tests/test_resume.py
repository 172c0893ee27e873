"""A run that is killed anywhere and resumed ends as if it had never stopped: every file of its directory, to the bit."""

import contextlib
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import coverage
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fedrank
import toy
from fedrank import experiment, ledger, store
from fedrank.aggregation import average
from fedrank.cli import app
from fedrank.config import ConfigError, load
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import ClientId, Job, ModelSpec, Plan, State, Update, Updates
from fedrank.selection import everything
from fedrank.store import Private, Store, StoreError

TIMES = {"wall_seconds", "train_seconds", "evaluation_seconds", "seconds"}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="autograd with CUDA refuses to run in forked children"
)


@dataclass(frozen=True)
class Recalling:
    """Each client keeps B for itself, and remembers in private how far it has come; that moves what it sends."""

    step: float = 1e-2

    default_lr: ClassVar[float] = 3e-3

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return FedAvg().begin(spec, rounds, seed)

    def plan(self, state: State, cohort: Any, seed: int) -> dict[ClientId, Plan]:
        return {c: Plan(everything(state.adapter), up="eAh", down="eAh", own="B") for c in cohort}

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            update = job.fit(job)
            walked = job.private.get("walked", np.zeros(2)) + job.rng("walk").random(2)
            moved = {
                n: replace(b, A=b.A * np.float32(1 + self.step * walked.sum()))
                for n, b in update.adapter.blocks.items()
            }
            yield replace(update, adapter=replace(update.adapter, blocks=moved), private={"walked": walked})

    def merge(self, state: State, updates: Updates) -> State:
        return state.next(average(state.adapter, updates))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    toy.write(folder, train=toy.texts(48, 0), test=toy.texts(24, 1))
    return folder


def settings(texts: Path, kind: str = "fedara", rounds: int = 4, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "data": {"path": str(texts), "partition": {"alpha": 1.0}}, "clients": {"count": 4},
        "rounds": {"count": rounds, "cohort": 2, "evaluate_every": 2}, "adapter": {"rank": 4},
        "local": {"batch_size": 8, "max_length": 16},
    }  # fmt: skip
    if kind == "fedara":
        base["method"] = {"name": "fedara", "target_rank": 1, "warmup": 0.0, "settle": 0.0}
    elif kind == "recalling":
        base["adapter"]["head"] = "own"
    else:
        base["method"] = {"name": kind}
    return base | sections


METHODS: dict[str, Any] = {"recalling": Recalling()}


def held(run: Path) -> dict[str, Any]:
    """Everything in a run directory but the times: each file's bytes, the ledgers' rows, the summary."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if name.endswith("l") and path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        elif name == "summary.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMES | {"path"}}
        else:
            found[name] = path.read_bytes()
    return found


def equal(run: Path, undisturbed: Path) -> None:
    one, two = held(run), held(undisturbed)
    assert list(one) == list(two)  # nothing is left over
    assert [name for name in one if one[name] != two[name]] == []
    last = max((undisturbed / "states").iterdir()).name
    a, b = load_file(run / "states" / last), load_file(undisturbed / "states" / last)
    assert list(a) == list(b)
    assert all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


# ---- children that die


def child(work: Callable[[], object]) -> int:
    """Do the work in a child with all imports done already; the parent gets its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons doubt forks beside threads
        pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it is ignored
    faulthandler.dump_traceback_later(200, exit=True, file=2)  # one that hangs says where, before its test is given up
    status = 1
    if tracer := coverage.Coverage.current():
        tracer.stop()  # what it sees here is never saved, and a signal inside its lock would leave that taken
    try:
        work()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The child's exit code; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def play(path: Path, config: dict[str, Any], method: Any) -> None:
    if (path / "config.yaml").exists():
        fedrank.resume(path, method=method)
    else:
        fedrank.run(config, out=path, method=method)


def strike(owner: Any, name: str, when: Callable[..., bool], before: Callable[..., object] | None = None) -> None:
    """Die in the first call of `owner.name` with such arguments: after it, or after `before` in its place."""
    whole = getattr(owner, name)

    def struck(*args: Any, **more: Any) -> Any:
        dies = when(*args)
        result = before(*args) if dies and before else whole(*args, **more)
        if dies:
            die()
        return result

    setattr(owner, name, struck)


def half(path: Path, rows: Iterable[Any]) -> None:
    """A ledger's last line as a kill in the middle of a write leaves it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text[: len(text) - len(text.splitlines()[-1]) // 2])


def nothing(*args: Any) -> None: ...


POINTS: dict[str, Callable[[], None]] = {
    "before the config is there": lambda: strike(os, "replace", lambda a, b: Path(b).name == "config.yaml", nothing),
    "the config is there": lambda: strike(os, "replace", lambda a, b: Path(b).name == "config.yaml"),
    "a client's private state is written": lambda: strike(Private, "save", lambda self, client, round, *_: round == 3),
    "before a private state is renamed": lambda: strike(os, "replace", lambda a, b: Path(b).name == "0002.safetensors" and Path(b).parent.parent.name == "clients", nothing),
    "an update is spooled": lambda: strike(Store, "spool", lambda self, *_: any((self.path / "states").glob("0001*"))),
    "the clients' rows are written": lambda: strike(ledger, "append", lambda path, rows: path.name == "clients.jsonl" and rows[0]["round"] == 2),
    "in the middle of a client's row": lambda: strike(ledger, "append", lambda path, rows: path.name == "clients.jsonl" and rows[0]["round"] == 3, half),
    "in the middle of a round's row": lambda: strike(ledger, "append", lambda path, rows: path.name == "rounds.jsonl" and rows[0]["round"] == 3, half),
    "the round's row is written": lambda: strike(ledger, "append", lambda path, rows: path.name == "rounds.jsonl" and rows[0]["round"] == 1),
    "before the state is renamed": lambda: strike(os, "replace", lambda a, b: Path(b).parts[-2:] == ("states", "0003.safetensors"), nothing),
    "the state is renamed, old ones not yet removed": lambda: strike(os, "replace", lambda a, b: Path(b).parts[-2:] == ("states", "0004.safetensors")),
    "the state is saved": lambda: strike(Store, "save_state", lambda self, state, *_: state.round == 2),
    "the last state is saved": lambda: strike(Store, "save_state", lambda self, state, *_: state.round == 4),
    "before the summary is renamed": lambda: strike(os, "replace", lambda a, b: Path(b).name == "summary.json", nothing),
    "before the export is whole": lambda: strike(os, "replace", lambda a, b: Path(b).name == "adapter_config.json", nothing),
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The run of a kind and length that nothing ever stopped."""
    done: dict[tuple[str, int], Path] = {}

    def run(kind: str, rounds: int) -> Path:
        if (kind, rounds) not in done:
            path = tmp_path_factory.mktemp("undisturbed") / f"{kind}-{rounds}"
            fedrank.run(settings(texts, kind, rounds), out=path, method=METHODS.get(kind))
            done[kind, rounds] = path
        return done[kind, rounds]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point: str, texts: Path, tmp_path: Path, undisturbed: Callable[[str, int], Path]) -> None:
    kind = "fedara" if "export" in point or ("state is" in point and "private" not in point) else "recalling"
    path, config = tmp_path / "run", settings(texts, kind)

    def work() -> None:
        POINTS[point]()
        play(path, config, METHODS.get(kind))

    assert ended(child(work)) == -signal.SIGKILL
    assert not (path / "adapter" / "README.md").exists()
    play(path, config, METHODS.get(kind))
    equal(path, undisturbed(kind, 4))


@pytest.mark.slow
# Base updates, moments, capacities.
@pytest.mark.parametrize("kind", ["flora", "pf2lora", pytest.param("legend", marks=toy.EXHAUSTIVE)])
@pytest.mark.parametrize("point", [
    "a client's private state is written", "in the middle of a round's row", "before the state is renamed",
    "the state is renamed, old ones not yet removed",
])  # fmt: skip
def test_killed_with_more_than_an_adapter_to_keep(
    point: str, kind: str, texts: Path, tmp_path: Path, undisturbed: Callable[[str, int], Path]
) -> None:
    path, config = tmp_path / "run", settings(texts, kind)

    def work() -> None:
        POINTS[point]()
        play(path, config, None)

    assert ended(child(work)) == -signal.SIGKILL
    play(path, config, None)
    equal(path, undisturbed(kind, 4))


def test_killed_twice_between_private_state_and_commit(texts: Path, tmp_path: Path, undisturbed: Any) -> None:
    """The redone round starts from the version its plan names, though a newer one lies there."""
    path, config = tmp_path / "run", settings(texts, "recalling")

    def work() -> None:
        strike(ledger, "append", lambda path, rows: rows[0]["round"] == 4, nothing)
        play(path, config, METHODS["recalling"])

    for _ in range(2):
        assert ended(child(work)) == -signal.SIGKILL
        assert (path / "states" / "0003.safetensors").exists()
        assert list((path / "clients").glob("*/0004.safetensors"))
    play(path, config, METHODS["recalling"])
    equal(path, undisturbed("recalling", 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_killed_at_random(kind: str, texts: Path, tmp_path: Path, undisturbed: Any) -> None:
    """Ten kills and more, each at a drawn moment of what is left; run after run until there were so many."""
    draw, kills, runs, config = random.Random(kind), 0, 0, settings(texts, kind, 12)
    whole = undisturbed(kind, 12)
    started = time.perf_counter()
    fedrank.run(config, out=tmp_path / "timed", method=METHODS.get(kind))
    seconds = time.perf_counter() - started
    while kills < 11:
        path, runs = tmp_path / f"{runs}", runs + 1
        for _ in range(40):
            pid = child(lambda path=path: play(path, config, METHODS.get(kind)))  # type: ignore[misc]
            time.sleep(draw.uniform(0.1, 0.7) * seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if (status := ended(pid)) == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
        equal(path, whole)
    assert kills > 10


# ---- on purpose


def test_resume_of_a_finished_run_changes_nothing(texts: Path, undisturbed: Any) -> None:
    run = undisturbed("fedara", 4)
    before, events = held(run), []
    found = fedrank.resume(run, watch=lambda event: events.append(event["event"]))
    assert events == ["resume", "end"]
    assert held(run) == before
    assert found.state.round == 4


def test_extended_equals_longer_from_the_start(texts: Path, tmp_path: Path) -> None:
    short = settings(texts, rounds=3, method={"name": "fedavg"})
    fedrank.run(short, out=tmp_path / "extended")
    found = fedrank.resume(tmp_path / "extended", "rounds.count=+2")
    fedrank.run(settings(texts, rounds=5, method={"name": "fedavg"}), out=tmp_path / "whole")
    one, two = held(tmp_path / "extended"), held(tmp_path / "whole")
    assert found.config.rounds.count == 5
    for name in ("states/0003.safetensors", "states/0004.safetensors", "states/0005.safetensors", "config.yaml"):
        assert one[name] == two[name]
    assert one["clients.jsonl"] == two["clients.jsonl"]
    assert one["adapter/adapter_model.safetensors"] == two["adapter/adapter_model.safetensors"]
    assert found.summary["rounds"] == 5


@pytest.mark.parametrize("how", ["rounds.evaluate_every=2", "generation.when=end"])
def test_the_last_round_has_the_evaluation_of_a_last(how: str, texts: Path, tmp_path: Path) -> None:
    """A run that was stopped before may end early only where that has been."""
    pairs = [json.dumps({"prompt": f"{at}:", "completion": "ab"}) for at in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    written = [
        "task=generate",
        "model.name=tiny-decoder",
        f"data.path={tmp_path / 'pairs.jsonl'}",
        "adapter.targets=all",
        "data.partition.kind=iid",
    ]
    more = written if how.startswith("generation") else []
    events = experiment.start(
        load(settings(texts), [*more, how, "rounds.count=4", "rounds.personal=0"]), tmp_path / "run"
    )
    for event in events:
        if event["event"] == "round" and event["round"] == 3:
            break
    events.close()
    with pytest.raises(
        ConfigError, match=r"rounds\.count=3: that round was played as one that others follow.*; 4 or more"
    ):
        fedrank.resume(tmp_path / "run", "rounds.count=3")
    assert fedrank.resume(tmp_path / "run").summary["rounds"] == 4
    if not more:  # what was the last round of a run that was to go on has its evaluation
        events = experiment.go_on(tmp_path / "run", ["rounds.count=+4"])
        next(events)
        events.close()
        assert load(tmp_path / "run" / "config.yaml").rounds.count == 8
        assert fedrank.resume(tmp_path / "run", "rounds.count=4").summary["rounds"] == 4


def test_extended_by_count_and_refused_to_shrink(texts: Path, tmp_path: Path) -> None:
    fedrank.run(settings(texts, rounds=2), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"rounds.count=1: .* has played 2 rounds already"):
        fedrank.resume(tmp_path / "run", "rounds.count=1")
    assert fedrank.resume(tmp_path / "run", "rounds.count=3", "rounds.cohort=1").rounds[-1]["clients_ok"] == 1


@pytest.mark.parametrize("field", ["torch", "threads", "cpu"])
def test_other_numerics_are_refused_by_name(field: str, texts: Path, tmp_path: Path, undisturbed: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "data.json"):
        (run / name).write_bytes((undisturbed("fedara", 4) / name).read_bytes())
    (run / "states").mkdir()
    for number in (0, 4):
        state, numerics = Store.open(undisturbed("fedara", 4)).state(number)
        Store(run).save_state(state, numerics | {field: "other"})
    with pytest.raises(StoreError, match=f"numerics differ here: {field}: 'other' then, "):
        fedrank.resume(run)


def test_other_data_are_refused(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes((texts / f"{split}.jsonl").read_bytes())
    fedrank.run(settings(folder, rounds=1), out=tmp_path / "run")
    with (folder / "train.jsonl").open("a") as file:
        file.write('\n{"text": "abab", "label": 0}')
    with pytest.raises(StoreError, match=r"data and model differ here: rows: .*48.* then, .*49.* now; hash: "):
        fedrank.resume(tmp_path / "run", "rounds.count=+1")


@pytest.mark.parametrize("override", ["local.lr=1", "seed=3", "wire.dtype=int8", "method.target_rank=2"])
def test_what_cannot_change_is_refused(override: str, undisturbed: Any) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"'{key}' cannot be changed in a run that has begun; these can: rounds"):
        fedrank.resume(undisturbed("fedara", 4), override)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no run directory: it has no config\.yaml"):
        fedrank.resume(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_one_process_at_a_time(undisturbed: Any) -> None:
    run = undisturbed("fedara", 4)
    with Store.open(run).locked(), pytest.raises(StoreError, match="is in use by another process"):
        fedrank.resume(run)
    fedrank.resume(run)  # the lock went with its holder


def test_a_method_of_ones_own_is_not_resumed_as_another(texts: Path, undisturbed: Any) -> None:
    run = undisturbed("recalling", 4)
    with pytest.raises(ValueError, match=r"a method of one's own, Recalling.step=0.01.; go on from Python"):
        fedrank.resume(run)
    with pytest.raises(StoreError, match=r"its method differ here: object: 'Recalling\(step=0.01\)' then, "):
        fedrank.resume(run, method=Recalling(step=1.0))
    before = held(run)
    fedrank.resume(run, method=Recalling())
    assert held(run) == before


def test_states_kept(undisturbed: Any) -> None:
    kept = sorted(int(path.stem) for path in (undisturbed("recalling", 12) / "states").iterdir())
    assert kept == [0, 10, 11, 12]


def test_private_state_kept(undisturbed: Any) -> None:
    """At most the version of a client's last merged round, and the one before it, of which nothing asks any more."""
    run = undisturbed("recalling", 12)
    seen = Store.open(run).state()[0].seen
    for client in seen:
        versions = sorted(int(path.stem) for path in (run / "clients" / client).iterdir())
        assert versions[-1] == seen[client]
        assert len(versions) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_stopped_by_a_signal(what: signal.Signals, texts: Path, tmp_path: Path, undisturbed: Any) -> None:
    """130, a word on how to go on; and going on gives the same bits."""
    path, config, said = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "said"
    config.write_text(json.dumps(settings(texts, rounds=12)))

    def work() -> None:
        os.nice(5)  # who stops it is not to be slower than the run
        sys.stdout = sys.stderr = said.open("w")
        app(["run", str(config), "--out", str(path), "-o", "plain"])

    pid = child(work)
    for _ in range(6000):
        if (path / "states" / "0002.safetensors").exists():
            break
        time.sleep(0.01)
    assert (path / "states" / "0002.safetensors").exists()
    os.kill(pid, what)
    assert ended(pid) == 130
    assert f"every finished round is saved. Go on with: fedrank resume {path}" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert not (path / "summary.json").exists()
    fedrank.resume(path)
    equal(path, undisturbed("fedara", 12))


@pytest.mark.slow
def test_a_forecast_stops_by_sigterm_where_sigint_is_ignored(texts: Path, tmp_path: Path) -> None:
    """As in the background of a script; and nothing of it stays on disk."""
    config, said = tmp_path / "config.yaml", tmp_path / "said"
    config.write_text(json.dumps(settings(texts, rounds=10**6)))
    (tmp_path / "scratch").mkdir()

    work = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from fedrank.cli import app; app()"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    with said.open("w") as out, subprocess.Popen(
        [sys.executable, "-c", work, "cost", str(config)], env=environment, stdout=out, stderr=subprocess.STDOUT
    ) as found:  # fmt: skip
        for _ in range(6000):
            if any((tmp_path / "scratch").glob("fedrank-*/spool/*")) or found.poll() is not None:
                break
            time.sleep(0.01)
        found.send_signal(signal.SIGTERM)
        try:
            assert found.wait(60) == 130
        finally:
            found.kill()
    assert said.read_text().strip() == "stopped."
    assert not list((tmp_path / "scratch").glob("fedrank-*"))


def test_stopped_before_anything_began(texts: Path, tmp_path: Path) -> None:
    path, config, said = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "said"
    config.write_text(json.dumps(settings(texts)))

    def work() -> None:
        sys.stdout = sys.stderr = said.open("w")
        Store.create = lambda path: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign, assignment]
        app(["run", str(config), "--out", str(path), "-o", "quiet"])

    assert ended(child(work)) == 130
    assert said.read_text().strip() == "stopped; nothing had begun."
    assert not path.exists()


def test_a_damaged_state_is_named(texts: Path, tmp_path: Path, undisturbed: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((undisturbed("fedara", 4) / "config.yaml").read_bytes())
    store.write(run / "states" / "0004.safetensors", b"not a state")
    with pytest.raises(StoreError, match=r"0004.safetensors is damaged: "):
        fedrank.resume(run)
