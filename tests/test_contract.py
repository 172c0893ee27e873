"""What every method must keep, whichever it is; and what the round loop keeps whatever a client does."""

import inspect
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file

import toy
from fedrank import client, export, ledger, methods, wire
from fedrank.adapter import FACTORS, Adapter, gaussian, kaiming
from fedrank.aggregation import WEIGHTS, average
from fedrank.frame import pack, unpack
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import Device, Job, Load, ModelSpec, Plan, State, Update, rng
from fedrank.selection import everything
from fedrank.store import StoreError

WALL = {"seconds", "wall_seconds", "train_seconds", "evaluation_seconds"}  # of this machine
SETTINGS: dict[str, dict[str, Any]] = {"fedara": {"target_rank": 1}}

# Settings other than the default ones that make another method of it; those play what a whole run needs.
VARIANTS: dict[str, dict[str, Any]] = {
    "fed_plora-drop": {"rest": "drop"}, "fed_plora-fixed": {"selection": "fixed"}, "fed_plora-fold": {"rest": "fold"},
    "fed_plora-weight_norm": {"selection": "weight_norm"}, "fedara-threshold": {"arbitration": "threshold"},
    "feddpa-narrow": {"private_rank": 1}, "flexlora-even": {"split": "even"}, "hetlora-contributor": {"form": "contributor"},
    "hetlora-pruned": {"gamma": 0.5, "penalty": 1.0}, "hetlora-uniform": {"form": "uniform"},
    "legend-capped": {"max_bytes": 42000.0}, "legend-deep": {"depth": "full"}, "legend-full": {"download": "full"},
    "per_fedavg_lora-finite": {"derivative": "finite"}, "per_fedavg_lora-first": {"derivative": "first"},
    "pf2lora-examples": {"weights": "examples", "keep_moments": False},
    "pf2lora-finite": {"derivative": "finite"}, "pf2lora-first": {"derivative": "first"},
}  # fmt: skip
core = pytest.mark.parametrize(
    "method", toy.grouped([*toy.EVERY, *(pytest.param(name, marks=toy.EXHAUSTIVE) for name in VARIANTS)]),
    indirect=True, scope="module",
)  # fmt: skip


def build(name: str) -> Any:
    """The method of this name, or a variant of it."""
    method = name.partition("-")[0]
    return methods.build({"name": method, **SETTINGS.get(method, {}), **VARIANTS.get(name, {})})


def plan_of(method: Any) -> Plan:
    """What it asks of a client on first contact."""
    return method.plan(method.begin(toy.encoder().spec, 3, 0), toy.cohort("c0"), 0)["c0"]


