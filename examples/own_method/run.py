"""A method that no package knows, beside one that fedrank has: bytes and accuracy."""

from grow import Grow

import fedrank

CONFIG = {
    "model": {"name": "tiny-encoder"},
    "data": {"name": "docstrings", "train_limit": 240, "test_limit": 100},
    "clients": {"count": 6},
    "rounds": {"count": 6, "cohort": 3, "evaluate_every": 6},
}

for name, method in (("fedavg", None), ("grow", Grow())):
    run = fedrank.run(CONFIG, method=method, out=f"runs/{name}")
    sent = [row["adapter_bytes_up"] for row in run.rounds]
    print(f"{name:7} accuracy {run.summary['accuracy']:.1%}, adapter bytes up by round {sent}")
