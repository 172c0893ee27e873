"""The same federated job by everyone, in turns: python run.py DATA --peers PEERS_PYTHON

DATA holds clinc150 and 20news. What is measured is kept in the results file and not measured again: a stopped run goes
on. Every contestant is a process of its own, timed from outside; memory and CPU time are those of all its processes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402

MARK = "FEDRANK_BENCHMARK"  # in the environment of all that one contestant starts
PAUSE = 2.0  # seconds between samples of memory and CPU time, which take time of the cores too

# processes, and the threads of each while clients train
PEERS = {
    "flower, as usual": (["flower.py", "--mode", "usual"], 1),
    "flower, matched": (["flower.py", "--mode", "matched"], 2),
    "peft, 1 x 2 threads": (["peft_loop.py", "--processes", "1", "--threads", "2"], 1),
    "peft, 2 x 1 thread": (["peft_loop.py", "--processes", "2", "--threads", "1"], 2),
    "peft, 2 x 1 thread, autocast": (["peft_loop.py", "--processes", "2", "--threads", "1", "--bf16", "autocast"], 2),
    "peft, 2 x 1 thread, bfloat16 base": (["peft_loop.py", "--processes", "2", "--threads", "1", "--bf16", "base"], 2),
    "pfl, 1 x 2 threads": (["pfl_run.py", "--threads", "2"], 1),
    "pfl, 2 x 1 thread": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pfl_run.py",
                           "--threads", "1"], 2),
}  # fmt: skip
OURS = {
    "fedrank, float32 by torch": (["engine.compute=float32", "engine.products=torch"], 2),
    "fedrank, float32": (["engine.compute=float32"], 2),
    "fedrank": ([], 2),
}


def marked(mark: str) -> Iterator[psutil.Process]:
    """All processes that a contestant started, whoever their parent is by now."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(MARK) == mark:
            yield process


