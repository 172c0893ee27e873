"""What users of federated frameworks trip over, and must not here: for each trap, the tests that show it is not there.

| trap | shown by |
|---|---|
| a server restart forgets the run | test_flower: a_resumed_run_is_the_same; test_superlink: what_is_killed_in_turn_loses_no_round |
| a model is rebuilt for every message | here |
| a runtime install shadows the installed package | here |
| a node cannot reconnect after a restart, with TLS and authentication | test_superlink: what_is_killed_in_turn_loses_no_round |
| one node's failure ends the run | test_flower: whatever_a_site_does_the_run_goes_on, a_site_that_sends_garbage_ends_no_round |
| a blanket timeout hides a hang | test_flower: who_is_awaited_is_named, late_sites_are_told_apart_from_those_that_are_gone |
| mixed ranks are summed by broadcasting | here; test_aggregation: what_a_client_without_a_component_counts_as; test_wire: tensors_that_do_not_belong_into_an_answer |
| personal state is lost with the node | here; test_flower: a_fresh_process_for_every_frame_changes_no_bit |
| two runs differ, as replies are summed in the order of arrival | here; test_flower: on_flower_a_run_is_the_local_one, whose grid answers the last asked first; test_aggregation: any_order_of_arrival_gives_the_same_bits |
"""

import os
import signal
import subprocess
import sys
import weakref
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedrank
import test_flower
from federation import answered, free_port, local, state, until, write_rows
from federation import rows as drawn
from fedrank import central, config, experiment, remote, sites
from fedrank.deploy import kit
from fedrank.frame import pack, unpack
from fedrank.methods.hetlora import HetLoRA
from fedrank.protocol import State, Updates
from fedrank.store import Store
from test_flower import grid_of, ledger, play, settings, setup_of

a_task, files = test_flower.a_task, test_flower.files  # fixtures


# ---- a model is rebuilt for every message


