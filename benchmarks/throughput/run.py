"""The same federated job by everyone, in turns: python run.py DATA --peers PEERS_PYTHON

DATA holds clinc150 and 20news. What is measured is kept in the results file and not measured again: a stopped run goes
on. Every contestant is a process of its own on the same two cores, timed from outside; CPU time and memory are those of
all its processes. Memory is looked at often, which takes time, and so in a run of its own.
"""

import argparse
import json
import os
import resource
import shutil
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
CORES = 2
PAUSES = {"cpu": 2.0, "memory": 0.2}  # seconds between samples, which take time of the cores too
MEMORY_ROUNDS = 10

# processes, and the threads of each while clients train
PEERS = {
    "flower, as usual": (["flower.py", "--mode", "usual"], 1),
    "flower, matched": (["flower.py", "--mode", "matched"], 2),
    "flower, matched, bfloat16": (["flower.py", "--mode", "matched", "--bf16"], 2),
    "peft, 1 x 2 threads": (["peft_loop.py", "--processes", "1", "--threads", "2"], 1),
    "peft, 2 x 1 thread": (["peft_loop.py", "--processes", "2", "--threads", "1"], 2),
    "peft, 2 x 1 thread, bfloat16": (["peft_loop.py", "--processes", "2", "--threads", "1", "--bf16"], 2),
    "pfl, 1 x 2 threads": (["pfl_run.py", "--threads", "2"], 1),
    "pfl, 2 x 1 thread": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pfl_run.py",
                           "--threads", "1"], 2),
    "pfl, 2 x 1 thread, bfloat16": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                                     "pfl_run.py", "--threads", "1", "--bf16"], 2),
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


