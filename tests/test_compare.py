"""Studies: read, tuned, played, compared, judged."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

import fedrank
from fedrank import views
from fedrank.cli import app
from fedrank.client import STAYS
from fedrank.config import ConfigError
from fedrank.store import StoreError
from fedrank.studies import comparison, record, tables, tuning
from fedrank.studies.claims import Claim
from fedrank.studies.configs import digest, located, merged
from fedrank.studies.play import play
from fedrank.studies.results import compared, fairness, verdicts
from fedrank.studies.runs import Processes, best, late, measured, reached
from fedrank.studies.statistics import holm, paired, ratio, spread
from fedrank.studies.study import Range, Study, read
from fedrank.units import factor, within

BASE = {"data": {"name": "docstrings"}, "rounds": {"count": 4, "cohort": 2}}
CLAIM = {"claim": "c", "arm": "fedara", "of": "accuracy", "confirmed": {"above": 0}, "refuted": {"below": 0}}


def study(**more: Any) -> Study:
    given = {"base": BASE, "methods": ["fedavg", "fedara", "ffa_lora"], "seeds": 3, "tuning": None}
    given = {key: value for key, value in {**given, **more}.items() if value is not ...}
    return Study.model_validate(given)


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


# ---- a study is read


def test_methods_are_short_for_arms_and_a_count_for_seeds() -> None:
    found = study()
    assert found.arms["fedara"] == {"method": {"name": "fedara"}}
    assert found.seeds == (1, 2, 3)
    assert found.baseline == "fedavg"


def test_methods_on_a_runs_config(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", {**BASE, "method": {"name": "fedara", "target_rank": 2}})
    found = read(file, ["tuning.trials=2"], ["fedavg", "rolora"], 2)
    assert [*found.arms] == ["fedavg", "rolora"]
    assert found.resolved()["all"]["rolora"].method == {"name": "rolora"}
    assert found.seeds == (1, 2)
    assert found.tuning is not None
    assert found.tuning.trials == 2
    both = read(file, names=["fedavg", "fedara"]).resolved()["all"]
    assert both["fedavg"].method == {"name": "fedavg"}
    assert both["fedara"].method == {"name": "fedara", "target_rank": 2}  # as the config has it
    with pytest.raises(ConfigError, match=r"a study has arms or methods; .* --methods fedavg,fedara"):
        read(file)
    with pytest.raises(ConfigError, match="methods: each once, got fedavg, fedavg"):
        read(file, names=["fedavg", " fedavg"])
    with pytest.raises(ConfigError, match="--methods goes with a run's config"):
        read(write(tmp_path / "study.yaml", {"base": BASE, "methods": ["fedavg"]}), names=["rolora"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tunning": {}}, "unknown key 'tunning'; did you mean 'tuning'"),
        ({"methods": ["fedavg", "fedora"]}, "arm 'fedora' in setting 'all': method.name: no method is called 'fedora'; did you mean 'fedara'"),
        ({"base": {**BASE, "rounds": {"cuont": 3}}}, "unknown key 'rounds.cuont'; did you mean 'rounds.count'"),
        ({"reference": "fedavgg"}, "reference: 'fedavgg' is no arm; did you mean 'fedavg'"),
        ({"seeds": [1, 1]}, "seeds: each once"),
        ({"seeds": []}, "seeds"),
        ({"tuning": {"seed": 2}}, "tuning.seed: 2 is one of the study's seeds"),
        ({"tuning": {"own": {"fedarra": {}}}}, "tuning.own: 'fedarra' is no arm; did you mean 'fedara'"),
        ({"tuning": {"search": {"local.lr": {"low": 1, "high": 0.1}}}}, "low is below high"),
        ({"tuning": {"search": {"local.lr": []}}}, "tuning.search.local.lr"),
        ({"tuning": {"search": {"local.rl": [0.1]}}}, "tuning of arm 'fedavg' in setting 'all': config: unknown key 'local.rl'"),
        ({"tuning": {"search": {"local.lr": [-1.0]}}}, "tuning of arm 'fedavg'"),
        ({"arms": {"a b": {}}, "methods": ...}, "arms.a b"),
        ({"arms": {"a": {}}}, "methods and arms: one of the two"),
        ({"claims": {"x": {"claim": "c", "arm": "fedavgg", "of": "accuracy", "confirmed": {"above": 0}, "refuted": {"below": 0}}}}, "claims.x: 'fedavgg' is no arm"),
        ({"score": "acuracy"}, "did you mean 'accuracy'"),
        ({"methods": "fedavg"}, "methods: a list of names, such as [fedavg, fedara], got 'fedavg'"),
        ({"methods": [{"name": "fedavg"}]}, "methods: a list of names"),
        ({"arms": {"a": {"method": "fedara"}}, "methods": ...}, "arm 'a' in setting 'all': config: method"),
        ({"base": {"data": "docstrings"}}, "arm 'fedavg' in setting 'all': config: data"),
        ({"base": {**BASE, "data": {"name": "docstrings", "split": "validation"}}}, "data.split: runs are scored on the test rows"),
        ({"varies": ["local.stps"]}, "varies: there is no key 'local.stps'; did you mean 'local.steps'"),
        ({"rounds": {"count": 3}}, "'rounds' is a key of runs: what they share goes below base, such as base.rounds"),
        ({"tuning": {"search": {"local.lr": 0.01}}}, "local.lr: a list of values, or {low, high, log}, got 0.01"),
        ({"tuning": {"search": {"seed": [1, 2]}}}, "seed is no knob of a method"),
        ({"tuning": {"search": {"method.name": ["fedavg", "fedara"]}}}, "method.name is no knob: an arm is one method"),
        ({"arms": {"a": {"seed": 3}}, "methods": ...}, "arms.a.seed: every arm is played with the same seeds, which `seeds` names"),
        ({"settings": {"b": {"seed": 3}}}, "settings.b.seed: every arm"),
        ({"claims": {"x": {**CLAIM, "confirmed": {"above": float("nan")}}}}, "claims.x.confirmed.above"),
        ({"tuning": {"search": {"local.steps": [1, 9]}}}, "tuning of arm 'fedavg': local.steps is no knob, as arms that differ in it are not compared fairly; leave it out, or name it in varies"),
        ({"tuning": {"own": {"fedara": {"wire.dtype": ["f32", "f16"]}}}}, "tuning of arm 'fedara': wire.dtype is no knob"),
        ({"varies": ["local.steps"], "tuning": {"search": {"local.batch_size": [8, 16]}}}, "local.batch_size is no knob"),
        ({"claims": {"x": {**CLAIM, "against": "fedara"}}}, "claims.x: fedara is compared with itself; against is another arm"),
        ({"reference": "fedara", "claims": {"x": CLAIM}}, "claims.x: fedara is compared with itself; against is another arm, and the reference, fedara, where"),
        ({"claims": {"x": {**CLAIM, "confirmed": {"above": -1}, "refuted": {"below": 5}}}}, "claims.x: confirmed, refuted: an interval could lie in both"),
        ({"claims": {"x": {**CLAIM, "confirmed": {"below": 5}, "refuted": {"above": -1}}}}, "an interval could lie in both"),
        ({"claims": {"x": {**CLAIM, "confirmed": {"above": 1}, "refuted": {"above": 5}}}}, "one is above a number, the other below the same or a lower one"),
    ],
)  # fmt: skip
def test_a_mistake_says_where_and_what_would_be_right(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    given = {"base": BASE, "methods": ["fedavg", "fedara"], "seeds": 3, **change}
    file = write(tmp_path / "study.yaml", {key: value for key, value in given.items() if value is not ...})
    with pytest.raises(ConfigError) as error:
        read(file)
    assert words in str(error.value)


def test_a_path_is_told_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "study.yaml", {"base": {"data": {"path": "$SETS/mine"}}, "methods": ["fedavg"]})
    monkeypatch.delenv("SETS", raising=False)
    with pytest.raises(ConfigError, match=r"data.path: \$SETS/mine: the environment has no such variable"):
        read(file)
    monkeypatch.setenv("SETS", str(tmp_path))
    assert read(file).resolved()["all"]["fedavg"].data.path == f"{tmp_path}/mine"
    assert (
        located({"engine": {"fleet": {"csv": "$SETS/boards.csv"}}})["engine"]["fleet"]["csv"]
        == f"{tmp_path}/boards.csv"
    )


def test_a_run_is_known_again_by_what_its_rows_are(tmp_path: Path) -> None:
    for folder, text in (("a", "text,label\nx,y\n"), ("b", "text,label\nx,y\n"), ("c", "text,label\nx,z\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.csv").write_text(text)
    one, moved, other = (digest({"data": {"path": str(tmp_path / folder / "rows.csv")}}) for folder in "abc")
    assert one == moved != other
    assert digest(BASE) == digest(
        {**BASE, "rounds": {"count": 4, "cohort": 2, "deadline": None}}
    )  # a default written out
    assert digest(BASE) != digest({**BASE, "seed": 1})
    with pytest.raises(ConfigError, match=r"data.path: .*nothing.csv: No such file"):
        digest({"data": {"path": str(tmp_path / "nothing.csv")}})


def test_a_run_is_known_again_by_what_its_model_and_devices_are(tmp_path: Path) -> None:
    """A hub name counts whole; a folder by what is read of it, and devices by what is written, wherever they are."""
    for folder, weights, watts in (("a", "1", 5), ("b", "1", 5), ("c", "2", 6)):
        (model := tmp_path / folder / "m").mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_text(weights)
        (model / "README.md").write_text(folder)
        (tmp_path / folder / "devices.csv").write_text(f"kind,idle_watts\nmine,{watts}\n")
    for key, name in (("model", "m"), ("engine", "devices.csv")):
        places = [str(tmp_path / folder / name) for folder in "abc"]
        configs = ({key: {"name": place} if key == "model" else {"fleet": {"csv": place}}} for place in places)
        one, moved, other = (digest(merged(BASE, config)) for config in configs)
        assert one == moved != other
    assert digest({**BASE, "model": {"name": "a/bert"}}) != digest({**BASE, "model": {"name": "b/bert"}})
    with pytest.raises(ConfigError, match=r"model.name: .*nothing: No such file"):
        digest({**BASE, "model": {"name": str(tmp_path / "nothing")}})
    with pytest.raises(ConfigError, match=r"engine.fleet.csv: .*nothing.csv: No such file"):
        digest({**BASE, "engine": {"fleet": {"csv": str(tmp_path / "nothing.csv")}}})


def test_a_range_is_no_search_for_whole_numbers() -> None:
    """Told before anything is played."""
    knobs = {"adapter.rank": {"low": 4, "high": 16}}
    with pytest.raises(ConfigError, match=r"adapter\.rank: input should be a valid integer, got .* fractional part"):
        study(tuning={"search": knobs, "trials": 2}).resolved()
    assert study(tuning={"search": {"adapter.rank": [4, 16]}, "trials": 2}).resolved()


def test_results_of_before_are_known_again() -> None:
    """These are in benchmarks/results: another digest would have all of it played anew."""
    assert digest(BASE) == "4b76a39250d18f05"
    assert digest({**BASE, "model": {"name": "minilm"}}) == "287e6cf4086d58ba"


def test_another_methods_knobs_go_with_its_name() -> None:
    assert merged({"method": {"name": "fedara", "target_rank": 2}}, {"method": {"name": "fedavg"}}) == {"method": {"name": "fedavg"}}  # fmt: skip
    assert merged({"method": {"name": "fedara", "target_rank": 2}}, {"method": {"score": "random"}}) == {
        "method": {"name": "fedara", "target_rank": 2, "score": "random"}
    }


def test_arms_that_differ_in_more_than_their_method() -> None:
    arms = {"a": {}, "b": {"local": {"epochs": 3}, "adapter": {"rank": 4}}}
    assert study(methods=..., arms=arms).differing() == ["local.epochs is 1 in a and 3 in b"]
    assert study(methods=..., arms=arms, varies=["local"]).differing() == []


def test_what_arms_may_differ_in_may_be_tuned() -> None:
    knobs = {"method.target_rank": [2, 4], "adapter.rank": [4, 8], "server.tau": [0.001, 0.01], "local.steps": [5, 10]}
    assert study(methods=["fedara"], varies=["local"], tuning={"search": knobs}).resolved()


# ---- tuning


def test_lists_are_tried_through_and_ranges_as_often_as_there_are_trials() -> None:
    tried: list[Any] = []
    lists = {"a": (1, 2), "b": ("x", "y")}

    def score(knobs: dict[str, Any]) -> float:
        tried.append(knobs)
        return float(knobs["a"])

    tuning.search(lists, 4, 0, score)
    assert tuning.count(lists, 9) == 4
    assert sorted((one["a"], one["b"]) for one in tried) == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    for seed in range(20):  # of more, as many as there are trials, and each is another
        tried.clear()
        tuning.search({"a": (1, 2, 3, 4, 5), "b": ("x", "y")}, 5, seed, score)
        assert len({(one["a"], one["b"]) for one in tried}) == len(tried) == 5
    knobs = {"lr": Range(low=1e-3, high=1e-1, log=True)}
    tried.clear()
    tuning.search(knobs, 6, 0, lambda one: -abs(math.log10(tried.append(one) or one["lr"]) + 2))  # type: ignore[func-returns-value]
    assert len(tried) == tuning.count(knobs, 6) == 6
    assert all(1e-3 <= one["lr"] <= 1e-1 for one in tried)
    again: list[Any] = []
    tuning.search(knobs, 6, 0, lambda one: -abs(math.log10(again.append(one) or one["lr"]) + 2))  # type: ignore[func-returns-value]
    assert again == tried  # as a search that was cut short needs it


def test_a_best_value_at_the_edge_is_told() -> None:
    trials = [
        {"knobs": {"lr": 0.1}, "score": 0.2},
        {"knobs": {"lr": 0.3}, "score": 0.5},
        {"knobs": {"lr": 1.0}, "score": 0.5},
    ]
    assert tuning.chosen(trials) == {"lr": 0.3}
    assert tuning.edges({"lr": (0.1, 0.3, 1.0)}, {"lr": 0.3}) == []
    assert tuning.edges({"lr": (0.1, 0.3, 1.0)}, {"lr": 1.0}) == ["lr"]
    assert tuning.edges({"lr": Range(low=0.001, high=0.1, log=True)}, {"lr": 0.0011}) == ["lr"]
    assert tuning.edges({"lr": Range(low=0.001, high=0.1, log=True)}, {"lr": 0.01}) == []
    assert tuning.edges({"kind": ("a", "b")}, {"kind": "a"}) == []
    assert tuning.edges({"rate": (0.1, 1.0)}, {"rate": 1.0}) == []  # it has nothing else


# ---- statistics


def test_paired_differences_are_those_of_a_paired_t_test() -> None:
    ours, theirs = [0.81, 0.79, 0.84, 0.80], [0.78, 0.80, 0.79, 0.77]
    found = paired(ours, theirs)
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["interval"] == pytest.approx([interval.low, interval.high])
    assert paired([1.0], [0.5])["interval"] is None
    assert paired([1.0, 2.0], [0.0, 1.0])["p"] is None  # the same difference twice: nothing to test


def test_ratios_are_geometric() -> None:
    found = ratio([2.0, 8.0], [1.0, 1.0])
    assert found is not None
    assert found["mean"] == pytest.approx(4.0)
    assert found["interval"][0] < 4 < found["interval"][1]
    assert ratio([0.0, 1.0], [1.0, 1.0]) is None


def test_holms_correction() -> None:
    """0.01 * 4, then 0.013 * 3 below it, 0.02 * 2 = 0.04, 0.5 once."""
    found = holm({"a": 0.02, "b": 0.01, "c": None, "d": 0.5, "e": 0.013})
    assert found == {"a": pytest.approx(0.04), "b": pytest.approx(0.04), "c": None, "d": 0.5, "e": pytest.approx(0.04)}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_spread_leaves_out_what_there_is_not() -> None:
    assert spread([1.0, None, 3.0])["mean"] == 2.0
    assert spread([None])["mean"] is None
    assert spread([2.0])["deviation"] is None


# ---- curves


def curve(*scores: float | None) -> list[dict[str, Any]]:
    return [
        {"round": at, "accuracy": score, "personal_accuracy": score, "loss": 1.0, "bytes_up": 10.0 * at, "bytes_down": 20.0 * at,
         "adapter_bytes_up": 9.0 * at, "adapter_bytes_down": 18.0 * at, "clock_seconds": 2.0 * at, "device_joules": 3.0 * at,
         "peak_memory_bytes": 5.0, "components": 8, "modules_alive": 2}
        for at, score in enumerate(scores, 1)
    ]  # fmt: skip


def test_late_is_the_mean_of_the_last_five_of_the_second_half() -> None:
    assert late(curve(0.0, 0.0, 0.4, 0.6), "accuracy") == pytest.approx(0.5)
    assert late(curve(*[0.0] * 10, *[0.5] * 5, *[1.0] * 5), "accuracy") == 1.0
    assert late(curve(None, None), "accuracy") is None


def test_a_target_is_reached_by_the_mean_of_three() -> None:
    line = curve(0.1, 0.9, 0.2, 0.5, 0.5, 0.5)
    assert reached(line, "accuracy", 0.5) == line[3]  # 0.9, 0.2, 0.5
    assert reached(line, "accuracy", 0.6) is None
    assert best(line, "accuracy") == pytest.approx(1.6 / 3)
    assert best(curve(0.1, 0.2), "accuracy") is None


# ---- results


def run(*scores: float | None, factor: float = 1.0) -> dict[str, Any]:
    line = [{**point, "bytes_up": factor * point["bytes_up"]} for point in curve(*scores)]
    last = line[-1]
    sums = {
        name: last[name]
        for name in (
            "bytes_up",
            "bytes_down",
            "adapter_bytes_up",
            "adapter_bytes_down",
            "clock_seconds",
            "device_joules",
        )
    }
    facts = {"data": {"train": "d"}, "model": "m", "code": "c", "numerics": {"compute": "float32"}}
    summary = {
        "accuracy": scores[-1],
        "personal_accuracy": scores[-1],
        "personal_worst_decile": 0.1,
        "peak_memory_bytes": 5.0,
        **sums,
    }
    return {
        "summary": summary,
        "curve": line,
        "personal": [0.1, 0.9],
        "rows_seen": 100.0,
        "facts": facts,
        "digest": "x",
        "seconds": 1.0,
        "ranks": {},
    }


def runs() -> dict[str, Any]:
    """fedara is 10 points above, give or take; ffa_lora is level; three seeds each."""
    return {"all": {
        "fedavg": {str(s): run(0.1, 0.3, 0.5, 0.50 + 0.01 * s) for s in (1, 2, 3)},
        "fedara": {str(s): run(0.1, 0.4, 0.6, 0.60 + 0.012 * s, factor=0.5) for s in (1, 2, 3)},
        "ffa_lora": {str(s): run(0.1, 0.3, 0.5, 0.50 + 0.01 * s + d) for s, d in ((1, 0.02), (2, -0.03), (3, 0.0))},
    }}  # fmt: skip


def test_what_runs_come_to() -> None:
    found = compared(study(), runs(), True)["all"]
    assert found["arms"]["fedavg"]["accuracy"]["values"] == pytest.approx([0.505, 0.51, 0.515])
    assert found["arms"]["fedara"]["bytes"]["mean"] == pytest.approx(0.5 * 40 + 80)
    assert found["target"]["value"] == pytest.approx(
        (0.3 + 0.5 + 0.49) / 3
    )  # the weakest run of all, ffa_lora's second
    assert found["target"]["arms"]["fedara"]["reached"] == 3
    assert found["target"]["arms"]["fedara"]["round"]["values"] == [4, 4, 4]
    one = found["differences"]["fedara"]
    assert one["accuracy"]["mean"] == pytest.approx(0.102)
    assert one["bytes_up"]["mean"] == pytest.approx(0.5)
    assert one["to_target.bytes_up"]["values"] == pytest.approx([0.5] * 3)
    assert one["accuracy"]["p"] < one["accuracy"]["p_corrected"] < 0.05
    assert "Better: fedara by 10.2 points (95 % interval 10.0 to 10.4, 0.5 times the bytes up)" in found["conclusion"]
    assert "Not told apart from it at 5 %, corrected for 2 comparisons: ffa_lora" in found["conclusion"]


def test_as_many_bytes_are_told_so() -> None:
    found = runs()
    found["all"]["fedara"] = {str(s): run(0.1, 0.4, 0.6, 0.60 + 0.012 * s) for s in (1, 2, 3)}
    assert "10.0 to 10.4, as many bytes up)" in compared(study(), found, True)["all"]["conclusion"]


def test_a_given_target_that_some_never_reach() -> None:
    found = compared(study(target=0.56), runs(), True)["all"]["target"]
    assert found["given"]
    assert (found["arms"]["fedara"]["reached"], found["arms"]["fedavg"]["reached"]) == (0, 0)
    found = compared(study(target=0.53), runs(), True)["all"]["target"]["arms"]
    assert (found["fedara"]["reached"], found["fedara"]["seeds"]) == (3, ["1", "2", "3"])
    assert found["fedavg"]["clock_seconds"]["mean"] is None


def test_one_seed_tells_nothing() -> None:
    one = {"all": {arm: {"1": mine["1"]} for arm, mine in runs()["all"].items()}}
    assert "One seed tells no difference from chance" in compared(study(seeds=1), one, True)["all"]["conclusion"]


def test_a_score_that_some_methods_have_not() -> None:
    found = runs()
    found["all"]["ffa_lora"] = {seed: run(None, None, None, None) for seed in "123"}
    one = compared(study(), found, True)["all"]
    assert "accuracy" not in one["differences"]["ffa_lora"]
    assert one["arms"]["ffa_lora"]["accuracy"]["mean"] is None
    assert one["target"]["value"] is not None
    found["all"]["fedavg"] = found["all"]["ffa_lora"]
    assert "The reference, fedavg, has no accuracy" in compared(study(), found, True)["all"]["conclusion"]


def test_a_comparison_with_unequal_budgets_is_not_called_fair() -> None:
    assert fairness(study(), {"runs": runs()})["verdict"]
    short = runs()
    del short["all"]["fedara"]["2"]
    assert fairness(study(), {"runs": short}) == {
        "verdict": False, "why": ["all: fedara has no run of seed 2"],
        "notes": ["no knob was searched: learning rates are each method's default or as the study sets them"],
    }  # fmt: skip
    other = runs()
    other["all"]["fedara"]["1"]["facts"] = other["all"]["fedara"]["1"]["facts"] | {"data": {"train": "e"}}
    assert "all: runs of a seed had not the same data" in fairness(study(), {"runs": other})["why"]
    two = {"search": {"local.lr": [0.1, 0.2]}, "trials": 2}
    trials = {
        "all": {
            "fedavg": {"trials": [{}], "edge": []},
            "fedara": {"trials": [{}, {}], "edge": ["local.lr"]},
            "ffa_lora": {"trials": [{}], "edge": []},
        }
    }
    found = fairness(study(tuning=two), {"runs": runs(), "tuning": trials})
    assert found["why"] == ["all: the tuning of fedavg, ffa_lora has not come to its end"]
    assert "all: the best value that was tried is at an edge for fedara (local.lr)" in found["notes"]
    own = study(tuning={**two, "trials": 4, "own": {"fedara": {"method.target_rank": [1, 2]}}})
    trials["all"] = {arm: {"trials": [{}] * (4 if arm == "fedara" else 2)} for arm in ("fedavg", "fedara", "ffa_lora")}
    assert fairness(own, {"runs": runs(), "tuning": trials})["why"] == [
        "tuned with unequal effort, trials: fedavg 2, fedara 4, ffa_lora 2"
    ]
    assert "with as many trials, knobs or values of their own were searched for fedara (method.target_rank)" in fairness(own, {})["notes"]  # fmt: skip
    half = runs()
    half["all"]["fedara"]["1"]["facts"] = {**half["all"]["fedara"]["1"]["facts"], "numerics": {"compute": "bfloat16"}}
    half["all"]["fedara"]["1"]["rows_seen"] = 400.0
    found = fairness(study(), {"runs": half})
    assert found["why"] == ["all: some runs were computed in bfloat16 and some in float32 (engine.compute)"]
    assert "all: rows seen in training, times the least: fedara 2" in found["notes"]
    for codes, words in (
        ("c+d", "not all runs and trials were played with the same version of this program's code"),
        (None, "it is not known of all runs and trials which version of this program's code played them"),
    ):
        half["all"]["fedara"]["1"]["facts"]["code"] = codes
        assert f"all: {words}" in fairness(study(), {"runs": half})["notes"]
    tried = {"all": {"fedavg": {"trials": [{"code": "c", "score": 0.5}, {}], "edge": []}}}
    there = "all: not all runs and trials were played with the same version of this program's code"
    assert there not in fairness(study(), {"runs": runs(), "tuning": tried})["notes"]
    tried["all"]["fedavg"]["trials"] = [{"code": "d", "score": 0.5}]
    assert there in fairness(study(), {"runs": runs(), "tuning": tried})["notes"]
    longer = study(methods=..., arms={"fedavg": {}, "fedara": {"rounds": {"count": 9}}, "ffa_lora": {}})
    assert "rounds.count is 4 in fedavg and 9 in fedara" in fairness(longer, {"runs": runs()})["why"]


# ---- claims


def test_arms_that_are_one_are_told() -> None:
    mine = runs()
    mine["all"]["ffa_lora"] = mine["all"]["fedavg"]
    told = "all: fedavg and ffa_lora came to the same scores with every seed, as if they were one"
    assert told in fairness(study(), {"runs": mine})["notes"]
    for others in (runs(), {"all": {arm: {} for arm in runs()["all"]}}):
        assert not [note for note in fairness(study(), {"runs": others})["notes"] if "as if they were one" in note]


def claim(**more: Any) -> Claim:
    return Claim.model_validate({**CLAIM, **more})


def verdict(one: Claim, found: dict[str, Any], **more: Any) -> dict[str, Any]:
    asked = study(claims={"x": one.model_dump()}, settings=dict.fromkeys(found), **more)
    return dict(verdicts(asked, found, compared(asked, found, True))["x"])


def test_claims_are_judged_by_the_whole_interval() -> None:
    assert verdict(claim(), runs())["verdict"] == "confirmed"
    assert verdict(claim(arm="fedavg", against="fedara"), runs())["verdict"] == "refuted"
    assert verdict(claim(arm="ffa_lora"), runs())["verdict"] == "not shown"
    assert verdict(claim(confirmed={"above": 20}), runs())["verdict"] == "less than claimed"
    assert verdict(claim(confirmed={"above": 10.2}, refuted={"below": 10.2}), runs())["verdict"] == "not shown"
    same = {
        "all": {
            arm: {str(s): run(*[top] * 4) for s in (1, 2, 3)}
            for arm, top in (("fedavg", 0.5), ("fedara", 0.6), ("ffa_lora", 0.5))
        }
    }
    assert verdict(claim(), same)["settings"]["all"]["why"].startswith("the same in every seed")
    assert verdict(claim(of="bytes", confirmed={"below": 1.1}, refuted={"above": 1.1}), same)["verdict"] == "confirmed"
    costs = verdict(claim(of="bytes_up", confirmed={"below": 0.6}, refuted={"above": 0.6}), runs())
    assert costs["verdict"] == "confirmed"
    assert costs["settings"]["all"]["mean"] == pytest.approx(0.5)


def test_the_verdict_of_several_settings_hides_none() -> None:
    there = runs()["all"]
    level = {**there, "fedara": there["ffa_lora"]}
    turned = {**there, "fedara": there["fedavg"], "fedavg": there["fedara"]}
    assert verdict(claim(), {"one": there, "two": level})["verdict"] == "partly"
    assert verdict(claim(), {"one": there, "two": turned})["verdict"] == "mixed"
    assert verdict(claim(), {"one": level, "two": turned})["verdict"] == "refuted in part"
    assert verdict(claim(settings=["one"]), {"one": there, "two": turned})["verdict"] == "confirmed"
    more = claim(confirmed={"above": 20})
    assert verdict(more, {"one": there, "two": level})["verdict"] == "less than claimed in part"
    assert verdict(more, {"one": there, "two": turned})["verdict"] == "refuted in part"


def test_claims_up_to_a_target_need_it_reached_by_all() -> None:
    faster = claim(of="clock_seconds", to_target=True, confirmed={"below": 1.1}, refuted={"above": 1.1})
    assert verdict(faster, runs())["verdict"] == "confirmed"
    assert verdict(faster, runs(), target=0.53)["settings"]["all"]["why"] == "0 seeds have it in both arms"
    one = runs()
    one["all"]["fedara"]["1"] = run(0.1, 0.1, 0.1, 0.1)
    assert verdict(faster, one, target=0.4)["settings"]["all"]["why"] == "2 seeds have it in both arms"
    for odd in ({"to_target": True}, {"of": "round"}, {"of": "acuracy"}, {"confirmed": {}}, {"confirmed": {"above": 0, "below": 1}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"above or below|of:"):
            claim(**odd)


def test_a_weak_arm_does_not_move_the_target_of_others_claims() -> None:
    weak = runs()
    weak["all"]["ffa_lora"] = {seed: run(0.1, 0.1, 0.1, 0.1) for seed in "123"}
    faster = claim(of="bytes_up", to_target=True, confirmed={"below": 0.6}, refuted={"above": 0.6})
    assert verdict(faster, weak)["settings"]["all"] == verdict(faster, runs())["settings"]["all"]


# ---- tables


def whole(**more: Any) -> dict[str, Any]:
    asked = study(**more)
    found = {"study": asked.model_dump(mode="json"), "runs": runs(), "results": compared(asked, runs(), True)}
    return {**found, "fair": fairness(asked, found)}


def test_tables_for_people_and_programs() -> None:
    found = whole()
    text = tables.markdown(found)
    assert "| fedara   | 61.2 ± 0.6 %" in text
    assert "+10.2 (+10.0 to +10.4), p < 0.001" in text
    assert text.endswith(".\n")
    assert r"ffa\_lora" in tables.latex(found)
    assert r"$\pm$" in tables.latex(found)
    one = found["results"]["all"]["differences"]["fedara"]["accuracy"]
    lines = list(csv.DictReader(io.StringIO(tables.summaries(found))))
    (line,) = (r for r in lines if (r["arm"], r["measure"], r["to_target"]) == ("fedara", "accuracy", "False"))
    assert [float(line[n]) for n in ("seeds", "mean", "difference", "low", "high", "p_corrected")] == pytest.approx(
        [3, 0.612, 0.102, *one["interval"], one["p_corrected"]]
    )
    assert all(r["difference"] == r["p"] == "" for r in lines if r["arm"] == "fedavg")
    rows = list(csv.DictReader(io.StringIO(tables.values(found))))
    mine = [r for r in rows if (r["arm"], r["measure"], r["to_target"]) == ("fedara", "accuracy", "False")]
    assert [(r["seed"], float(r["value"])) for r in mine] == [("1", 0.606), ("2", 0.612), ("3", pytest.approx(0.618))]
    assert {r["to_target"] for r in rows} == {"True", "False"}
    assert len(tables.terminal(found, 1000)) == 4


def test_how_private_and_how_long_waited_for_are_in_the_tables() -> None:
    found = runs()
    for seeds in found["all"].values():
        for one in seeds.values():
            one["summary"] |= {"epsilon": 2.5, "waiting_seconds": 30.0}
    head, *rows = tables.final(compared(study(), found, True)["all"])
    assert [[row[head.index(name)] for name in ("epsilon", "mean wait")] for row in rows] == [["2.5", "30 s"]] * 3
    assert not {"epsilon", "mean wait"} & set(tables.final(compared(study(), runs(), True)["all"])[0])
    ratios = tables.ratios(compared(study(), runs(), True)["all"], "fedavg", True)
    assert "adapter bytes" in ratios[0]


def test_several_settings_stand_side_by_side_first() -> None:
    """With the mean over them, where every setting has one."""
    asked = study(settings={"one": {}, "two": {}})
    mine = runs()["all"]
    other = {arm: {seed: run(0.1, 0.3, 0.5, 0.5) for seed in seeds} for arm, seeds in mine.items() if arm != "ffa_lora"}
    results = compared(asked, {"one": mine, "two": other}, True)
    found = {"study": asked.model_dump(mode="json"), "results": results, "fair": {"verdict": True, "notes": []}}
    title, rows = tables.all_of(found)[0]
    assert title == "accuracy, by setting"
    assert rows[0] == ["", "one", "two", "mean"]
    means = {arm: [cell.split(" ")[0] for cell in cells] for arm, *cells in rows[1:]}
    assert means["fedara"] == ["61.2", "50.0", "55.6"]
    assert means["ffa_lora"][1:] == ["–", "–"]
    assert not tables.across(whole())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_no_number_off(width: int) -> None:
    found = whole()
    console = Console(width=width, file=io.StringIO(), record=True)
    for table in tables.terminal(found, width):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    told = [cell for _, (_, *rows) in tables.all_of(found) for row in rows for cell in row]
    assert all(cell in text for cell in told)


def test_what_only_some_seeds_reach_is_no_ratio() -> None:
    """Those that do are the lucky ones."""
    found = compared(study(target=0.436), runs(), True)["all"]
    assert [row[:2] for row in tables.to_target(found)[1:]] == [
        ["fedavg", "3 of 3"],
        ["fedara", "3 of 3"],
        ["ffa_lora", "2 of 3"],
    ]
    assert "to_target.bytes" in found["differences"]["fedara"]
    assert not [name for name in found["differences"]["ffa_lora"] if name.startswith("to_target.")]


def test_a_difference_that_is_the_same_in_every_seed_is_not_called_none() -> None:
    mine = runs()
    for arm, top in (("fedavg", 0.5), ("fedara", 0.55)):
        mine["all"][arm] = {str(seed): run(0.1, top, top, top) for seed in (1, 2, 3)}
    found = compared(study(), mine, True)["all"]
    assert found["differences"]["fedara"]["accuracy"]["p"] is None
    assert "As far from it in every seed, of which no test can be made: fedara (+5.0 points)." in found["conclusion"]
    assert "fedara" not in found["conclusion"].partition("Not told apart")[2]


def test_a_small_ratio_keeps_its_digits() -> None:
    mine = runs()
    mine["all"]["fedara"] = {str(s): run(0.1, 0.4, 0.6, 0.6, factor=0.003 + 0.0001 * s) for s in (1, 2, 3)}
    one = compared(study(), mine, True)["all"]["differences"]["fedara"]["bytes_up"]
    assert within(one["mean"], one["interval"], False).startswith("0.00320 times (0.0029")
    assert [factor(x) for x in (0.55, 1.0, 12.34, 123.4, 1234.5)] == ["0.550", "1.00", "12.3", "123", "1,234"]


def test_an_unfair_comparison_concludes_nothing() -> None:
    """And no table has a test in it, whatever its form."""
    found = whole(seeds=4)
    said = " ".join(tables.said(found))
    assert not [text for text in (tables.markdown(found), tables.latex(found)) if ", p " in text]
    assert {r["p"] for r in csv.DictReader(io.StringIO(tables.summaries(found)))} == {""}
    assert ", p " in tables.latex(whole())
    assert tables.latex(found).startswith("% Not a fair comparison, so nothing is concluded: all: fedavg has no run of")
    assert said.startswith("Not a fair comparison, so nothing is concluded: all: fedavg has no run of seed 4")
    assert "Better" not in said


# ---- played


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods on rows of one's own, small enough for seconds."""
    folder = tmp_path_factory.mktemp("small")
    rows = [{"text": f"{word} {at} {word}", "label": word} for at in range(30) for word in ("up", "down")]
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    return write(folder / "small.yaml", {
        "base": {"data": {"path": str(folder / "rows.csv")}, "clients": {"count": 3}, "rounds": {"count": 3, "cohort": 2, "evaluate_every": 1},
                 "local": {"max_length": 8}},
        "methods": ["fedavg", "ffa_lora"], "seeds": 2,
        "tuning": {"search": {"local.lr": [0.003, 0.03]}, "trials": 2, "config": {"rounds": {"count": 1}}},
    })  # fmt: skip


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedrank.cli", "compare", *map(str, words)]


