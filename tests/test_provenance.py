"""What an export tells of its run, and how that is checked: the manifest, the card, all clients, private runs."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import fedrank
from fedrank import cli, experiment, ledger
from fedrank import config as settings
from fedrank.export import export, export_clients, obstacle, read_peft, verify
from fedrank.store import Store, StoreError

HOSTILE = "x\n---\n# <b>*a*</b> [l](http://e.vil) | `c` www.e.vil"  # as a class name and the name of a file


def rows(path: Path, labels: tuple[str, str] = ("red", "green")) -> Path:
    lines = [{"text": f"{word} {i}", "label": label} for i in range(120) for word, label in zip(("red", "green"), labels, strict=True)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def config(data: Path, **sections: Any) -> dict[str, Any]:
    return {
        "data": {"path": str(data), "partition": {"kind": "iid"}}, "model": {"name": "tiny-encoder"},
        "clients": {"count": 4}, "rounds": {"count": 2, "cohort": 2, "evaluate_every": 2},
        "local": {"max_length": 12}, "adapter": {"rank": 2, "targets": ["query", "value"]}, **sections,
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("played")


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    given = config(
        rows(place / "rows.jsonl"), method={"name": "fedara", "target_rank": 1, "warmup": 0.0, "settle": 0.5}
    )
    return fedrank.run(given, out=place / "run").path


@pytest.fixture(scope="module")
def personal(place: Path) -> Path:
    """Two of four clients have trained."""
    given = config(rows(place / "rows.jsonl"), method={"name": "fedsa_lora"}, rounds={"count": 1, "cohort": 2})
    return fedrank.run(given, out=place / "personal").path


@pytest.fixture
def fed() -> Callable[..., Any]:
    return lambda *args: CliRunner().invoke(cli.app, [str(arg) for arg in args])


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "provenance.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the manifest


def test_a_run_s_adapter_says_where_it_is_from(run: Path) -> None:
    found, facts = manifest(run / "adapter"), json.loads((run / "data.json").read_text())
    played, summary = ledger.read(run / "rounds.jsonl"), json.loads((run / "summary.json").read_text())
    state = (run / "states" / "0002.safetensors").read_bytes()
    assert (found["kind"], found["fedrank"], found["client"]) == ("adapter", fedrank.__version__, None)
    assert found["run"]["state_sha256"] == hashlib.sha256(state).hexdigest()
    assert (found["run"]["round"], found["run"]["rounds"], found["run"]["seed"]) == (2, 2, 0)
    assert found["run"]["numerics"] == Store(run).state()[1]
    assert found["data"]["sha256"] == facts["hash"]
    assert found["data"]["rows"] == facts["rows"]
    assert found["data"]["name"] == "rows.jsonl"
    assert found["labels"] == ["green", "red"]
    assert found["model"]["fingerprint"] == facts["model"]["fingerprint"]
    assert found["method"]["reconstructed"]
    assert found["config"]["method"]["target_rank"] == 1
    assert found["bytes"]["round"]["bytes_up"] == played[-1]["bytes_up"]
    assert found["bytes"]["all_rounds"]["adapter_bytes_down"] == summary["adapter_bytes_down"]
    for name in ("accuracy", "loss", "personal_accuracy", "personal_worst_decile"):
        assert found["scores"][name] == summary[name]
    assert found["privacy"] is None
    assert found["adapter"]["components"] == read_peft(run / "adapter").components
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents(run / "adapter").items()}
    del files["provenance.json"]
    assert found["files"] == files


def test_nothing_of_it_is_a_place_on_this_machine(run: Path, place: Path, tmp_path: Path) -> None:
    for folder in (export(run, tmp_path / "a"), export(run, tmp_path / "m", merged=True)):
        for name, data in contents(folder).items():
            assert str(place).encode() not in data, name


def test_a_round_of_a_run_that_is_not_finished(place: Path, tmp_path: Path) -> None:
    """It was not evaluated, so there are no scores; the round is said."""
    given = config(rows(tmp_path / "rows.jsonl"), rounds={"count": 3, "cohort": 2, "evaluate_every": 3})
    events = experiment.start(settings.load(given), tmp_path / "run")
    while next(events)["event"] != "round":
        pass
    events.close()
    first, begun = export(tmp_path / "run", tmp_path / "first"), export(tmp_path / "run", tmp_path / "begun", round=0)
    found = manifest(first)
    assert (found["run"]["round"], found["run"]["rounds"], found["scores"]) == (1, 3, None)
    assert found["bytes"]["round"] == found["bytes"]["all_rounds"]
    card = (first / "README.md").read_text()
    assert "| rounds | 1, of 3 that are planned |" in card
    assert "None: this round was not evaluated." in card
    assert manifest(begun)["bytes"] == {"round": dict.fromkeys(found["bytes"]["round"]), "all_rounds": dict.fromkeys(found["bytes"]["round"], 0)}  # fmt: skip
    fedrank.resume(tmp_path / "run")
    assert manifest(tmp_path / "run" / "adapter")["scores"]["accuracy"] is not None


def test_the_same_run_has_the_same_bytes_wherever_and_whenever(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    assert contents(export(tmp_path / "moved", tmp_path / "a")) == contents(run / "adapter")
    one, other = export(run, tmp_path / "m", merged=True), export(tmp_path / "moved", tmp_path / "n", merged=True)
    assert contents(one) == contents(other)


@pytest.mark.parametrize("private", [False, True])
def test_a_run_from_an_imported_adapter_says_so(private: bool, run: Path, place: Path, tmp_path: Path) -> None:
    """Resumed, it still does."""
    given = config(
        rows(place / "rows.jsonl"), rounds={"count": 1, "cohort": 2, "personal": 0}, method={"name": "ffa_lora"}
    )
    if private:
        pytest.importorskip("dp_accounting")
        given["privacy"] = {"kind": "central", "clip": 0.5, "noise": 1.0, "delta": 1e-2}
    for _ in experiment.start(settings.load(given), tmp_path / "run", imported=run / "adapter"):
        pass
    fedrank.resume(tmp_path / "run", "rounds.count=2")
    found, card = manifest(tmp_path / "run" / "adapter"), (tmp_path / "run" / "adapter" / "README.md").read_text()
    sha256 = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert found["run"]["imported"] == {"sha256": sha256, "base": "tiny-encoder"}
    assert card.count(f"started from an imported adapter of a base named tiny-encoder, sha256 {sha256}.") == 1 + private
    assert ("Epsilon says nothing of the rows on which that adapter" in card.split("## Privacy")[1]) == private
    assert manifest(run / "adapter")["run"]["imported"] is None


def test_how_many_clients_there_were_is_what_the_partition_made(place: Path, tmp_path: Path) -> None:
    """A natural partition has as many as the data say, whatever clients.count says."""
    lines = [
        {"text": f"{word} {i}", "label": word, "client": f"c{i % 3}"} for i in range(60) for word in ("red", "green")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    given = config(tmp_path / "rows.jsonl", rounds={"count": 1, "cohort": 2})
    given["data"]["partition"]["kind"] = "natural"
    given.pop("clients")
    out = fedrank.run(given, out=tmp_path / "run").path / "adapter"
    assert manifest(out)["run"]["clients"] == 3
    assert "| clients | 3 |" in (out / "README.md").read_text()


# ---- verified, and put in its place


def test_verify_says_what_differs(run: Path, tmp_path: Path, fed: Callable[..., Any]) -> None:
    out = export(run, tmp_path / "out")
    done = fed("verify", out)
    assert (done.exit_code, done.stdout.strip()) == (0, f"{out}: as it was exported")
    (out / "README.md").write_text("mine")
    (out / "adapter_config.json").unlink()
    (out / "notes.txt").write_text("mine")
    found = manifest(out)
    found["config"]["seed"] = 7
    (out / "provenance.json").write_text(json.dumps(found))
    done = fed("verify", out)
    expected = found["files"]["README.md"]
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "provenance.json: not what its manifest_sha256 is of",
        "config: not what config_sha256 is of",
        f"README.md: sha256 {hashlib.sha256(b'mine').hexdigest()}, exported as {expected}",
        "adapter_config.json: missing",
        "notes.txt: not a part of the export",
    ]
    done = fed("verify", tmp_path)
    assert done.exit_code == 2
    assert "is no export of fedrank" in done.stderr


@pytest.mark.parametrize(
    "claim",
    [
        ("scores", "accuracy"),
        ("data", "sha256", "train"),
        ("bytes", "all_rounds", "bytes_up"),
        ("run", "seed"),
        ("limit",),
    ],
)
def test_verify_sees_another_claim_in_the_manifest(claim: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out")
    found = part = manifest(out)
    for key in claim[:-1]:
        part = part[key]
    part[claim[-1]] = 0.99
    (out / "provenance.json").write_text(json.dumps(found))
    assert verify(out) == ["provenance.json: not what its manifest_sha256 is of"]
    del found["manifest_sha256"]
    (out / "provenance.json").write_text(json.dumps(found))
    assert verify(out) == ["provenance.json: not what its manifest_sha256 is of"]


def test_a_manifest_cannot_name_files_elsewhere(run: Path, tmp_path: Path) -> None:
    out, other = export(run, tmp_path / "out"), tmp_path / "keep.txt"
    other.write_text("keep")
    found = manifest(out)
    found["files"]["../keep.txt"] = ""
    (out / "provenance.json").write_text(json.dumps(found))
    for call in (lambda: verify(out), lambda: export(run, out)):
        with pytest.raises(StoreError, match=r"names \.\./keep\.txt, which is not in its folder"):
            call()
    assert other.exists()


def test_an_export_takes_the_place_of_one_and_of_nothing_else(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", merged=True)
    assert "config.json" in contents(out)
    assert contents(export(run, out)) == contents(run / "adapter")  # nothing of the model is left
    (out / "adapter_model.safetensors").unlink()  # as a kill may leave it
    assert verify(out) == ["adapter_model.safetensors: missing"]
    assert contents(export(run, out)) == contents(run / "adapter")
    (out / "provenance.json").unlink()  # as it was written before there were manifests
    assert contents(export(run, out)) == contents(run / "adapter")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds notes\.txt, which no export of fedrank wrote; choose another --to"):
        export(run, out)
    assert (out / "notes.txt").exists()
    assert (out / "adapter_config.json").exists()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(StoreError, match="holds file, which no export"):
        export(run, file)


# ---- the card


def test_the_hub_can_read_the_card(run: Path) -> None:
    from huggingface_hub import ModelCard

    card, found = ModelCard((run / "adapter" / "README.md").read_text()), manifest(run / "adapter")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model is None  # drawn here: no hub has it
    results = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    assert results == {name: found["scores"][name] for name in ("accuracy", "loss", "personal_accuracy", "personal_worst_decile")}  # fmt: skip
    assert "fedara (reconstructed)" in card.text
    assert "no number here is the paper's" in card.text
    assert "mean accuracy of the tenth of clients served worst" in card.text


def test_scores_on_clients_own_rows_are_none_of_the_data_set_s(run: Path, tmp_path: Path) -> None:
    """As real sites have it, whose server has no rows: what all score is the mean of theirs."""
    shutil.copytree(run, tmp_path / "run")
    facts = json.loads((run / "data.json").read_text())
    facts["rows"]["test"] = 0
    (tmp_path / "run" / "data.json").write_text(json.dumps(facts))
    front, card = card_of(export(tmp_path / "run", tmp_path / "out"))
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "rows.jsonl", "type": "rows.jsonl"}
    assert [(one["type"], one["name"]) for one in result["metrics"][:2]] == [
        ("clients_accuracy", "accuracy on clients' own test rows, weighted by rows"),
        ("clients_loss", "loss on clients' own test rows, weighted by rows"),
    ]
    assert "On the clients' own rows:" in card
    assert "| accuracy on clients' own test rows, weighted by rows |" in card


def test_scores_on_validation_rows_say_so(place: Path, tmp_path: Path) -> None:
    given = config(rows(place / "rows.jsonl"), rounds={"count": 1, "cohort": 2})
    given["data"]["split"] = "validation"
    front, card = card_of(fedrank.run(given, out=tmp_path / "run").path / "adapter")
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation"
    assert "On the validation rows:" in card


def test_a_client_s_scores_are_in_no_index(personal: Path, run: Path, tmp_path: Path) -> None:
    client = min(Store(personal).state()[0].seen)
    front, card = card_of(export(personal, tmp_path / "out", client=client))
    assert "model-index" not in front
    assert "On the own test rows:" in card
    front, _ = card_of(run / "adapter")
    assert front["model-index"][0]["name"] == "tiny-encoder, fedara (reconstructed)"


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Its metadata and its text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return dict(yaml.safe_load(front)), text


def test_pairs_of_texts_are_shown_as_pairs(tmp_path: Path) -> None:
    """And a run of them can go on."""
    lines = [{"text": f"{word} {i}", "text_b": f"{i}", "label": word} for i in range(60) for word in ("red", "green")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    path = fedrank.run(config(tmp_path / "rows.jsonl", rounds={"count": 1, "cohort": 2}), out=tmp_path / "run").path
    fedrank.resume(path, "rounds.count=2")
    assert manifest(path / "adapter")["data"]["pairs"]
    card = (export(path, tmp_path / "model", merged=True) / "README.md").read_text()
    assert '"text_pair": "its pair"' in card


def test_no_name_of_the_user_s_breaks_the_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = tmp_path / "rows # <i>|`*a*"
    folder.mkdir()
    data = rows(folder / "a: [b]\u202e & www.e.vil.jsonl", (HOSTILE, "- y: {z}"))
    out = fedrank.run(config(data, rounds={"count": 1, "cohort": 2}), out=tmp_path / "run").path / "adapter"
    text = (out / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.eval_results
    assert card.data.eval_results[0].dataset_name == data.name
    assert manifest(out)["labels"] == sorted([HOSTILE, "- y: {z}"])  # there as they are
    assert text.count("\n---\n") == 1
    yaml.safe_load(text.split("---\n")[1])
    body = text.split("\n---\n", 1)[1]
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[0] == "# Adapter trained with fedrank, after round 1"
    assert all(line.startswith("## ") for line in headings[1:])
    for mark in ("<b>", "*a*", "[l]", "http://", "`c`", "www.e", "\u202e"):
        assert mark not in body, mark
    lines = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)  # two columns, whatever is in them


# ---- all clients


def test_each_client_s_own_adapter_and_who_has_none(personal: Path, tmp_path: Path, fed: Callable[..., Any]) -> None:
    done = fed("export", personal, "--all-clients", "--to", tmp_path / "all")
    assert done.exit_code == 0, done.output
    index = json.loads((tmp_path / "all" / "index.json").read_text())
    seen = sorted(Store(personal).state()[0].seen)
    assert len(seen) == 2
    assert sorted(index["clients"]) == seen
    assert index["never_trained"] == sorted({"0", "1", "2", "3"} - set(seen))
    assert index["elsewhere"] == []
    scores = {row["client"]: row["accuracy"] for row in ledger.read(personal / "personal.jsonl")}
    for client in seen:
        folder = tmp_path / "all" / "clients" / client
        assert contents(folder) == contents(export(personal, tmp_path / client, client=client))
        assert manifest(folder)["client"] == client
        assert manifest(folder)["scores"]["accuracy"] == scores[client]
        assert f"for client {client}" in (folder / "README.md").read_text()
    assert fed("verify", tmp_path / "all").exit_code == 0
    changed = tmp_path / "all" / "clients" / seen[0] / "README.md"
    changed.write_text("mine")
    (tmp_path / "all" / "clients" / seen[1] / "provenance.json").unlink()
    found = fed("verify", tmp_path / "all")
    assert found.exit_code == 1
    assert f"clients/{seen[0]}/README.md: sha256" in found.stdout
    assert f"clients/{seen[1]}/provenance.json: missing" in found.stdout
    again = export_clients(personal, tmp_path / "all")
    assert verify(again) == []


def test_a_client_whose_parts_are_elsewhere_is_said_to_be(personal: Path, tmp_path: Path) -> None:
    shutil.copytree(personal, tmp_path / "run")
    one, two = sorted(Store(personal).state()[0].seen)
    shutil.rmtree(tmp_path / "run" / "clients" / one)
    out = export_clients(tmp_path / "run", tmp_path / "all", merged=True)
    index = json.loads((out / "index.json").read_text())
    assert (index["elsewhere"], list(index["clients"])) == ([one], [two])
    assert manifest(out / "clients" / two)["kind"] == "model"
    alone = export(personal, tmp_path / "alone", client=two, merged=True)
    assert contents(out / "clients" / two) == contents(alone)


def test_merged_models_of_all_clients_each_start_from_the_pristine_base(personal: Path, tmp_path: Path) -> None:
    out = export_clients(personal, tmp_path / "all", merged=True)
    for client in Store(personal).state()[0].seen:
        alone = export(personal, tmp_path / f"model {client}", client=client, merged=True)
        assert contents(out / "clients" / client) == contents(alone)


def test_what_is_asked_of_clients_in_vain(run: Path, personal: Path, fed: Callable[..., Any]) -> None:
    seen = sorted(Store(personal).state()[0].seen)
    for args, words in (
        ((personal, "--client", f"{seen[0]}{seen[0]}"), f"has trained in no round; did you mean '{seen[0]}'?"),
        ((personal,), "name a client (--client), or export all (--all-clients)"),
        ((run, "--all-clients"), "no part of the adapter is a client's own; export it without a client"),
        (
            (personal, "--all-clients", "--client", seen[0]),
            "--client names one, --all-clients takes all; give one of them",
        ),
    ):
        found = fed("export", *args)
        assert found.exit_code == 2
        assert words in found.stderr.replace("\n", " ")
    assert "each client keeps" in (obstacle(personal) or "")


# ---- private runs


@pytest.mark.parametrize("kind", ["central", "local"])
def test_a_private_run_s_export_tells_nothing_of_its_clients(kind: str, tmp_path: Path) -> None:
    """Of the same method and rows, all that may differ between who took part and what they hold is left out."""
    pytest.importorskip("dp_accounting")
    privacy = {"kind": kind, "clip": 0.5, "noise": 1.0, "delta": 1e-2}
    given = config(
        rows(tmp_path / "rows.jsonl"), privacy=privacy, rounds={"count": 2, "cohort": 2, "personal": 0},
        method={"name": "ffa_lora"},
    )  # fmt: skip
    path = fedrank.run(given, out=tmp_path / "run").path
    found, facts = manifest(path / "adapter"), json.loads((path / "data.json").read_text())
    summary = json.loads((path / "summary.json").read_text())
    text = (path / "adapter" / "provenance.json").read_text() + (path / "adapter" / "README.md").read_text()
    assert facts["hash"]["train"] not in text
    assert found["data"]["rows"] == {"test": facts["rows"]["test"]}
    assert found["data"]["sha256"] == {"test": facts["hash"]["test"]}
    assert found["run"]["state_sha256"] is None
    for state in (path / "states").iterdir():
        assert hashlib.sha256(state.read_bytes()).hexdigest() not in text
    assert {"stack", "prefix"}.isdisjoint(found["run"]["numerics"])  # they hang on how long rows are
    assert "stack" not in found["config"]["engine"]
    assert {"partition", "seen", "fleet", "hostile"}.isdisjoint(found)
    assert found["privacy"]["epsilon"] == summary["epsilon"] > 0
    assert f"epsilon {summary['epsilon']:.4g} at delta 0.01" in text
    told = set(found["bytes"]["round"].values()) | set(found["bytes"]["all_rounds"].values())
    assert (told == {None}) == (kind == "central")
    assert "No differential privacy" not in text
    assert "personal_accuracy" not in found["scores"]
    assert verify(path / "adapter") == []


def test_a_private_run_s_client_is_told_that_its_parts_are_not_protected(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    given = config(
        rows(tmp_path / "rows.jsonl"), method={"name": "fedsa_lora"}, rounds={"count": 2, "cohort": 4, "personal": 0},
        privacy={"kind": "central", "clip": 0.5, "noise": 1.0, "delta": 1e-2},
    )  # fmt: skip
    path = fedrank.run(given, out=tmp_path / "run").path
    client = min(Store(path).state()[0].seen)
    card = (export(path, tmp_path / "out", client=client) / "README.md").read_text()
    assert "these were trained on its rows without protection, and are for it alone" in card
    assert "for the common parts, none for the client's own" in card
