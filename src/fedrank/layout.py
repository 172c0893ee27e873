"""How an adapter lies in a frame: one flat tensor per factor, in module and id order, and component ids as bits."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrank.adapter import FACTORS, Adapter, Block, split
from fedrank.frame import DTYPES, EXACT, Dtype, Refused, decode, encode, finite
from fedrank.protocol import ModelSpec

MAX_WIDTH = 1 << 16  # component ids are below this


@dataclass(frozen=True, eq=False)
class Layout:
    """What both ends know of one run's adapters.

    start: the adapter as ``begin`` made it; it says which factors and dense tensors exist, and low
    precision travels down as the difference to it (and up as the difference to what came down, or
    again to the start where nothing did).
    """

    spec: ModelSpec
    start: Adapter
    dtype: Dtype

    def bits(self, ids: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        """Id sets as bits: one row of `width` bits per module, packed without padding between rows."""
        grid = np.zeros((len(self.spec.modules), width), bool)
        sets = {at: ids[m.name] for at, m in enumerate(self.spec.modules) if len(ids.get(m.name, ()))}
        if sets:
            grid[np.repeat(list(sets), list(map(len, sets.values()))), np.concatenate(list(sets.values()))] = True
        return np.packbits(grid)

    def ids(self, bits: np.ndarray | None, width: int) -> dict[str, np.ndarray]:
        """The inverse of `bits`; None says that there are none. Refused where they do not fit the model."""
        if bits is None:
            return {}
        count = len(self.spec.modules)
        if not 0 < width <= MAX_WIDTH or bits.dtype != np.uint8 or bits.shape != (math.ceil(width * count / 8),):
            raise Refused(f"component ids {bits.dtype}{list(bits.shape)} do not fit {count} modules of {width}")
        grid = np.unpackbits(bits, count=width * count).reshape(count, width)
        return {m.name: np.flatnonzero(row) for m, row in zip(self.spec.modules, grid, strict=True) if row.any()}

    def write(self, adapter: Adapter, reference: Adapter, draw: Callable[[str], np.random.Generator]) -> dict[str, Any]:
        """A frame's tensors. reference: what the other end holds; draw: by a tensor's name, for its rounding."""
        tensors: dict[str, Any] = {}
        for name, chunks, lengths in self._flat(adapter):
            if self.dtype in EXACT:
                tensors[name] = [chunk.astype(DTYPES[self.dtype], copy=False) for chunk in chunks]
                continue
            values = np.concatenate([chunk.reshape(-1) for chunk in chunks])
            finite({name: values})  # before infinity is clipped
            values -= self._reference(name, adapter.ids, reference, values.size)
            tensors |= encode(name, values, lengths, self.dtype, draw(name))
        return tensors

    def read(
        self, tensors: dict[str, np.ndarray], ids: Mapping[str, np.ndarray], factors: str, reference: Adapter,
        scale: float,
    ) -> Adapter:  # fmt: skip
        """The adapter of exactly these components and factors; Refused where a tensor is missing, extra or odd."""
        ids = {m.name: np.asarray(ids[m.name]) for m in self.spec.modules if len(ids.get(m.name, ()))}
        if unknown := set(factors) - set("BeAh"):
            raise Refused(f"unknown factors {sorted(unknown)}")
        lengths = {f: self._lengths(f, ids) for f in FACTORS if f in factors and f in self.start.factors and ids}
        flat: dict[str, np.ndarray] = {}
        shapes = self.start.dense if "h" in factors else {}
        every = lengths | {f"h.{name}": _rows(tensor.shape) for name, tensor in shapes.items()}
        for name, rows in every.items():
            with np.errstate(over="ignore"):
                flat[name] = found = decode(name, tensors, rows, self.dtype)
                if self.dtype == "f32":
                    continue
                if self.dtype not in EXACT:
                    found += self._reference(name, ids, reference, found.size)
                if not np.isfinite(found.astype(np.float32)).all():  # adapters are float32, whatever travels
                    raise Refused(f"tensor {name!r} decodes to NaN or infinity")
        names = set(every) | ({f"{name}.scale" for name in every} if self.dtype == "int8" else set())
        if extra := set(tensors) - names:
            raise Refused(f"tensors {sorted(extra)} were not asked for")
        blocks = {}
        counts = {name: len(i) for name, i in ids.items()}
        pieces = {f: split(flat[f], (self._vector(f, n) * r for n, r in counts.items())) for f in lengths}
        for at, (name, i) in enumerate(ids.items()):
            part = {f: pieces[f][at] for f in lengths}
            blocks[name] = Block.of(i, {f: p if f == "e" else p.reshape(len(i), -1) for f, p in part.items()})
        dense = {name: flat[f"h.{name}"].reshape(tensor.shape) for name, tensor in shapes.items()}
        return Adapter(blocks, scale, dense)

    def _vector(self, factor: str, module: str) -> int:
        """Numbers per component."""
        out, in_ = self.spec.shapes[module]
        return {"B": out, "e": 1, "A": in_}[factor]

    def _lengths(self, factor: str, ids: Mapping[str, np.ndarray]) -> np.ndarray:
        """The lengths of the rows that a flat factor is made of: one per component; e is one row per module."""
        if factor == "e":
            return np.array([len(i) for i in ids.values()])
        shapes = self.spec.shapes
        side = 0 if factor == "B" else 1
        return np.repeat([shapes[name][side] for name in ids], [len(i) for i in ids.values()])

    def _flat(self, adapter: Adapter) -> list[tuple[str, list[np.ndarray], np.ndarray]]:
        """Each tensor of the frame: its name, its pieces in order, and the lengths of its rows."""
        ordered = {m.name: adapter.blocks[m.name] for m in self.spec.modules if m.name in adapter.blocks}
        ids = {name: block.ids for name, block in ordered.items()}
        result, rows = [], [block.rows for block in ordered.values()]
        for f in FACTORS:
            if parts := [present[f] for present in rows if f in present]:
                result.append((f, parts, self._lengths(f, ids)))
        for name, tensor in adapter.dense.items():
            result.append((f"h.{name}", [tensor.reshape(-1)], _rows(tensor.shape)))
        return result

    def _reference(self, name: str, ids: Mapping[str, np.ndarray], reference: Adapter, size: int) -> np.ndarray:
        """What the other end holds of this tensor, flat; zeros for components that it does not hold."""
        if name.startswith("h."):
            held = reference.dense.get(name[2:], self.start.dense.get(name[2:]))
            return np.zeros(size, np.float32) if held is None else held.reshape(-1)
        parts = []
        for module in self.spec.modules:
            wanted = ids.get(module.name, np.empty(0, int))
            part = np.zeros((len(wanted), self._vector(name, module.name)), np.float32)
            for adapter in (self.start, reference):
                block = adapter.blocks.get(module.name)
                if block is None or name not in block.rows:
                    continue
                rows = block.rows[name].reshape(block.rank, -1)
                _, mine, theirs = np.intersect1d(wanted, block.ids, assume_unique=True, return_indices=True)
                part[mine] = rows[theirs]
            parts.append(part.reshape(-1))
        return np.concatenate(parts)


def _rows(shape: tuple[int, ...]) -> np.ndarray:
    """Row lengths of a dense tensor: its last axis; a vector is one row."""
    return np.full(math.prod(shape[:-1]), shape[-1]) if shape else np.array([1])
