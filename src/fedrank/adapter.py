"""The adapter: per module a set of rank-one components b_j e_j a_j^T, and the algebra on such sets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import lt

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

Ids = Int[np.ndarray, "r"]
Shapes = Mapping[str, tuple[int, int]]  # module -> (out, in)

FACTORS = "BeA"


def ascending(ids: np.ndarray) -> bool:
    """Whether every id is larger than the one before."""
    numbers = ids.tolist()  # of so few, a list is compared faster than an array
    return all(map(lt, numbers, numbers[1:]))


@dataclass(frozen=True, eq=False)
class Block:
    """The components of one module; ``delta_W = scale * B diag(e) A``.

    ids: (r,) stable names, ascending. B: (out, r). e: (r,), None means ones where A and B are there.
    A: (r, in). A factor that did not travel is None.
    """

    ids: Ids
    B: Float[np.ndarray, "out r"] | None
    e: Float[np.ndarray, "r"] | None
    A: Float[np.ndarray, "r in"] | None

    def __post_init__(self) -> None:
        if not ascending(self.ids):
            raise ValueError(f"component ids must ascend without repeats, got {self.ids.tolist()}")
        for name in FACTORS:
            factor = getattr(self, name)
            if factor is not None and factor.shape[1 if name == "B" else 0] != len(self.ids):
                raise ValueError(f"{name} has shape {factor.shape} for {len(self.ids)} components")
        # One memory layout, each component's vector contiguous: sums over a vector then give the same
        # bits whether a block was just trained, averaged, or read back from disk.
        if self.B is not None:
            object.__setattr__(self, "B", np.asfortranarray(self.B))
        if self.A is not None:
            object.__setattr__(self, "A", np.ascontiguousarray(self.A))

    @classmethod
    def of(cls, ids: np.ndarray, rows: Mapping[str, np.ndarray]) -> "Block":
        """The components of these `rows`."""
        return cls(ids, rows["B"].T if "B" in rows else None, rows.get("e"), rows.get("A"))

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The factors that are there, a row per component, so B as (r, out)."""
        sides = {"B": None if self.B is None else self.B.T, "e": self.e, "A": self.A}
        return {f: side for f, side in sides.items() if side is not None}

    @property
    def rank(self) -> int:
        return len(self.ids)

    def at(self, index: np.ndarray) -> "Block":
        """The components at these positions (an index or a boolean mask)."""
        return Block.of(self.ids[index], {f: rows[index] for f, rows in self.rows.items()})

    def delta(self, scale: float) -> Float[np.ndarray, "out in"]:
        """The dense increment ``scale * B diag(e) A``."""
        if self.B is None or self.A is None:
            raise ValueError("the increment needs both B and A")
        left = self.B if self.e is None else self.B * self.e
        return np.asarray(scale * (left @ self.A))


