"""The command line: what it prints, what it leaves, its exit codes; a user's mistake is one line and no traceback."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import fedrank
import toy
from fedrank import cli, units, views
from fedrank.store import Store

COMMANDS = ("run", "resume", "cost", "profile", "import", "export", "verify", "show", "methods")
Fed = Callable[..., Any]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def fed() -> Fed:
    """Run the command in this process."""

    def call(*args: Any) -> Any:
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    return call


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "texts").mkdir()
    toy.write(folder / "texts", train=toy.texts(32, 0), test=toy.texts(16, 0))
    settings = {
        "data": {"path": str(folder / "texts"), "partition": {"kind": "iid"}}, "clients": {"count": 3},
        "rounds": {"count": 2, "cohort": 2, "evaluate_every": 1}, "adapter": {"rank": 2, "targets": ["query"]},
        "local": {"max_length": 16},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("played") / "run"
    fedrank.run(config, out=path)
    return path


def mistake(result: Any, *words: str) -> None:
    """Exit code 2, said in a line on stderr, without a traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr


# ---- as a process


def process(*args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedrank.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **more)


@pytest.mark.slow
def test_a_process_runs_resumes_and_shows(config: Path, tmp_path: Path) -> None:
    first = process("run", config, "rounds.count=1", "--out", "run", "-o", "json", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    events = [json.loads(line) for line in first.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "cohort", "client", "client", "round", "end"]
    second = process("resume", "run", "rounds.count=+1", "-o", "plain", cwd=tmp_path)
    assert (second.returncode, second.stderr) == (0, "")
    assert "on from round 1" in second.stdout
    assert "round 2  accuracy" in second.stdout
    assert fedrank.Run(tmp_path / "run").state.round == 2


def test_a_process_says_a_mistake_in_one_line(config: Path, tmp_path: Path) -> None:
    found = process("run", config, "local.lrr=1", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.strip() == f"error: {config}: unknown key 'local.lrr'; did you mean 'local.lr'?"
    assert list(tmp_path.iterdir()) == []


def test_listing_the_methods_needs_no_torch() -> None:
    code = "import sys; from fedrank.cli import app; app(['methods'], standalone_mode=False); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert "fedara" in found.stdout


@pytest.mark.parametrize("command", ["run", "cost", "profile"])
def test_a_mistyped_key_waits_for_no_torch(command: str) -> None:
    code = (
        "import atexit, sys; from fedrank.cli import app\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv[1:] = ['{command}', 'quickstart', 'rounds.cuont=3']; app()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stdout) == (2, "False\n")
    assert "did you mean 'rounds.count'?" in found.stderr


# ---- help


def test_help(fed: Fed) -> None:
    found = fed("--help")
    assert found.exit_code == 0
    for word in (*COMMANDS, "Exit codes: 0 done", "130 stopped"):
        assert word in found.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "run",
            (
                "A YAML file, or a preset: quickstart, centralized",
                "local.lr=0.01",
                "--out",
                "an event per line",
                "--baselines",
            ),
        ),
        ("resume", ("rounds.count=+20", "A run directory", "--output")),
        ("import", ("PEFT LoRA adapter's folder", "--out")),
        ("export", ("--to", "--round", "by default RUN/adapter")),
        ("show", ("A run directory",)),
        ("methods", ("--json", "hyper-parameters")),
    ],
)
def test_help_of_a_command(command: str, words: tuple[str, ...], fed: Fed) -> None:
    found = fed(command, "--help")
    assert found.exit_code == 0
    for word in words:
        assert word in found.output


def test_version(fed: Fed) -> None:
    assert fed("--version").output.strip() == fedrank.__version__


def test_no_command(fed: Fed) -> None:
    assert "Usage" in fed().output


# ---- run


