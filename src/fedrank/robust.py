"""Robust aggregation: which updates are refused as a whole, and medians and trimmed means in the place of means."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from fedrank.adapter import Adapter, from_rows, to_rows
from fedrank.aggregation import uniform
from fedrank.config import ServerSettings
from fedrank.protocol import ClientId, Total, Update, Updates
from fedrank.trace import span

LARGEST = 1e6  # an update's number may be: far above what is ever learnt, and far below what overflows in a merge
HELD = 1 << 28  # bytes of all updates together that are in memory at once, where one factor of a module takes no more


def least(rule: ServerSettings) -> int:
    """The fewest updates of which the rule can make a merge."""
    f = rule.hostile or 0
    return {"trimmed_mean": 2 * f + 1, "krum": 2 * f + 3, "multi_krum": 2 * f + 3}.get(rule.aggregation, 1)


def screen(updates: Updates, adapter: Adapter, rule: ServerSettings) -> dict[ClientId, str]:
    """Who is not to be merged, and why.

    adapter: the server's, to which an update is a change. Bounds on the change's norm come first, each by itself and
    by the median of all norms of the round, then Krum among those that are left. A rule of which too few are left
    refuses them all.
    """
    if not len(updates) or ((rule.max_norm, rule.max_norm_ratio) == (None, None) and least(rule) == 1):
        return {}
    with span("aggregation"):
        return _screen(updates, adapter, rule)


def _screen(updates: Updates, adapter: Adapter, rule: ServerSettings) -> dict[ClientId, str]:
    krum = rule.aggregation in ("krum", "multi_krum")
    changed = partial(change, adapter)
    norms = {client: norm(changed(update)) for client, update in updates}
    middle, refused = float(np.median(list(norms.values()))), dict[ClientId, str]()
    for client, size in norms.items():
        if rule.max_norm is not None and size > rule.max_norm:
            refused[client] = f"its change has norm {size:.4g}, above server.max_norm={rule.max_norm:g}"
        elif rule.max_norm_ratio is not None and size > rule.max_norm_ratio * middle:
            refused[client] = (
                f"its change has norm {size:.4g}, above server.max_norm_ratio={rule.max_norm_ratio:g} times {middle:.4g}, "
                "the median of the round"
            )
    left = [client for client in norms if client not in refused]
    if left and len(left) < least(rule):
        why = f"server.aggregation={rule.aggregation} with server.hostile={rule.hostile} needs {least(rule)} updates, there are {len(left)}"
        return refused | dict.fromkeys(left, why)
    if left and krum:
        assert rule.hostile is not None
        among = [at for at, client in enumerate(norms) if client not in refused]
        scores = krum_scores(squared_distances(updates, changed)[np.ix_(among, among)], rule.hostile)
        order = np.argsort(scores, kind="stable")  # of equal ones the first in client order
        taken = 1 if rule.aggregation == "krum" else len(left) - rule.hostile
        for at in order[taken:]:
            refused[left[at]] = (
                f"server.aggregation={rule.aggregation} takes {taken} of {len(left)} updates, whose scores are at most "
                f"{scores[order[taken - 1]]:.4g}; this one's is {scores[at]:.4g}"
            )
    return refused


def change(adapter: Adapter, update: Update) -> Adapter:
    """What an update changes of an adapter that has its components: the difference, in float64."""
    mine, old = to_rows(update.adapter), to_rows(adapter.take(update.adapter.ids))
    moved = {name: np.subtract(rows, old[name][1], dtype=np.float64) for name, (_, rows) in mine.items()}
    return from_rows(update.adapter, moved)


def norm(adapter: Adapter) -> float:
    """The L2 norm of all its numbers together."""
    return float(np.sqrt(sum(np.sum(np.square(rows)) for _, rows in to_rows(adapter).values())))


def largest(adapter: Adapter) -> float:
    """The largest of its numbers, signs aside; 0 where it has none."""
    return max(
        (float(abs(end)) for _, rows in to_rows(adapter).values() if rows.size for end in (rows.min(), rows.max())),
        default=0.0,
    )


def krum_scores(squared: Float[np.ndarray, "n n"], hostile: int) -> Float[np.ndarray, "n"]:
    """Of each vector the sum of its squared distances to the n - f - 2 nearest others.

    Blanchard, El Mhamdi, Guerraoui and Stainer (2017, section 4), f of n vectors being hostile; they take the vector
    with the least, or in Multi-Krum the mean of several: of n - f here.
    """
    return np.asarray(np.sort(squared, axis=1)[:, 1 : len(squared) - hostile - 1].sum(axis=1))  # the first: to itself


def squared_distances(updates: Updates, changed: Callable[[Update], Adapter]) -> Float[np.ndarray, "n n"]:
    """Between all changes, over all that travels; what an update lacks it does not change."""
    found = np.zeros((len(updates), len(updates)))
    for _, values in _stacks(updates, changed, updates.total(changed, uniform).sums):
        rows = np.nan_to_num(values.reshape(len(values), -1), copy=False)
        for at in range(len(rows) - 1):
            apart = rows[at + 1 :] - rows[at]
            found[at, at + 1 :] += np.einsum("nd,nd->n", apart, apart)
    return found + found.T


def centred(updates: Updates, rule: ServerSettings, returns: Collection[str] = ()) -> Updates:
    """The same updates, with the totals that the rule asks for. returns: the names of plans' arrays, which are votes."""
    if rule.aggregation in ("median", "trimmed_mean"):
        return Centred(updates, rule.hostile, returns)
    return updates


