"""A Llama-shaped decoder of random weights under FedARA and Fed-PLoRA, beside a plain loop of PEFT: memory, seconds a step.

    python benchmarks/large.py FOLDER --shape 1b --device cuda      # where there is a GPU: 1 billion parameters
    python benchmarks/large.py FOLDER --shape 170m                  # on a CPU

FOLDER keeps the checkpoint (sharded, bfloat16) and the rows. Each case is a process of its own: 3 rounds of 2 clients with
4 steps each over rows of 192 tokens, with the weights whole, in 8 or in 4 bits, with and without gradient
checkpointing; PEFT takes as many steps over the same rows, padded, and quantises as its own guide says. All hold and
compute in bfloat16, on CPUs that have no units for it in float32. Memory is the peak of all that torch has allocated on a GPU in a
client's step over its largest batch; on a CPU, where files are mapped, what it allocates in that step, and the weights that
passes go through. Beside it stands the forecast of `fedrank cost`. Results go to results/large_DEVICE.json.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import machine
import numpy as np
import torch
import transformers

from fedrank import config
from fedrank.training import tiny
from fedrank.training.compute import onednn

SHAPES: dict[str, dict[str, int]] = {
    "170m": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
             "intermediate_size": 2816, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256},
}  # fmt: skip
METHODS = {"fedara": {"target_rank": 3}, "fed_plora": {}}
WEIGHTS = ("whole", "int8", "nf4")
ROWS, LENGTH, BATCH, STEPS, ROUNDS, CLIENTS = 64, 192, 8, 4, 3, 2


def held(device: str) -> Literal["bfloat16", "float32"]:
    """The type to hold weights and to compute in."""
    return "bfloat16" if device != "cpu" or onednn("bfloat16") else "float32"


def checkpoint(folder: Path, shape: str) -> Path:
    """A random model on disk, made once."""
    place = folder / shape
    if not (place / "tokenizer.json").exists():
        torch.manual_seed(0)
        about = transformers.LlamaConfig(
            **SHAPES[shape],
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = transformers.AutoModelForCausalLM.from_config(about, dtype=torch.bfloat16)
        model.save_pretrained(place, max_shard_size="500MB")
        tiny.tokenizer("generate").save_pretrained(place)
    return place


def texts(folder: Path) -> Path:
    """Rows of one length: half a prompt, half a completion, a token a letter."""
    place, draw = folder / "rows", np.random.default_rng(0)
    place.mkdir(exist_ok=True)
    letters = np.array(list("abcdefgh "))

    def text() -> str:
        return "x" + "".join(draw.choice(letters, LENGTH // 2 - 2)) + "x"

    for split, count in (("train", ROWS), ("test", 2)):
        lines = [json.dumps({"prompt": text(), "completion": text()[1:]}) for _ in range(count)]
        (place / f"{split}.jsonl").write_text("\n".join(lines))
    return place


def settings(folder: Path, shape: str, device: str, method: str, weights: str, again: bool) -> config.Config:
    return config.load({
        "task": "generate", "device": device, "clients": {"count": CLIENTS},
        "model": {"name": str(checkpoint(folder, shape)), "quantise": "none" if weights == "whole" else weights,
                  "dtype": held(device)},
        "data": {"path": str(texts(folder)), "partition": {"kind": "iid"}},
        "rounds": {"count": ROUNDS, "cohort": CLIENTS, "evaluate_every": ROUNDS, "personal": 0}, "adapter": {"rank": 8},
        "local": {"steps": STEPS, "batch_size": BATCH, "max_length": LENGTH, "lr": 1e-3, "checkpoint": again},
        "method": {"name": method, **METHODS[method]},
        "engine": {"workers": 1, "stack": 1, "threads": torch.get_num_threads(), "compute": held(device),
                   "fleet": {"devices": {"laptop": 1}, "ranks": {"laptop": 4}}},
    })  # fmt: skip


# ---- memory


def peak(work: Any, device: str, lying: int) -> int:
    """The most bytes that torch held at once. lying: what lay there before, which on a CPU nobody knows."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return lying + most


