"""A client of the Flower app: it trains the adapter that it is sent on the rows of the client that it is asked to be."""

from functools import cache
from pathlib import Path

import numpy as np
import plain
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
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
def kept(job: Job, bf16: bool) -> Network:
    torch.set_num_threads(1)
    return Network(job, bf16=bf16)


@app.train()
def train(message: Message, context: Context) -> Message:
    config, asked = context.run_config, message.content["config"]
    job = data(config["job"], config["mode"])
    # `usual` builds the model in every message, as Flower's tutorials do
    network = kept(job, config["bf16"]) if config["mode"] == "matched" else Network(job, dropout=True)
    network.write(message.content["arrays"].to_numpy_ndarrays())
    examples, seconds = plain.train(network, job, asked["server-round"], asked["client"])
    metrics = MetricRecord({"num-examples": examples, "seconds": seconds})
    return Message(RecordDict({"arrays": ArrayRecord(network.read()), "metrics": metrics}), reply_to=message)
