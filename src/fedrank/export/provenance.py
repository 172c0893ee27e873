"""provenance.json: where an export comes from, and the hash of every file beside it."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

import fedrank
from fedrank import ledger, methods
from fedrank.adapter import Adapter
from fedrank.config import TINY_MODELS, ConfigError
from fedrank.ledger import BYTES, OF_TEXTS, PERSONAL
from fedrank.protocol import ClientId, State
from fedrank.store import CLIENT, StoreError, write
from fedrank.told import computed, counted, last, portable, tested, total

ROOTS = FILE, INDEX = "provenance.json", "index.json"
SCHEMA = 1
OWN = "manifest_sha256"
OF_CLIENTS = ("accuracy", "majority", "clients", "worst_decile", *OF_TEXTS)


# ---- what is told


def manifest(
    run: Path, state: State, numerics: Mapping[str, Any], facts: Mapping[str, Any], adapter: Adapter,
    client: ClientId | None, kind: str,
) -> dict[str, Any]:  # fmt: skip
    """All that is told of an export but the hashes of its files. adapter: what is exported; kind: adapter or model.

    No time of day, so that one run's export has the same bytes whenever it is made; and no place on this machine. Of a
    private run, only what may be published (docs/privacy.md): nothing that is counted or hashed of clients' rows, nor the
    hash of the state, by which a guess of who took part could be tried.
    """
    config = portable(yaml.safe_load((run / "config.yaml").read_text()) or {})
    privacy, model = config.get("privacy", {}), facts["model"]
    private = privacy.get("kind", "none") != "none"
    rows = ledger.read(run / "rounds.jsonl")
    rows = [row for row in rows if row["round"] <= state.round]
    here = rows[-1] if rows and rows[-1]["round"] == state.round else {}
    row_counts, hashes = (facts.get(name, {}) for name in ("rows", "hash"))
    told = ("test",) if private else ("train", "test")
    planned = config.get("rounds", {}).get("count")
    return {
        "schema": SCHEMA, "kind": kind, "fedrank": fedrank.__version__,
        "run": {
            "fedrank": numerics.get("fedrank"), "round": state.round, "rounds": planned, "seed": config.get("seed"),
            "state_sha256": None if private else digest(run / "states" / f"{state.round:04d}.safetensors"),
            "clients": counted(facts), "numerics": computed(numerics, private), "imported": facts.get("imported"),
        },
        "config": config, "config_sha256": _hash(config),
        "method": _method(config.get("method", {})),
        "data": {
            "name": last(facts.get("data")), "test_rows_are": tested(facts, config), "pairs": facts.get("pairs", False),
            "rows": {name: row_counts.get(name) for name in told},
            "sha256": {name: hashes.get(name) or None for name in told},
        },
        "labels": facts.get("labels", []),
        "model": {
            "name": last(model["name"]), "source": last(model["source"]), "fingerprint": model.get("fingerprint"),
            "published": not Path(model["source"]).is_absolute() and model["source"] not in TINY_MODELS,
            "class": model.get("base_class"), "task": model["task"], "pooling": model["pooling"],
        },
        "adapter": {
            "rank": max((block.rank for block in adapter.blocks.values()), default=0), "scale": adapter.scale,
            "components": adapter.components, "modules": len(adapter.blocks),
        },
        "client": client, "limit": limit(facts, client, private) or None,
        "bytes": {
            "round": {name: here.get(name) for name in BYTES},
            "all_rounds": {name: total(row.get(name) for row in rows) for name in BYTES},
        },
        "scores": _scores(run, state.round, here, client),
        "privacy": {
            **{name: privacy.get(name) for name in ("kind", "clip", "noise", "votes_noise", "delta")},
            "epsilon": here.get("epsilon") if state.round else 0.0,
        } if private else None,
    }  # fmt: skip


def limit(facts: Mapping[str, Any], client: ClientId | None, private: bool) -> str:
    """What an export is not; empty where everyone predicts with just this one."""
    if client is not None:
        own = "what one client predicts with, its own parts included"
        return own + ("; these were trained on its rows without protection, and are for it alone" if private else "")
    if not facts.get("adapts"):
        return ""
    if facts.get("private"):
        return "the common adapter alone; each client predicts with one of its own beside it (fedrank export --client)"
    return "the common start; each client predicts after training of its own from it"


def _method(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the method; of one that is not installed here, its name alone."""
    name, found = chosen.get("name"), dict[str, Any]()
    try:
        cls = methods.find(name) if name and "object" not in chosen else None
    except (ConfigError, TypeError, AttributeError, ImportError):
        cls = None
    if cls is not None:
        about = getattr(cls, "about", None)
        found = {key: getattr(about, key, None) for key in ("paper", "url", "personal")}
    reconstructed = cls is not None and "(reconstructed)" in methods.summary(cls)
    return {"name": name, **found, "reconstructed": reconstructed}


def _scores(run: Path, round: int, here: Mapping[str, Any], client: ClientId | None) -> dict[str, Any] | None:
    """Of this round; None where it was not evaluated. Where the run ended with it, all clients are in their scores."""
    file = run / "summary.json"
    end = json.loads(file.read_text()) if file.exists() else {}
    end = end if end.get("rounds") == round else {}
    if client is not None:
        mine = [one for one in ledger.read(run / PERSONAL) if one["client"] == client] if end else []
        own = {key: value for key, value in mine[0].items() if key != "client"} if mine else {}
        return own if "accuracy" in own else None  # too few test rows say nothing about a client
    found = {name: here.get(name) for name in ("accuracy", "loss", *OF_TEXTS)}
    found |= {f"personal_{name}": {**here, **end}.get(f"personal_{name}") for name in OF_CLIENTS}
    found = {name: value for name, value in found.items() if value is not None or name in ("accuracy", "loss")}
    return found if any(value is not None for name, value in found.items() if name != "personal_clients") else None


