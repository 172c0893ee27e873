"""Configs: what is wrong is named, with what would be right."""

from pathlib import Path
from typing import Any

import pytest

from fedrank import config, methods
from fedrank.config import Config, ConfigError, load

DATA = {"data": {"name": "docstrings"}}


def problem(raw: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as found:
        load(raw, overrides)
    return str(found.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("local.batchsize", "did you mean 'local.batch_size'?"),
        ("local.max_len", "did you mean 'local.max_length'?"),
        ("lcoal", "did you mean 'local'?"),
        ("data.partition.alfa", "did you mean 'data.partition.alpha'?"),
        ("data.columns.lable", "did you mean 'data.columns.label'?"),
        ("partition", "did you mean 'data.partition'?"),
        ("batch_size", "did you mean 'local.batch_size'?"),
        ("model.rank", "did you mean 'adapter.rank'?"),
        ("wire.zzz", "known here: wire.dtype"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, near: str) -> None:
    """The nearest of its own section first; a right word in a wrong section is told its place."""
    assert problem(DATA, f"{key}=1") == f"config: unknown key {key!r}; {near}"


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ("wire.dtype=fp16", "wire.dtype: input should be 'f64', 'f32', 'f16', 'bf16' or 'int8', got 'fp16'; did you mean 'f16'?"),
        ("data.partition.kind=dirichelt", "got 'dirichelt'; did you mean 'dirichlet'?"),
        ("local.schedule=warm", "local.schedule: input should be 'constant', 'linear' or 'cosine', got 'warm'"),
        ("local.lr=fast", "local.lr: input should be a valid number"),
        ("local.lr=0", "local.lr: input should be greater than 0, got 0"),
        ("local.lr=.nan", "local.lr: input should be"),
        ("local.lr=.inf", "local.lr: input should be a finite number"),
        ("rounds.deadline=.inf", "rounds.deadline: input should be a finite number"),
        ("rounds.count=0", "rounds.count: input should be greater than 0, got 0"),
        ("rounds.count=2.5", "rounds.count: input should be a valid integer"),
        ("engine.failure_rate=1.1", "engine.failure_rate: input should be less than or equal to 1, got 1.1"),
        ("local.dropout=1", "local.dropout: input should be less than 1"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("adapter.targets=[]", 'adapter.targets: must be "all", or the ends of names, such as [query, value]'),
        ("local=5", "local: input should be a valid dictionary"),
        ("method=fedavg", "method: input should be a valid dictionary"),
        ("method={rank: 3}", "method.name must name a method; `fedrank methods` lists them"),
        ("data.path=here", "give one of data.name (docstrings, or a Hugging Face dataset) and data.path"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_key_and_what_is_allowed(item: str, why: str) -> None:
    assert why in problem(DATA, item)


def test_every_problem_is_told_at_once() -> None:
    lines = problem(DATA, "local.lr=0", "seeed=1", "wire.dtype=f8").splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "local.lr",
        "wire.dtype",
        "unknown key 'seeed'; did you mean 'seed'?",
    ]


def test_data_is_a_name_or_a_path() -> None:
    assert "give one of data.name" in problem({})
    assert load({"data": {"path": "rows.csv"}}).data.path == "rows.csv"
    assert load({"data": {"name": "ag_news"}}).data.name == "ag_news"
    assert "data.path: input should be a valid string" in problem({"data": {"path": Path("rows.csv")}})


# ---- overrides


def test_overrides_go_on_top_the_last_one_wins() -> None:
    raw = {**DATA, "local": {"lr": 0.5, "epochs": 2}}
    found = load(raw, ["local.lr=0.1", "local.lr=0.2", "data.partition.alpha=3", "adapter.targets=[q, v]"])
    assert (found.local.lr, found.local.epochs, found.data.partition.alpha) == (0.2, 2, 3.0)
    assert found.data.name == "docstrings"
    assert found.adapter.targets == ("q", "v")
    assert raw == {**DATA, "local": {"lr": 0.5, "epochs": 2}}  # what was given is left alone


@pytest.mark.parametrize("overrides", [["method.name=fedprox", "method.mu=1"], ["method.mu=1", "method.name=fedprox"]])
def test_another_method_has_its_own_hyper_parameters(overrides: list[str]) -> None:
    raw = {**DATA, "method": {"name": "fedara", "target_rank": 2}}
    assert load(raw, overrides).method == {"name": "fedprox", "mu": 1}
    assert load(raw, ["method.name=fedara"]).method == raw["method"]
    assert raw["method"] == {"name": "fedara", "target_rank": 2}


def test_an_override_keeps_the_method_it_does_not_name() -> None:
    assert load({**DATA, "method": {"name": "fedara"}}, ["method.target_rank=2"]).method == {
        "name": "fedara",
        "target_rank": 2,
    }


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001"])
def test_numbers_that_yaml_takes_for_text(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-3, without a dot, as a string."""
    assert load(DATA, [f"local.lr={text}"]).local.lr == 0.001
    (tmp_path / "run.yaml").write_text(f"data: {{name: docstrings}}\nlocal: {{lr: {text}}}\n")
    assert load(tmp_path / "run.yaml").local.lr == 0.001


def test_null_unsets() -> None:
    assert load({**DATA, "local": {"clip": 2.0}}, ["local.clip=null"]).local.clip is None


@pytest.mark.parametrize("item", ["local.lr", "local.lr 0.1", "=1", ""])
def test_an_override_without_a_value(item: str) -> None:
    assert problem(DATA, item) == f"override {item!r} is not of the form key=value, such as local.lr=0.01"


def test_an_override_below_a_value() -> None:
    assert problem({**DATA, "seed": 3}, "seed.x=1") == "override 'seed.x': 'seed' is a value, not a section"


def test_an_override_that_is_no_yaml_is_text() -> None:
    assert "got '['" in problem(DATA, "local.lr=[")


# ---- files


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"data: [", "not YAML: while parsing a flow node"),
        (b"data: {name: a}\n  local: 3", "not YAML"),
        (b"data: \xff\xfe", "not YAML"),
        (b"- a\n- b", "a config is a mapping of sections, this is list"),
        (b"", "a config is a mapping of sections, this is NoneType"),
        (b"x: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
        (b"1: 2", "1: keys should be strings"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    found = problem(path)
    assert found.startswith(f"{path}: ")
    assert why in found
    assert found.count("\n") <= 1


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "clinc150.yaml").write_text("")
    assert problem(tmp_path / "clinic150.yaml").endswith(f"did you mean {str(tmp_path / 'clinc150.yaml')!r}?")
    assert problem("quickstrat") == "no config file or preset 'quickstrat'; did you mean 'quickstart'?"
    assert problem("/no/such/place.yaml") == "no config file or preset '/no/such/place.yaml'"


@pytest.mark.parametrize("name", config.presets())
def test_presets_load(name: str) -> None:
    assert isinstance(load(name, ["seed=5"]), Config)
    assert load(name, ["seed=5"]).seed == 5


def test_centralized_is_the_quickstart_with_one_client() -> None:
    """As many rows are seen, on the same model and data."""
    one, many = load("centralized"), load("quickstart")
    assert (one.clients.count, one.rounds.cohort, one.method["name"], one.server.optimizer) == (1, 1, "fedavg", "none")
    assert (one.model, one.data.name, one.adapter) == (many.model, many.data.name, many.adapter)
    assert one.rounds.count * many.clients.count == many.rounds.count * many.rounds.cohort


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    for source in [DATA, *config.presets()]:
        once = load(source, ["adapter.targets=[q, v]", "local.lr=1e-3", "data.train_limit=9", "rounds.deadline=1.5"])
        (tmp_path / "config.yaml").write_text(config.dump(once))
        assert load(tmp_path / "config.yaml") == once
        assert load(once.model_dump()) == once


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(DATA).local.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"slack": -1}, "method: slack must not be negative, got -1.0"),
        ({"slack": "wide"}, "method.slack: input should be a valid number, unable to parse string as a number, got 'wide'"),
        ({"ranks": "increasin"}, "method.ranks: input should be 'increasing', 'uniform' or 'decreasing', got 'increasin'; did you mean 'increasing'?"),
    ],
)  # fmt: skip
def test_a_wrong_hyper_parameter_is_explained_as_any_key(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as found:
        methods.build({"name": "legend", **given})
    assert str(found.value) == why


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"device": "cuda", "engine": {"workers": 2}}, "engine.workers: processes that share the work are for CPUs"),
        ({"engine": {"kind": "flower-simulation"}, "device": "cuda"}, "device=cuda: Flower's simulation gives"),
        (
            {"task": "generate", "model": {"pooling": "mean"}},
            "model.pooling=mean: with task generate nothing is pooled",
        ),
        ({"engine": {"timing": "measured", "stack": 2}}, "stack: the time of clients that are trained together"),
        (
            {"task": "generate", "local": {"max_length": 1}},
            "local.max_length=1: a token is predicted after another one",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(settings, wrong):
    with pytest.raises(ConfigError, match=wrong):
        load({"data": {"name": "docstrings"}, **settings})