@dataclass(frozen=True, eq=False)
class Centred:
    """Updates whose total is a robust centre times the number of those behind it, so that a mean of it is that centre.

    By coordinate, over those that carry the component: the mean of what is left once the `hostile` smallest and largest
    values are cut off, or all but the middle, the median, where it is None (Yin, Chen, Ramchandran and Bartlett, 2018,
    definitions 1 and 2). Of a component that too few carry to cut so many, the median. Every client counts the same:
    a claim of many examples would be a way round. What is read of the updates one by one is not centred, nor are sums of
    `returns`, votes: the middle of yes and no is the majority's word, where a method asks for its share.
    """

    updates: Updates
    hostile: int | None
    returns: Collection[str]

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[tuple[ClientId, Update]]:
        return iter(self.updates)

    def total(self, fn: Callable[[Update], Adapter], weight: Callable[[Update], float]) -> Total:
        plain = self.updates.total(fn, uniform)
        if not plain.sums.dense.keys().isdisjoint(self.returns):
            return plain
        rows = {name: self._sum(values) for name, values in _stacks(self.updates, fn, plain.sums)}
        return replace(plain, sums=from_rows(plain.sums, rows))

    def _sum(self, values: Float[np.ndarray, "n r *w"]) -> Float[np.ndarray, "r *w"]:
        values.sort(axis=0)  # what is lacking, NaN, comes last
        carriers = len(values) - np.isnan(values.reshape(*values.shape[:2], -1)[:, :, 0]).sum(axis=0)
        result = np.empty(values.shape[1:])
        for count in np.unique(carriers):
            most = (count - 1) // 2
            cut, at = most if self.hostile is None else min(self.hostile, most), carriers == count
            result[at] = values[cut : count - cut, at].mean(axis=0) * count
        return result


def _stacks(
    updates: Updates, fn: Callable[[Update], Adapter], like: Adapter
) -> Iterator[tuple[str, Float[np.ndarray, "n r *w"]]]:
    """Every factor of every module and every dense tensor, of all updates: its name, and a row for each component.

    like: with the components of all of them. NaN where an update lacks one. As many are in memory at once as `HELD`
    allows, one at least; for each lot the updates are read once.
    """
    layout, lots, room = to_rows(like), list[dict[str, np.ndarray]](), 0
    for name, (ids, rows) in layout.items():
        room -= len(updates) * rows.size * 8
        if room < 0 or not lots:
            lots.append({})
            room = HELD - len(updates) * rows.size * 8
        lots[-1][name] = ids
    for lot in lots:
        held = {name: np.full((len(updates), *layout[name][1].shape), np.nan) for name in lot}
        for at, (_, update) in enumerate(updates):
            found = to_rows(fn(update))
            for name in lot.keys() & found.keys():
                ids, rows = found[name]
                held[name][at, np.searchsorted(lot[name], ids)] = rows
        for name in lot:
            yield name, held.pop(name)
