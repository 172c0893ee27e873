"""The nouns every part of fedrank speaks: model, device, state, plan, job, update, method, engine."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fedrank.adapter import Adapter, ascending, kaiming

ClientId = str
Address = str | int


def rng(seed: int, *address: Address) -> np.random.Generator:
    """Addressed randomness: the same seed and address give the same numbers, whatever ran before."""
    key = hashlib.blake2b(json.dumps([seed, *address]).encode(), digest_size=16).digest()
    return np.random.default_rng(np.frombuffer(key, "<u4"))


@dataclass(frozen=True)
class Module:
    """One adapted linear map: its name in the model, its sizes, and the transformer block it is in."""

    name: str
    out: int
    in_: int
    block: int


@dataclass(frozen=True)
class Linear:
    """One product with a weight matrix in the forward pass, adapted or not, for the costs.

    block: its transformer block, the number of blocks for what comes after them, -1 for what comes before. stage: its
    place within the block; maps that read the same input share it. role: what it is to attention: "query", "key",
    "value", "fused" for all three in one, "" for the others. rows: it runs once per row, not once per token.
    kept: bytes per token that backward needs of what comes between it and the next map (norms, activation functions).
    """

    name: str
    out: int
    in_: int
    block: int
    stage: int
    role: Literal["query", "key", "value", "fused", ""] = ""
    rows: bool = False
    kept: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Self-attention of every block. width: of all heads together. heads: their number."""

    width: int
    heads: int


@dataclass(frozen=True)
class Execution:
    """How a model is held and trained. base_bytes: of its frozen weights; None: 4 for each parameter.

    number: bytes of an activation. scores: attention keeps its scores for backward, as the plain product does and fused
    kernels do not. checkpoint: of a block that learns only what enters it is kept, and the rest computed again.
    twice: where a step is differentiated twice, the bytes that it keeps per token, per pair of tokens, per row that the
    head reads, and beside them.
    """

    base_bytes: int | None = None
    number: int = 4
    scores: bool = True
    checkpoint: bool = False
    twice: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What a method may know of the model: the adapted modules, input side first, and the dense tensors.

    ``rank`` and ``scale`` (= alpha / rank) are the adapter's at birth; ``dense`` holds the initial
    classification head, empty where the task has none; ``fingerprint`` names modules and weights.
    ``flow``: every linear map in the order of execution; ``parameters``: the numbers in the frozen base;
    ``execution``: how it is held and trained, for the memory that takes.
    """

    modules: tuple[Module, ...]
    blocks: int
    dense: Mapping[str, np.ndarray]
    rank: int
    scale: float
    fingerprint: str
    flow: tuple[Linear, ...] = ()
    attention: Attention = Attention(0, 0)
    parameters: int = 0
    execution: Execution = Execution()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {m.name: (m.out, m.in_) for m in self.modules}

    def lora(self, seed: int) -> Adapter:
        """LoRA's start at this rank and scale, with the head: the same for every method that begins with it."""
        return self.with_head(kaiming(self.shapes, self.rank, self.scale, rng(seed, "begin")))

    def with_head(self, adapter: Adapter) -> Adapter:
        """The adapter with the model's initial dense tensors beside it."""
        return replace(adapter, dense=self.dense)


@dataclass(frozen=True)
class Load:
    """What one round of a client's local training goes through.

    steps: optimizer steps. tokens: sum over the batches, with what pads or fills them up. pairs: of tokens, whose scores
    attention makes. rows: what the head reads: rows, or the tokens before a predicted one. peak_tokens, peak_pairs, peak_rows:
    of the largest batch.
    """

    steps: int
    tokens: int
    pairs: int
    peak_tokens: int
    peak_pairs: int
    rows: int = 0
    peak_rows: int = 0


@dataclass(frozen=True)
class Device:
    """A client as the server knows it: its id, its number of training rows, and the machine it registered.

    rank: the largest LoRA rank it can train; None: the adapter's. load: a round of its local training, as
    it expects it, with the largest batch there may be. Rates are nominal and in FLOP, bytes and seconds; power in watts;
    0 means unknown.
    """

    id: ClientId
    examples: int
    kind: str = ""
    rank: int | None = None
    load: Load | None = None
    flops_per_second: float = 0.0
    memory_bytes: float = 0.0
    up_bytes_per_second: float = 0.0
    down_bytes_per_second: float = 0.0
    idle_watts: float = 0.0
    busy_watts: float = 0.0


