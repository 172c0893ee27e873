"""Robust aggregation: medians, trimmed means and Krum by hand, what hostile clients cannot move, and who is refused."""

import io
import json
import shutil
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import fedrank
import toy
from fedrank import ledger, methods, robust, views
from fedrank.adapter import Adapter, Block, from_rows, to_rows
from fedrank.aggregation import average, uniform, vote
from fedrank.client import Site
from fedrank.config import AttackSettings, ServerSettings
from fedrank.engines.attack import attackers, distort
from fedrank.methods.fedara import FedARA
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import Plan, State, Update
from fedrank.selection import everything
from fedrank.training import rehearsal

MEDIAN, TRIMMED = ServerSettings(aggregation="median"), ServerSettings(aggregation="trimmed_mean", hostile=1)
RULES = {
    "median": MEDIAN, "trimmed_mean": TRIMMED, "krum": ServerSettings(aggregation="krum", hostile=1),
    "multi_krum": ServerSettings(aggregation="multi_krum", hostile=1),
}  # fmt: skip
SCALED = AttackSettings(share=0.2, kind="scale", factor=100)
FLIPPED = AttackSettings(share=0.2, kind="sign_flip", factor=3)


def one(values: dict[int, float] | float, head: float = 0.0) -> Adapter:
    """A module of components of which every number is this one, by id; a number alone is of one component."""
    values = values if isinstance(values, dict) else {0: values}
    ids, row = np.array(sorted(values), int), np.array([values[i] for i in sorted(values)], float)
    block = Block(ids, np.tile(row, (3, 1)), row, np.tile(row[:, None], (1, 2)))
    return Adapter({"m": block} if values else {}, 1.0, {"head": np.full((2, 2), head)})


def arrived(*adapters: Adapter, examples: Any = lambda at: 1 + 7 * at) -> toy.Arrived:
    return toy.Arrived({f"c{at}": Update(adapter, examples(at)) for at, adapter in enumerate(adapters)})


def numbers(adapter: Adapter) -> dict[int, float]:
    """The inverse of `one`: each component's number, which all of its rows must be."""
    found: dict[int, float] = {}
    for name, (ids, rows) in to_rows(adapter).items():
        for i, row in zip(ids.tolist(), rows, strict=True):
            (value,) = set(np.unique(row).tolist())
            if not name.startswith("h/"):
                assert found.setdefault(i, value) == value
    return found


# ---- centres by hand


@pytest.mark.parametrize(
    ("rule", "values", "centre"),
    [
        (MEDIAN, [5.0], 5), (MEDIAN, [5.0, -1.0], 2), (MEDIAN, [5.0, -1.0, 1e30], 5), (MEDIAN, [1.0, 9.0, 2.0, -1e30], 1.5),
        (TRIMMED, [1.0, 2.0, 6.0], 2), (TRIMMED, [1e30, 1.0, -1e30, 2.0, 6.0], 3), (TRIMMED, [4.0, 1e30, 1.0, 2.0], 3),
        (ServerSettings(aggregation="trimmed_mean", hostile=2), [7.0, 1.0, 2.0, 4.0, 9.0, 3.0], 3.5),
    ],
)  # fmt: skip
def test_a_centre_by_hand(rule: ServerSettings, values: list[float], centre: float) -> None:
    """Whatever the clients' examples: a claim of many would be a way round."""
    updates = arrived(*(one(v, head=-v) for v in values))
    mean = average(one(77.0), robust.centred(updates, rule))
    assert numbers(mean) == {0: centre}
    assert np.unique(mean.dense["head"]) == -centre


def test_components_that_few_carry() -> None:
    """Component 0 is carried by four, 1 by three, 2 by two, 3 by one: cut to the middle where there are too few."""
    updates = arrived(one({0: 1, 1: 10, 2: 4, 3: 8}), one({0: 2, 1: 20, 2: 8}), one({0: 6, 1: 90}), one({0: 1e9}))
    old = one({0: 0, 1: 0, 2: 0, 3: 0, 4: 5})
    for rule in (MEDIAN, TRIMMED):
        found = robust.centred(updates, rule)
        assert numbers(average(old, found)) == {0: 4, 1: 20, 2: 6, 3: 8, 4: 5}
        # The zeros of padding are no votes: of the carriers' centre their share of the round is left.
        assert numbers(average(old, found, absent="zero")) == {0: 4, 1: 15, 2: 3, 3: 2, 4: 5}
        total = found.total(lambda update: update.adapter, lambda update: 100.0)
        assert total.weights["m"].tolist() == [4, 3, 2, 1]
        assert (total.weight, float(total.weights["head"])) == (4, 4)
    assert numbers(average(one({0: 1, 1: 8}), robust.centred(updates, MEDIAN), absent="old"))[1] == (3 * 20 + 8) / 4


