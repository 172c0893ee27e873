"""FedAvg over LoRA factors (FedIT): its one equation on 2x2 numbers, and what is wrong with it."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest

import toy
from fedrank.adapter import Adapter, Block
from fedrank.methods.fedavg import FedAvg
from fedrank.protocol import State, Update


def lora(b: Any, a: Any, head: float = 0.0) -> Adapter:
    b, a = np.array(b, np.float32), np.array(a, np.float32)
    return Adapter({"m": Block(np.arange(len(a)), b, None, a)}, 0.5, {"head": np.full(2, head, np.float32)})


ONE = lora([[1, 0], [0, 1]], [[1, 2], [3, 4]], head=4)
TWO = lora([[5, 0], [0, -3]], [[-3, 2], [7, 0]], head=8)


def merge(updates: dict[str, Update], old: Adapter = ONE) -> Adapter:
    return FedAvg().merge(State(0, 3, old), toy.Arrived(updates)).adapter


def test_factors_are_averaged_apart_by_examples():
    """n = (30, 10), so the weights are 3/4 and 1/4: B = .75 B1 + .25 B2, A = .75 A1 + .25 A2."""
    found = merge({"a": Update(ONE, 30), "b": Update(TWO, 10)})
    np.testing.assert_array_equal(found.blocks["m"].B, [[2, 0], [0, 0]])
    np.testing.assert_array_equal(found.blocks["m"].A, [[0, 2], [4, 3]])
    np.testing.assert_array_equal(found.dense["head"], [5, 5])
    assert found.blocks["m"].e is None
    assert found.scale == 0.5


def test_every_client_counts_not_only_the_first():
    """The trap of a released FedIT code: from the second client on, sums went to a misspelt name."""
    three = lora([[0, 0], [0, 7]], [[0, 8], [0, 0]])
    found = merge({"a": Update(ONE, 1), "b": Update(TWO, 1), "c": Update(three, 2)})
    np.testing.assert_array_equal(found.blocks["m"].B, [[1.5, 0], [0, 3]])
    np.testing.assert_array_equal(found.blocks["m"].A, [[-0.5, 5], [2.5, 1]])
    alone = merge({"a": Update(ONE, 1)})
    assert toy.same(alone, ONE)  # and a single one is not shrunk by its share of the fleet


def test_the_product_of_the_means_is_not_the_mean_of_the_products():
    """B1 A1 = e1 e1', B2 A2 = e2 e2': the mean of the products is I/2, the product of the means 1/4 everywhere."""
    one, two = lora([[1], [0]], [[1, 0]]), lora([[0], [1]], [[0, 1]])
    found = merge({"a": Update(one, 1), "b": Update(two, 1)}, old=one).delta()["m"]
    mean = (one.delta()["m"] + two.delta()["m"]) / 2
    np.testing.assert_array_equal(found, 0.5 * np.full((2, 2), 0.25))
    np.testing.assert_array_equal(mean, 0.5 * np.eye(2) / 2)
    assert np.linalg.norm(found - mean) / np.linalg.norm(mean) == pytest.approx(np.sqrt(0.5))
    # it is exact where one of the factors is common
    two = replace(two, blocks={"m": replace(two.blocks["m"], A=one.blocks["m"].A)})
    found = merge({"a": Update(one, 1), "b": Update(two, 1)}, old=one).delta()["m"]
    np.testing.assert_array_equal(found, (one.delta()["m"] + two.delta()["m"]) / 2)


def test_the_order_of_clients_is_no_matter():
    draws = {name: Update(toy.drawn(toy.small(), seed), seed + 1) for seed, name in enumerate("abc")}
    found = [merge({k: draws[k] for k in order}, old=draws["a"].adapter) for order in permutations("abc")]
    assert all(toy.same(found[0], other) for other in found[1:])


def test_the_start_is_loras():
    """B = 0 and A ~ U(-1/sqrt(in), 1/sqrt(in)), the same for all; the plan is to train and send everything."""
    method, spec = FedAvg(), toy.small({"m": (3, 400)})
    state = method.begin(spec, 3, 0)
    block = state.adapter.blocks["m"]
    assert not block.B.any()
    assert block.e is None
    assert 0.045 < np.abs(block.A).max() <= 0.05
    plan = method.plan(state, toy.cohort("c0", "c1"), 0)
    assert set(plan) == {"c0", "c1"}
    assert plan["c0"].train["m"].tolist() == [0, 1]
    assert (plan["c0"].learn, plan["c0"].up, plan["c0"].down) == ("BeAh", "BeAh", "BeAh")