def test_the_record_is_in_the_order_of_the_study(small: Path, tmp_path: Path) -> None:
    """Whatever was told first, and when it is opened once more."""
    study = read(small, ["seeds=3"])
    told = [(arm, seed) for arm in reversed(study.arms) for seed in reversed(study.seeds)]
    one = comparison.opened(study, tmp_path, tmp_path / "runs", 1)
    assert [one.ran("all", arm) for arm in reversed(study.arms)] == [{}, {}]
    for arm in reversed(study.arms):
        for lr in (0.03, 0.003):
            trial = {"knobs": {"local.lr": lr}, "score": lr, "digest": digest(one.trial("all", arm, {"local.lr": lr}))}
            one.record({"event": "run", "setting": "all", "arm": arm, "seed": None, "run": trial})
        found = {
            "asked": one.asked(arm),
            "trials": one.tuned("all", arm)["trials"],
            "best": {"local.lr": 0.03},
            "edge": [],
        }
        one.record({"event": "tuned", "setting": "all", "arm": arm, "found": found})
    for arm, seed in told:
        run = runs()["all"]["fedavg"]["1"] | {"digest": digest(one.run("all", arm, seed))}
        one.record({"event": "run", "setting": "all", "arm": arm, "seed": seed, "run": run})
    before = (tmp_path / "comparison.json").read_bytes()
    assert [(arm, int(seed)) for arm, mine in record.read(tmp_path)["runs"]["all"].items() for seed in mine] == told[
        ::-1
    ]
    assert list(record.read(tmp_path)["tuning"]["all"]) == list(study.arms)
    comparison.opened(study, tmp_path, tmp_path / "runs", 1).save()
    assert (tmp_path / "comparison.json").read_bytes() == before