def size(process: psutil.Process) -> int:
    """Bytes: its own and its share of what others have too, in memory or swapped out."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss:", "SwapPss:")))


class Watch(threading.Thread):
    """The CPU seconds, or the peak of memory in bytes, of all processes that carry a mark."""

    def __init__(self, mark: str, what: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.what, self.done, self.peak, self.cpu = mark, what, threading.Event(), 0, dict[int, float]()

    def run(self) -> None:
        while not self.done.wait(PAUSES[self.what]):
            total = 0
            for process in marked(self.mark):
                try:
                    if self.what == "memory":
                        total += size(process)
                    else:
                        times = process.cpu_times()
                        self.cpu[process.pid] = times.user + times.system
                except (psutil.Error, OSError):  # it has ended
                    continue
            self.peak = max(self.peak, total)


def children() -> float:
    """The CPU seconds of all processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def play(command: list[str], out: Path, processes: int, what: str = "cpu") -> dict[str, Any]:
    """Run one contestant and read what it reports."""
    shutil.rmtree(out, ignore_errors=True)  # of a run that was cut short
    out.mkdir(parents=True)
    mark = uuid.uuid4().hex
    watch = Watch(mark, what)
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
    if what == "memory":
        return {"peak_pss_bytes": watch.peak}
    clock = json.loads((out / "clock.json").read_text())
    rounds = clock["rounds"]
    seconds = [round["ended"] - round["started"] for round in rounds]
    updates, examples = (sum(round[key] for round in rounds) for key in ("updates", "examples"))
    first, *later = rounds  # the first round warms caches up
    scoring = sum(e["ended"] - e["started"] for e in clock["evaluations"] if e["ended"] < later[-1]["ended"])
    steady = later[-1]["ended"] - first["ended"] - scoring  # with what lies between rounds
    return {
        "wall_seconds": wall,
        "startup_seconds": rounds[0]["started"] - launched,
        "evaluation_seconds": sum(e["ended"] - e["started"] for e in clock["evaluations"]),
        "round_seconds": seconds,
        "updates_per_second": updates / wall,
        "steady_updates_per_second": sum(r["updates"] for r in later) / steady,
        "steady_examples_per_second": sum(r["examples"] for r in later) / steady,
        "outside_training_seconds": sum(seconds) - sum(r["train_seconds"] for r in rounds) / processes,
        # Neither knows all: not what ran after the last sample, nor those whose parents did not wait for them.
        "cpu_seconds": max(sum(watch.cpu.values()), children() - before),
        "accuracy": clock["evaluations"][-1]["accuracy"],
        "updates": updates,
        "examples": examples,
        "numerics": clock.get("numerics"),
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


SHOWN = ("wall_seconds", "steady_updates_per_second", "accuracy", "peak_pss_bytes")
APART = {"1 steps": 1e-6, "10 steps": 1e-5}


def kind(name: str) -> str:
    """The type in which a contestant computes, and so its floor."""
    return "bfloat16" if name == "fedrank" or "bfloat16" in name else "float32"


COLUMNS = {
    "wall, s": ("wall_seconds", 1, 1), "start-up, s": ("startup_seconds", 1, 1),
    "updates/s": ("updates_per_second", 1, 2), "steady updates/s": ("steady_updates_per_second", 1, 2),
    "steady examples/s": ("steady_examples_per_second", 1, 0), "CPU s": ("cpu_seconds", 1, 0),
    "outside training, s": ("outside_training_seconds", 1, 1), "accuracy, %": ("accuracy", 100, 1),
}  # fmt: skip


def table(summary: dict[str, Any], floor: dict[str, Any], memory: dict[str, float]) -> str:
    """Medians, in Markdown; in brackets the least and the most of the wall time."""
    head = ["", *COLUMNS, "peak PSS, MB", "share of the floor, %"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for name, own in summary.items():
        cells = [f"{own[key]['median'] * factor:.{digits}f}" for key, factor, digits in COLUMNS.values()]
        cells[0] += f" ({own['wall_seconds']['least']:.1f} to {own['wall_seconds']['most']:.1f})"
        cells.append(f"{memory[name] / 1e6:.0f}" if name in memory else "")
        cells.append(f"{100 * floor[kind(name)]['share_of_round_seconds'][name]:.0f}")
        lines.append(" | ".join([name, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def verdict(
    summary: dict[str, Any], floor: dict[str, Any], memory: dict[str, float], distances: dict[str, Any]
) -> dict[str, Any]:
    """What was to be shown: ratios of medians, float32 to float32 and best to best, and whether they are what was asked for."""

    def middle(name: str, figure: str) -> float:
        return float(summary[name][figure]["median"])

    wall, steady = "updates_per_second", "steady_updates_per_second"
    best = {how: max((n for n in PEERS if how == "best" or kind(n) == how), key=lambda n: middle(n, steady))
            for how in ("float32", "best")}  # fmt: skip
    ours = {"float32": "fedrank, float32", "best": "fedrank"}
    flower = {"float32": "flower, matched", "best": "flower, matched, bfloat16"}
    accuracies = {name: middle(name, "accuracy") for name in summary if name != "flower, as usual"}  # it has dropout
    found: dict[str, Any] = {
        "updates_per_second_over_flower": {how: middle(ours[how], wall) / middle(flower[how], wall) for how in ours}
        | {name: middle("fedrank", wall) / middle(name, wall) for name in ("flower, as usual", "flower, matched")},
        "steady_over_best_peer": {how: middle(ours[how], steady) / middle(best[how], steady) for how in ours},
        "best_peer": best,
        "share_of_the_floor": {name: floor[kind(name)]["share_of_round_seconds"][name] for name in ours.values()},
        # as many times the best peer's speed would be all that products allow
        "floor_over_best_peer": 1 / floor["bfloat16"]["share_of_round_seconds"][best["best"]],
        "memory_over_flower": {how: memory[ours[how]] / memory[flower[how]] for how in ours}
        | {name: memory["fedrank"] / memory[name] for name in ("flower, as usual", "flower, matched")},
        "accuracy_points_apart": 100 * (max(accuracies.values()) - min(accuracies.values())),
    }
    met = {
        **{f"5x of flower, {how} to {how}": found["updates_per_second_over_flower"][how] >= 5 for how in ours},
        "5x of flower, matched in float32, by fedrank as it comes": found["updates_per_second_over_flower"]["flower, matched"] >= 5,
        "3x of the best peer, steady": found["steady_over_best_peer"]["best"] >= 3,
        "half of what products' rate allows": found["share_of_the_floor"]["fedrank"] >= 0.5,
        **{f"half the memory of flower, matched, {how}": found["memory_over_flower"][how] < 0.5 for how in ours},
        "accuracy within 1 point of each other": found["accuracy_points_apart"] <= 1,
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
    """fedrank's adapter from the plain loop's after so many steps of one client, all in float32 on one thread.

    With the library that the loop has for its products, and with the one that the timed row may take.
    """
    found = {}
    for steps in (1, 10):
        folder, overrides = (work / f"{data.name}-{steps}-steps").resolve(), [f"local.steps={steps}", "rounds.cohort=1"]
        shutil.rmtree(folder, ignore_errors=True)
        exact = ["engine.compute=float32", "engine.workers=1", "engine.threads=1"]
        job, ours, other, theirs = (folder / name for name in ("job", "torch", "auto", "peft"))
        short = ["--rounds", "1", *overrides]
        for command in (
            [sys.executable, "job.py", data, job, *short],
            [sys.executable, "fedrank_run.py", data, ours, *short, *exact, "engine.products=torch"],
            [sys.executable, "fedrank_run.py", data, other, *short, *exact],
            [peers, "peft_loop.py", job, theirs, "--processes", "1", "--threads", "1"],
        ):
            subprocess.run(list(map(str, command)), cwd=HERE, check=True, capture_output=True)
        found[f"{steps} steps"] = distance(ours, theirs)
        found[f"{steps} steps, fedrank's own choice of products"] = distance(other, theirs)
    return found


def versions(peers: str) -> dict[str, str]:
    """Of what the peers are made of."""
    code = (
        "import json; from importlib.metadata import version\n"
        "print(json.dumps({n: version(n) for n in ('torch', 'transformers', 'peft', 'flwr', 'ray', 'pfl', 'numpy')}))"
    )
    return dict(json.loads(subprocess.run([peers, "-c", code], check=True, capture_output=True, text=True).stdout))


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
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    peers = os.path.abspath(args.peers)  # not resolved: a virtual environment's is a link
    results = json.loads(args.results.read_text()) if args.results.exists() else {"jobs": {}, "memory": {}}
    here = machine.describe()
    if results.setdefault("machine", here)["commit"] != here["commit"]:
        raise SystemExit(f"{args.results} is of commit {results['machine']['commit']}, here is {here['commit']}: "
                         "go on with that one, or write another file by --results")  # fmt: skip
    results.setdefault("peers", versions(peers))
    work = args.work / here["commit"].replace(", ", "-").replace(" ", "-")  # a job hangs on the code that wrote it

    def keep() -> None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1))

    def written(dataset: str, rounds: int) -> Path:
        """The folder of a job."""
        folder = (work / f"{dataset}-{rounds}").resolve()
        if not (folder / "job" / "job.json").exists():
            subprocess.run([sys.executable, HERE / "job.py", args.data / dataset, folder / "job", "--rounds",
                            str(rounds)], check=True)  # fmt: skip
        return folder

    def played(name: str, dataset: str, rounds: int, at: str, what: str) -> dict[str, Any]:
        words, processes = (PEERS | OURS)[name]
        folder = written(dataset, rounds)
        out = folder / f"{name.replace(' ', '-').replace(',', '')}-{at}"
        if name in PEERS:
            script = next(i for i, word in enumerate(words) if word.endswith(".py")) + 1
            command = [peers, *words[:script], str(folder / "job"), str(out), *words[script:]]
        else:
            command = [sys.executable, "fedrank_run.py", str((args.data / dataset).resolve()), str(out),
                       "--rounds", str(rounds), *words]  # fmt: skip
        found = play(command, out, processes, what)
        shown = {key: round(value, 4) for key, value in found.items() if key in SHOWN}
        print(time.strftime("%H:%M:%S"), dataset, rounds, name, shown, flush=True)
        return found

    names = [name for name in PEERS | OURS if args.only in name]
    for dataset in args.datasets.split(","):
        if dataset not in results.setdefault("distances", {}):
            results["distances"][dataset] = distances((args.data / dataset).resolve(), work, peers)
            keep()
        memory = results["memory"].setdefault(dataset, {})
        for rounds in map(int, args.rounds.split(",")):
            job = results["jobs"].setdefault(f"{dataset}, {rounds} rounds", {"records": {}})
            job["flops"] = json.loads((written(dataset, rounds) / "job" / "job.json").read_text())["flops"]
            for repeat in range(args.repeats):
                if len(job.setdefault("gemm_flops_per_second", [])) <= repeat:
                    job["gemm_flops_per_second"].append(gemm())
                for name in names:
                    records = job["records"].setdefault(name, [])
                    if len(records) <= repeat:
                        records.append(played(name, dataset, rounds, str(repeat), "cpu"))
                        keep()
        for name in names:
            if name not in memory:
                memory[name] = played(name, dataset, MEMORY_ROUNDS, "memory", "memory")["peak_pss_bytes"]
                keep()
        for what, job in results["jobs"].items():
            if what.startswith(f"{dataset}, ") and any(job["records"].values()):
                job["summary"] = {n: summary(r) for n, r in job["records"].items() if r}
                job["floor"] = floor(job)
                if len(job["summary"]) == len(memory) == len(PEERS | OURS):
                    job["verdict"] = verdict(job["summary"], job["floor"], memory, results["distances"][dataset])
                print(f"{what}\n{table(job['summary'], job['floor'], memory)}")
                print(json.dumps(job.get("verdict", {}), indent=1))
        keep()


if __name__ == "__main__":
    main()
