"""Server optimizers: the change that a round's mean makes is taken as a gradient (FedAvgM, FedAdam, FedYogi)."""

from dataclasses import replace

import numpy as np

from fedrank.adapter import from_rows, to_rows
from fedrank.config import ServerSettings
from fedrank.protocol import State

NAME = "optimizer/"  # of the moments among the state's arrays; they lie as the state's components do


def step(before: State, merged: State, settings: ServerSettings) -> State:
    """The merged state, gone from `before` by the optimizer's step in place of the mean change d.

    fedavgm (Hsu, Qi and Brown, 2019, arXiv:1909.06335): m = beta1 m + d, the step is lr m. fedadam, fedyogi
    (Reddi et al., 2021, arXiv:2003.00295, Algorithm 2, so without bias correction): m = beta1 m + (1 - beta1) d,
    the step is lr m / (sqrt(v) + tau), where v starts at tau^2, and v = beta2 v + (1 - beta2) d^2 or
    v = v - (1 - beta2) d^2 sign(v - d^2).

    What a round left alone is left alone with its moments: each factor of each component, each dense tensor
    (a frozen factor must not drift, clients hold it as it was). New components start without moments.
    """
    if settings.optimizer == "none":
        return merged
    old, new = to_rows(before.adapter), to_rows(merged.adapter)
    moments, stepped = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name, (ids, rows) in new.items():
        were, values = old.get(name, (ids[:0], rows[:0]))
        _, at, then = np.intersect1d(ids, were, assume_unique=True, return_indices=True)
        change = np.subtract(rows[at], values[then], dtype=np.float64)
        moved = change.reshape(len(at), -1).any(axis=1)
        at_moved, d = at[moved], change[moved]
        kept = {}
        for moment, start in (("m", 0.0), ("v", settings.tau**2)):
            kept[moment] = np.full(rows.shape, start, rows.dtype)
            if (known := before.arrays.get(f"{NAME}{moment}/{name}")) is not None:
                kept[moment][at] = known[then]
        m, v = (kept[moment][at_moved].astype(np.float64) for moment in "mv")
        if settings.optimizer == "fedavgm":
            m = settings.beta1 * m + d
            go = settings.lr * m
            del kept["v"]
        else:
            m = settings.beta1 * m + (1 - settings.beta1) * d
            towards = d**2 - v if settings.optimizer == "fedadam" else d**2 * np.sign(d**2 - v)
            v = v + (1 - settings.beta2) * towards
            go = settings.lr * m / (np.sqrt(v) + settings.tau)
            kept["v"][at_moved] = v
        kept["m"][at_moved] = m
        moments |= {f"{NAME}{moment}/{name}": array for moment, array in kept.items()}
        stepped[name] = rows.copy()
        stepped[name][at_moved] = rows[at_moved] + (go - d)  # where the step is d itself, to the bit what was merged
    others = {name: array for name, array in merged.arrays.items() if not name.startswith(NAME)}
    return replace(merged, adapter=from_rows(merged.adapter, stepped), arrays=others | moments)
