"""pfl-research's simulation: clients one after the other in a process, or shared out over torchrun's processes.

python pfl_run.py JOB OUT --threads 2
torchrun --standalone --nproc-per-node 2 pfl_run.py JOB OUT --threads 1
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain
import torch
from pfl.aggregate.base import get_num_datapoints_weight_name, get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from plain import Clock, Job, Network
from torch import Tensor
from torch.nn import functional

EXAMPLES = get_num_datapoints_weight_name(Population.TRAIN)
UPDATES = get_num_devices_weight_name(Population.TRAIN)
SECONDS = "train seconds"


class Client(Dataset):
    """A client in one round; padded as it is read, since Dataset would cut up rows padded to one length."""

    def __init__(self, job: Job, round: int, client: str) -> None:
        super().__init__((), user_id=client)
        self.job, self.steps = job, job.batches(round, client)

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def iter(self, batch_size: int | None) -> Iterator[dict[str, Tensor]]:
        for rows in self.steps:
            inputs, labels = self.job.inputs("train", rows)
            yield {**inputs, "labels": labels}


class Learner(Network):
    """The network with the two methods that pfl asks of a module."""

    def loss(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return functional.cross_entropy(self(**inputs), labels)

    def metrics(self, **batch: Tensor) -> dict[str, Any]:
        raise NotImplementedError("clients are not scored")


class Averaging(FederatedAveraging):
    """FedAvg that times each client's training; pfl sums the metric over clients and processes."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Metrics]:
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        # whatever evaluation_frequency is, pfl would score the first cohort's clients on their own rows, twice
        return contexts and tuple(replace(context, do_evaluation=False) for context in contexts), model, metrics

    def train_one_user(self, *args: Any, **kwargs: Any) -> tuple[Any, Metrics]:
        started = time.perf_counter()
        statistics, metrics = super().train_one_user(*args, **kwargs)
        metrics[SECONDS] = time.perf_counter() - started
        return statistics, metrics


class Report(TrainingProcessCallback):
    """Keeps the clock, and scores the network in the first process while the others wait."""

    def __init__(self, job: Job, clock: Clock, rank: int) -> None:
        self.job, self.clock, self.rank = job, clock, rank

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.begin()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        examples, updates = int(aggregate_metrics[EXAMPLES].weighted_value), int(aggregate_metrics[UPDATES])
        self.clock.round(self.started, examples, aggregate_metrics[SECONDS], updates)
        if plain.due(self.job, central_iteration + 1):
            if self.rank == 0:  # the others wait, and leave it their cores
                started, threads = time.time(), torch.get_num_threads()
                torch.set_num_threads(2)
                self.clock.evaluation(started, plain.evaluate(model.pytorch_model, self.job))
                torch.set_num_threads(threads)
            self.begin()
        else:
            self.started = time.time()
        return False, Metrics()

    def begin(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.started = time.time()


def adamw(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    clock = Clock()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")
    np.random.seed(0)  # noqa: NPY002  pfl draws its seeds from numpy's; they must agree between processes
    rank = int(os.environ.get("RANK", 0))

    job = Job(args.job)
    users = [(round, client) for round, cohort in enumerate(job.cohorts, 1) for client in cohort]
    # with the weights pfl shares a cohort out by rows; without them by turns, which goes astray in an odd cohort
    weights = {user: len(Client(job, *user)) for user in users}
    data = FederatedDataset(lambda user: Client(job, *user), MinimizeReuseUserSampler(users), weights)
    network = Learner(job, bf16=args.bf16).eval()
    central = torch.optim.SGD(network.learning.values(), lr=1.0)
    model = PyTorchModel(network, local_optimizer_create=adamw, central_optimizer=central)
    Averaging().run(
        NNAlgorithmParams(
            central_num_iterations=len(job.cohorts),
            evaluation_frequency=1,
            train_cohort_size=len(job.cohorts[0]),
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=data, val_data=None, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_batch_size=int(job.rows["steps"].max()),
            local_num_epochs=1,
            local_learning_rate=job.about["lr"],
            local_max_grad_norm=job.about["clip"],
        ),
        callbacks=[Report(job, clock, rank)],
        send_metrics_to_platform=False,
    )
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        plain.save(network, args.out / "adapter.npz")
        clock.write(args.out / "clock.json")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
