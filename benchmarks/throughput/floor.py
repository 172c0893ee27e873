"""Print the rate of matrix products that this machine gives to as many processes as it has cores, in FLOP/s.

The largest over torch's two libraries and several row counts, with MiniLM's widest weight, both ways round.
"""

import json
import multiprocessing
import os
import time

import torch

ROWS, WIDTHS, SECONDS = (256, 512, 1024), (384, 1536), 0.3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rate(dtype: torch.dtype, rows: int, packed: bool) -> float:
    done, products = 0.0, []
    for wide, narrow in (WIDTHS, WIDTHS[::-1]):
        x, weight = torch.ones(rows, wide, dtype=dtype), torch.ones(narrow, wide, dtype=dtype)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        products.append((x, weight))
    with torch.inference_mode():
        for again in range(2):  # the first time makes kernels
            done, began = 0.0, time.perf_counter()
            while time.perf_counter() - began < SECONDS * (1 + again) / 2:
                for x, weight in products:
                    if packed:
                        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
                    else:
                        torch.nn.functional.linear(x, weight)
                    done += 2 * rows * WIDTHS[0] * WIDTHS[1]
            found = done / (time.perf_counter() - began)
    return found


def rates(core: int, barrier: multiprocessing.Barrier, queue: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        for rows in ROWS:
            for packed in (False, True):
                barrier.wait()  # all cores at once: they share power and memory
                queue.put((name, rows, packed, rate(dtype, rows, packed)))


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(len(cores)), context.Queue()
    processes = [context.Process(target=rates, args=(core, barrier, queue)) for core in cores]
    for process in processes:
        process.start()
    sums: dict[tuple, float] = {}
    for _ in range(len(cores) * len(DTYPES) * len(ROWS) * 2):
        *key, found = queue.get()
        sums[tuple(key)] = sums.get(tuple(key), 0.0) + found
    for process in processes:
        process.join()
    print(json.dumps({name: max(value for key, value in sums.items() if key[0] == name) for name in DTYPES}))


if __name__ == "__main__":
    main()
