"""Simulated hostile clients: which they are, and what they send in the place of what they learnt, for research."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedrank.adapter import from_rows, to_rows
from fedrank.config import AttackSettings, ConfigError
from fedrank.protocol import Job, Update, rng


def attackers(attack: AttackSettings | None, clients: int, seed: int) -> dict[int, Callable[[Job, Update], Update]]:
    """By the places of the hostile clients among all, what they make of an update.

    ConfigError where the share of clients that there are is less than one.
    """
    if attack is None:
        return {}
    if not (count := round(attack.share * clients)):
        raise ConfigError(f"engine.attack.share={attack.share}: of {clients} clients that is none")
    places = rng(seed, "hostile").choice(clients, count, replace=False)
    return dict.fromkeys(sorted(places.tolist()), partial(distort, attack))


def distort(attack: AttackSettings, job: Job, update: Update) -> Update:
    """The update with the change of all that travels turned or scaled: received -+ factor * (trained - received)."""
    times = -attack.factor if attack.kind == "sign_flip" else attack.factor
    trained, received = to_rows(update.adapter), to_rows(job.adapter.take(update.adapter.ids))
    rows = {name: own for name, (_, own) in trained.items()}
    for name, own in rows.items():
        if name[0] in job.plan.up:
            old = received[name][1]
            rows[name] = (old + times * (own.astype(float) - old)).astype(own.dtype)
    return replace(update, adapter=from_rows(update.adapter, rows))
