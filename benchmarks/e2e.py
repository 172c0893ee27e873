"""The E2E descriptions as a federation reads them: each restaurant's are a client's, the official test is the global one.

    python benchmarks/e2e.py DATA/e2e_nlg FOLDER --prompts 150         # for the model of pretrain.py
    python benchmarks/e2e.py DATA/e2e_nlg FOLDER --fits MODELS/tiny-llama-260k

With --fits, rows longer than that model's context are left out. With --prompts, the test has so many of its prompts, drawn,
with all of their references.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import transformers


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("data", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--fits", type=Path, help="a model's folder")
    words.add_argument("--prompts", type=int, help="of the test; all where not given")
    given = words.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.fits) if given.fits else None
    given.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with gzip.open(given.data / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for row in rows:
            attributes = dict(part.split(" : ", 1) for part in row["prompt"].split(" | "))
            row["client"] = attributes["name"]
        whole = len(rows)
        if tokenizer is not None:
            most = tokenizer.model_max_length
            rows = [row for row in rows if len(tokenizer(f"{row['prompt']}\n{row['completion']}")["input_ids"]) < most]
        if split == "test" and given.prompts is not None:
            prompts = sorted({row["prompt"] for row in rows})
            drawn = random.Random(0).sample(prompts, given.prompts)
            rows = [row for row in rows if row["prompt"] in drawn]
        (given.out / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        print(f"{split}: {len(rows)} of {whole} rows, {len({row['client'] for row in rows})} restaurants")


if __name__ == "__main__":
    main()
