"""FedDPA: the local adapter trains first and stays, the global one trains on top of it and travels."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import toy
from fedrank import levels
from fedrank.adapter import Adapter, from_arrays
from fedrank.methods.feddpa import FedDPA
from fedrank.protocol import Job, State, Update
from fedrank.training.course import drawn_batches

ROWS = np.arange(16)


def started(method: FedDPA, fit: object = None) -> Job:
    spec = toy.encoder().spec
    state = method.begin(spec, 3, 0)
    plan = method.plan(state, toy.cohort("c0"), 0)["c0"]
    return toy.job(spec, state.adapter, plan, fit or partial(toy.trainer(method.default_lr).fit, rows=ROWS), round=1)


def factors(adapter: Adapter, ids: dict[str, np.ndarray]) -> Adapter:
    return replace(adapter.take(ids), dense={})


def test_each_adapter_trains_in_its_turn_with_the_other_frozen():
    method, phases = FedDPA(private_rank=2), list[tuple[Job, Update]]()
    real = started(method)

    def fit(job: Job) -> Update:
        phases.append((job, real.fit(job)))
        return phases[-1][1]

    (update,) = method.train([replace(real, fit=fit)])
    (first, mine), (second, ours) = phases
    common, private = real.adapter, levels.private(real, 2)
    assert {n: (i.tolist(), first.plan.frozen[n].tolist()) for n, i in first.plan.train.items()} == {
        n: ([4, 5], [0, 1, 2, 3]) for n in common.blocks
    }
    assert toy.same(first.adapter, common.union(private))
    assert "h" not in first.plan.learn
    batches = [np.concatenate(list(drawn_batches(ROWS, job.local, job))) for job in (first, second)]
    assert not np.array_equal(*batches)
    assert np.array_equal(*map(np.sort, batches))
    trained = replace(mine.adapter, dense={})
    assert all(block.B.any() for block in trained.blocks.values())
    # the second phase starts from the first one's result, and leaves it as it is
    assert toy.same(second.adapter, common.union(trained))
    assert {n: i.tolist() for n, i in second.plan.frozen.items()} == {n: [4, 5] for n in common.blocks}
    assert second.plan.learn == "BeAh"
    assert toy.same(from_arrays(update.private, common.scale), trained)
    assert toy.same(update.adapter, ours.adapter)
    assert {n: i.tolist() for n, i in update.adapter.ids.items()} == {n: [0, 1, 2, 3] for n in common.blocks}
    assert np.any(update.adapter.dense["head.weight"] != common.dense["head.weight"])
    assert np.any(update.adapter.blocks[next(iter(common.blocks))].B)
    assert update.metrics["steps"] == mine.metrics["steps"] + ours.metrics["steps"] == 4
    assert update.metrics["rows_seen"] == 32


def test_the_next_round_goes_on_with_the_private_adapter():
    method = FedDPA(private_rank=1)
    job = started(method)
    (one,) = method.train([job])
    later = replace(job, round=2, adapter=one.adapter, private=one.private)
    assert toy.same(method.adapt(later), one.adapter.union(from_arrays(one.private, job.spec.scale)))
    (two,) = method.train([later])
    moved = from_arrays(two.private, job.spec.scale)
    assert not toy.same(moved, from_arrays(one.private, job.spec.scale))
    assert moved.ids.keys() == job.adapter.ids.keys()


@pytest.mark.parametrize(("asked", "rank"), [(None, 4), (1, 1), (6, 6)])
def test_the_private_rank_is_the_common_ones_unless_said(asked, rank):
    job = started(FedDPA(asked))
    assert (job.plan.private, job.plan.passes) == (rank, (2, 2))
    whole = FedDPA(asked).adapt(job)
    assert {block.rank for block in whole.blocks.values()} == {4 + rank}
    assert all(np.all(delta == 0) for delta in whole.delta().values())


@pytest.mark.parametrize("rank", [1, 6])
def test_the_payload_does_not_depend_on_the_private_rank(rank, tmp_path):
    spec = toy.encoder().spec
    f = toy.federation(FedDPA(rank), tmp_path / "run", rounds=2, cohort=2)
    expected = 4 * spec.rank * sum(m.out + m.in_ for m in spec.modules)
    for event in f.play()["client"]:
        assert (event["adapter_bytes_up"], event["adapter_bytes_down"]) == (expected, expected)


def test_clients_count_by_their_examples():
    one, two = (toy.drawn(toy.small(), seed) for seed in (0, 1))
    found = FedDPA().merge(State(0, 3, one), toy.Arrived({"a": Update(one, 1), "b": Update(two, 3)})).adapter
    mean = (one.blocks["0.m"].A.astype(float) + 3 * two.blocks["0.m"].A.astype(float)) / 4
    np.testing.assert_array_equal(found.blocks["0.m"].A, mean.astype(np.float32))


def test_a_private_adapter_of_no_rank_is_refused():
    with pytest.raises(ValueError, match="at least 1, or null"):
        FedDPA(0)
