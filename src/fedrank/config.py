"""The config of a run: YAML and dotted overrides, checked; an unknown key is answered with the nearest known one."""

import copy
import difflib
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A config that cannot be used: which key, what is wrong with it, what would be right."""


TINY_MODELS = ("tiny-encoder", "tiny-decoder")
OWN_MODELS = (*TINY_MODELS, "minilm")


class Model(BaseModel, extra="forbid", frozen=True):
    """name: a hub name, a local folder, or tiny-encoder, tiny-decoder, minilm.

    dtype: of the frozen weights in memory; auto: bfloat16 where the files hold that, else float32. quantise: the linear
    layers' weights in memory, to 8 bits (torchao on a CPU, else bitsandbytes), or to 4-bit NormalFloat (bitsandbytes).
    """

    name: str = "tiny-encoder"
    pooling: Literal["auto", "cls", "mean"] = "auto"
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantise: Literal["none", "int8", "nf4"] = "none"


class Columns(BaseModel, extra="forbid", frozen=True):
    text: str = "text"
    text_b: str = "text_b"
    label: str = "label"
    client: str = "client"
    prompt: str = "prompt"
    completion: str = "completion"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    messages: str = "messages"
    choices: str = "choices"
    answer: str = "answer"


class Instructions(BaseModel, extra="forbid", frozen=True):
    """How rows of task generate become prompts. format: by their columns where auto.

    template: chat, the tokenizer's own; plain, the text as it is (alpaca: under its headings); auto: chat for messages.
    separator: between a plain prompt and its completion.
    """

    format: Literal["auto", "completion", "alpaca", "messages", "choices"] = "auto"
    template: Literal["auto", "plain", "chat"] = "auto"
    separator: str = ""

    @model_validator(mode="after")
    def _chats(self) -> "Instructions":
        if (self.format, self.template) == ("messages", "plain"):
            raise ValueError("template: messages are written by the tokenizer's chat template; use chat or auto")
        return self


class Partition(BaseModel, extra="forbid", frozen=True):
    """alpha: of the Dirichlet draw (dirichlet, quantity). s: the sorted share (label_sorted)."""

    kind: Literal["iid", "dirichlet", "pathological", "label_sorted", "quantity", "natural"] = "dirichlet"
    alpha: Above0 = 0.5
    classes_per_client: Positive = 2
    s: Share = 0.5
    min_rows: Positive = 2


class Data(BaseModel, extra="forbid", frozen=True):
    """name: "docstrings" (built in) or a Hugging Face dataset; or path: a file or a folder with train and test.

    labels: the class names, where clients are elsewhere and the server has no rows that name them. split: what a run is scored on. validation is for tuning: the dev split, or a tenth of train where there is none.
    """

    name: str | None = None
    path: str | None = None
    labels: tuple[str, ...] = ()
    train_limit: Positive | None = None
    test_limit: Positive | None = None
    split: Literal["test", "validation"] = "test"
    columns: Columns = Columns()
    instructions: Instructions = Instructions()
    partition: Partition = Partition()


class Clients(BaseModel, extra="forbid", frozen=True):
    """count: how many clients share the data (a natural partition has its own number); of a private run on Flower: how many
    sites it is planned for, of which none, or some, may be there."""

    count: Positive = 20


class Rounds(BaseModel, extra="forbid", frozen=True):
    """cohort: clients per round. evaluate_every: rounds between evaluations.

    personal: how many clients are scored on their own rows, of each evaluated cohort, and of all at the end.
    deadline: seconds of a round, after which a client is late: on the simulated clock of modelled devices, or on the wall
    where clients are elsewhere. minimum: of fewer updates a round is not merged. exactness: how far clients start from
    the global function, and merges end from theirs, in the ledger.
    """

    count: Positive = 20
    cohort: Positive = 5
    evaluate_every: Positive = 5
    personal: Annotated[int, Field(ge=0)] | None = None
    deadline: Above0 | None = None
    minimum: Positive = 1
    exactness: bool = False

    @model_validator(mode="after")
    def _reachable(self) -> "Rounds":
        if self.minimum > self.cohort:
            raise ValueError(
                f"rounds.minimum={self.minimum}: a round asks {self.cohort} clients (rounds.cohort), so it is never reached"
            )
        return self


class Local(BaseModel, extra="forbid", frozen=True):
    """Local training with AdamW. steps, where given, is the number of optimizer steps, whatever `epochs` says.

    lr: the method's own default where null. clip: largest gradient norm, null for none.
    dropout: of the base model in training. checkpoint: gradient checkpointing, which keeps of every block that learns only
    what enters it, and computes the rest again on the way back.
    """

    epochs: Positive = 1
    steps: Positive | None = None
    lr: Above0 | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip: Above0 | None = 1.0
    batch_size: Positive = 16
    max_length: Positive = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    checkpoint: bool = False


class AdapterSettings(BaseModel, extra="forbid", frozen=True):
    """rank at birth; alpha: 2 * rank where null; targets: "all" linear layers of the blocks, or the ends of names.

    head: the classification head learns and travels, stays frozen, or is each client's own.
    """

    rank: Positive = 8
    alpha: Above0 | None = None
    targets: Literal["all"] | tuple[str, ...] = "all"
    head: Literal["train", "frozen", "own"] = "train"

    @field_validator("targets")
    @classmethod
    def _some(cls, given: Any) -> Any:
        if not given:
            raise ValueError('must be "all", or the ends of names, such as [query, value]')
        return given


class FleetSettings(BaseModel, extra="forbid", frozen=True):
    """The clients' devices. devices: kind -> share or count, of which only the proportions matter; or csv: a file of
    one's own devices (its columns: `fedrank.fleet.read`).

    jitter: sigma of the lognormal factors on each client's compute time and link rates, new in every round.
    redraw: rounds between new draws of the devices' power modes; 0: drawn once. links: one factor on all link rates.
    ranks: kind -> the largest LoRA rank, in the place of the preset's.
    """

    devices: dict[str, Above0] = {}
    csv: str | None = None
    jitter: Annotated[float, Field(ge=0, le=3)] = 0.0
    redraw: Annotated[int, Field(ge=0)] = 0
    links: Above0 = 1.0
    ranks: dict[str, Positive] = {}

    @model_validator(mode="after")
    def _one_source(self) -> "FleetSettings":
        if bool(self.devices) == (self.csv is not None):
            raise ValueError("give one of devices (kind: share) and csv")
        if self.csv is not None and self.redraw:
            raise ValueError("redraw draws the presets' power modes, and devices of a csv have none; leave it out")
        return self


class AttackSettings(BaseModel, extra="forbid", frozen=True):
    """Simulated clients that train and then send something else. share: of all clients, drawn once by address.

    kind: of what would have travelled, the change to what was received is sent with its sign turned (sign_flip) or as it
    is (scale), times factor.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    kind: Literal["sign_flip", "scale"]
    factor: Above0 = 1.0

    @model_validator(mode="after")
    def _attacks(self) -> "AttackSettings":
        if (self.kind, self.factor) == ("scale", 1.0):
            raise ValueError("factor: scaled by 1 an update is honest; give another one, such as 100")
        return self


