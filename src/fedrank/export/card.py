"""README.md of an export: a model card in the form that the Hugging Face hub reads, made from the manifest alone."""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from fedrank.config import TINY_MODELS
from fedrank.told import CLIENTS, UNPROTECTED

MARKS = "\\`*_{}[]<>#|~&@:$!^="
HERE = "PATH OF THIS FOLDER"
NAMED = 40  # labels that are listed
WEIGHTED = " on clients' own test rows, weighted by rows"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
PAIRS = '[{"text": "a text", "text_pair": "its pair"}, {"text": "another", "text_pair": "its own"}]'
SCORES = {
    "accuracy": "accuracy", "loss": "loss", "personal_accuracy": "mean accuracy of clients on their own test rows",
    "personal_majority": "the same, of each client's most frequent class", "personal_clients": "clients so scored",
    "personal_worst_decile": "mean accuracy of the tenth of clients served worst", "rows": "test rows",
    "majority": "accuracy of its most frequent class",
}  # fmt: skip


def model_card(found: Mapping[str, Any]) -> str:
    """The card of a manifest. Names, labels and settings are the user's: none can break YAML or Markdown."""
    run, model = found["run"], found["model"]
    whose = "" if found["client"] is None else f" for client {plain(found['client'])}"
    title = "Model" if found["kind"] == "model" else "Adapter"
    parts = [
        f"---\n{_front(found)}---\n",
        f"# {title} trained with fedrank, after round {run['round']}{whose}\n",
        *([f"This is {found['limit']}.\n"] if found["limit"] else []),
        f"Base model: {plain(model['name'])}" + ("" if model["published"] else ", by its last name") + ".\n",
        "## Load\n", *_load(found), "## Data\n", *_data(found), "## Method\n", *_method(found),
        "## Rounds and bytes\n", *_rounds(found), "## Scores\n", *_scores(found),
        "## Privacy\n", *_privacy(found), "## Limits\n", *_limits(found),
        "## Provenance\n",
        "provenance.json has the config, the hashes of data, base model and state, and of every file here; "
        f"`fedrank verify` compares them. Written by fedrank {plain(found['fedrank'])}.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def plain(value: Any, most: int = 120) -> str:
    """As Markdown shows it to the letter, anywhere but at the start of a line: on one line, no mark or link of it meant."""
    if isinstance(value, int | float):
        return str(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return re.sub(r"(?i)(www)\.", r"\1\\.", "".join(f"\\{c}" if c in MARKS else c for c in text))


def _front(found: Mapping[str, Any]) -> str:
    """The metadata. YAML quotes what needs it; line breaks become spaces, so that no line of it ends the block."""
    model, scores, merged = found["model"], found["scores"] or {}, found["kind"] == "model"
    kind = "text-generation" if model["task"] == "generate" else "text-classification"
    told: dict[str, Any] = {"library_name": "transformers" if merged else "peft", "pipeline_tag": kind}
    if model["published"]:
        told |= {"base_model": model["source"], "base_model_relation": "finetune" if merged else "adapter"}
    told["tags"] = ["fedrank", "federated-learning", "lora", str(found["method"]["name"])]
    metrics = [
        {"type": _type(name, found), "value": scores[name], "name": _title(name, found)}
        for name in ("accuracy", "loss", "personal_accuracy", "personal_worst_decile")
        if scores.get(name) is not None
    ]
    if metrics and found["client"] is None:  # a client's few rows are no data set that others could score on
        data, split = _line(found["data"]["name"]), found["data"]["test_rows_are"]
        dataset = {"name": data, "type": data} | ({} if split == CLIENTS else {"split": split})
        result = {"task": {"type": kind}, "dataset": dataset, "metrics": metrics}
        named = f"{_line(model['name'])}, {_line(found['method']['name'])}{_again(found)}"
        told["model-index"] = [{"name": named, "results": [result]}]
    return str(yaml.safe_dump(told, sort_keys=False))


def _type(score: str, found: Mapping[str, Any]) -> str:
    """A metric's name for a program: that of the hub only where it is of rows that all have."""
    return f"clients_{score}" if score in ("accuracy", "loss") and found["data"]["test_rows_are"] == CLIENTS else score


def _title(score: str, found: Mapping[str, Any]) -> str:
    """What a score is; accuracies are of rows, or of the completions' tokens."""
    of_tokens = found["model"]["task"] == "generate" and score.endswith(("accuracy", "worst_decile"))
    title = SCORES.get(score, score) + (", of tokens" if of_tokens else "")
    return title + WEIGHTED if found["client"] is None and _type(score, found) != score else title


def _again(found: Mapping[str, Any]) -> str:
    return " (reconstructed)" if found["method"]["reconstructed"] else ""


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _table(rows: Mapping[str, Any]) -> str:
    body = "".join(f"| {plain(name)} | {plain(value)} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{body}"


def _load(found: Mapping[str, Any]) -> list[str]:
    model, labels, generates = found["model"], found["labels"], found["model"]["task"] == "generate"
    if found["kind"] == "model":
        kind = "text-generation" if generates else "text-classification"
        own = not generates and model["pooling"] == "mean"
        trust = ", trust_remote_code=True" if own else ""
        two = PAIRS if found["data"]["pairs"] else '["a text", "another"]'
        call = "" if generates else f"\nprint(ask({two}, truncation=True))"
        code = [
            f'```python\nfrom transformers import pipeline\n\nask = pipeline("{kind}", model="{HERE}"{trust}){call}\n```\n'
        ]
        if own:
            code.append(
                "The class of the model is in pooled.py of this folder: a linear head on the mean over tokens. "
                "It needs transformers 5 or newer.\n"
            )
        if not generates:
            code.append("truncation=True cuts texts at the length of training.\n")
        return code
    if model["source"] in TINY_MODELS:
        return ["The base is drawn from the run's seed and has no files: `fedrank export --merged` writes it whole.\n"]
    pooled = not generates and model["pooling"] == "mean"
    base = repr(model["source"]) if model["published"] else "PeftConfig.from_pretrained(folder).base_model_name_or_path"
    auto = "AutoModelForCausalLM" if generates else "AutoModel" if pooled else "AutoModelForSequenceClassification"
    count = "" if generates or pooled else f", num_labels={len(labels)}"
    lines = [] if generates else ["import json", "", "import torch"]
    lines += [f"from peft import {'' if model['published'] else 'PeftConfig, '}PeftModel"]
    lines += ["from safetensors.torch import load_file"] if pooled else []
    lines += [
        f"from transformers import {auto}, AutoTokenizer", "", f'folder = "{HERE}"', f"base = {base}",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = PeftModel.from_pretrained({auto}.from_pretrained(base{count}), folder).eval()",
    ]  # fmt: skip
    if not generates:
        most = found["config"].get("local", {}).get("max_length")
        cut = "" if most is None else f", max_length={most}"
        beside = ', ["its pair", "its own"]' if found["data"]["pairs"] else ""
        lines += [
            f'batch = tokenizer(["a text", "another"]{beside}, padding=True, truncation=True{cut}, return_tensors="pt")',
            "with torch.inference_mode():",
        ]
        lines += [
            '    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()',
            'head = load_file(f"{folder}/head.safetensors")',
            'logits = (hidden * mask).sum(1) / mask.sum(1) @ head["head.weight"].T + head["head.bias"]',
        ] if pooled else ["    logits = model(**batch).logits"]  # fmt: skip
        lines += [
            'with open(f"{folder}/provenance.json") as file:',
            '    labels = json.load(file)["labels"]',
            "print([labels[at] for at in logits.argmax(-1)])",
        ]
    text = ["```python\n" + "\n".join(lines) + "\n```\n"]
    return [*text, *_vllm(found)] if generates else text


def _vllm(found: Mapping[str, Any]) -> list[str]:
    rank = next((rank for rank in RANKS if rank >= found["adapter"]["rank"]), None)
    if rank is None:
        return [f"vLLM takes adapters of rank {RANKS[-1]} at most: `fedrank export --merged` writes a model for it.\n"]
    base = found["model"]["source"] if found["model"]["published"] else "BASE"
    served = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules 'adapter={HERE}'"
    return ["The folder is in the form of adapters that vLLM loads:\n", f"```\n{served}\n```\n"]


def _data(found: Mapping[str, Any]) -> list[str]:
    data, labels = found["data"], found["labels"]
    rows = {"name": data["name"]}
    if found["model"]["task"] == "generate":
        form = (found["config"].get("data") or {}).get("instructions", {})
        rows |= {"prompts": form.get("template"), "between prompt and completion": json.dumps(form.get("separator"))}
    for part in data["rows"]:
        rows[f"{part} rows"] = _known(data["rows"][part])
        rows[f"sha256 of the {part} rows"] = _known(data["sha256"][part])
    if labels:
        more = f", and {len(labels) - NAMED} more in provenance.json" if len(labels) > NAMED else ""
        rows["classes"] = len(labels)
        return [_table(rows), f"Classes: {', '.join(plain(label) for label in labels[:NAMED])}{more}.\n"]
    return [_table(rows)]


def _known(value: Any) -> Any:
    return "not known" if value is None else value


def _method(found: Mapping[str, Any]) -> list[str]:
    method, chosen = found["method"], found["config"].get("method", {})
    local, adapter = found["config"].get("local", {}), found["config"].get("adapter", {})
    name = plain(method["name"]) + _again(found)
    url = str(method.get("url"))
    url = f"<{url}>" if re.fullmatch(r"https://[\w./-]+", url) else plain(url)
    paper = f", after “{plain(method['paper'])}”, {url}" if method.get("paper") else ""
    knobs = {key: value for key, value in chosen.items() if key != "name"}
    knobs |= {
        f"local.{key}": local[key] for key in ("lr", "epochs", "steps", "batch_size", "max_length") if key in local
    }
    knobs |= {f"adapter.{key}": adapter[key] for key in ("rank", "alpha", "targets", "head") if key in adapter}
    there = found["adapter"]
    knobs |= {"components in this adapter": there["components"], "modules with components": there["modules"],
              "largest rank": there["rank"], "scale": there["scale"]}  # fmt: skip
    text = [f"Trained by {name}{paper}.\n"]
    if method["reconstructed"]:
        text.append(
            "The body of that paper was not available: what was trained follows its abstract, public accounts and a "
            "specification of fedrank's own; no number here is the paper's.\n"
        )
    return [*text, _table(knobs)]


def _rounds(found: Mapping[str, Any]) -> list[str]:
    run, config, bytes_ = found["run"], found["config"], found["bytes"]["all_rounds"]
    planned = run["rounds"]
    rows = {
        "rounds": run["round"] if planned in (None, run["round"]) else f"{run['round']}, of {planned} that are planned",
        "clients": "sites, which come and go" if run["clients"] is None else run["clients"], "clients a round": config.get("rounds", {}).get("cohort"),
        "seed": run["seed"],
    } | {
        f"{part} bytes {way}, all rounds": "not told" if (value := bytes_[f"{key}bytes_{way}"]) is None else f"{value:,}"
        for key, part in (("", "all"), ("adapter_", "adapter"), ("head_", "head"))
        for way in ("up", "down")
    }  # fmt: skip
    return [_table(rows), *([f"{began}\n"] if (began := _imported(found)) else [])]


def _imported(found: Mapping[str, Any]) -> str:
    """What it started from beside its base model; empty where that is all."""
    if (start := found["run"]["imported"]) is None:
        return ""
    base = "" if start["base"] is None else f" of a base named {plain(start['base'])}"
    return f"The run started from an imported adapter{base}, sha256 {plain(start['sha256'])}."


def _scores(found: Mapping[str, Any]) -> list[str]:
    scores = found["scores"]
    if scores is None:
        what = "this client was" if found["client"] is not None else "this round was"
        return [f"None: {what} not evaluated.\n"]
    where = "own test rows" if found["client"] is not None else f"{found['data']['test_rows_are']} rows"
    told = {_title(name, found): value for name, value in scores.items() if value is not None}
    rounded = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in told.items()}
    return [f"On the {plain(where)}:\n", _table(rounded)]


def _privacy(found: Mapping[str, Any]) -> list[str]:
    privacy = found["privacy"]
    if privacy is None:
        return ["No differential privacy: what was trained may tell of its clients' rows.\n"]
    bound = "no bound" if privacy["epsilon"] is None else f"epsilon {privacy['epsilon']:.4g}"
    if found["client"] is not None:
        bound = f"{bound} for the common parts, none for the client's own"
    began = _imported(found)
    return [
        f"Client-level differential privacy, {plain(privacy['kind'])}: {plain(bound)} at delta {privacy['delta']:g}.\n",
        _table({name: privacy[name] for name in ("clip", "noise", "votes_noise") if privacy[name] is not None}),
        *([f"{began} {UNPROTECTED}\n"] if began else []),
    ]


def _limits(found: Mapping[str, Any]) -> list[str]:
    lines = ["Licences of the base model and of the data hold; they are not known here."]
    if found["model"]["task"] == "classify":
        lines.append("Texts beyond the length of training are cut, and every text gets one of the classes above.")
    if (found["config"].get("model") or {}).get("quantise", "none") != "none":
        lines.append(f"Trained on a base held in {plain(found['config']['model']['quantise'])}: on another it computes a little otherwise.")  # fmt: skip
    if found["kind"] == "model":
        lines.append("The increment was added in float64 and rounded once, to the type that the weights are held in.")
    return ["".join(f"- {line}\n" for line in lines)]
