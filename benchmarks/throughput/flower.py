"""Flower's simulation runtime: flower_app by `flwr run`, with matched settings or written as its tutorials are.

python flower.py JOB OUT --mode matched. Needs flwr[simulation] besides what plain.py needs; Linux only.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def environment(home: str) -> dict[str, str]:
    """What keeps the run off the network and off the user's own Flower and Ray."""
    # OMP_NUM_THREADS: Ray sets it to an actor's CPUs, unless it is set.
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RAY_ADDRESS")}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
        "FLWR_HOME": home,
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_TMPDIR": home,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def stop(home: str) -> None:
    """End the SuperLink, which `flwr run` leaves running, and all that it started: they are who inherited this home."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        deadline = time.monotonic() + 10
        asked = set()
        while time.monotonic() < deadline:
            left = {p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("FLWR_HOME") == home}
            if not left:
                return
            for process in left - asked:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            asked |= left
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", choices=["matched", "usual"], required=True)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    job, out = args.job.resolve(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("clock.json", "adapter.npz"):
        (out / name).unlink(missing_ok=True)
    clients = json.loads((job / "job.json").read_text())["clients"]
    federation = f"num-supernodes={len(clients)} init-args-num-cpus=2"
    if args.mode == "matched":
        federation += " client-resources-num-cpus=1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is below is stopped too
    with TemporaryDirectory(prefix="flower-") as home, (out / "flower.log").open("w") as log:
        try:
            # --stream: it returns when the run has finished, but with 0 even if that failed
            run = subprocess.run(
                [BIN / "flwr", "run", HERE / "flower_app", "--stream", "--federation-config", federation, "--run-config",
                 f'job="{job}" out="{out}" mode="{args.mode}" bf16={str(args.bf16).lower()}'],
                env=environment(home), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        finally:
            stop(home)
        superlink = Path(home, "local-superlink", "superlink.log")
        if superlink.exists():
            shutil.copy(superlink, out)
    if run.returncode or not (out / "clock.json").exists():
        sys.exit("\n".join((out / "flower.log").read_text().splitlines()[-40:]) + f"\nflower.py: failed, see {out}")


if __name__ == "__main__":
    main()
