"""A tiny real federation in this process, for tests: a random encoder, separable texts, real frames, real files."""

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xxhash
from safetensors.numpy import load_file
from torch.utils.flop_counter import FlopCounterMode

from fedrank import aggregation, config, methods
from fedrank.adapter import Adapter, Block
from fedrank.client import Site
from fedrank.config import Config, Local, PrivacySettings, Rounds
from fedrank.cost import Cost, most_up, predict
from fedrank.devices import Mode
from fedrank.engines import local as engine
from fedrank.fleet import Fleet
from fedrank.frame import CHECKSUM, pack
from fedrank.ledger import Event
from fedrank.protocol import Device, Job, Load, ModelSpec, Module, Plan, State, Total, Update, rng
from fedrank.server import Server
from fedrank.store import Store
from fedrank.training import local, models, tasks, workload
from fedrank.training.data import Rows
from fedrank.training.scoring import Scorer
from fedrank.wire import Wire

LABELS = ("ab", "cd", "ef", "gh")
CLIENTS = ("c0", "c1", "c2", "c3")
SHARES = {
    "c0": np.arange(8),
    "c1": np.arange(8, 20),
    "c2": np.arange(20, 40),
    "c3": np.arange(40, 64),
}  # rows; no two alike
QUICK = ("fedara", "fedavg")  # the methods whose contract `make test-fast` runs
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)  # the marks of what `make test-all` alone runs
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in methods.names()]


def grouped(params: Iterable[Any]) -> list[Any]:
    """The same, in one process by each: what a module's fixtures make of one is then made once."""
    found = ((one.values[0], one.marks) if hasattr(one, "marks") else (one, ()) for one in params)
    return [pytest.param(name, marks=[*marks, pytest.mark.xdist_group(name)]) for name, marks in found]


# Between them they have every kind of plan, part and merge; what is tried with every method is tried with these in CI.
UNLIKE = (
    *QUICK,
    "fed_plora",
    "feddpa",
    "fedex_lora",
    "fedsa_lora",
    "flexlora",
    "flora",
    "hetlora",
    "legend",
    "lora_a2",
    "pf2lora",
)
FIRST = [pytest.param(one.values[0], marks=one.marks if one.values[0] in UNLIKE else EXHAUSTIVE) for one in EVERY]
EXAMPLES = {name: len(rows) for name, rows in SHARES.items()}
RANKS = (1, 2, 4, 4)  # of the devices, in client order
RATES = (8e6, 8e6, 12e6, 10e6)  # FLOPs per second of the devices
MODES = {"toy": (Mode("full", 1.0, 4.0), Mode("saving", 0.6, 2.0))}  # drawn anew in every round


def texts(count: int, seed: int) -> Rows:
    """Strings of a class's own two letters, of drawn lengths; the classes are of equal size."""
    draw = rng(seed, "texts")
    label = np.arange(count) % len(LABELS)
    return Rows(["".join(draw.choice(list(LABELS[y]), draw.integers(3, 8))) for y in label], label=label)


def write(folder: Path, **splits: Rows) -> None:
    """Each split as JSON lines of text and label, as a config's data.path reads them."""
    for split, rows in splits.items():
        lines = (json.dumps({"text": t, "label": int(y)}) for t, y in zip(rows.text, rows.label, strict=True))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def settings(**sections: Any) -> Config:
    """A config for the tiny encoder; data.name is only a name here."""
    base: dict[str, Any] = {
        "model": {"pooling": "mean"},
        "data": {"name": "toy"},
        "adapter": {"rank": 4},
        "local": {"batch_size": 8},
    }
    return config.load({**base, **sections})