@dataclass(frozen=True, eq=False)
class State:
    """All the server knows between rounds; saved whole, resumed whole.

    ``round`` counts the rounds done: hooks called with it play round ``round + 1`` of ``rounds``.
    ``seen`` maps a client to the last round in which an update of its was merged.
    ``base_updates``: round -> the increment of the frozen base promised in that round's merge (FLoRA,
    FedEx-LoRA), ascending. Its blocks are factors; its dense tensors are whole increments (out, in) by
    module and sum up every earlier round too.
    ``arrays`` is the method's own memory; ``metrics`` are of the last merge.
    """

    round: int
    rounds: int
    adapter: Adapter
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[ClientId, int] = field(default_factory=dict)
    base_updates: Mapping[int, Adapter] = field(default_factory=dict)

    def next(self, adapter: Adapter, **changes: Any) -> "State":
        """The state after a merge: a new adapter, and whatever else changed. The server counts the round."""
        return replace(self, adapter=adapter, metrics=changes.pop("metrics", {}), **changes)


class Passes(NamedTuple):
    """What a local step makes, for the costs."""

    forward: float = 1.0
    backward: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """What one client does in one round.

    train: components that learn. frozen: components present in the forward pass, not learning.
    learn, up, down: which of "BeAh" move, travel up, travel down (h = the dense tensors). A client keeps, as they
    came, factors that did not learn or do not travel down, so a plan may leave out of `down` what it still holds.
    own: factors that are the client's private ones, from its store, else as ``begin`` made them.
    select: the client may return any subset of `train` of at most this size. since: the last round in which
    an update of this client was merged; -1: never, so everything not `own` is sent (the server fills it in).
    arrays: what the method tells the client. returns: the arrays that the client must send
    back, name -> (dtype, shape); anything else is refused.
    private: components per module that the client holds beside these and never sends (the second level).
    """

    train: Mapping[str, np.ndarray]
    frozen: Mapping[str, np.ndarray] = field(default_factory=dict)
    learn: str = "BeAh"
    up: str = "BeAh"
    down: str = "BeAh"
    own: str = ""
    select: int | None = None
    since: int = -1
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    returns: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    private: int = 0
    passes: Passes = Passes()

    def __post_init__(self) -> None:
        for name, ids in [*self.train.items(), *self.frozen.items()]:
            if not ascending(ids):
                raise ValueError(f"module {name!r}: component ids must ascend without repeats, got {list(ids)}")
        for name in self.train.keys() & self.frozen.keys():
            if both := set(self.train[name].tolist()).intersection(self.frozen[name].tolist()):
                raise ValueError(f"module {name!r}: components {sorted(both)} are planned to learn and to be frozen")
        for part in (self.learn, self.up, self.down, self.own):
            if odd := set(part) - set("BeAh"):
                raise ValueError(f"{sorted(odd)} are no factors; they are B, e, A and h")

    @cached_property
    def present(self) -> dict[str, np.ndarray]:
        """The components in the client's forward pass: those that learn and the frozen ones."""
        none = np.empty(0, int)
        pairs = {n: (self.train.get(n, none), self.frozen.get(n, none)) for n in {**self.train, **self.frozen}}
        return {n: np.union1d(x, y) if len(x) and len(y) else x if len(x) else y for n, (x, y) in pairs.items()}

    @cached_property
    def width(self) -> int:
        """One more than the largest component id: the bits per module in which its ids travel."""
        parts = (self.train, self.frozen)
        return 1 + max((int(ids[-1]) for part in parts for ids in part.values() if len(ids)), default=0)

    @property
    def sent(self) -> str:
        """The factors that travel down: all that are not the client's own on first contact, then `down`."""
        return "".join(f for f in "BeAh" if f not in self.own and (self.since < 0 or f in self.down))


@dataclass(frozen=True, eq=False)
class Update:
    """What a client sends back. ``private`` has no field on the wire: it goes to the client's own store."""

    adapter: Adapter
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    private: Mapping[str, np.ndarray] = field(default_factory=dict)


