"""A CSV of one's own, from the file to the scores: whose topics are told apart, and by whom."""

import csv
import json
import random
from pathlib import Path

import fedrank

TOPICS = {
    "billing": ["invoice", "refund", "charged", "price"],
    "delivery": ["parcel", "courier", "late", "address"],
    "login": ["password", "account", "locked", "code"],
}
ROWS = Path("messages.csv")


def write(path: Path, count: int) -> None:
    """Messages to a shop; put your own file in the place of this one."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for _ in range(count):
            label = draw.choice(list(TOPICS))
            table.writerow([" ".join(draw.choices([*TOPICS[label], "the", "my", "is", "please"], k=8)), label])


if not ROWS.exists():
    write(ROWS, 240)
run = fedrank.run("own_data.yaml", out="runs/own_data")
held = json.loads((run.path / "data.json").read_text())
print(f"{held['rows']['train']} rows to train on, {held['rows']['test']} to test")
print(f"accuracy {run.summary['accuracy']:.1%}, the majority class {run.summary['majority']:.1%}")
print(f"adapter for PEFT in {run.path / 'adapter'}")
