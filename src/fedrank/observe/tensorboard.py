"""TensorBoard's event files: every number of a round's row by round, the config and the summary as text."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedrank.config import ConfigError, Observe
from fedrank.ledger import Event
from fedrank.observe.rows import GROWN, Watch, added, numbers, timed


@contextmanager
def opened(given: Observe, path: Path) -> Iterator[Watch]:
    """A run that goes on writes all its rows anew, and what was there before is over: it is the ledger in any case."""
    from torch.utils.tensorboard import SummaryWriter

    folder = path / "tensorboard"
    if isinstance(given.tensorboard, str):
        folder = Path(given.tensorboard) / path.name
        folder.mkdir(parents=True, exist_ok=True)
        if not (path / "config.yaml").exists() and any(folder.iterdir()):
            raise ConfigError(f"observe.tensorboard: {folder} is another run's; give another folder, or true")
    rows = added(path / "rounds.jsonl")
    writer: Any = None

    with ExitStack() as stack:

        def watch(event: Event) -> None:
            nonlocal writer
            if writer is None:
                writer = SummaryWriter(str(folder), purge_step=0)
                stack.callback(writer.close)
                writer.add_text("config", _code((path / "config.yaml").read_text()), 0)
            if event["event"] in GROWN:
                for row, seconds in timed(rows()):
                    for name, value in numbers(row).items():  # 32 bits of it: doubles are not shown by its fast loader
                        writer.add_scalar(name, value, row["round"], seconds)
                writer.flush()
            if event["event"] == "end":
                writer.add_text("summary", _code(json.dumps(event, indent=1)), event["rounds"])

        yield watch


def _code(text: str) -> str:
    """As it is, in Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
