"""Write the job that all contestants run: rows as token ids, cohorts, batches and the first adapter, in one folder.

python job.py DATA OUT --rounds 10. Needs fedrank; the contestants read the folder with numpy and safetensors only.
"""

import argparse
import json
from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from settings import settings

from fedrank import config, cost, server
from fedrank.parts import prepare
from fedrank.protocol import Load, Plan, rng
from fedrank.selection import everything
from fedrank.training import course, models


def ragged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All lists one after the other, and where each begins."""
    starts = np.array([0, *accumulate(map(len, lists))])
    return np.array([value for part in lists for value in part], np.int64), starts


def write(out: Path, raw: dict[str, Any], overrides: Iterable[str] = ()) -> None:
    chosen = config.load(raw, overrides)
    parts = prepare(chosen)
    chosen = parts.config
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for split, encoded in (("train", parts.trainer.train), ("test", parts.trainer.test)):
        arrays[f"{split}_ids"], arrays[f"{split}_starts"] = encoded.fields["input_ids"], encoded.starts
        arrays[f"{split}_labels"] = np.array(encoded.labels)

    start, lengths = parts.begin.adapter, parts.trainer.train.lengths
    plan = Plan(everything(start))
    cohorts, batches, work = [], [], 0.0
    for round in range(1, chosen.rounds.count + 1):
        cohorts.append(server.sample(tuple(parts.devices), chosen.rounds.cohort, chosen.seed, round))
        for client in cohorts[-1]:
            draw = partial(rng, chosen.seed, "job", round, client, "batches")
            steps = list(course.batches(parts.held(client).train, chosen.local, draw))
            batches.append([list(map(int, batch)) for batch in steps])
            own = [lengths[batch] for batch in steps]  # without padding: what nobody can do without
            tokens, pairs = (int(sum((part**power).sum() for part in own)) for power in (1, 2))
            rows = sum(map(len, own))
            work += sum(cost.flops(parts.spec, start, plan, Load(len(steps), tokens, pairs, 0, 0, rows)))
    arrays["steps"], arrays["steps_starts"] = ragged([[len(batch) for batch in steps] for steps in batches])
    arrays["order"], arrays["order_starts"] = ragged([[row for batch in steps for row in batch] for steps in batches])
    np.savez(out / "rows.npz", **arrays)

    start = parts.begin.adapter
    tensors = {f"{name}.lora_A.weight": block.A for name, block in start.blocks.items()}
    tensors |= {f"{name}.lora_B.weight": block.B for name, block in start.blocks.items()}
    save_file(
        {name: np.ascontiguousarray(t) for name, t in (tensors | dict(start.dense)).items()}, out / "start.safetensors"
    )
    about = {
        "model": str(models.minilm()), "classes": parts.about["classes"], "rank": chosen.adapter.rank, "scale": start.scale,
        "lr": chosen.local.lr, "clip": chosen.local.clip, "evaluate_every": chosen.rounds.evaluate_every,
        "clients": list(parts.devices), "cohorts": cohorts, "flops": work,
    }  # fmt: skip
    (out / "job.json").write_text(json.dumps(about, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("overrides", nargs="*", help="of fedrank's config, key=value")
    args = parser.parse_intermixed_args()
    write(args.out, settings(args.data, args.rounds, args.evaluate_every), args.overrides)


if __name__ == "__main__":
    main()
