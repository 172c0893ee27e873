"""What a run came to, as others use it: a PEFT adapter or a merged model, with a card and its provenance."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedrank import config as settings
from fedrank.adapter import Adapter, below, from_arrays, recompress
from fedrank.client import complete
from fedrank.config import Config, hint
from fedrank.export import peft, provenance
from fedrank.export.card import model_card
from fedrank.export.peft import adopt, origin, read_peft
from fedrank.export.provenance import verify
from fedrank.products import Increment
from fedrank.protocol import ClientId, Plan, State
from fedrank.store import Store, StoreError, write

__all__ = ["adopt", "export", "export_clients", "obstacle", "origin", "read_peft", "verify", "whole"]

log = logging.getLogger(__name__)

EMPTY = "the adapter has no components to export; merged, the model is exported with its head (--merged)"
Save = Callable[[State, Path], None]


def export(
    run: Path, out: Path, round: int | None = None, client: ClientId | None = None, merged: bool = False
) -> Path:
    """Write what a run came to (after `round` rounds; default: its last) into a folder, with its card and provenance.

    The adapter as PEFT loads it, or merged: the whole model as transformers loads it. client: with this client's own
    parts. StoreError where parts are the clients' own and none is named, or `out` holds what is no export.
    """
    Store.open(run)  # before a folder is made
    with provenance.placed(out) as place:
        _write(run, place, round, client, _merging(run) if merged else None)
    return out


def export_clients(run: Path, out: Path, round: int | None = None, merged: bool = False) -> Path:
    """Write what each client predicts with into `out`/clients/NAME, and index.json, which says who trained in no round
    and whose own parts are not on this machine. It tells who took part: of a private run it is the operator's."""
    state, facts, private = Store.open(run).state(round)[0], _facts(run), Store(run).private
    _personal(run, facts)
    there = [client for client, since in sorted(state.seen.items()) if private.load(client, since) is not None]
    listed = facts.get("partition", {}).get("clients")
    known = [one["client"] for one in listed] if isinstance(listed, list) and listed else None
    with provenance.placed(out) as place:
        save = _merging(run) if merged else None
        for client in there:
            _write(run, place / "clients" / client, round, client, save)
        never = None if known is None else [client for client in known if client not in state.seen]
        told = {"round": state.round, "elsewhere": sorted(state.seen.keys() - set(there)), "never_trained": never}
        provenance.seal_all(place, told)
    return out


def obstacle(run: Path, round: int | None = None) -> str | None:
    """Why the run's adapter is no function that one could export; None where it is."""
    if (why := _shared(_facts(run))) is not None:
        return why
    state = Store(run).state(round)[0]
    return None if state.adapter.components or state.base_updates else EMPTY


def whole(state: State) -> Adapter:
    """The adapter that gives a pristine base the function of this state: base updates become components."""
    if not state.base_updates:
        return state.adapter
    found = Increment(state.adapter.scale).add(state.adapter).add_base(state.base_updates.values()).adapter()
    return replace(recompress(found.astype(np.float32)), dense=state.adapter.dense)


def _write(run: Path, out: Path, round: int | None, client: ClientId | None, save: Save | None) -> None:
    """save: how the merged model is written; None: the adapter is."""
    store, facts = Store.open(run), _facts(run)
    state, numerics = store.state(round)
    if client is not None:
        state = replace(state, adapter=_adapted(store, state, facts, client))
    elif (why := _shared(facts)) is not None:
        raise StoreError(f"{run}: {why}")
    elif limit := provenance.limit(facts, None, False):
        log.warning("%s: what is exported is %s", run, limit)
    adapter = whole(state)
    if save is None and not adapter.components:
        raise StoreError(f"{run}: {EMPTY}")
    found = provenance.manifest(run, state, numerics, facts, adapter, client, "adapter" if save is None else "model")
    if save is None:
        drawn = run / "drawn.safetensors"
        peft.write_peft(out, adapter, facts["model"], drawn if drawn.exists() else None)
    else:
        save(state, out)
    write(out / "README.md", model_card(found).encode())
    provenance.seal(out, found)


def _merging(run: Path) -> Save:
    """What writes merged models of this run; its base model is loaded for the first, and serves for all."""

    @cache
    def base() -> tuple[Config, tuple[str, ...], Any]:
        from fedrank.training import merging

        config, facts = settings.load(run / "config.yaml"), _facts(run)
        labels = tuple(facts["labels"])
        return config, labels, merging.pristine(config, labels, facts["model"]["fingerprint"])

    def save(state: State, out: Path) -> None:
        from fedrank.training import merging

        config, labels, model = base()
        increment = Increment(state.adapter.scale).add(state.adapter).add_base(state.base_updates.values())
        merging.save(model, increment, state.adapter.dense, labels, config.local.max_length, out)

    return save


def _facts(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "data.json").read_text()))


def _shared(facts: Mapping[str, Any]) -> str | None:
    """Why there is no one function of all clients; None where there is."""
    if own := facts.get("own", ""):
        parts = ", ".join("the head" if f == "h" else f for f in own)
        return (
            f"each client keeps {parts} to itself, so there is no one function to export; name a client (--client), "
            "or export all (--all-clients)"
        )
    return None


def _personal(run: Path, facts: Mapping[str, Any]) -> None:
    if not facts.get("own") and not facts.get("private"):
        raise StoreError(f"{run}: no part of the adapter is a client's own; export it without a client")


def _adapted(store: Store, state: State, facts: Mapping[str, Any], client: ClientId) -> Adapter:
    """What this client predicts with: the shared parts, and its own from its private store, where that is here."""
    _personal(store.path, facts)
    if client not in state.seen:
        raise StoreError(f"{store.path}: client {client!r} has trained in no round{hint(client, state.seen)}")
    kept = store.private.load(client, since := state.seen[client])
    if kept is None:
        raise StoreError(f"{store.private.root} holds no version of round {since} of client {client!r}")
    plan = Plan(state.adapter.ids, own=facts.get("own", ""), since=since)
    adapter = complete(state.adapter.only(plan.sent), plan, kept, store.state(0)[0].adapter)
    return adapter.union(from_arrays(below("private/", kept), adapter.scale))  # the second level, where there is one