def ended(folder: Path, accuracy: float | None, error: str = "TrainingError: the loss became nan") -> None:
    """What a finished run leaves; without a score no client's update was merged."""
    answered = 0 if accuracy is None else 2
    summary = {"accuracy": accuracy or 0.1, "clients_ok": answered, "numerics": {"compute": "float32"}, "code": "c"}
    facts = {"hash": {"train": "d"}, "model": {"fingerprint": "m"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "data.json").write_text(json.dumps(facts))
    rows = [{**point, "wall_seconds": 1.0} for point in curve(accuracy or 0.1)]
    (folder / "rounds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    failed = {"round": 1, "client": "c1", "ok": False, "error": error}
    (folder / "clients.jsonl").write_text("" if answered else json.dumps(failed) + "\n")


@dataclass
class Stage:
    """In the place of a run's process. ends: learning rate -> the score it ends with, the error of its clients, or the
    signal that kills it. asked: what was begun or gone on with, of which rate; the forecast's are not known."""

    ends: dict[float, float | str | signal.Signals]
    asked: list[tuple[str, float]] = field(default_factory=list)

    def call(self, words: list[str], log: Any) -> int:
        verb, folder = words[3], Path(words[-3])
        config = yaml.safe_load(folder.with_name(f"{folder.name}.yaml").read_text())
        if (lr := config["local"].get("lr")) is None:
            return 1
        self.asked.append((verb, lr))
        match self.ends[lr]:
            case signal.Signals() as killed:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.yaml").touch()
                return -killed
            case str(error):
                ended(folder, None, error)
                return 1
            case score:
                ended(folder, score)
                return 0


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage({0.003: 0.5, 0.03: 0.6})
    monkeypatch.setattr(Processes, "call", lambda _, words, log: found.call(words, log))
    return found


ONE = ["methods=[fedavg]", "seeds=1"]


def test_a_study_of_one_s_own_is_not_overwritten(small: Path, tmp_path: Path, stage: Stage) -> None:
    text = "# mine\n" + small.read_text()
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(StoreError, match=r"study\.yaml is there, where the study as it is resolved would be written"):
        list(play(read(tmp_path / "study.yaml", ONE), tmp_path))
    assert (tmp_path / "study.yaml").read_text() == text
    out = tmp_path / "out"
    list(play(read(small, ONE), out))
    list(play(read(out / "study.yaml", ["seeds=2"]), out))  # as its page says it is run again
    assert record.read(out)["study"]["seeds"] == [1, 2]


def test_methods_by_the_command_line(small: Path, tmp_path: Path, stage: Stage) -> None:
    """As the README has it, on a run's config: the forecast alone, then all of it, one at once."""
    config = write(tmp_path / "mine.yaml", yaml.safe_load(small.read_text())["base"])
    stage.ends = defaultdict(lambda: 0.5)
    words = ["compare", str(config), "--methods", "fedavg,ffa_lora", "--seeds", "2", "--workers", "1"]
    for more, runs in ((["--forecast"], 0), ([], 2 * 4 + 2 * 2)):
        done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), *more])
        assert done.exit_code == 0, done.output
        assert len(stage.asked) == runs
        assert "8 trials and 4 runs, 1 at once" in done.output
    assert list(record.read(tmp_path / "out")["study"]["arms"]) == ["fedavg", "ffa_lora"]
    assert "Not told apart" in done.output or "As far from it" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"comparison.json", "comparison.csv", "seeds.csv"}


