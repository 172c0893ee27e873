"""The job by fedrank: python fedrank_run.py DATA OUT --rounds 10 [key=value ...]"""

import argparse
import json
import time
from pathlib import Path

from job import settings

import fedrank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    clock = {"started": time.time(), "rounds": [], "evaluations": []}
    marks: dict[str, float] = {}

    def watch(event: dict) -> None:
        marks[event["event"]] = time.time()
        if event["event"] == "round":
            clock["rounds"].append(
                {
                    "started": marks["cohort"],
                    "ended": marks["client"],
                    "updates": event["clients_ok"],
                    "wall": event["wall_seconds"],
                    "train_seconds": event["train_seconds"],
                }
            )
            if event["accuracy"] is not None:
                clock["evaluations"].append({"accuracy": event["accuracy"]})

    fedrank.run(settings(args.data, args.rounds, args.evaluate_every), *args.overrides, out=args.out, watch=watch)
    (args.out / "clock.json").write_text(json.dumps(clock))


if __name__ == "__main__":
    main()