@dataclass(frozen=True, eq=False)
class Adapter:
    """Blocks by module name, one common scale, and the small dense tensors that learn beside them.

    A module without components is absent. ``scale`` is alpha / rank at birth and is never
    re-derived from today's rank. ``dense`` holds whole tensors, such as a classification head.
    """

    blocks: Mapping[str, Block]
    scale: float
    dense: Mapping[str, np.ndarray]

    @property
    def ids(self) -> dict[str, np.ndarray]:
        return {name: block.ids for name, block in self.blocks.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in), where both B and A are there."""
        sides = ((name, *halves(name, block)) for name, block in self.blocks.items())
        return {name: (left.shape[0], right.shape[1]) for name, left, right in sides}

    @property
    def components(self) -> int:
        return sum(block.rank for block in self.blocks.values())

    @property
    def factors(self) -> str:
        """Which of "BeAh" it has, h for the dense tensors."""
        there = [f for f in FACTORS if any(getattr(block, f) is not None for block in self.blocks.values())]
        return "".join(there) + "h" * bool(self.dense)

    def odd(self) -> list[str]:
        """The modules and dense tensors that hold NaN or infinity."""
        parts = {name: [getattr(b, f) for f in FACTORS] for name, b in self.blocks.items()}
        parts |= {name: [tensor] for name, tensor in self.dense.items()}
        return [n for n, arrays in parts.items() if not all(a is None or np.isfinite(a).all() for a in arrays)]

    def take(self, ids: Mapping[str, np.ndarray]) -> "Adapter":
        """Only these components; KeyError where one is not there."""
        blocks = {}
        for name, wanted in ids.items():
            if name in self.blocks and np.array_equal(wanted, self.blocks[name].ids):
                blocks[name] = self.blocks[name]
                continue
            wanted = np.unique(wanted)
            if not len(wanted):
                continue
            if name not in self.blocks:
                raise KeyError(f"module {name!r} has no components, asked for {wanted.tolist()}")
            block = self.blocks[name]
            if missing := np.setdiff1d(wanted, block.ids).tolist():
                raise KeyError(f"module {name!r} has no components {missing}")
            blocks[name] = block.at(np.searchsorted(block.ids, wanted))
        return replace(self, blocks=blocks)

    def without(self, ids: Mapping[str, np.ndarray]) -> "Adapter":
        """All other components; a module left with none is dropped."""
        some = {n: b.ids for n, b in self.blocks.items() if n not in ids or not np.array_equal(ids[n], b.ids)}
        return self.take({n: np.setdiff1d(own, ids[n]) if n in ids else own for n, own in some.items()})

    def only(self, factors: str) -> "Adapter":
        """Only these factors ("BeA"), the others None; the dense tensors stay with "h"."""
        blocks = self.blocks
        if not set(FACTORS) <= set(factors):
            blocks = {
                name: Block(block.ids, *(getattr(block, f) if f in factors else None for f in FACTORS))
                for name, block in blocks.items()
            }
        return Adapter(blocks, self.scale, self.dense if "h" in factors else {})

    def fill(self, other: "Adapter") -> "Adapter":
        """This adapter, its missing factors and dense tensors taken from `other` (same components)."""
        source = other.take(self.ids)
        blocks = {}
        for name, block in self.blocks.items():
            parts = [(getattr(block, f), getattr(source.blocks[name], f)) for f in FACTORS]
            blocks[name] = Block(block.ids, *(mine if mine is not None else theirs for mine, theirs in parts))
        return Adapter(blocks, self.scale, {**other.dense, **self.dense})

    def union(self, other: "Adapter") -> "Adapter":
        """The components of both; an id that is in both is refused. Dense tensors: ours win."""
        if other.scale != self.scale:
            raise ValueError(f"adapters of scale {self.scale} and {other.scale} have no union")
        blocks = dict(self.blocks)
        for name, theirs in other.blocks.items():
            if name not in blocks:
                blocks[name] = theirs
                continue
            ids = np.concatenate([blocks[name].ids, theirs.ids])
            mine, added = blocks[name].rows, theirs.rows
            if odd := [f for f in FACTORS if (f in mine) != (f in added)]:
                raise ValueError(f"module {name!r}: factor {odd[0]} is in one of the two adapters only")
            order = np.argsort(ids, kind="stable")
            blocks[name] = Block.of(ids[order], {f: np.concatenate([mine[f], added[f]])[order] for f in mine})
        return Adapter(blocks, self.scale, {**other.dense, **self.dense})

    def astype(self, kind: DTypeLike) -> "Adapter":
        """The same numbers in another dtype."""

        def cast(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array.astype(kind)

        blocks = {n: Block(b.ids, *(cast(getattr(b, f)) for f in FACTORS)) for n, b in self.blocks.items()}
        return Adapter(blocks, self.scale, {name: tensor.astype(kind) for name, tensor in self.dense.items()})

    def delta(self) -> dict[str, np.ndarray]:
        """Module -> dense increment (out, in)."""
        return {name: block.delta(self.scale) for name, block in self.blocks.items()}


def gaussian(shapes: Shapes, rank: int, scale: float, rng: np.random.Generator, std: float = 0.02) -> Adapter:
    """The SVD form's start: A and B ~ N(0, std^2), e = 0, so the increment is zero (AdaLoRA's law)."""
    blocks = {}
    for name, (out, in_) in shapes.items():
        a = rng.normal(0.0, std, (rank, in_)).astype(np.float32)
        b = rng.normal(0.0, std, (rank, out)).astype(np.float32)
        blocks[name] = Block(np.arange(rank), b.T, np.zeros(rank, np.float32), a)
    return Adapter(blocks, scale, {})


def kaiming(shapes: Shapes, rank: int | Mapping[str, int], scale: float, rng: np.random.Generator) -> Adapter:
    """LoRA's start: A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming with a = sqrt 5), B = 0, no e.

    rank: of every module, or of each by its name; the scale is common all the same.
    """
    ranks = dict.fromkeys(shapes, rank) if isinstance(rank, int) else rank
    blocks = {}
    for name, (out, in_) in shapes.items():
        bound, rank = in_**-0.5, ranks[name]
        a = rng.uniform(-bound, bound, (rank, in_)).astype(np.float32)
        blocks[name] = Block(np.arange(rank), np.zeros((rank, out), np.float32).T, None, a)
    return Adapter(blocks, scale, {})


def recompress(adapter: Adapter) -> Adapter:
    """The same increment as its SVD: B and A orthonormal, e = singular values / scale, descending.

    QR of the factors and an SVD of the small core; no (out, in) matrix is formed. Singular values
    below the round-off of the largest are dropped.
    """
    blocks = {}
    for name, block in adapter.blocks.items():
        left, right = halves(name, block)
        kind = right.dtype
        u, s, vt = _svd(left, right, kind)
        if len(s):
            blocks[name] = Block(np.arange(len(s)), u.astype(kind), s.astype(kind), vt.astype(kind))
    return Adapter(blocks, adapter.scale, adapter.dense)


def truncate(increment: Adapter, old: Adapter, power: float) -> Adapter:
    """The best approximation of an increment at the ranks of `old`, as B = U S^power, A = S^(1 - power) V^T.

    Ids, scale, dtype and dense tensors are those of `old`; singular values fall with the ids. Beyond the increment's
    own rank a component keeps its old A and has B = 0: it adds nothing and can still learn, as at LoRA's start.
    Were both zero, as U S^1/2 and S^1/2 V^T would have it, neither would ever get a gradient.
    """
    blocks = {}
    for name, block in old.blocks.items():
        _, kept = halves(name, block)
        left, right = halves(name, increment.blocks[name])
        u, s, vt = _svd(left * (increment.scale / old.scale), right, kept.dtype)
        u, s, vt = u[:, : block.rank], s[: block.rank], vt[: block.rank]
        b, a = np.zeros((len(u), block.rank), kept.dtype), kept.copy()
        b[:, : len(s)], a[: len(s)] = u * s**power, s[:, None] ** (1 - power) * vt
        blocks[name] = Block(block.ids, b, None, a)
    return Adapter(blocks, old.scale, old.dense)


def halves(name: str, block: Block) -> tuple[Float[np.ndarray, "out r"], Float[np.ndarray, "r in"]]:
    """B diag(e) and A of a module, the increment but for its scale; ValueError where one of them did not travel."""
    if block.B is None or block.A is None:
        raise ValueError(f"module {name!r}: the increment needs both B and A")
    return (block.B if block.e is None else block.B * block.e), block.A


Svd = tuple[Float[np.ndarray, "out n"], Float[np.ndarray, "n"], Float[np.ndarray, "n in"]]


def _svd(left: Float[np.ndarray, "out r"], right: Float[np.ndarray, "r in"], kind: np.dtype) -> Svd:
    """U, S, V^T of left @ right by QR of each and the SVD of the small core, in float64.

    Without what is below the round-off of the largest in the dtype `kind`.
    """
    q_left, r_left = np.linalg.qr(left.astype(np.float64))
    q_right, r_right = np.linalg.qr(right.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    keep = int((s > s[0] * np.finfo(kind).eps).sum()) if len(s) else 0
    return q_left @ u[:, :keep], s[:keep], vt[:keep] @ q_right.T


def norms(adapter: Adapter) -> dict[str, Float[np.ndarray, "r"]]:
    """Module -> |e_j| * |b_j| * |a_j| per component, float64."""
    result = {}
    for name, block in adapter.blocks.items():
        size = np.ones(block.rank)
        if block.e is not None:
            size = size * np.abs(block.e.astype(np.float64))
        if block.B is not None:
            size = size * np.linalg.norm(block.B.astype(np.float64), axis=0)
        if block.A is not None:
            size = size * np.linalg.norm(block.A.astype(np.float64), axis=1)
        result[name] = size
    return result


def to_arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    """The adapter as arrays by name: "B/<module>" and so on, "ids/<module>", "h/<dense tensor>"."""
    arrays: dict[str, np.ndarray] = {}
    for name, block in adapter.blocks.items():
        factors = {f: getattr(block, f) for f in FACTORS if getattr(block, f) is not None}
        arrays |= {f"ids/{name}": block.ids} | {f"{f}/{name}": factor for f, factor in factors.items()}
    return arrays | {f"h/{name}": tensor for name, tensor in adapter.dense.items()}


def from_arrays(arrays: Mapping[str, np.ndarray], scale: float) -> Adapter:
    """The adapter of such arrays, in their order; others beside them are left out."""
    named: dict[str, dict[str, np.ndarray]] = {part: {} for part in ("ids", "h", *FACTORS)}
    for key, array in arrays.items():
        part, _, name = key.partition("/")
        if part in named:
            named[part][name] = array
    blocks = {name: Block(ids, *(named[f].get(name) for f in FACTORS)) for name, ids in named["ids"].items()}
    return Adapter(blocks, scale, named["h"])


def to_rows(adapter: Adapter) -> dict[str, tuple[Ids, np.ndarray]]:
    """Every factor by name ("B/<module>" and so on), one row per component, and the ids of the rows.

    A dense tensor ("h/<dense tensor>") is one row.
    """
    found = {f"h/{name}": (np.arange(1), tensor[None]) for name, tensor in adapter.dense.items()}
    for name, block in adapter.blocks.items():
        found |= {f"{f}/{name}": (block.ids, rows) for f, rows in block.rows.items()}
    return found


def from_rows(like: Adapter, rows: Mapping[str, np.ndarray]) -> Adapter:
    """The adapter of such rows, with the components, factors and dense tensors of `like`."""
    blocks = {n: Block.of(block.ids, {f: rows[f"{f}/{n}"] for f in block.rows}) for n, block in like.blocks.items()}
    return Adapter(blocks, like.scale, {name: rows[f"h/{name}"][0] for name in like.dense})


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def split(flat: np.ndarray, counts: Iterable[int]) -> list[np.ndarray]:
    """A flat array cut into pieces of these lengths, as views."""
    edges = np.concatenate([[0], np.cumsum(list(counts))]).astype(int)
    return [flat[a:b] for a, b in pairwise(edges)]
