"""The server of the Flower app: FedAvg over the job's cohorts, and its scores on the test rows."""

import time
from collections.abc import Iterable
from pathlib import Path

import plain
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from plain import Clock, Job, Network

app = ServerApp()


def answered(replies: Iterable[Message]) -> list[Message]:
    """The replies, where nobody failed: Flower's own strategies leave out who did, and go on."""
    replies = list(replies)
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
    return replies


def nodes(grid: Grid, job: Job) -> dict[str, int]:
    """A node for each client; which one does not matter, since the job names the client in every message."""
    clients = job.about["clients"]
    while len(ids := list(grid.get_node_ids())) < len(clients):
        time.sleep(0.1)
    return dict(zip(clients, ids, strict=True))


class Cohorts(FedAvg):
    """FedAvg by examples over the job's cohorts, timed."""

    def __init__(self, job: Job, clock: Clock, nodes: dict[str, int]) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.job, self.clock, self.nodes = job, clock, nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.started = time.time()
        return [
            Message(
                RecordDict({
                    self.arrayrecord_key: arrays,
                    self.configrecord_key: ConfigRecord({**config, "server-round": server_round, "client": client}),
                }),
                message_type=MessageType.TRAIN, dst_node_id=self.nodes[client],
            )
            for client in self.job.cohorts[server_round - 1]
        ]  # fmt: skip

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = answered(replies)
        mean = super().aggregate_train(server_round, replies)
        examples, seconds = (
            sum(reply.content["metrics"][key] for reply in replies) for key in ("num-examples", "seconds")
        )
        self.clock.round(self.started, examples, seconds, len(replies))
        return mean


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    clock = Clock()
    if config["mode"] == "matched":
        torch.set_num_threads(2)
    job = Job(Path(config["job"]))
    network = Network(job, bf16=config["bf16"])
    strategy = Cohorts(job, clock, nodes(grid, job))

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if round == 0 or not plain.due(job, round):
            return None
        started = time.time()
        network.write(arrays.to_numpy_ndarrays())
        accuracy = plain.evaluate(network, job)
        clock.evaluation(started, accuracy)
        return MetricRecord({"accuracy": accuracy})

    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(network.read()), num_rounds=len(job.cohorts), evaluate_fn=evaluate
    )
    out = Path(config["out"])
    network.write(result.arrays.to_numpy_ndarrays())
    plain.save(network, out / "adapter.npz")
    clock.write(out / "clock.json")  # the last thing: flower.py takes it for the sign of success
