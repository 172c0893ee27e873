"""The frozen prefix: what enters the lowest block with components, computed once for a client's rows and kept on disk."""

import fcntl
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedrank.training import packing, tasks
from fedrank.training.flow import block
from fedrank.training.packing import layout
from fedrank.training.tasks import Encoded

log = logging.getLogger(__name__)
CHUNK = 32  # rows that are computed together: always the same ones, so that their bits do not hang on what is kept


class Chunk(NamedTuple):
    """Rows that are computed together. stamp: names what their states hang on."""

    rows: np.ndarray
    stamp: int


def batches(encoded: Encoded, rows: np.ndarray, packs: bool) -> Iterator[np.ndarray]:
    """Rows that are computed together.

    Where they are packed, as they come: batches then have about as many tokens each, and few kernels are made.
    """
    if not packs:
        return tasks.by_length(encoded, rows, CHUNK)
    return (rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK))


def chunked(batches: Iterable[np.ndarray], at: int, base: str) -> dict[int, Chunk]:
    """Each row's chunk, of these batches, at the entrance of block `at` over what is frozen below it."""
    found = {}
    for rows in batches:
        state = xxhash.xxh3_64(f"{at} {base}".encode())
        state.update(rows.astype(np.int64).tobytes())
        found.update(dict.fromkeys(rows.tolist(), Chunk(rows, state.intdigest() or 1)))  # 0: nothing is kept
    return found


class _Reached(Exception):
    def __init__(self, states: Tensor) -> None:
        self.states = states


@dataclass(frozen=True, eq=False)
class Blocks:
    """The transformer blocks of a model that can be begun at any of them. tuples: a block returns a tuple.

    stem: what may drop numbers out before the first of them.
    """

    modules: Mapping[int, nn.Module]
    tuples: bool
    stem: Sequence[nn.Module] = ()

    def below(self, at: int) -> list[nn.Module]:
        """What runs before block `at`."""
        return [*self.stem, *(module for number, module in self.modules.items() if number < at)]

    def entering(self, at: int, run: Callable[[], Any]) -> Tensor:
        """The hidden states that a forward pass gives to block `at`; nothing above it is computed."""
        with replaced({self.modules[at]: _stop}):
            try:
                run()
            except _Reached as reached:
                return reached.states
        raise RuntimeError(f"the forward pass did not come to block {at}")

    @contextmanager
    def starting(self, at: int, states: Tensor) -> Iterator[None]:
        """Forward passes begin with these hidden states at block `at` while the block runs."""
        module = self.modules[at]
        passing = dict.fromkeys(self.below(at)[len(self.stem) :], self._pass)
        with replaced({**passing, module: partial(_begin, module.forward, states)}):
            yield

    def _pass(self, *given: Any, **named: Any) -> Any:
        return (_states(*given, **named),) if self.tuples else _states(*given, **named)


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """These modules compute otherwise while the block runs."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward  # seen before the class's own
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def checkpointed(base: Any, modules: Mapping[int, nn.Module], at: int, draws: bool) -> AbstractContextManager[None]:
    """From block `at` on, passes keep only what enters each block while the context holds, and compute it again for backward.

    base: whose blocks these are. draws: something is drawn in a pass, which has to be drawn alike then.
    """

    def once_more(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        def around() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), again

        again = packing.again(base)
        return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=draws, context_fn=around, **named)

    return replaced({
        module: partial(once_more, module.forward)
        for number, module in modules.items() if number >= at
    })  # fmt: skip


def _states(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a block is called with, by place or by name; TypeError where that is not hidden states."""
    return hidden_states


def _stop(*given: Any, **named: Any) -> Any:
    raise _Reached(_states(*given, **named))


def _begin(forward: Callable[..., Any], states: Tensor, *given: Any, **named: Any) -> Any:
    if given:
        return forward(states, *given[1:], **named)
    return forward(**{**named, "hidden_states": states})


def blocks(base: nn.Module, names: Sequence[str]) -> dict[int, nn.Module]:
    """The transformer blocks in which these layers are, by their index."""
    found = {}
    for name in names:
        parts = name.split(".")
        number = next(at for at, part in enumerate(parts) if part.isdigit())
        found[int(parts[number])] = base.get_submodule(".".join(parts[: number + 1]))
    return dict(sorted(found.items()))


def lowest(names: Sequence[str], modules: Mapping[int, nn.Module]) -> int:
    """The lowest block in which one of these layers is; without any, the last one."""
    return min((number for name in names if (number := block(name)) is not None), default=max(modules))


