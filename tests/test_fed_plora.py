"""Fed-PLoRA: the properties of its specification, by their numbers there, on small numbers or the tiny model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import toy
from fedrank import cost, methods
from fedrank.adapter import Adapter, Block, gaussian, norms
from fedrank.client import Site
from fedrank.exactness import covariance, noted
from fedrank.methods.fed_plora import FedPLoRA
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import Device, Job, ModelSpec, Plan, State, Update, rng
from fedrank.training import tasks
from fedrank.training.hooks import incremented, live, mounted
from fedrank.training.scoring import Scorer

R = 4
SPEC = toy.small({"0.m": (5, 6), "1.m": (7, 3)}, rank=R)
RESTS = ("freeze", "fold", "drop")
SELECTIONS = ("random", "fixed", "weight_norm")


def drawn(spec: ModelSpec = SPEC, seed: int = 0) -> Adapter:
    """B and A of normal numbers, in float64."""
    draw, blocks = rng(seed, "drawn"), {}
    for name, (out, in_) in spec.shapes.items():
        b, a = draw.normal(size=(out, spec.rank)), draw.normal(size=(spec.rank, in_))
        blocks[name] = Block(np.arange(spec.rank), b, None, a)
    return Adapter(blocks, spec.scale, {n: t.astype(float) for n, t in spec.dense.items()})


def state_of(adapter: Adapter, round: int = 0) -> State:
    return State(round, 10, adapter)


def devices(*ranks: int | None) -> dict[str, Device]:
    return {f"c{at}": Device(f"c{at}", 4, rank=rank) for at, rank in enumerate(ranks)}


def changed(job: Job, observe: Any = None, lower: Any = None) -> Update:
    """Local training without a model: a drawn step of what learns."""
    draw, blocks = job.rng("step"), {}
    for name, block in job.adapter.take(job.plan.train).blocks.items():
        blocks[name] = Block(
            block.ids, block.B + draw.normal(size=block.B.shape), None, block.A + draw.normal(size=block.A.shape)
        )
    return Update(Adapter(blocks, job.adapter.scale, job.adapter.dense), 4)


def work(method: FedPLoRA, state: State, cohort: Mapping[str, Device], fit: Any = changed) -> dict[str, Update]:
    """One round of every client of the cohort."""
    plans = method.plan(state, cohort, 0)
    jobs = [toy.job(SPEC, received(state, plan), plan, fit, client, state.round + 1) for client, plan in plans.items()]
    return dict(zip(plans, method.train(jobs), strict=True))


def noise(method: FedPLoRA, state: State, cohort: Mapping[str, Device]) -> dict[str, float]:
    """The figures of one round of every client of the cohort."""
    came = toy.Arrived(work(method, state, cohort))
    return dict(noted(method, state, method.merge(state, came), method.plan(state, cohort, 0), came).metrics)


def received(state: State, plan: Plan) -> Adapter:
    return state.adapter.take(plan.train).union(state.adapter.take(plan.frozen))


def started(method: FedPLoRA, state: State, cohort: Mapping[str, Device]) -> dict[str, Job]:
    """The job that every client's local training is given."""
    jobs: dict[str, Job] = {}

    def fit(job: Job) -> Update:
        jobs[job.device.id] = job
        return changed(job)

    work(method, state, cohort, fit)
    return jobs


def increment(job: Job) -> dict[str, np.ndarray]:
    """The dense increment of the model that a job starts from."""
    total = {name: np.zeros(shape) for name, shape in SPEC.shapes.items()}
    parts = [job.adapter.take(job.plan.train), job.adapter.take(job.plan.frozen), *job.base_updates]
    for part in parts:
        assert part in parts[:2] or not part.dense  # a head is no increment of the base
        for name, delta in part.delta().items():
            total[name] = total[name] + delta
    return total


def norm(matrices: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(m**2) for m in matrices.values())))


def ids(found: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: i.tolist() for name, i in found.items() if len(i)}


# ---- 1, 2: modules and the start


def test_p01_the_sum_of_the_modules_is_the_product():
    """sum_j B[:,j] A[j,:] = B A."""
    adapter = drawn()
    for name, block in adapter.blocks.items():
        parts = [adapter.take({name: np.array([j])}).delta()[name] for j in range(R)]
        np.testing.assert_allclose(sum(parts), SPEC.scale * block.B @ block.A, atol=1e-10)
        np.testing.assert_allclose(parts[1], SPEC.scale * np.outer(block.B[:, 1], block.A[1]), atol=1e-10)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rest", RESTS)
