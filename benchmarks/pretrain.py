"""A small GPT-2-shaped model trained from scratch on the texts at hand, for the generation benchmarks.

    python benchmarks/pretrain.py DATA MODEL_FOLDER          # some minutes on two cores, less with --device cuda

DATA is the folder of the data sets. The model reads the train rows of the classification sets (news, newsgroups, questions,
reviews; nothing of e2e_nlg) through a byte-level BPE of 4,096 tokens that is trained on them too, in rows of 256 tokens
that run on from one text to the next. One in a hundred such rows is held out. What came of it is written to
results/pretrain.json.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.pytorch_utils import Conv1D

from fedrank.training.compute import choose

SETS = ("20news", "huffpost", "qnli", "sst2", "clinc150", "semeval2010_task8")
SHAPE = {"n_layer": 4, "n_embd": 192, "n_head": 3, "n_positions": 256}
VOCABULARY, END, PAD = 4096, "<|endoftext|>", "<|pad|>"
BATCH, PEAK, WARM = 16, 1.5e-3, 0.05  # rows, the largest learning rate, the share of steps until it is reached


def texts(data: Path) -> Iterator[str]:
    for name in SETS:
        with gzip.open(data / name / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield from (row[key] for key in ("text", "text_b") if key in row)


def tokenizer(data: Path) -> transformers.PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts(data), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=SHAPE["n_positions"]
    )


def rows(data: Path, made: transformers.PreTrainedTokenizerFast, draw: np.random.Generator) -> np.ndarray:
    """(rows, 256), the texts in a drawn order, each after an end."""
    every = list(texts(data))
    ids = made([every[at] for at in draw.permutation(len(every))], add_special_tokens=False)["input_ids"]
    flat = np.concatenate([np.array([made.eos_token_id, *one], np.int64) for one in ids])
    width = SHAPE["n_positions"]
    return flat[: len(flat) // width * width].reshape(-1, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    draw = np.random.default_rng(asked.seed)
    torch.manual_seed(asked.seed)
    made = tokenizer(asked.data)
    every = rows(asked.data, made, draw)
    held, train = np.split(every, [len(every) // 100])
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, **SHAPE, bos_token_id=made.eos_token_id, eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(asked.device)
    layers = [layer for layer in model.modules() if isinstance(layer, Conv1D)]
    quick = choose(layers, asked.device, torch.get_num_threads())  # many CPUs have no units for bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    warm = max(1, round(WARM * asked.steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / (asked.steps - warm))
        ),
    )

    def loss(batch: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(batch).to(asked.device)
        with torch.autocast(torch.device(asked.device).type, torch.bfloat16, enabled=quick.dtype == "bfloat16"):
            return model(input_ids=ids, labels=ids).loss

    def held_out() -> float:
        with torch.inference_mode():
            return float(np.mean([float(loss(part)) for part in np.array_split(held, -(-len(held) // BATCH))]))

    started, seen = time.perf_counter(), 0
    order = np.concatenate([draw.permutation(len(train)) for _ in range(-(-asked.steps * BATCH // len(train)))])
    for step in range(asked.steps):
        found = loss(train[order[step * BATCH : (step + 1) * BATCH]])
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        seen += BATCH * train.shape[1]
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}: loss {float(found):.3f}, {seen / seconds:,.0f} tokens a second", flush=True)
    seconds = time.perf_counter() - started
    model.save_pretrained(asked.out)
    made.save_pretrained(asked.out)
    perplexity = math.exp(held_out())
    found = {
        "machine": machine.describe(), "shape": SHAPE, "vocabulary": VOCABULARY, "parameters": sum(p.numel() for p in model.parameters()),
        "sets": SETS, "tokens_at_hand": int(every.size), "steps": asked.steps, "tokens_seen": seen, "seed": asked.seed,
        "device": asked.device, "compute": quick.dtype, "seconds": round(seconds, 1), "held_out_rows": len(held), "held_out_perplexity": perplexity,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    results = Path(__file__).parent / "results"
    (results / "pretrain.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
