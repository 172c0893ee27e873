"""From a thousand registered clients to a million: start-up, the server's memory, seconds per sampled client, planning.

python benchmarks/scale.py [--clients 1000 10000 100000 1000000] [--repeats 2] [--results FILE]

Rounds of 1,000 clients on the tiny encoder, their rows made when they are drawn, each run in a process of its own. The
runs of all sizes take turns round by round, in another order every time, and are compared within a turn: what slows the
machine for minutes slows all of them. What is measured is kept: killed, it goes on where it was. The methods: fedsa_lora,
whose clients keep their B on disk; legend, which gives each client a depth by what its rounds took; and legend with all
the depth that a device has the memory for, so that clients that come back do the same work as new ones. Then the time in
which every method draws and plans a round of 1,000 of a million devices for a model of MiniLM's size. Server and clients
are one process here, so its memory is an upper bound of the server's. Linux only: memory is read from /proc; of it,
`pss_mib` hangs on what else runs, since libraries are shared. Seconds per client are given by the wall and of the
processor.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "fedsa_lora": {"name": "fedsa_lora"},
    "legend": {"name": "legend"},
    "legend, all depth": {"name": "legend", "depth": "full"},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "fed_plora": [{}, {"selection": "weight_norm"}, {"rest": "drop"}],
    "hetlora": [{}, {"form": "full"}],
}  # of a method that plans in more ways than one
COHORT, WARM_UP, ROUNDS, ROWS = 1000, 1, 3, 4
FLEET = {
    "devices": {"jetson-tx2": 30, "jetson-xavier-nx": 40, "jetson-agx-xavier": 10}, "jitter": 0.2, "redraw": 20,
    "ranks": {"jetson-tx2": 2, "jetson-xavier-nx": 4},
}  # fmt: skip
WORDS = [line.split() for line in ("red green blue grey", "oak elm ash fir", "cat dog cow hen", "one two six ten")]
LIMITS = {
    "memory": 1.1,
    "cpu_seconds_per_client": 1.1,
    "seconds_per_client": 1.1,
    "start_seconds": 10.0,
    "planning_seconds": 1.0,
}


def rows(at: int) -> Iterator[dict[str, Any]]:
    """A client's rows, by its address."""
    from fedrank.protocol import rng

    draws = rng(0, "rows", at).integers(4, size=(ROWS, 6))
    return ({"text": " ".join(WORDS[y][word] for word in words), "label": int(y)} for y, *words in draws.tolist())


def memory() -> dict[str, float]:
    """MiB of this process now, its own pages among them, its proportional share, and the most that it ever held."""
    found = {}
    for file, keys in (("status", {"VmRSS:": "rss_mib", "RssAnon:": "anonymous_mib", "VmHWM:": "peak_rss_mib"}),
                       ("smaps_rollup", {"Pss:": "pss_mib"})):  # fmt: skip
        lines = [line.split() for line in Path(f"/proc/self/{file}").read_text().splitlines()]
        found |= {keys[line[0]]: int(line[1]) / 1024 for line in lines if line[0] in keys}
    return found


