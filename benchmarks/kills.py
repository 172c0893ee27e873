"""kill -9 at random moments in a real federation, and whether a committed round was ever lost.

python benchmarks/kills.py [--kills 18] [--seed 1] [--results FILE]

The federation of tests/federation.py: a SuperLink with TLS, node authentication and a database, and three sites with
a SuperNode and a resident worker each, on loopback. One run of PF2LoRA, whose clients keep private adapters. Each of its
six programs is killed as often as the others, in a random order, at a random site, a random while after the run has
recovered from the last. After each kill another round must be committed, and every State from before be as it was. In the
end every round must be in the ledger once, and the last State be that of a replay, on the local engine, of the answers that
arrived.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from federation import PROGRAMS, SERVERS, committed, federation, follows, state, until  # noqa: E402

PAUSE = 20.0  # seconds, at most, from a recovery to the next kill
SITES = ("north", "south", "west")


def digests(out: Path) -> dict[int, str]:
    """Of the States that are kept."""
    return {round: hashlib.sha256(state(out, round)).hexdigest() for round in committed(out)}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kills", type=int, default=18)
    words.add_argument("--rounds", type=int, default=60)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--results", type=Path, default=HERE / "results" / "kills.json")
    given = words.parse_args()
    random, kills = np.random.default_rng(given.seed), list[dict[str, Any]]()
    order = random.permutation([list(PROGRAMS)[at % len(PROGRAMS)] for at in range(given.kills)]).tolist()
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder), SITES) as made:
        out, started = Path(folder) / "run", time.monotonic()
        raw = made.config(
            method={"name": "pf2lora"},
            rounds={"count": given.rounds, "minimum": 1, "deadline": 60.0, "evaluate_every": 10, "personal": 0},
        )
        (Path(folder) / "run.yaml").write_text(json.dumps(raw))
        process = made.run(out, "run", str(Path(folder) / "run.yaml"), "--out", str(out))
        until(lambda: 1 in committed(out), 300, "the first round")
        for what in order:
            time.sleep(float(random.uniform(0, PAUSE)))
            site = str(random.choice(SITES))
            if process.poll() is not None:
                raise SystemExit(f"the run ended with code {process.returncode}: {made.tail('run')}")
            before, at = digests(out), time.monotonic()
            made.strike(what, site)
            if what in SERVERS:
                if (code := process.wait(300)) != 1:
                    raise SystemExit(f"{what} was killed, and the run ended with code {code}: {made.tail('run')}")
                process = made.run(out, "resume", str(out))
            last = max(before)
            until(lambda last=last: max(committed(out)) > last, 400, f"a round after the kill of {what}")
            kept = digests(out)
            kills.append({
                "what": what, "site": None if PROGRAMS[what][1] else site, "seconds": round(at - started, 1), "after_round": last,
                "next_round_seconds": round(time.monotonic() - at, 1),
                "states_as_before": all(kept[one] == digest for one, digest in before.items() if one in kept),
            })  # fmt: skip
            print(json.dumps(kills[-1]), flush=True)
        made.wait(process, 3600)
        follows(made, raw, out, Path(folder) / "replay")
        seconds = time.monotonic() - started
    lost = [kill for kill in kills if not kill["states_as_before"]]
    given.results.write_text(json.dumps({
        "command": "python benchmarks/kills.py", "machine": machine.describe(), "seed": given.seed, "rounds": given.rounds,
        "kills": kills, "lost_a_committed_round": len(lost), "replay_equal": True, "seconds": round(seconds, 1),
    }, indent=1) + "\n")  # fmt: skip
    print(
        f"{len(kills)} kills in {given.rounds} rounds; {len(lost)} lost a committed round; the replay's State is equal"
    )
    if lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