class EngineSettings(BaseModel, extra="forbid", frozen=True):
    """kind: local, every client on this machine; flower, each on a SuperNode of its own; flower-simulation, on Flower's
    simulation runtime. superlink: host:port of the SuperLink, in a deployment the port after its gate's;
    root_certificate: a file with the CA's that signed its certificate; insecure: plain text, without TLS.
    threads: of each worker. workers: processes that share the work; null for as many as fill this machine's cores.
    failure_rate: share of requests that get no answer, drawn by address. attack: what hostile clients send, for research.

    stack: clients that are trained together, over one pass of the frozen model; null: by the length of the rows, the cohort
    and the workers.
    compute: the type of activations, of products with frozen weights, and of the adapter's copy in them, so that its
    gradients are rounded to it; adapters and the optimizer are float32 in any case. products: whose library computes
    these. auto: what is fastest when it is tried at the start.
    prefix_bytes: of hidden states below the blocks that learn, kept on disk; where those of all rows would take more,
    they are computed anew for every batch.
    offload: what the optimizer reads and writes (the adapter in float32, its gradient and moments) stays in the memory of
    the host while the model is on a GPU.
    fleet: the clients' devices, on whose simulated clock rounds are played; by default one nominal kind.
    timing: that clock runs by the model of `fedrank.cost`, or by the wall time that training takes here.
    """

    kind: Literal["local", "flower", "flower-simulation"] = "local"
    superlink: str = "127.0.0.1:8000"
    root_certificate: str | None = None
    insecure: bool = False
    threads: Positive = 1
    workers: Positive | None = None
    stack: Positive | None = None
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    products: Literal["auto", "torch", "onednn"] = "auto"
    prefix_bytes: Annotated[int, Field(ge=0)] = 4_000_000_000
    offload: bool = False
    failure_rate: Share = 0.0
    attack: AttackSettings | None = None
    fleet: FleetSettings | None = None
    timing: Literal["modelled", "measured"] = "modelled"

    @model_validator(mode="after")
    def _own_time(self) -> "EngineSettings":
        if self.timing == "measured" and (self.stack or 1) > 1:
            raise ValueError(
                "stack: the time of clients that are trained together is nobody's own; with timing: measured, 1"
            )
        return self

    @model_validator(mode="after")
    def _carried(self) -> "EngineSettings":
        if self.kind == "local":
            return self
        if (self.stack or 1) > 1:
            raise ValueError(f"engine.stack={self.stack}: with engine.kind={self.kind} each client trains alone; 1")
        if self.kind == "flower":
            for key, value in (("failure_rate", self.failure_rate), ("fleet", self.fleet), ("attack", self.attack)):
                if value:
                    raise ValueError(f"engine.{key}: with engine.kind=flower it is as the sites are; leave it out")
            if self.insecure and self.root_certificate is not None:
                raise ValueError("engine.insecure: plain text has no certificate; leave engine.root_certificate out")
        return self