def wait() -> None:
    """For this run's next turn."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("who gave the turns is gone")


def play(method: str, clients: int) -> dict[str, Any]:
    """One run of this process: its start-up, and its rounds, each when it is its turn."""
    clock, cpu = time.perf_counter(), time.process_time()
    import fedrank
    from fedrank import experiment
    from fedrank.config import load

    test = [row for at in range(10) for row in rows(clients + at)]
    data = fedrank.ClientData("words", clients, rows, test, ("colours", "trees", "animals", "numbers"))
    config = load({
        "data": {"name": data.name}, "local": {"max_length": 16, "batch_size": ROWS}, "method": METHODS[method],
        "rounds": {"count": WARM_UP + ROUNDS + 1, "cohort": COHORT, "evaluate_every": 1000, "personal": 0},
        "engine": {"workers": 1, "compute": "float32", "products": "torch", "fleet": FLEET},
    })  # fmt: skip
    path, found = Path(tempfile.mkdtemp()), dict[str, Any]()
    took, work, held = list[float](), list[float](), list[dict[str, float]]()
    try:
        with closing(experiment.start(config, path / "run", data=data)) as events:
            for event in events:
                if event["event"] == "start":
                    found |= {"start_seconds": time.perf_counter() - clock, "at_start": memory()}
                if event["event"] == "round":
                    assert event["clients_ok"] == COHORT, event
                    if "mean_depth" in event:
                        found.setdefault("mean_depth_of_rounds", []).append(event["mean_depth"])
                    held.append(memory())
                    took.append(time.perf_counter() - clock)
                    work.append(time.process_time() - cpu)
                if len(took) == WARM_UP + ROUNDS:
                    break
                if event["event"] in ("start", "round"):
                    wait()
                    clock, cpu = time.perf_counter(), time.process_time()
        state = experiment.Run(path / "run").state
        folders = [folder for folder in (path / "run" / "clients").iterdir() if any(folder.iterdir())]
    finally:
        shutil.rmtree(path)
    per_client = {"cpu_seconds_per_client": work, "seconds_per_client": took}
    return found | {
        **{name: statistics.mean(rounds[WARM_UP:]) / COHORT for name, rounds in per_client.items()},
        "cpu_seconds_of_rounds": work, "seconds_of_rounds": took, "after_rounds": held,
        "clients_seen": len(state.seen), "clients_with_private_state": len(folders),
    }  # fmt: skip


def planning() -> dict[str, float]:
    """Seconds until a round's cohort is drawn and has its plans, the second of two: every method, every variant."""
    import numpy as np
    from wire import LINEARS, minilm

    from fedrank import fleet, methods
    from fedrank.config import FleetSettings, Rounds
    from fedrank.engines.local import Local
    from fedrank.protocol import Attention, Linear, Load
    from fedrank.roster import Names, Roster
    from fedrank.server import Server
    from fedrank.store import Store
    from fedrank.wire import Wire

    spec, roles = minilm(), ("query", "key", "value", "", "", "")
    flow = [
        Linear(f"layer.{block}.{name}", out, in_, block, max(0, at - 2), role)
        for block in range(spec.blocks)
        for at, ((name, (out, in_)), role) in enumerate(zip(LINEARS.items(), roles, strict=True))
    ]
    spec = replace(spec, flow=tuple(flow), attention=Attention(384, 12), parameters=22_700_000)
    names = Names(1_000_000)
    machines = fleet.build(FleetSettings.model_validate(FLEET), Roster(names, lambda at: ROWS), 0)
    load = Load(steps=1, tokens=200, pairs=10_000, peak_tokens=200, peak_pairs=10_000, rows=ROWS)
    devices = Roster(names, lambda at: replace(machines.devices[names[at]], load=load))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in methods.names():
            for options in VARIANTS.get(name, [{}]):
                method = methods.build({"name": name, **options})
                begin = method.begin(spec, 100, 0)
                engine: Any = Local(devices, lambda client: None, 0.0, 0)  # type: ignore[arg-type, return-value]
                settings = Rounds(count=100, cohort=COHORT)
                wire = Wire(spec, begin.adapter, "f32", "run", 0)
                server = Server(method, engine, wire, Store(Path(folder)), settings, 0, "train", None)
                for begun in (begin, replace(begin, round=2, seen=dict.fromkeys(names[:1000], 1))):
                    clock = time.perf_counter()
                    event = next(server.train(begun, 0.0, server.cohort(begun.round + 1)))
                    seconds = time.perf_counter() - clock
                    assert event["event"] == "cohort"
                    assert len(event["clients"]) == COHORT
                label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
                found[label] = seconds
    assert np.isfinite(list(found.values())).all()
    return found