def test_p02_every_client_starts_from_the_global_function_whatever_its_rank(rest, selection):
    method, state = FedPLoRA(selection, rest), state_of(drawn())
    for round in range(5):
        for name, job in started(method, replace(state, round=round), devices(1, 2, 3, R, None)).items():
            found, truth = increment(job), state.adapter.delta()
            apart = norm({n: truth[n] - found[n] for n in truth})
            whole = rest != "drop" or name in ("c3", "c4")
            assert apart < 1e-10 if whole else apart > 0.1


def test_p02_in_a_real_run_clients_receive_the_global_adapter_to_the_bit(tmp_path):
    seen: list[Job] = []

    def watch(site: Site) -> Site:
        def fit(job: Job, **more: Any) -> Update:
            seen.append(job)
            return site.fit(job, **more)

        return replace(site, fit=fit)

    f = toy.federation(FedPLoRA(), tmp_path / "run", rounds=2, alter=watch)
    f.play()
    states = f.states
    assert len(seen) == 8
    for job in seen:
        assert toy.same(job.adapter, states[job.round - 1].adapter)
        assert {len(i) for i in job.plan.train.values()} == {toy.RANKS[int(job.device.id[1])]}
        left = {n: np.setdiff1d(np.arange(R), i) for n, i in job.plan.train.items()}
        assert ids(job.plan.frozen) == ids(left)


def test_folding_comes_on_top_of_the_base_updates_that_hold():
    """And where there is nothing to fold, nothing changes."""
    method, state, earlier = FedPLoRA(rest="fold"), state_of(drawn()), drawn(seed=1)
    seen: list[Job] = []
    plans = method.plan(state, devices(1, R), 0)
    jobs = [replace(toy.job(SPEC, received(state, p), p, changed), base_updates=(earlier,)) for p in plans.values()]
    list(method.train([replace(job, fit=lambda inner: (seen.append(inner), changed(inner))[1]) for job in jobs]))
    assert seen[0].base_updates[0] is earlier
    assert ids(seen[0].base_updates[1].ids) == ids(jobs[0].plan.frozen)
    assert not seen[0].plan.frozen
    assert seen[1].base_updates == (earlier,)
    assert seen[1].plan is jobs[1].plan


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_rank_above_the_servers_is_the_servers(selection):
    plans = FedPLoRA(selection).plan(state_of(drawn()), devices(9, None), 0)
    assert all(ids(p.train) == {n: list(range(R)) for n in SPEC.shapes} and not p.frozen for p in plans.values())


# ---- 3, 6, 13: fold and freeze


