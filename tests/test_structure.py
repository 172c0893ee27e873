"""The house: who may import whom, what may be used, and that the tests' own guards are awake."""

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import fedrank
from fedrank import adapter, protocol, selection
from fedrank.frame import unpack

ROOT = Path(fedrank.__file__).parent

FLOORS = [
    {"adapter", "roster", "together", "trace"},
    {"protocol"},
    {"aggregation", "exactness", "levels", "optimizer", "privacy", "products", "robust", "selection", "told"}
    | {"cost", "devices", "fleet", "frame", "increments", "layout", "wire", "config", "hello", "store", "ledger"},
    {"training"},
    {"methods"},
    {"client"},
    {"server", "export"},
    {"engines"},
    {"apps", "central", "deploy", "experiment", "forecast", "machine", "observe", "parts", "profile", "remote"}
    | {"resident", "resolve", "sites"},
    {"cli", "cli_deploy", "cli_report", "exits", "report", "studies", "tables", "units", "views"},
]
HEAVY = {"torch", "transformers", "tokenizers", "peft", "sklearn", "flwr", "datasets"}


@dataclass(frozen=True)
class Source:
    """One module: its dotted name below fedrank, its code, and where it stands."""

    name: str
    tree: ast.Module
    path: Path

    @property
    def house(self) -> str:
        return self.name.split(".")[0]


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [Source(_name(p), ast.parse(p.read_text(encoding="utf-8")), p) for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]  # fmt: skip
NAMES = {source.name for source in SOURCES}


def imports(node: ast.AST, bodies: bool = True) -> Iterator[tuple[str, str]]:
    """(the name it is bound to, the dotted thing it is) of every import, in function bodies too or not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((a.asname or a.name.split(".")[0], a.name) for a in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            yield from ((a.asname or a.name, f"{child.module}.{a.name}") for a in child.names)
        elif bodies or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, bodies)


def ours(source: Source, bodies: bool = True) -> set[str]:
    """The modules of fedrank that a module imports, by their dotted name below fedrank."""
    found = set()
    for _, dotted in imports(source.tree, bodies):
        if dotted.startswith("fedrank."):
            parts = dotted.split(".")[1:]
            found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & NAMES
    return found - {source.name}


def floor(name: str) -> int:
    return next(at for at, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)


def test_every_module_has_a_floor() -> None:
    assert {source.house for source in SOURCES} - set().union(*FLOORS) == set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_imports_go_down(source: Source) -> None:
    """Also those in function bodies; inside one package, and among the rooms of one floor, there is no circle."""
    up = {name for name in ours(source) if floor(name) > floor(source.name)}
    assert not up, f"{source.name} stands below {sorted(up)}"
    if source.house == "export":
        return
    reading = {name for name in ours(source) if name == "export"}
    assert not reading or source.house in ("experiment", "cli"), "only the command line reads run directories"


def test_imports_make_no_circle() -> None:
    assert list(TopologicalSorter({source.name: ours(source, bodies=False) for source in SOURCES}).static_order())


def test_the_adapter_needs_numpy_only() -> None:
    found = {
        dotted.split(".")[0] for source in SOURCES if source.name == "adapter" for _, dotted in imports(source.tree)
    }
    assert found - set(sys.stdlib_module_names) == {"numpy", "jaxtyping"}


@pytest.mark.parametrize("source", [s for s in SOURCES if s.house != "training"], ids=lambda source: source.name)
def test_heavy_packages_stay_in_training(source: Source) -> None:
    """Elsewhere at most inside a function: of a method, of the command line, or of TensorBoard's watcher, whose writer is
    torch's; flwr in its engine."""
    allowed = {"flwr"} if source.name == "engines.flower" else set()
    top = {dotted.split(".")[0] for _, dotted in imports(source.tree, bodies=False)} & HEAVY
    inside = {dotted.split(".")[0] for _, dotted in imports(source.tree)} & HEAVY
    assert top <= allowed
    assert inside <= allowed or source.house in ("methods", "cli") or source.name == "observe.tensorboard"


def test_methods_load_without_torch() -> None:
    """In a process of its own: all methods and every floor below them, and fedrank itself loads nothing."""
    below = [s.name for s in SOURCES if floor(s.name) < floor("client") and s.house != "training"]
    assert {"methods.fedara", "methods.fedavg", "wire", "store"} <= set(below)
    code = (
        "import sys, importlib, fedrank\n"
        "assert not {n for n in sys.modules if n.startswith('fedrank.') or n == 'numpy'}\n"
        f"for name in {below}: importlib.import_module(f'fedrank.{{name}}')\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_nothing_is_ever_unpickled_or_evaluated(source: Source) -> None:
    """No pickle by any name, no eval of text, YAML only by its safe loader."""
    used = {part for _, dotted in imports(source.tree) for part in dotted.split(".")}
    assert not used & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name not in ("torch.load", "np.load", "numpy.load", "torch.save")
            assert not name.startswith("yaml.") or "load" not in node.attr.lower() or node.attr == "safe_load"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"


def test_no_class_of_ours_inherits_from_another() -> None:
    classes = {f"fedrank.{s.name}.{n.name}" for s in SOURCES for n in ast.walk(s.tree) if isinstance(n, ast.ClassDef)}
    assert "fedrank.adapter.Block" in classes
    for source in SOURCES:
        bound = dict(imports(source.tree))
        for node in ast.walk(source.tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                first, _, rest = ast.unparse(base).partition(".")
                dotted = bound.get(first, f"fedrank.{source.name}.{first}") + (f".{rest}" if rest else "")
                assert dotted not in classes, f"{source.name}.{node.name} inherits from {dotted}"


@pytest.mark.parametrize("source", [s for s in SOURCES if s.house == "methods"], ids=lambda source: source.name)
def test_a_method_is_one_short_file(source: Source) -> None:
    assert len(source.path.read_text(encoding="utf-8").splitlines()) < 200
    others = {name for name in ours(source) if name.startswith("methods.")}
    assert not others, "a method stands alone"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_module_opens_with_one_sentence(source: Source) -> None:
    assert ast.get_docstring(source.tree)


# ---- the tests' own guards


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="not overlooked"):
        warnings.warn("not overlooked", UserWarning, stacklevel=1)


def test_shapes_and_types_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        selection.top(1, np.zeros((2, 2)))  # a mask is over one axis
    with pytest.raises(TypeCheckError):
        adapter.Block(np.arange(2), np.zeros((3, 2)), np.zeros(2), np.zeros((3, 4)))  # two ids, three rows of A
    with pytest.raises(TypeCheckError):
        protocol.Device("c0", "many")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        unpack("text")  # type: ignore[arg-type]
