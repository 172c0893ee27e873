"""The roster of many clients: their names, and what belongs to each of them, made when it is asked for."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Generic, TypeVar, overload

V = TypeVar("V")


class Names(Sequence[str]):
    """The names "00", "01", ... of `count` clients, all of one width; none is made before it is asked for."""

    def __init__(self, count: int) -> None:
        self.size, self.width = count, len(str(count - 1))

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(f"{place:0{self.width}}" for place in range(self.size)[at])
        return f"{range(self.size)[at]:0{self.width}}"

    def __contains__(self, name: object) -> bool:
        known = isinstance(name, str) and len(name) == self.width and name.isascii() and name.isdigit()
        return known and int(str(name)) < self.size

    def index(self, name: str, start: int = 0, stop: int = sys.maxsize) -> int:
        """The place of a name; ValueError where it is none of these."""
        if name in self and (at := int(name)) in range(self.size)[start:stop]:
            return at
        raise ValueError(f"{name!r} is none of the {self.size} clients")


class Roster(Mapping[str, V], Generic[V]):
    """names -> what `make` gives for a client's place; the last `kept` of them stay, and must be the same if made again."""

    def __init__(self, names: Sequence[str], make: Callable[[int], V], kept: int = 0) -> None:
        self.names = names
        self._made: Callable[[int], V] = lru_cache(kept)(make) if kept else make

    def __getitem__(self, name: str) -> V:
        try:
            at = self.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        return self._made(at)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def names(clients: Mapping[str, object]) -> Sequence[str]:
    """The keys of any mapping in their order; a roster's are not listed."""
    return clients.names if isinstance(clients, Roster) else tuple(clients)
