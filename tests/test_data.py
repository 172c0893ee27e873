"""Reading rows: every format gives the same rows, and a bad row is named by file and line."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrank import config
from fedrank.training.data import Dataset, Rows, configured, load, stratified, validation
from fedrank.training.sources import DataError

GOOD = [{"text": "a film", "label": 0}, {"text": "a good film", "label": 1}, {"text": "so so", "label": 0}]


def get(path: Path | str, task: str = "classify", **options: Any) -> Dataset:
    settings: dict[str, Any] = {"columns": {}, "train_limit": None, "seed": 0, **options}
    return load(None, path, task, **settings)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """These files, and a good train and test where they have none."""
    for split in ("train", "test"):
        if not any(name.startswith(split + ".") for name in files):
            files = {**files, f"{split}.jsonl": jsonl(GOOD)}
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(
    "suffix", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"]
)
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": 'He said "é, no"', "label": 1, "client": "x"}, {"text": "two", "label": 0, "client": "y"}]
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    else:
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        text = {
            "j": jsonl(rows),
            "c": 'text,label,client\n"He said ""é, no""",1,x\ntwo,0,y\n',
            "t": "".join("\t".join(map(str, fields)) + "\n" for fields in table),
        }[suffix[0]]
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    (tmp_path / f"test.{suffix}").write_bytes(path.read_bytes())
    data = get(tmp_path)
    assert data.train.text == ['He said "é, no"', "two"]
    assert data.train.label is not None
    assert data.train.label.dtype == np.int64
    assert data.train.label.tolist() == [1, 0]
    assert data.train.client == ["x", "y"]
    assert data.labels == ("0", "1")
    assert data.test.client is None  # whose a test row is nobody asks
    assert replace(data.train, client=None).digest() == data.test.digest()


def test_a_cell_of_a_table_may_be_a_whole_document(tmp_path: Path) -> None:
    table = f"text,label\n{'long ' * 40_000},a\nshort,b\n"
    assert len(get(write(tmp_path, {"train.csv": table, "test.csv": table})).train.text[0]) == 200_000


def test_whose_rows_they_are_matters_to_natural_clients_alone(tmp_path: Path) -> None:
    rows = jsonl([{"text": f"t{at}", "label": at % 2, "shop": " " * (at == 3) or "north"} for at in range(20)])
    folder = write(tmp_path, {"train.jsonl": rows, "test.jsonl": jsonl(GOOD[:2])})
    base = {"data": {"path": str(folder), "columns": {"client": "shop"}}}
    assert configured(config.load(base)).train.client is None
    with pytest.raises(DataError, match=r"train\.jsonl:4: column 'shop' holds ' '; it must be"):
        configured(config.load(base, ["data.partition.kind=natural"]))


def test_a_quoted_csv_field_may_span_lines_and_the_next_row_has_the_right_line(tmp_path: Path) -> None:
    table = 'text,label\n"one\ntwo",a\n'
    assert get(write(tmp_path, {"train.csv": table, "test.csv": table})).train.text == ["one\ntwo"]
    with pytest.raises(DataError, match=r"train\.csv:4: 3 fields; the header has 2"):
        get(write(tmp_path, {"train.csv": table + "three,a,extra\n", "test.csv": table}))


