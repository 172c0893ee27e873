"""Sums and means of increments: products B A, not their factors one by one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from fedrank.adapter import Adapter, Block, halves
from fedrank.aggregation import examples
from fedrank.protocol import State, Update, Updates

SLOW = 2  # a number in a QR costs about as much as so many in a product


@dataclass(eq=False)
class _Sum:
    """One module's sum: factors side by side, or a matrix once their summed rank reaches a side of it. float64."""

    lefts: list[Float[np.ndarray, "out r"]] = field(default_factory=list)
    rights: list[Float[np.ndarray, "r in"]] = field(default_factory=list)
    whole: Float[np.ndarray, "out in"] | None = None

    def add(self, left: Float[np.ndarray, "out r"], right: Float[np.ndarray, "r in"]) -> None:
        self.lefts.append(left)
        self.rights.append(right)
        if self.whole is not None or sum(map(len, self.rights)) >= min(len(left), right.shape[1]):
            self._multiply()

    def add_whole(self, matrix: Float[np.ndarray, "out in"]) -> None:
        if self.lefts:
            self._multiply()
        self.whole = matrix if self.whole is None else self.whole + matrix

    def _multiply(self) -> None:
        product = np.hstack(self.lefts) @ np.vstack(self.rights)
        self.lefts, self.rights = [], []
        self.whole = product if self.whole is None else self.whole + product

    def product(self) -> Float[np.ndarray, "out in"]:
        """As one matrix."""
        return np.hstack(self.lefts) @ np.vstack(self.rights) if self.whole is None else self.whole

    def pair(self) -> tuple[Float[np.ndarray, "out r"], Float[np.ndarray, "r in"]]:
        """As two factors: those stacked, or the matrix W as I W or W I."""
        if self.whole is None:
            return np.hstack(self.lefts), np.vstack(self.rights)
        out, in_ = self.whole.shape
        return (np.eye(out), self.whole) if out <= in_ else (self.whole, np.eye(in_))

    def square(self) -> float:
        """The squared Frobenius norm."""
        if self.whole is None:
            left, right = self.pair()
            if SLOW * (left.size + right.size) < len(left) * right.shape[1]:
                # X Y has the norm of the product of the triangles of X and Y'. Gram matrices would give it too, but
                # their round-off is squared: two equal functions would seem 1e-8 apart.
                triangles = [np.asarray(np.linalg.qr(side, mode="r")) for side in (left, right.T)]
                return float(np.sum(np.square(triangles[0] @ triangles[1].T)))
            return float(np.sum(np.square(left @ right)))
        return float(np.sum(np.square(self.whole)))


@dataclass(eq=False)
class Increment:
    """A running weighted sum of increments, all modules, exact in float64; kept as factors while the stacked rank is small.

    scale: of the sum as an adapter.
    """

    scale: float = 1.0
    modules: dict[str, _Sum] = field(default_factory=dict)

    def add(self, adapter: Adapter, weight: float | Mapping[str, np.ndarray] = 1.0) -> "Increment":
        """Add weight * delta_W; a weight by module is one per component. Weights stand on A only."""
        for name, block in adapter.blocks.items():
            left, right = halves(name, block)
            size = np.broadcast_to(weight[name] if isinstance(weight, Mapping) else weight, block.rank)
            if (there := np.flatnonzero(size)).size:
                left = left[:, there].astype(np.float64) * (adapter.scale / self.scale)
                right = right[there].astype(np.float64) * size[there, None]
                self.modules.setdefault(name, _Sum()).add(left, right)
        return self

    def add_base(self, updates: Iterable[Adapter], weight: float = 1.0) -> "Increment":
        """Add weight * the increments of a frozen base, in their order; a whole tensor sums up all before it."""
        updates = list(updates)
        last = {name: at for at, update in enumerate(updates) for name in update.dense}
        for at, update in enumerate(updates):
            self.add(update.take({n: ids for n, ids in update.ids.items() if at > last.get(n, -1)}), weight)
            for name, tensor in update.dense.items():
                if last[name] == at:
                    part = tensor.astype(np.float64) * (weight / self.scale)
                    self.modules.setdefault(name, _Sum()).add_whole(part)
        return self

    def adapter(self) -> Adapter:
        """The sum's stacked factors, or matrices as I W or W I; components are numbered anew."""
        pairs = {name: module.pair() for name, module in self.modules.items()}
        return Adapter({n: Block(np.arange(len(a)), b, None, a) for n, (b, a) in pairs.items()}, self.scale, {})

    def delta(self) -> dict[str, Float[np.ndarray, "out in"]]:
        """The sum by module."""
        return {name: self.scale * module.product() for name, module in self.modules.items()}

    def norm(self) -> float:
        """The Frobenius norm, over all modules together."""
        return self.scale * float(np.sqrt(sum(module.square() for module in self.modules.values())))