def test_a_trial_that_is_killed_is_no_result(small: Path, tmp_path: Path, stage: Stage, capsys: Any) -> None:
    """It is told as a run's failure is, and gone on with when the study is; no run is played with half a tuning."""
    stage.ends[0.03] = signal.SIGKILL
    for event in play(read(small, ONE), tmp_path):
        views.study(event)
    told, found = " ".join(capsys.readouterr().out.split()), record.read(tmp_path)
    error = "its trial of local.lr=0.03: it was ended by SIGKILL, as when memory runs out"
    assert found["failures"] == [{"setting": "all", "arm": "fedavg", "seed": None, "error": error}]
    assert f"failed: all fedavg tuning: {error}" in told
    assert "all: fedavg has no run of seed 1; all: the tuning of fedavg has not come to its end." in told
    assert "What failed is played again when the study is started again." in told
    assert "error" not in str(found["tuning"])
    assert found["runs"] == {"all": {"fedavg": {}}}

    stage.ends[0.03] = 0.6
    stage.asked.clear()
    *_, end = play(read(small, ONE), tmp_path)
    assert ("resume", 0.03) in stage.asked
    assert end["comparison"]["tuning"]["all"]["fedavg"]["best"] == {"local.lr": 0.03}
    assert end["comparison"]["fair"]["verdict"]
    assert not end["comparison"]["failures"]


