"""The job by fedrank: python fedrank_run.py DATA OUT --rounds 10 [key=value ...]"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from settings import settings

import fedrank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    clock, began = {"rounds": [], "evaluations": []}, 0.0
    examples = dict[int, int]()

    def watch(event: dict) -> None:
        nonlocal began
        now = time.time()
        if event["event"] == "cohort":
            began = now
        elif event["event"] == "client":
            examples[event["round"]] = examples.get(event["round"], 0) + event["examples"]
        elif event["event"] == "round":
            ended = now - event.get("evaluation_seconds", 0.0)
            clock["rounds"].append(
                {"started": began, "ended": ended, "updates": event["clients_ok"], "examples": examples[event["round"]],
                 "train_seconds": event["train_seconds"]}
            )  # fmt: skip
            if event["accuracy"] is not None:
                clock["evaluations"].append({"started": ended, "ended": now, "accuracy": event["accuracy"]})

    raw = settings(args.data, args.rounds, args.evaluate_every)
    run = fedrank.run(raw, *args.overrides, out=args.out / "run", watch=watch)
    adapter, arrays = run.state.adapter, {}
    for name, block in adapter.blocks.items():  # by PEFT's names, to be compared
        arrays |= {f"backbone.{name}.lora_A.default.weight": block.A, f"backbone.{name}.lora_B.default.weight": block.B}
    np.savez(args.out / "adapter.npz", **arrays, **adapter.dense)
    clock["numerics"] = run.summary["numerics"]
    (args.out / "clock.json").write_text(json.dumps(clock))


if __name__ == "__main__":
    main()
