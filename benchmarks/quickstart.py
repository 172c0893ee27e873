"""The quickstart under several seeds, with its baselines: python benchmarks/quickstart.py [--seeds 0 1 2] [--out FOLDER].

Killed, it goes on where it was. One run at a time, each in a process of its own, timed from start to end.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
from study import spread


def play(folder: Path, seed: int) -> dict[str, Any]:
    """What one run came to; one that was cut short is played again, so that its time is a whole run's."""
    file = folder / f"{seed}.json"
    if not file.exists():
        out, clock = folder / f"{seed}-{time.time_ns()}", time.perf_counter()
        command = [sys.executable, "-m", "fedrank.cli", "run", "quickstart", f"seed={seed}", "--out", str(out)]
        subprocess.run([*command, "--baselines", "--output", "quiet"], check=True)
        summary = json.loads((out / "summary.json").read_text())
        kept = ("accuracy", "personal_accuracy", "majority", "adapter_bytes_up", "adapter_bytes_down", "baselines")
        found = {"seconds": round(time.perf_counter() - clock, 1), **{name: summary[name] for name in kept}}
        file.write_text(json.dumps(found))
        print(f"seed {seed}: {found['accuracy']:.3f} in {found['seconds']:.0f} s", flush=True)
    return dict(json.loads(file.read_text()))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--out", type=Path, default=Path("runs/quickstart_study"))
    words.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quickstart.json")
    given = words.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = {seed: play(given.out, seed) for seed in given.seeds}
    columns = {name: [run[name] for run in runs.values()] for name in ("accuracy", "personal_accuracy", "seconds")}
    columns |= {
        name: [run["baselines"][name] for run in runs.values()] for name in next(iter(runs.values()))["baselines"]
    }
    sums = {name: spread(found) for name, found in columns.items()}
    command = f"python benchmarks/quickstart.py --seeds {' '.join(map(str, given.seeds))}"
    result = {"command": command, "machine": machine.describe(), "over_seeds": sums, "runs": runs}
    given.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