@runtime_checkable
class Observe(Protocol):
    """Called after every backward pass, before the optimizer's step.

    values, grads: factor -> one flat tensor of all learning components, in module and id order,
    each component's vector contiguous (the wire's order); "h.<name>" -> a dense tensor, flat.
    Gradients may be changed in place: a penalty adds its own.
    """

    def __call__(self, values: Mapping[str, Any], grads: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class Lower:
    """The lower level of a bilevel local step: one SGD step of size `rate`, through which the upper one differentiates.

    private: the components that it trains, the client's own; None: a copy of the upper ones, dropped after
    each step (MAML). derivative of the second-order term: "double" differentiates through the step,
    "finite" by central differences, "first" leaves the term out. moments: the upper optimizer's, kept from
    the last round; a fresh one where empty.
    """

    rate: float
    private: Adapter | None = None
    derivative: Literal["double", "finite", "first"] = "double"
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)


@runtime_checkable
class Fit(Protocol):
    """Local training, injected into a job: returns the trained components, by the job's plan.

    With a lower level, the update's `private` holds its trained components and the upper moments, as
    ``levels`` packs them. Where the plan lets nothing learn above, the lower level takes its steps alone.
    """

    def __call__(self, job: "Job", observe: Observe | None = None, lower: Lower | None = None) -> Update: ...


@dataclass(frozen=True, eq=False)
class Job:
    """One client's work in one round, with all it may use. ``local`` holds the local-training settings.

    ``base_updates``: the increments of the frozen base that hold on this client, in their order.
    """

    plan: Plan
    round: int
    rounds: int
    spec: ModelSpec
    adapter: Adapter
    base_updates: tuple[Adapter, ...]
    private: Mapping[str, np.ndarray]
    local: Any
    device: Device
    seed: int
    fit: Fit

    def rng(self, *address: Address) -> np.random.Generator:
        """Randomness of this client and round."""
        return rng(self.seed, "job", self.round, self.device.id, *address)


@dataclass(frozen=True, eq=False)
class Total:
    """A weighted sum of adapters in float64, with the weight behind each part of it.

    weights: module -> (r,) per component, dense name -> scalar array. weight: of all updates together.
    """

    sums: Adapter
    weights: Mapping[str, np.ndarray]
    weight: float


@runtime_checkable
class Updates(Protocol):
    """The arrived updates, checked, in client order, one decoded at a time, any number of passes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[ClientId, Update]]: ...

    def total(self, fn: Callable[[Update], Adapter], weight: Callable[[Update], float]) -> Total:
        """The weighted sum of ``fn(update)``; a method that uses nothing else can be securely aggregated, and one that takes
        a single sum of what changed (and of votes) be made private."""
        ...


@dataclass(frozen=True)
class About:
    """What a method is, for those who choose one; shown by ``fedrank methods``.

    differs: what may differ between clients. travels: what goes up and down. exact_start: every client
    starts from the global function. exact_aggregation: the result is the mean of the clients' functions.
    personal: clients predict with parts of their own. averages: merges are means of factors, so that a
    server optimizer may act on their change.
    """

    paper: str
    year: int
    url: str
    differs: tuple[Literal["rank", "depth", "data"], ...]
    travels: str
    exact_start: bool
    exact_aggregation: bool
    personal: bool = False
    averages: bool = True


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of hyper-parameters with pure hooks: nothing is mutated, nothing kept in self.

    In `plan`, None for a client lets it sit the round out. ``default_lr`` is used where the config names no rate.
    What a method may define beside:

    - ``about``: what it is, an `About`.
    - ``weights``: what clients count by in its means; "examples" where it does not say.
    - ``lower``: where its steps have two levels, how the upper one differentiates through the lower: "double", "finite" or
      "first" (see `Lower`); None where they have one.
    - ``prunes``: what a client does not return of its components is gone from its model.
    - ``adapt(job) -> Adapter``: what this client predicts with; else the received adapter.
    - ``adopt(state, increment) -> State``: its first state with an imported adapter's B and A in it, where its own
      adapter is not the place for them.
    """

    default_lr: float

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State: ...

    def plan(self, state: State, cohort: Mapping[ClientId, Device], seed: int) -> Mapping[ClientId, Plan | None]: ...

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]: ...

    def merge(self, state: State, updates: Updates) -> State: ...


class Silence(str):
    """What an engine knows of a client that was silent, or slower than the round's deadline."""


@runtime_checkable
class Engine(Protocol):
    """Who carries bytes between the server and the clients."""

    def fleet(self) -> Mapping[ClientId, Device]:
        """Every registered client; may be lazy."""
        ...

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterable[tuple[ClientId, bytes | str]]:
        """Carry each request, built when pulled, and yield the replies as they come, or why there will be none.

        A client that is silent, or slower than `seconds`, never appears, or with a `Silence`.
        """
        ...
