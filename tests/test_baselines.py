"""The simple methods: each one's equations on small numbers, what travels, and the known traps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedrank import cost, methods
from fedrank.adapter import Adapter, Block
from fedrank.aggregation import norm
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.fedprox import FedProx, Proximal
from fedrank.methods.fedsa_lora import FedSALoRA
from fedrank.methods.ffa_lora import FFALoRA
from fedrank.methods.hetlora import HetLoRA
from fedrank.methods.local_only import LocalOnly
from fedrank.methods.lora_a2 import LoRAA2
from fedrank.methods.rolora import RoLoRA
from fedrank.protocol import Device, Job, State, Update
from test_contract import build


def lora(b: Any, a: Any, head: float = 0.0) -> Adapter:
    """One module "m" in float64."""
    b, a = np.array(b, float), np.array(a, float)
    return Adapter({"m": Block(np.arange(len(a)), b, None, a)}, 0.5, {"head": np.full(2, head)})


OLD = lora([[1, 0], [0, 1]], [[1, 2], [3, 4]], head=1)
SENT = {
    "a": lora([[2, 0], [0, 2]], [[4, 4], [0, 0]], head=4),
    "b": lora([[0, 4], [0, 0]], [[0, 8], [8, 0]], head=8),
    "c": lora([[0, 0], [8, 0]], [[0, 0], [0, 8]], head=0),
}
ROWS = {"a": 2, "b": 1, "c": 1}


def merged(method: Any, sent: Mapping[str, Adapter] = SENT, old: Adapter = OLD, round: int = 0) -> State:
    """What the method makes of these updates, of which each carries what its plan sends up."""
    state = State(round, 9, old)
    plans = method.plan(state, toy.cohort(*sent), 0)
    updates = {c: Update(adapter.only(plans[c].up), ROWS.get(c, 1)) for c, adapter in sent.items()}
    return method.merge(state, toy.Arrived(updates))


def weights(p: Mapping[str, float], factor: str) -> np.ndarray:
    return np.sum([p[c] * getattr(SENT[c].blocks["m"], factor) for c in SENT], axis=0)


# ---- every method that averages

BY_EXAMPLES = {"a": 1 / 2, "b": 1 / 4, "c": 1 / 4}
UNIFORM = dict.fromkeys(SENT, 1 / 3)
AVERAGING = [
    (FFALoRA(), 0, "B", BY_EXAMPLES), (FedSALoRA(), 0, "A", BY_EXAMPLES), (FedProx(), 0, "BA", BY_EXAMPLES),
    (RoLoRA(), 0, "B", BY_EXAMPLES), (RoLoRA(), 1, "A", BY_EXAMPLES),
    (HetLoRA("uniform"), 0, "BA", UNIFORM), (HetLoRA("contributor"), 0, "BA", UNIFORM),
]  # fmt: skip


@pytest.mark.parametrize(("method", "round", "moves", "p"), AVERAGING)
def test_every_client_counts_by_its_weight_in_every_factor(method, round, moves, p):
    """The traps of released code: sums that end with the first client, weights on one of the factors only."""
    found = merged(method, round=round).adapter
    for factor in "BA":
        expected = weights(p, factor) if factor in moves else getattr(OLD.blocks["m"], factor)
        np.testing.assert_allclose(getattr(found.blocks["m"], factor), expected, rtol=1e-14)
    np.testing.assert_allclose(found.dense["head"], sum(p[c] * SENT[c].dense["head"] for c in SENT), rtol=1e-14)
    assert found.scale == OLD.scale


@pytest.mark.parametrize("method", [FFALoRA(), FedSALoRA(), FedProx(), RoLoRA(), HetLoRA("uniform"), HetLoRA("full")])
def test_a_single_client_is_not_shrunk_by_its_share(method):
    sent = {"b": SENT["b"]}
    plan = method.plan(State(0, 9, OLD), toy.cohort("b"), 0)["b"]
    assert toy.same(merged(method, sent).adapter, SENT["b"].only(plan.up).fill(OLD))


@pytest.mark.parametrize(("method", "round"), [(FFALoRA(), 0), (RoLoRA(), 0), (RoLoRA(), 1)])
def test_where_one_factor_is_common_the_mean_is_that_of_the_products(method, round):
    state = State(round, 9, OLD)
    up = method.plan(state, toy.cohort("a"), 0)["a"].up
    products = {c: adapter.only(up).fill(OLD).delta()["m"] for c, adapter in SENT.items()}
    mean = sum(BY_EXAMPLES[c] * product for c, product in products.items())
    np.testing.assert_allclose(merged(method, round=round).adapter.delta()["m"], mean, rtol=1e-14)
    other = merged(FedAvg()).adapter.delta()["m"]
    whole = sum(BY_EXAMPLES[c] * adapter.delta()["m"] for c, adapter in SENT.items())
    assert np.linalg.norm(other - whole) > 1  # and FedAvg's is not
    assert method.about.exact_aggregation


# ---- what travels

# On first contact, down later on, and up; whether only a client's own rank of it; the rank of a round's base update,
# of four clients of the ranks 1, 2, 4 and 4 and an adapter of 4. RoLoRA's and LoRA-A2's are further below.
TRAVELS: dict[str, tuple[str, str, str, bool, int]] = {
    **dict.fromkeys(("fedavg", "fedprox"), ("BA", "BA", "BA", False, 0)), "ffa_lora": ("BA", "B", "B", False, 0),
    "fedsa_lora": ("A", "A", "A", False, 0), "local_only": ("", "", "", False, 0),
    **dict.fromkeys(("hetlora-uniform", "hetlora-contributor", "flexlora", "raflora"), ("BA", "BA", "BA", True, 0)),
    "flora": ("BA", "A", "BA", True, 1 + 2 + 4 + 4), "fedex_lora": ("BA", "BA", "BA", False, (4 - 1) * 4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAVELS)
def test_the_adapters_bytes_are_the_tables(name, tmp_path):
    """d r for B and k r for A; the factors of one round's base update are fewer than d k, those of two are more."""
    first, later, up, own, rank = TRAVELS[name]
    f = toy.federation(build(name), tmp_path / "run", rounds=3)
    rows, size = travelled(f)
    matrices = sum(4 * out * in_ for out, in_ in f.begin.adapter.shapes.values())
    factors = rank * (size["B"] + size["A"]) // 4
    assert not rank or factors < matrices < 2 * factors
    base = {1: 0, 2: factors, 3: matrices if rank else 0}
    for row in rows:
        r = toy.RANKS[toy.CLIENTS.index(row["client"])] if own else 4
        down = first if row["round"] == 1 else later
        assert row["adapter_bytes_up"] == r * sum(size[x] for x in up) // 4
        assert row["adapter_bytes_down"] == r * sum(size[x] for x in down) // 4 + base[row["round"]]


