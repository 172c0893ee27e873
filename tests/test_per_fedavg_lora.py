"""Per-FedAvg over LoRA: clients predict after one plain step on their own rows, and training looks ahead to it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import toy
from fedrank import levels
from fedrank.adapter import Adapter
from fedrank.client import Site
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.per_fedavg_lora import PerFedAvgLoRA
from fedrank.protocol import Job, Lower, Plan, State, Update, rng
from fedrank.training.course import drawn_batches
from fedrank.training.hooks import live
from fedrank.training.scoring import Scorer

ROWS = np.arange(16)


def work(method: PerFedAvgLoRA, learn: str = "BeAh", evaluating: bool = False) -> Job:
    """A client's job on the tiny model with B away from zero, in training or as an evaluation plans it."""
    spec = toy.encoder().spec
    start, draw = method.begin(spec, 3, 0).adapter, rng(0, "moved")
    blocks = {n: replace(b, B=draw.normal(0, 0.1, b.B.shape).astype(np.float32)) for n, b in start.blocks.items()}
    plan = Plan({}, start.ids, learn=learn, up="") if evaluating else Plan(start.ids, learn=learn)
    fit = partial(toy.trainer(method.default_lr).fit, rows=ROWS)
    return toy.job(spec, replace(start, blocks=blocks), plan, fit, round=1)


def values(adapter: Adapter) -> Mapping[str, torch.Tensor]:
    return live(adapter, Adapter({}, adapter.scale, {}), "BAh", "cpu").values


@pytest.mark.parametrize("learn", ["BeAh", "BeA"])
@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_a_client_predicts_after_one_sgd_step_on_a_batch_of_its_own(rate, learn):
    method = PerFedAvgLoRA(rate)
    job = work(method, learn, evaluating=True)
    found = method.adapt(job)
    batch = next(drawn_batches(ROWS, job.local, job, "lower batches"))
    seen: list[dict[str, torch.Tensor]] = []
    toy.trainer(1e-2).fit(
        work(method), batch, lambda values, grads: seen.append({n: g.clone() for n, g in grads.items()})
    )
    before, after = values(job.adapter), values(found)
    for name, gradient in seen[0].items():
        step = rate * gradient if name[0] in learn else 0 * gradient  # a head that is frozen or another's stays
        torch.testing.assert_close(after[name], before[name] - step, rtol=1e-5, atol=1e-6)
    assert found.ids.keys() == job.adapter.ids.keys()
    assert toy.same(method.adapt(job), found)


@pytest.mark.parametrize("derivative", ["double", "finite", "first"])
def test_training_takes_the_upper_step_and_keeps_nothing(derivative):
    method = PerFedAvgLoRA(0.5, derivative)
    job = work(method)
    (update,) = method.train([job])
    (plain,) = FedAvg().train([job])
    assert not update.private
    assert update.adapter.ids.keys() == job.adapter.ids.keys()
    assert not toy.same(update.adapter, plain.adapter)
    plan = method.plan(State(0, 3, job.adapter), toy.cohort("c0"), 0)["c0"]
    assert (plan.passes, plan.private, method.lower) == (levels.PASSES[derivative], 0, derivative)


@pytest.mark.parametrize("method", [PerFedAvgLoRA(), PerFedAvgLoRA(0.3, "finite"), PerFedAvgLoRA(0.05, "first")])
def test_the_lower_level_is_a_copy_with_the_methods_rate_and_derivative(method):
    given = list[Lower]()

    def fit(job: Job, lower: Lower) -> Update:
        given.append(lower)
        return Update(job.adapter, 16, private={"moments/B/step": np.array(2.0)})

    (update,) = method.train([replace(work(method), fit=fit)])
    (lower,) = given
    assert (lower.rate, lower.derivative, lower.private) == (method.rate, method.derivative, None)
    assert not lower.moments
    assert not update.private


@pytest.mark.slow
def test_clients_that_disagree_are_told_apart_by_their_step(tmp_path):
    """Half of the clients have two classes swapped: no common model suits both, one step on one's own rows helps."""
    method, data = PerFedAvgLoRA(0.3, "first"), toy.encoded("train")
    swapped = [{0: 1, 1: 0}.get(y, y) if at // 16 % 2 else y for at, y in enumerate(data.labels.tolist())]
    teacher = replace(toy.trainer(1e-2), train=replace(data, labels=np.array(swapped)))

    def teach(site: Site) -> Site:
        at = toy.CLIENTS.index(site.device.id)
        return replace(site, fit=partial(teacher.fit, rows=np.arange(16 * at, 16 * at + 16)))

    f = toy.federation(method, tmp_path / "run", rounds=6, epochs=4, alter=teach)
    f.play()
    better = []
    for at, name in enumerate(toy.CLIENTS):
        plan = Plan({}, f.last.adapter.ids, up="")
        job = toy.job(toy.encoder().spec, f.last.adapter, plan, f.sites[name].fit, name, round=7)
        rows = np.arange(16 * at, 16 * at + 16)
        score = partial(Scorer(teacher).evaluate, encoded=teacher.train, rows=rows)
        before, after = (score(a)["loss"] for a in (job.adapter, method.adapt(job)))
        better.append(before - after)
    assert min(better) > 0.1


def test_clients_count_the_same():
    spec = toy.small()
    one, two = (toy.drawn(spec, seed) for seed in (0, 1))
    state = State(0, 3, one)
    found = PerFedAvgLoRA().merge(state, toy.Arrived({"a": Update(one, 1), "b": Update(two, 1000)})).adapter
    mean = (one.blocks["0.m"].A.astype(float) + two.blocks["0.m"].A) / 2
    np.testing.assert_array_equal(found.blocks["0.m"].A, mean.astype(np.float32))


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        PerFedAvgLoRA(0.0)