def test_a_trial_whose_clients_ran_out_of_memory_is_no_result(small: Path, tmp_path: Path, stage: Stage) -> None:
    """Nothing was merged, and not for what was learnt; it is played from its start when the study goes on."""
    stage.ends[0.03] = f"OutOfMemoryError: {STAYS}"
    *_, failed, _ = play(read(small, ONE), tmp_path)
    assert failed["event"] == "failed"
    assert f"client c1 in round 1: OutOfMemoryError: {STAYS}; see all-fedavg-trial-" in failed["error"]
    stage.ends[0.03] = 0.6
    *_, end = play(read(small, ONE), tmp_path)
    assert end["comparison"]["fair"]["verdict"]
    assert stage.asked.count(("run", 0.03)) == 3  # and the seed's


def test_a_trial_that_came_to_nothing_counts_and_is_told(
    small: Path, tmp_path: Path, stage: Stage, capsys: Any
) -> None:
    stage.ends[0.03] = f"Error: {STAYS}"  # as clients say that protect themselves
    for event in play(read(small, ONE), tmp_path):
        views.study(event)
    told, found = capsys.readouterr().out, record.read(tmp_path)
    assert "local.lr=0.03  counts as the worst: no client's update was merged in any round; see all-fedavg-" in told
    assert found["tuning"]["all"]["fedavg"]["best"] == {"local.lr": 0.003}
    assert found["fair"]["verdict"]
    assert "all: trials that came to nothing and count as the worst: fedavg 1" in found["fair"]["notes"]


