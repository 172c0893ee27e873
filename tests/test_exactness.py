"""Exactness: the measures on small numbers, and the table of every method, measured in float64."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import toy
from fedrank import aggregation, exactness, ledger, methods
from fedrank.adapter import Adapter, Block, recompress
from fedrank.config import Local
from fedrank.exactness import covariance, errors, factor_norm
from fedrank.methods.fed_plora import FedPLoRA
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.legend import TIMINGS
from fedrank.products import Increment
from fedrank.protocol import Device, Job, Plan, State, Update, rng
from test_contract import Shared, build


def lora(b: Any, a: Any, ids: Any = None, scale: float = 1.0, e: Any = None) -> Adapter:
    """One module "m" with these columns of B and rows of A, in float64."""
    b, a = np.array(b, float), np.array(a, float)
    block = Block(np.arange(len(a)) if ids is None else np.array(ids), b, None if e is None else np.array(e, float), a)
    return Adapter({"m": block}, scale, {})


def double(adapter: Adapter) -> Adapter:
    blocks = {
        n: Block(b.ids, *(None if f is None else f.astype(float) for f in (b.B, b.e, b.A)))
        for n, b in adapter.blocks.items()
    }
    return Adapter(blocks, adapter.scale, {n: t.astype(float) for n, t in adapter.dense.items()})


# ---- the sum of increments


def test_the_norm_of_one_component_is_the_product_of_its_norms():
    """scale 2, b = (1, 0), a = (3, 4): 2 * 1 * 5; e = -3 makes it three times that."""
    assert Increment().add(lora([[1], [0]], [[3, 4]], scale=2.0)).norm() == pytest.approx(10)
    assert Increment().add(lora([[1], [0]], [[3, 4]], scale=2.0, e=[-3])).norm() == pytest.approx(30)


def test_weights_are_one_for_all_or_one_per_component():
    """b a' = e1 e1' and e2 e2': with 3 and 4 the matrix is diag(3, 4)."""
    two = lora([[1, 0], [0, 1]], [[1, 0], [0, 1]])
    assert Increment().add(two, {"m": np.array([3.0, 4.0])}).norm() == pytest.approx(5)
    assert Increment().add(two, -2.0).norm() == pytest.approx(np.sqrt(8))
    assert Increment().add(two, {"m": np.array([0.0, -1.0])}).norm() == pytest.approx(1)
    assert Increment().norm() == Increment().add(two, 0.0).norm() == 0


def test_modules_count_together():
    """3 in one module and 4 in another: 5."""
    parts = {"a": lora([[3]], [[1]]).blocks["m"], "b": lora([[1]], [[4]]).blocks["m"]}
    assert Increment().add(Adapter(parts, 1.0, {})).norm() == pytest.approx(5)


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
@examples(max_examples=60, deadline=None)
def test_narrow_and_wide_stacks_have_the_norm_of_the_dense_sum(out, in_, ranks, seed):
    """Scales may differ."""
    draw, found, dense = rng(seed, "sums"), Increment(2.0), np.zeros((out, in_))
    for rank in ranks:
        scale = float(draw.choice([0.5, 1.0, 4.0]))
        part = lora(draw.normal(size=(out, rank)), draw.normal(size=(rank, in_)), scale=scale)
        weight = float(draw.normal())
        found.add(part, weight)
        dense += weight * part.delta()["m"]
        assert found.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-12)


@pytest.mark.parametrize("shape", [(300, 200), (8, 9)])  # by its triangles, and as a matrix
def test_equal_functions_of_other_factors_are_no_further_apart_than_round_off(shape):
    draw = rng(0, "gauge")
    one = lora(draw.normal(size=(shape[0], 4)), draw.normal(size=(4, shape[1])))
    other = recompress(one)
    assert Increment().add(one).add(other, -1.0).norm() < 1e-14 * Increment().add(one).norm()
    assert np.linalg.norm(one.blocks["m"].B - other.blocks["m"].B) > 1


