"""How much a client's training is: the batches it goes through, and how many clients fill a pass."""

from collections.abc import Callable

import numpy as np

from fedrank.config import Config, Local
from fedrank.protocol import Load
from fedrank.training.course import batches
from fedrank.training.packing import filled, pairs
from fedrank.training.tasks import Encoded

SMALL = 1_000_000  # parameters: a smaller model is trained faster than clients meet
PASS_CPU, PASS_GPU = 1024, 16384  # tokens of a pass that keep a core, or a GPU, busy


def workload(
    rows: np.ndarray,
    encoded: Encoded,
    local: Local,
    draw: Callable[[int], np.random.Generator],
    packed: bool = False,
) -> Load:
    """What a round's training on these rows goes through; a batch is packed, or padded to its longest row."""
    drawn = list(batches(rows, local, draw))
    parts = [encoded.lengths[batch] for batch in drawn]
    read = [int(encoded.predictions[batch].sum()) if encoded.generates else len(batch) for batch in drawn]
    tokens = [filled(int(part.sum())) if packed else len(part) * int(part.max()) for part in parts]
    scores = [pairs(part) if packed else len(part) * int(part.max()) ** 2 for part in parts]
    return Load(len(parts), sum(tokens), sum(scores), max(tokens), max(scores), sum(read), max(read))


def stacking(parameters: int, lengths: np.ndarray, config: Config, workers: int) -> int:
    """How many clients of a cohort are best trained together: enough for a pass to be worth its overhead.

    A rule, and not a trial at the start, whose outcome would differ from one run to the next.
    """
    if parameters < SMALL:
        return 1
    tokens = int(lengths.mean()) * config.local.batch_size
    most = max(1, (PASS_CPU if config.device == "cpu" else PASS_GPU) // tokens)
    turns = -(-config.rounds.cohort // (workers * most))  # of each worker, so that all have about as much to do
    return -(-config.rounds.cohort // (workers * turns))