BAD: list[tuple[str, str | bytes, str]] = [
    ("train.jsonl", jsonl(GOOD[:1]) + "{not json\n", r"train\.jsonl:2: not JSON"),
    ("train.jsonl", jsonl(GOOD[:1]) + "[1]\n", r"train\.jsonl:2: .* is not an object"),
    ("train.jsonl", "[" * 100_000 + "\n", r"train\.jsonl:1: not JSON"),
    ("train.json", '[{"text": "a", "label": 0}]', r"train\.json:1: .* is not an object"),
    (
        "train.jsonl",
        '\n{"txt": "a", "label": 0}\n',
        r"train\.jsonl:2: no column 'text', the nearest is 'txt'; set data",
    ),
    (
        "train.jsonl",
        '{"text": 3, "label": 0}\n',
        r"train\.jsonl:1: column 'text' holds 3; it must be a non-empty string",
    ),
    ("train.jsonl", '{"text": " ", "label": 0}\n', r"train\.jsonl:1: column 'text' holds ' '; it must be"),
    ("train.jsonl", '{"text": "\\ud800", "label": 0}\n', r"train\.jsonl:1: column 'text' holds a lone surrogate"),
    ("train.jsonl", '{"text": "a", "label": true}\n', r"train\.jsonl:1: column 'label' holds True; it must be"),
    ("train.jsonl", '{"text": "a", "label": 1.0}\n', r"train\.jsonl:1: column 'label' holds 1\.0"),
    ("train.jsonl", jsonl([*GOOD, {"text": "a", "label": 3}]), r"train\.jsonl:4: label 3, but there are 3 classes"),
    ("train.jsonl", jsonl([*GOOD, {"text": "a", "label": -1}]), r"train\.jsonl:4: label -1, but"),
    ("train.jsonl", jsonl([*GOOD, {"text": "a", "label": "b"}]), r"train\.jsonl:1: label 0 is an integer among names"),
    ("test.jsonl", jsonl([*GOOD, {"text": "a", "label": 2}]), r"test\.jsonl:4: label 2 is outside 0\.\.1"),
    ("test.jsonl", jsonl([{"text": "a", "label": "o"}]), r"test\.jsonl:1: unknown label 'o' among 2, the nearest is '"),
    ("train.csv", "text,label\na,0\nb\n", r"train\.csv:3: 1 fields; the header has 2"),
    ("train.csv", 'text,label\na,0\n"b,0\n', r"train\.csv:3: not valid CSV"),
    ("train.csv", "text,text\na,0\n", r"train\.csv:1: a column name is repeated"),
    ("train.jsonl", jsonl(GOOD).encode() + b"\xff\n", r"train\.jsonl:4: not UTF-8"),
    ("train.jsonl.gz", b"not gzip", r"train\.jsonl\.gz:1: cannot be read"),
    ("train.parquet", b"not parquet", r"train\.parquet:1: not a readable parquet file"),
    ("train.jsonl", "", r"train\.jsonl:1: no rows"),
    ("train.csv", "text,label\n", r"train\.csv:1: no rows"),
    ("train.xlsx", "", r"train\.xlsx:1: unknown suffix; use \.jsonl"),
    ("train.parquet.gz", b"", r"train\.parquet\.gz:1: unknown suffix"),
    ("labels.txt", "a\na\n", r"labels\.txt:2: an empty or repeated class name"),
    ("labels.txt", "", r"labels\.txt:1: no class names"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    if name == "train.parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    with pytest.raises(DataError, match=message):
        get(write(tmp_path, {name: content}))


def test_labels_txt_names_the_ids(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}]
    data = get(write(tmp_path, {"labels.txt": "bad\ngood\nnever used\n", "train.jsonl": jsonl(rows)}))
    assert data.labels == ("bad", "good", "never used")
    assert data.train.label is not None
    assert data.train.label.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"train\.jsonl:1: unknown label 'goood' among 3, the nearest is 'good'"):
        get(write(tmp_path, {"train.jsonl": jsonl([{"text": "a", "label": "goood"}])}))


def test_where_classes_are_called_by_numbers_a_written_number_is_a_name(tmp_path: Path) -> None:
    """Else ids 0 and 1 would both be the first class."""
    table = "text,label\n" + "".join(f"t{at},{at}\n" for at in range(5))
    folder = write(tmp_path, {"labels.txt": "1\n2\n3\n4\n5\n", "train.csv": table, "test.csv": table})
    with pytest.raises(DataError, match=r"train\.csv:2: unknown label '0' among 5"):
        get(folder)
    mixed = jsonl([{"text": "a", "label": "1"}])
    (some := tmp_path / "some").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl:1: unknown label '1' among 2"):
        get(write(some, {"labels.txt": "spam\n0\n", "train.jsonl": mixed, "test.jsonl": mixed}))
    ids = jsonl([{"text": f"t{at}", "label": at} for at in range(5)])
    (other := tmp_path / "other").mkdir()
    found = get(write(other, {"labels.txt": "1\n2\n3\n4\n5\n", "train.jsonl": ids, "test.jsonl": ids})).train.label
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3, 4]


def test_ids_may_be_written_with_zeros_before_them(tmp_path: Path) -> None:
    table = "text,label\na,00\nb,01\nc,1\n"
    found = get(write(tmp_path, {"train.csv": table, "test.csv": table}))
    assert found.labels == ("0", "1")
    assert found.train.label is not None
    assert found.train.label.tolist() == [0, 1, 1]


