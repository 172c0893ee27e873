"""All that a config's `observe` names, opened, told of every event, and closed; none of it can end a run."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedrank.config import ConfigError, Observe
from fedrank.ledger import Event
from fedrank.observe import lines, mlflow, prometheus, tensorboard
from fedrank.observe.rows import Watch

log = logging.getLogger(__name__)

# By their keys; the log is the first, and so the last to be closed.
WATCHERS: Mapping[str, Callable[[Observe, Path], AbstractContextManager[Watch]]] = {
    "log": lines.opened, "prometheus": prometheus.opened, "tensorboard": tensorboard.opened, "mlflow": mlflow.opened,
}  # fmt: skip
NEEDED = {"prometheus": "prometheus_client", "tensorboard": "tensorboard", "mlflow": "mlflow"}


@contextmanager
def watching(given: Observe, path: Path) -> Iterator[Callable[[Event], Event]]:
    """What to pass every event of the run in `path` through, while the block runs.

    ConfigError where something is missing or cannot be opened. What fails later is a warning, once, and is told of later
    events all the same; what it has missed stays in the ledgers.
    """
    watches, failed = dict[str, Watch](), set[str]()

    def fail(key: str, error: Exception) -> None:
        if key not in failed:
            failed.add(key)
            log.warning("observe.%s has failed, and the run goes on: %s", key, _short(error))

    def close(key: str, context: AbstractContextManager[Watch], *error: Any) -> None:
        try:
            context.__exit__(*error)
        except Exception as problem:
            fail(key, problem)

    def tell(event: Event) -> Event:
        for key, watch in watches.items():
            try:
                watch(event)
            except Exception as error:
                fail(key, error)
        return event

    with ExitStack() as stack:
        for key, opened in WATCHERS.items():
            if not getattr(given, key):
                continue
            if key in NEEDED and importlib.util.find_spec(NEEDED[key]) is None:
                raise ConfigError(f"observe.{key}: it needs {NEEDED[key]}: pip install 'fedrank[observe]'; or null")
            context = opened(given, path)
            try:
                watches[key] = context.__enter__()
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(f"observe.{key}: {_short(error)}") from error
            stack.push(partial(close, key, context))
        yield tell


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
