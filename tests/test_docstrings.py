"""The built-in docstrings: the same every time, clean, split by class, and never by importing what is read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedrank.training import docstrings
from fedrank.training.data import Rows, load
from fedrank.training.sources import DataError

Loaded = tuple[Rows, Rows, tuple[str, ...]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    found = load("docstrings", None, "classify", {}, None, 0)
    return found.train, found.test, found.labels


def test_size_and_split(loaded: Loaded) -> None:
    train, test, labels = loaded
    assert train.label is not None
    assert test.label is not None
    sizes = np.bincount(np.concatenate([train.label, test.label]))
    assert 14 <= len(sizes) == len(labels) <= 20
    assert 1500 <= sizes.sum() <= 3500
    assert sizes.min() >= 50
    assert sizes.max() <= docstrings.ROWS_PER_CLASS
    assert np.abs(np.bincount(test.label) - sizes / 5).max() <= 1


@pytest.mark.slow
def test_the_same_every_time_and_whatever_the_seed(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, labels = loaded
    monkeypatch.setattr(docstrings, "labelled", docstrings.labelled.__wrapped__)  # read anew
    for seed in (0, 7):
        again = load("docstrings", None, "classify", {}, None, seed)
        assert (again.train.digest(), again.test.digest(), again.labels) == (train.digest(), test.digest(), labels)


def test_texts_are_clean_and_differ(loaded: Loaded) -> None:
    texts = loaded[0].text + loaded[1].text
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert ">>>" not in text.split()[:1]
        assert len(text) <= docstrings.MAX_CHARACTERS
        assert text == " ".join(text.split())


def test_no_text_names_a_class(loaded: Loaded) -> None:
    names = docstrings.mask({label.removeprefix("_py") for label in loaded[2]})
    assert not [text for text in loaded[0].text + loaded[1].text if names.search(text)]


def test_one_file_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "asyncio.py"
    file.write_text(
        '"""Asyncio has asyncio.events but MyAsyncio is\n\n    another word, it says."""\n'
        'class A:\n    """Too short to keep."""\n'
        'def f():\n    """One two three four five six seven eight.\n\n    >>> f()\n    2\n\n    Nine."""\n'
    )
    masked = docstrings.mask({"asyncio", "events"})
    assert list(docstrings.texts_in(file, masked)) == [
        "[name] has [name] but MyAsyncio is another word, it says.",
        "One two three four five six seven eight. Nine.",
    ]


def test_cut_at_a_word() -> None:
    assert docstrings.shorten("abc " * 200) == ("abc " * 100).strip()
    assert docstrings.shorten("abc") == "abc"


def test_tests_are_left_out(tmp_path: Path) -> None:
    for name in ("email/__init__.py", "email/parser.py", "email/test/test_email.py", "email/tests/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [f.name for f in docstrings.sources(tmp_path, "email")] == ["__init__.py", "parser.py"]


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"turtle: no Python sources of turtle.*not zipped"):
        docstrings.sources(tmp_path, "turtle")


def test_nothing_that_is_read_is_imported() -> None:
    code = (
        "import sys; from fedrank.training import docstrings; docstrings.labelled();"
        "print({'turtle', 'mailbox', '_pyio', 'xml.sax', 'torch'} & set(sys.modules))"
    )
    source = str(Path(docstrings.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"