class Watch(threading.Thread):
    """The CPU seconds and the peak of memory, in bytes of PSS, of all processes that carry a mark."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.done, self.peak, self.cpu = mark, threading.Event(), 0, dict[int, float]()

    def run(self) -> None:
        while not self.done.wait(PAUSE):
            total = 0
            for process in marked(self.mark):
                try:
                    total += process.memory_full_info().pss
                    times = process.cpu_times()
                    self.cpu[process.pid] = times.user + times.system
                except psutil.Error:  # it has ended
                    continue
            self.peak = max(self.peak, total)


def children() -> float:
    """The CPU seconds of all processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def play(command: list[str], out: Path, processes: int) -> dict[str, Any]:
    """Run one contestant and read what it reports."""
    out.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    watch = Watch(mark)
    environment = os.environ | {MARK: mark, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    launched, before = time.time(), children()
    watch.start()
    with (out / "log.txt").open("w") as log:
        run = subprocess.run(command, cwd=HERE, env=environment, stdout=log, stderr=subprocess.STDOUT)
    wall = time.time() - launched
    watch.done.set()
    watch.join()
    if run.returncode:
        raise SystemExit("\n".join((out / "log.txt").read_text().splitlines()[-20:]) + f"\n{command} failed, see {out}")
    clock = json.loads((out / "clock.json").read_text())
    rounds = clock["rounds"]
    seconds = [round["ended"] - round["started"] for round in rounds]
    updates, examples = (sum(round[key] for round in rounds) for key in ("updates", "examples"))
    later = slice(1, None)  # the first round warms caches up
    return {
        "wall_seconds": wall,
        "startup_seconds": rounds[0]["started"] - launched,
        "evaluation_seconds": sum(e["ended"] - e["started"] for e in clock["evaluations"]),
        "round_seconds": seconds,
        "updates_per_second": updates / wall,
        "steady_updates_per_second": sum(r["updates"] for r in rounds[later]) / sum(seconds[later]),
        "steady_examples_per_second": sum(r["examples"] for r in rounds[later]) / sum(seconds[later]),
        "outside_training_seconds": sum(seconds) - sum(r["train_seconds"] for r in rounds) / processes,
        # Neither knows all: not what ran after the last sample, nor those whose parents did not wait for them.
        "cpu_seconds": max(sum(watch.cpu.values()), children() - before),
        "peak_pss_bytes": watch.peak,
        "accuracy": clock["evaluations"][-1]["accuracy"],
        "updates": updates,
        "examples": examples,
    }


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of each figure over the repeats."""
    found: dict[str, Any] = {"repeats": len(records)}
    for key, value in records[0].items():
        if isinstance(value, float | int):
            values = [record[key] for record in records]
            found[key] = {"median": median(values), "least": min(values), "most": max(values)}
    return found


def gemm() -> dict[str, float]:
    """FLOP/s of matrix products on all cores of this machine, now."""
    done = subprocess.run([sys.executable, "floor.py"], cwd=HERE, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def floor(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds that the job's FLOPs take at the measured rate of products, and that share of the time in rounds."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        seconds = job["flops"] / median(measured[dtype] for measured in job["gemm_flops_per_second"])
        shares = {
            name: seconds / median(sum(record["round_seconds"]) for record in records)
            for name, records in job["records"].items()
            if records
        }
        found[dtype] = {"seconds": seconds, "share_of_round_seconds": shares}
    return found


APART = {"1 steps": 1e-6, "10 steps": 1e-5}
COLUMNS = {
    "wall, s": ("wall_seconds", 1, 1), "start-up, s": ("startup_seconds", 1, 1),
    "updates/s": ("updates_per_second", 1, 2), "steady updates/s": ("steady_updates_per_second", 1, 2),
    "steady examples/s": ("steady_examples_per_second", 1, 0), "CPU s": ("cpu_seconds", 1, 0),
    "outside training, s": ("outside_training_seconds", 1, 1), "peak PSS, MB": ("peak_pss_bytes", 1e-6, 0),
    "accuracy, %": ("accuracy", 100, 1),
}  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """Medians, in Markdown; in brackets the least and the most of the wall time."""
    lines = [" | ".join(["", *COLUMNS]), "|".join(["---"] * (len(COLUMNS) + 1))]
    for name, own in summary.items():
        cells = [f"{own[key]['median'] * factor:.{digits}f}" for key, factor, digits in COLUMNS.values()]
        cells[0] += f" ({own['wall_seconds']['least']:.1f} to {own['wall_seconds']['most']:.1f})"
        lines.append(" | ".join([name, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def verdict(summary: dict[str, Any], floor: dict[str, Any], distances: dict[str, Any]) -> dict[str, Any]:
    """What was to be shown: ratios of medians, and whether they are what was asked for."""

    def middle(name: str, figure: str) -> float:
        return float(summary[name][figure]["median"])

    def best(figure: str, bf16: bool) -> float:
        return max(middle(name, figure) for name, (words, _) in PEERS.items() if bf16 or "--bf16" not in words)

    steady, memory = "steady_updates_per_second", "peak_pss_bytes"
    apart = {name: 100 * abs(middle(name, "accuracy") - middle("fedrank", "accuracy")) for name in summary}
    found = {
        "updates_per_second_over_flower": {
            name: middle("fedrank", "updates_per_second") / middle(f"flower, {name}", "updates_per_second")
            for name in ("as usual", "matched")
        },
        "steady_over_best_peer": middle("fedrank", steady) / best(steady, True),
        "steady_over_best_peer_in_float32": middle("fedrank, float32", steady) / best(steady, False),
        "memory_over_flower": {
            name: middle("fedrank", memory) / middle(f"flower, {name}", memory) for name in ("as usual", "matched")
        },
        "accuracy_points_apart": apart,
        "share_of_the_bfloat16_floor": floor["bfloat16"]["share_of_round_seconds"]["fedrank"],
    }
    met = {
        "5x of flower, matched": found["updates_per_second_over_flower"]["matched"] >= 5,
        "3x of the best peer, steady": found["steady_over_best_peer"] >= 3,
        "else half of what products' rate allows": found["share_of_the_bfloat16_floor"] >= 0.5,
        "half the memory of flower, matched": found["memory_over_flower"]["matched"] < 0.5,
        # dropout is part of how Flower's users write it
        "accuracy within 1 point": all(points <= 1 for name, points in apart.items() if name != "flower, as usual"),
        **{f"{steps} apart less than {most:g}, root of mean square": distances[steps]["root_mean_square"] < most
           for steps, most in APART.items()},
    }  # fmt: skip
    return found | {"met": met}


def distance(ours: Path, theirs: Path) -> dict[str, float]:
    """Between two trained adapters with their heads: of a number in the mean (root of squares), and at most.

    AdamW divides each gradient by its own size, so a few that are next to zero carry rounding into the largest one.
    """
    a, b = (dict(np.load(path / "adapter.npz")) for path in (ours, theirs))
    assert a.keys() == b.keys()
    apart = np.concatenate([(a[name] - b[name]).ravel() for name in a]).astype(np.float64)
    return {"root_mean_square": float(np.sqrt((apart**2).mean())), "largest": float(np.abs(apart).max())}


def distances(data: Path, work: Path, peers: str) -> dict[str, dict[str, float]]:
    """fedrank's adapter from the plain loop's after so many steps of one client, both in float32 on one thread."""
    found = {}
    for steps in (1, 10):
        folder, overrides = (work / f"{data.name}-{steps}-steps").resolve(), [f"local.steps={steps}", "rounds.cohort=1"]
        exact = ["engine.compute=float32", "engine.products=torch", "engine.workers=1", "engine.threads=1"]
        job, ours, theirs = (folder / name for name in ("job", "fedrank", "peft"))
        for command in (
            [sys.executable, "job.py", data, job, "--rounds", "1", *overrides],
            [sys.executable, "fedrank_run.py", data, ours, "--rounds", "1", *overrides, *exact],
            [peers, "peft_loop.py", job, theirs, "--processes", "1", "--threads", "1"],
        ):
            subprocess.run(list(map(str, command)), cwd=HERE, check=True, capture_output=True)
        found[f"{steps} steps"] = distance(ours, theirs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peers", default=sys.executable, help="the Python of the environment that has the peers")
    parser.add_argument("--datasets", default="clinc150,20news")
    parser.add_argument("--rounds", default="10,50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the contestants' names")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "throughput.json")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {"jobs": {}}
    here = machine.describe()
    if results.setdefault("machine", here)["commit"] != here["commit"]:
        raise SystemExit(f"{args.results} is of commit {results['machine']['commit']}, here is {here['commit']}: "
                         "go on with that one, or write another file by --results")  # fmt: skip

    work = args.work / here["commit"].replace(", ", "-").replace(" ", "-")  # a job hangs on the code that wrote it

    def keep() -> None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1))

    for dataset in args.datasets.split(","):
        if dataset not in results.setdefault("distances", {}):
            results["distances"][dataset] = distances((args.data / dataset).resolve(), work, args.peers)
            keep()
        for rounds in map(int, args.rounds.split(",")):
            folder = (work / f"{dataset}-{rounds}").resolve()
            if not (folder / "job" / "job.json").exists():
                subprocess.run([sys.executable, HERE / "job.py", args.data / dataset, folder / "job", "--rounds",
                                str(rounds)], check=True)  # fmt: skip
            about = json.loads((folder / "job" / "job.json").read_text())
            job = results["jobs"].setdefault(f"{dataset}, {rounds} rounds", {"records": {}})
            job["flops"] = about["flops"]
            for repeat in range(args.repeats):
                if len(job.setdefault("gemm_flops_per_second", [])) <= repeat:
                    job["gemm_flops_per_second"].append(gemm())
                for name, (words, processes) in (PEERS | OURS).items():
                    records = job["records"].setdefault(name, [])
                    if args.only not in name or len(records) > repeat:
                        continue
                    out = folder / f"{name.replace(' ', '-').replace(',', '')}-{repeat}"
                    if name in PEERS:
                        at = next(i for i, word in enumerate(words) if word.endswith(".py")) + 1
                        command = [args.peers, *words[:at], str(folder / "job"), str(out), *words[at:]]
                    else:
                        command = [sys.executable, "fedrank_run.py", str((args.data / dataset).resolve()), str(out),
                                   "--rounds", str(rounds), *words]  # fmt: skip
                    found = play(command, out, processes)
                    records.append(found)
                    print(f"{time.strftime('%H:%M:%S')} {dataset} {rounds} {name}: {found['wall_seconds']:.1f} s, "
                          f"{found['steady_updates_per_second']:.2f} updates/s, {found['accuracy']:.4f}", flush=True)  # fmt: skip
                    job["summary"] = {n: summary(r) for n, r in job["records"].items() if r}
                    job["floor"] = floor(job)
                    if len(job["summary"]) == len(PEERS | OURS):
                        job["verdict"] = verdict(job["summary"], job["floor"], results["distances"][dataset])
                    keep()
            if "summary" in job:
                print(f"{dataset}, {rounds} rounds\n{table(job['summary'])}")


if __name__ == "__main__":
    main()