def travelled(f: toy.Federation) -> tuple[list[dict], dict[str, int]]:
    """The clients' rows of a run, and the bytes of each factor of the whole adapter."""
    rows = f.play()["client"]
    assert all(row["ok"] for row in rows)
    blocks = f.begin.adapter.blocks.values()
    return rows, {factor: sum(getattr(b, factor).nbytes for b in blocks) for factor in "BA"}


def test_ffa_lora_sends_a_once_and_never_changes_it(tmp_path):
    f = toy.federation(FFALoRA(), tmp_path / "run", rounds=2)
    rows, size = travelled(f)
    down = {(row["round"], row["adapter_bytes_down"]) for row in rows}
    assert down == {(1, size["B"] + size["A"]), (2, size["B"])}
    assert {row["adapter_bytes_up"] for row in rows} == {size["B"]}
    for name, block in f.last.adapter.blocks.items():
        np.testing.assert_array_equal(block.A, f.begin.adapter.blocks[name].A)
        assert block.B.any()


def test_fedsa_lora_sends_no_b(tmp_path):
    f = toy.federation(FedSALoRA(), tmp_path / "run", rounds=2)
    rows, size = travelled(f)
    assert {row["adapter_bytes_up"] for row in rows} == {row["adapter_bytes_down"] for row in rows} == {size["A"]}
    kept = [f.store.private.load(client, 2) for client in toy.CLIENTS]
    for name, block in f.last.adapter.blocks.items():
        assert not block.B.any()
        assert np.any(block.A != f.begin.adapter.blocks[name].A)
        assert len({own[f"B/{name}"].tobytes() for own in kept}) == len(toy.CLIENTS)
        assert f"A/{name}" not in kept[0]


