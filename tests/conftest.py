"""Shapes and types in annotations are checked at run time in every test; one torch thread per process."""

import inspect
import os
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.claw import beartype_package
from jaxtyping import TypeCheckError, install_import_hook

SOURCE = Path(__file__).parents[1] / "src" / "fedrank"
# What runs for every layer of every step is not: the checks would take three times as long as all else.
UNCHECKED = [
    "fedrank.trace",
    *(f"fedrank.training.{name}" for name in ("compute", "frozen", "fused", "linears", "packing")),
]
# jaxtyping binds the arguments of every call anew, which takes longer than the checks: only where there are shapes.
SHAPED = sorted(
    ".".join(("fedrank", *path.relative_to(SOURCE).with_suffix("").parts))
    for path in SOURCE.rglob("*.py")
    if "jaxtyping" in path.read_text()
)
beartype_package("fedrank", conf=BeartypeConf(
    claw_is_pep526=False, claw_skip_package_names=(*UNCHECKED, *SHAPED), violation_type=TypeCheckError
))  # fmt: skip
plain = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def jaxtyped(*, typechecker: Callable, real: Callable = jaxtyping.jaxtyped) -> Callable:
    """What the hook puts on every function and class of those modules; functions without shapes need beartype alone."""

    def decorate(thing: Any) -> Any:
        shapes = re.search(r"(Float|Int|UInt8|Bool)\[", str(getattr(thing, "__annotations__", {})))
        return real(thing, typechecker=typechecker) if shapes or not inspect.isfunction(thing) else plain(thing)

    return decorate


jaxtyping.jaxtyped = jaxtyped
hook = install_import_hook(SHAPED, "beartype.beartype")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import fedrank  # noqa: E402, F401
from fedrank.training import docstrings  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("tests")
docstrings.labelled = cache(docstrings.labelled)  # the standard library's are the same for all, and take a second
# A shell's job in the background ignores Ctrl-C, and so would the programs that tests stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(os.environ.get("FEDRANK_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage is that of each fast test's first case: what is traced takes up to four times as long on Python 3.11."""
    seen = set[object]()
    for item in items:
        test = getattr(item, "function", item)
        if item.get_closest_marker("slow") or test in seen:
            item.add_marker("no_cover")
        seen.add(test)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets; tests that need them skip where they are not."""
    if not SHARED.is_dir():
        pytest.skip(f"no data sets at {SHARED}; set FEDRANK_DATA to their folder")
    return SHARED