def test_string_labels_are_the_sorted_names_of_train(tmp_path: Path) -> None:
    rows = jsonl([{"text": "a", "label": "z"}, {"text": "b", "label": "a"}])
    data = get(write(tmp_path, {"train.jsonl": rows, "test.jsonl": rows}))
    assert data.labels == ("a", "z")
    assert data.test.label is not None
    assert data.test.label.tolist() == [1, 0]


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    data = get(write(tmp_path / "reviews", {"dev.csv": "text,label\na,0\n", "oos_test.jsonl": "", "README.md": ""}))
    assert data.name == "reviews"
    assert data.dev is not None
    assert data.dev.text == ["a"]
    assert len(data.notices) == 1
    assert "split oos_test is ignored" in data.notices[0]
    with pytest.raises(DataError, match=r"reveiws: no such file or folder, the nearest is 'reviews'"):
        get(tmp_path / "reveiws")
    (tmp_path / "reviews" / "train.csv").touch()
    with pytest.raises(DataError, match=r"train\.jsonl: train\.csv is there too"):
        get(tmp_path / "reviews")
    (tmp_path / "reviews" / "train.csv").unlink()
    (tmp_path / "reviews" / "test.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"reviews: no file test\.jsonl .*it holds dev\.csv, oos_test\.jsonl, train\.jsonl"
    ):
        get(tmp_path / "reviews")


def test_columns(tmp_path: Path) -> None:
    rows = jsonl([{"q": "a?", "a": "b", "label": 0, "who": 7}] * 2)
    folder = write(tmp_path, {"train.jsonl": rows, "test.jsonl": rows})
    data = get(folder, columns={"text": "q", "text_b": "a", "client": "who"})
    assert (data.train.text[0], data.train.text_b, data.train.client) == ("a?", ["b", "b"], ["7", "7"])
    assert get(folder, columns={"text": "q", "text_b": "text_b"}).train.text_b is None
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: no column 'whom', the nearest is 'who'; set data\.columns\.client"
    ):
        get(folder, columns={"text": "q", "client": "whom"})
    one_sided = write(tmp_path, {"train.jsonl": jsonl(GOOD), "test.jsonl": jsonl([{**GOOD[0], "text_b": "b"}])})
    with pytest.raises(DataError, match="train and test must both have the column text_b"):
        get(one_sided)


def test_an_optional_column_must_be_in_all_rows_or_none(tmp_path: Path) -> None:
    rows = jsonl([{**GOOD[0], "client": "x"}, GOOD[1]])
    with pytest.raises(DataError, match=r"train\.jsonl:2: no column 'client'"):
        get(write(tmp_path, {"train.jsonl": rows}))


def test_generate(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 3}", "completion": f"c{i}"} for i in range(60)]
    data = get(write(tmp_path, {"train.jsonl": jsonl(rows), "test.jsonl": jsonl(rows[:3])}), "generate")
    assert (data.labels, data.train.label, data.train.text[3]) == ((), None, "p1")
    assert data.train.completion is not None
    assert data.train.completion[3] == "c3"
    file = tmp_path / "all.jsonl"
    file.write_text(jsonl(rows))
    cut = get(file, "generate")
    assert (len(cut.train), len(cut.test)) == (48, 12)
    assert not set(cut.train.text) & set(cut.test.text)
    file.write_text(jsonl([*rows, {"prompt": "p", "completion": ""}]))
    with pytest.raises(DataError, match=r"all\.jsonl:61: column 'completion' holds ''"):
        get(file, "generate")


def test_a_single_file_is_cut_in_two(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    file.write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 4 == 0]}\n" for i in range(100)))
    data = get(file)
    assert data.train.label is not None
    assert data.test.label is not None
    assert sorted(data.train.text + data.test.text) == sorted(f"t{i}" for i in range(100))
    assert np.bincount(data.test.label).tolist() == [15, 5]
    file.write_text("text,label\nt,a\n")
    with pytest.raises(DataError, match=r"all\.csv: 1 rows are too few"):
        get(file)