def test_local_training_sends_nothing(tmp_path):
    f = toy.federation(LocalOnly(), tmp_path / "run", rounds=2)
    rows, _ = travelled(f)
    for way in ("up", "down"):
        assert {row[f"{part}_bytes_{way}"] for row in rows for part in ("adapter", "head")} == {0}
    plan = LocalOnly().plan(f.begin, toy.cohort("c0"), 0)["c0"]
    modules = len(f.server.wire.spec.modules)
    assert rows[0]["bytes_down"] == cost.down(f.begin.adapter, plan, modules, "f32").frame
    assert rows[0]["bytes_up"] == cost.up(f.begin.adapter, plan, modules, "f32").frame
    assert toy.same(f.last.adapter, f.begin.adapter)


def test_local_training_is_the_same_whoever_else_there_is(tmp_path):
    alone = toy.federation(LocalOnly(), tmp_path / "alone", rounds=2, shares={"c0": toy.SHARES["c0"]})
    among = toy.federation(LocalOnly(), tmp_path / "among", rounds=2)
    for f in (alone, among):
        f.play()
    mine = {name: value for name, value in among.private.items() if name.startswith("c0/")}
    assert alone.private == mine
    assert any(np.frombuffer(value, np.float32).any() for name, value in mine["c0/0002.safetensors"].items() if name.startswith("B/"))  # fmt: skip


# ---- RoLoRA


def test_rolora_moves_b_and_a_in_turn(tmp_path):
    f = toy.federation(RoLoRA(), tmp_path / "run", rounds=3)
    f.play()
    states = f.states
    for t in (1, 2, 3):
        moved = {
            factor
            for factor in "BA"
            for name, block in states[t].adapter.blocks.items()
            if np.any(getattr(block, factor) != getattr(states[t - 1].adapter.blocks[name], factor))
        }
        assert moved == {"B" if t % 2 else "A"}


def test_rolora_clients_start_from_the_servers_factors_however_long_they_were_away(tmp_path):
    """c0 answers always, c1 every other round, c2 in rounds 1 and 5, c3 is lost in round 3. What travels down is
    the factor that moved, and both to a client that missed that."""
    answers = {1: "c0 c1 c2 c3", 2: "c0 c3", 3: "c0 c1", 4: "c0 c3", 5: "c0 c1 c2 c3", 6: "c0 c1 c2 c3"}
    started: dict[tuple[int, str], Adapter] = {}
    judged: dict[str, Adapter] = {}
    before: dict[int, State] = {}

    def note(site: Any) -> Any:
        def fit(job: Job, **more: Any) -> Update:
            started[job.round, job.device.id] = job.adapter
            if job.device.id not in answers[job.round]:
                raise MemoryError
            return site.fit(job, **more)

        def evaluate(adapter: Adapter, *base: Any) -> dict[str, float]:
            judged[site.device.id] = adapter
            return site.evaluate(adapter, *base)

        return replace(site, fit=fit, evaluate=evaluate)

    f = toy.federation(RoLoRA(), tmp_path / "run", rounds=6, alter=note)
    rows = f.play(watch=lambda e: before.update({e["round"]: f.last}) if e["event"] == "cohort" else None)["client"]
    assert {(row["round"], row["client"]) for row in rows if row["ok"]} == {
        (t, name) for t, names in answers.items() for name in names.split()
    }
    for (t, _), adapter in started.items():
        assert toy.same(adapter, before[t].adapter)
    assert judged.keys() == set(toy.CLIENTS)
    assert all(toy.same(adapter, f.last.adapter) for adapter in judged.values())
    size = {x: sum(getattr(b, x).nbytes for b in f.begin.adapter.blocks.values()) for x in "BA"}
    for row in rows:
        t, fresh = row["round"], row["round"] > 1 and row["client"] in answers[row["round"] - 1]
        moves, rests = "BA" if t % 2 else "AB"
        assert row["adapter_bytes_down"] == size[rests] + (0 if fresh else size[moves]), row
        assert not row["ok"] or row["adapter_bytes_up"] == size[moves]


