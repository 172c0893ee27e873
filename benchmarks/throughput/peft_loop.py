"""A plain loop of PEFT: clients one after the other, or on a pool of forked processes.

python peft_loop.py JOB OUT --processes 2 --threads 1
"""

import argparse
import multiprocessing
import time
from contextlib import nullcontext
from pathlib import Path

import plain
import torch
from plain import Clock, Job, Network, Values

network: Network
job: Job


def update(task: tuple[int, str, Values]) -> tuple[Values, int, float]:
    round, client, values = task
    network.write(values)
    examples, seconds = plain.train(network, job, round, client)
    return network.read(), examples, seconds


def main() -> None:
    global network, job
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    clock = Clock()
    torch.set_num_threads(args.threads)
    job = Job(args.job)
    network = Network(job, bf16=args.bf16)
    values = network.read()
    context = multiprocessing.get_context("fork")
    with context.Pool(args.processes) if args.processes > 1 else nullcontext() as pool:
        for round, cohort in enumerate(job.cohorts, 1):
            started = time.time()
            tasks = [(round, client, values) for client in cohort]
            done = list(map(update, tasks) if pool is None else pool.imap(update, tasks))
            values = plain.mean([(new, examples) for new, examples, _ in done])
            clock.round(started, sum(n for _, n, _ in done), sum(s for *_, s in done), len(done))
            if plain.due(job, round):
                started = time.time()
                torch.set_num_threads(args.processes * args.threads)
                network.write(values)
                clock.evaluation(started, plain.evaluate(network, job))
                torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    network.write(values)
    plain.save(network, args.out / "adapter.npz")
    clock.write(args.out / "clock.json")


if __name__ == "__main__":
    main()
