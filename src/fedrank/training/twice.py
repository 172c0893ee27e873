"""What a step keeps that is differentiated twice, counted on steps over a few tokens."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedrank.training.flow import storages
from fedrank.training.tasks import IGNORED, Encoded

SHAPES = ((2, 4), (2, 8), (2, 12), (4, 4))  # rows, and the tokens of the longest of them


def kept(network: nn.Module, like: Encoded, step: Callable[[Encoded], object]) -> tuple[float, float, float, float]:
    """Bytes per token of a padded batch, per pair of tokens, per row that the head reads, and beside them.

    Backward passes of backward passes keep what no formula of ours knows: it hangs on each operation of the model. step:
    takes a step on these rows, in one batch.
    """
    found = [_counted(network, step, _rows(like, *shape)) for shape in SHAPES]
    parts = [[rows * tokens, rows * tokens**2, rows, 1] for rows, tokens in SHAPES]
    token, pair, row, rest = np.linalg.solve(np.array(parts, float), found).round(3).tolist()
    return token, pair, row, rest


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