class Kept:
    """One hidden state of each token of a set, (tokens, width), in a file without a name.

    Processes that are forked later share it, and it is gone with the last of them. A row is kept under a stamp that
    names all that its states hang on; another stamp takes its place.
    """

    def __init__(self, encoded: Encoded, width: int, dtype: torch.dtype) -> None:
        self.encoded, self.width, self.dtype = encoded, width, dtype
        self.size = width * dtype.itemsize  # bytes of a token
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed when this is gone
        self.full = False
        weakref.finalize(self, self.file.close)
        self.stamps = np.frombuffer(mmap.mmap(-1, 8 * len(encoded)), np.uint64)

    def empty(self, rows: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        """Room for the states of these rows, (tokens, width), and each row's part of it."""
        lengths = self.encoded.lengths[rows].tolist()
        whole = torch.empty(sum(lengths), self.width, dtype=self.dtype)
        return whole, list(torch.split(whole, lengths))

    def read(self, rows: np.ndarray, stamps: Sequence[int], parts: Sequence[Tensor]) -> list[int]:
        """Fill in the rows that are kept under these stamps; which ones are not."""
        with self._alone():
            there = self.stamps[rows] == np.array(stamps, np.uint64)
            for at in np.flatnonzero(there).tolist():
                got = os.preadv(self.file.fileno(), [_bytes(parts[at])], self._begin(int(rows[at])))
                there[at] = got == parts[at].nbytes
        return [int(at) for at in np.flatnonzero(~there)]

    def write(self, chunk: Chunk, parts: Sequence[Tensor]) -> None:
        rows = chunk.rows
        if self.full:
            return
        with self._alone():
            self.stamps[rows] = 0
            try:
                for row, part in zip(rows.tolist(), parts, strict=True):
                    if os.pwrite(self.file.fileno(), _bytes(part), self._begin(row)) < part.nbytes:
                        raise OSError("no space left")
            except OSError as error:  # no bit hangs on what is kept
                log.warning("hidden states are not kept in %s and computed anew: %s", tempfile.gettempdir(), error)
                self.full = True
            else:
                self.stamps[rows] = chunk.stamp

    def _begin(self, row: int) -> int:
        return int(self.encoded.starts[row]) * self.size

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Rows may be of several clients, which different workers serve."""
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)


def _bytes(part: Tensor) -> memoryview:
    return part.view(torch.uint8).numpy().data


@dataclass(frozen=True, eq=False)
class Prefix:
    """The states of some rows at the entrance of block `at`. run: a forward pass with what is frozen below it."""

    kept: Kept
    blocks: Blocks
    at: int
    chunks: Mapping[int, Chunk]
    run: Callable[[np.ndarray], Any]
    packs: bool

    def states(self, rows: np.ndarray) -> Tensor:
        """(tokens, width), those of one row after the other."""
        whole, parts = self.kept.empty(rows)
        chunks = [self.chunks[row] for row in rows.tolist()]
        missing = self.kept.read(rows, [chunk.stamp for chunk in chunks], parts)
        while missing:
            chunk = chunks[missing[0]]
            made = dict(zip(chunk.rows.tolist(), self._computed(chunk.rows), strict=True))
            self.kept.write(chunk, list(made.values()))
            for at in missing:
                if chunks[at] is chunk:
                    parts[at].copy_(made[int(rows[at])])
            missing = [at for at in missing if chunks[at] is not chunk]
        return whole

    def _computed(self, rows: np.ndarray) -> list[Tensor]:
        with torch.no_grad():
            found = self.blocks.entering(self.at, lambda: self.run(rows))
        lengths = self.kept.encoded.lengths[rows]
        at = torch.from_numpy(_places(lengths, [len(rows)], self.packs))
        whole = found.reshape(-1, found.shape[-1])[at.to(found.device)].to("cpu", self.kept.dtype)
        return list(torch.split(whole, lengths.tolist()))


def _places(lengths: np.ndarray, counts: Sequence[int], packs: bool) -> np.ndarray:
    """(tokens,): where each token of these rows is, packed or padded."""
    if packs:
        return layout(lengths, counts)[0]
    return np.flatnonzero(np.arange(int(lengths.max())) < lengths[:, None])


def laid(states: Tensor, lengths: np.ndarray, counts: Sequence[int], packs: bool, device: str) -> Tensor:
    """States of one row after the other, (tokens, width), as a batch: (1, filled, width), or (rows, longest, width)."""
    shape = (1, sum(layout(lengths, counts)[1])) if packs else (len(lengths), int(lengths.max()))
    whole = states.new_zeros(shape[0] * shape[1], states.shape[-1])
    whole[torch.from_numpy(_places(lengths, counts, packs))] = states
    return whole.view(*shape, -1).to(device)
