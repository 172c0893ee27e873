"""Ledgers: what is written stays, what a kill tore off goes."""

from pathlib import Path

import pytest

from fedrank import ledger

ROWS = [{"round": 1, "client": "ä\u2028\n"}, {"round": 1, "client": "b"}, {"round": 2, "loss": None}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ledger.append(tmp_path / "rounds.jsonl", ROWS[:1])
    ledger.append(tmp_path / "rounds.jsonl", ROWS[1:])
    return tmp_path / "rounds.jsonl"


def test_rows_come_back_in_order(path: Path) -> None:
    assert ledger.read(path) == ROWS
    assert len(path.read_bytes().splitlines()) == 3


def test_a_ledger_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert ledger.read(tmp_path / "none.jsonl") == []
    ledger.cut(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_anywhere_in_the_last_row_loses_only_that_row(path: Path) -> None:
    """Cut at every byte: the rows before it are read, and after `cut` the ledger can be appended to."""
    whole = path.read_bytes()
    last = whole.rindex(b'{"round": 2')
    for end in range(last, len(whole) + 1):
        path.write_bytes(whole[:end])
        left = ROWS if end >= len(whole) - 1 else ROWS[:2]
        assert ledger.read(path) == left
        ledger.cut(path, 2)
        ledger.append(path, [{"round": 3}])
        assert ledger.read(path) == [*left, {"round": 3}]


def test_a_torn_line_in_the_middle_is_an_error(path: Path) -> None:
    path.write_text('{"round": 1}\n{"rou\n{"round": 2}\n')
    with pytest.raises(ValueError, match=r"rounds.jsonl:2: not a JSON line"):
        ledger.read(path)


@pytest.mark.parametrize(("round", "left"), [(0, 0), (1, 2), (2, 3), (9, 3)])
def test_cut_drops_rows_newer_than_the_round(path: Path, round: int, left: int) -> None:
    ledger.cut(path, round)
    assert ledger.read(path) == ROWS[:left]
    assert [file.name for file in path.parent.iterdir()] == ["rounds.jsonl"]