class WireSettings(BaseModel, extra="forbid", frozen=True):
    dtype: Literal["f64", "f32", "f16", "bf16", "int8"] = "f32"


class ServerSettings(BaseModel, extra="forbid", frozen=True):
    """The optimizer that takes a round's mean change as its gradient, for methods that average.

    lr: where it is not given, 1 for fedavgm (Hsu et al.) and 0.01 for the adaptive ones, whose other defaults
    are Reddi et al.'s.

    aggregation: what methods that average take for the mean. hostile: how many updates of a round may be hostile;
    trimmed_mean cuts so many at each end, krum and multi_krum are made for so many.
    max_norm, max_norm_ratio: an update is refused where its change is longer, or longer than so many times the median of
    the round's. max_examples: no client counts for more, in any weight.
    """

    optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    lr: Above0 = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Above0 = 1e-3
    aggregation: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"] = "mean"
    hostile: Positive | None = None
    max_norm: Above0 | None = None
    max_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    max_examples: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, raw: Any) -> Any:
        adaptive = isinstance(raw, dict) and raw.get("optimizer") in ("fedadam", "fedyogi")
        return {"lr": 0.01, **raw} if adaptive else raw

    @model_validator(mode="after")
    def _assumed(self) -> "ServerSettings":
        if (self.hostile is None) == (self.aggregation in ("trimmed_mean", "krum", "multi_krum")):
            which = (
                "needs to know how many updates of a round may be hostile" if self.hostile is None else "asks for none"
            )
            raise ValueError(f"hostile: aggregation={self.aggregation} {which}; trimmed_mean, krum and multi_krum do")
        return self


class PrivacySettings(BaseModel, extra="forbid", frozen=True):
    """Client-level differential privacy. kind: the server clips what arrives and noises the sum (central), or each client
    its own update before anything leaves it (local).

    clip: the largest L2 norm of all that one client changes in a round, factors and head as one vector. noise: the
    standard deviation on every number of the sum (or of the update), as a multiple of clip; 0 clips only and protects
    nobody. votes_noise: the same on clients' votes, as a multiple of their norm. delta: for which epsilon is told.
    """

    kind: Literal["none", "central", "local"] = "none"
    clip: Above0 | None = None
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    votes_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "PrivacySettings":
        given = {name: value for name, value in self if name != "kind" and value is not None}
        if self.kind == "none" and given:
            raise ValueError(f"{', '.join(given)}: with kind none nothing is clipped or noised; central or local")
        if self.kind != "none" and (missing := [name for name in ("clip", "noise", "delta") if name not in given]):
            raise ValueError(f"kind={self.kind} needs {', '.join(missing)} too")
        return self


class Generation(BaseModel, extra="forbid", frozen=True):
    """Texts that task generate writes and scores (exact match, BLEU, ROUGE-L): never, at the end, or at every evaluation.

    prompts: at most so many different ones, drawn, of the global test and of each client; null for all. max_tokens: of
    what is written. temperature: 0 takes the likeliest token; above, it is drawn: of the top_k likeliest (0: of all) that
    make up top_p.
    """

    when: Literal["never", "end", "always"] = "never"
    prompts: Positive | None = None
    max_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 32