def test_a_model_is_loaded_once(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By each site for a whole run of many messages, also where the server starts anew in between."""
    loaded, opened = Counter[str](), sites.open_session

    def counted(file: sites.SiteFile, setup: Any) -> sites.Session:
        loaded[file.client] += 1
        return opened(file, setup)

    monkeypatch.setattr(sites, "open_session", counted)
    grid = grid_of(files)
    for event in experiment.start(config.load(settings()), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "client" and event["round"] == 2:
            break
    list(experiment.go_on(tmp_path / "run", by=partial(central.prepare, grid=grid)))
    assert len(grid.sent) > 4 * len(files)
    assert loaded == dict.fromkeys(files, 1)


def test_the_model_of_another_run_goes_before_the_next_is_loaded(
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, opened, alive = sites.Desk(sites.read(files["north"])), sites.open_session, list[bool]()
    setup = setup_of(settings())
    desk.answer(central.hello.write_setup(setup))
    (session,) = desk.sessions.values()
    before = weakref.ref(session.site.fit.func.__self__)  # the trainer, which has the model
    del session

    def noted(file: sites.SiteFile, setup: Any) -> sites.Session:
        alive.append(before() is not None)
        return opened(file, setup)

    monkeypatch.setattr(sites, "open_session", noted)
    desk.answer(central.hello.write_setup(replace(setup, run="f" * 16)))
    assert alive == [False]


def test_what_asks_a_worker_loads_no_torch() -> None:
    """Flower starts a process for every message; where a worker has the model, that has nothing to import it for."""
    code = "import sys, fedrank.apps; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- a runtime install shadows the installed package


def test_nothing_is_installed_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every SuperLink that fedrank starts is told so; a SuperNode installs only where it is asked to, and is not."""
    (tmp_path / "my.yaml").write_text("data: {labels: [a, b]}\nrounds: {minimum: 1}\n")
    kit.init(tmp_path / "fed", str(tmp_path / "my.yaml"), ["localhost"], None, ["north"], False)
    started = set()
    for path in (path for path in (tmp_path / "fed").rglob("*") if path.is_file() and path.suffix != ".key"):
        text = path.read_text().replace("\\\n", "")
        assert "allow-runtime" not in text
        for line in text.splitlines():
            if line.startswith("flower-superlink "):
                assert "--disable-runtime-dependency-installation" in line.split()
                started.add(path.name)
    assert started == {"server.sh"}
    told = tmp_path / "told"
    (tmp_path / "superlink").write_text(f'#!/bin/sh\necho "$@" >{told}\n')
    (tmp_path / "superlink").chmod(0o755)
    monkeypatch.setattr(remote, "tool", lambda name: str(tmp_path / "superlink"))
    with (
        pytest.raises(remote.RemoteError, match="does not come up"),
        remote._superlink(tmp_path / "home", tmp_path),
    ):
        pass
    assert "--disable-runtime-dependency-installation" in told.read_text().split()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_an_app_s_own_fedrank_shadows_none(tmp_path: Path) -> None:
    """Flower's own command plays the app of `fedrank deploy init`, whose server was asked to install another fedrank."""
    shadow = tmp_path / "fedrank-99-py3-none-any.whl"
    seen = tmp_path / "seen"
    with zipfile.ZipFile(shadow, "w") as wheel:
        info = "fedrank-99.dist-info"
        wheel.writestr("fedrank/__init__.py", f"open({str(seen)!r}, 'w').close()\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fedrank\nVersion: 99\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in wheel.namelist()))
    raw = {key: value for key, value in settings().items() if key != "engine"}
    raw["rounds"] |= {"count": 1, "cohort": 1, "minimum": 1}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(raw))
    ports = [free_port(), free_port()]
    fed = tmp_path / "fed"
    kit.init(fed, str(tmp_path / "my.yaml"), ["localhost"], ports[0], ["north"], False)
    write_rows(fed / "sites" / "north" / "rows.jsonl", drawn(0, 40))
    project = fed / "server" / "app" / "pyproject.toml"
    text = project.read_text()
    assert "dependencies = []" in text
    project.write_text(text.replace("dependencies = []", f'dependencies = ["fedrank @ {shadow.as_uri()}"]'))
    environment = {
        **os.environ, "FEDRANK_BIN": str(Path(sys.executable).parent), "FEDRANK_PORT": str(ports[1]), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(fedrank.__file__).parents[1]),
    }  # fmt: skip
    started = []

    def begin(script: Path) -> Path:
        with (log := script.with_suffix(".log")).open("wb") as out:
            started.append(subprocess.Popen(["bash", str(script)], stdout=out, stderr=out, env=environment))
        return log

    out = fed / "server" / "runs" / "first"
    try:
        log = begin(fed / "server" / "server.sh")
        until(lambda: "server.sh: ready" in log.read_text(), 180, "the server")
        begin(fed / "sites" / "north" / "client.sh")
        flwr = environment | remote.environment(fed / "server" / "flower")
        done = subprocess.run(
            [remote.tool("flwr"), "run", "app", "fedrank"], cwd=fed / "server", env=flwr, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        until(lambda: (out / "summary.json").exists() or seen.exists(), 400, "the run")
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait(120)
    assert not seen.exists()
    assert answered(out) == {1: {"north"}}
    assert fedrank.Run(out).summary["version"] == fedrank.__version__


# ---- mixed ranks are summed by broadcasting


def test_each_component_is_the_mean_of_who_holds_it(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sites of ranks 4, 2 and 1 in one round."""
    ranks, sent, merge = {"north": 4, "south": 2, "west": 1}, dict[str, Any](), HetLoRA.merge
    for name, rank in ranks.items():
        files[name].write_text(files[name].read_text() + f"hardware: {{rank: {rank}}}\n")

    def noted(self: HetLoRA, before: State, updates: Updates) -> State:
        sent.update({client: update.adapter for client, update in updates})
        return merge(self, before, updates)

    monkeypatch.setattr(HetLoRA, "merge", noted)
    raw = settings(method={"name": "hetlora", "form": "contributor"}, rounds={"count": 1})
    play(raw, tmp_path / "run", grid_of(files))
    assert {client: max(block.rank for block in adapter.blocks.values()) for client, adapter in sent.items()} == ranks
    for name, block in Store.open(tmp_path / "run").state()[0].adapter.blocks.items():
        for at in range(4):
            holders = [sent[client].blocks[name] for client, rank in ranks.items() if rank > at]
            np.testing.assert_allclose(block.A[at], np.mean([one.A[at] for one in holders], 0), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(
                block.B[:, at], np.mean([one.B[:, at] for one in holders], 0), rtol=1e-5, atol=1e-7
            )


def test_an_answer_of_another_rank_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Of 1 where 4 was asked for, which NumPy would add to the others' without an error."""
    grid = grid_of(files)
    south = grid.answers[2]
    assert south is not None

    def cut(frame: bytes) -> bytes:
        meta, tensors = unpack(south(frame))
        if meta["kind"] == "update":
            tensors = {
                name: array if name.startswith("h.") else array[: array.size // 4] for name, array in tensors.items()
            }
        return pack(meta, {name: array.copy() for name, array in tensors.items()})

    grid.answers[2] = cut
    raw = settings(rounds={"count": 1, "minimum": 1, "personal": 0})
    play(raw, tmp_path / "run", grid)
    found = {row["client"]: row.get("error") for row in ledger(tmp_path / "run", "clients")}
    assert found["north"] is None
    assert "asked for was" in found["south"]
    local(files.values(), raw, tmp_path / "local", answered(tmp_path / "run"))
    assert state(tmp_path / "run", 1) == state(tmp_path / "local", 1)


# ---- personal state is lost with the node


@pytest.mark.slow
def test_personal_state_outlives_its_node(files: dict[str, Path], tmp_path: Path) -> None:
    """A SuperNode with a new key and a worker that knows nothing, beside the store of before: no bit changes."""
    raw = settings(method={"name": "pf2lora"}, rounds={"count": 3})
    play(raw, tmp_path / "undisturbed", grid_of(files))
    for path in files.values():
        path.write_text(path.read_text().replace("store: store", "store: again"))
    grid = grid_of(files)
    for event in experiment.start(config.load(raw), tmp_path / "run", by=partial(central.prepare, grid=grid)):
        if event["event"] == "round" and event["round"] < 3:
            old = max(node for node in grid.answers)
            del grid.answers[old]
            grid.answers[old + 1] = sites.Desk(sites.read(files["west"])).answer
    assert [row["ok"] for row in ledger(tmp_path / "run", "clients")] == [True] * 9
    assert state(tmp_path / "run", 3) == state(tmp_path / "undisturbed", 3)


# ---- two runs differ, as replies are summed in the order of arrival


def test_no_figure_hangs_on_the_order_of_arrival(files: dict[str, Path], tmp_path: Path) -> None:
    """Nor do the ledgers', of scores whose sum in float64 does."""
    scores = {1: 0.1, 2: 0.2, 3: 0.3}

    def scored(answer: Any, score: float, frame: bytes) -> bytes:
        meta, tensors = unpack(answer(frame))
        if "metrics" in meta:
            meta["metrics"] |= dict.fromkeys(meta["metrics"].keys() & {"loss", "accuracy", "majority"}, score)
        return pack(meta, {name: array.copy() for name, array in tensors.items()})

    class InTurn(test_flower.Grid):
        turn = 0  # which of those that are left answers next

        def pull_messages(self, numbers: Any) -> Any:
            (number,) = numbers
            here = list(self.replies)
            if here and here[self.turn] == number:
                arrived.append(number)
                return super().pull_messages(numbers)
            return []

    raw, orders = settings(rounds={"count": 1}), dict[str, list[str]]()
    for name, turn in (("forward", 0), ("backward", -1)):
        arrived = orders[name] = list[str]()
        grid = InTurn({n: partial(scored, answer, scores[n]) for n, answer in grid_of(files).answers.items()})
        grid.turn = turn
        play(raw, tmp_path / name, grid)
    assert sorted(orders["forward"]) == sorted(orders["backward"])
    assert orders["forward"] != orders["backward"]
    assert state(tmp_path / "forward", 1) == state(tmp_path / "backward", 1)
    assert ledger(tmp_path / "forward", "rounds") == ledger(tmp_path / "backward", "rounds")
    timed = dict.fromkeys(("path", "wall_seconds", "train_seconds"))
    one, other = (fedrank.Run(tmp_path / name).summary | timed for name in ("forward", "backward"))
    assert one == other
