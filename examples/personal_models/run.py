"""A model for each client: trained together, scored each on rows of its own, exported one by one."""

import json
from pathlib import Path

import fedrank
from fedrank.export import export

run = fedrank.run("personal_models.yaml", out="runs/personal")
for line in (run.path / "personal.jsonl").read_text().splitlines():
    score = json.loads(line)
    adapter = export(run.path, Path("adapters") / score["client"], client=score["client"])
    print(
        f"client {score['client']}: {score['accuracy']:.1%} on its own rows ({score['majority']:.1%} majority), {adapter}"
    )