class Observe(BaseModel, extra="forbid", frozen=True):
    """Who else is told of a run; nothing here changes a bit of it.

    log: JSON lines, added to a file or to "stderr". prometheus: the port, of this machine alone, or host:port, at which
    metrics are served. tensorboard: true for a folder in the run directory, or a folder in which each run has its own.
    mlflow: a tracking server's URL, or sqlite:///file; mlflow_experiment: by name; mlflow_adapter: the exported adapter
    goes there, too.
    """

    log: Word | None = None
    prometheus: str | None = None
    tensorboard: bool | Word = False
    mlflow: Word | None = None
    mlflow_experiment: Word = "fedrank"
    mlflow_adapter: bool = False

    @field_validator("prometheus", mode="before")
    @classmethod
    def _address(cls, given: Any) -> str | None:
        if given is None:
            return None
        host, colon, port = str(given).rpartition(":")
        if not port.isdecimal() or not 0 < int(port) < 1 << 16 or bool(host) != bool(colon):
            raise ValueError("must be a port, such as 9464, or host:port, such as 0.0.0.0:9464")
        return f"{host or '127.0.0.1'}:{port}"

    @field_validator("tensorboard", mode="before")
    @classmethod
    def _folder(cls, given: Any) -> Any:
        if not isinstance(given, bool | str):
            raise ValueError("must be true, false or a folder")
        return given

    @field_validator("log", "tensorboard")
    @classmethod
    def _path(cls, given: Any) -> Any:
        return _absolute(given) if isinstance(given, str) and given != "stderr" else given

    @field_validator("mlflow")
    @classmethod
    def _uri(cls, given: str | None) -> str | None:
        local = "sqlite:///"
        return local + _absolute(given.removeprefix(local)) if given and given.startswith(local) else given


def _absolute(path: str) -> str:
    """A run can be resumed from another folder."""
    return str(Path(path).expanduser().absolute())


class Config(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """Everything a run is made of; the same config and seed give the same run, once what is measured or counted on the
    machine (engine.compute, products, stack) is named, as it is in a run's own config."""

    task: Literal["classify", "generate"] = "classify"
    model: Model = Model()
    data: Data = Data()
    clients: Clients = Clients()
    rounds: Rounds = Rounds()
    local: Local = Local()
    adapter: AdapterSettings = AdapterSettings()
    method: dict[str, Any] = {"name": "fedavg"}
    engine: EngineSettings = EngineSettings()
    wire: WireSettings = WireSettings()
    server: ServerSettings = ServerSettings()
    privacy: PrivacySettings = PrivacySettings()
    generation: Generation = Generation()
    observe: Observe = Observe()
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "cpu"

    @model_validator(mode="after")
    def _named(self) -> "Config":
        apart = self.engine.kind == "flower"  # then the sites have the rows
        if self.data.labels and not apart:
            raise ValueError("data.labels: here the rows name the classes; it is for engine.kind=flower")
        named = [source for source in (self.data.name, self.data.path) if source is not None]
        if len(named) > 1 or (not named and not apart):
            raise ValueError(
                "give one of data.name (docstrings, or a Hugging Face dataset) and data.path;"
                " data.name=null takes a preset's away"
            )
        if not isinstance(self.method.get("name"), str):
            raise ValueError("method.name must name a method; `fedrank methods` lists them")
        return self

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        if self.task == "generate" and self.model.pooling != "auto":
            raise ValueError(f"model.pooling={self.model.pooling}: with task generate nothing is pooled; auto")
        if (self.engine.workers or 1) > 1 and (self.device != "cpu" or sys.platform != "linux"):
            raise ValueError(
                f"engine.workers: processes that share the work are for CPUs under Linux; with device {self.device} "
                f"on {sys.platform}, 1 or null"
            )
        if self.engine.kind == "flower-simulation" and self.device != "cpu":
            raise ValueError(
                f"device={self.device}: Flower's simulation gives its clients no GPU; cpu, or engine.kind=local"
            )
        if self.task != "generate" and self.generation.when != "never":
            raise ValueError(
                f"generation.when={self.generation.when}: task {self.task} writes no texts; with it, never"
            )
        if self.task == "generate" and self.local.max_length < 2:
            raise ValueError(
                "local.max_length=1: a token is predicted after another one; with task generate, 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _private(self) -> "Config":
        kind = self.privacy.kind
        if kind == "none":
            return self
        if self.server.max_examples is not None:
            raise ValueError(
                f"server.max_examples={self.server.max_examples}: with privacy.kind={kind} all clients count alike; null"
            )
        if kind == "central":  # what hangs on others' updates is no sum of clipped ones
            server = ServerSettings()
            for key, value, default in (
                ("server.aggregation", self.server.aggregation, server.aggregation),
                ("server.max_norm", self.server.max_norm, server.max_norm),
                ("server.max_norm_ratio", self.server.max_norm_ratio, server.max_norm_ratio),
                ("rounds.minimum", self.rounds.minimum, 1),
            ):
                if value != default:
                    raise ValueError(
                        f"{key}={value}: with privacy.kind=central only a clipped, noised sum is taken of updates; {default}"
                    )
        if self.engine.kind == "flower":
            if "count" not in self.clients.model_fields_set:
                raise ValueError(
                    f"clients.count: with engine.kind=flower and privacy.kind={kind} it says how many sites the run is "
                    "planned for, on which delta and central cohorts hang; give it"
                )
            if self.clients.count < self.rounds.cohort:
                raise ValueError(
                    f"clients.count={self.clients.count}: the run is planned for fewer sites than a round asks; a smaller "
                    f"rounds.cohort, which is {self.rounds.cohort}, or more sites"
                )
        if self.rounds.personal != 0:
            raise ValueError(
                f"rounds.personal: clients' own scores would leave them without noise; with privacy.kind={kind}, 0"
            )
        if self.rounds.exactness:
            raise ValueError(f"rounds.exactness: it tells of single updates; with privacy.kind={kind}, false")
        if self.data.split == "validation" and self.data.partition.kind == "natural":
            raise ValueError(
                f"data.split=validation: of natural clients these may be their own rows; with privacy.kind={kind}, test"
            )
        return self


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The config of a YAML file, a preset ("quickstart") or a mapping, with ``key=value`` overrides on top.

    Where an override names another method, the hyper-parameters of the one before it are gone.
    """
    where, raw = read(source)
    overrides = list(overrides)
    names = [item.removeprefix("method.name=") for item in overrides if item.startswith("method.name=")]
    method = raw.get("method")
    if names and isinstance(method, dict) and method.get("name") != names[-1]:
        raw["method"] = {}
    for item in overrides:
        override(raw, item)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {explain(e)}" for e in error.errors())) from None


def dump(config: Config) -> str:
    """The resolved config as YAML."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted ``key=value`` in a raw config; the value is YAML."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r} is not of the form key=value, such as local.lr=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *path, last = key.split(".")
    node = raw
    for part in path:
        if node.get(part) is None:  # "local:" with nothing below it is an empty section
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"override {key!r}: {part!r} is a value, not a section")
    node[last] = value


