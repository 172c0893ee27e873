"""The built-in text set: docstrings of the running Python's standard library; which part of it wrote this?"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedrank.protocol import rng
from fedrank.training.sources import DataError

# Pure Python, there in 3.11-3.14 on every platform, at least 50 docstrings each.
LABELS = (
    "_pydecimal",
    "_pyio",
    "asyncio",
    "email",
    "http",
    "importlib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "tarfile",
    "threading",
    "turtle",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
ROWS_PER_CLASS = 200
MIN_WORDS = 8
MAX_CHARACTERS = 400
TEST_FOLDERS = {"test", "tests"}
SEED = 0  # the set is the same whatever the seed of a run


def labelled() -> tuple[list[str], np.ndarray]:
    """The texts in the order of class, file and line, capped per class, and their labels.

    The same on every call with one Python version.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = {name: sources(library, name) for name in LABELS}
    modules = [file.relative_to(library) for name in LABELS for file in files[name]]
    masked = mask({word for module in modules for word in public_names(module)})
    found = {name: [text for file in files[name] for text in texts_in(file, masked)] for name in LABELS}
    # A text that two classes share has no right label.
    owners = Counter(text for texts in found.values() for text in set(texts))
    texts: list[str] = []
    label: list[int] = []
    for i, name in enumerate(LABELS):
        distinct = [text for text in dict.fromkeys(found[name]) if owners[text] == 1]
        chosen = np.sort(rng(SEED, "docstrings", name).permutation(len(distinct))[:ROWS_PER_CLASS])
        texts += [distinct[j] for j in chosen]
        label += [i] * len(chosen)
    return texts, np.array(label, np.int64)


def sources(library: Path, name: str) -> list[Path]:
    """The module's file or the package's files without its tests. Found by path: an import would run them."""
    package = library / name
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    files = [f for f in files if f.is_file() and not TEST_FOLDERS & set(f.relative_to(library).parts)]
    if not files:
        raise DataError(
            f"{package}: no Python sources of {name}; the built-in docstrings need a Python installed with its "
            "standard library as .py files, not zipped; else set data.path"
        )
    return files


def public_names(module: Path) -> set[str]:
    """The names in a module's dotted path; _pyio is what its texts call io."""
    return {part.removeprefix("_py") for part in module.with_suffix("").parts if not part.startswith("__")}


def mask(names: set[str]) -> re.Pattern[str]:
    """The names of all classes, alone or dotted. Masking only a text's own ones would give its label away."""
    name = "(?:" + "|".join(sorted(map(re.escape, names), key=lambda n: (-len(n), n))) + ")"
    return re.compile(rf"\b{name}(?:\.{name})*\b", re.IGNORECASE)


def texts_in(file: Path, masked: re.Pattern[str]) -> Iterator[str]:
    for docstring in docstrings(file):
        text = " ".join(" ".join(prose(docstring)).split())
        if len(text.split()) >= MIN_WORDS:
            yield shorten(masked.sub("[name]", text))


def docstrings(file: Path) -> Iterator[str]:
    """Of the module, its classes and its functions."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, OSError) as error:
        raise DataError(f"{file}: cannot be read as Python: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def prose(docstring: str) -> Iterator[str]:
    """The lines outside doctests; a doctest runs from its prompt to the next blank line."""
    example = False
    for line in docstring.splitlines():
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            yield line


def shorten(text: str) -> str:
    """Cut at the last word boundary within the limit."""
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0]