@cache
def encoder() -> models.Model:
    return models.load(settings(), LABELS)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}),
    "roberta": ("Roberta", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                            "pad_token_id": 0, "max_position_embeddings": 66}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("Llama", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                        "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "albert": ("Albert", {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                          "intermediate_size": 48}),
    "opt": ("OPT", {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48,
                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "xlnet": ("XLNet", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}),
}  # fmt: skip


def saved(kind: str, folder: Path, causal: bool = False, seed: int = 0) -> Path:
    """A folder as `save_pretrained` leaves it: a random model of this kind with the tiny models' tokenizer."""
    name, sizes = KINDS[kind]
    made = getattr(transformers, f"{name}Config")(vocab_size=260, num_labels=len(LABELS), **sizes)
    torch.manual_seed(seed)
    tail = {"GPT2": "LMHeadModel"}.get(name, "ForCausalLM") if causal else "ForSequenceClassification"
    getattr(transformers, f"{name}{tail}")(made).save_pretrained(folder)
    encoder().tokenizer.save_pretrained(folder)
    return folder


def loaded(kind: str, folder: Path, task: str = "classify", **sections: Any) -> models.Model:
    """Such a folder, loaded as a config names it."""
    name = str(saved(kind, folder, causal=task == "generate"))
    return models.load(settings(model={"name": name}, task=task, **sections), LABELS)


@cache
def encoded(split: str) -> tasks.Encoded:
    rows = texts(64, 0) if split == "train" else texts(40, 1)
    return tasks.encode(rows, encoder().tokenizer, "classify", 16)


@cache
def trainer(lr: float) -> local.Trainer:
    return local.Trainer(encoder(), encoded("train"), encoded("test"), lr, 1, "cpu")


@dataclass(frozen=True, eq=False)
class Federation:
    """server and begin play it: ``list(f.server.play(f.begin))``, or `play`, which gives the events by kind."""

    server: Server
    begin: State
    store: Store
    sites: Mapping[str, Site]

    def play(
        self, state: State | None = None, watch: Callable[[Event], object] = lambda event: None
    ) -> dict[str, list[Event]]:
        if state is None:
            self.store.save_state(self.begin, self.server.wire.numerics)
        found: dict[str, list[Event]] = {
            "cohort": [],
            "client": [],
            "refused": [],
            "not_merged": [],
            "round": [],
            "end": [],
        }
        for event in self.server.play(self.begin if state is None else state):
            found[event["event"]].append(event)
            watch(event)
        return found

    @property
    def states(self) -> dict[int, State]:
        kept = sorted(int(path.stem) for path in (self.store.path / "states").glob("*.safetensors"))
        return {number: self.store.state(number)[0] for number in kept}

    @property
    def last(self) -> State:
        return self.store.state()[0]

    @property
    def private(self) -> dict[str, dict[str, bytes]]:
        """What the clients keep for themselves, to the bit: file -> name -> bytes."""
        root = self.store.private.root
        return {
            str(path.relative_to(root)): {name: array.tobytes() for name, array in load_file(path).items()}
            for path in sorted(root.rglob("*.safetensors"))
        }


def fleet(shares: Mapping[str, np.ndarray], seed: int = 0) -> Fleet:
    """Devices of differing rank and speed, on which computing takes seconds and a frame some tenths of one."""
    machines = tuple(
        Device("", 0, "toy", RANKS[at % len(RANKS)], None, RATES[at % len(RATES)], 0.0, 1e5, 4e5, 1.0, 4.0)
        for at in range(len(shares))
    )
    sizes = {name: len(rows) for name, rows in shares.items()}
    return Fleet(sizes, machines, np.arange(len(shares)), MODES, 0.1, 1, seed)


def unmodelled(site: Site) -> Site:
    """The site with a device of which nothing is known but its rank."""
    device = Device(site.device.id, site.device.examples, rank=site.device.rank)
    return replace(site, device=device, cost=None)


def federation(
    method: Any,
    path: Path,
    *,
    rounds: int = 3,
    cohort: int = len(CLIENTS),
    head: str = "train",
    dtype: str = "f32",
    epochs: int = 1,
    shares: Mapping[str, np.ndarray] | None = None,
    alter: Callable[[Site], Site] = lambda site: site,
    carry: Callable[[Any], Any] = lambda carrier: carrier,
    evaluate_every: int = 100,
    seed: int = 0,
    exactness: bool = False,
    privacy: PrivacySettings | None = None,
) -> Federation:
    """The parts of one run, as `experiment.prepare` puts them together. alter: what to make of a client's site.

    carry: what to make of the engine. shares: rows of each client; by default each has all classes, and no two have
    equally many.
    """
    spec, teacher = encoder().spec, trainer(method.default_lr)
    scored = None if privacy is None else 0
    privacy = privacy or PrivacySettings()
    scorer = Scorer(teacher)
    shares = SHARES if shares is None else shares
    begin = method.begin(spec, rounds, seed)
    wire = Wire(spec, begin.adapter, dtype, "toy", seed, local.numerics(1, "cpu"))
    store = Store.create(path) if not path.exists() else Store(path)
    learning = Local(batch_size=8, epochs=epochs)
    test = encoded("test")
    machines = fleet(shares, seed)

    def load(name: str, round: int) -> Load:
        draw = partial(rng, seed, "job", round, name, "batches")
        return workload.workload(shares[name], encoded("train"), learning, draw)

    def price(name: str, round: int, plan: Plan, bytes_down: int) -> Cost:
        bytes_up = most_up(spec, begin.adapter, plan, dtype).frame
        return predict(spec, begin.adapter, plan, load(name, round), machines.at(name, round), bytes_down, bytes_up)

    def personal(rows: np.ndarray, adapter: Adapter, base: tuple[Adapter, ...], last: bool) -> dict[str, float]:
        found = scorer.evaluate(adapter, test, rows, base)
        return {"accuracy": found["accuracy"], "loss": found["loss"], "rows": len(rows), "majority": 0.25}

    sites = {
        name: alter(Site(
            replace(machines.devices[name], load=load(name, 0)), method, wire, store.private, learning, seed,
            partial(teacher.fit, rows=rows), partial(personal, np.arange(at * 10, at * 10 + 10)), teacher.session,
            partial(price, name), privacy=privacy,
        ))
        for at, (name, rows) in enumerate(shares.items())
    }  # fmt: skip
    devices = {name: site.device for name, site in sites.items()}
    carrier = carry(engine.Local(devices, sites.__getitem__, 0.0, seed))

    def evaluate(adapter: Adapter, base: tuple[Adapter, ...], last: bool) -> dict[str, float]:
        return scorer.evaluate(adapter, test, np.arange(len(test)), base)

    played = Rounds(count=rounds, cohort=cohort, evaluate_every=evaluate_every, exactness=exactness, personal=scored)
    judge = None if head == "own" else evaluate
    server = Server(method, carrier, wire, store, played, seed, head, judge, privacy=privacy, clients=len(shares))
    return Federation(server, begin, store, sites)


@dataclass(frozen=True, eq=False)
class Deaf:
    """An engine that asks only these; what is sent to others is lost on the way."""

    engine: Any
    names: tuple[str, ...] = ()

    def fleet(self) -> Mapping[str, Device]:
        return self.engine.fleet()

    def exchange(self, requests: Any, seconds: float | None) -> Iterator[tuple[str, bytes]]:
        made = {name: build() for name, build in requests}
        yield from self.engine.exchange(
            ((name, partial(made.get, name)) for name in made if name in self.names), seconds
        )


@dataclass(frozen=True, eq=False)
class Tampering:
    """An engine between the server and a real one: it carries what `change` makes of each reply."""

    engine: Any
    change: Callable[[str, bytes], Iterable[tuple[str, bytes]]]
    order: Callable[[list], list] = list

    def fleet(self) -> Mapping[str, Device]:
        return self.engine.fleet()

    def exchange(self, requests: Any, seconds: float | None) -> Iterator[tuple[str, bytes]]:
        replies = [pair for name, frame in self.engine.exchange(requests, seconds) for pair in self.change(name, frame)]
        yield from self.order(replies)


# ---- small numbers, without a model


def small(sizes: Mapping[str, tuple[int, int]] = {"0.m": (2, 3), "1.m": (3, 2)}, rank: int = 2) -> ModelSpec:
    """A model that exists only by its sizes; the head is one 2x2 matrix."""
    modules = tuple(Module(name, out, in_, at) for at, (name, (out, in_)) in enumerate(sizes.items()))
    return ModelSpec(modules, len(modules), {"head.weight": np.zeros((2, 2), np.float32)}, rank, 2.0, "small")


def drawn(spec: ModelSpec, seed: int = 0) -> Adapter:
    """An adapter in SVD form with nothing zero in it."""
    draw = rng(seed, "drawn")
    blocks = {
        name: Block(np.arange(spec.rank), *(draw.normal(size=s).astype(np.float32) for s in ((o, spec.rank), (spec.rank,), (spec.rank, i))))
        for name, (o, i) in spec.shapes.items()
    }  # fmt: skip
    return Adapter(blocks, spec.scale, spec.dense)


@dataclass(frozen=True, eq=False)
class Arrived:
    """Updates in memory, in client order."""

    updates: Mapping[str, Update]

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[tuple[str, Update]]:
        yield from sorted(self.updates.items())

    def total(self, fn: Callable[[Update], Adapter], weight: Callable[[Update], float]) -> Total:
        return aggregation.total((fn(update), weight(update)) for _, update in self)


def job(
    spec: ModelSpec, adapter: Adapter, plan: Plan, fit: Any, client: str = "c0", round: int = 2, **more: Any
) -> Job:
    return Job(plan, round, 10, spec, adapter, (), {}, Local(batch_size=8), cohort(client)[client], 0, fit, **more)


def cohort(*names: str) -> dict[str, Device]:
    return {name: Device(name, EXAMPLES.get(name, 4)) for name in names}


def flat(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The factors as an observer sees them: flat, in module and id order, each component's vector contiguous."""
    rows = {"B": lambda b: b.B.T, "e": lambda b: b.e, "A": lambda b: b.A}
    return {
        f: torch.tensor(np.concatenate([row(b).reshape(-1) for b in adapter.blocks.values()]))
        for f, row in rows.items()
        if all(getattr(block, f) is not None for block in adapter.blocks.values())
    }


def arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    """All the numbers of an adapter by name."""
    found = {
        f"{name}/{part}": getattr(block, part)
        for name, block in adapter.blocks.items()
        for part in ("ids", "B", "e", "A")
        if getattr(block, part) is not None
    }
    return found | {f"dense/{name}": tensor for name, tensor in adapter.dense.items()}


def same(a: Adapter, b: Adapter) -> bool:
    """Equal to the bit."""
    one, two = arrays(a), arrays(b)
    return list(one) == list(two) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(one.values(), two.values(), strict=True)
    )


def equal(a: State, b: State) -> bool:
    """Equal to the bit, in all that a method or a resumed run can see."""
    return (
        same(a.adapter, b.adapter)
        and (a.round, a.rounds, dict(a.seen), dict(a.metrics)) == (b.round, b.rounds, dict(b.seen), dict(b.metrics))
        and a.arrays.keys() == b.arrays.keys()
        and all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
        and list(a.base_updates) == list(b.base_updates)
        and all(same(update, b.base_updates[n]) for n, update in a.base_updates.items())
    )


def forced(meta: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """A frame of just these facts and tensors, NaN and infinity too, which `pack` would refuse to write."""
    plain = {name: np.nan_to_num(t, posinf=0, neginf=0) if t.dtype.kind == "f" else t for name, t in tensors.items()}
    frame = bytearray(pack(meta, plain))
    (size,) = struct.unpack("<Q", frame[:8])
    header = json.loads(frame[8 : 8 + size])
    for name, tensor in tensors.items():
        start, end = (8 + size + at for at in header[name]["data_offsets"])
        frame[start:end] = tensor.tobytes()
    return sealed(bytes(frame))


def sealed(frame: bytes) -> bytes:
    """The bytes with a checksum that fits."""
    return frame[:-CHECKSUM] + xxhash.xxh3_64_digest(frame[:-CHECKSUM])


def flops() -> FlopCounterMode:
    """torch's counter, which by itself leaves out products that are added in place."""
    add = torch.ops.aten.addmm_
    return FlopCounterMode(display=False, custom_mapping={add: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]})


@contextmanager
def saved_for_backward(known: Iterable[torch.Tensor]) -> Iterator[Callable[[], int]]:
    """The most bytes that torch held at once for backward passes: storages, each once, but for those of `known`."""
    parameters = {tensor.untyped_storage()._cdata for tensor in known}
    held, sizes, most = Counter[int](), dict[int, int](), 0

    class Saved:
        def __init__(self, tensor: torch.Tensor):
            nonlocal most
            storage = tensor.untyped_storage()
            self.tensor, self.key = tensor, storage._cdata
            held[self.key] += 1
            sizes[self.key] = storage.nbytes()
            most = max(most, sum(sizes[key] for key in +held if key not in parameters))

        def __del__(self) -> None:
            held[self.key] -= 1

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield lambda: most
