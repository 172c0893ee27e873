"""Pages: what they read of runs and comparisons, in whatever state, and what they let through of untrusted text."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import compared as study
import fedrank
import toy
from fedrank import cli, ledger
from fedrank.config import ConfigError
from fedrank.report import adapters, clients, compared, comparison, page, pages, played, plots, run, watch
from fedrank.report.page import Chart, Facts, Page, Table, Text
from fedrank.store import Store, StoreError
from fedrank.studies import tables

DEVICES = "engine.fleet={devices: {jetson-tx2: 1, jetson-xavier-nx: 1, jetson-agx-xavier: 1}, jitter: 0.2}"


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a short run with these overrides; the same ones give the same directory."""
    texts, made = tmp_path_factory.mktemp("texts"), dict[tuple[str, ...], Path]()
    toy.write(texts, train=toy.texts(64, 0), test=toy.texts(48, 1))
    base = {
        "data": {"path": str(texts), "partition": {"kind": "iid"}}, "clients": {"count": 4},
        "rounds": {"count": 2, "cohort": 3, "evaluate_every": 1}, "adapter": {"rank": 4, "targets": ["query", "value"]},
        "local": {"batch_size": 8, "max_length": 16}, "engine": {"workers": 1, "compute": "float32", "products": "torch"},
    }  # fmt: skip

    def call(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = fedrank.run(base, *overrides, out=tmp_path_factory.mktemp("runs") / "run").path
        return made[overrides]

    return call


@pytest.fixture
def pruned(play: Callable[..., Path]) -> Path:
    return play("method={name: fedara, target_rank: 1, warmup: 0.0, settle: 0.0}", "rounds.count=3", DEVICES, "engine.failure_rate=0.3", "seed=2")  # fmt: skip


@pytest.fixture
def private(play: Callable[..., Path]) -> Path:
    return play("privacy={kind: central, clip: 1.0, noise: 0.8, delta: 0.01}", "rounds.personal=0")


def charts(made: Page) -> dict[str, Chart]:
    return {b.id: b for section in made.sections for b in section.blocks if isinstance(b, Chart)}


def figures(made: Page) -> dict[str, str]:
    return {
        name: value for s in made.sections for b in s.blocks if isinstance(b, Facts) for name, value, _ in b.figures
    }


def words(made: Page) -> str:
    return " ".join(b.text for s in made.sections for b in s.blocks if isinstance(b, Text))


def values(chart: Chart) -> list[dict[str, Any]]:
    return list(chart.spec["data"]["values"])


# ---- a run


def test_the_page_of_a_run_tells_what_its_ledgers_hold(pruned: Path) -> None:
    found, rows = run.page(played.read(pruned)), ledger.read(pruned / "rounds.jsonl")
    drawn = charts(found)
    assert [p["value"] for p in values(drawn["accuracy"]) if p["series"] == "global model, test rows"] == [
        r["accuracy"] for r in rows
    ]
    assert [p["value"] for p in values(drawn["alive"])] == [r["modules_alive"] for r in rows]
    whole = sum(r["bytes_up"] + r["bytes_down"] for r in rows)
    assert drawn["accuracy"].axes["bytes"]["title"].endswith("(kB)")
    assert values(drawn["accuracy"])[-1]["bytes"] == pytest.approx(whole / 1e3, rel=1e-4)
    assert set(found.axes) == {"round", "bytes", "seconds", "joules"}
    assert figures(found)["Components"] == str(rows[-1]["components"])
    assert found.status == (
        "done",
        f"Finished: 3 of 3 rounds, accuracy {100 * rows[-1]['accuracy']:.1f} % after round 3.",
    )


def test_the_rank_map_has_every_modules_rank_after_every_round(pruned: Path) -> None:
    read = played.read(pruned)
    chart = charts(run.page(read))["map"]
    names = played.short(read.modules)
    drawn: dict[tuple[str, int], int] = {}
    for span in values(chart):
        for at in range(int(span["start"] + 0.5), int(span["stop"] + 0.5)):
            drawn[span["name"], at] = span["value"]
    assert drawn == {
        (names[module], row["round"]): rank for row in read.common for module, rank in row["ranks"].items() if rank
    }
    assert len(values(chart)) < len(drawn)  # equal neighbours are one


def test_failures_are_told_by_their_reasons(pruned: Path) -> None:
    failed = [row for row in ledger.read(pruned / "clients.jsonl") if not row["ok"]]
    section = next(s for s in run.page(played.read(pruned)).sections if s.id == "failures")
    table = next(b for b in section.blocks if isinstance(b, Table))
    assert failed
    assert [(row[0], row[1]) for row in table.rows] == [("no answer", str(len(failed)))]


def test_each_clients_device_is_dealt_out_once_more_and_checked(pruned: Path, tmp_path: Path) -> None:
    from fedrank import experiment

    read = played.read(pruned)
    parts = experiment.prepare(read.config)
    assert read.kinds == {client: device.kind for client, device in parts.devices.items()}
    shutil.copytree(pruned, tmp_path / "other")
    facts = json.loads((pruned / "data.json").read_text())
    (tmp_path / "other" / "data.json").write_text(json.dumps(facts | {"fleet": facts["fleet"] | {"hash": "0"}}))
    other = played.read(tmp_path / "other")
    assert other.kinds == {}
    fleet = next(s for s in run.page(other).sections if s.id == "fleet")
    assert "cannot be told" in fleet.lead


def test_a_worst_tenth_and_clients_below_their_majority_class() -> None:
    scored = [{"client": str(n), "accuracy": n / 20, "majority": 0.1, "rows": 5} for n in range(20)]
    facts, chart = clients.served(scored, "Accuracy")
    assert isinstance(facts, Facts)
    assert isinstance(chart, Chart)
    assert {name: value for name, value, _ in facts.figures} == {
        "Mean of clients": "47.5 %", "Standard deviation": "28.8 %", "Worst tenth": "2.5 %", "Best tenth": "92.5 %",
    }  # fmt: skip
    assert "2 of 20 are below" in chart.summary


def test_ranks_that_differ_between_clients(play: Callable[..., Path]) -> None:
    read = played.read(play("method.name=legend", DEVICES, "engine.fleet.jitter=0.5"))
    found: dict[str, dict[str, list[int]]] = {}
    for row in read.apart:
        for module in read.modules:
            found.setdefault(row["client"], {}).setdefault(module, []).append(row["ranks"].get(module, 0))
    chart = charts(run.page(read))["trained"]
    names = played.short(read.modules)
    drawn = {(cell["name"].split(" · ")[0], cell["column"]): cell["value"] for cell in values(chart)}
    assert found
    assert drawn == {
        (client, names[module]): pytest.approx(np.mean(ranks), abs=0.01)
        for client, mine in found.items() for module, ranks in mine.items() if any(ranks)
    }  # fmt: skip
    assert {row[1] for row in chart.table.rows} <= set(read.kinds.values())


def test_a_client_s_ranks_are_told_round_by_round(play: Callable[..., Path]) -> None:
    read = played.read(play("method.name=legend", DEVICES, "engine.fleet.jitter=0.5", "rounds.count=5"))
    chart = charts(run.page(read))["trained-rounds"]
    told = {(str(row["client"]), str(row["round"])): sum(row["ranks"].values()) for row in read.apart}
    assert len({client for client, _ in told}) < len(told)  # somebody trained twice
    assert {(cell["name"].split(" · ")[0], cell["label"]): cell["value"] for cell in values(chart)} == told
    assert {(row[0].split(" · ")[0], row[1]): int(row[2]) for row in chart.table.rows} == told


def test_every_span_of_the_rank_map_and_every_label_is_in_a_table(pruned: Path) -> None:
    read = played.read(pruned)
    drawn = charts(run.page(read))
    found: dict[tuple[str, int], int] = {}
    for module, rounds, rank in drawn["map"].table.rows:
        first, _, last = rounds.partition(" to ")
        found |= {(module, at): int(rank) for at in range(int(first), int(last or first) + 1)}
    assert 0 in found.values()
    found = {place: rank for place, rank in found.items() if rank}
    assert found == {(module, row["round"]): rank for row in read.common for module, rank in row["ranks"].items()}
    columns = list(drawn["held"].table.columns)
    for row in drawn["held"].table.rows:
        holder = next(one for one in read.holders if one["client"] == row[0])
        for label, count in holder["label_counts"].items():
            assert row[columns.index(read.facts["labels"][int(label)])] == f"{100 * count / holder['train_rows']:.1f} %"


def test_a_table_that_is_cut_keeps_every_arm() -> None:
    rows = [[arm, str(at)] for arm in "abcdefgh" for at in range(200)]
    table = Table(["Arm", "Round"], rows)
    assert (len(table.shown), table.hidden) == (page.LONGEST, len(rows) - page.LONGEST)
    assert {row[0] for row in table.shown} == set("abcdefgh")
    assert (table.shown[0], table.shown[-1]) == (rows[0], rows[-1])
    assert len({tuple(row) for row in table.shown}) == page.LONGEST


def test_marks_stand_out_from_the_card() -> None:
    """3 : 1 by WCAG's contrast, in both themes: bars, the ramp of maps, and the lines' colours where they are faintest."""

    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        return float(
            np.dot(
                [0.2126, 0.7152, 0.0722], [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            )
        )

    def over(colour: str, below: str, opacity: float) -> str:
        pairs = ((int(colour[at : at + 2], 16), int(below[at : at + 2], 16)) for at in (1, 3, 5))
        return "#" + "".join(f"{round(opacity * a + (1 - opacity) * b):02x}" for a, b in pairs)

    blocks = re.findall(r"--page: .*?\}", page._asset("page.css"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for name in ("bars", *(f"r{n}" for n in range(1, 6)), *(f"c{n}" for n in range(1, 9))):
            drawn = over(found[name], found["card"], plots.FAINTEST if name[0] == "c" else 1.0)
            high, low = sorted((light(drawn), light(found["card"])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (name, found[name])


def test_effective_ranks_of_private_adapters(play: Callable[..., Path]) -> None:
    path = play("method.name=pf2lora", "rounds.count=1")
    chart, arrays = charts(run.page(played.read(path)))["effective"], Store.open(path).state()[0].arrays
    totals = {row[0]: int(row[1]) for row in chart.table.rows}
    assert totals == {name.removeprefix("ranks/"): int(ranks.sum()) for name, ranks in arrays.items() if name.startswith("ranks/")}  # fmt: skip


def test_a_private_run_tells_epsilon_and_nothing_of_single_clients(private: Path) -> None:
    found, rows = run.page(played.read(private)), ledger.read(private / "rounds.jsonl")
    assert [p["value"] for p in values(charts(found)["epsilon"])] == [row["epsilon"] for row in rows]
    assert set(charts(found)) == {"accuracy", "loss", "alive", "components", "map", "epsilon"}
    assert set(found.axes) == {"round"}
    assert {"clients", "fleet", "failures", "bytes-sent"} & {section.id for section in found.sections} == set()
    read = played.read(private)
    assert ledger.read(private / "clients.jsonl")
    assert (read.clients, read.personal, read.apart, read.holders, read.kinds) == ([], [], [], [], {})


def test_a_private_run_s_page_tells_no_more_than_its_export(private: Path) -> None:
    facts, config = (
        json.loads((private / "data.json").read_text()),
        yaml.safe_load((private / "config.yaml").read_text()),
    )
    text = page.html(run.page(played.read(private))).replace(page.drawing(), "")
    assert facts["hash"]["test"][:16] in text
    assert facts["hash"]["train"][:16] not in text
    assert "Train rows" not in text
    assert config["engine"]["stack"] is not None
    assert {"stack", "prefix"} <= json.loads((private / "summary.json").read_text())["numerics"].keys()
    for key in ("stack", "prefix"):
        assert not re.search(rf"^ *{key}:", text, re.MULTILINE)


def test_a_page_has_no_place_of_this_machine_and_no_secret(play: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(play(), path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["observe"]["mlflow"] = "https://alice:s3cret@mlflow.example"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    text = page.html(run.page(played.read(path))).replace(page.drawing(), "")
    assert "fedrank run run/config.yaml --out again" in text
    assert "s3cret" not in text
    assert str(tmp_path) not in text
    assert config["data"]["path"] not in text
    assert Path(config["data"]["path"]).name in text


def test_how_many_clients_there_are_is_what_the_partition_made(play: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(play(), path)
    facts = json.loads((path / "data.json").read_text())
    for told, said in (({"count": 4096}, "4,096 clients, 3 a round"), ([], "sites, 3 a round")):
        facts["partition"]["clients"] = told
        (path / "data.json").write_text(json.dumps(facts))
        assert said in run.page(played.read(path)).lead
    assert "4 clients, 3 a round" in run.page(played.read(play())).lead


@pytest.mark.parametrize(("change", "line"), [
    ({}, "global model, test rows"), ({"split": "validation"}, "global model, validation rows"), ({"rows": 0}, "clients, over all rows"),
])  # fmt: skip
def test_scores_say_which_rows_they_are_of(
    change: dict[str, Any], line: str, play: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(play(), path)
    facts, config = json.loads((path / "data.json").read_text()), yaml.safe_load((path / "config.yaml").read_text())
    facts["rows"]["test"], config["data"]["split"] = change.get("rows", 48), change.get("split", "test")
    (path / "data.json").write_text(json.dumps(facts))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    made = run.page(played.read(path))
    assert {point["series"] for point in values(charts(made)["accuracy"])} == {line, run.OWN}
    facts_ = next(b for b in made.sections[0].blocks if isinstance(b, Facts)).figures
    who, _, on = line.partition(", ")
    assert facts_[0][0] == f"Accuracy, {who.removesuffix(' model')}"
    assert facts_[0][2].startswith(on)


def test_a_run_that_starts_from_an_adapter_says_so(private: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(private, path)
    facts = json.loads((path / "data.json").read_text()) | {"imported": {"sha256": "ab" * 32, "base": "own"}}
    (path / "data.json").write_text(json.dumps(facts))
    text = page.html(run.page(played.read(path)))
    assert "Epsilon says nothing of the rows on which that adapter was trained before." in text
    assert f"sha256 {'ab' * 8}" in text
    assert "fedrank import ADAPTER run/config.yaml --out again" in text


def test_a_run_of_task_generate_shows_perplexity(play: Callable[..., Path], tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": f"{word} {at}:", "completion": word[::-1]})
        for word in ("red", "blue")
        for at in range(12)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    found = run.page(
        played.read(
            play(
                "task=generate",
                "model.name=tiny-decoder",
                f"data.path={tmp_path}",
                "rounds.count=1",
                "adapter.targets=all",
            )
        )
    )
    assert {"perplexity", "accuracy"} <= charts(found).keys()
    assert {"Perplexity", "Token accuracy, global"} <= figures(found).keys()


def test_what_has_hardly_begun_runs_or_broke_off_has_a_page_that_says_so(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.mkdir()
    shutil.copy(pruned / "config.yaml", path)
    made = run.page(played.read(path))  # no data.json, no ledger
    assert made.status == ("stopped", "Not finished: 0 of 3 rounds, and no process on this machine is at it.")
    assert "nothing to show" in words(made)
    assert charts(made) == {}
    with Store(path).locked():
        first = [row for row in ledger.read(pruned / "clients.jsonl") if row["round"] == 1]
        ledger.append(path / "clients.jsonl", first)  # which are written before their round's row
        assert run.page(played.read(path)).status == ("waiting", "Running: no round of 3 has ended yet.")
        for name in ("rounds", "ranks"):
            rows = [row for row in ledger.read(pruned / f"{name}.jsonl") if row["round"] == 1]
            ledger.append(path / f"{name}.jsonl", rows)
        with (path / "rounds.jsonl").open("a") as file:
            file.write('{"round": 2, "accu')  # as a kill leaves it
        made = run.page(played.read(path))
    assert made.status[0] == "running"
    assert made.status[1].startswith("Running: 1 of 3 rounds, accuracy ")
    assert "left" in made.status[1]
    assert {"accuracy", "map", "waiting"} <= charts(made).keys()


def test_numbers_that_are_none_do_not_reach_the_page(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "run")
    rows = ledger.read(pruned / "rounds.jsonl")
    (tmp_path / "run" / "rounds.jsonl").write_text(
        "".join(json.dumps(row | {"loss": float("nan")}) + "\n" for row in rows)
    )
    assert "NaN" not in page.html(run.page(played.read(tmp_path / "run"))).replace(page.drawing(), "")


def test_a_large_run_makes_a_page_of_a_few_megabytes(pruned: Path, tmp_path: Path) -> None:
    """2,000 clients and 168 modules over 400 rounds, in which every rank changes all the time."""
    path, modules = tmp_path / "large", [f"model.layers.{at // 7}.part.{'qkvougd'[at % 7]}_proj" for at in range(168)]
    shutil.copytree(pruned, path)
    draw, row = np.random.default_rng(0), ledger.read(pruned / "rounds.jsonl")[0]
    asked, clock = ledger.read(pruned / "clients.jsonl")[0], row["clock_seconds"]
    rounds = [row | {"round": at, "clock_seconds": clock * at} for at in range(1, 401)]
    ranks = [
        {
            "round": r["round"],
            "client": None,
            "ranks": dict(zip(modules, draw.integers(0, 9, 168).tolist(), strict=True)),
        }
        for r in rounds
    ]
    ranks += [
        {"round": 1, "client": f"{c:04}", "ranks": dict(zip(modules, draw.integers(0, 9, 168).tolist(), strict=True))}
        for c in range(2000)
    ]
    people = [
        {
            "client": f"{c:04}",
            "origin": None,
            "train_rows": c % 90 + 5,
            "test_rows": 3,
            "label_counts": {"0": 3, "1": 2},
        }
        for c in range(2000)
    ]
    facts = json.loads((path / "data.json").read_text())
    facts["partition"]["clients"] = people
    (path / "data.json").write_text(json.dumps(facts))
    for name, many in (
        ("rounds", rounds), ("ranks", ranks), ("clients", [asked | {"round": n // 10 + 1, "client": f"{n % 2000:04}"} for n in range(4000)]),
        ("personal", [{"client": one["client"], "accuracy": draw.random(), "majority": 0.3, "rows": 3.0} for one in people]),
    ):  # fmt: skip
        (path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in many))
    made = run.page(played.read(path))
    drawn = charts(made)
    assert len(page.html(made)) - len(page.drawing()) < 4e6
    assert len(values(drawn["map"])) <= adapters.SPANS
    assert "evenly spaced" in drawn["map"].note
    assert "Of 2000 clients 60 are shown" in drawn["trained"].note
    assert "Modules of a block are added up" in drawn["trained"].note
    assert "Of 2000 clients" in drawn["held"].note
    assert len({bar["at"] for bar in values(drawn["bytes"])}) <= plots.BARS


def test_names_of_modules_are_as_short_as_tells_them_apart() -> None:
    every = ["encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense", "encoder.layer.11.attention.self.query"]  # fmt: skip
    assert list(played.short(every).values()) == ["0 query", "0 attention.output.dense", "0 output.dense", "11 query"]
    assert played.short(["a.q", "b.q"]) == {"a.q": "a.q", "b.q": "b.q"}


# ---- a comparison


def made_of(path: Path, **other: Any) -> Page:
    return comparison.page(compared.read(study.write(path, study.comparison(**other))))


def test_the_page_of_a_comparison_tells_what_it_came_to(tmp_path: Path) -> None:
    found, made = study.comparison(), made_of(tmp_path)
    first, drawn = made.sections[0], charts(made)
    said = [block.text for block in first.blocks if isinstance(block, Text)]
    assert found["results"]["clinc150"]["conclusion"] in said
    assert said[-2:] == [
        "A fair comparison: the arms were given the same data, seeds, work and number of trials.",
        "Note: the best local.lr of legend is at the edge of what was tried.",
    ]
    assert "question: Half the bytes of FedAvg at no more than a point of accuracy?" in said
    claims = next(block for block in first.blocks if isinstance(block, Table))
    assert claims.rows[0][0] == "FedARA sends less than 0.7 of FedAvg's bytes."
    assert re.fullmatch(r"clinc150: 0\.55\d times \(0\.5\d\d to 0\.5\d\d\)", claims.rows[0][1])
    assert claims.rows[0][2] == "confirmed"
    assert made.status == ("done", "Finished: 20 of 20 runs, 1 failed.")
    curve = [p for p in values(drawn["s0-accuracy"]) if p["series"] == "fedara"]
    runs = found["runs"]["clinc150"]["fedara"].values()
    last = [one["curve"][-1]["accuracy"] for one in runs]
    assert (curve[-1]["value"], curve[-1]["low"], curve[-1]["high"]) == (
        pytest.approx(np.mean(last)),
        min(last),
        max(last),
    )
    assert {p["series"] for p in values(drawn["s0-accuracy"])} == {
        "fedavg",
        "fedara",
        "legend",
    }  # no global model: no line
    seeds = [row["label"] for row in values(drawn["s0-dots-accuracy"]) if row["name"] == "legend" and "value" in row]
    assert seeds == [f"seed {seed}" for seed in study.SEEDS]
    dots = [row["value"] for row in values(drawn["s0-dots-accuracy"]) if row["name"] == "legend" and "value" in row]
    assert dots == found["results"]["clinc150"]["arms"]["legend"]["accuracy"]["values"]
    gap = next(row for row in values(drawn["s0-differences"]) if row["name"] == "legend" and "middle" in row)
    assert gap["middle"] == pytest.approx(
        100 * found["results"]["clinc150"]["differences"]["legend"]["accuracy"]["mean"]
    )
    assert {"s0-personal", "s0-alive", "s0-ranks", "tried-0"} <= drawn.keys()
    assert "Failures" in [section.title for section in made.sections]


def test_a_comparison_s_page_has_the_words_and_numbers_of_its_tables(tmp_path: Path) -> None:
    found, made = study.comparison(), made_of(tmp_path)
    result = found["results"]["clinc150"]
    shown = [list(map(list, b.rows)) for s in made.sections for b in s.blocks if isinstance(b, Table)]
    for rows in (tables.final(result), tables.to_target(result), tables.ratios(result, "fedavg", True)):
        assert rows[1:] in shown
    chart = charts(made)["s0-differences"]
    assert list(chart.table.rows) == tables.differences(result, "fedavg", True)[1:]
    assert "accuracy is the mean of the last five evaluations" in words(made)
    assert (
        "That is one evaluation, in the mean over seeds; in the results stands the mean of the last five"
        in charts(made)["s0-accuracy"].summary
    )


def test_an_arm_looks_the_same_in_every_chart(tmp_path: Path) -> None:
    def domains(spec: Any) -> list[Any]:
        if isinstance(spec, Mapping):
            own = (
                [spec["scale"]["domain"]]
                if spec.get("field") in ("series",) and "domain" in (spec.get("scale") or {})
                else []
            )
            return own + [found for part in spec.values() for found in domains(part)]
        return [found for part in spec for found in domains(part)] if isinstance(spec, list) else []

    drawn = charts(made_of(tmp_path))
    every = [domain for id in ("s0-accuracy", "s0-alive", "tried-0") for domain in domains(drawn[id].spec)]
    assert every
    assert all(domain == list(study.ARMS) for domain in every)


@pytest.mark.parametrize(
    "left_out", [(), ("results", "fair"), ("runs", "results", "tuning", "failures", "forecast", "machine", "fair")]
)
def test_a_comparison_that_grows_has_a_page_at_any_time(left_out: tuple[str, ...], tmp_path: Path) -> None:
    found = {name: part for name, part in study.comparison(more={"to": ["come"]}).items() if name not in left_out}
    made = comparison.page(compared.read(study.write(tmp_path, found)))
    assert page.html(made)
    if "runs" in left_out:
        assert made.status == ("stopped", "Not finished: 0 of 20 runs, and no process on this machine is at it.")
        assert "No run of this setting has ended yet." in words(made)
        assert "Not finished: 0 of 20 runs, so nothing is concluded." in words(made)
    with Store(tmp_path).locked():
        assert comparison.page(compared.read(tmp_path)).status[0] == ("waiting" if "runs" in left_out else "done")


def test_of_unlike_arms_nothing_is_concluded(tmp_path: Path) -> None:
    made = made_of(
        tmp_path, fair={"verdict": False, "why": ["fedara had 8 trials, the others 4"], "notes": ["two seeds"]}
    )
    said = [(b.text, b.tone) for b in made.sections[0].blocks if isinstance(b, Text)][1:]
    assert said == [
        ("Not a fair comparison, so nothing is concluded: fedara had 8 trials, the others 4.", "bad"),
        ("Note: two seeds.", "note"),
    ]
    assert [b.rows[0][2] for b in made.sections[0].blocks if isinstance(b, Table)] == ["nothing is concluded"]


def test_nothing_is_concluded_before_all_runs_are_played(tmp_path: Path) -> None:
    """What `fedrank compare` writes while it grows: not fair, as runs are missing, and with a sentence on what there is."""
    found = study.comparison(fair={"verdict": False, "why": ["clinc150: legend has no run of seed 5"], "notes": []})
    del found["runs"]["clinc150"]["legend"]["5"]
    made = comparison.page(compared.read(study.write(tmp_path, found)))
    first = made.sections[0]
    assert [b.text for b in first.blocks if isinstance(b, Text)][1:] == [
        "Not finished: 19 of 20 runs, so nothing is concluded."
    ]
    assert [b.rows[0][2] for b in first.blocks if isinstance(b, Table)] == ["not finished"]
    assert "Told apart" not in charts(made)["s0-differences"].summary
    assert "Told apart" in charts(made_of(tmp_path / "whole"))["s0-differences"].summary


def test_a_comparison_is_run_again_from_its_own_folder(tmp_path: Path) -> None:
    found = study.comparison()
    found["study"]["base"] |= {
        "data": {"path": "/home/alice/rows"},
        "observe": {"mlflow": "https://alice:s3cret@mlflow.example"},
    }
    text = page.html(comparison.page(compared.read(study.write(tmp_path / "pruning", found))))
    assert "fedrank compare pruning/study.yaml --out pruning" in text
    assert "--runs" not in text
    assert "path: rows" in text
    for secret in ("s3cret", "/home/alice", str(tmp_path)):
        assert secret not in text
    found["runs_folder"] = "its runs"
    text = page.html(comparison.page(compared.read(study.write(tmp_path / "pruning", found))))
    assert "fedrank compare pruning/study.yaml --out pruning --runs &#39;its runs&#39;" in text


def test_a_trial_that_came_to_nothing_says_why(tmp_path: Path) -> None:
    found = study.comparison()
    every = found["tuning"]["clinc150"]["fedara"]["trials"]
    every[3] |= {"score": None, "error": "no client's update was merged in any round"}
    made = comparison.page(compared.read(study.write(tmp_path, found)))
    blocks = next(section for section in made.sections if section.title == "Tuning").blocks
    table = next(block for block in blocks if isinstance(block, Table) and block.title == "Every trial")
    assert table.columns == ["Arm", "Knobs", "Error", "Score", "Took", "Chosen"]
    row = ["fedara", "local.lr=0.03", "no client's update was merged in any round", "–", "12 s", "no"]
    assert row in table.rows
    assert [row[2] for row in table.rows].count("–") == len(table.rows) - 1


@pytest.mark.parametrize("text", ['{"schema": 2}', "[]", "{", '{"runs": {}}'])
def test_another_form_of_comparison_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(StoreError, match=re.escape("comparison.json")):
        compared.read(tmp_path)


# ---- untrusted text


def test_text_of_a_run_never_becomes_markup(pruned: Path, tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&<!--"
    path = tmp_path / "run"
    shutil.copytree(pruned, path)
    for name in ("clients", "personal", "ranks"):
        rows = [row | ({"client": bad} if row["client"] else {}) for row in ledger.read(path / f"{name}.jsonl")]
        rows = [row | ({"error": bad} if not row.get("ok", True) else {}) for row in rows]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = json.loads((path / "data.json").read_text()) | {"data": bad, "labels": [bad, "b", "c", "d"]}
    (path / "data.json").write_text(json.dumps(facts))
    made = run.page(played.read(path))
    texts = [
        page.html(made),
        page.html(made_of(tmp_path / "study", fair={"verdict": False, "why": [bad], "notes": [bad]})),
    ]
    for text in (text.replace(page.drawing(), "") for text in texts):
        assert "&lt;img src=x" in text
        assert "<script>alert" not in text
        assert "<img" not in text
        assert text.lower().count("<script") == 3  # its own
    inside = re.search(r'<script type="application/json" id="charts">(.*?)</script>', texts[0], re.S)
    assert inside is not None
    assert json.loads(inside[1]) == json.loads(json.dumps(page.finite(made.charts)))


def test_the_policy_lets_nothing_in_from_elsewhere(pruned: Path) -> None:
    text = page.html(run.page(played.read(pruned))).replace(page.drawing(), "")
    assert "default-src 'none'" in page.policy(live=False)
    assert "unsafe-eval" not in page.policy(live=True)
    assert "connect-src" not in page.policy(live=False)
    assert not re.findall(r'(?:src|href|action)="(?!#|data:,")[^"]*"', text)


# ---- the commands


def test_report_prints_where_the_page_is(pruned: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(pruned), "--out", str(tmp_path / "a.html")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    study.write(tmp_path / "study", study.comparison())
    assert pages.report(tmp_path / "study") == tmp_path / "study" / "report.html"
    assert pages.report(tmp_path / "study" / "comparison.json") == tmp_path / "study" / "report.html"


def test_report_of_something_else_is_a_mistake(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no run directory and holds no comparison" in " ".join(done.stderr.split())


def test_watch_serves_the_page_to_who_knows_its_name_and_nothing_else(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "later"
    with watch.served(path, "127.0.0.1", 0) as url:
        port = int(url.rsplit(":", 1)[1].strip("/"))

        def ask(where: str, method: str = "GET", **headers: str) -> tuple[int, Mapping[str, str], bytes]:
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            link.request(method, where, headers=headers)
            answer = link.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read()
            link.close()
            return found

        status, headers, body = ask("/data.json")
        assert (status, json.loads(body)["title"]) == (200, "later")  # nothing is there yet
        assert "Waiting for a run" in json.loads(body)["said"]
        assert ask("/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
        shutil.copytree(pruned, path)
        status, after, body = ask("/data.json", **{"If-None-Match": headers["ETag"]})
        assert (status, json.loads(body)["title"]) == (200, run.page(played.read(path)).title)
        assert after["ETag"] != headers["ETag"]
        assert ask("/", Host=f"localhost:{port}")[0] == 200
        for name in ("evil.example", f"evil.example:{port}", f"127.0.0.1:{port + 1}", "127.0.0.1", f"10.0.0.1:{port}", f"x@localhost:{port}", ""):  # fmt: skip
            assert ask("/", Host=name)[0] == 421
        for where in ("/config.yaml", "/../config.yaml", "/data.json?x", "/noise.key"):
            assert ask(where)[0] == 404
        assert ask("/", "POST")[0] == 501
        status, headers, body = ask("/", "HEAD")
        assert (status, body) == (200, b"")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        (path / "config.yaml").write_text("task: cook")
        assert "What is there cannot be read" in json.loads(ask("/data.json")[2])["said"]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}"), watch.served(path, "127.0.0.1", port):
            raise AssertionError
    with pytest.raises(ConnectionError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=2).request("GET", "/")


def test_watch_reads_of_a_ledger_only_what_is_new(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows, parsed = tmp_path / "rounds.jsonl", played.follower(), list[Any]()
    every = ledger.read(pruned / "rounds.jsonl")
    loads = json.loads
    monkeypatch.setattr(played.json, "loads", lambda text: parsed.append(text) or loads(text))
    assert rows(path) == []
    for count in (1, 2):
        ledger.append(path, every[count - 1 : count])
        assert (rows(path), len(parsed)) == (every[:count], count)
    with path.open("a") as file:
        file.write('{"round": 3, "accu')
    assert (rows(path), len(parsed)) == (every[:2], 2)
    ledger.cut(path, 1)  # a resume plays round 2 once more
    parsed.clear()
    again = {**every[1], "wall_seconds": 77.0}
    ledger.append(path, [again, every[2]])
    assert (rows(path), len(parsed)) == ([every[0], again, every[2]], 3)
    text = path.read_text()
    path.write_text(text.replace("77.0", "78.0"))  # in place, as nobody should
    path.unlink()
    assert rows(path) == []


def test_a_line_of_many_rounds_is_thinned(pruned: Path, tmp_path: Path) -> None:
    path, row = tmp_path / "run", ledger.read(pruned / "rounds.jsonl")[0]
    shutil.copytree(pruned, path)
    rounds = [row | {"round": at, "accuracy": at / 1e4 if at % 2 else None, "loss": None} for at in range(1, 4001)]
    (path / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    drawn = charts(run.page(played.read(path)))
    common = [p["round"] for p in values(drawn["accuracy"]) if p["series"].startswith("global")]
    assert (len(common), common[0], common[-1]) == (played.LINE, 1, 3999)
    assert all(at % 2 for at in common)  # of those that were evaluated
    assert drawn["accuracy"].note == "At most 1,000 points of a line are drawn, evenly spaced."
    assert len(values(drawn["alive"])) == played.LINE


def test_watch_says_so_where_a_page_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(path: Path, rows: played.Read) -> Page:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(watch, "awaited", broken)
    with watch.served(tmp_path, "127.0.0.1", 0) as url:
        link = http.client.HTTPConnection("127.0.0.1", int(url.rsplit(":", 1)[1].strip("/")), timeout=20)
        link.request("GET", "/data.json")
        answer = link.getresponse()
        assert (answer.status, answer.read()) == (
            500,
            b"The page could not be made: ZeroDivisionError; the console has more.\n",
        )
        link.close()
    assert "of all things" in caplog.text


def test_watch_ends_with_a_word_when_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedrank.cli", "watch", str(tmp_path / "run"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", process.stdout.readline())
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=30)
    assert (process.returncode, out, told.strip()) == (0, "", "stopped.")


@pytest.mark.parametrize(("package", "command"), [("jinja2", "report"), ("vl_convert", "watch")])
def test_what_is_missing_is_named_with_its_extra(
    package: str, command: str, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    page.drawing.cache_clear()
    done = CliRunner().invoke(cli.app, [command, str(pruned)])
    assert done.exit_code == 2
    assert "pip install 'fedrank[report]'" in " ".join(done.stderr.split())


def test_a_server_on_all_addresses_answers_to_any_of_them_but_to_no_strange_name() -> None:
    mine = watch.names("0.0.0.0", 8600)
    assert mine("192.168.1.7:8600")
    assert mine("[fe80::1]:8600")
    assert not mine("evil.example:8600")
    assert not mine("192.168.1.7")
    assert watch.names("lab.example", 80)("LAB.example")


def test_watch_says_where_a_server_on_all_addresses_is_reached() -> None:
    name = socket.gethostname()
    assert watch.urls("0.0.0.0", 8600) == ["http://127.0.0.1:8600/", f"http://{name}:8600/"]
    assert watch.urls("::", 8600) == ["http://[::1]:8600/", f"http://{name}:8600/"]
    assert watch.urls("fe80::1", 8600) == ["http://[fe80::1]:8600/"]
    mine = watch.names("0.0.0.0", 8600)
    assert all(mine(url.removeprefix("http://").strip("/")) for url in watch.urls("0.0.0.0", 8600))