def presets() -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in (files("fedrank") / "presets").iterdir())


def read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[Any, Any]]:
    if isinstance(source, Mapping):
        return "config", copy.deepcopy(dict(source))
    path = Path(source)
    if str(source) in presets():
        where, text = str(source), (files("fedrank") / "presets" / f"{source}.yaml").read_bytes()
    elif path.is_file():
        where, text = str(path), path.read_bytes()  # YAML has its own word on text that is not UTF-8
    else:
        beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"no config file or preset {str(source)!r}{hint(str(source), [*beside, *presets()])}")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: a config is a mapping of sections, this is {type(raw).__name__}")
    return where, raw


def hint(word: str, known: Iterable[str]) -> str:
    """A closing hint, "; did you mean ...?", or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _near_key(key: str, known: type[BaseModel]) -> str:
    """The nearest key of the same section, else the key of another section that ends so, else what the section has."""
    section, _, word = key.rpartition(".")
    here = {k.rpartition(".")[2]: k for k in known_keys(known) if k.rpartition(".")[0] == section}
    near = [here[w] for w in difflib.get_close_matches(word, here, 1)]
    found = near or [k for k in known_keys(known) if k.endswith(f".{word}")]
    return f"; did you mean {found[0]!r}?" if found else f"; known here: {', '.join(here.values())}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config, its sections too."""
    keys = []
    for name, entry in model.model_fields.items():
        kinds = [k for k in (entry.annotation, *get_args(entry.annotation)) if isinstance(k, type)]
        nested = [k for k in kinds if issubclass(k, BaseModel)]
        keys += [f"{prefix}{name}", *(known_keys(nested[0], f"{prefix}{name}.") if nested else ())]
    return keys


def explain(error: Any, section: str = "", known: type[BaseModel] = Config) -> str:
    """One of pydantic's errors in a line: the key, what it must be, what was given, and the nearest word.

    section: what stands before the key. known: whose keys there are.
    """
    key = ".".join(map(str, (*filter(None, [section]), *error["loc"])))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_near_key(key, known)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:  # it has no key of its own: the message says what it is about
        return f"{section}: {message}" if section else message
    got = repr(error["input"])
    near = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        near = hint(error["input"], [w.strip("'") for w in error["ctx"]["expected"].replace(" or ", ", ").split(", ")])
    return f"{key}: {message[0].lower()}{message[1:]}, got {got}{near}"
