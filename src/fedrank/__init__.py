"""fedrank: federated fine-tuning of language models with adaptive-rank LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrank.config import Config as Config
    from fedrank.experiment import Run as Run
    from fedrank.experiment import resume as resume
    from fedrank.experiment import run as run
    from fedrank.studies.play import compare as compare
    from fedrank.training.data import ClientData as ClientData

__version__ = "0.1.0"

_LAZY = {"run": "experiment", "resume": "experiment", "Run": "experiment", "Config": "config",
         "ClientData": "training.data", "compare": "studies.play"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported when first asked for, so that the lower floors can be used without the upper ones."""
    if name in _LAZY:
        return getattr(import_module(f"fedrank.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'fedrank' has no attribute {name!r}")