def test_an_arm_without_a_single_score_is_tuned_again(small: Path, tmp_path: Path, stage: Stage) -> None:
    """Once in a start; where a trial has a score, the others are known."""
    stage.ends = dict.fromkeys(stage.ends, "TrainingError: the loss became nan")
    for _ in range(2):
        stage.asked.clear()
        forecast, *_, end = play(read(small, ONE), tmp_path)
        assert forecast["trials"] == 2
        assert sorted(stage.asked) == [("run", 0.003), ("run", 0.03)]
        assert "all: no trial of fedavg has a score" in end["comparison"]["fair"]["why"]
        assert end["comparison"]["failures"][0]["error"].startswith("none of its trials has a score, the last with: no")
    stage.ends[0.03] = 0.6
    *_, end = play(read(small, ONE), tmp_path)
    assert end["comparison"]["fair"]["verdict"]
    stage.asked.clear()
    forecast, _ = play(read(small, ONE), tmp_path)
    assert (forecast["trials"], forecast["runs"], stage.asked) == (0, 0, [])


def test_what_is_no_number_is_told_as_nothing(tmp_path: Path) -> None:
    """No mean could be taken of it."""
    ended(tmp_path / "run", 0.5)
    with (tmp_path / "run" / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({**curve(0.5)[0], "round": 2, "wall_seconds": 1.0, "loss": math.nan}) + "\n")
    assert measured(tmp_path / "run")["curve"][-1]["loss"] is None