def product_mean(
    old: Adapter, updates: Updates, weight: Callable[[Update], float] = examples,
    absent: Literal["zero", "skip"] = "zero",
) -> Adapter:  # fmt: skip
    """The weighted mean of the clients' increments, sum_k p_k B_k A_k, as stacked factors; p_k stands on A only.

    absent: what a client that lacks a component counts as: "zero" as nothing there, so that what no update carries
    is gone; "skip" leaves it out of the mean, component by component, and what no update carries is as in `old`.
    """
    found = updates.total(lambda update: update.adapter.only(""), weight)
    mean = Increment(old.scale)
    for _, update in updates:
        shares = {}
        for name, block in update.adapter.blocks.items():
            carried = found.weights[name][np.searchsorted(found.sums.blocks[name].ids, block.ids)]
            shares[name] = weight(update) / (carried if absent == "skip" else np.full(block.rank, found.weight))
        mean.add(update.adapter, shares)
    if absent == "skip":
        mean.add(old.without(found.sums.ids))
    return mean.adapter()


def residual(mean: Adapter, updates: Updates, weight: Callable[[Update], float] = examples) -> Adapter:
    """What the product of the means lacks of the mean of the products: sum_k p_k B_k A_k - B A, B and A from `mean`.

    As sum_k p_k (B_k - B)(A_k - A_1), which is the same because sum_k p_k (B_k - B) = 0: so it is small without
    cancelling, and of |S| - 1 ranks where the three-term form has |S| + 1. Clients must hold the same components.
    """
    whole = updates.total(lambda update: update.adapter.only(""), weight).weight
    first: dict[str, Float[np.ndarray, "r in"]] = {}
    found = Increment(mean.scale)
    for client, update in updates:
        blocks = {}
        for name, block in update.adapter.blocks.items():
            b, a = (half.astype(np.float64) for half in halves(name, block))
            centre = mean.blocks[name]
            if not np.array_equal(block.ids, centre.ids):
                raise ValueError(f"client {client!r} holds {block.rank} of {centre.rank} components of {name!r}")
            if name in first:
                blocks[name] = Block(block.ids, b - halves(name, centre)[0], None, a - first[name])
            else:
                first[name] = a
        found.add(Adapter(blocks, update.adapter.scale, {}), weight(update) / whole)
    return found.adapter()


def promise(state: State, increment: Adapter) -> dict[int, Adapter]:
    """The base updates after a merge that adds this increment: those of `state`, and it as factors.

    Once all the factors that are kept have more numbers than the matrices of their modules, everything promised so
    far becomes one whole increment of this round, so that neither the state nor what a new client is sent goes on
    growing. The dtype is the adapter's.
    """
    round, shapes = state.round + 1, state.adapter.shapes
    kind = np.result_type(*(halves(*item)[1] for item in state.adapter.blocks.items()))
    kept = dict(state.base_updates)
    if increment.blocks:
        kept[round] = increment.astype(kind)
    numbers = sum(block.rank * sum(shapes[name]) for update in kept.values() for name, block in update.blocks.items())
    if numbers <= sum(out * in_ for out, in_ in shapes.values()):
        return kept
    whole = Increment().add_base([*state.base_updates.values(), increment]).delta()
    return {round: Adapter({}, increment.scale, whole).astype(kind)}