# ---- FedProx


def test_mu_zero_is_fedavg_to_the_bit(tmp_path):
    runs = [toy.federation(m, tmp_path / str(i), rounds=2) for i, m in enumerate((FedProx(mu=0.0), FedAvg()))]
    for run in runs:
        run.play()
    assert toy.equal(runs[0].last, runs[1].last)


def test_where_nothing_is_to_be_chosen_lora_a2_is_rolora_to_the_bit(tmp_path):
    def whole(site):
        return replace(site, device=replace(site.device, rank=4))

    runs = [toy.federation(m, tmp_path / str(i), alter=whole) for i, m in enumerate((LoRAA2(), RoLoRA()))]
    for run in runs:
        run.play()
    assert toy.equal(runs[0].last, runs[1].last)


def test_the_proximal_term_pulls_everything_that_learns_to_where_it_began():
    """mu = 1/2: at the start nothing is added; one step away, mu (w - w0), the head too."""
    pull, start = Proximal(0.5), {"B": torch.tensor([1.0, 2.0]), "h.head": torch.tensor([4.0])}
    values = {name: value.clone() for name, value in start.items()}
    for moved, expected in ((0.0, 1.0), (3.0, 2.5), (-1.0, 0.5)):
        grads = {name: torch.ones_like(value) for name, value in values.items()}
        for name, value in values.items():
            value.copy_(start[name] + moved)  # as an optimizer does, in place
        pull(values, grads)
        assert {float(g) for grad in grads.values() for g in grad} == {expected}


def test_a_large_mu_keeps_clients_near_the_global_model(tmp_path):
    gone = []
    for mu in (0.0, 1.0, 100.0):
        f = toy.federation(FedProx(mu=mu), tmp_path / str(mu), rounds=1, epochs=5)
        f.play()
        before, after = toy.arrays(f.begin.adapter), toy.arrays(f.last.adapter)
        gone.append(sum(float(np.sum((after[n] - before[n]) ** 2)) for n in after))
        assert all(np.any(after[n] != before[n]) for n in before if "ids" not in n)
    assert gone[0] > 1.5 * gone[1] > 2 * gone[2]


# ---- HetLoRA


def test_clients_get_the_leading_components_that_they_can_hold():
    method, spec = HetLoRA(), toy.small(rank=4)
    state = method.begin(spec, 9, 0)
    cohort = {name: Device(name, 4, rank=rank) for name, rank in (("a", 1), ("b", 3), ("c", None), ("d", 16))}
    plans = method.plan(replace(state, arrays={"rank/d": np.array(2)}), cohort, 0)
    assert {name: [len(ids) for ids in plan.train.values()] for name, plan in plans.items()} == {
        "a": [1, 1], "b": [3, 3], "c": [4, 4], "d": [2, 2],
    }  # fmt: skip
    assert all(ids.tolist() == list(range(len(ids))) for plan in plans.values() for ids in plan.train.values())
    assert {name: plan.select for name, plan in plans.items()} == {"a": 2, "b": 6, "c": 8, "d": 4}
    assert HetLoRA("uniform").plan(state, cohort, 0)["a"].select is None


ONE = lora([[3], [0]], [[2, 0]], head=4)  # rank 1, |B A| = 6
TWO = lora([[0, 1], [0, 1]], [[0, 0], [1, 1]], head=8)  # rank 2, |B A| = 2


@pytest.mark.parametrize(
    ("form", "b", "a", "head"),
    [
        # Both factors are padded with zeros, and each is averaged with weights 1/2.
        ("uniform", [[1.5, 0.5], [0, 0.5]], [[1, 0], [0.5, 0.5]], 6),
        # Weights 6/8 and 2/8.
        ("full", [[2.25, 0.25], [0, 0.25]], [[1.5, 0], [0.25, 0.25]], 5),
        # The second component has one contributor.
        ("contributor", [[1.5, 1], [0, 1]], [[1, 0], [1, 1]], 6),
    ],
)
def test_the_three_forms_on_two_by_two_numbers(form, b, a, head):
    found = merged(HetLoRA(form), {"a": ONE, "b": TWO}).adapter
    np.testing.assert_allclose(found.blocks["m"].B, b, rtol=1e-14)
    np.testing.assert_allclose(found.blocks["m"].A, a, rtol=1e-14)
    np.testing.assert_allclose(found.dense["head"], head, rtol=1e-14)


