"""PF2LoRA's synthetic example: its steps are the library's, its data have the ranks asked for, and the ranks are learnt."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedrank.training.bilevel import hypergradient

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import pf2lora_synthetic as synthetic  # noqa: E402

STUDY = yaml.safe_load((FOLDER / "pf2lora_synthetic.yaml").read_text())
RATE = STUDY["rate"]


def problem(*targets: int, samples: int = 4000, noise: float = 0.0, seeds: int = 3) -> synthetic.Problem:
    return synthetic.problem(STUDY, targets, samples, noise, seeds)


def played(
    method: str, p: synthetic.Problem, steps: int, interval: int = 10, threshold: float = 0.05
) -> dict[str, Any]:
    found = synthetic.run(synthetic.Method(**STUDY["methods"][method]), p, RATE, steps, interval)
    return synthetic.row(*found, p, threshold)


@pytest.mark.parametrize("targets", [(2, 6), (4, 4), (1, 7), (2, 3, 4, 5, 6)])
def test_the_true_ranks_are_the_targets(targets):
    p = problem(*targets)
    assert np.linalg.matrix_rank(p.truth).tolist() == [list(targets)] * 3
    sizes = np.linalg.svd(p.truth, compute_uv=False)
    assert set(sizes[sizes > 1e-9].round(4)) <= {2.0, 1.6667, 1.5, 1.3333, 1.0}
    assert not np.allclose(p.truth[0], p.truth[1])


def test_noise_free_moments_are_those_of_the_truth():
    p = problem(2, 6, samples=50)
    np.testing.assert_allclose(p.t, p.truth @ p.s, atol=1e-12)
    noisy = problem(2, 6, samples=50, noise=0.3)
    np.testing.assert_array_equal(noisy.truth, p.truth)
    assert 0.1 < np.abs(noisy.t - noisy.truth @ noisy.s).std() / (0.3 / 50**0.5) < 2


def torch_step(x: synthetic.Factors, p: synthetic.Problem, meta: bool, derivative: Any) -> list[torch.Tensor]:
    """The factors after one step by the library's hypergradient, for the loss <W, W S / 2 - T>."""
    s, t = torch.tensor(p.s), torch.tensor(p.t)

    def loss(above: Any, below: Any) -> torch.Tensor:
        w = above[0] @ above[1] if meta else above[0] @ above[1] + below[0] @ below[1]
        return (w * (w @ s / 2 - t)).sum()

    upper, lower = ([torch.tensor(part) for part in pair] for pair in ((x.b, x.a), (x.d, x.c)))
    _, h, after = hypergradient(loss, loss, upper, None if meta else lower, RATE, derivative)
    return [value - RATE * grad for value, grad in zip(upper, h, strict=True)] + ([] if meta else after)


@pytest.mark.parametrize("method", ["pf2lora", "pf2lora_first_order", "per_fedavg_4"])
def test_its_steps_are_the_librarys(method):
    settings = synthetic.Method(**STUDY["methods"][method])
    p = problem(2, 6, seeds=2)
    x = settings.begin(p)
    for _ in range(30):  # away from B = 0
        x = settings.step(x, p, 0.1)
    expected = torch_step(x, p, settings.meta, "double" if settings.second_order else "first")
    found = settings.step(x, p, RATE)
    for one, other in zip((found.b, found.a, found.d, found.c), expected, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-13)
    other = torch_step(x, p, settings.meta, "first" if settings.second_order else "double")
    assert np.abs(found.b - other[0].numpy()).max() > 1e-7  # so that the comparison can fail


def test_a_start_is_zero_and_the_private_part_the_clients_own():
    settings, p = synthetic.Method(rank=4, private=2), problem(2, 6)
    x = settings.begin(p)
    assert not settings.predict(x, p, RATE).any()
    assert np.array_equal(x.a[:, 0], x.a[:, 1])
    assert not np.array_equal(x.c[:, 0], x.c[:, 1])


def test_aggregation_makes_the_common_part_common_and_leaves_the_private_one():
    settings, p = synthetic.Method(rank=4, private=2), problem(2, 6)
    x = settings.step(settings.begin(p), p, RATE)
    merged = settings.merge(x, p)
    np.testing.assert_array_equal(merged.b[:, 0], merged.b[:, 1])
    np.testing.assert_allclose(merged.a[:, 0], x.a.mean(1))
    assert merged.d is x.d
    cut = synthetic.Method(rank=6, cut=True)
    x = cut.merge(cut.step(cut.begin(p), p, RATE), p)
    assert np.linalg.matrix_rank(x.b @ x.a).tolist() == [[2, 6]] * 3
    alone = synthetic.Method(rank=6, averaged=False)
    assert alone.merge(x, p) is x


# ---- what is learnt (spec, 10.2), at fewer steps


def test_the_ranks_of_two_clients_are_learnt():
    """With aggregation after every step by every seed; after ten, a seed may sit on a plateau."""
    every = played("pf2lora", problem(2, 6, seeds=5), 8000, interval=1)
    assert every["ranks_by_seed"] == ["2,6"] * every["seeds_recovered"] == ["2,6"] * 5
    assert max(every["excess_by_seed"]) < 1e-6
    tenth = played("pf2lora", problem(2, 6, seeds=5), 8000)
    assert tenth["seeds_recovered"] >= 4
    assert np.median(tenth["excess_by_seed"]) < 1e-6


def test_the_ranks_of_five_clients_are_learnt():
    found = played("pf2lora", problem(2, 3, 4, 5, 6, seeds=3), 12000, interval=1)
    assert found["ranks_by_seed"] == ["2,3,4,5,6"] * 3
    assert found["excess"] < 1e-3


def test_one_common_rank_cannot_fit_clients_of_two():
    found = played("homlora_4", problem(2, 6, seeds=5), 2000)
    assert 1.2 < found["excess"] < 1.7
    assert found["ranks_by_seed"] == ["4,4"] * 5
    assert found["seeds_recovered"] == 0
    assert played("local_6", problem(2, 6, seeds=5), 8000)["excess"] < 1e-6


def test_ranks_out_of_reach_are_not_learnt():
    found = played("pf2lora", problem(1, 7), 4000)
    assert found["ranks_by_seed"] == ["2,6"] * 3
    assert found["rank_error"] == 1
    assert 0.4 < found["excess"] < 0.6


def test_with_noise_and_data_enough_two_levels_beat_local_and_common_training():
    p = problem(2, 3, 4, 5, 6, 2, 3, 4, 5, 6, samples=60, noise=0.3, seeds=1)
    error = {name: played(name, p, 3000)["excess"] for name in ("pf2lora", "local_6", "homlora_4")}
    assert error["pf2lora"] < 0.5 * error["local_6"]
    assert error["pf2lora"] < 0.15 * error["homlora_4"]