def apart(*words: str) -> Any:
    """What this script finds in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--only", *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(method: str, sizes: list[int], repeat: int) -> list[dict[str, Any]]:
    """The runs of all sizes: started one after the other, then one round of each, in an order that goes round."""
    with ExitStack() as stack:

        def answer(run: subprocess.Popen[str]) -> str:
            assert run.stdout is not None
            if not (line := run.stdout.readline()):
                raise SystemExit(f"a run of {method} ended with {run.wait()}")
            return line

        def turn(run: subprocess.Popen[str]) -> str:
            assert run.stdin is not None
            run.stdin.write("go\n")
            run.stdin.flush()
            return answer(run)

        runs = []
        for clients in sizes:
            words = [sys.executable, __file__, "--only", method, str(clients)]
            run = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            runs.append(stack.enter_context(run))
            answer(run)
        answers = [""] * len(runs)
        for number in range(WARM_UP + ROUNDS):
            for at in range(len(runs)):
                at = (at + number + repeat) % len(runs)
                answers[at] = turn(runs[at])
    return [json.loads(line) for line in answers]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(values: list[float]) -> float:
    return max(values) / min(values)


def ratio_in_turns(sizes: list[list[dict[str, Any]]], rounds: str) -> float:
    """Of the slowest size to the fastest one; a size's time is the median, over turns, of its share of the turn's mean."""
    turns = [[run[rounds][at] for run in runs] for runs in zip(*sizes, strict=True)
             for at in range(WARM_UP, WARM_UP + ROUNDS)]  # fmt: skip
    shares = [[seconds / statistics.mean(turn) for seconds in turn] for turn in turns]
    return ratio([statistics.median(own) for own in zip(*shares, strict=True)])


def summary(runs: dict[str, dict[str, list[Any]]], plans: list[dict[str, float]]) -> dict[str, Any]:
    """Medians with their spread, and how each target is met; ratios are of the largest to the smallest."""
    found: dict[str, Any] = {}
    for method, sizes in runs.items():
        table = {
            clients: {
                "start_seconds": spread([run["start_seconds"] for run in these]),
                "cpu_seconds_per_client": spread([run["cpu_seconds_per_client"] for run in these]),
                "seconds_per_client": spread([run["seconds_per_client"] for run in these]),
                "peak_rss_mib": spread([run["after_rounds"][-1]["peak_rss_mib"] for run in these]),
                "rss_mib": spread([statistics.mean(held["rss_mib"] for held in run["after_rounds"]) for run in these]),
            }
            for clients, these in sizes.items()
        }
        found[method] = {
            "by_clients": table, "start_seconds": max(row["start_seconds"]["median"] for row in table.values()),
            "ratios": {
                "cpu_seconds_per_client": ratio_in_turns(list(sizes.values()), "cpu_seconds_of_rounds"),
                "seconds_per_client": ratio_in_turns(list(sizes.values()), "seconds_of_rounds"),
                **{name: ratio([row[name]["median"] for row in table.values()]) for name in ("peak_rss_mib", "rss_mib")},
            },
        }  # fmt: skip
    names = plans[0] if plans else {}
    found["planning_seconds"] = {name: spread([plan[name] for plan in plans]) for name in names}
    ratios = [found[method]["ratios"] for method in runs]
    reached = {
        "memory": max(one[name] for one in ratios for name in ("peak_rss_mib", "rss_mib")),
        "cpu_seconds_per_client": max(one["cpu_seconds_per_client"] for one in ratios),
        "seconds_per_client": max(one["seconds_per_client"] for one in ratios),
        "start_seconds": max(found[method]["start_seconds"] for method in runs),
        "planning_seconds": max((found["planning_seconds"][name]["median"] for name in names), default=None),
    }
    met = {name: value is not None and value <= LIMITS[name] for name, value in reached.items()}
    return {"reached": reached, "limits": LIMITS, "met": met, **found}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    words.add_argument("--repeats", type=int, default=2)
    words.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    words.add_argument("--only", nargs="+", help="measure one thing in this process: planning, or a method and clients")
    given = words.parse_args()
    if given.only:
        print(json.dumps(planning() if given.only == ["planning"] else play(given.only[0], int(given.only[1]))))
        return
    import machine

    settings = {
        "methods": METHODS,
        "cohort": COHORT,
        "warm_up": WARM_UP,
        "rounds": ROUNDS,
        "rows": ROWS,
        "fleet": FLEET,
    }
    result: dict[str, Any] = {
        "command": "python benchmarks/scale.py",
        "machine": machine.describe(),
        "settings": settings,
    }
    runs: dict[str, dict[str, list[Any]]] = {method: {str(n): [] for n in given.clients} for method in METHODS}
    plans: list[dict[str, float]] = []
    if given.results.exists():
        before = json.loads(given.results.read_text())
        if (before["machine"], before["settings"]) != (result["machine"], settings):
            sys.exit(f"{given.results} is of another machine, commit or setting; remove it, or give another --results")
        runs = {method: runs[method] | before["runs"][method] for method in METHODS}
        plans = before["planning"]
    for repeat in range(given.repeats):
        for method in METHODS:
            if len(runs[method][str(given.clients[0])]) > repeat:
                continue
            for clients, found in zip(given.clients, in_turns(method, given.clients, repeat), strict=True):
                runs[method][str(clients)].append(found)
                print(f"{method}, {clients} clients: {found['start_seconds']:.1f} s to start, "
                      f"{1000 * found['cpu_seconds_per_client']:.2f} ms a client ({1000 * found['seconds_per_client']:.2f} by the wall), "
                      f"{found['after_rounds'][-1]['peak_rss_mib']:.0f} MiB", flush=True)  # fmt: skip
            given.results.write_text(json.dumps({**result, "runs": runs, "planning": plans}, indent=1) + "\n")
        if len(plans) <= repeat:
            plans.append(apart("planning"))
    result |= {"summary": summary(runs, plans), "runs": runs, "planning": plans}
    given.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"]["reached"], indent=1), json.dumps(result["summary"]["met"], indent=1))


if __name__ == "__main__":
    main()
