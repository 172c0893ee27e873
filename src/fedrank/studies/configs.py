"""Parts of configs: laid over one another, found on this machine, and told apart by what a run's result hangs on."""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from fedrank import config as settings
from fedrank.config import ConfigError

Part = dict[str, Any]  # of a config, as it stands in YAML
# What is read of a model's folder: no weights in other formats, no checkpoints below it.
MODEL = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "1_Pooling/config.json")


def merged(*parts: Part) -> Part:
    """Nested mappings laid over one another; another method's hyper-parameters go with its name."""
    result: Part = {}
    for part in parts:
        for key, value in part.items():
            below = result.get(key)
            if key == "method" and isinstance(below, dict) and isinstance(value, dict):
                below = below if value.get("name", below.get("name")) == below.get("name") else {}
            result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result


def dotted(values: Mapping[str, Any]) -> Part:
    """Dotted keys as nested mappings."""
    result: Part = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = result
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return result


def flattened(config: Mapping[str, Any], prefix: str = "") -> Part:
    """Nested mappings as dotted keys."""
    result: Part = {}
    for key, value in config.items():
        result |= (
            flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return result


def located(config: Part) -> Part:
    """The config with $NAME and ~ in the paths of its data, model and devices as they are on this machine."""
    flat, here = flattened(config), {}
    for key in ("data.path", "model.name", "engine.fleet.csv"):
        if isinstance(value := flat.get(key), str):
            here[key] = os.path.expanduser(os.path.expandvars(value))
            if "$" in here[key]:
                raise ConfigError(
                    f"{key}: {value}: the environment has no such variable; set it to where what is meant lies"
                )
    return merged(config, dotted(here))


def digest(config: Part) -> str:
    """What a run's result hangs on by its config, less what is as by default.

    Of rows, a local model and a file of devices what they are, and not where.
    """
    found = settings.load(located(config)).model_dump(mode="json", exclude_defaults=True)
    if path := found.get("data", {}).get("path"):
        found["data"]["path"] = _content("data.path", Path(path))
    name = found.get("model", {}).get("name")
    if name and name not in settings.OWN_MODELS and (Path(name).is_dir() or name.startswith((".", "/"))):
        found["model"]["name"] = _content("model.name", Path(name), MODEL)
    if csv := found.get("engine", {}).get("fleet", {}).get("csv"):
        found["engine"]["fleet"]["csv"] = _content("engine.fleet.csv", Path(csv))
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@cache  # a model may be gigabytes: it is read whole, as every run reads it, and once
def _content(key: str, path: Path, patterns: tuple[str, ...] = ("**/*",)) -> str:
    """The hash of a file, or of a folder's, by their names. ConfigError where there is none."""
    found = {one for pattern in patterns for one in path.glob(pattern) if one.is_file()}
    state = xxhash.xxh3_64()
    try:
        for one in sorted(found) if path.is_dir() else [path]:
            state.update(one.name.encode())
            with one.open("rb") as file:
                while part := file.read(1 << 20):
                    state.update(part)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
    return state.hexdigest()