@pytest.mark.parametrize("form", ["uniform", "full", "contributor"])
def test_a_component_that_no_one_carries_stays_as_it_was(form):
    found = merged(HetLoRA(form), {"a": ONE, "b": ONE}).adapter.blocks["m"]
    np.testing.assert_array_equal(found.B, [[3, 0], [0, 1]])
    np.testing.assert_array_equal(found.A, [[2, 0], [3, 4]])


def plain(rank: int) -> Adapter:
    """Numbers in LoRA's form, nothing zero in them."""
    adapter = toy.drawn(toy.small(rank=rank))
    return replace(adapter, blocks={name: replace(block, e=None) for name, block in adapter.blocks.items()})


def test_the_sparsity_weight_is_the_norm_of_the_product():
    """From the Grams of the factors, over all modules: sqrt(sum |B A|_F^2), the norm of all singular values."""
    adapter = replace(plain(2), scale=1.0)
    values = np.concatenate([np.linalg.svd(delta, compute_uv=False) for delta in adapter.delta().values()])
    with pytest.raises(ValueError, match="the norm is of B A alone"):
        norm(Update(toy.drawn(toy.small()), 1))
    assert norm(Update(adapter, 1)) == pytest.approx(np.linalg.norm(values), rel=1e-6)


def test_where_all_products_are_zero_clients_count_the_same():
    sent = {"a": lora([[0], [0]], [[2, 0]], head=2), "b": lora([[0], [0]], [[4, 8]], head=4)}
    found = merged(HetLoRA(), sent).adapter
    np.testing.assert_allclose(found.blocks["m"].A[0], [3, 4])
    np.testing.assert_allclose(found.dense["head"], 3)


def test_the_scale_is_one_for_all_ranks(tmp_path):
    """Never alpha / r_i: a client of rank 1 computes with its one component exactly as the server would."""
    f = toy.federation(HetLoRA("uniform"), tmp_path / "run", rounds=2)
    ranks = {}

    def check(job: Job) -> None:
        assert job.adapter.scale == f.begin.adapter.scale
        state = f.states[job.round - 1]
        ranks[job.device.id] = {block.rank for block in job.adapter.blocks.values()}
        for name, delta in job.adapter.delta().items():
            whole, r = state.adapter.blocks[name], job.adapter.blocks[name].rank
            np.testing.assert_array_equal(delta, np.float32(state.adapter.scale) * (whole.B[:, :r] @ whole.A[:r]))

    for site in f.sites.values():
        object.__setattr__(site, "fit", lambda job, fit=site.fit: (check(job), fit(job))[1])
    f.play()
    assert ranks == {"c0": {1}, "c1": {2}, "c2": {4}, "c3": {4}}


def pruning(method: HetLoRA, tail: float, adapter: Adapter) -> Update:
    """One client's round in which training multiplies the components from the third on by `tail`."""

    def fit(job: Job, observe: Any = None) -> Update:
        blocks = {
            name: replace(block, B=block.B * np.where(np.arange(block.rank) < 2, 2, tail).astype(block.B.dtype))
            for name, block in job.adapter.blocks.items()
        }
        return Update(replace(job.adapter, blocks=blocks), 4)

    spec = toy.small(rank=4)
    plan = method.plan(State(0, 9, adapter), toy.cohort("c0"), 0)["c0"]
    return next(iter(method.train([toy.job(spec, adapter, plan, fit)])))


