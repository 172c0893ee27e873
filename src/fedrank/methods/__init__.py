"""The methods: each module here is one paper, found by its name; others come through entry points."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedrank.config import ConfigError, hint

HOOKS = ("begin", "plan", "train", "merge")
NEEDS = (*HOOKS, "default_lr")


def names() -> list[str]:
    """Every method that can be named in a config: the modules of this package and the entry points."""
    own = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted({*own, *(point.name for point in entry_points(group="fedrank.methods"))})


def find(name: str) -> type[Any]:
    """The method's class. ConfigError names the nearest method where there is none of this name."""
    if name in {module.name for module in pkgutil.iter_modules(__path__)}:
        module = importlib.import_module(f"{__name__}.{name}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        found = [c for c in classes if all(hasattr(c, hook) for hook in HOOKS)]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must define one class with {', '.join(HOOKS)}; it has {len(found)}")
        return found[0]
    for point in entry_points(group="fedrank.methods", name=name):
        return check(point.load())
    raise ConfigError(f"method.name: no method is called {name!r}{hint(name, names())} (known: {', '.join(names())})")


def build(settings: Mapping[str, Any]) -> Any:
    """The method of a config's ``method`` section: its name and hyper-parameters. ConfigError where one is wrong."""
    values = dict(settings)
    name = values.pop("name")
    cls = find(name)
    known = [field.name for field in fields(cls) if field.init]
    for key in values:
        if key not in known:
            has = ", ".join(known) or "none"
            raise ConfigError(f"method.{key}: {name} has no such hyper-parameter{hint(key, known)} (it has: {has})")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["method", *map(str, first["loc"])])
        raise ConfigError(f"{key}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}") from None


def values(method: Any) -> dict[str, Any]:
    """A method's hyper-parameters, as `build` takes them from a config."""
    found = TypeAdapter(type(method)).dump_python(method, mode="json")
    return {field.name: found[field.name] for field in fields(method) if field.init}


def check(cls: type[Any]) -> type[Any]:
    """The class itself, or a TypeError that names what it lacks."""
    if missing := [name for name in NEEDS if not hasattr(cls, name)]:
        raise TypeError(f"{cls.__qualname__} is no method: it lacks {', '.join(missing)}")
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} is no method: it must be a dataclass of its hyper-parameters")
    return cls
