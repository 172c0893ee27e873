"""Increments of the frozen base, round by round: which a client still lacks, and as tensors of a frame and back."""

from collections.abc import Iterable, Mapping

import numpy as np
import xxhash

from fedrank.adapter import Adapter, Block, split
from fedrank.frame import Refused
from fedrank.protocol import ModelSpec

# They travel in float32 whatever the wire's type is: every client's base must be the same to the bit.
WHOLE = -1  # the rank that stands for a whole increment (out, in)


def after(updates: Mapping[int, Adapter], since: int) -> dict[int, Adapter]:
    """What a client lacks that was last merged in round `since`: it had every earlier round's with that request.

    A whole increment sums up all before it, so one that the client lacks is sent however old its parts are.
    """
    return {round: update for round, update in updates.items() if round >= since}


def write(updates: Mapping[int, Adapter], since: int, spec: ModelSpec) -> dict[str, np.ndarray | list[np.ndarray]]:
    """A frame's tensors: the rounds of all that hold, a rank per module for each that is sent, and these, flat."""
    if not updates:
        return {}
    sent = after(updates, since)
    ranks = np.zeros((len(sent), len(spec.modules)), np.int32)
    flat: dict[str, list[np.ndarray]] = {"B.base": [], "A.base": [], "W.base": []}
    for at, update in enumerate(sent.values()):
        for column, module in enumerate(spec.modules):
            if (block := update.blocks.get(module.name)) is not None:
                ranks[at, column] = block.rank
                for f in "BA":
                    flat[f"{f}.base"].append(block.rows[f].astype(np.float32, copy=False))
            elif module.name in update.dense:
                ranks[at, column] = WHOLE
                flat["W.base"].append(update.dense[module.name].astype(np.float32, copy=False))
    present = {name: parts for name, parts in flat.items() if parts}
    return {"base.rounds": np.array(list(updates), np.int64), "base.ranks": ranks, **present}


def read(tensors: dict[str, np.ndarray], spec: ModelSpec, scale: float) -> dict[int, Adapter | None]:
    """Take them out of a frame's tensors: each that holds, None for one that was sent before.

    Refused where they do not fit the model.
    """
    rounds, ranks = tensors.pop("base.rounds", None), tensors.pop("base.ranks", None)
    flat = {name: tensors.pop(name, np.empty(0, np.float32)) for name in ("B.base", "A.base", "W.base")}
    if rounds is None or ranks is None:
        if rounds is not None or ranks is not None or any(part.size for part in flat.values()):
            raise Refused("the base updates lack their rounds or ranks")
        return {}
    if rounds.ndim != 1 or np.any(rounds[1:] <= rounds[:-1]) or ranks.ndim != 2 or len(ranks) > len(rounds):
        raise Refused(f"base updates of rounds {rounds.tolist()[:5]} and ranks {list(ranks.shape)} do not fit together")
    if rounds.dtype != np.int64 or ranks.dtype != np.int32 or ranks.shape[1] != len(spec.modules):
        raise Refused(
            f"base updates with {rounds.dtype} rounds and {ranks.dtype}{list(ranks.shape)} ranks do not fit the model"
        )
    out, in_ = (np.array([getattr(m, side) for m in spec.modules], np.int64) for side in ("out", "in_"))
    counts = {"B.base": np.maximum(ranks, 0) * out, "A.base": np.maximum(ranks, 0) * in_, "W.base": (ranks == WHOLE) * out * in_}  # fmt: skip
    for name, part in flat.items():
        if part.dtype != np.float32 or part.size != counts[name].sum(dtype=float) or ranks.min(initial=0) < WHOLE:
            raise Refused(
                f"{name} has {part.size} numbers of {part.dtype}, its ranks ask for {counts[name].sum(dtype=float):.15g}"
            )
    pieces = {name: iter(split(part.reshape(-1), counts[name].reshape(-1).tolist())) for name, part in flat.items()}
    earlier = len(rounds) - len(ranks)
    result: dict[int, Adapter | None] = dict.fromkeys(rounds.tolist()[:earlier])
    for round, row in zip(rounds.tolist()[earlier:], ranks.tolist(), strict=True):
        blocks, dense = {}, {}
        for module, rank in zip(spec.modules, row, strict=True):
            b, a, w = (next(pieces[name]) for name in ("B.base", "A.base", "W.base"))
            if rank > 0:
                blocks[module.name] = Block(np.arange(rank), b.reshape(rank, -1).T, None, a.reshape(rank, -1))
            elif rank == WHOLE:
                dense[module.name] = w.reshape(module.out, module.in_)
        result[round] = Adapter(blocks, scale, dense)
    return result


def digest(updates: Iterable[Adapter]) -> str:
    """Names a sequence of increments by its numbers."""
    state = xxhash.xxh3_128()
    for update in updates:
        state.update(f"{update.scale}".encode())
        for name, block in update.blocks.items():
            parts = [part for part in (block.B, block.e, block.A) if part is not None]
            state.update(f"{name}{[part.shape for part in parts]}".encode())
            for part in parts:
                state.update(part.tobytes())
        for name, tensor in update.dense.items():
            state.update(name.encode() + tensor.tobytes())
    return state.hexdigest()