def test_a_matrix_is_formed_once_the_rank_reaches_a_side():
    found = Increment().add(lora(np.ones((40, 13)), np.ones((13, 20))))
    assert found.adapter().blocks["m"].rank == 13
    found.add(lora(np.ones((40, 7)), np.ones((7, 20))))
    assert found.modules["m"].whole.shape == (40, 20)
    assert not found.modules["m"].lefts
    assert found.norm() == pytest.approx(20 * np.sqrt(800))
    assert found.add(found.adapter(), -1.0).norm() == 0


def test_a_whole_increment_of_the_base_sums_up_all_before_it():
    """Rounds of 5, then a whole 7, then 1: the base is 8, of which twice is 16."""
    factors = [lora([[value]], [[1]]) for value in (5, 1)]
    whole = Adapter({}, 1.0, {"m": np.array([[7.0]])})
    assert Increment().add_base([factors[0], whole, factors[1]], 2.0).norm() == pytest.approx(16)
    assert Increment().add_base([factors[0], factors[1]]).norm() == pytest.approx(6)
    again = Adapter({}, 1.0, {"m": np.array([[9.0]])})
    assert Increment().add_base([whole, factors[0], again]).norm() == pytest.approx(9)


def test_an_increment_needs_both_factors():
    with pytest.raises(ValueError, match="module 'm'"):
        Increment().add(lora([[1]], [[1]]).only("B"))


# ---- the figures


def test_the_norms_of_factors_add_up():
    """B (3, 4) is 5, A of two ones sqrt 2; e (2, 0) is 2."""
    one = lora([[3, 4]], [[1], [1]])
    assert factor_norm(one) == pytest.approx(5 + np.sqrt(2))
    block = replace(one.blocks["m"], e=np.array([2.0, 0.0]))
    assert factor_norm(replace(one, blocks={"m": block, "n": block})) == pytest.approx(2 * (7 + np.sqrt(2)))
    assert factor_norm(replace(one, blocks={})) == 0


def test_the_covariance_of_three_and_minus_three():
    """B = A = 3 and -3: the means are 0, the mean product is 9."""
    updates = {"a": Update(lora([[3]], [[3]]), 1), "b": Update(lora([[-3]], [[-3]]), 1)}
    assert covariance(toy.Arrived(updates)) == pytest.approx(9)
    assert covariance(toy.Arrived({"a": updates["a"]})) == 0
    halves = {name: replace(u, adapter=replace(u.adapter, scale=0.5)) for name, u in updates.items()}
    assert covariance(toy.Arrived(halves)) == pytest.approx(4.5)


def test_the_covariance_may_be_weighted():
    """3 with weight 3 and -1 with weight 1: mean 2, covariance (3 * 1 + 1 * 9) / 4."""
    updates = {"a": Update(lora([[3]], [[3]]), 3), "b": Update(lora([[-1]], [[-1]]), 1)}
    assert covariance(toy.Arrived(updates), aggregation.examples) == pytest.approx(3)


def test_a_factor_that_all_share_adds_no_covariance():
    came = {name: Update(lora([[value]], [[1]]).only("B"), 1) for name, value in (("a", 3), ("b", -3))}
    assert covariance(toy.Arrived(came)) == 0


def test_the_covariance_is_of_two_factors():
    with pytest.raises(ValueError, match="B and A alone"):
        covariance(toy.Arrived({"a": Update(lora([[1]], [[1]], e=[1]), 1)}))


BEFORE = State(0, 3, lora([[1, 2]], [[1], [1]]))
X, Y = lora([[3]], [[2]], [0]), lora([[1, 4]], [[4], [1]])
AFTER = State(0, 3, lora([[2, 4]], [[3], [1]]))
CAME = toy.Arrived({"x": Update(X, 3), "y": Update(Y, 1)})


def everyone(client: str, update: Update) -> exactness.Present:
    return BEFORE.adapter.ids, BEFORE.adapter.ids


def trained(client: str, update: Update) -> exactness.Present:
    return update.adapter.ids, update.adapter.ids