def ours(given: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    from fedrank import cost, experiment, parts
    from fedrank.protocol import Job

    asked = settings(given.folder, given.shape, given.device, given.method, given.weights, given.checkpoint)
    started = time.perf_counter()
    made = parts.prepare(asked)
    loading = time.perf_counter() - started
    client, device = next(iter(made.devices.items()))
    plan = made.method.plan(made.begin, {client: device}, 0)[client]
    mine = made.held(client)
    rows = mine.train[:BATCH]  # all are equally long
    job = Job(plan, 1, ROUNDS, made.spec, made.begin.adapter, (), {}, asked.local.model_copy(update={"steps": 1}), device, 0,
              lambda job, **more: made.trainer.fit(job, rows=rows, encoded=mine.encoded, **more))  # fmt: skip
    base = made.spec.execution.base_bytes
    for _ in range(2):  # the first makes what is kept
        used = peak(lambda: list(made.method.train([job])), given.device, base)
    load = replace(device.load, peak_rows=int(mine.encoded.predictions[rows].sum()))
    forecast = cost.peak_memory(made.spec, made.begin.adapter, plan, load)
    del made, job
    with tempfile.TemporaryDirectory() as out:
        run = experiment.run(asked, out=Path(out) / "run")
        clients = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
        failed, accuracy = run.summary["clients_failed"], run.summary["accuracy"]
    later = [row["seconds"] / row["steps"] for row in clients if row["round"] > 1]
    return {
        "base_bytes": base, "peak_bytes": used, "forecast_bytes": forecast, "forecast_over_peak": forecast / used, "seconds_per_step": float(np.median(later)),
        "loading_seconds": loading, "clients_failed": failed, "token_accuracy": accuracy,
    }  # fmt: skip


def theirs(given: argparse.Namespace) -> dict[str, Any]:
    """A loop as PEFT's guides write it."""
    import peft

    from fedrank.training import quantised

    name = checkpoint(given.folder, given.shape)
    dtype = getattr(torch, held(given.device))
    options: dict[str, Any] = {"dtype": dtype}
    if given.weights != "whole":
        options |= {
            "quantization_config": quantised.settings(given.weights, given.device),
            "device_map": {"": given.device},
        }
    started = time.perf_counter()
    base = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    base = base if given.weights != "whole" else base.to(given.device)
    if given.weights == "nf4":
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=given.checkpoint)
    elif given.checkpoint:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    wanted = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=wanted, task_type="CAUSAL_LM"))
    model.train(given.checkpoint)  # which checkpointing asks for; there is no dropout
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True
    )
    tokenizer = tiny.tokenizer("generate")
    loading = time.perf_counter() - started
    rows = [json.loads(line) for line in (texts(given.folder) / "train.jsonl").read_text().splitlines()]
    ids = torch.tensor(tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]).to(given.device)
    first = len(tokenizer(rows[0]["prompt"])["input_ids"])
    labels = ids.clone()
    labels[:, :first] = -100

    def step(at: int) -> None:
        mine = slice(at * BATCH % len(ids), at * BATCH % len(ids) + BATCH)
        with torch.autocast(torch.device(given.device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(input_ids=ids[mine], labels=labels[mine]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    lying = quantised.size(model) + sum(
        part.nbytes for state in optimizer.state.values() for part in state.values() if isinstance(part, torch.Tensor)
    )
    used, seconds = peak(lambda: step(1), given.device, lying), []
    for at in range(ROUNDS * STEPS):
        begun = time.perf_counter()
        step(at)
        if given.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "base_bytes": quantised.size(base),
        "peak_bytes": used,
        "seconds_per_step": float(np.median(seconds)),
        "loading_seconds": loading,
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("--shape", choices=SHAPES, default="170m")
    words.add_argument("--device", default="cpu")
    words.add_argument("--repeats", type=int, default=3)
    for hidden in ("--method", "--weights"):
        words.add_argument(hidden, help=argparse.SUPPRESS)
    words.add_argument("--checkpoint", action="store_true", help=argparse.SUPPRESS)
    given = words.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.method is not None:  # one case, in a process of its own
        print(json.dumps(theirs(given) if given.method == "peft" else ours(given)))
        return
    checkpoint(given.folder, given.shape)
    cases = [
        (method, weights, again) for weights in WEIGHTS for again in (False, True) for method in (*METHODS, "peft")
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    results = Path(__file__).parent / "results" / f"large_{torch.device(given.device).type}.json"
    about = machine.describe() | ({"gpu": torch.cuda.get_device_name(given.device)} if given.device != "cpu" else {})
    for repeat in range(given.repeats):  # in turns: machines have moods
        for method, weights, again in cases:
            command = [sys.executable, __file__, str(given.folder), "--shape", given.shape, "--device", given.device,
                       "--method", method, "--weights", weights, *(["--checkpoint"] if again else [])]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            key = f"{method} {weights}{' checkpointed' if again else ''}"
            if done.returncode:
                print(f"{key}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            one = json.loads(done.stdout.strip().splitlines()[-1])
            found.setdefault(key, []).append(one)
            print(
                f"{repeat} {key}: {one['seconds_per_step']:.2f} s a step, {one['peak_bytes'] / 1e9:.2f} GB", flush=True
            )
            results.write_text(json.dumps(
                {"machine": about, "shape": SHAPES[given.shape], "rows": [BATCH, LENGTH], "cases": found}, indent=1
            ) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
