"""Work that meets: like requests are answered at once, in one order, and what fails fails alone."""

import threading
from typing import Any

import pytest

from fedrank import together


class Calls:
    """A function over many that remembers what it was asked, and in which thread."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.threads: set[int] = set()

    def double(self, ones: list[int]) -> list[int]:
        self.asked.append(ones)
        self.threads.add(threading.get_ident())
        return [2 * one for one in ones]


def test_alone_it_is_the_function_of_one():
    calls = Calls()
    assert together.ask(calls.double, 3) == 6
    assert calls.asked == [[3]]
    assert not together.meeting()


def test_all_that_is_asked_is_answered_at_once_in_the_thread_that_called():
    calls, seen = Calls(), []

    def code(number: int) -> int:
        seen.append((number, together.meeting()))
        return together.ask(calls.double, number) + 1

    assert together.meet([lambda n=n: code(n) for n in range(4)]) == [1, 3, 5, 7]
    assert calls.asked == [[0, 1, 2, 3]]
    assert calls.threads == {threading.get_ident()}
    assert seen == [(n, True) for n in range(4)]  # one at a time, in order
    assert not together.meeting()


def test_who_asks_again_or_has_ended_holds_nobody_up():
    calls = Calls()

    def often(times: int) -> int:
        total = 0
        for _ in range(times):
            total += together.ask(calls.double, times)
        return total

    assert together.meet([lambda n=n: often(n) for n in (2, 0, 3)]) == [8, 0, 18]
    assert calls.asked == [[2, 3], [2, 3], [3]]


def test_other_functions_are_answered_apart():
    one, two = Calls(), Calls()
    codes = [lambda c=c: together.ask(c.double, 1) for c in (one, two, one)]
    assert together.meet(codes) == [2, 2, 2]
    assert (one.asked, two.asked) == ([[1, 1]], [[1]])


def test_what_fails_fails_alone():
    def many(ones: list[int]) -> list[Any]:
        return [ValueError("three") if one == 3 else one for one in ones]

    def broken(ones: list[int]) -> list[Any]:
        raise KeyError("all")

    def own() -> None:
        raise OSError("own")

    found = together.meet(
        [lambda: together.ask(many, 2), lambda: together.ask(many, 3), own, lambda: together.ask(broken, 1)]
    )
    assert found[0] == 2
    assert [type(error) for error in found[1:]] == [ValueError, OSError, KeyError]
    with pytest.raises(ValueError, match="three"):
        together.ask(many, 3)


class Left(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("when", ["answering", "first", "later"])
def test_whoever_leaves_a_meeting_ends_all_its_work(when):
    """No thread stays behind, nor goes on beside what comes after."""
    calls, ended = Calls(), list[int]()

    def answer(ones: list[int]) -> list[int]:
        if when == "answering":
            raise Left
        return calls.double(ones)

    def code(number: int) -> None:
        try:
            if number == 1 and when == "first":
                raise Left
            together.ask(answer, number)
            if number == 1:
                raise Left
            together.ask(answer, number)
        finally:
            ended.append(number)

    before = threading.active_count()
    with pytest.raises(Left):
        together.meet([lambda n=n: code(n) for n in range(3)])
    assert threading.active_count() == before
    assert sorted(ended) == ([0, 1] if when == "first" else [0, 1, 2])  # the last one had not begun
