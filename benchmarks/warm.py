"""What a round on Flower costs over the same round on the local engine: cold, warm, and what Flower itself takes.

python benchmarks/warm.py [--rounds 8] [--turns 3] [--results FILE]

One site with a SuperNode on loopback, TLS and node authentication, MiniLM, and five steps a round. In each turn, in
another order every time: the local engine; Flower with the site's resident worker (warm); without it, so that every
message's process loads the model (cold); and an app that only sends a frame of the same length back and forth, one for
every round (echo: Flower starts a process for every message, whatever that does). Seconds of a round without its
evaluation; the first round of a run, in which the site joins, is left out. What the worker and the socket take is warm
less local less echo.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from federation import Federation, federation, local, until  # noqa: E402
from fedrank import ledger, remote  # noqa: E402

SITE = "north"
ECHO = '''"""An app whose client sends back what it is sent."""

import json
import time
from pathlib import Path

from fedrank.engines import flower


def play(grid, told):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    found = []
    for _ in range(told["rounds"]):
        started = time.monotonic()
        list(flower.converse(flower.Apart(grid), [("site", nodes[0], bytes(told["bytes"]))], None))
        found.append(time.monotonic() - started)
    Path(told["out"]).write_text(json.dumps(found))


server = flower.server_app(play)
client = flower.client_app(lambda frame, told, node, seconds: frame)
'''


def seconds(out: Path) -> list[float]:
    """Of its rounds."""
    return [row["wall_seconds"] - row["evaluation_seconds"] for row in ledger.read(out / "rounds.jsonl")]


def echo(made: Federation, out: Path, rounds: int, size: int) -> list[float]:
    app = out.with_suffix(".app")
    remote.write_app(app, {"rounds": rounds, "bytes": size, "out": str(out)})
    (app / remote.APP).write_text(ECHO)
    made.flwr("run", str(app), remote.NAME)
    until(out.exists, 600, "the echo")
    time.sleep(1)
    return list(map(float, json.loads(out.read_text())))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=8, help="of a run; its first is not counted")
    words.add_argument("--turns", type=int, default=3)
    words.add_argument("--results", type=Path, default=HERE / "results" / "warm.json")
    given = words.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    arms, random = ("local", "warm", "cold", "echo"), np.random.default_rng(1)
    played: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder), (SITE,), warm=False) as made:
        raw = made.config(
            model={"name": "minilm"}, method={"name": "fedavg"}, local={"steps": 5},
            rounds={"count": given.rounds, "evaluate_every": given.rounds, "personal": 0},
        )  # fmt: skip
        size = 0
        for turn in range(given.turns):
            # The echo comes after a run, whose frames say how long its own are.
            for arm in [*random.permutation(arms[:3]).tolist(), "echo"]:
                out = Path(folder) / f"{arm}-{turn}"
                if arm == "echo":
                    found = echo(made, out, given.rounds, size)
                elif arm == "local":
                    local(made.files, raw, out)
                    found = seconds(out)
                else:
                    if arm == "warm":
                        made.start_worker(SITE)
                    made.play(raw, out, 900)
                    if arm == "warm":
                        made.end(f"{SITE}.worker")
                    found = seconds(out)
                    size = ledger.read(out / "rounds.jsonl")[-1]["bytes_down"]
                played[arm].append(found[1:])
                print(f"{arm:6} " + " ".join(f"{one:.2f}" for one in found), flush=True)
    medians = {arm: [statistics.median(one) for one in turns] for arm, turns in played.items()}
    rows = list(zip(*(medians[arm] for arm in arms), strict=True))
    shares: dict[str, Any] = {
        "flower_echo": [e for _, _, _, e in rows],
        "warm_minus_local": [w - n for n, w, _, _ in rows],
        "warm_minus_local_and_echo": [w - n - e for n, w, _, e in rows],
        "cold_minus_warm": [c - w for _, w, c, _ in rows],
    }
    given.results.write_text(json.dumps({
        "command": "python benchmarks/warm.py", "machine": machine.describe(), "frame_bytes": size, "rounds": played,
        "medians": medians, **{name: {"turns": found, "median": statistics.median(found)} for name, found in shares.items()},
    }, indent=1) + "\n")  # fmt: skip
    for name, found in shares.items():
        print(f"{name:28} {statistics.median(found):.2f} s  (turns {', '.join(f'{one:.2f}' for one in found)})")


if __name__ == "__main__":
    main()
