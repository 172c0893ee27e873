"""Work that meets: several pieces of code, each written for itself, whose like requests are answered all at once."""

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

Many = Callable[[list[Any]], list[Any]]
Result = TypeVar("Result")

_present: ContextVar["_Work | None"] = ContextVar("present", default=None)


class _Work:
    """One piece of code in a thread of its own, which runs only while the meeting waits for it."""

    def __init__(self, code: Callable[[], Any]) -> None:
        self.code, self.go, self.back = code, threading.Event(), threading.Event()
        self.asks: tuple[Many, Any] | None = None
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        _present.set(self)
        try:
            self.result = self.code()
        except BaseException as error:  # given to who called the meeting
            self.result = error
        finally:
            self.asks = None
            self.back.set()

    def resume(self, answer: Any = None) -> None:
        """Let it run until it asks again or ends; what ends more than this one piece of code is raised."""
        self._go(answer)
        if isinstance(self.result, BaseException) and not isinstance(self.result, Exception):
            raise self.result

    def _go(self, answer: Any) -> None:
        self.answer, self.asks = answer, None
        self.back.clear()
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.go.set()
        self.back.wait()

    def leave(self) -> None:
        """End it: nobody will answer any more."""
        if self.thread.ident is None:
            return
        self.back.wait()
        if self.asks is not None:
            self._go(SystemExit("the meeting was left"))
        self.thread.join()

    def ask(self, many: Many, one: Any) -> Any:
        self.asks = many, one
        self.go.clear()
        self.back.set()
        self.go.wait()
        return self.answer


def ask(many: Many, one: Any) -> Any:
    """``many([one])[0]``; in a meeting together with what the others ask of the same function. An exception is raised."""
    here = _present.get()
    answer = many([one])[0] if here is None else here.ask(many, one)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def outcome(work: Callable[[], Result]) -> Result | Exception:
    """What it returns, or the exception that it raises: the answer to one of several asks."""
    try:
        return work()
    except Exception as error:
        return error


def meeting() -> bool:
    """Whether this code is part of a meeting: then not it computes, but the thread that called the meeting."""
    return _present.get() is not None


def meet(codes: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of these returns, or the exception it raises. What they ask is answered when all of them ask or have ended.

    One runs at a time, in their order, and answers are computed in this thread: the same every time.
    """
    works = [_Work(code) for code in codes]
    try:
        return _met(works)
    except BaseException:
        for work in works:
            work.leave()
        raise


def _met(works: list[_Work]) -> list[Any]:
    for work in works:
        work.resume()
    while asking := [work for work in works if work.asks is not None]:
        many = asking[0].asks[0] if asking[0].asks else None
        same = [work for work in asking if work.asks is not None and work.asks[0] == many]
        ones = [work.asks[1] for work in same if work.asks is not None]
        assert many is not None
        try:
            answers = many(ones)
        except Exception as error:
            answers = [error] * len(ones)
        for work, answer in zip(same, answers, strict=True):
            work.resume(answer)
    return [work.result for work in works]
