"""docs/results.md from what lies in benchmarks/results: the comparison of all methods, and the papers' claims at our scale;
and what each method's page says of its own in that comparison.

python benchmarks/results_page.py          # writes the pages
"""

from pathlib import Path
from typing import Any

import yaml

from fedrank.studies import record, tables
from fedrank.studies.claims import SCORES
from fedrank.units import duration, factor, within

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
BEGIN, END = "<!-- of all methods, by benchmarks/results_page.py -->\n\n", "\n\n<!-- until here -->"
COSTS = {"bytes": "bytes", "clock_seconds": "device time", "device_joules": "energy", "peak_memory_bytes": "memory"}
REPRODUCED = ("fedara", "legend", "fed_plora", "pf2lora")


def pages() -> dict[Path, str]:
    """All that is to be written."""
    found = read("methods")
    written = {DOCS / "results.md": page(found)}
    if found is not None and not unfinished(found) and found["fair"]["verdict"]:
        for arm in found["study"]["arms"]:
            path = DOCS / "methods" / f"{arm}.md"
            before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
            written[path] = f"{before}{BEGIN}{own(found, arm)}{END}{rest.partition(END)[2]}"
    return written


def own(found: dict[str, Any], arm: str) -> str:
    """What an arm came to beside all others."""
    (one,) = found["results"].values()
    said = "[Beside all other methods](../results.md#all-methods-on-one-set) on clinc150, five seeds, rates from one search: "
    said += f"personal accuracy {tables.told('personal_accuracy', one['arms'][arm]['personal_accuracy'])}"
    if arm not in one["differences"]:
        return f"{said}; the others are held against it."
    head, *rows = tables.differences(one, "FedAvg", fair=True)
    (gap,) = (row[head.index(tables.NAMES["personal_accuracy"])] for row in rows if row[0] == arm)
    costs = ((of, one["differences"][arm].get(name)) for name, of in COSTS.items())
    factors = ", ".join(f"{factor(cost['mean'])} times its {of}" for of, cost in costs if cost)
    return f"{said}; points above FedAvg {gap} after correction; {factors}."


def page(methods: dict[str, Any] | None) -> str:
    found = {name: read(f"reproduce/{name}") for name in REPRODUCED}
    said = yaml.safe_load((HERE / "whys.yaml").read_text())
    parts = [
        "<!-- Written by benchmarks/results_page.py from benchmarks/results; change those. -->",
        "# Results",
        "Everything here was played on two cores without a GPU, from plans that were written down before; the "
        "numbers of every run are in `benchmarks/results/`. What is ± is a standard deviation over five seeds. Studies of "
        "other questions: [performance](performance.md), [hostile clients](hostile.md), [privacy](privacy.md), "
        "[generation](generation.md).",
        "To play one again, have the public sets in folders of their names, each with `train.*`, `test.*`, perhaps `dev.*`, and "
        "`labels.txt` ([data](data.md#files)), and `FEDRANK_DATA` name the folder of these; the commands are below.",
        "## All methods on one set",
        *study(methods, "methods", said),
        "## The papers' claims at our scale",
        "What four papers say, asked of MiniLM and public sets. Three of the papers' bodies were not available "
        "(reconstructed), and none of their settings is ours: a claim that is not confirmed here may well hold there. A claim "
        "is confirmed or refuted in a setting where the whole 95 % interval of the paired difference over five seeds lies on that side. "
        "Of all settings together it is confirmed or refuted where it is so in each; mixed, where it is each in some; partly or "
        "refuted in part, where it is so in some and neither in the others; less than claimed, where the interval lies between what "
        "would confirm and what would refute it; else it is not shown. These intervals are not corrected for how many claims there "
        "are, as the p values in the tables below are for the number of arms: a claim may be confirmed where a table does not tell its "
        "arms apart. Nor do they hold how lucky an arm's tuning was, which is done once, with one seed.",
        "\n".join(claims(found, said["claims"])),
        *(part for name in REPRODUCED
          for part in (f"### {title(name, found[name])}", *study(found[name], f"reproduce/{name}", said))),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def read(name: str) -> dict[str, Any] | None:
    folder = HERE / "results" / name
    return record.read(folder) if (folder / record.FILE).exists() else None


def title(name: str, found: dict[str, Any] | None) -> str:
    return found["study"]["title"] if found else name


def unfinished(found: dict[str, Any]) -> int:
    """How many runs are still to be played."""
    asked = found["study"]
    all_ = len(asked["settings"]) * len(asked["arms"]) * len(asked["seeds"])
    return all_ - sum(len(seeds) for arms in found["runs"].values() for seeds in arms.values())


def study(found: dict[str, Any] | None, name: str, said: dict[str, Any]) -> list[str]:
    """A study's plan, tables, conclusions and remarks."""
    command = f"`fedrank compare benchmarks/{name}.yaml --out benchmarks/results/{name} --runs runs/{Path(name).name}`"
    if found is None:
        return [f"Not played yet: {command}."]
    if left := unfinished(found):
        return [f"Not finished: {left} runs are still to be played by {command}."]
    spent = sum(run["seconds"] for arms in found["runs"].values() for seeds in arms.values() for run in seeds.values())
    trials = sum(one["seconds"] for arms in found["tuning"].values() for arm in arms.values() for one in arm["trials"])
    chosen = "; ".join(
        f"{setting}: " * (len(found["tuning"]) > 1)
        + ", ".join(f"{arm} {_knobs(one['best'])}" for arm, one in arms.items())
        for setting, arms in found["tuning"].items()
    )
    forecast = found["forecast"]
    about = [f"- {key.replace('_', ' ')}: {words}" for key, words in found["study"]["about"].items()]
    return [
        "\n".join(about),
        tables.markdown(found).strip(),
        *said["remarks"].get(name.removeprefix("reproduce/"), []),
        f"Found by tuning on the validation share: {chosen}.",
        f"{command}: {duration(trials)} of trials and {duration(spent)} of runs, on one core each; that is "
        "wall time, on a machine that did other work beside, and with some pauses. The forecast at its start was "
        f"{duration(3600 * forecast['hours'])} with {forecast['workers']} at once.",
    ]


def _knobs(best: dict[str, Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in best.values())


def claims(found: dict[str, dict[str, Any] | None], whys: dict[str, dict[str, str]]) -> list[str]:
    """A table of all claims: the paper's words, ours, the verdict, and why."""
    lines = ["| method | claim | the paper | ours, with 95 % intervals | verdict | why |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        if one is None or unfinished(one):
            lines.append(f"| {title(name, one)} | | | not finished | | |")
            continue
        for key, claim in one["study"]["claims"].items():
            if not one["fair"]["verdict"]:
                lines.append(
                    f"| {title(name, one)} | {claim['claim']} | {claim['paper']} | | not a fair comparison | |"
                )
                continue
            judged = one["claims"][key]
            ours = "; ".join(f"{setting} {_ours(claim['of'], said)}" for setting, said in judged["settings"].items())
            why = whys.get(name, {}).get(key, "")
            lines.append(
                f"| {title(name, one)} | {claim['claim']} | {claim['paper']} | {ours} | **{judged['verdict']}** | {why} |"
            )
    return lines


def _ours(of: str, said: dict[str, Any]) -> str:
    return within(said["mean"], said["interval"], of in SCORES) if "mean" in said else f"({said['why']})"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
