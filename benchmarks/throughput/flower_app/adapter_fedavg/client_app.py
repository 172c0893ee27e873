"""A client of the Flower app: it trains the adapter that it is sent on its own rows."""

from functools import cache
from pathlib import Path

import numpy as np
import plain
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from plain import Job, Network
from torch.utils.data import DataLoader

app = ClientApp()


class Shuffled(Job):
    """A client's rows in the order that a DataLoader draws."""

    def batches(self, round: int, client: str) -> list[np.ndarray]:
        given = super().batches(round, client)
        return list(DataLoader(np.concatenate(given), max(map(len, given)), shuffle=True, collate_fn=np.array))


# An actor's process outlives a message, and with it what is cached here.
@cache
def data(folder: str, mode: str) -> Job:
    return {"matched": Job, "usual": Shuffled}[mode](Path(folder))


@cache
def kept(job: Job) -> Network:
    torch.set_num_threads(1)
    return Network(job)


def name(job: Job, context: Context) -> str:
    return str(job.about["clients"][int(context.node_config["partition-id"])])


@app.query()
def query(message: Message, context: Context) -> Message:
    """Says which client this node is."""
    job = data(context.run_config["job"], context.run_config["mode"])
    if context.run_config["mode"] == "matched":
        kept(job)  # the others build theirs before the first round too
    return Message(RecordDict({"about": ConfigRecord({"client": name(job, context)})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    job = data(context.run_config["job"], context.run_config["mode"])
    # `usual` builds the model in every message, as Flower's tutorials do
    network = kept(job) if context.run_config["mode"] == "matched" else Network(job, dropout=True)
    network.write(message.content["arrays"].to_numpy_ndarrays())
    examples, seconds = plain.train(network, job, message.content["config"]["server-round"], name(job, context))
    metrics = MetricRecord({"num-examples": examples, "seconds": seconds})
    return Message(RecordDict({"arrays": ArrayRecord(network.read()), "metrics": metrics}), reply_to=message)