# ---- the files


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(found: Mapping[str, Any]) -> str:
    """Of a config or a manifest as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _own(found: Mapping[str, Any]) -> str:
    """Of a manifest without its own hash, as it reads once it is written."""
    return _hash({name: part for name, part in json.loads(json.dumps(found)).items() if name != OWN})


def _files(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def seal(out: Path, found: Mapping[str, Any]) -> None:
    """Write the manifest, last of all: it has the hash of every other file, and of itself but for that."""
    told = {**found, "files": {name: digest(out / name) for name in _files(out) if name != FILE}}
    write(out / FILE, json.dumps({**told, OWN: _own(told)}, indent=1).encode())


def seal_all(out: Path, found: Mapping[str, Any]) -> None:
    """Write the index of a folder with an export for each client below `clients`."""
    clients = {place.name: digest(place / FILE) for place in sorted((out / "clients").glob("*"))}
    write(out / INDEX, json.dumps({**found, "clients": clients}, indent=1).encode())


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A folder to write an export into; when the block ends it takes the place of the export that was at `out`, if any.

    Whenever that is cut short, what is left at `out` has its manifest, so that it is known as an export and what is
    missing is seen. StoreError where something else is there.
    """
    out = out.resolve()
    _owned(out)
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)  # which a kill left
    beside.mkdir(parents=True)
    try:
        yield beside
        for name in sorted(_owned(out), key=ROOTS.__contains__):  # the manifest goes last, and comes first
            (out / name).unlink(missing_ok=True)
        for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        for name in sorted(_files(beside), key=ROOTS.__contains__, reverse=True):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).replace(out / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _owned(out: Path) -> set[str]:
    """The files of the export that is there, if any. StoreError where other files are there too."""
    held = set(_files(out)) if out.is_dir() else set()
    if FILE in held:
        ours = {*_read(out)["files"], FILE}
    elif INDEX in held:
        ours = {INDEX}
        for client in _index(out):
            if (place := out / "clients" / client / FILE).exists():
                names = {*_read(place.parent)["files"], FILE}
            else:
                names = set(_files(place.parent))
            ours |= {f"clients/{client}/{name}" for name in names}
    else:  # an adapter of before there were manifests
        old = {"README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors"}
        ours = old if "adapter_config.json" in held else set()
    if other := sorted(held - ours) or ([out.name] if out.is_file() else []):
        raise StoreError(f"{out} holds {other[0]}, which no export of fedrank wrote; choose another --to")
    return ours


# ---- verified


def _read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. StoreError where there is none, or it names files elsewhere."""
    try:
        found = dict(json.loads((folder / FILE).read_text()))
        names = [PurePosixPath(name) for name in found["files"]]
        _hash(found["config"]), found["config_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} is no export of fedrank, or its {FILE} is damaged: {error!r}") from None
    if odd := [str(name) for name in names if name.is_absolute() or ".." in name.parts]:
        raise StoreError(f"{folder / FILE} names {odd[0]}, which is not in its folder")
    return found


def _index(folder: Path) -> dict[str, str]:
    """client -> the hash of its manifest."""
    try:
        clients = dict(json.loads((folder / INDEX).read_text())["clients"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / INDEX} is damaged: {error!r}") from None
    if odd := [client for client in clients if not CLIENT.fullmatch(client)]:
        raise StoreError(f"{folder / INDEX} names {odd[0]!r}, which is no client's id")
    return clients


def verify(folder: Path) -> list[str]:
    """What differs from when a folder was exported, a line each; of an export of all clients, of each.

    StoreError where it is no export.
    """
    if (folder / INDEX).exists() and not (folder / FILE).exists():
        odd, clients = list[str](), _index(folder)
        for client, expected in clients.items():
            place = folder / "clients" / client
            if not (place / FILE).exists():
                odd.append(f"clients/{client}/{FILE}: missing")
                continue
            if digest(place / FILE) != expected:
                odd.append(f"clients/{client}/{FILE}: not what {INDEX} has the hash of")
            odd += [f"clients/{client}/{line}" for line in verify(place)]
        theirs = tuple(f"clients/{client}/" for client in clients)
        extra = [name for name in _files(folder) if name != INDEX and not name.startswith(theirs)]
        return odd + [f"{name}: not a part of the export" for name in extra]
    found = _read(folder)
    odd = [] if _own(found) == found.get(OWN) else [f"{FILE}: not what its {OWN} is of"]
    odd += [] if _hash(found["config"]) == found["config_sha256"] else ["config: not what config_sha256 is of"]
    for name, expected in found["files"].items():
        if not (folder / name).is_file():
            odd.append(f"{name}: missing")
        elif (got := digest(folder / name)) != expected:
            odd.append(f"{name}: sha256 {got}, exported as {expected}")
    extra = sorted(set(_files(folder)) - found["files"].keys() - {FILE})
    return odd + [f"{name}: not a part of the export" for name in extra]
