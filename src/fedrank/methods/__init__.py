"""The methods: each module here is one paper, found by its name; others come through entry points."""

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedrank.config import ConfigError, explain, hint

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


def summary(cls: type[Any]) -> str:
    """The paper in a line: the first of its module."""
    return (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip().partition("\n")[0]


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
        raise ConfigError(explain(error.errors()[0], "method")) from None


def values(method: Any) -> dict[str, Any]:
    """A method's hyper-parameters, as `build` takes them from a config. ConfigError where one cannot be written there."""
    found = {field.name: getattr(method, field.name) for field in fields(method) if field.init}
    for key, value in found.items():
        if not _plain(value):
            raise ConfigError(
                f"method.{key}: {value!r} cannot be written in a config, which the run is resumed from; "
                "a hyper-parameter is a number, a text, a truth value or a tuple of these"
            )
    plain = TypeAdapter(dict[str, Any], config=ConfigDict(ser_json_inf_nan="constants"))
    return dict(plain.dump_python(found, mode="json"))


def _plain(value: Any) -> bool:
    """Whether YAML gives it back as it is, in any process; NaN does not even equal itself."""
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or (isinstance(value, bool | int | float | str) and value == value)


def check(cls: type[Any]) -> type[Any]:
    """The class itself, or a TypeError that names what it lacks."""
    if missing := [name for name in NEEDS if not hasattr(cls, name)]:
        raise TypeError(f"{cls.__qualname__} is no method: it lacks {', '.join(missing)}")
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} is no method: it must be a dataclass of its hyper-parameters")
    if taken := {field.name for field in fields(cls)} & {"name", "object"}:
        raise TypeError(f"{cls.__qualname__} needs another word for {', '.join(sorted(taken))}: a config has its own")
    return cls
