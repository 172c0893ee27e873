"""What every contestant but fedrank is made of: the job's rows, a PEFT network, one client's training, a score.

Needs torch, transformers, peft, safetensors and numpy, and nothing of fedrank.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

Values = list[np.ndarray]


class Job:
    """The folder that job.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "job.json").read_text())
        arrays = np.load(folder / "rows.npz")
        self.rows = {name: arrays[name] for name in arrays.files}
        self.cohorts: list[list[str]] = self.about["cohorts"]

    def batches(self, round: int, client: str) -> list[np.ndarray]:
        """The rows of each step of this client in a round of 1..; the same for everyone."""
        at = len(self.cohorts[0]) * (round - 1) + self.cohorts[round - 1].index(client)
        order, sizes = (self.part(name, at) for name in ("order", "steps"))
        return np.split(order, np.cumsum(sizes)[:-1])

    def part(self, name: str, at: int) -> np.ndarray:
        starts = self.rows[f"{name}_starts"]
        return self.rows[name][starts[at] : starts[at + 1]]

    def inputs(self, split: str, rows: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """These rows padded to the longest of them, and their labels."""
        starts, flat = self.rows[f"{split}_starts"], self.rows[f"{split}_ids"]
        lengths = starts[rows + 1] - starts[rows]
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[at, :length] = torch.from_numpy(flat[starts[row] : starts[row + 1]])
            mask[at, :length] = 1
        return {"input_ids": ids, "attention_mask": mask}, torch.from_numpy(self.rows[f"{split}_labels"][rows])


class Network(nn.Module):
    """MiniLM with PEFT's LoRA on every linear layer of its blocks, the mean over tokens, a linear head.

    bf16: products in bfloat16 by autocast, and eager attention, since the backward pass of torch's own is slow in this
    type; a base loaded in bfloat16 was tried and no faster.
    """

    def __init__(self, job: Job, dropout: bool = False, bf16: bool = False) -> None:
        super().__init__()
        about, self.bf16 = job.about, bf16
        backbone = AutoModel.from_pretrained(
            about["model"], dtype=torch.float32, attn_implementation="eager" if bf16 else "sdpa"
        )
        backbone.requires_grad_(False)
        start = load_file(job.folder / "start.safetensors")
        targets = sorted({name.rpartition(".lora_")[0] for name in start if ".lora_" in name})
        lora = LoraConfig(r=about["rank"], lora_alpha=about["scale"] * about["rank"], target_modules=targets)
        self.backbone = inject_adapter_in_model(lora, backbone)
        self.head = nn.Linear(backbone.config.hidden_size, about["classes"])
        self.training_mode = dropout
        own = self.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in start.items():
                inside = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
                own[name if name.startswith("head.") else f"backbone.{inside}"].copy_(value)
        self.learning = {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask[..., None].to(hidden.dtype)
            return self.head((hidden * weight).sum(1) / weight.sum(1)).float()

    def read(self) -> Values:
        return [p.detach().numpy().copy() for p in self.learning.values()]

    def write(self, values: Values) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.learning.values(), values, strict=True):
                parameter.copy_(torch.from_numpy(value))


def train(network: Network, job: Job, round: int, client: str) -> tuple[int, float]:
    """One client's local epoch with a fresh AdamW: its examples, and the seconds it took."""
    started, seen = time.perf_counter(), 0
    network.train(network.training_mode)
    values = list(network.learning.values())
    optimizer = torch.optim.AdamW(values, lr=job.about["lr"], weight_decay=0.0, fused=True)
    for rows in job.batches(round, client):
        inputs, labels = job.inputs("train", rows)
        loss = functional.cross_entropy(network(**inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, job.about["clip"])
        optimizer.step()
        seen += len(rows)
    return seen, time.perf_counter() - started


def evaluate(network: Network, job: Job) -> float:
    """Accuracy on the test rows, in batches of rows of like length."""
    network.eval()
    starts, right = job.rows["test_starts"], 0
    order = np.argsort(np.diff(starts), kind="stable")
    with torch.inference_mode():
        for at in range(0, len(order), 64):
            inputs, labels = job.inputs("test", order[at : at + 64])
            right += int((network(**inputs).argmax(-1) == labels).sum())
    return right / len(order)


def mean(updates: list[tuple[Values, int]]) -> Values:
    """FedAvg: the mean by examples."""
    total = sum(examples for _, examples in updates)
    return [sum(values[at] * (n / total) for values, n in updates) for at in range(len(updates[0][0]))]


class Clock:
    """What a contestant reports: when its rounds began and ended, and what went on in them. Times are time.time()."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def round(self, started: float, examples: int, train_seconds: float, updates: int) -> None:
        self.rounds.append({"started": started, "ended": time.time(), "examples": examples,
                            "train_seconds": train_seconds, "updates": updates})  # fmt: skip

    def evaluation(self, started: float, accuracy: float) -> None:
        self.evaluations.append({"started": started, "ended": time.time(), "accuracy": accuracy})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"rounds": self.rounds, "evaluations": self.evaluations}))


def due(job: Job, round: int) -> bool:
    """Whether a round ends with an evaluation."""
    return round % int(job.about["evaluate_every"]) == 0 or round == len(job.cohorts)


def save(network: Network, path: Path) -> None:
    """The trained adapter and head by PEFT's names, to be compared."""
    np.savez(path, **dict(zip(network.learning, network.read(), strict=True)))