def test_plain(config: Path, fed: Fed, tmp_path: Path) -> None:
    found = fed("run", config, "--out", tmp_path / "run", "--output", "plain")
    assert (found.exit_code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert lines[0].startswith("fedavg on texts: 32 train and 16 test rows, 4 classes (sha256 ")
    assert lines[1] == f"run directory: {tmp_path / 'run'}"
    assert [line.split("  ")[0] for line in lines[2:4]] == ["round 1", "round 2"]
    for word in ("accuracy, global test set", "majority class", "adapter bytes up / down", "modules alive"):
        assert word in found.stdout


def test_live_without_a_terminal_is_plain(config: Path, fed: Fed, tmp_path: Path) -> None:
    found = fed("run", config, "--out", tmp_path / "run")
    assert found.exit_code == 0
    assert "round 2  accuracy" in found.stdout
    assert "\x1b" not in found.stdout


def test_json(config: Path, fed: Fed, tmp_path: Path) -> None:
    found = fed("run", config, "--out", tmp_path / "run", "-o", "json")
    events = [json.loads(line) for line in found.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", *["cohort", "client", "client", "round"] * 2, "end"]
    assert events[-1]["path"] == str(tmp_path / "run")
    assert events[-1]["accuracy"] == events[-2]["accuracy"]


def test_quiet(config: Path, fed: Fed, tmp_path: Path) -> None:
    found = fed("run", config, "--out", tmp_path / "run", "-o", "quiet")
    assert (found.exit_code, found.output) == (0, "")


def test_the_next_free_directory(config: Path, fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "fedavg-001").mkdir(parents=True)
    assert fed("run", config, "rounds.count=1", "-o", "quiet").exit_code == 0
    assert (tmp_path / "runs" / "fedavg-002" / "summary.json").exists()


def test_live_on_a_terminal(config: Path, fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(views, "Console", lambda: Console(file=screen, force_terminal=True, width=160))
    options = ("engine.failure_rate=0.5", "rounds.cohort=3", "seed=2")
    found = fed("run", config, *options, "--out", tmp_path / "[run]", "-o", "live")
    assert found.exit_code == 0, found.output
    shown = screen.getvalue()
    for word in ("rounds", "clients", "━", "components", "accuracy, global test set", "[run]"):
        assert word in shown
    assert "failed: no answer" in shown
    screen.truncate(0)
    assert fed("resume", tmp_path / "[run]", "rounds.count=+1").exit_code == 0
    assert "on from round 2" in screen.getvalue()


def test_baselines(config: Path, fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedrank.training import probe

    monkeypatch.setattr(probe, "baselines", lambda config: {"linear probe": 1.0, "TF-IDF": 0.5})
    found = fed("run", config, "rounds.count=1", "--out", tmp_path / "a", "-o", "plain", "--baselines")
    assert found.exit_code == 0, found.output
    assert "The federated run is below: linear probe, TF-IDF." in found.stdout
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["baselines"]["TF-IDF"] == 0.5
    assert fed("resume", tmp_path / "a", "rounds.count=+1", "-o", "quiet").exit_code == 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["baselines"]["TF-IDF"] == 0.5
    found = fed("run", config, "rounds.count=1", "--out", tmp_path / "b", "-o", "json", "--baselines")
    assert json.loads(found.stdout.splitlines()[-1]) == {"event": "baselines", "linear probe": 1.0, "TF-IDF": 0.5}


# ---- what goes wrong


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("local.lrr=1", ("unknown key 'local.lrr'; did you mean 'local.lr'?",)),
        ("round.count=3", ("unknown key", "did you mean 'rounds")),
        ("rounds.count=many", ("rounds.count: ", "got 'many'")),
        ("rounds.count=0", ("rounds.count: ", "greater than 0", "got 0")),
        ("wire.dtype=int16", ("wire.dtype: ", "got 'int16'; did you mean 'int8'?")),
        ("data.partition.kind=dirichlett", ("did you mean 'dirichlet'?",)),
        ("rounds", ("'rounds' is not of the form key=value, such as local.lr=0.01",)),
        ("method.name=fedarra", ("no method is called 'fedarra'; did you mean 'fedara'?", "known: ")),
        ("method={name: fedara, target_rnk: 1}", ("method.target_rnk", "did you mean 'target_rank'?")),
        ("method={name: fedara, target_rank: 9}", ("method.target_rank=9 is above adapter.rank=2",)),
        ("method={name: fedara, score: best}", ("method.score: ", "got 'best'")),
        ("data.path=nowhere", ("nowhere: no such file or folder",)),
        ("model.name=./nowhere", ("model.name: no folder './nowhere'",)),
        ("model.name=tiny-encodr", ("model.name=tiny-encodr: ", "did you mean 'tiny-encoder'?")),
        ("adapter.targets=[quary]", ("adapter.targets: ", "did you mean 'query'?")),
        ("data.partition={kind: pathological, classes_per_client: 9}", ("pathological: ", "classes_per_client")),
        ("data.columns.text=sentence", ("train.jsonl:1", "no column 'sentence'", "set data.columns.text")),
    ],
)
def test_mistakes_in_a_config(override: str, words: tuple[str, ...], config: Path, fed: Fed, tmp_path: Path) -> None:
    mistake(fed("run", config, override, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_no_such_config(config: Path, fed: Fed) -> None:
    mistake(fed("run", config.with_name("smal.yaml")), "no config file or preset", f"did you mean '{config}'?")
    mistake(fed("run", "quikstart"), "did you mean 'quickstart'?")


def test_a_config_that_is_no_config(fed: Fed, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    mistake(fed("run", tmp_path / "bad.yaml"), "not YAML")
    (tmp_path / "bad.yaml").write_text("- a")
    mistake(fed("run", tmp_path / "bad.yaml"), "a config is a mapping of sections, this is list")


def test_a_directory_that_is_taken(config: Path, fed: Fed, run: Path, tmp_path: Path) -> None:
    mistake(fed("run", config, "--out", run), f"or go on with: fedrank resume {run}")
    (tmp_path / "letter.txt").write_text("mine")
    found = fed("run", config, "--out", tmp_path)
    mistake(found, "is not an empty folder; choose another --out")
    assert "resume" not in found.stderr
    mistake(fed("run", config, "--out", tmp_path / "letter.txt"), "is not an empty folder")
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_start_that_was_cut_short_is_started_again(config: Path, fed: Fed, tmp_path: Path) -> None:
    for name in ("states", "clients", "spool"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("config.yaml.new", "data.json", "drawn.safetensors"):
        (tmp_path / "run" / name).write_text("half")
    assert fed("run", config, "--out", tmp_path / "run", "-o", "quiet").exit_code == 0


def test_no_client_answers(config: Path, fed: Fed, tmp_path: Path) -> None:
    found = fed("run", config, "engine.failure_rate=1", "--out", tmp_path / "run", "-o", "quiet")
    assert found.exit_code == 1
    assert f"no client's update was merged in any round; see {tmp_path / 'run'}/clients.jsonl" in found.stderr


def test_a_full_disk_is_no_mistake_of_the_user(
    config: Path, fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "spool", full)
    found = fed("run", config, "--out", tmp_path / "run", "-o", "quiet")
    assert found.exit_code == 1
    assert "No space left on device; every finished round is saved. Go on with: fedrank resume" in found.stderr


def test_an_unknown_option(fed: Fed) -> None:
    found = fed("run", "quickstart", "--outt", "x")
    assert found.exit_code == 2
    assert "--outt" in found.output


def test_resume_of_nothing(fed: Fed, tmp_path: Path) -> None:
    mistake(fed("resume", tmp_path / "nowhere"), "is no run directory: it has no config.yaml")


def test_resume_with_another_key(fed: Fed, run: Path) -> None:
    mistake(fed("resume", run, "local.lr=1"), "'local.lr' cannot be changed in a run that has begun")
    mistake(fed("resume", run, "rounds.cuont=3"), "unknown key 'rounds.cuont'; did you mean 'rounds.count'?")


def test_stopped_by_hand(config: Path, fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedrank.server import Server

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "_merge", stop)
    found = fed("run", config, "--out", tmp_path / "[run]", "-o", "plain")
    assert found.exit_code == 130
    assert f"every finished round is saved. Go on with: fedrank resume {tmp_path / '[run]'}" in found.stderr


# ---- show, export, import, methods


def test_show(fed: Fed, run: Path, tmp_path: Path) -> None:
    found = fed("show", run)
    assert found.exit_code == 0
    assert "fedavg, 2 rounds" in found.stdout
    assert len([line for line in found.stdout.splitlines() if line.strip().startswith(("1 ", "2 "))]) == 2
    mistake(fed("show", tmp_path / "nowhere"), "is no run directory")


def test_show_an_unfinished_run(fed: Fed, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = fedrank.run(config, "rounds.count=1", out=path)
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("  count: 1\n", "  count: 5\n"))
    assert run.config.rounds.count == 5  # as a run that was being extended leaves it
    for _ in range(2):
        assert f"not finished: round 1 of 5; fedrank resume {path}" in fed("show", path).stdout
        (path / "summary.json").unlink(missing_ok=True)


def test_methods(fed: Fed) -> None:
    found = fed("methods")
    assert found.exit_code == 0
    assert "target_rank=3" in found.stdout
    text = " ".join(found.stdout.split())
    assert (
        "ffa_lora FFA-LoRA: freeze the random A, learn and average only B clients differ in data; exact start and "
        in text
    )
    assert "exact start and aggregation; one global model; a_rate=1.0" in text
    listed = {m["name"]: m for m in json.loads(fed("methods", "--json").stdout)}
    assert listed["fedara"]["hyper_parameters"]["settle"] == 0.3
    assert listed["hetlora"] | {"summary": "", "travels": ""} == {
        "name": "hetlora", "summary": "", "paper": "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
        "year": 2024, "url": "https://arxiv.org/abs/2401.06432", "differs": ["rank", "data"], "travels": "",
        "exact_start": False, "exact_aggregation": False, "personal": False, "averages": True, "default_lr": 3e-3,
        "hyper_parameters": {"form": "full", "gamma": 0.99, "penalty": 1e-3, "min_rank": 1},
    }  # fmt: skip
    for m in listed.values():
        assert m["summary"]
        assert m["paper"]
        assert m["travels"]
        assert m["default_lr"] > 0


def test_export(fed: Fed, run: Path, tmp_path: Path) -> None:
    found = fed("export", run, "--to", tmp_path / "adapter", "--round", 1)
    assert found.output.strip() == str(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    first = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert first != (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert fed("export", run).output.strip() == str(run / "adapter")
    assert fed("export", run, "--merged").output.strip().endswith(str(run / "model"))
    assert fed("verify", run / "model").output.strip() == f"{run / 'model'}: as it was exported"
    mistake(fed("export", run, "--round", 7), "holds no state of round 7; it has: 0, 1, 2")
    mistake(fed("export", tmp_path), "is no run directory")
    mistake(fed("export", run, "--client", "0"), "no part of the adapter is a client's own; export it without a client")


@pytest.mark.parametrize("settings", [("method={name: fedsa_lora}",), ("adapter.head=own",)])
def test_where_clients_keep_parts_one_clients_adapter_is_exported(
    settings: tuple[str, ...], fed: Fed, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"
    done = fed("run", config, "rounds.count=1", *settings, "--out", path, "-o", "quiet")
    assert done.exit_code == 0, done.output
    assert "no adapter is exported: each client keeps" in caplog.text
    assert not (path / "adapter").exists()
    mistake(fed("export", path), "to itself, so there is no one function to export; name a client (--client)")
    one, two = Store(path).state()[0].seen
    (away,) = {"0", "1", "2"} - {one, two}
    assert fed("export", path, "--client", one).output.strip() == str(path / f"adapter-{one}")
    assert fed("export", path, "--client", two, "--to", tmp_path / "two").exit_code == 0
    files = [
        {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        for folder in (path / f"adapter-{one}", tmp_path / "two")
    ]
    assert files[0].keys() == files[1].keys()
    assert files[0] != files[1]
    mistake(fed("export", path, "--client", away), f"client '{away}' has trained in no round")
    (path / "clients" / one / "0001.safetensors").unlink()  # as on a server whose clients are elsewhere
    mistake(fed("export", path, "--client", one), "holds no version of round 1 of client")


def test_import(fed: Fed, run: Path, config: Path, tmp_path: Path) -> None:
    found = fed("import", run / "adapter", config, "rounds.count=1", "--out", tmp_path / "run", "-o", "plain")
    assert found.exit_code == 0, found.output
    assert fed("resume", tmp_path / "run", "rounds.count=+1", "-o", "quiet").exit_code == 0
    mistake(fed("import", tmp_path, config), "is no PEFT adapter")
    mistake(
        fed("import", run / "adapter", config, "adapter.rank=1", "--out", tmp_path / "b"), "set adapter.rank=2 or more"
    )
    mistake(
        fed("import", run / "adapter", config, "adapter.targets=[key]", "--out", tmp_path / "b"), "see adapter.targets"
    )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e6, "1.5 MB"), (2.5e12, "2500.0 GB")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert units.size(count) == text


# ---- profile


@pytest.mark.parametrize("workers", [1, 2])
def test_profile_says_where_the_time_goes(fed, config, tmp_path, workers):
    """Every second of it once, and every span in a file that a trace viewer opens; in one process, whatever a run takes."""
    trace = tmp_path / "trace.json"
    result = fed("profile", config, f"engine.workers={workers}", "--rounds", "3", "--trace", trace, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert {"reading", "data", "forward", "backward", "optimizer", "wire", "aggregation", "evaluation"} <= found[
        "seconds"
    ].keys()
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"])
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert (found["rounds"], found["clients"], found["workers"]) == (3, 6, workers)
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aggregation") == 3
    assert names.count("backward") == names.count("optimizer") >= 6
    words = fed("profile", config, "--trace", trace).stdout
    assert "the method's merge" in words
    assert "2 rounds of 2 clients" in words
    assert trace.name in words


def test_profile_of_a_config_with_a_mistake(fed, config, tmp_path):
    result = fed("profile", config, "local.epoch=2", "--trace", tmp_path / "trace.json")
    assert result.exit_code == 2
    assert "did you mean 'local.epochs'?" in result.stderr
    assert not (tmp_path / "trace.json").exists()
