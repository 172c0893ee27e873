"""What a figure was measured on: written into every results file."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch


def commit(checkout: Path) -> str:
    """Of a working tree, and whether its code was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py", "benchmarks/*.yaml")
    return git("rev-parse", "--short", "HEAD") + (", with changes" if changed else "")


def describe() -> dict[str, Any]:
    """Processor, cores, memory in GiB, versions, and the commit of the working tree."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model, "capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
        "memory_gib": round(memory, 1), "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "commit": commit(Path(__file__).parents[1]),
    }  # fmt: skip