def frozen_copy(value: Any) -> Any:
    """Everything in a value that a hook could change, by content."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return [(key, frozen_copy(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [frozen_copy(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, frozen_copy(getattr(value, f.name))) for f in fields(value) if f.name != "fit"]
    return deepcopy(value) if isinstance(value, str | int | float | None) else None


@dataclass
class Watched:
    """A method that looks on while its hooks run: their inputs must come out as they went in."""

    inner: Any
    seen: list[str]
    merged: list[tuple[State, dict[str, Update], State]]
    jobs: list[Job]

    @property
    def default_lr(self) -> float:
        return self.inner.default_lr

    def _pure(self, name: str, *args: Any) -> Any:
        before = frozen_copy([self.inner, *args])
        result = getattr(self.inner, name)(*args)
        result = list(result) if name == "train" else result
        assert frozen_copy([self.inner, *args]) == before, f"{name} changed what it was given"
        self.seen.append(name)
        return result

    def begin(self, spec: Any, rounds: int, seed: int) -> State:
        return self._pure("begin", spec, rounds, seed)

    def plan(self, state: State, cohort: Any, seed: int) -> Any:
        return self._pure("plan", state, cohort, seed)

    def train(self, jobs: Iterable[Job]) -> Any:
        jobs = list(jobs)
        self.jobs.extend(jobs)
        return self._pure("train", jobs)

    def merge(self, state: State, updates: Any) -> State:
        arrived = toy.Arrived(dict(updates))
        before = frozen_copy(arrived.updates)
        result = self._pure("merge", state, updates)
        assert toy.equal(result, self._pure("merge", state, arrived))  # any Updates will do
        assert frozen_copy(arrived.updates) == before
        self.merged.append((state, arrived.updates, result))
        return result

    def adapt(self, job: Job) -> Adapter:
        return self._pure("adapt", job) if hasattr(self.inner, "adapt") else job.adapter


@pytest.fixture(scope="module", params=toy.grouped(toy.FIRST))
def method(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def played(method: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three rounds of three of the four clients, under watch.

    left: the run directory as each round left it. predicts: what each client was last evaluated with. merged: the
    state before each merge, the updates, and the state after it. sent: every frame that came back.
    """
    folder, watched, sent = tmp_path_factory.mktemp("contract"), Watched(method, [], [], []), list[bytes]()
    left: dict[int, Path] = {}
    predicts: dict[str, Adapter] = {}

    def note(site: client.Site) -> client.Site:
        def evaluate(adapter: Adapter, base: tuple[Adapter, ...], last: bool) -> dict[str, float]:
            predicts[site.device.id] = adapter
            return site.evaluate(adapter, base, last)

        return replace(site, evaluate=evaluate)

    def overhear(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        sent.append(frame)
        return [(name, frame)]

    f = toy.federation(watched, folder / "run", cohort=3, alter=note, carry=lambda e: toy.Tampering(e, overhear))

    def copy(event: dict) -> None:
        if event["event"] in ("cohort", "end"):  # before a round, and after the last
            number = event["round"] - (event["event"] == "cohort")
            left[number] = shutil.copytree(f.store.path, folder / str(number))

    events = f.play(watch=copy)
    return SimpleNamespace(
        events=events, states=f.states, federation=f, seen=watched.seen, left=left, predicts=predicts,
        merged=watched.merged, sent=sent,
    )  # fmt: skip


def test_learns(method, tmp_path):
    f = toy.federation(method, tmp_path / "run", rounds=5, epochs=3)
    rows = f.play()["round"]
    losses = [row["train_loss"] for row in rows]
    assert losses[-1] < 0.7 * losses[0]
    if set(plan_of(method).own) & set("BeA"):  # there is no one global model
        assert rows[-1]["accuracy"] is None
        assert rows[-1]["personal_accuracy"] > 0.75
    else:
        assert rows[-1]["accuracy"] > 0.75  # four classes of equal size
        assert rows[-1]["loss"] < losses[0]


@core
def test_the_loss_falls(played):
    losses = [row["train_loss"] for row in played.events["round"]]
    assert losses == sorted(losses, reverse=True)


@core
def test_hooks_are_pure_and_keep_nothing_in_self(method, played):
    assert {"begin", "plan", "train", "merge"} <= set(played.seen)
    assert type(method).__dataclass_params__.frozen
    assert set(vars(method)) == {f.name for f in fields(method)}


@core
def test_repeats_to_the_bit(method, played, tmp_path):
    again = toy.federation(method, tmp_path / "run", cohort=3)
    events = again.play()
    for kind in ("client", "round"):
        one, two = (
            [{k: v for k, v in e.items() if k not in WALL} for e in run[kind]] for run in (events, played.events)
        )
        assert one == two
    assert toy.equal(again.last, played.states[3])
    assert again.private == played.federation.private


@core
def test_a_client_s_time_is_that_of_its_frames_and_its_plan(played):
    """What is predicted before a round is, to the byte, what travels in it."""
    machines = toy.fleet(toy.SHARES)
    for event in played.events["client"]:
        device = machines.at(event["client"], event["round"])
        assert event["upload_seconds"] == event["bytes_up"] / device.up_bytes_per_second
        assert event["download_seconds"] == event["bytes_down"] / device.down_bytes_per_second
        parts = ("download", "forward", "backward", "upload")
        assert event["device_seconds"] == pytest.approx(sum(event[f"{part}_seconds"] for part in parts), rel=1e-12)
        assert min(event["forward_seconds"], event["backward_seconds"], event["peak_memory_bytes"]) > 0
    for row in played.events["round"]:
        mine = [e["device_seconds"] for e in played.events["client"] if e["round"] == row["round"]]
        assert row["round_seconds"] == max(mine)


@core
def test_the_head_is_the_mean_by_what_clients_count_by(method, played):
    """No two of them have equally many rows."""
    weight = WEIGHTS[getattr(method, "weights", "examples")]
    for before, updates, after in played.merged:
        weights = np.array([weight(update) for update in updates.values()])
        for name, tensor in after.adapter.dense.items():
            sent = [update.adapter.dense.get(name, before.adapter.dense[name]) for update in updates.values()]
            np.testing.assert_allclose(tensor, np.tensordot(weights / weights.sum(), sent, 1), rtol=1e-5, atol=1e-7)
            assert "h" not in plan_of(method).up or not np.allclose(tensor, other(sent, weights), rtol=1e-4)


def other(sent: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """A mean that is not theirs: of all alike, or where they are alike by their place."""
    odd = np.ones(len(sent)) if np.ptp(weights) else np.arange(1.0, len(sent) + 1)
    return np.tensordot(odd / odd.sum(), sent, 1)


@core
def test_resumes_after_every_round_to_the_same_bits(method, played, tmp_path):
    assert sorted(played.states) == sorted(played.left) == [0, 1, 2, 3]
    for number, left in played.left.items():
        again = toy.federation(method, shutil.copytree(left, tmp_path / str(number)), cohort=3)
        assert again.last.round == number
        again.play(again.last)
        assert toy.equal(again.last, played.states[3]), number
        assert again.private == played.federation.private, number


@core
def test_the_order_of_replies_does_not_matter(method, played, tmp_path):
    def reverse(engine: Any) -> Any:
        return toy.Tampering(engine, lambda name, frame: [(name, frame)], lambda replies: replies[::-1])

    other = toy.federation(method, tmp_path / "run", cohort=3, carry=reverse)
    events = other.play()
    assert [e["client"] for e in events["client"][:3]] == [e["client"] for e in played.events["client"][:3]][::-1]
    assert toy.equal(other.last, played.states[3])
    assert other.private == played.federation.private


@core
def test_whoever_comes_back_is_merged(method, tmp_path):
    partial = toy.federation(method, tmp_path / "some", carry=lambda engine: toy.Deaf(engine, ("c1", "c3")))
    events = partial.play()
    assert [(r["clients_ok"], r["clients_failed"]) for r in events["round"]] == [(2, 2)] * 3
    assert partial.last.seen == {"c1": 3, "c3": 3}
    assert toy.same(partial.last.adapter, partial.begin.adapter) == (not plan_of(method).up)
    assert {e["error"] for e in events["client"] if not e["ok"]} == {"no answer"}


def test_clients_start_where_the_server_is_however_long_they_were_away(method, tmp_path):
    """Two of four a round: some come late, some after a pause, and an answer of c1 is lost. The cohorts are the seed's,
    whatever the method."""

    def lose(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        meta, _ = unpack(frame)
        return [] if (name, meta["round"], meta["kind"]) == ("c1", 2, "update") else [(name, frame)]

    watched = Watched(method, [], [], [])
    f = toy.federation(
        watched, tmp_path / "run", rounds=5, cohort=2, seed=7, carry=lambda engine: toy.Tampering(engine, lose)
    )
    before: dict[int, State] = {}
    events = f.play(watch=lambda e: before.update({e["round"]: f.last}) if e["event"] == "cohort" else None)
    assert ["".join(e["clients"]) for e in events["cohort"]] == ["c0c1", "c1c2", "c0c3", "c0c2", "c1c3"]
    assert [(job.round, job.plan.since) for job in watched.jobs if job.device.id == "c1"] == [(1, -1), (2, 1), (5, 1)]
    assert len(watched.jobs) == 10
    for job in watched.jobs:
        state, plan = before[job.round], job.plan
        common = "".join(factor for factor in "BeAh" if factor not in plan.own)
        expected = state.adapter.take(plan.train).union(state.adapter.take(plan.frozen))
        assert toy.same(job.adapter.only(common), expected.only(common))
        assert job.adapter.scale == f.begin.adapter.scale  # one for all ranks, never alpha / r_i
        ours, theirs = (
            [{name: array.tobytes() for name, array in toy.arrays(update).items()} for update in updates]
            for updates in (state.base_updates.values(), job.base_updates)
        )
        assert ours == theirs


@core
def test_whether_merges_are_means_of_factors(method, played):
    """Only then is all that a round did a change of the factors, of which a server optimizer can make a step."""
    for before, updates, after in played.merged:
        moved = not toy.same(before.adapter, after.adapter)
        mean = within(before.adapter, [update.adapter for update in updates.values()], after.adapter)
        assert method.about.averages == (moved and mean and not after.base_updates)


def within(before: Adapter, came: list[Adapter], after: Adapter) -> bool:
    """Whether every number is between those that came for it; where some did not, the old one and 0 count too."""

    def component(adapter: Adapter, name: str, j: int) -> dict[str, np.ndarray]:
        block = adapter.blocks.get(name)
        found = {} if block is None else {f: getattr(block.at(block.ids == j), f) for f in FACTORS}
        return {f: part for f, part in found.items() if part is not None and part.size}

    for name, j in ((name, j) for name, ids in after.ids.items() for j in ids):
        old, new = component(before, name, j), component(after, name, j)
        sent = [component(adapter, name, j) for adapter in came]
        for f, part in new.items():
            parts = [s[f] for s in sent if f in s]
            parts += [old[f], 0 * old[f]] * (len(parts) < len(sent))
            near = 1e-6 * np.abs(parts).max(axis=0)
            if np.any(part < np.min(parts, axis=0) - near) or np.any(part > np.max(parts, axis=0) + near):
                return False
    return True


def test_where_nobody_comes_back_the_round_is_recorded_and_skipped(method, tmp_path):
    f = toy.federation(method, tmp_path / "none", carry=lambda engine: toy.Deaf(engine))
    events = f.play()
    assert [(r["clients_ok"], r["clients_failed"], r["train_loss"]) for r in events["round"]] == [(0, 4, None)] * 3
    assert f.last.round == 3
    assert toy.same(f.last.adapter, f.begin.adapter)
    assert len(ledger.read(f.store.path / "rounds.jsonl")) == 3


@core
def test_no_private_state_is_in_the_servers_state(method, played):
    names = {name for state in played.states.values() for name in state.arrays}
    assert not any("private" in name for name in names)
    kept = (played.federation.store.path / "clients").rglob("*.safetensors")
    own = plan_of(method).own
    stored = {array.tobytes() for path in kept for array in client_arrays(path, own) if array.any() and array.size > 1}
    held = {
        array.tobytes() for state in played.states.values() for array in [*state.arrays.values(), *toy.arrays(state.adapter).values()]
    }  # fmt: skip
    assert bool(stored) == bool(set(own) & set("BeA") or plan_of(method).private)
    assert not stored & held


@core
def test_no_private_number_is_in_any_frame(method, played):
    """Neither as it is kept nor turned, as factors travel."""
    plan = plan_of(method)
    kept = (path for left in played.left.values() for path in (left / "clients").rglob("*.safetensors"))
    arrays = (array for path in kept for array in client_arrays(path, plan.own) if array.size > 16)
    secrets = {part for array in arrays for turned in (array, array.T) if any(part := turned.tobytes()[:64])}
    assert bool(secrets) == bool(set(plan.own) & set("BeA") or plan.private)
    assert sum(unpack(frame)[0]["kind"] == "update" for frame in played.sent) == 9
    leaked = sum(secret in frame for frame in played.sent for secret in secrets)
    assert leaked == 0


def client_arrays(path: Path, own: str) -> list[np.ndarray]:
    """A client's private arrays and own factors."""
    return [a for name, a in load_file(path).items() if (part := name.partition("/")[0]) == "private" or part in own]


@core
def test_a_client_adds_a_few_numbers_to_the_state_and_a_round_adds_none(played):
    """What is kept of a client by name is less than a component of every module; all else does not grow.

    Base updates are the method's promise to absent clients: whole matrices at most, whoever and however many.
    """
    spec, begin = toy.encoder().spec, played.states[0]

    def sizes(state: State) -> tuple[dict[str, int], int]:
        mine = {name: a.nbytes for name, a in state.arrays.items() if name.rpartition("/")[2] in toy.CLIENTS}
        common = [a.nbytes for name, a in state.arrays.items() if name not in mine]
        return mine, sum(common) + sum(a.nbytes for a in toy.arrays(state.adapter).values())

    for number, state in played.states.items():
        mine, common = sizes(state)
        assert {name.rpartition("/")[2] for name in mine} <= state.seen.keys()
        assert sum(mine.values()) <= 8 * len(spec.modules) * len(state.seen), number
        assert common <= sizes(begin)[1]
        base = sum(a.nbytes for update in state.base_updates.values() for a in toy.arrays(update).values())
        assert base <= 2 * 4 * sum(out * in_ for out, in_ in spec.shapes.values())


# A method's plans do not give clients these, and yet they come to differ.
LEARNT = {"pf2lora": "the effective rank, of what a client has learnt"}


@pytest.mark.parametrize("name", methods.names())
def test_what_may_differ_between_clients_is_what_differs_in_their_plans(name):
    """Of two clients that are alike but for one thing."""
    method, spec, load = build(name), toy.encoder().spec, Load(4, 400, 3000, 120, 900, 32)
    one = Device("c0", 16, "toy", 1, load, 1e7, 0.0, 1e5, 4e5, 1.0, 4.0)
    block = {module.name: module.block for module in spec.modules}

    def differ(**change: Any) -> set[str]:
        found, state = set(), method.begin(spec, 5, 0)
        for round in (0, 1):
            state = replace(state, round=round)
            a, b = method.plan(state, {"c0": one, "c1": replace(one, id="c1", **change)}, 0).values()
            sizes = [sum(map(len, p.train.values())) if p.select is None else p.select for p in (a, b)]
            depths = [len({block[module] for module in p.train}) for p in (a, b)]
            if depths[0] != depths[1]:
                found.add("depth")
            elif sizes[0] != sizes[1]:
                found.add("rank")
                assert sizes == [one.rank * len(spec.modules), change["rank"] * len(spec.modules)]
        return found

    differs = set(method.about.differs)
    assert differs <= {"rank", "depth", "data"}
    assert differ(rank=3) == differs & {"rank"} - ({"rank"} if name in LEARNT else set())
    assert differ(flops_per_second=5e6, load=replace(load, tokens=800)) == differs & {"depth"}
    assert differ(examples=99) == set()
    assert "data" in differs


def test_is_one_short_file_that_names_its_paper(method):
    module = sys.modules[type(method).__module__]
    if not module.__name__.startswith("fedrank.methods"):
        pytest.skip("someone else's file")
    assert len(inspect.getsource(module).splitlines()) < 200
    assert re.search(rf"\(.*{method.about.year}.*\)", (module.__doc__ or "").splitlines()[0])
    assert method.about.url.startswith("https://")
    assert "torch" not in {n.split(".")[0] for n in vars(module) if not n.startswith("_")}


@core
def test_exports_the_same_function_or_says_why_there_is_none(method, played, tmp_path):
    """Where clients have factors of their own, it is each client's function that is exported."""
    model = toy.encoder()
    about = {
        "task": "classify", "pooling": "mean", "source": "toy", "name": "toy", "conv1d": False, "base_class": "BertModel",
    }  # fmt: skip
    path, own, private = tmp_path / "run", plan_of(method).own, plan_of(method).private
    shutil.copytree(played.federation.store.path, path)
    (path / "config.yaml").write_text("")
    (path / "data.json").write_text(json.dumps({"model": about, "own": own, "private": private}))
    last = played.states[3]
    summed = last.adapter.delta()
    wholes = {name: at for at, update in last.base_updates.items() for name in update.dense}  # all before it is in it
    for at, update in last.base_updates.items():
        for name, delta in {**update.delta(), **update.dense}.items():
            if at >= wholes.get(name, at):
                summed[name] = summed.get(name, 0) + delta
    functions: dict[str | None, Any] = {None: (summed, last.adapter.dense)}
    if own:
        with pytest.raises(StoreError, match=f"each client keeps {own[0]}.* to itself, so there is no one function"):
            export.export(path, tmp_path / "peft")
        del functions[None]
    if own or private:
        predicts = {name: played.predicts[name] for name in played.states[3].seen}
        functions |= {name: (adapter.delta(), adapter.dense) for name, adapter in predicts.items()}
    for name, (ours, heads) in functions.items():
        found = export.read_peft(export.export(path, tmp_path / f"peft {name}", client=name))
        assert found.delta().keys() == ours.keys() <= model.modules.keys()
        for module, delta in ours.items():
            np.testing.assert_allclose(found.delta()[module], delta, rtol=1e-5, atol=1e-7)
        assert any(delta.any() for delta in ours.values())
        for dense, tensor in heads.items():
            np.testing.assert_array_equal(found.dense[dense], tensor)


# ---- what is refused on the wire

Change = Callable[[dict, dict], bool]  # of a reply's facts and tensors; False where it has nothing of the kind


def first(part: str, make: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    """Of the first tensor of this part; None takes it away."""

    def change(meta: dict, tensors: dict) -> bool:
        names = [name for name in tensors if (name in FACTORS if part == "factor" else name.startswith("arrays."))]
        if names and (made := make(tensors.pop(names[0]))) is not None:
            tensors[names[0]] = made
        return bool(names)

    return change


def more(meta: dict, tensors: dict) -> bool:
    """A factor that did not go up, with as many numbers as all of it has; where all did, a dense tensor."""
    name = next((f for f in FACTORS if f not in tensors), "h.more")
    spec = toy.encoder().spec
    size = {"B": sum(m.out for m in spec.modules), "e": len(spec.modules), "A": sum(m.in_ for m in spec.modules)}
    tensors[name] = np.ones(spec.rank * size.get(name, 1), np.float32)
    return True


def more_ids(meta: dict, tensors: dict) -> bool:
    """All components chosen; where they are, or nothing was to be chosen, ids of a length that was not asked for."""
    ids = tensors.get("ids", np.empty(0, np.uint8))
    spare = ids.size * 8 - np.unpackbits(ids).sum() >= 8  # more than fills up the last byte
    tensors["ids"] = np.full_like(ids, 255) if spare else np.append(ids, np.uint8(255))
    return True


def told(**facts: Any) -> Change:
    return lambda meta, tensors: not meta.update(facts)


def given(name: str) -> Change:
    return lambda meta, tensors: not tensors.update({name: np.ones(3, np.float32)})


NOT_AS_ASKED: dict[str, tuple[Change, str]] = {
    "a factor with one component more": (first("factor", lambda t: np.append(t, t[:32])), r"tensor '[BeA]' is .* asked for was"),
    "a factor with one component less": (first("factor", lambda t: t[32:]), r"tensor '[BeA]' is .* asked for was"),
    "a factor missing": (first("factor", lambda t: None), r"tensor '[BeA]' is missing"),
    "a factor of another dtype": (first("factor", lambda t: t.astype(np.float64)), r"is float64.*was float32"),
    "a factor with NaN": (first("factor", lambda t: np.full_like(t, np.nan)), r"tensor '[BeA]' holds NaN"),
    "a factor that does not go up": (more, r"tensors \['([BeA]|h\.more)'\] were not asked for"),
    "ids that are not planned": (more_ids, r"not asked for|at most|do not fit"),
    "a private part": (given("private/secret"), r"tensors \['private/secret'\] were not asked for"),
    "an array nobody wanted": (given("arrays.private"), r"'private': .* came back"),
    "an array missing": (first("array", lambda t: None), r"arrays \{\} came back, asked for were \{'\w+'"),
    "an array of another dtype": (first("array", lambda t: t.astype(np.float64)), r"'float64', .* came back"),
    "an array of another shape": (first("array", lambda t: t[:-1]), r"arrays .* came back, asked for were"),
    "another client's name": (told(client="c9"), r"an answer to .*'c9'"),
    "another round": (told(round=0), r"an answer to .*, 0, "),
    "another plan": (told(digest="0" * 16), r"an answer to .*'0000000000000000'"),
}  # fmt: skip


def test_a_reply_other_than_asked_for_is_refused_and_the_round_goes_on(method, tmp_path):
    """Three clients of every round send something else, while there is something else left to send."""
    left, reasons, travelled = dict(NOT_AS_ASKED), dict[tuple[int, str], str](), set[str]()

    def spoil(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        meta, tensors = unpack(frame)
        if meta["kind"] != "update" or name == toy.CLIENTS[meta["round"] % 4]:
            return [(name, frame)]
        travelled.update(n.partition(".")[0] for n in tensors)
        at = meta["round"], name
        for what, (change, reason) in left.items():
            other, copies = dict(meta), {n: t.copy() for n, t in tensors.items()}
            if change(other, copies):
                reasons[at] = reason
                del left[what]
                return [(name, toy.forced(other, copies))]
        return [(name, frame)]

    rows = {name: np.arange(8) for name in toy.CLIENTS}
    f = toy.federation(method, tmp_path / "run", rounds=6, shares=rows, carry=lambda e: toy.Tampering(e, spoil))
    events = f.play()
    failed = {(e["round"], e["client"]): e for e in events["client"] if not e["ok"]}
    assert failed.keys() == reasons.keys()
    for at, reason in reasons.items():
        assert re.search(reason, failed[at]["error"]), reason
        assert failed[at]["bytes_up"] > 0  # refused, but it travelled
    for row in events["round"]:
        bad = sum(round == row["round"] for round, _ in reasons)
        assert (row["clients_ok"], row["clients_failed"]) == (4 - bad, bad)
    # What is left is what such a method's replies have nothing of.
    parts = {"a factor ": {*FACTORS}, "an array ": {"arrays"}}
    assert all(what.startswith(tuple(part for part in parts if not travelled & parts[part])) for what in left)
    assert bool(travelled & {*FACTORS}) == bool({*plan_of(method).up} & {*FACTORS})


def rewritten(change: Callable[[dict, dict], None]) -> Callable[[str, bytes], list[tuple[str, bytes]]]:
    """Client c1's updates with this change to their facts and tensors."""

    def carry(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        meta, tensors = unpack(frame)
        if name == "c1" and meta["kind"] == "update":
            tensors = {n: t.copy() for n, t in tensors.items()}
            change(meta, tensors)
            frame = toy.forced(meta, tensors)
        return [(name, frame)]

    return carry


REFUSED: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "another run": (lambda m, t: m.update(run="theirs"), "an answer to"),
    "more examples than it registered": (lambda m, t: m.update(examples=1 << 52), "more than the client registered"),
    "a metric whose sums overflow": (lambda m, t: m.update(metrics={"loss": 1.7e308}), "metric"),
    "time that runs backwards": (lambda m, t: m.update(metrics={"device_seconds": -1.0}), "device_seconds"),
    "no examples": (lambda m, t: m.update(examples=0), "examples"),
    "a metric that is no number": (lambda m, t: m.update(metrics={"loss": "low"}), "metric"),
    "another kind": (lambda m, t: m.update(kind="evaluation"), "kind"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_odd_facts_are_refused_and_the_round_goes_on(what, tmp_path):
    change, reason = REFUSED[what]
    method = FedAvg()
    f = toy.federation(method, tmp_path / "run", rounds=1, carry=lambda e: toy.Tampering(e, rewritten(change)))
    events = f.play()
    (row,) = events["round"]
    assert (row["clients_ok"], row["clients_failed"]) == (3, 1)
    (bad,) = [e for e in events["client"] if not e["ok"]]
    assert bad["client"] == "c1"
    assert reason in bad["error"]
    assert "c1" not in f.last.seen


# ---- bad clients


def ill(name: str, work: Callable[..., Update]) -> Callable[[client.Site], client.Site]:
    """One client with other local training."""
    return lambda site: replace(site, fit=lambda job, observe=None: work(site, job)) if site.device.id == name else site


def raises(site: client.Site, job: Job) -> Update:
    raise MemoryError("out of memory at step 3")


def diverges(site: client.Site, job: Job) -> Update:
    return site.fit(replace(job, local=job.local.model_copy(update={"lr": 1e30, "clip": None, "epochs": 2})))


@pytest.mark.parametrize(
    ("work", "reason"),
    [(raises, "MemoryError: the message stays with the client"), (diverges, "a lower local.lr")],
)
def test_a_client_that_cannot_train_says_so_and_is_left_out(work, reason, tmp_path):
    f = toy.federation(FedAvg(), tmp_path / "run", rounds=2, alter=ill("c2", work))
    events = f.play()
    assert [(r["clients_ok"], r["clients_failed"]) for r in events["round"]] == [(3, 1), (3, 1)]
    bad = [e for e in events["client"] if not e["ok"]]
    assert [e["client"] for e in bad] == ["c2", "c2"]
    assert all(reason in e["error"] for e in bad)
    assert f.last.seen == {"c0": 2, "c1": 2, "c3": 2}


def test_an_update_that_holds_nan_is_not_sent(tmp_path):
    def poison(site: client.Site, job: Job) -> Update:
        update = site.fit(job)
        dense = {name: np.full_like(tensor, np.nan) for name, tensor in update.adapter.dense.items()}
        return replace(update, adapter=replace(update.adapter, dense=dense))

    f = toy.federation(FedAvg(), tmp_path / "run", rounds=1, alter=ill("c2", poison))
    (bad,) = [e for e in f.play()["client"] if not e["ok"]]
    assert "NaN" in bad["error"]
    assert all(np.isfinite(t).all() for t in toy.arrays(f.last.adapter).values())


def test_of_two_answers_the_first_counts(tmp_path, caplog):
    other: dict[str, bytes] = {}

    def twice(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        return [(name, frame), (name, other.setdefault(name, frame))]  # later rounds: an old answer comes again

    f = toy.federation(FedAvg(), tmp_path / "twice", carry=lambda e: toy.Tampering(e, twice))
    once = toy.federation(FedAvg(), tmp_path / "once")
    with caplog.at_level(logging.WARNING, "fedrank.server"):
        rows = f.play()["round"]
    once.play()
    assert [(r["clients_ok"], r["clients_failed"]) for r in rows] == [(4, 0)] * 3
    assert "not awaited" in caplog.text
    assert toy.equal(f.last, once.last)


def test_an_answer_to_another_round_counts_as_failed(tmp_path):
    first: dict[str, bytes] = {}

    def late(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        return [(name, first.setdefault(name, frame) if name == "c0" else frame)]

    f = toy.federation(FedAvg(), tmp_path / "run", carry=lambda e: toy.Tampering(e, late))
    events = f.play()
    assert [(r["clients_ok"], r["clients_failed"]) for r in events["round"]] == [(4, 0), (3, 1), (3, 1)]
    assert all("an answer to" in e["error"] for e in events["client"] if not e["ok"])
    assert f.last.seen["c0"] == 1


def test_answers_of_strangers_and_garbage_are_dropped(tmp_path):
    def odd(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        if name == "c0":
            return [("nobody", frame), ("../c0", frame), (name, b"garbage")]
        return [(name, frame[:-1] + bytes([frame[-1] ^ 1]) if name == "c1" else frame)]

    f = toy.federation(FedAvg(), tmp_path / "run", rounds=1, carry=lambda e: toy.Tampering(e, odd))
    events = f.play()
    assert {e["client"]: e["ok"] for e in events["client"]} == {"c0": False, "c1": False, "c2": True, "c3": True}
    assert "checksum" in next(e["error"] for e in events["client"] if e["client"] == "c1")


@pytest.mark.parametrize("metrics", [{"accuracy": 0.5}, {"accuracy": 0.5, "loss": 1.0, "rows": 0}, {"rows": 10}, {}])
def test_an_odd_evaluation_is_left_out_of_the_means(metrics, tmp_path):
    def odd(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        meta, tensors = unpack(frame)
        if name == "c1" and meta["kind"] == "evaluation":
            frame = pack(meta | {"metrics": metrics}, tensors)
        return [(name, frame)]

    f = toy.federation(FedAvg(), tmp_path / "run", rounds=1, carry=lambda e: toy.Tampering(e, odd))
    events = f.play()
    assert events["round"][0]["personal_clients"] == 3
    assert events["end"][0]["personal_clients"] == 3


def test_a_frame_for_another_client_or_model_is_refused(tmp_path):
    f = toy.federation(FedAvg(), tmp_path / "run")
    plan = Plan(train=everything(f.begin.adapter))
    frame = f.server.wire.request("train", "c0", plan, f.begin)
    with pytest.raises(wire.Refused, match="'c0' came to client 'c1'"):
        client.handle(frame, f.sites["c1"])
    theirs = replace(f.server.wire, spec=replace(f.server.wire.spec, fingerprint="other"))
    with pytest.raises(wire.Refused, match="base model"):
        client.handle(frame, replace(f.sites["c0"], wire=theirs))


# ---- the head, and what is a client's own


@pytest.mark.parametrize("head", ["train", "frozen", "own"])
@pytest.mark.parametrize("name", toy.FIRST)
def test_the_head_travels_only_where_it_is_common(head, name, tmp_path):
    f = toy.federation(build(name), tmp_path / "run", rounds=2, cohort=2, head=head)
    events = f.play()
    moved = any(np.any(t != f.begin.adapter.dense[n]) for n, t in f.last.adapter.dense.items())
    plan = plan_of(build(name))
    common = head == "train" and "h" in plan.up
    assert moved == common
    bytes_up = {e["head_bytes_up"] for e in events["client"]}
    size = sum(t.nbytes for t in f.begin.adapter.dense.values())
    assert bytes_up == ({size} if common else {0})
    down = [e["head_bytes_down"] for e in events["client"]]
    assert set(down) == ({size} if common else {0})  # each end has the initial head from its own model
    assert (events["round"][-1]["accuracy"] is None) == (head == "own" or bool(set(plan.own) & set("BeA")))
    if head == "own":
        heads = [own_head(f, c) for c, t in f.last.seen.items() if t == 2]
        assert np.any(heads[0] != heads[1])
        assert all(np.any(h != f.begin.adapter.dense["head.weight"]) for h in heads)


def own_head(f: toy.Federation, name: str) -> np.ndarray:
    return f.store.private.load(name, f.last.seen[name])["h/head.weight"]


def request(f: toy.Federation, name: str, plan: Plan, round: int) -> client.Request:
    state = replace(f.begin, round=round - 1)
    return f.server.wire.request("train", name, plan, state)


def test_a_redone_round_starts_from_the_version_the_server_names(tmp_path):
    """Private state is written under its round; `since` names the one to start from, never a newer one."""
    f = toy.federation(FedAvg(), tmp_path / "run", head="own")
    site, store = f.sites["c0"], f.store.private
    plan = Plan(train=everything(f.begin.adapter), up="BeA", down="BeA", own="h")
    client.handle(request(f, "c0", plan, 1), site)
    one = store.load("c0", 1)["h/head.weight"]
    assert store.load("c0", -1) is None
    answer = client.handle(request(f, "c0", replace(plan, since=1), 2), site)
    two = store.load("c0", 2)["h/head.weight"]
    assert np.any(one != two)
    # round 2 was lost on its way: it is played again, and again from version 1, which is still there
    again = client.handle(request(f, "c0", replace(plan, since=1), 2), site)
    np.testing.assert_array_equal(store.load("c0", 2)["h/head.weight"], two)
    assert without_seconds(again) == without_seconds(answer)
    # round 3 confirms 2: now 1 may go
    client.handle(request(f, "c0", replace(plan, since=2), 3), site)
    assert sorted(p.stem for p in (f.store.path / "clients" / "c0").iterdir()) == ["0002", "0003"]
    # its answer was lost: round 4 starts from 2, though 3 is there
    heads: list[np.ndarray] = []
    noted = replace(
        site, fit=lambda job, observe=None: (heads.append(job.adapter.dense["head.weight"]), site.fit(job))[1]
    )
    client.handle(request(f, "c0", replace(plan, since=2), 4), noted)
    np.testing.assert_array_equal(heads[0], two)
    # a frame that knows of no merged update starts afresh
    client.handle(request(f, "c0", plan, 5), noted)
    assert sorted(p.stem for p in (f.store.path / "clients" / "c0").iterdir()) == ["0005"]
    np.testing.assert_array_equal(heads[1], f.begin.adapter.dense["head.weight"])


def without_seconds(frame: bytes) -> tuple[dict, dict]:
    meta, tensors = unpack(frame)
    meta["metrics"].pop("seconds")
    return meta, {name: tensor.tobytes() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Shared:
    """A test's method in the shape of FedSA-LoRA: A is shared and averaged, B is each client's own.

    It counts in private how often a client trained, and reports the count.
    """

    down: str = "Ah"
    default_lr: ClassVar[float] = 1e-2

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.with_head(kaiming(spec.shapes, spec.rank, spec.scale, rng(seed, "begin"))))

    def plan(self, state: State, cohort: Any, seed: int) -> dict[str, Plan]:
        plan = Plan(
            everything(state.adapter), learn="BAh", up="Ah", down=self.down, own="B", returns={"count": ("int64", ())}
        )
        return dict.fromkeys(cohort, plan)

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            count = np.asarray(job.private.get("count", np.array(0)) + 1)
            yield replace(job.fit(job), arrays={"count": count}, private={"count": count, "secret": np.arange(7.0)})

    def merge(self, state: State, updates: Any) -> State:
        counts = {f"count/{name}": update.arrays["count"] for name, update in updates}
        return state.next(average(state.adapter, updates), arrays={**state.arrays, **counts})


@pytest.mark.parametrize("down", ["Ah", "BeAh"])  # a client's own factor never travels, whatever `down` says
def test_own_factors_and_private_state_stay_with_their_client(down, tmp_path):
    sent: list[bytes] = []

    def keep(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        sent.append(frame)
        return [(name, frame)]

    f = toy.federation(Shared(down), tmp_path / "run", cohort=3, carry=lambda e: toy.Tampering(e, keep))
    events = f.play()
    assert f.last.arrays.keys() == {f"count/{name}" for name in f.last.seen}
    for name in f.last.seen:
        times = sum(e["client"] == name for e in events["client"])
        assert f.last.arrays[f"count/{name}"] == times
    for name, block in f.last.adapter.blocks.items():
        assert not block.B.any()  # the server's B is as begun
        stored = [f.store.private.load(c, t)[f"B/{name}"] for c, t in f.last.seen.items()]
        assert all(b.any() for b in stored)
        assert np.any(stored[0] != stored[1])
    assert not any(np.arange(7.0).tobytes() in frame for frame in sent)
    assert not any("B" in unpack(frame)[1] for frame in sent)


def test_an_own_factor_goes_on_where_it_was(tmp_path):
    """What a client trains with in its second round is what it had after its first."""
    started: dict[tuple[int, str], Adapter] = {}

    def note(site: client.Site) -> client.Site:
        def fit(job: Job, observe: Any = None) -> Update:
            started[job.round, job.device.id] = job.adapter
            return site.fit(job, observe=observe)

        return replace(site, fit=fit)

    f = toy.federation(Shared(), tmp_path / "run", rounds=2, alter=note)
    playing = f.server.play(f.begin)
    next(e for e in playing if e["event"] == "round")
    kept = {name: f.store.private.load(name, 1) for name in toy.CLIENTS}
    between = f.last
    list(playing)
    for name in toy.CLIENTS:
        for module, block in started[2, name].blocks.items():
            assert not started[1, name].blocks[module].B.any()
            np.testing.assert_array_equal(block.B, kept[name][f"B/{module}"])
            np.testing.assert_array_equal(block.A, between.adapter.blocks[module].A)


def test_an_own_component_without_a_part_in_a_round_is_not_forgotten(tmp_path):
    f = toy.federation(Shared(), tmp_path / "run")
    site, store = f.sites["c0"], f.store.private
    module = next(iter(f.begin.adapter.blocks))
    every = {module: np.arange(4)}
    plan = Plan(every, learn="BAh", up="Ah", down="Ah", own="B", returns={"count": ("int64", ())})
    client.handle(request(f, "c0", plan, 1), site)
    one = store.load("c0", 1)
    # round 2: two learn, one is frozen, one is away
    some = replace(plan, train={module: np.array([0, 2])}, frozen={module: np.array([3])}, since=1)
    client.handle(request(f, "c0", some, 2), site)
    two = store.load("c0", 2)
    np.testing.assert_array_equal(two[f"ids/{module}"], np.arange(4))
    same = np.all(one[f"B/{module}"] == two[f"B/{module}"], axis=0)
    assert same.tolist() == [False, True, False, True]
    meta, _ = unpack(client.handle(request(f, "c0", replace(plan, since=2), 3), site))
    assert meta["kind"] == "update"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("factor", "Bh")
def test_private_factors_that_are_gone_are_missed(factor, kind, tmp_path):
    """A lost private store is an error of that client, not a silent start from the beginning."""
    f = toy.federation(FedAvg(), tmp_path / "run")
    site, present = f.sites["c0"], everything(f.begin.adapter)
    rest = "BeAh".replace(factor, "")
    plan = Plan(present, own=factor, up=rest, down=rest)
    client.handle(request(f, "c0", plan, 1), site)
    plan = replace(plan, since=1)
    if kind == "evaluate":
        plan = replace(plan, train={}, frozen=present, learn="", up="")
    ask = f.server.wire.request(kind, "c0", plan, replace(f.begin, round=1))
    assert unpack(client.handle(ask, site))[0]["kind"] != "error"
    for file in (site.private.root / "c0").iterdir():
        file.unlink()
    meta, _ = unpack(client.handle(ask, site))
    assert f"factors {factor} do not travel" in meta["error"]
    assert "no version of round 1" in meta["error"]


@dataclass(frozen=True)
class Late(FedAvg):
    """A test's method whose private B learns from the second round on."""

    def plan(self, state, cohort, seed):
        learn = "Ah" if state.round < 1 else "BAh"
        return dict.fromkeys(cohort, Plan(everything(state.adapter), learn=learn, up="Ah", down="Ah", own="B"))


@dataclass(frozen=True)
class Waiting(FedAvg):
    """A test's method that freezes A and gives no one a component before the second round."""

    def plan(self, state, cohort, seed):
        train = everything(state.adapter) if state.round else {}
        return dict.fromkeys(cohort, Plan(train, learn="Bh", up="Bh", down="Bh"))


@pytest.mark.parametrize("method", [Late(), Waiting()])
def test_a_client_that_had_nothing_to_keep_misses_nothing(method, tmp_path):
    f = toy.federation(method, tmp_path / "run", rounds=3)
    assert [(e["clients_ok"], e["clients_failed"]) for e in f.play()["round"]] == [(4, 0)] * 3


def test_a_factor_that_is_sent_once_is_kept_as_it_came(tmp_path):
    """FFA-LoRA's A: not private, but it travels only on first contact."""
    f = toy.federation(Shared(), tmp_path / "run")
    site, module = f.sites["c0"], next(iter(f.begin.adapter.blocks))
    first = Plan(
        {module: np.array([0, 1])},
        {module: np.array([2])},
        learn="B",
        up="B",
        down="B",
        returns={"count": ("int64", ())},
    )
    state = replace(
        f.begin, adapter=replace(f.begin.adapter, dense={k: v + 1 for k, v in f.begin.adapter.dense.items()})
    )
    jobs: list[Job] = []
    noted = replace(site, fit=lambda job, observe=None: (jobs.append(job), site.fit(job))[1])
    client.handle(f.server.wire.request("train", "c0", first, state), noted)
    again = replace(first, since=1)
    assert again.sent == "B"
    answer = client.handle(f.server.wire.request("train", "c0", again, replace(state, round=1)), noted)
    assert unpack(answer)[0]["kind"] == "update"
    for name, tensor in jobs[1].adapter.dense.items():
        np.testing.assert_array_equal(tensor, state.adapter.dense[name])
    np.testing.assert_array_equal(jobs[1].adapter.blocks[module].A, f.begin.adapter.blocks[module].A[:3])


@dataclass(frozen=True)
class Chosen:
    """A test's method in which a client returns the `count` components whose e moved most."""

    count: int = 5
    returned: int = 5
    default_lr: ClassVar[float] = 1e-2

    def begin(self, spec: ModelSpec, rounds: int, seed: int) -> State:
        return State(0, rounds, spec.with_head(gaussian(spec.shapes, spec.rank, spec.scale, rng(seed, "begin"))))

    def plan(self, state: State, cohort: Any, seed: int) -> dict[str, Plan]:
        return dict.fromkeys(cohort, Plan(everything(state.adapter), select=self.count))

    def train(self, jobs: Iterable[Job]) -> Iterable[Update]:
        for job in jobs:
            update = job.fit(job)
            moved = {n: np.abs(b.e - job.adapter.blocks[n].e) for n, b in update.adapter.blocks.items()}
            edge = np.sort(np.concatenate(list(moved.values())))[-self.returned]
            ids = {n: update.adapter.blocks[n].ids[size >= edge] for n, size in moved.items()}
            yield replace(update, adapter=update.adapter.take(ids))

    def merge(self, state: State, updates: Any) -> State:
        return state.next(average(state.adapter, updates, absent="old"))


def test_a_client_may_return_a_subset_of_the_size_asked_for(tmp_path):
    f = toy.federation(Chosen(), tmp_path / "run", rounds=1)
    events = f.play()
    assert events["round"][0]["clients_ok"] == 4
    changed = [int(np.sum(block.e != f.begin.adapter.blocks[name].e)) for name, block in f.last.adapter.blocks.items()]
    assert 5 <= sum(changed) <= 20
    assert all(e["adapter_bytes_up"] < e["adapter_bytes_down"] / 5 for e in events["client"])


def test_a_subset_of_another_size_is_refused(tmp_path):
    f = toy.federation(Chosen(returned=6), tmp_path / "run", rounds=1)
    events = f.play()
    assert events["round"][0]["clients_failed"] == 4
    assert all("asked for were at most 5" in e["error"] for e in events["client"])


def test_a_plan_that_leaves_a_client_out_is_the_methods_fault(tmp_path):
    @dataclass(frozen=True)
    class Forgetful(Chosen):
        def plan(self, state: State, cohort: Any, seed: int) -> dict[str, Plan]:
            return dict(list(super().plan(state, cohort, seed).items())[1:])

    f = toy.federation(Forgetful(), tmp_path / "run", rounds=1)
    with pytest.raises(ValueError, match=r"Forgetful\.plan left out clients \['c0'\]"):
        f.play()


@dataclass(frozen=True)
class Resting(FedAvg):
    """A test's method that has no part for c3."""

    def plan(self, state, cohort, seed):
        return {**super().plan(state, cohort, seed), "c3": None}


def test_a_client_without_a_part_sits_the_round_out(tmp_path):
    """It is sent nothing and counted, and is evaluated like the others."""
    sent: list[str] = []

    def note(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        sent.append(name)
        return [(name, frame)]

    f = toy.federation(Resting(), tmp_path / "run", rounds=1, carry=lambda e: toy.Tampering(e, note))
    events = f.play()
    (row,) = events["round"]
    assert (row["clients_ok"], row["clients_failed"], row["clients_out"]) == (3, 0, 1)
    assert [e["client"] for e in events["client"]] == ["c0", "c1", "c2"]
    assert sent.count("c3") == sent.count("c0") - 1
    assert row["personal_clients"] == 4
    assert f.last.seen == {"c0": 1, "c1": 1, "c2": 1}


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=toy.EXHAUSTIVE), "int8"])
@pytest.mark.parametrize("name", toy.FIRST)
def test_low_precision_learns_and_repeats(name, dtype, tmp_path):
    runs = [toy.federation(build(name), tmp_path / str(i), rounds=2, cohort=2, dtype=dtype) for i in range(2)]
    rows = [run.play()["round"] for run in runs]
    assert rows[0][-1]["clients_ok"] == 2
    assert rows[0][-1]["train_loss"] < rows[0][0]["train_loss"]
    assert toy.equal(runs[0].last, runs[1].last)