def test_a_part_of_a_module_that_some_lack_is_refused() -> None:
    whole = one(1.0)
    with pytest.raises(ValueError, match="factor e is in some updates"):
        average(whole, robust.centred(arrived(whole, whole.only("BA"), whole), MEDIAN))


@settings(deadline=None)
@given(st.permutations(range(5)), st.sampled_from([MEDIAN, TRIMMED]))
def test_the_order_of_clients_does_not_matter(order: list[int], rule: ServerSettings) -> None:
    spec = toy.small(rank=3)
    adapters = [toy.drawn(spec, at) for at in range(5)]
    adapters[1] = adapters[1].take({"0.m": np.array([0, 2])})
    adapters[3] = adapters[0]
    old = toy.drawn(spec, 9)
    found = [average(old, robust.centred(arrived(*some), rule)) for some in (adapters, [adapters[at] for at in order])]
    assert toy.same(*found)


@pytest.mark.parametrize("held", [0, 400, 1 << 28])
def test_what_is_held_at_once_changes_no_bit(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no more than was said: at 400 bytes of float64 five clients' factors come in several lots, at 0 one by one."""
    spec, passes = toy.small(rank=3), 0
    updates = arrived(*(toy.drawn(spec, at) for at in range(5)))
    plain = average(toy.drawn(spec, 9), robust.centred(updates, MEDIAN))

    class Counted(toy.Arrived):
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            return super().__iter__()

    monkeypatch.setattr(robust, "HELD", held)
    assert toy.same(plain, average(toy.drawn(spec, 9), robust.centred(Counted(updates.updates), MEDIAN)))
    # Once for who carries what; then B, e, A of two modules and the head, of 120 to 360 bytes of all five.
    assert passes == 1 + {0: 7, 400: 5, 1 << 28: 1}[held]


# ---- what hostile clients cannot move

finite = st.floats(-1e6, 1e6)
wild = st.one_of(finite, st.sampled_from([-1e38, 1e38]))


@settings(deadline=None)
@given(
    st.lists(finite, min_size=3, max_size=6), st.lists(wild, max_size=2), st.sampled_from(["median", "trimmed_mean"])
)
def test_fewer_hostile_than_half_stay_within_the_range_of_the_honest(
    honest: list[float], hostile: list[float], kind: str
) -> None:
    f = len(hostile)
    count = {"trimmed_mean": max(f, 1)}.get(kind)
    if len(honest) <= f or (kind == "trimmed_mean" and len(honest) + f < 2 * max(f, 1) + 1):
        return
    rule = ServerSettings(aggregation=kind, hostile=count)
    found = numbers(average(one(0.0), robust.centred(arrived(*map(one, honest + hostile)), rule)))[0]
    slack = 1e-12 * max(map(abs, honest))
    assert min(honest) - slack <= found <= max(honest) + slack


@pytest.mark.parametrize("far", [1e3, 1e9, 1e37])
def test_the_mean_goes_wherever_one_client_wants(far: float) -> None:
    honest = [1.0, 2.0, 3.0, 4.0]
    updates = arrived(*map(one, [*honest, far]), examples=lambda at: 1)
    assert numbers(average(one(0.0), updates))[0] == pytest.approx(far / 5, rel=0.02)
    assert numbers(average(one(0.0), robust.centred(updates, MEDIAN))) == {0: 3.0}
    assert numbers(average(one(0.0), robust.centred(updates, TRIMMED))) == {0: 3.0}
    for kind in ("krum", "multi_krum"):
        assert "c4" in robust.screen(updates, one(0.0), RULES[kind])
    assert robust.screen(updates, one(0.0), ServerSettings(max_norm_ratio=10)).keys() == {"c4"}


# ---- who is refused


def test_krum_by_hand() -> None:
    """0, 1, 3, 6, 100 with f = 1: the two nearest of each; every coordinate counts the same here, 8 beside the head.

    1 + 9, 1 + 4, 4 + 9, 9 + 25, 94^2 + 97^2, by the head's four and the module's six numbers ten times.
    """
    updates = arrived(*(one(v, head=v) for v in (0.0, 1.0, 3.0, 6.0, 100.0)))
    adapter = one(-5.0, head=2.0)
    changed = partial(robust.change, adapter)
    squared = robust.squared_distances(updates, changed)
    assert squared[1].tolist() == [10.0, 0.0, 40.0, 250.0, 98010.0]
    assert robust.krum_scores(squared, 1).tolist() == [100.0, 50.0, 130.0, 340.0, 10.0 * (94**2 + 97**2)]
    refused = robust.screen(updates, adapter, RULES["krum"])
    assert refused.keys() == {"c0", "c2", "c3", "c4"}
    assert refused["c2"] == (
        "server.aggregation=krum takes 1 of 5 updates, whose scores are at most 50; this one's is 130"
    )
    refused = robust.screen(updates, adapter, RULES["multi_krum"])
    assert refused == {
        "c4": "server.aggregation=multi_krum takes 4 of 5 updates, whose scores are at most 340; this one's is 1.824e+05"
    }


def test_of_equal_scores_the_first_is_taken() -> None:
    updates = arrived(*map(one, (3.0, 3.0, 3.0, 3.0, 3.0)))
    assert robust.screen(updates, one(0.0), RULES["krum"]).keys() == {"c1", "c2", "c3", "c4"}
    assert robust.screen(updates, one(0.0), RULES["multi_krum"]).keys() == {"c4"}


def test_what_a_client_lacks_it_does_not_change() -> None:
    """Against 5, a component of 5 is as good as none, for distances and norms."""
    adapter = one({0: 5, 1: 5})
    some = arrived(one({0: 6}), one({0: 5, 1: 5}), one({0: 6, 1: 5}), one({1: 8}), one({}))
    full = arrived(*(one({0: a, 1: b}) for a, b in ((6, 5), (5, 5), (6, 5), (5, 8), (5, 5))))
    changed = partial(robust.change, adapter)
    squared = robust.squared_distances(some, changed)
    np.testing.assert_array_equal(squared, robust.squared_distances(full, changed))
    assert squared[0].tolist() == [0, 6, 0, 6 * (1 + 9), 6]  # a component has six numbers
    sizes = [robust.norm(changed(update)) ** 2 for _, update in some]
    np.testing.assert_allclose(sizes, [6, 0, 6, 54, 0], rtol=1e-15)


def test_bounds_on_the_norm_by_hand() -> None:
    """Changes of 1, 2, 3 and 12 in ten numbers each, of norms that times the root of ten; the median is 2.5 times it."""
    updates, adapter = arrived(*(one(v, head=v) for v in (8.0, 5.0, 10.0, 19.0))), one(7.0, head=7.0)
    root = 10**0.5
    assert robust.screen(updates, adapter, ServerSettings()) == {}
    assert robust.screen(updates, adapter, ServerSettings(max_norm=2.1 * root)) == {
        "c2": "its change has norm 9.487, above server.max_norm=6.64078", "c3": "its change has norm 37.95, above server.max_norm=6.64078",
    }  # fmt: skip
    assert robust.screen(updates, adapter, ServerSettings(max_norm_ratio=4.7)) == {
        "c3": "its change has norm 37.95, above server.max_norm_ratio=4.7 times 7.906, the median of the round"
    }
    assert robust.screen(updates, adapter, ServerSettings(max_norm_ratio=4.81)) == {}
    both = robust.screen(updates, adapter, ServerSettings(max_norm=1e-9, max_norm_ratio=4.7))
    assert both.keys() == {"c0", "c1", "c2", "c3"}


def test_nobody_who_changed_nothing_is_refused() -> None:
    updates = arrived(one(7.0), one(7.0), one(7.0))
    assert robust.screen(updates, one(7.0), ServerSettings(max_norm=1e-9, max_norm_ratio=1.1)) == {}


def test_krum_is_among_those_whose_norms_pass() -> None:
    updates = arrived(*map(one, (1.0, 1.1, 1.2, 1.5, 1.6, 900.0)))
    rule = ServerSettings(aggregation="multi_krum", hostile=1, max_norm_ratio=10)
    refused = robust.screen(updates, one(0.0), rule)
    assert refused.keys() == {"c4", "c5"}
    assert "takes 4 of 5 updates" in refused["c4"]
    assert "server.max_norm_ratio=10 times" in refused["c5"]


@pytest.mark.parametrize(("kind", "needed"), [("krum", 5), ("multi_krum", 5), ("trimmed_mean", 3)])
def test_of_too_few_a_rule_takes_none(kind: str, needed: int) -> None:
    rule = RULES[kind]
    assert robust.least(rule) == needed
    refused = robust.screen(arrived(*map(one, range(1, needed))), one(0.0), rule)
    assert len(refused) == needed - 1
    why = f"server.aggregation={kind} with server.hostile=1 needs {needed} updates, there are {needed - 1}"
    assert set(refused.values()) == {why}
    assert len(robust.screen(arrived(*map(one, range(needed))), one(0.0), rule)) < needed


# ---- in a run

SIX = {f"c{at}": np.arange(at * 10, at * 10 + 10) for at in range(6)}


def federation(method: Any, path: Path, rule: ServerSettings, attack: AttackSettings | None = None, **more: Any) -> Any:  # fmt: skip
    """Six clients, of which c4 is hostile where there is an attack."""

    def alter(site: Site) -> Site:
        hostile = attack is not None and site.device.id == "c4"
        return replace(site, attack=partial(distort, attack)) if hostile else site

    f = toy.federation(method, path, cohort=6, shares=SIX, alter=alter, **more)
    return replace(f, server=replace(f.server, optimizer=rule))


def test_a_refused_client_is_named_and_is_as_if_it_had_not_answered(tmp_path: Path) -> None:
    """In the ledger and to those who watch; the states are, to the bit, those of a run where its answers are lost."""
    f = federation(FedAvg(), tmp_path / "run", ServerSettings(max_norm_ratio=5), SCALED)
    events = f.play()
    rows = [row for row in ledger.read(f.store.path / "clients.jsonl") if not row["ok"]]
    assert [(row["round"], row["client"]) for row in rows] == [(1, "c4"), (2, "c4"), (3, "c4")]
    for row, event in zip(rows, events["refused"], strict=True):
        assert row["error"].startswith("refused: its change has norm ")
        assert "above server.max_norm_ratio=5 times" in row["error"]
        assert event == {"event": "refused", "round": row["round"], "client": "c4", "error": row["error"]}
        assert row["device_seconds"] > 0  # it was waited for
    assert [(row["clients_ok"], row["clients_failed"]) for row in events["round"]] == [(5, 1)] * 3
    assert all(row["round_seconds"] >= cut["device_seconds"] for row, cut in zip(events["round"], rows, strict=True))
    assert "c4" not in f.last.seen

    def lose(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        return [] if name == "c4" else [(name, frame)]

    lost = federation(FedAvg(), tmp_path / "lost", ServerSettings(), carry=lambda e: toy.Tampering(e, lose))
    lost.play()
    assert all(toy.equal(f.states[t], lost.states[t]) for t in (1, 2, 3))


@pytest.mark.parametrize(
    ("kind", "error"), [("refused", "refused: its change has norm 38"), ("not_merged", "not merged: fewer answered")]
)
def test_a_refusal_is_shown(kind: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(views, "Console", lambda: Console(file=screen, force_terminal=True, width=160))
    event = {"event": kind, "round": 3, "client": "c4", "error": error}
    showing = views.VIEWS[views.Output.live](iter([event]))
    assert next(showing) == event
    showing.close()
    assert f"round 3: client c4 {error}" in screen.getvalue()


def test_a_method_asks_for_the_share_of_votes_not_for_their_middle() -> None:
    masks = ([1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0])
    updates = toy.Arrived({
        f"c{at}": Update(one(float(at)), 1 + at, arrays={"keep": np.packbits(mask)}) for at, mask in enumerate(masks)
    })  # fmt: skip
    for rule in RULES.values():
        assert vote(robust.centred(updates, rule, ["keep"]), "keep", 4).tolist() == [0.8, 0.6, 0.4, 0.0]


@dataclass(frozen=True)
class Counting(FedARA):
    """It compares the share of votes with its clients' masks, counted one by one."""

    def merge(self, state: State, updates: Any) -> State:
        merged, count = super().merge(state, updates), state.adapter.components
        if self.budget(state) is None:
            return merged
        share = np.mean([np.unpackbits(update.arrays["keep"], count=count) for _, update in updates], axis=0)
        apart = float(np.abs(vote(updates, "keep", count) - share).max())
        return replace(merged, metrics={"apart": apart, "split": float(np.mean((share > 0) & (share < 1)))})


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_fedara_counts_votes_where_a_centre_is_taken(kind: str, tmp_path: Path) -> None:
    f = federation(Counting(target_rank=1, warmup=0.0, settle=0.0), tmp_path / "run", RULES[kind], rounds=2)
    f.play()
    assert f.last.metrics["apart"] < 1e-12
    assert f.last.metrics["split"] > 0  # so that the middle would be another


# ---- numbers that no client learns, and merges that are not finite


ADAM = ServerSettings(optimizer="fedadam", lr=0.01)
FINITE = [
    ("fedavg", ADAM),
    ("flexlora", ServerSettings()),
    ("flora", ServerSettings()),
    ("fedex_lora", ServerSettings()),
]


@pytest.mark.parametrize(("name", "rule"), FINITE, ids=[name for name, _ in FINITE])
def test_one_who_sends_numbers_that_overflow_is_refused_and_the_round_goes_on(
    name: str, rule: ServerSettings, tmp_path: Path
) -> None:
    f = federation(methods.build({"name": name}), tmp_path / "run", rule, SCALED.model_copy(update={"factor": 1e30}))
    events = f.play()
    rows = [row for row in ledger.read(f.store.path / "clients.jsonl") if not row["ok"]]
    assert [(row["round"], row["client"]) for row in rows] == [(1, "c4"), (2, "c4"), (3, "c4")]
    assert all(row["error"].endswith("; an update's are at most 1e+06") for row in rows)
    assert [row["clients_ok"] for row in events["round"]] == [5, 5, 5]
    assert "c4" not in f.last.seen


@pytest.mark.parametrize(("name", "rule"), FINITE, ids=[name for name, _ in FINITE])
def test_the_largest_numbers_that_pass_end_no_run(name: str, rule: ServerSettings, tmp_path: Path) -> None:
    """The model is lost, which no bound but one on lengths prevents; the rounds are played."""
    f = federation(methods.build({"name": name}), tmp_path / "run", rule)

    def attack(job: Any, update: Update) -> Update:
        rows = {name: np.full_like(own, robust.LARGEST) for name, (_, own) in to_rows(update.adapter).items()}
        return replace(update, adapter=from_rows(update.adapter, rows))

    f.sites["c4"] = replace(f.sites["c4"], attack=attack)  # type: ignore[index]
    with np.errstate(over="ignore", invalid="ignore"):  # in the scores of what is lost
        events = f.play()
    assert [row["round"] for row in events["round"]] == [1, 2, 3]
    assert events["round"][0]["clients_ok"] == 6
    assert f.last.round == 3


@dataclass(frozen=True)
class Overflowing(FedAvg):
    """In round 2 a part of what it makes is not finite."""

    part: str = "adapter"

    def merge(self, state: State, updates: Any) -> State:
        merged = super().merge(state, updates)
        if state.round != 1:
            return merged
        wrong = merged.adapter.astype(np.float64)
        wrong = from_rows(wrong, {name: rows * 1e300 * 1e300 for name, (_, rows) in to_rows(wrong).items()})
        return {
            "adapter": replace(merged, adapter=wrong), "base": replace(merged, base_updates={2: wrong}),
            "arrays": replace(merged, arrays={"mine": np.array([1.0, np.inf])}),
        }[self.part]  # fmt: skip


@pytest.mark.parametrize("part", ["adapter", "base", "arrays"])
def test_a_merge_that_is_not_finite_is_a_round_that_merges_nothing(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    f = federation(Overflowing(part=part), tmp_path / "run", ServerSettings())
    events = f.play()
    everyone = [(2, f"c{at}", "refused: the merge was not finite") for at in range(6)]
    rows = [row for row in ledger.read(f.store.path / "clients.jsonl") if not row["ok"]]
    assert [(row["round"], row["client"], row["error"]) for row in rows] == everyone
    assert [(row["round"], row["client"], row["error"]) for row in events["refused"]] == everyone
    assert [(row["clients_ok"], row["clients_failed"]) for row in events["round"]] == [(6, 0), (0, 6), (6, 0)]
    assert "round 2: Overflowing.merge made NaN or infinity in ['" in caplog.text
    before, void, after = f.states[1], f.states[2], f.states[3]
    assert toy.equal(replace(before, round=2, metrics={}), void)
    assert set(after.seen.values()) == {3}
    assert not toy.same(after.adapter, before.adapter)


def test_what_a_server_optimizer_keeps_is_finite(tmp_path: Path) -> None:
    """tau^2 = 1e60 is none of float32's numbers, where the step itself is 0."""
    f = federation(FedAvg(), tmp_path / "run", ServerSettings(optimizer="fedadam", tau=1e30), rounds=1)
    events = f.play()
    assert {event["error"] for event in events["refused"]} == {"refused: the merge was not finite"}
    assert f.last.arrays == {}


# ---- claims of many examples


def test_a_claim_of_many_examples_counts_for_as_many_as_are_set(tmp_path: Path) -> None:
    """All have ten; on Flower a site says by itself how many it registers."""
    many = 1 << 52

    def played(name: str, lie: bool, most: int | None) -> Any:
        def alter(site: Site) -> Site:
            if not lie or site.device.id != "c4":
                return site
            device = replace(site.device, examples=many)
            return replace(site, device=device, attack=lambda job, update: replace(update, examples=many))

        f = toy.federation(FedAvg(), tmp_path / name, cohort=6, shares=SIX, alter=alter, rounds=1)
        f = replace(f, server=replace(f.server, optimizer=ServerSettings(max_examples=most)))
        f.play()
        return f

    honest, believed, capped = played("honest", False, None), played("lie", True, None), played("capped", True, 10)
    assert toy.same(capped.last.adapter, honest.last.adapter)
    assert not toy.same(believed.last.adapter, honest.last.adapter)
    examples = [row["examples"] for row in ledger.read(capped.store.path / "clients.jsonl")]
    assert examples == [10] * 6
    assert ledger.read(capped.store.path / "clients.jsonl")[4]["ok"]
    assert toy.same(played("all", False, 3).last.adapter, honest.last.adapter)  # then they count alike


def test_private_state_goes_on_from_the_last_merge(tmp_path: Path) -> None:
    """FedSA-LoRA's clients keep B; c4 is honest in round 1 and refused from round 2 on."""
    f = federation(methods.build({"name": "fedsa_lora"}), tmp_path / "run", ServerSettings(max_norm_ratio=5))

    def attack(job: Any, update: Update) -> Update:
        return distort(SCALED, job, update) if job.round > 1 else update

    sites = f.sites
    sites["c4"] = replace(sites["c4"], attack=attack)  # type: ignore[index]
    since = []
    f.play(watch=lambda e: since.append(f.last.seen.get("c4")) if e["event"] == "cohort" else None)
    assert since == [None, 1, 1]
    kept = sorted(int(path.stem) for path in (f.store.path / "clients" / "c4").glob("*.safetensors"))
    assert kept == [1, 3]  # what it starts from, and what a redone round 3 would write again


def test_a_round_in_which_all_are_refused_goes_on(tmp_path: Path) -> None:
    f = federation(FedAvg(), tmp_path / "run", ServerSettings(max_norm=1e-9), rounds=2)
    rows = f.play()["round"]
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows] == [(0, 6)] * 2
    assert toy.same(f.last.adapter, f.begin.adapter)
    assert f.last.round == 2
    assert f.last.seen == {}


@dataclass(frozen=True)
class Voting(FedAvg):
    """It counts who is asked in its merge, beside the mean."""

    def merge(self, state: State, updates: Any) -> State:
        merged = super().merge(state, updates)
        return replace(merged, metrics={"voters": float(sum(1 for _ in updates)), "there": float(len(updates))})


@pytest.mark.parametrize("kind", RULES)
def test_who_is_refused_has_no_vote(kind: str, tmp_path: Path) -> None:
    f = federation(Voting(), tmp_path / "run", bounded(RULES[kind]), SCALED, rounds=1)
    f.play()
    voters = {"krum": 1, "multi_krum": 4}.get(kind, 5)
    assert (f.last.metrics["voters"], f.last.metrics["there"]) == (voters, voters)


def bounded(rule: ServerSettings) -> ServerSettings:
    return rule.model_copy(update={"max_norm_ratio": 5.0})


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The loss that a rule ends with under an attack; each pair is played once."""

    @cache
    def played(kind: str, attack: str) -> float:
        path = tmp_path_factory.mktemp("attacked") / "run"
        by = {"none": None, "scale": SCALED, "sign_flip": FLIPPED}[attack]
        f = federation(FedAvg(), path, RULES.get(kind, ServerSettings()), by, rounds=4, epochs=3)
        return float(f.play()["round"][-1]["loss"])

    return played


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("attack", ["scale", pytest.param("sign_flip", marks=toy.EXHAUSTIVE)])
def test_a_run_stands_an_attack(kind: str, attack: str, loss: Any) -> None:
    """Undefended, one client of six throws the run back; each rule ends nearer to the run without it."""
    assert loss("mean", attack) > loss("mean", "none") + 0.1
    assert loss(kind, attack) < (loss("mean", "none") + loss("mean", attack)) / 2


QUICK = [("fedavg", "median"), ("fedavg", "multi_krum"), ("fedara", "trimmed_mean")]
AVERAGE = [name for name in methods.names() if methods.find(name).about.averages]
EACH = [pytest.param(*case, marks=[] if case in QUICK else toy.EXHAUSTIVE) for case in product(AVERAGE, RULES)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), EACH)
def test_a_run_learns_and_resumes_to_the_same_bits(name: str, kind: str, tmp_path: Path) -> None:
    """Every method that averages, with every rule, bounds, and one hostile client."""
    method = methods.build({"name": name, **({"target_rank": 1} if name == "fedara" else {})})
    make = partial(federation, method, rule=bounded(RULES[kind]), attack=SCALED, rounds=3)
    f = make(path=tmp_path / "run")
    f.server.store.save_state(f.begin, {})
    playing = f.server.play(f.begin)
    rows = [next(e for e in playing if e["event"] == "round")]
    shutil.copytree(f.store.path, tmp_path / "stopped")
    rows += [e for e in playing if e["event"] == "round"]
    again = make(path=tmp_path / "stopped")
    again.play(again.last)
    assert toy.equal(again.last, f.last)
    assert again.private == f.private
    refused = [r for r in ledger.read(f.store.path / "clients.jsonl") if r["client"] == "c4" and not r["ok"]]
    assert len(refused) == 3
    assert rows[-1]["clients_ok"] == {"krum": 1, "multi_krum": 4}.get(kind, 5)
    assert not toy.same(f.last.adapter, f.begin.adapter)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] or kind == "krum"  # one client's step may help no other


@pytest.mark.parametrize("dtype", ["int8", pytest.param("f64", marks=pytest.mark.slow)])
def test_every_type_of_the_wire(dtype: str, tmp_path: Path) -> None:
    f = federation(FedAvg(), tmp_path / "run", bounded(MEDIAN), SCALED, dtype=dtype, epochs=3)
    events = f.play()
    assert {event["client"] for event in events["refused"]} == {"c4"}
    assert events["round"][-1]["train_loss"] < events["round"][0]["train_loss"]


def test_exactness_is_measured_against_the_plain_mean_of_those_not_refused(tmp_path: Path) -> None:
    """FFA-LoRA's mean is exact: what is left is the median's own distance from it, and no hostile client's."""
    found = {}
    for name, rule in (("mean", ServerSettings()), ("median", MEDIAN)):
        f = federation(
            methods.build({"name": "ffa_lora"}), tmp_path / name, bounded(rule), SCALED, rounds=1, exactness=True
        )
        f.play()
        found[name] = f.last.metrics["agg_fullmodel"]
    assert found["mean"] < 1e-7
    assert 1e-4 < found["median"] < 1


def test_a_server_optimizer_steps_by_the_robust_change(tmp_path: Path) -> None:
    """fedavgm without momentum and a rate of a half goes half of the way to the median."""
    full = federation(FedAvg(), tmp_path / "full", MEDIAN, rounds=1)
    full.play()
    half = MEDIAN.model_copy(update={"optimizer": "fedavgm", "beta1": 0.0, "lr": 0.5})
    f = federation(FedAvg(), tmp_path / "half", half, rounds=1)
    f.play()
    start, whole = toy.arrays(f.begin.adapter), toy.arrays(full.last.adapter)
    for name, array in toy.arrays(f.last.adapter).items():
        np.testing.assert_allclose(array, (start[name] + whole[name]) / 2, rtol=1e-5, atol=1e-7)


# ---- simulated attacks


def test_what_a_hostile_client_sends_by_hand() -> None:
    """It received 2 and trained to 3; A does not travel, and stays what it is."""
    spec = toy.small(rank=2)
    received, trained = one({0: 2, 1: 2}, head=2.0), one({1: 3}, head=3.0)
    job = toy.job(spec, received, Plan(everything(received), up="Beh"), rehearsal.fit)
    for attack, sent in (
        (AttackSettings(share=0.1, kind="sign_flip"), 1), (FLIPPED, 2 - 3), (SCALED, 2 + 100),
        (AttackSettings(share=0.1, kind="scale", factor=0.5), 2.5),
    ):  # fmt: skip
        found = distort(attack, job, Update(trained, 5, {"loss": 0.5}))
        block = found.adapter.blocks["m"]
        assert (np.unique(block.B), np.unique(block.e), np.unique(block.A)) == (sent, sent, 3)
        assert np.unique(found.adapter.dense["head"]) == sent
        assert (found.examples, found.metrics) == (5, {"loss": 0.5})


def test_hostile_clients_are_drawn_by_address() -> None:
    attack = AttackSettings(share=0.1, kind="sign_flip")
    assert attackers(None, 50, 0) == {}
    one, again, other = (attackers(attack, 50, seed) for seed in (0, 0, 1))
    assert len(one) == 5
    assert list(one) == list(again) == sorted(one)
    assert one.keys() != other.keys()


# ---- the config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("texts")
    toy.write(folder, train=toy.texts(48, 0), test=toy.texts(8, 0))
    return {
        "data": {"path": str(folder), "partition": {"kind": "iid"}}, "clients": {"count": 6},
        "rounds": {"count": 2, "cohort": 6, "personal": 0}, "adapter": {"rank": 2}, "local": {"max_length": 16},
    }  # fmt: skip


def test_a_config_with_an_attack_and_a_rule_plays_and_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    options = (
        "engine.attack.share=0.2",
        "engine.attack.kind=scale",
        "engine.attack.factor=100",
        "server.max_norm_ratio=5",
    )
    run = fedrank.run(base, *options, "server.aggregation=median", out=tmp_path / "run", watch=events.append)
    (hostile,) = json.loads((run.path / "data.json").read_text())["hostile"]
    assert [(e["round"], e["client"]) for e in events if e["event"] == "refused"] == [(1, hostile), (2, hostile)]
    assert run.summary["clients_failed"] == 2
    with pytest.raises(ValueError, match=r"'server.aggregation' cannot be changed in a run that has begun"):
        fedrank.resume(run.path, "server.aggregation=mean")
    assert fedrank.resume(run.path, "rounds.count=+1").state.round == 3


def test_what_is_not_set_is_off(base: dict[str, Any], tmp_path: Path) -> None:
    run = fedrank.run(base, out=tmp_path / "run")
    assert run.config.server == ServerSettings(
        aggregation="mean", hostile=None, max_norm=None, max_norm_ratio=None, max_examples=None
    )
    assert run.config.engine.attack is None
    assert "hostile" not in json.loads((run.path / "data.json").read_text())


OTHERS = [name for name in methods.names() if name not in AVERAGE]


@pytest.mark.parametrize(("method", "kind"), [*product(OTHERS, ["median", "krum"])])  # fmt: skip
def test_a_method_without_a_mean_takes_no_rule(method: str, kind: str, base: dict[str, Any], tmp_path: Path) -> None:
    options = ("server.hostile=1",) if kind == "krum" else ()
    with pytest.raises(
        ValueError, match=rf"server.aggregation={kind}: {method} makes no mean of its updates.*max_norm"
    ):
        fedrank.run({**base, "method": {"name": method}}, f"server.aggregation={kind}", *options, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["flora", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS if n not in ("flora", "local_only"))])  # fmt: skip
def test_bounds_are_for_every_method(name: str, tmp_path: Path) -> None:
    f = federation(methods.build({"name": name}), tmp_path / "run", ServerSettings(max_norm_ratio=5), SCALED)
    events = f.play()
    assert [(e["round"], e["client"]) for e in events["refused"]] == [(1, "c4"), (2, "c4"), (3, "c4")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["server.aggregation=krum"], "hostile: aggregation=krum needs to know how many updates of a round may be hostile"),
        (["server.aggregation=median", "server.hostile=1"], "hostile: aggregation=median asks for none; trimmed_mean, krum"),
        (["server.hostile=1"], "hostile: aggregation=mean asks for none"),
        (["server.aggregation=krum", "server.hostile=2"], "server.hostile=2: krum then needs 7 updates in a round, which has at most 6"),
        (["server.aggregation=trimmed_mean", "server.hostile=3"], "trimmed_mean then needs 7 updates in a round, which has at most 6"),
        (["server.aggregation=trimmed_mean", "server.hostile=0.1"], "server.hostile: input should be a valid integer"),
        (["server.aggregation=medain"], "did you mean 'median'"),
        (["server.max_norm=0"], "server.max_norm: input should be greater than 0"),
        (["server.max_norm_ratio=1"], "server.max_norm_ratio: input should be greater than 1"),
        (["server.max_examples=0"], "server.max_examples: input should be greater than 0"),
        (["server.trim=0.1"], "unknown key 'server.trim'"),
        (["engine.attack.share=0.1"], "engine.attack.kind: field required"),
        (["engine.attack.kind=scale", "engine.attack.share=0.5"], "factor: scaled by 1 an update is honest"),
        (["engine.attack.kind=sign_flip", "engine.attack.share=0.01"], "engine.attack.share=0.01: of 6 clients that is none"),
        (["engine.attack.kind=noise", "engine.attack.share=0.1"], "engine.attack.kind: input should be 'sign_flip' or 'scale'"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(override: list[str], message: str, base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fedrank.run(base, *override, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_client_counts_the_same() -> None:
    """`uniform` is what stands behind a centre, whatever a method weighs by."""
    updates = arrived(*map(one, (1.0, 2.0)), examples=lambda at: 10**at)
    for weight in (uniform, lambda update: float(update.examples)):
        found = robust.centred(updates, MEDIAN).total(lambda update: update.adapter, weight)
        assert numbers(found.sums) == {0: 3.0}
