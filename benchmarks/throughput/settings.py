"""The job as a fedrank config."""

from pathlib import Path
from typing import Any

SETTINGS = {
    "model": {"name": "minilm"},
    "data": {"partition": {"kind": "dirichlet", "alpha": 0.5}, "test_limit": 2000},
    "clients": {"count": 100},
    "local": {"lr": 0.003, "batch_size": 16, "max_length": 64},
    "adapter": {"rank": 8},
    "method": {"name": "fedavg"},
}


def settings(path: Path, rounds: int, evaluate_every: int, **local_settings: Any) -> dict[str, Any]:
    """The job as a fedrank config."""
    return SETTINGS | {
        "data": SETTINGS["data"] | {"path": str(path)},
        "local": SETTINGS["local"] | local_settings,
        "rounds": {"count": rounds, "cohort": 10, "evaluate_every": evaluate_every, "personal": 0},
    }