@pytest.mark.parametrize(
    ("gamma", "min_rank", "tail", "rank"),
    [
        (0.5, 1, 0.9, 2), (0.5, 1, 1.0, 4), (0.5, 1, 1.1, 4), (0.99, 1, 0.9, 3), (0.5, 3, 0.9, 3), (0.5, 4, 0.9, 4),
        (0.1, 1, 0.9, 4),
    ],
)  # fmt: skip
def test_a_client_prunes_its_tail_where_that_got_smaller(gamma, min_rank, tail, rank):
    """To floor(gamma r), not below min_rank; with gamma = 0.1 the tail holds what grew, and stays."""
    method, adapter = HetLoRA(gamma=gamma, min_rank=min_rank), plain(4)
    update = pruning(method, tail, adapter)
    assert {tuple(block.ids) for block in update.adapter.blocks.values()} == {tuple(range(rank))}
    before = State(0, 9, adapter, arrays={"rank/c2": np.array(1)})  # of a client that is away
    after = method.merge(before, toy.Arrived({"c0": update}))
    assert after.arrays["rank/c0"] == after.metrics["mean_rank"] == rank
    plan = method.plan(after, toy.cohort("c0", "c1", "c2"), 0)  # and so it stays, for each client
    for client, kept in (("c0", rank), ("c1", 4), ("c2", 1)):
        assert [len(ids) for ids in plan[client].train.values()] == [kept, kept]
    assert HetLoRA("uniform").merge(State(0, 9, adapter), toy.Arrived({"c0": update})).arrays == {}


def test_the_penalty_is_the_gradient_of_the_tails_norms(rng):
    """lambda sum_m |B_tail| |A_tail|, against central differences; what is kept feels nothing."""
    adapter, method = toy.drawn(toy.small(rank=4)), HetLoRA(gamma=0.5, penalty=0.1)
    seen: list[dict[str, np.ndarray]] = []

    def fit(job: Job, observe: Any = None) -> Update:
        values = {f: v.double() for f, v in toy.flat(adapter).items() if f in "BA"}
        grads = {f: torch.zeros_like(v) for f, v in values.items()}
        observe(values, grads)
        seen.append({f: g.numpy() for f, g in grads.items()})
        return Update(job.adapter, 1)

    plan = method.plan(State(0, 9, adapter), toy.cohort("c0"), 0)["c0"]
    list(method.train([toy.job(toy.small(rank=4), adapter, plan, fit)]))

    def objective(flat: dict[str, np.ndarray]) -> float:
        total, at = 0.0, {"B": 0, "A": 0}
        for block in adapter.blocks.values():
            norms = {}
            for f, width in (("B", block.B.shape[0]), ("A", block.A.shape[1])):
                rows = flat[f][at[f] : at[f] + 4 * width].reshape(4, width)
                norms[f], at[f] = np.linalg.norm(rows[2:]), at[f] + 4 * width
            total += 0.1 * norms["B"] * norms["A"]
        return total

    flat = {f: v.double().numpy() for f, v in toy.flat(adapter).items() if f in "BA"}
    for f in "BA":
        for i in range(flat[f].size):
            up, down = ({**flat, f: flat[f] + sign * 1e-6 * (np.arange(flat[f].size) == i)} for sign in (1, -1))
            assert seen[0][f][i] == pytest.approx((objective(up) - objective(down)) / 2e-6, abs=1e-8)
    assert np.count_nonzero(seen[0]["B"]) == flat["B"].size / 2


def test_at_the_start_the_penalty_is_finite(tmp_path):
    """B = 0: the norm has no gradient there."""
    f = toy.federation(HetLoRA(gamma=0.5, penalty=1.0), tmp_path / "run", rounds=3)
    assert all(row["clients_ok"] == 4 for row in f.play()["round"])


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("fedprox", {"mu": -1}, "mu"), ("fedprox", {"mu": float("nan")}, "mu"), ("fedprox", {"mu": float("inf")}, "mu"),
        ("hetlora", {"gamma": 1.0}, "gamma"), ("hetlora", {"gamma": 0}, "gamma"), ("hetlora", {"penalty": -1}, "penalty"),
        ("hetlora", {"min_rank": 0}, "min_rank"), ("hetlora", {"form": "fulll"}, "form"),
    ],
)  # fmt: skip
def test_a_bad_hyper_parameter_is_named(name, settings, named):
    with pytest.raises(ValueError, match=f"method.*{named}"):
        methods.build({"name": name, **settings})
