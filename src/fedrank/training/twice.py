"""What a step keeps that is differentiated twice, counted on steps over a few tokens."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedrank.training import packing
from fedrank.training.flow import storages
from fedrank.training.frozen import Frozen
from fedrank.training.tasks import IGNORED, Encoded

# Rows, and the tokens of the longest of them: so that of tokens, pairs and rows none follows from the others.
PADDED = ((2, 4), (2, 8), (2, 12), (4, 4))
PACKED = ((2, 32), (4, 32), (4, 16), (2, 60))  # they fill their tiles, as longer rows do, which are 32 and 64 wide


def kept(
    frozen: Frozen, most: int, like: Encoded, step: Callable[[Encoded], object]
) -> tuple[float, float, float, float]:
    """Bytes per token of a batch with what fills it up, per pair of tokens, per row that the head reads, and beside them.

    most: the tokens that the model reads. Where these are so few that pairs follow from tokens, each is given its part.

    Backward passes of backward passes keep what no formula of ours knows: it hangs on each operation of the model. step:
    takes a step on these rows, in one batch.
    """
    shapes = PACKED if frozen.packs else PADDED
    batches = [_rows(like, rows, min(tokens, most)) for rows, tokens in shapes]
    found = [_counted(frozen.network, step, batch) for batch in batches]
    parts = [[*_sizes(batch.lengths, frozen.packs), len(batch), 1] for batch in batches]
    token, pair, row, rest = np.linalg.lstsq(np.array(parts, float), found)[0].round(3).tolist()
    return token, pair, row, rest


def _sizes(lengths: np.ndarray, packs: bool) -> tuple[int, int]:
    """Tokens, and pairs of them, that a batch computes."""
    if packs:
        return sum(packing.layout(lengths, [len(lengths)])[1]), packing.pairs(lengths)
    return len(lengths) * int(lengths.max()), len(lengths) * int(lengths.max()) ** 2


def _rows(like: Encoded, rows: int, tokens: int) -> Encoded:
    """Of one token again and again, every other row shorter by one, so that there is padding; the last is predicted."""
    starts = np.concatenate([[0], np.cumsum([tokens - at % 2 for at in range(rows)])])
    fields = {name: np.full(starts[-1], ids[0], ids.dtype) for name, ids in like.fields.items()}
    labels = np.zeros(rows, like.labels.dtype)
    if like.generates:
        labels = np.full(starts[-1], IGNORED, like.labels.dtype)
        labels[starts[1:] - 1] = fields["input_ids"][0]
    return Encoded(fields, starts, labels, like.pad)


def _counted(network: nn.Module, step: Callable[[Encoded], object], rows: Encoded) -> int:
    """Bytes that are saved for backward passes: storages, each once, but for those of the network."""
    known, held = storages(network), {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage  # so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(rows)
    return sum(storage.nbytes() for storage in held.values())