def test_what_is_tuned_with_one_seed_is_not_tested_with_another(tmp_path: Path) -> None:
    (file := tmp_path / "all.csv").write_text(
        "text,label,client\n" + "".join(f"t{i},{'ab'[i % 2]},c{i % 5}\n" for i in range(100))
    )
    base = {"data": {"path": str(file)}}
    trial = configured(config.load(base, ["seed=100", "data.split=validation"]))
    tried = {*trial.train.text, *trial.test.text}
    assert [tried & {*configured(config.load(base, [f"seed={seed}"])).test.text} for seed in (1, 2)] == [set(), set()]
    natural = ["data.partition.kind=natural", "data.train_limit=60"]  # the partition cuts tests from what is left
    one, other = (configured(config.load(base, [f"seed={seed}", *natural])).train.text for seed in (1, 100))
    assert one == other


def test_limits_keep_the_order(tmp_path: Path) -> None:
    rows = jsonl([{"text": f"{i:03}", "label": 0} for i in range(50)])
    folder = write(tmp_path, {"train.jsonl": rows, "test.jsonl": rows})
    data = get(folder, train_limit=20)
    assert len(set(data.train.text)) == 20
    assert data.train.text == sorted(data.train.text)
    assert len(data.test) == 50
    assert get(folder, train_limit=20).train.text == data.train.text != get(folder, train_limit=20, seed=1).train.text


@given(label=st.lists(st.integers(0, 3), min_size=1, max_size=60), fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_stratified_is_a_partition_true_to_each_label(label: list[int], fraction: float, seed: int) -> None:
    labels = np.array(label)
    kept, held_out = stratified(labels, fraction, np.random.default_rng(seed))
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for value in set(label):
        assert abs((labels[held_out] == value).sum() - fraction * (labels == value).sum()) < 1 + 1e-9


def test_take_and_digest() -> None:
    rows = Rows(["a", "b", "c"], ["x", "y", "z"], np.array([0, 1, 2]), ["k", "k", "l"])
    taken = rows.take(np.array([2, 0]))
    assert (taken.text, taken.text_b, taken.client, taken.completion) == (["c", "a"], ["z", "x"], ["l", "k"], None)
    assert rows.take(np.arange(3)).digest() == rows.digest() != taken.digest()


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `datasets`, as tests have no network."""

    class Split(list[dict[str, Any]]):
        features = {"label": SimpleNamespace(names=["bad", "good"])}  # noqa: RUF012

    splits = {name: Split(GOOD) for name in ("train", "validation", "test", "extra")}
    asked = []

    def load_dataset(path: str, config: str | None) -> dict[str, Split]:
        asked.append((path, config))
        return splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    def hub() -> Dataset:
        return load("glue:sst2", None, "classify", {}, None, 0)

    data = hub()
    assert asked == [("glue", "sst2")]
    assert data.labels == ("bad", "good")
    assert data.dev is not None
    assert "split extra is ignored" in data.notices[0]
    splits["test"][1] = {"text": "a", "label": -1}
    with pytest.raises(DataError, match=r"glue:sst2/test, row 2: label -1 is outside 0\.\.1"):
        hub()
    del splits["test"]
    with pytest.raises(DataError, match="no split 'test'; it has train, validation, extra"):
        hub()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install fedrank\[data\]"):
        hub()


def test_name_or_path() -> None:
    for name, path in ((None, None), ("docstrings", "a")):
        with pytest.raises(DataError, match="give exactly one"):
            load(name, path, "classify", {}, None, 0)
    with pytest.raises(DataError, match="it has labels and no completions"):
        load("docstrings", None, "generate", {}, None, 0)


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [("clinc150", (15000, 4500), 150), ("qnli", (4263, 1200), 2), ("e2e_nlg", (4672, 4693), 0)],
)
def test_real_sets(shared_data: Path, name: str, sizes: tuple[int, int], classes: int) -> None:
    data = get(shared_data / name, "generate" if name == "e2e_nlg" else "classify")
    assert (len(data.train), len(data.test)) == sizes
    assert len(data.labels) == classes
    assert (data.train.text_b is not None) == (name == "qnli")


def test_validation_holds_whole_prompts_out() -> None:
    rows = Rows([f"p{at // 3}" for at in range(90)], completion=[f"c{at}" for at in range(90)])
    found = validation(Dataset("own", rows, rows, None, ()), 0)
    assert len(found.test) == 9
    assert not set(found.test.text) & set(found.train.text)