def test_the_three_figures_differ_where_ranks_do():
    """Global 1*1 + 2*1. x trains the first into 3*2 = 6, y both into 1*4 + 4*1 = 8; the means are 2*3 + 4*1 = 10.

    Covariance of the first: (1*-1 + -1*1)/2 = -1. Trained parts: (6 + 8)/2 - 10 = -3.
    Whole models: x has 6 + 2, y has 8: (8 + 8)/2 - 10 = -2.
    """
    found = errors(BEFORE, AFTER, CAME, everyone)
    assert covariance(CAME) == pytest.approx(1)
    assert found == {
        "start_error": 0, "n_init": 0, "agg_eq3": pytest.approx(3), "agg_fullmodel": pytest.approx(2)
    }  # fmt: skip


def test_what_is_missing_at_the_start_is_an_error_of_the_start():
    """x lacks 2*1, y nothing: 2/2 as a function, 2 + 1 as factors; then there is nothing but trained parts."""
    found = errors(BEFORE, AFTER, CAME, trained)
    assert found == {
        "start_error": pytest.approx(1), "n_init": pytest.approx(3), "agg_eq3": pytest.approx(3),
        "agg_fullmodel": pytest.approx(3),
    }  # fmt: skip


def test_the_figures_may_be_weighted():
    """By 3 and 1 examples: (3 * 6 + 8)/4 - 10 = -3.5, (3 * (6 + 2) + 8)/4 - 10 = -2."""
    found = errors(BEFORE, AFTER, CAME, everyone, aggregation.examples)
    assert found["agg_eq3"] == pytest.approx(3.5)
    assert found["agg_fullmodel"] == pytest.approx(2)


def test_a_residual_in_the_base_closes_the_gap():
    """The clients' mean is 8 and the new factors make 10: -2 in the base is exact; an older update changes nothing."""
    old = lora([[100]], [[1]])
    before = replace(BEFORE, base_updates={1: old})
    after = replace(AFTER, base_updates={1: old, 2: lora([[-2]], [[1]])})
    assert errors(before, after, CAME, everyone)["agg_fullmodel"] < 1e-12
    whole = replace(AFTER, base_updates={2: Adapter({}, 1.0, {"m": np.array([[98.0]])})})
    assert errors(before, whole, CAME, everyone)["agg_fullmodel"] < 1e-12


def test_a_factor_that_did_not_travel_is_the_old_one():
    """Only B came: 3*1 + 2 and 1*1 + 4*1; mean 5, new 2*1 + 3*1 = 5."""
    came = toy.Arrived({"x": Update(X.only("B"), 1), "y": Update(Y.only("B"), 1)})
    after = State(0, 3, lora([[2, 3]], [[1], [1]]))
    assert errors(BEFORE, after, came, everyone)["agg_fullmodel"] < 1e-12


# ---- in the ledger of a run

FIGURES = {"start_error", "n_init", "agg_cov", "agg_eq3", "agg_fullmodel"}


def measured_run(method: Any, path: Any) -> tuple[toy.Federation, list[dict[str, Any]]]:
    f = toy.federation(method, path, rounds=2, exactness=True)
    f.play()
    return f, ledger.read(path / "rounds.jsonl")


def test_a_run_measures_only_when_asked_and_is_the_same_run(tmp_path):
    f, _ = measured_run(FedAvg(), tmp_path / "run")
    plain = toy.federation(FedAvg(), tmp_path / "plain", rounds=2)
    plain.play()
    assert toy.same(f.last.adapter, plain.last.adapter)
    assert not FIGURES & set(ledger.read(tmp_path / "plain" / "rounds.jsonl")[0])