def test_the_code_is_that_of_who_played(tmp_path: Path) -> None:
    ended(tmp_path / "run", 0.5)
    assert measured(tmp_path / "run")["facts"]["code"] == "c"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "code"}))
    assert measured(tmp_path / "run")["facts"]["code"] is None


def test_the_name_of_another_folder_of_runs_is_kept(small: Path, tmp_path: Path, stage: Stage) -> None:
    *_, end = play(read(small, ONE), tmp_path / "out", tmp_path / "elsewhere")
    assert end["comparison"]["runs_folder"] == "elsewhere"
    *_, end = play(read(small, ONE), tmp_path / "out", tmp_path / "out" / "runs")
    assert "runs_folder" not in end["comparison"]


@pytest.mark.slow
def test_a_study_is_killed_and_goes_on(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(small, "methods=[fedavg]", "--out", out, "-o", "json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(2)]  # the forecast and a trial
        process.send_signal(signal.SIGKILL)
    assert [event["event"] for event in seen] == ["forecast", "run"]
    assert (seen[0]["trials"], seen[0]["runs"]) == (2, 2)
    kept = record.read(out)
    assert len(kept["tuning"]["all"]["fedavg"]["trials"]) >= 1
    assert kept["fair"]["verdict"] is False

    done = subprocess.run(words, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["trials"] <= 1
    assert [event["event"] for event in events[1:]] == ["run"] * (events[0]["trials"] + 2) + ["end"]
    found = record.read(out)
    assert found["fair"]["verdict"]
    assert {arm: [*mine] for arm, mine in found["runs"]["all"].items()} == {"fedavg": ["1", "2"]}
    assert {trial["knobs"]["local.lr"] for trial in found["tuning"]["all"]["fedavg"]["trials"]} == {0.003, 0.03}
    assert found["runs"]["all"]["fedavg"]["1"]["curve"][-1]["round"] == 3
    assert (out / "comparison.md").read_text().startswith("**in the end: ")
    assert read(out / "study.yaml") == read(small, ["methods=[fedavg]"])
    assert {path.suffix for path in out.iterdir() if path.is_file()} >= {".json", ".csv", ".md", ".tex"}

    before = (out / "comparison.json").read_bytes()
    again = CliRunner().invoke(app, [*words[3:-2], "--runs", str(tmp_path / "elsewhere")])
    assert again.exit_code == 0, again.output
    assert "0 trials and 0 runs" in again.output  # comparison.json alone is enough
    seen: list[str] = []
    assert fedrank.compare(small, "methods=[fedavg]", out=out, watch=lambda event: seen.append(event["event"])) == found
    assert seen == ["forecast", "end"]
    assert (out / "comparison.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.exhaustive  # what a study makes of it is tested without processes, too
def test_a_trial_that_diverges_is_tried_and_counts_as_the_worst(small: Path, tmp_path: Path) -> None:
    """And what was tuned for another search, or by another score, is tuned again; runs of before are kept beside."""
    out, words = tmp_path / "out", ["methods=[fedavg]", "seeds=1", "tuning.search={local.lr: [0.01, 1.0e+38]}"]
    found = fedrank.compare(small, *words, out=out)
    trials = found["tuning"]["all"]["fedavg"]["trials"]
    assert sorted(str(trial["score"]) for trial in trials)[-1] == "None"
    assert next(trial["error"] for trial in trials if trial["score"] is None).startswith(
        "no client's update was merged"
    )
    assert found["tuning"]["all"]["fedavg"]["best"] == {"local.lr": 0.01}
    assert found["fair"]["verdict"]
    assert "all: trials that came to nothing and count as the worst: fedavg 1" in found["fair"]["notes"]
    words[2] = "tuning.search={local.lr: [0.01, 0.02]}"
    again = comparison.opened(read(small, words), out, out / "runs", 1)
    assert again.trials_left("all", "fedavg") == 1
    assert again.best("all", "fedavg") is None
    assert len(list(out.glob("comparison-*.json"))) == 1


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_too(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(small, "tuning=null", "base.rounds.count=500", "--seeds", "1", "--out", out)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("forecast: ")
        while len(list(out.glob("runs/*/rounds.jsonl"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what is played is kept. Go on with: fedrank compare" in errors
    time.sleep(0.5)
    lengths = [len(path.read_text().splitlines()) for path in sorted(out.glob("runs/*/rounds.jsonl"))]
    time.sleep(1)
    assert lengths == [len(path.read_text().splitlines()) for path in sorted(out.glob("runs/*/rounds.jsonl"))]


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_left_out(small: Path, tmp_path: Path) -> None:
    """Krum needs more clients than come."""
    out = tmp_path / "out"
    words = ["tuning=null", "base.server={aggregation: krum, hostile: 1}", "methods=[fedavg]"]
    done = CliRunner().invoke(app, ["compare", str(small), *words, "--seeds", "1", "--out", str(out)])
    assert done.exit_code == 1, done.output
    assert "failed: all  fedavg  seed 1: " in done.output
    assert "Not a fair comparison, so nothing is concluded: all: fedavg has no run of seed 1" in " ".join(
        done.output.split()
    )
    assert record.read(out)["failures"][0]["arm"] == "fedavg"


def test_a_comparison_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"schema": 99}')
    with pytest.raises(StoreError, match="schema 99, this fedrank reads 1"):
        record.read(tmp_path)
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(StoreError, match="schema None"):
        record.read(tmp_path)
    with pytest.raises(StoreError, match="is no comparison"):
        record.read(tmp_path / "nothing")


def test_json_has_a_line_for_what_holds_nothing_nested() -> None:
    text = record.text({"a": [1, 2], "b": {"c": {"d": 1, "e": "f"}}})
    assert json.loads(text) == {"a": [1, 2], "b": {"c": {"d": 1, "e": "f"}}}
    assert '"a": [1, 2]' in text
    assert json.loads(record.text({"a": [["x [y", "  "]], "b": []})) == {"a": [["x [y", "  "]], "b": []}


def test_the_studies_of_the_benchmarks_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRANK_DATA", os.environ.get("FEDRANK_DATA", "sets"))
    folder = Path(__file__).parents[1] / "benchmarks"
    files = [folder / "methods.yaml", *sorted((folder / "reproduce").glob("*.yaml"))]
    assert len(files) == 5
    for file in files:
        found = read(file)
        assert found.differing() == []
        assert len(found.seeds) == 5
        assert found.claims or file.stem == "methods"


def test_the_page_of_results_is_what_the_results_say() -> None:
    """benchmarks/results_page.py was run after the results last changed."""
    root = Path(__file__).parents[1]
    script = (
        "import json, results_page; print(json.dumps({str(path): text for path, text in results_page.pages().items()}))"
    )
    written = subprocess.run(
        [sys.executable, "-c", script], cwd=root / "benchmarks", capture_output=True, text=True, check=True
    ).stdout
    for path, text in json.loads(written).items():
        assert Path(path).read_text(encoding="utf-8") == text, path


def test_every_verdict_says_why() -> None:
    """And nothing is explained that was not asked."""
    folder = Path(__file__).parents[1] / "benchmarks"
    said = yaml.safe_load((folder / "whys.yaml").read_text())["claims"]
    for file in sorted((folder / "reproduce").glob("*.yaml")):
        claims = yaml.safe_load(file.read_text())["claims"]
        assert said.get(file.stem, {}).keys() <= claims.keys()
        there = folder / "results" / "reproduce" / file.stem
        if (there / record.FILE).exists() and record.read(there)["claims"]:  # else it is still being played
            assert said.get(file.stem, {}).keys() == claims.keys(), f"write into whys.yaml why {file.stem} came out so"
