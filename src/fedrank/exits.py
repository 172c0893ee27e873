"""How commands end: what the user can mend is one line and exit code 2, a stop is a word and exit code 130."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from fedrank.config import ConfigError
from fedrank.remote import RunError, mistaken

errors = Console(stderr=True)


class mistakes:
    """What the user can mend is one line on stderr and exit code 2, a run that failed elsewhere the same with 1; anything
    else keeps its traceback."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if mistaken(error) or isinstance(error, RunError):
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2 if mistaken(error) else 1) from None


def needs(extra: str, *packages: str) -> None:
    """ConfigError where a package of this extra is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ConfigError(f"this needs {', '.join(missing)}: pip install 'fedrank[{extra}]'")


@contextmanager
def stoppable(word: Callable[[], str] = lambda: "stopped.", code: int = 130) -> Iterator[None]:
    """Ctrl-C is this word and exit code; so is SIGTERM, as SIGINT may be ignored (in the background of a script)."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"\n{word()}", highlight=False, soft_wrap=True)
        raise typer.Exit(code) from None