# What cannot be known of a method's merge: nothing where factors stay with their clients, only the covariance of the
# common adapters where each client has another beside them, that not where there is a third factor, and no distance of
# factors once the base holds a part of the function.
UNKNOWN = {
    **dict.fromkeys(("fedsa_lora", "local_only"), FIGURES), **dict.fromkeys(("pf2lora", "feddpa"), FIGURES - {"agg_cov"}),
    "fedara": {"agg_cov"}, "flora": {"n_init"}, "fedex_lora": {"n_init"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", toy.FIRST)
def test_the_figures_in_the_ledger_and_the_errors_that_a_method_claims_not_to_have(name, tmp_path):
    """In float32 and over frames, so as far as these go; its devices differ in rank, speed and number of rows."""
    about = build(name).about
    f, rows = measured_run(build(name), tmp_path / "run")
    assert FIGURES & set(rows[1]) == FIGURES - UNKNOWN.get(name, set())
    assert all(row[figure] >= 0 for row in rows for figure in FIGURES & set(row))
    if name in PERSONAL:
        return
    size = whole(f.last).norm()
    assert (max(row["start_error"] for row in rows) < 1e-5 * size) == about.exact_start
    assert (max(row["agg_fullmodel"] for row in rows) < 1e-5 * size) == about.exact_aggregation


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("rest", ["freeze", "fold", "drop"])
def test_the_server_measures_by_the_plans_and_the_methods_weights(rest, weights):
    method = FedPLoRA(rest=rest, weights=weights)
    state = replace(method.begin(SPEC, 3, 0), adapter=toy.drawn(SPEC).only("BAh"))
    devices = {c: Device(c, 4, rank=r) for c, r in zip(toy.CLIENTS, toy.RANKS, strict=True)}
    plans = method.plan(state, devices, 0)
    jobs = [toy.job(SPEC, state.adapter, plan, Start(), client) for client, plan in plans.items()]
    updates = [replace(update, examples=n) for n, update in enumerate(method.train(jobs), 1)]
    came = toy.Arrived(dict(zip(plans, updates, strict=True)))
    after = method.merge(state, came)

    def present(client: str, update: Update) -> exactness.Present:
        ids = update.adapter.ids if rest == "drop" else state.adapter.ids
        return ids, ids

    weight = aggregation.WEIGHTS[weights]
    noted = exactness.noted(method, state, after, plans, came)
    assert noted.metrics == {"agg_cov": covariance(came, weight), **errors(state, after, came, present, weight)}
    assert (noted.metrics["start_error"] > 0) == (rest == "drop")
    assert toy.same(noted.adapter, after.adapter)


@dataclass(frozen=True)
class Pruning:
    """Counts clients alike, and a component that does not come back is gone or not."""

    prunes: bool
    weights: str = "uniform"


@pytest.mark.parametrize(("prunes", "gap"), [(False, 2), (True, 3)])
def test_what_a_client_has_pruned_is_no_part_of_its_function(prunes, gap):
    """x was sent both and returns the first: its function is 6, or 6 + 2; y's is 8, the new one is 10."""
    plans = dict.fromkeys(("x", "y"), Plan(BEFORE.adapter.ids, select=2))
    found = exactness.noted(Pruning(prunes), BEFORE, AFTER, plans, CAME).metrics
    assert (found["start_error"], found["agg_fullmodel"]) == (0, pytest.approx(gap))


def test_factors_are_not_compared_where_the_base_holds_a_part():
    before = replace(BEFORE, base_updates={1: lora([[100]], [[1]])})
    assert set(errors(before, AFTER, CAME, everyone)) == FIGURES - {"n_init", "agg_cov"}


def test_of_two_levels_only_the_common_ones_covariance_is_known(tmp_path):
    """And it is the product gap: mean(B A) - mean(B) mean(A) of the common adapters."""
    _, (first, *_) = measured_run(methods.build({"name": "pf2lora", "private_rank": 1}), tmp_path / "run")
    assert FIGURES & set(first) == {"agg_cov"}
    assert first["agg_cov"] > 0


def test_factors_that_never_leave_their_client_are_not_guessed(tmp_path):
    _, rows = measured_run(Shared(), tmp_path / "run")
    assert not FIGURES & set(rows[0])
    for change, known in (
        ({}, True),
        ({"own": "B"}, False),
        ({"up": "Ah"}, False),
        ({"up": "Ah", "learn": "Ah"}, True),
    ):
        plans = dict.fromkeys(("x", "y"), Plan(BEFORE.adapter.ids, **change))
        assert bool(exactness.noted(FedAvg(), BEFORE, AFTER, plans, CAME).metrics) == known


# ---- the table

EXACT, INEXACT = 1e-10, 1e-3

# Section 11 of the specification of the baselines: every client starts from the global function; the new global
# function is the mean of the clients' own. Exact up to a rank, or per partition of ranks, is not exact. First of all:
# ranks may differ.
TABLE: dict[str, tuple[bool, bool, bool]] = {
    "fedavg": (False, True, False), "ffa_lora": (False, True, True), "fedex_lora": (False, True, True),
    "flora": (True, True, True), "flexlora": (True, False, False), "hetlora": (True, False, False),
    "raflora": (True, False, False), "lora_a2": (True, True, True), "fed_plora": (True, True, False),
}  # fmt: skip

# Methods without one global function that a client could start from, and why.
PERSONAL: dict[str, str] = {
    "local_only": "nothing is aggregated",
    "fedsa_lora": "every client has a B of its own",
    "pf2lora": "every client has a second level of its own",
    "feddpa": "every client has an adapter of its own beside the global one",
}

SPEC = toy.small({"0.m": (14, 12), "1.m": (11, 13)}, rank=4)


# Of each part of a client's round: clients of low rank are slow too, as methods of other depths measure it.
SECONDS = {client: 8.0 / rank**2 for client, rank in zip(toy.CLIENTS, toy.RANKS, strict=True)}


@dataclass(eq=False)
class Start:
    """A client's model as its local training finds it, and what it makes of it: a random change of all that learns."""

    job: Job | None = None

    def __call__(self, job: Job, observe: Any = None, lower: Any = None) -> Update:
        self.job = job
        draw, blocks = rng(0, "change", job.round, job.device.id), {}
        for name, block in job.adapter.take(job.plan.train).blocks.items():
            moved = {
                f: v if v is None or f not in job.plan.learn else v + 0.3 * draw.normal(size=v.shape)
                for f, v in (("B", block.B), ("e", block.e), ("A", block.A))
            }
            blocks[name] = Block(block.ids, **moved)
        adapter = Adapter(blocks, job.adapter.scale, job.adapter.dense)
        if observe is not None:
            values = toy.flat(adapter)
            observe(values, {f: value.clone() for f, value in values.items()})
        return Update(adapter, job.device.examples, metrics=dict.fromkeys(TIMINGS, SECONDS[job.device.id]))

    def function(self, update: Update | None = None) -> Increment:
        """The model as found, or with the update's components in the place of those they came from."""
        assert self.job is not None
        plan, found = self.job.plan, Increment().add_base(self.job.base_updates)
        start = self.job.adapter.take(plan.train).union(self.job.adapter.take(plan.frozen))
        if update is None:
            return found.add(start)
        return found.add(start.without(update.adapter.ids)).add(update.adapter.fill(start))


def whole(state: State) -> Increment:
    return Increment().add_base(state.base_updates.values()).add(state.adapter)


def counts_by(method: Any) -> str:
    """What the method says that clients count by in its means."""
    return getattr(method, "weights", "examples")


def measured(
    method: Any, weights: str | None = None, ranks: tuple[int, ...] = toy.RANKS, rounds: int = 4
) -> tuple[float, float]:
    """The largest error of a start and of a merge over some rounds, against the size of the global function.

    The hooks are driven by hand, without a wire, in float64. A client's model is what its `fit` is given. What a
    merge makes anew in float32, such as a fresh A, is the same number in float64. weights: of the clients, in the
    mean that a merge is held against; by default the method's own.
    """
    weight = aggregation.WEIGHTS[weights or counts_by(method)]
    differ = "rank" in method.about.differs
    devices = {
        client: Device(client, toy.EXAMPLES[client], rank=rank if differ else None)
        for client, rank in zip(toy.CLIENTS, ranks, strict=True)
    }
    state = method.begin(SPEC, 10, 0)
    starts, merges = [0.0], [0.0]
    for round in range(1, rounds + 1):
        state = replace(state, adapter=double(state.adapter))
        updates, trained = {}, {}
        plans = {c: p for c, p in method.plan(state, devices, 0).items() if p is not None}
        size = whole(state).norm()
        for client, plan in plans.items():
            fit = Start()
            plan = replace(plan, since=state.seen.get(client, -1))
            job = Job(plan, round, 10, SPEC, received(state, plan), tuple(state.base_updates.values()), {},
                      Local(), devices[client], 0, fit)  # fmt: skip
            updates[client] = next(iter(method.train([job])))
            if size:
                starts.append(fit.function().add(whole(state).adapter(), -1.0).norm() / size)
            trained[client] = fit.function(updates[client]).adapter()
        mean, total = Increment(), sum(map(weight, updates.values()))
        for client, update in updates.items():
            mean.add(trained[client], weight(update) / total)
        after = method.merge(state, toy.Arrived(updates))
        size = mean.norm()
        merges.append(mean.add(whole(after).adapter(), -1.0).norm() / size)
        state = replace(after, round=round, seen={**after.seen, **dict.fromkeys(updates, round)})
    return max(starts), max(merges)


def received(state: State, plan: Plan) -> Adapter:
    return state.adapter.take(plan.train).union(state.adapter.take(plan.frozen))


def exact(error: float) -> bool:
    assert error <= EXACT or error > INEXACT, f"an error of {error:g} is neither"
    return error <= EXACT


@pytest.mark.parametrize("name", methods.names())
def test_the_table_of_exactness_as_measured(name):
    method = build(name)
    if name in PERSONAL:
        assert method.about.personal
        pytest.skip(f"{name}: {PERSONAL[name]}")
    about, found = method.about, tuple(map(exact, measured(method)))
    assert found == (about.exact_start, about.exact_aggregation)
    assert TABLE.get(name) in (None, ("rank" in about.differs, *found))
    other = "uniform" if counts_by(method) == "examples" else "examples"
    assert not exact(measured(method, other)[1])  # clients are of different sizes


def test_the_page_s_table_is_what_the_methods_say():
    row = r"^\| \[`(\w+)`\]\(\1\.md\) \|.*\| ([\w, ]+) \| (exact|–) \| (exact|–) \| (global|personal) \|$"
    text = (Path(__file__).parents[1] / "docs" / "methods" / "index.md").read_text()
    found = {name: tuple(cells) for name, *cells in re.findall(row, text, re.MULTILINE)}
    assert found.keys() == set(methods.names())
    for name, cells in found.items():
        about = build(name).about
        claims = ["exact" if claim else "–" for claim in (about.exact_start, about.exact_aggregation)]
        assert cells == (", ".join(about.differs), *claims, "personal" if about.personal else "global")


ALIKE = dict.fromkeys(("flexlora", "flexlora-even", "raflora", "hetlora-uniform", "hetlora-contributor"), (True, False))


@pytest.mark.parametrize(
    ("ranks", "name", "expected"),
    [
        *((toy.RANKS, name, (False, False)) for name in ALIKE),
        *(((4, 4, 4, 4), name, expected) for name, expected in ALIKE.items()),
        ((1, 1, 1, 1), "flexlora", (False, True)),  # all of them together have the adapter's rank
        ((1, 1, 1, 1), "raflora", (False, False)),
        (toy.RANKS, "legend-full", (True, False)),  # the blocks that do not learn are sent too
    ],
)
def test_the_small_print_of_the_table(ranks, name, expected):
    """Starts are inexact only where a client's rank is below the adapter's; FlexLoRA's mean is exact up to that rank."""
    assert tuple(map(exact, measured(build(name), ranks=ranks))) == expected


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"rest": "fold"}, True), ({"rest": "drop"}, False), ({"selection": "fixed"}, True),
        ({"selection": "weight_norm"}, True),
    ],
)  # fmt: skip
def test_the_table_of_fed_ploras_variants(settings, start):
    found = measured(FedPLoRA(**settings))
    assert tuple(map(exact, found)) == (start, False)