def double_precision(job: Job, layers: Mapping[str, torch.nn.Linear]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a job's trained factors on one linear layer per module."""
    weights = {name: layer.weight for name, layer in layers.items()} | incremented(layers, job.base_updates)
    loss, leaves = torch.zeros((), dtype=torch.float64), {}
    for name, weight in weights.items():
        x = torch.tensor(rng(0, "x", name).normal(size=(9, weight.shape[1])))
        y = x @ weight.T
        for part, learns in ((job.adapter.take(job.plan.train), True), (job.adapter.take(job.plan.frozen), False)):
            if (block := part.blocks.get(name)) is not None:
                b, a = (torch.tensor(factor, requires_grad=learns) for factor in (block.B, block.A))
                y = y + part.scale * (x @ a.T) @ b.T
                if learns:
                    leaves |= {f"B/{name}": b, f"A/{name}": a}
        loss = loss + torch.sum(torch.sin(y) ** 2)
    loss.backward()
    assert all(layer.weight.grad is None for layer in layers.values())
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def test_p03_fold_and_freeze_have_the_same_loss_and_gradients():
    layers = {n: torch.nn.Linear(i, o, bias=False, dtype=torch.float64) for n, (o, i) in SPEC.shapes.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    jobs = {rest: started(FedPLoRA(rest=rest), state_of(drawn()), devices(1, 2, R)) for rest in RESTS}
    for client in ("c0", "c1", "c2"):
        found = {rest: double_precision(jobs[rest][client], layers) for rest in RESTS}
        torch.testing.assert_close(found["fold"][0], found["freeze"][0], rtol=1e-10, atol=1e-10)
        assert found["fold"][1].keys() == found["freeze"][1].keys()
        for name, grad in found["freeze"][1].items():
            torch.testing.assert_close(found["fold"][1][name], grad, rtol=1e-10, atol=1e-10)
        assert (abs(found["drop"][0] - found["freeze"][0]) > 1e-3) == (client != "c2")


def model_job(rest: str, rank: int) -> tuple[FedPLoRA, Job]:
    """One client's work on the tiny model, in the middle of a run."""
    spec, method = toy.encoder().spec, FedPLoRA(rest=rest)
    full = gaussian(spec.shapes, R, spec.scale, rng(0, "full"), std=0.2)
    full = Adapter({n: replace(b, e=None) for n, b in full.blocks.items()}, full.scale, spec.dense)
    state = state_of(full, 1)
    plan = method.plan(state, devices(rank), 0)["c0"]
    fit = partial(toy.trainer(method.default_lr).fit, rows=np.arange(8))
    return method, toy.job(spec, received(state, plan), plan, fit)


def observed(
    rest: str, rank: int, dropout: float = 0.0
) -> tuple[Update, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The update of one real step, and values and gradients before it. dropout: of the base."""
    method, job = model_job(rest, rank)
    job = replace(job, local=job.local.model_copy(update={"dropout": dropout}))
    seen: list[dict[str, torch.Tensor]] = []

    def observe(values: Any, grads: Any) -> None:
        seen.extend({n: t.detach().clone() for n, t in part.items()} for part in (values, grads))

    (update,) = method.train([replace(job, fit=lambda inner: job.fit(inner, observe=observe))])
    return update, seen[0], seen[1]


@pytest.mark.parametrize(("rank", "dropout"), [(1, 0.0), (3, 0.0), (1, 0.3)])
def test_p03_on_the_real_model_too(rank, dropout):
    """Under the base's dropout as well: the adapter itself has none."""
    found = {rest: observed(rest, rank, dropout) for rest in RESTS}
    loss = {rest: update.metrics["loss"] for rest, (update, _, _) in found.items()}
    assert loss["fold"] == pytest.approx(loss["freeze"], rel=1e-5)
    assert abs(loss["drop"] - loss["freeze"]) > 1e-3
    for name, grad in found["freeze"][2].items():
        assert grad.abs().max() > 1e-4
        torch.testing.assert_close(found["fold"][2][name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rest", RESTS)
def test_p06_the_base_is_the_same_to_the_bit_after_a_client_worked(rest):
    network = toy.encoder().network
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in network.state_dict().items()}
    observed(rest, 2)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_p13_what_trains_is_rank_times_out_plus_in_and_the_rest_has_no_gradient(rank, rest):
    update, values, _ = observed(rest, rank)
    shapes = toy.encoder().spec.shapes
    assert values["B"].numel() + values["A"].numel() == rank * sum(map(sum, shapes.values()))
    assert {block.rank for block in update.adapter.blocks.values()} == {rank}
    assert all(parameter.grad is None for parameter in toy.encoder().network.parameters())
    _, job = model_job("freeze", rank)
    on = live(job.adapter.take(job.plan.train), job.adapter.take(job.plan.frozen), "BAh", "cpu")
    inputs, labels = toy.encoded("train").batch(np.arange(8), "cpu")
    with mounted(toy.encoder().modules, toy.encoder().heads, on):
        tasks.loss(toy.encoder().network(**inputs), labels).backward()
    for name, part in on.learning.items():
        assert part.A.grad is not None
        assert len(part.A) + (len(on.frozen[name].A) if name in on.frozen else 0) == R
    assert all(part.A.grad is None and part.Bt.grad is None for part in on.frozen.values())


# ---- 4: equal ranks


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> tuple[toy.Federation, dict[str, Any]]:
    f = toy.federation(FedAvg(), tmp_path_factory.mktemp("fedavg") / "run", rounds=2)
    return f, f.play()


def at_full_rank(site: Site) -> Site:
    """The site with a device of the server's rank."""
    return replace(site, device=replace(site.device, rank=R))


@pytest.mark.parametrize("rest", RESTS)
def test_p04_where_all_have_the_full_rank_it_is_fedavg(rest, fedavg, tmp_path):
    """To the bit, where clients count by examples."""
    other, theirs = fedavg
    ours = toy.federation(FedPLoRA(rest=rest, weights="examples"), tmp_path / "ours", rounds=2, alter=at_full_rank)
    for one, two in zip(ours.play()["round"], theirs["round"], strict=True):
        assert all(one[k] == two[k] for k in ("train_loss", "accuracy", "adapter_bytes_up", "adapter_bytes_down"))
    for number, state in ours.states.items():
        assert toy.same(state.adapter, other.states[number].adapter)


def test_p04_by_the_default_weights_too_where_clients_have_equally_many_rows(tmp_path):
    rows = {name: np.arange(16 * at, 16 * at + 16) for at, name in enumerate(toy.CLIENTS)}
    one, two = (
        toy.federation(method, tmp_path / type(method).__name__, rounds=2, shares=rows, alter=at_full_rank)
        for method in (FedPLoRA(), FedAvg())
    )
    for ours, theirs in zip(one.play()["round"], two.play()["round"], strict=True):
        assert all(ours[k] == theirs[k] for k in ("train_loss", "accuracy"))
    assert toy.same(one.last.adapter, two.last.adapter)


def test_p04_with_other_ranks_it_is_not(fedavg, tmp_path):
    f = toy.federation(FedPLoRA(), tmp_path / "run", rounds=2)
    f.play()
    assert not toy.same(f.last.adapter, fedavg[0].last.adapter)


# ---- 5, 8-12: the merge


def one(ids: list[int], b: list[float], a: list[float], examples: int = 1) -> Update:
    """An update of 1x1 modules."""
    return Update(
        Adapter({"m": Block(np.array(ids), np.array([b], float), None, np.array([a], float).T)}, 1.0, {}), examples
    )


def test_the_mean_is_over_those_who_trained_a_module():
    """Module 0: B 1, 3 and A 2, 6 of two clients; module 1 of the second alone; module 2 of nobody."""
    old = one([0, 1, 2], [9, 9, 7], [9, 9, 8]).adapter
    came = {"a": one([0], [1], [2], 3), "b": one([0, 1], [3, 5], [6, 4], 1)}
    found = FedPLoRA().merge(state_of(old), toy.Arrived(came)).adapter.blocks["m"]
    assert (found.B.tolist(), found.A.T.tolist()) == ([[2, 5, 7]], [[4, 4, 8]])
    found = FedPLoRA(weights="examples").merge(state_of(old), toy.Arrived(came)).adapter.blocks["m"]
    assert (found.B.tolist(), found.A.T.tolist()) == ([[1.5, 5, 7]], [[3, 4, 8]])


def test_p05_what_nobody_trained_keeps_its_value():
    method, state = FedPLoRA(), state_of(drawn())
    updates = work(method, state, devices(1, 1))
    after = method.merge(state, toy.Arrived(updates))
    kept = 0
    for name, block in after.adapter.blocks.items():
        touched = np.unique(np.concatenate([u.adapter.blocks[name].ids for u in updates.values()]))
        for j in range(R):
            same = np.array_equal(block.A[j], state.adapter.blocks[name].A[j])
            assert same == np.array_equal(block.B[:, j], state.adapter.blocks[name].B[:, j]) == (j not in touched)
            kept += same
    assert kept >= 4  # two clients of rank one leave at least two of four, in both modules
    assert not after.adapter.odd()
    assert all(np.isfinite(list(noise(method, state, devices(1, 1)).values())))


GROUPS = {  # by the specification: R, sizes and ranks of the groups, cohort -> modules nobody trains, trainers of a module
    "natural instructions": (16, {1: 17, 8: 17, 16: 16}, 5, 0.025, 2.6),
    "finance": (8, {1: 17, 2: 17, 8: 16}, 5, 0.046, 2.2),
    "dolly": (32, {1: 17, 8: 17, 32: 16}, 5, 0.061, 2.1),
}


@pytest.mark.parametrize("name", GROUPS)
def test_p05_how_often_nobody_trains_a_module(name):
    """So that there are such modules in the paper's own runs."""
    full_rank, groups, cohort, untouched, trainers = GROUPS[name]
    method, state = FedPLoRA(), state_of(drawn(toy.small({"a": (2, 2), "b": (2, 2)}, rank=full_rank)))
    population = list(devices(*(rank for rank, size in groups.items() for _ in range(size))).values())
    counts = np.zeros((400, 2, full_rank))
    for round, count in enumerate(counts):
        now = replace(state, round=round)
        for at in rng(0, "cohort", round).choice(len(population), cohort, replace=False):
            one = population[at]
            for module, chosen in enumerate(method.plan(now, {one.id: one}, 0)[one.id].train.values()):
                count[module, chosen] += 1
    assert np.mean(counts == 0) == pytest.approx(untouched, rel=0.25)
    assert np.mean(counts) == pytest.approx(trainers, rel=0.05)


def test_p08_where_every_module_has_one_trainer_there_is_no_covariance():
    """Where one of four clients joins another in a module, it is theirs alone: |1.5 * -1 + -1.5 * 1| / 2."""
    came = {f"c{j}": one([j], [j + 1.5], [j - 3.0]) for j in range(3)}
    assert covariance(toy.Arrived(came)) == 0
    assert covariance(toy.Arrived(came | {"more": one([2], [0.5], [1.0])})) == pytest.approx(1.5)


def bound(came: toy.Arrived, join: Callable[[float, float], float]) -> float:
    """sum_j mean_i join(|dB_ij|, |dA_ij|) over those who trained j, times the scale."""
    parts: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    scale = 1.0
    for _, update in came:
        scale = update.adapter.scale
        for name, block in update.adapter.blocks.items():
            for at, j in enumerate(block.ids):
                parts.setdefault((name, int(j)), []).append((block.B[:, at], block.A[at]))
    total = 0.0
    for pairs in parts.values():
        b, a = (np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1))
        total += float(np.mean([join(np.linalg.norm(x - b), np.linalg.norm(y - a)) for x, y in pairs]))
    return scale * total


@given(ranks=st.lists(st.integers(1, R), min_size=1, max_size=5), seed=st.integers(0, 1000))
@examples(max_examples=50, deadline=None)
def test_p09_the_covariance_is_within_the_product_bound(ranks, seed):
    came = toy.Arrived(work(FedPLoRA(), state_of(drawn(seed=seed), seed), devices(*ranks)))
    assert covariance(came) <= bound(came, lambda b, a: b * a) * (1 + 1e-10)


def test_p09_the_papers_sum_bound_fails_on_three_and_minus_three():
    """B = A = 3 and -3: the covariance is 9, the product bound 9, the sum bound 6."""
    came = toy.Arrived({"a": one([0], [3], [3]), "b": one([0], [-3], [-3])})
    assert covariance(came) == pytest.approx(9)
    assert bound(came, lambda b, a: b * a) == pytest.approx(9)
    assert bound(came, lambda b, a: b + a) == pytest.approx(6)


def test_p10_with_equal_ranks_the_three_figures_are_the_distance_to_the_mean_function():
    """|mean(B_i A_i) - mean(B) mean(A)|."""
    method, state = FedPLoRA(), state_of(drawn())
    came = toy.Arrived(work(method, state, devices(R, R, R)))
    after = method.merge(state, came)
    deltas, new = [update.adapter.delta() for _, update in came], after.adapter.delta()
    distance = norm({n: sum(d[n] for d in deltas) / 3 - new[n] for n in new})
    assert distance > 1
    found = noise(method, state, devices(R, R, R))
    for figure in ("agg_cov", "agg_eq3", "agg_fullmodel"):
        assert found[figure] == pytest.approx(distance, rel=1e-10)


def test_p10_with_other_ranks_they_are_three():
    found = noise(FedPLoRA(), state_of(drawn()), devices(1, 1, 3, 3, R, R))
    assert found["start_error"] == found["n_init"] == 0
    assert found["agg_eq3"] > 1.1 * found["agg_fullmodel"]  # it takes what is folded for lost
    assert abs(found["agg_cov"] / found["agg_fullmodel"] - 1) > 0.1


def test_dropping_shows_in_the_start_error():
    method, state = FedPLoRA(rest="drop"), state_of(drawn())
    updates = work(method, state, devices(1, R))
    lost = state.adapter.without(updates["c0"].adapter.ids)
    found = noise(method, state, devices(1, R))
    assert found["start_error"] == pytest.approx(norm(lost.delta()) / 2)
    factors = [np.linalg.norm(factor) for block in lost.blocks.values() for factor in (block.B, block.A)]
    assert found["n_init"] == pytest.approx(sum(factors))
    assert found["agg_fullmodel"] == found["agg_eq3"]


def test_p11_the_order_of_clients_is_no_matter():
    method, state = FedPLoRA(), state_of(drawn())
    updates = work(method, state, devices(1, 2, 3, R))
    turned = dict(zip(updates, list(updates.values())[::-1], strict=True))  # the same work under other names
    found, other = (method.merge(state, toy.Arrived(u)) for u in (updates, turned))
    for a, b in zip(toy.arrays(found.adapter).values(), toy.arrays(other.adapter).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert covariance(toy.Arrived(updates)) == pytest.approx(covariance(toy.Arrived(turned)))


def test_p11_other_ids_give_the_same_modules_under_other_ids():
    """New id i is what was order[i]."""
    order = np.array([2, 0, 3, 1])
    method, state = FedPLoRA(), state_of(drawn())
    updates = work(method, state, devices(1, 2, 3))

    def renamed(adapter: Adapter) -> Adapter:
        blocks = {}
        for name, block in adapter.blocks.items():
            new = np.array([np.flatnonzero(order == j)[0] for j in block.ids])
            at = np.argsort(new)
            blocks[name] = Block(new[at], block.B[:, at], None, block.A[at])
        return replace(adapter, blocks=blocks)

    found = method.merge(state, toy.Arrived(updates))
    again = {c: replace(u, adapter=renamed(u.adapter)) for c, u in updates.items()}
    other = method.merge(state_of(renamed(state.adapter)), toy.Arrived(again))
    assert toy.same(renamed(found.adapter), other.adapter)
    assert covariance(toy.Arrived(again)) == pytest.approx(covariance(toy.Arrived(updates)))


def test_p12_another_basis_of_the_same_function_is_another_adapter():
    """(B P, P' A) makes the same function of other rank-ones, so what a client is given and gives differs."""
    turn = np.linalg.qr(rng(0, "turn").normal(size=(R, R)))[0]
    adapter = drawn()
    blocks = {n: Block(b.ids, b.B @ turn, None, turn.T @ b.A) for n, b in adapter.blocks.items()}
    turned = replace(adapter, blocks=blocks)
    for name in adapter.blocks:
        np.testing.assert_allclose(turned.delta()[name], adapter.delta()[name], atol=1e-12)
    method = FedPLoRA()
    after = [
        method.merge(state_of(a), toy.Arrived(work(method, state_of(a), devices(1, 2)))).adapter.delta()
        for a in (adapter, turned)
    ]
    assert norm({n: after[0][n] - after[1][n] for n in after[0]}) > 0.1


# ---- 7: what travels


@pytest.mark.parametrize("rest", RESTS)
def test_p07_up_the_clients_rank_down_the_servers(rest, tmp_path):
    """r_i (out + in) numbers per matrix up, R (out + in) down, r_i where the rest is dropped; predicted, and sent."""
    f = toy.federation(FedPLoRA(rest=rest), tmp_path / "run", rounds=1)
    rows = {row["client"]: row for row in f.play()["client"]}
    plans = f.server.method.plan(f.begin, f.server.engine.fleet(), f.server.seed)
    numbers = 4 * sum(map(sum, toy.encoder().spec.shapes.values()))
    modules = len(toy.encoder().spec.modules)
    for client, rank in zip(toy.CLIENTS, toy.RANKS, strict=True):
        up, down = rank * numbers, (rank if rest == "drop" else R) * numbers
        assert (rows[client]["adapter_bytes_up"], rows[client]["adapter_bytes_down"]) == (up, down)
        assert cost.up(f.begin.adapter, plans[client], modules, "f32").adapter == up
        assert cost.down(f.begin.adapter, plans[client], modules, "f32").adapter == down


SIZES = {  # query and value of every layer, and the numbers per rank of the specification
    "bert-base": ({f"{at}": (768, 768) for at in range(24)}, 16, 36_864),
    "llama-3.1-8b": ({f"{at}": (4096, 4096) if at % 2 else (1024, 4096) for at in range(64)}, 8, 425_984),
    "opt-1.3b": ({f"{at}": (2048, 2048) for at in range(48)}, 4, 196_608),
}


@pytest.mark.parametrize("name", SIZES)
def test_p07_the_papers_models_by_the_table(name):
    sizes, rank, per_rank = SIZES[name]
    method, spec = FedPLoRA(), toy.small(sizes, rank=rank)
    state = method.begin(spec, 1, 0)
    ranks = (1, 4, rank)
    for client, plan in method.plan(state, devices(*ranks), 0).items():
        mine = ranks[int(client[1])]
        assert cost.up(state.adapter, plan, len(sizes), "f32").adapter == 4 * mine * per_rank
        assert cost.down(state.adapter, plan, len(sizes), "f32").adapter == 4 * rank * per_rank


def test_p07_the_mean_of_three_groups_on_bert_base():
    """Ranks 1, 4, 16: 258,048 numbers up on average, 589,824 down, 2.29 times what dropping sends."""
    sizes, rank, _ = SIZES["bert-base"]
    found = {}
    for rest in ("freeze", "drop"):
        method = FedPLoRA(rest=rest)
        state = method.begin(toy.small(sizes, rank=rank), 1, 0)
        plans = method.plan(state, devices(1, 4, 16), 0).values()
        found[rest] = [
            np.mean([way(state.adapter, plan, 24, "f32").adapter for plan in plans]) / 4 for way in (cost.up, cost.down)
        ]
    assert found == {"freeze": [258_048, 589_824], "drop": [258_048, 258_048]}
    assert found["freeze"][1] / found["drop"][1] == pytest.approx(2.29, abs=0.005)


# ---- 14: selection

CHI2_7, CHI2_49 = 24.32, 85.35  # 0.999 quantiles


def test_p14_every_module_is_selected_equally_often_and_every_matrix_by_itself():
    """Counts drawn without replacement: var = n p (1 - p), cov = -var / (R - 1).

    So sum_j (O_j - n p)^2 / var * (R - 1) / R is chi^2(R - 1).
    """
    full, rank, rounds = 8, 3, 1500
    method, state = FedPLoRA(), state_of(drawn(toy.small({"a": (2, 2), "b": (2, 2)}, rank=full)))
    picked = {name: np.zeros((2 * rounds, full)) for name in "ab"}
    for round in range(rounds):
        plans = method.plan(replace(state, round=round), devices(rank, rank), 0)
        for at, plan in enumerate(plans.values()):
            for name, chosen in plan.train.items():
                picked[name][2 * round + at, chosen] = 1
    n, p = 2 * rounds, rank / full
    variance, shrink = p * (1 - p), (full - 1) / full
    for name in "ab":
        assert set(picked[name].sum(1)) == {rank}
        assert np.sum((picked[name].sum(0) - n * p) ** 2) / (n * variance) * shrink < CHI2_7
    pairs = {
        "matrices": (picked["a"], picked["b"]),
        "clients": (picked["a"][::2], picked["a"][1::2]),
        "rounds": (picked["a"][:-2:2], picked["a"][2::2]),
    }
    for what, (one_, two) in pairs.items():
        assert association(one_, two, p) < CHI2_49, what
    assert association(picked["a"], picked["a"], p) > 10 * CHI2_49


def association(one: np.ndarray, two: np.ndarray, p: float) -> float:
    """The sum of squared covariances of selections (draws, R), which is chi^2((R - 1)^2) where they are independent."""
    count, full = one.shape
    per_direction = p * (1 - p) * full / (full - 1)
    return float(np.sum(((one - p).T @ (two - p)) ** 2) / (count * per_direction**2))


@pytest.mark.parametrize("selection", ["random", "weight_norm"])
def test_selection_is_drawn_from_seed_round_client_and_module(selection):
    """By norm it is ties that are drawn, as at the start, where B = 0."""
    method = FedPLoRA(selection)
    state = method.begin(toy.small({f"{at}": (2, 2) for at in range(8)}, rank=8), 10, 0)
    first = ids(method.plan(state, devices(3, 3), 0)["c0"].train)
    assert first == ids(method.plan(state, devices(3), 0)["c0"].train)  # whoever else is in the cohort
    others = [
        method.plan(state, devices(3, 3), 0)["c1"],
        method.plan(state, devices(3), 1)["c0"],
        method.plan(replace(state, round=1), devices(3), 0)["c0"],
    ]
    assert all(ids(plan.train) != first for plan in others)
    assert len({tuple(i) for i in first.values()}) > 1


def test_fixed_is_the_first_modules_in_every_round():
    plans = [
        FedPLoRA("fixed").plan(replace(state_of(drawn()), round=t), devices(1, 3), 0) for t in range(3)
    ]  # fmt: skip
    assert all(ids(p["c0"].train) == {"0.m": [0], "1.m": [0]} for p in plans)
    assert all(ids(p["c1"].train) == {"0.m": [0, 1, 2], "1.m": [0, 1, 2]} for p in plans)
    assert ids(plans[0]["c1"].frozen) == {"0.m": [3], "1.m": [3]}


def test_weight_norm_is_the_largest_modules_and_at_first_a_draw():
    method, adapter = FedPLoRA("weight_norm"), drawn()
    size = np.array([0.1, 3.0, 1.0, 2.0])
    blocks = {n: replace(b, B=b.B * size / norms(adapter)[n]) for n, b in adapter.blocks.items()}
    plan = method.plan(state_of(replace(adapter, blocks=blocks)), devices(2), 0)["c0"]
    assert ids(plan.train) == {"0.m": [1, 3], "1.m": [1, 3]}
    begin = method.begin(toy.small({f"{at}": (2, 2) for at in range(30)}, rank=R), 3, 0)  # B = 0
    firsts = [chosen[0] for chosen in ids(method.plan(begin, devices(1), 0)["c0"].train).values()]
    assert set(firsts) == set(range(R))


# ---- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rest", RESTS)
def test_every_selection_learns_with_every_rest(selection, rest, tmp_path):
    f = toy.federation(FedPLoRA(selection, rest), tmp_path / "run", epochs=2, exactness=True)
    rows = f.play()["round"]
    assert rows[-1]["loss"] < rows[0]["train_loss"]
    assert rows[-1]["components"] == R * len(toy.encoder().spec.modules)
    assert rows[0]["start_error"] == 0  # B = 0: there is nothing to miss yet
    assert [row["start_error"] > 0 for row in rows[1:]] == [rest == "drop"] * 2
    assert all(row[figure] > 0 for row in rows for figure in ("agg_cov", "agg_eq3", "agg_fullmodel"))


def test_fold_and_freeze_stay_together_over_a_run(tmp_path):
    """Clients of one rank follow each other: their folds are alike in shape, and no one gets another's."""

    def paired(site: Site) -> Site:
        return replace(site, device=replace(site.device, rank=1 if site.device.id < "c2" else 3))

    runs = {rest: toy.federation(FedPLoRA(rest=rest), tmp_path / rest, alter=paired) for rest in RESTS}
    rows = {rest: f.play()["round"] for rest, f in runs.items()}
    losses = {rest: np.array([row["train_loss"] for row in found]) for rest, found in rows.items()}
    np.testing.assert_allclose(losses["fold"], losses["freeze"], rtol=1e-4)
    assert not runs["fold"].last.base_updates  # a fold is of one round
    assert np.abs(losses["drop"] - losses["freeze"]).max() > 1e-3


@pytest.mark.parametrize("rest", RESTS)
def test_whatever_a_client_trains_all_modules_are_evaluated(rest, tmp_path):
    seen: list[Adapter] = []

    def watch(site: Site) -> Site:
        def evaluate(adapter: Adapter, base: tuple[Adapter, ...], last: bool) -> dict[str, float]:
            assert not base
            seen.append(adapter)
            return site.evaluate(adapter, base, last)

        return replace(site, evaluate=evaluate)

    f = toy.federation(FedPLoRA(rest=rest), tmp_path / "run", rounds=1, alter=watch)
    (row,) = f.play()["round"]
    assert len(seen) == 2 * len(toy.CLIENTS)  # after the round and at the end
    assert all(toy.same(adapter, f.last.adapter) for adapter in seen)
    trainer, test = toy.trainer(FedPLoRA.default_lr), toy.encoded("test")
    assert row["loss"] == Scorer(trainer).evaluate(f.last.adapter, test, np.arange(len(test)))["loss"]


def test_the_figures_in_the_ledger_are_those_of_the_clients_models(tmp_path):
    """Summed up densely from what the clients sent."""
    sent: dict[tuple[int, str], Adapter] = {}

    def watch(site: Site) -> Site:
        def fit(job: Job, **more: Any) -> Update:
            update = site.fit(job, **more)
            sent[job.round, job.device.id] = update.adapter
            return update

        return replace(site, fit=fit)

    f = toy.federation(FedPLoRA(), tmp_path / "run", rounds=2, alter=watch, exactness=True)
    row = f.play()["round"][1]
    old, new = f.states[1].adapter, f.states[2].adapter.delta()
    trained = [sent[2, client].delta() for client in toy.CLIENTS]
    rest = [old.without(sent[2, client].ids).delta() for client in toy.CLIENTS]
    mean = {n: sum(d[n] for d in trained) / 4 for n in new}
    full = {n: mean[n] + sum((d[n] for d in rest if n in d), np.zeros_like(new[n])) / 4 for n in new}
    came = {client: Update(sent[2, client], 1) for client in toy.CLIENTS}
    assert row["agg_cov"] == pytest.approx(covariance(toy.Arrived(came)), rel=1e-4)
    assert row["agg_eq3"] == pytest.approx(norm({n: mean[n] - new[n] for n in new}), rel=1e-4)
    assert row["agg_fullmodel"] == pytest.approx(norm({n: full[n] - new[n] for n in new}), rel=1e-4)


def test_the_start_is_loras_and_the_scale_is_one_for_all():
    spec = toy.small({"m": (3, 400)}, rank=R)
    state = FedPLoRA().begin(spec, 3, 0)
    assert toy.same(state.adapter, FedAvg().begin(spec, 3, 0).adapter)
    assert not state.adapter.blocks["m"].B.any()
    jobs = started(FedPLoRA(), state_of(drawn()), devices(1, 2, R))
    assert {job.adapter.scale for job in jobs.values()} == {SPEC.scale}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"selection": "loudest"}, "selection"), ({"rest": "keep"}, "rest"), ({"weights": "rank"}, "weights"),
        ({"rset": "fold"}, "rest"),
    ],
)  # fmt: skip
def test_a_bad_hyper_parameter_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        methods.build({"name": "fed_plora", **settings})
