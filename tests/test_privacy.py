"""Client-level differential privacy: what is clipped, what is noised, what stays unsaid, and what it all adds up to."""

import json
import math
import runpy
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from scipy import stats
from typer.testing import CliRunner

import fedrank
import toy
from fedrank import aggregation, cli, methods, privacy
from fedrank.adapter import Adapter, Block
from fedrank.aggregation import average, vote
from fedrank.config import ConfigError, PrivacySettings, load
from fedrank.forecast import forecast
from fedrank.frame import unpack
from fedrank.ledger import BYTES
from fedrank.methods.fedara import FedARA
from fedrank.methods.fedavg import FedAvg
from fedrank.methods.fedsa_lora import FedSALoRA
from fedrank.privacy import Noised, PrivacyError
from fedrank.protocol import Job, Plan, State, Update
from fedrank.server import sample
from fedrank.store import StoreError
from fedrank.training import tasks
from fedrank.training.data import Rows
from fedrank.training.scoring import Scorer

KEY = bytes(range(32))


def private(kind: str = "central", **more: Any) -> PrivacySettings:
    return PrivacySettings.model_validate({"kind": kind, "clip": 1.0, "noise": 1.0, "delta": 1e-3, **more})


def noised(
    updates: dict[str, Update], before: Adapter, expected: float = 2.0, up: str = "BeAh", round: int = 1,
    returns: Iterable[str] = (), key: bytes = KEY, **more: Any,
) -> Noised:  # fmt: skip
    return Noised(toy.Arrived(updates), before, up, [*returns], expected, private(**more), key, round)


def vector(adapter: Adapter) -> np.ndarray:
    return np.concatenate([np.ravel(part).astype(np.float64) for part in privacy.numbers(adapter)])


def apart(one: Adapter, two: Adapter) -> np.ndarray:
    """The difference of adapters with the same components, as one vector."""
    return vector(one) - vector(two)


# ---- the clip


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 50.0])
def test_factors_and_head_are_clipped_as_one_vector(size: float) -> None:
    """One client came; what it moved is its own change, no longer than the clip, in its own direction."""
    before = toy.drawn(toy.small())
    draw = np.random.default_rng(1)
    move = privacy.each(lambda part: draw.normal(size=part.shape), before)
    move = privacy.each(lambda part: part * (size / np.linalg.norm(vector(move))), move)
    update = Update(privacy.each(np.add, before, move), 5)
    found = noised({"c0": update}, before, 1.0, noise=0.0).total(lambda u: u.adapter, aggregation.uniform)
    moved = apart(found.sums, before)
    assert np.linalg.norm(moved) == pytest.approx(min(size, 1.0), rel=1e-6)
    np.testing.assert_allclose(moved, vector(move) * min(1.0, 1 / max(size, 1e-9)), atol=1e-6)
    # the head is inside: with the head far away, the factors hardly move
    far = replace(update.adapter, dense={n: t + 1e3 for n, t in update.adapter.dense.items()})
    found = noised({"c0": Update(far, 5)}, before, 1.0, noise=0.0).total(lambda u: u.adapter, aggregation.uniform)
    assert np.linalg.norm(apart(found.sums, before)) == pytest.approx(1.0)
    assert np.linalg.norm(apart(found.sums.only("BeA"), before.only("BeA"))) <= 1e-3 * max(size, 1.0)


# ---- the sum


def by_hand() -> tuple[Adapter, dict[str, Update]]:
    """One module of two components 1 x 1 and a head of one number; c0 sends all, c1 the second component only."""

    def made(ids: list[int], b: list[float], a: list[float], h: float) -> Adapter:
        block = Block(np.array(ids), np.array([b]), None, np.array(a)[:, None])
        return Adapter({"m": block}, 1.0, {"h": np.array([h])})

    before = made([0, 1], [1.0, 2.0], [3.0, 4.0], 5.0)
    return before, {
        "c0": Update(made([0, 1], [1.5, 2.0], [3.0, 4.5], 5.5), 10),
        "c1": Update(made([1], [2.4], [4.0], 5.0), 9000),
    }


@pytest.mark.parametrize("absent", ["skip", "zero", "old"])
def test_means_are_those_by_hand(absent: Any) -> None:
    """Four clients expected, two came: examples do not count, and who is absent changes nothing.

    c0 moves (B0, A1, head) by 1/2 each, a length of sqrt(3)/2, clipped to 1/2: by 1/(2 sqrt 3) each. c1 moves B1 by 0.4.
    """
    before, updates = by_hand()
    found = average(before, noised(updates, before, 4.0, clip=0.5, noise=0.0), absent=absent)
    step = 1 / (2 * math.sqrt(3)) / 4
    np.testing.assert_allclose(found.blocks["m"].B, [[1 + step, 2.1]], rtol=1e-12)
    np.testing.assert_allclose(found.blocks["m"].A, [[3.0], [4 + step]], rtol=1e-12)
    np.testing.assert_allclose(found.dense["h"], [5 + step], rtol=1e-12)
    # one more who failed is no other denominator, and nobody at all is no change
    assert toy.same(average(before, noised({}, before, 4.0, noise=0.0), absent=absent), before)


def test_weights_are_the_constant_whoever_came() -> None:
    before, updates = by_hand()
    for some in (updates, {"c1": updates["c1"]}, {}):
        found = noised(some, before, 3.0).total(lambda u: u.adapter, aggregation.examples)
        assert found.weight == 3.0
        assert {name: w.tolist() for name, w in found.weights.items()} == {"m": [3.0, 3.0], "h": 3.0}


def test_only_what_travels_is_noised() -> None:
    before, updates = by_hand()
    updates = {c: replace(u, adapter=u.adapter.only("B")) for c, u in updates.items()}
    found = average(before, noised(updates, before, up="B"))
    assert np.array_equal(found.blocks["m"].A, before.blocks["m"].A)
    assert found.dense["h"] == before.dense["h"]
    assert not np.array_equal(found.blocks["m"].B, before.blocks["m"].B)


def test_what_no_noise_covers_is_refused() -> None:
    before, updates = by_hand()
    once = noised(updates, before)
    average(before, once)
    with pytest.raises(PrivacyError, match="second sum of clients' changes"):
        average(before, once)
    with pytest.raises(PrivacyError, match="one by one"):
        list(noised(updates, before))
    with pytest.raises(PrivacyError, match="counts the updates"):
        len(noised(updates, before))
    with pytest.raises(PrivacyError, match="votes and factors in one"):
        noised(updates, before, returns=["h"]).total(lambda u: u.adapter, aggregation.uniform)


# ---- the noise


def test_noise_is_as_wide_as_told_on_every_number() -> None:
    """200 releases of a round in which nobody came: normal, z * clip wide in the sum, and independent."""
    before = toy.drawn(toy.small())
    draws = np.array([
        apart(noised({}, before, 5.0, round=at, clip=0.7, noise=1.5).total(lambda u: u.adapter, aggregation.uniform).sums,
              privacy.each(lambda part: 5.0 * part, before.astype(np.float64)))
        for at in range(200)
    ])  # fmt: skip
    assert draws.shape == (200, vector(before).size)
    scaled = draws / (0.7 * 1.5)
    # the standard deviation of a standard deviation over n draws is 1 / sqrt(2 n)
    np.testing.assert_allclose(scaled.std(axis=0), 1.0, atol=5 / math.sqrt(400))
    assert scaled.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * scaled.size))
    np.testing.assert_allclose(scaled.mean(axis=0), 0.0, atol=5 / math.sqrt(200))
    correlations = np.corrcoef(scaled.T) - np.eye(scaled.shape[1])
    assert np.abs(correlations).max() < 5 / math.sqrt(200)
    assert stats.kstest(scaled.ravel(), "norm").pvalue > 0.01


def test_what_a_merge_releases_is_noised_by_the_expected_cohort(tmp_path: Path) -> None:
    """A whole round, after which the server's adapter differs from the mean of clipped changes by z * clip / cohort."""
    settings = private(clip=0.5, noise=2.0)
    f = federation(FedAvg(), tmp_path / "run", settings, rounds=1)
    f.play()
    plain = federation(FedAvg(), tmp_path / "plain", private(clip=0.5, noise=0.0), rounds=1)
    plain.play()
    assert f.last.seen == plain.last.seen  # one key, one cohort
    noise = apart(f.last.adapter, plain.last.adapter)
    assert noise.std() == pytest.approx(2.0 * 0.5 / 2, rel=5 / math.sqrt(2 * noise.size))


@pytest.mark.parametrize(("dtype", "near"), [("f32", 0.02), ("f16", 0.02), ("int8", 0.02)])
def test_local_noise_is_on_the_wire(tmp_path: Path, dtype: str, near: float) -> None:
    """Decoded from the frames of clients that learnt nothing: what they send is what they received, and noise."""
    sent = dict[tuple[int, str], bytes]()

    def overhear(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        sent[unpack(frame)[0]["round"], name] = frame
        return [(name, frame)]

    def still(site: Any) -> Any:
        return replace(site, fit=lambda job: Update(job.adapter.take(job.plan.train), 3, {"loss": 1.0}))

    f = toy.federation(
        FedAvg(), tmp_path / "run", rounds=2, dtype=dtype, privacy=private("local", clip=0.2, noise=3.0), alter=still,
        carry=lambda engine: toy.Tampering(engine, overhear),
    )  # fmt: skip
    for client in toy.CLIENTS:  # known, so that a spread is never a matter of luck
        folder = f.store.private.root / client
        folder.mkdir()
        (folder / "noise.key").write_bytes(client.encode() * 16)
    f.play()
    noises = []
    for (round, client), frame in sent.items():
        state = f.states[round - 1]
        plan = f.server._plans(state, {client: f.server.engine.fleet()[client]})[client]
        update = f.server._open("train", state, client, plan, frame).update
        received = f.server.wire.open_request(f.server.wire.request("train", client, plan, state)).adapter
        received = received.fill(state.adapter)
        noises.append(apart(update.adapter, received.take(update.adapter.ids)))
        assert noises[-1].std() == pytest.approx(0.6, rel=0.05)
        assert noises[-1][-132:].std() == pytest.approx(0.6, rel=0.3)  # the head's own
    assert len(noises) == 8
    assert np.std(noises) == pytest.approx(0.6, rel=near)
    assert np.abs(np.corrcoef(noises) - np.eye(8)).max() < 5 / math.sqrt(noises[0].size)


def test_a_local_change_is_clipped_before_its_noise(tmp_path: Path) -> None:
    before, updates = by_hand()
    plan = Plan({"m": np.array([0, 1])})
    settings = private("local", clip=0.5, noise=0.0)
    found = privacy.withheld(replace(updates["c0"], metrics={"loss": 2.0}), before, plan, settings, KEY, 1)
    step = 1 / (2 * math.sqrt(3))
    np.testing.assert_allclose(apart(found.adapter, before), [step, 0, 0, step, step], atol=1e-6)
    assert (found.examples, dict(found.metrics), dict(found.arrays)) == (1, {}, {})


def test_noise_needs_the_key_and_is_never_used_twice() -> None:
    before, updates = by_hand()
    wide = toy.drawn(toy.small({"0.m": (40, 50)}, rank=8))
    zero = privacy.each(np.zeros_like, wide.astype(np.float64))

    def drawn(adapter: Adapter, key: bytes = KEY, round: int = 1) -> np.ndarray:
        return apart(privacy.noised(adapter, 1.0, key, "changes", round), adapter)

    one = drawn(zero)
    assert np.array_equal(one, drawn(zero))  # a round played again to the same end
    nudged = privacy.each(lambda part: part + 1e-9, zero)
    for other in (drawn(zero, round=2), drawn(zero, key=bytes(32)), drawn(nudged)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(one.size)
    sums = [
        noised(updates, before, key=key).total(lambda u: u.adapter, aggregation.uniform).sums
        for key in (KEY, b"k" * 32)
    ]
    assert not np.isclose(*map(vector, sums)).any()


# ---- cohorts


def test_every_client_is_drawn_by_itself() -> None:
    """At a rate of 0.1, 300 clients over 500 rounds: each as often, pairs independent, sizes binomial."""
    names = [f"c{at}" for at in range(300)]
    drawn = [privacy.poisson(names, 0.1, KEY, round) for round in range(500)]
    here = np.array([[name in set(cohort) for name in names] for cohort in drawn])
    sizes = here.sum(axis=1)
    assert sizes.mean() == pytest.approx(30, abs=5 * math.sqrt(27 / 500))
    assert sizes.var() == pytest.approx(27, rel=5 * math.sqrt(2 / 500))
    counts = here.sum(axis=0)
    assert stats.chisquare(counts, np.full(300, counts.mean())).pvalue > 0.001
    assert [sorted(cohort, key=names.index) for cohort in drawn] == drawn
    assert privacy.poisson(names, 0.1, KEY, 7) == drawn[7]
    assert privacy.poisson(names[50:200], 0.1, KEY, 7) == [name for name in names[50:200] if name in drawn[7]]
    assert privacy.poisson(names, 0.1, b"x" * 32, 7) != drawn[7]
    assert privacy.poisson(names, 1.0, KEY, 7) == names


def test_without_privacy_cohorts_are_as_ever(tmp_path: Path) -> None:
    one, two = (toy.federation(FedAvg(), tmp_path / n, rounds=2, cohort=2).play() for n in "ab")
    for found in (one, two):
        assert [e["clients"] for e in found["cohort"]] == [sample(toy.CLIENTS, 2, 0, round) for round in (1, 2)]
    assert not list(tmp_path.rglob("noise.key"))


def federation(method: Any, path: Path, settings: PrivacySettings, cohort: int = 2, **more: Any) -> toy.Federation:
    """A private run whose server's key is known."""
    f = toy.federation(method, path, privacy=settings, cohort=cohort, **more)
    (path / "noise.key").write_bytes(KEY)
    return f


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "method", [FedAvg(), *(pytest.param(m, marks=slow) for m in (FedARA(target_rank=1), FedSALoRA()))]
)
def test_a_round_without_clients_looks_like_any_other(method: Any, tmp_path: Path) -> None:
    votes = {"votes_noise": 1.0} if isinstance(method, FedARA) else {}
    f = federation(method, tmp_path / "run", private(**votes), cohort=1, rounds=8, evaluate_every=1)
    events = f.play()
    sizes = [len(e["clients"]) for e in events["cohort"]]
    assert 0 in sizes
    assert max(sizes) > 1  # more than rounds.cohort
    kinds = {tuple((name, value is None) for name, value in row.items() if name not in ("budget", "agreement"))
             for row in events["round"]}  # fmt: skip
    assert len(kinds) == 1
    for round in (at for at, size in enumerate(sizes, 1) if size == 0 and {at - 1, at} <= f.states.keys()):
        before, after = f.states[round - 1].adapter, f.states[round].adapter
        moved = apart(after.only("A"), before.take(after.ids).only("A"))
        assert np.count_nonzero(moved) == moved.size


# ---- the accountant


def spent(rate: float, noise: float, rounds: int, delta: float, **more: Any) -> float:
    settings = private(noise=noise, delta=delta, **more)
    return privacy.epsilon(settings, rate, [(noise, ())] * rounds)


def integrated(rate: float, noise: float, rounds: int, delta: float, reach: float = 60.0, bins: int = 1 << 18) -> float:
    """Epsilon by numbers: the privacy loss of one round in bins, summed over the rounds by FFT, and the hockey-stick
    divergence of what comes out; of a client less, and of a client more.

    P = (1 - q) N(0, z^2) + q N(1, z^2) against Q = N(0, z^2): the loss log P/Q at x is log(1 - q + q e^((2x - 1) / (2 z^2))).
    """
    step = 2 * reach / bins
    losses = (np.arange(bins) - bins // 2) * step
    edges = np.append(losses, losses[-1] + step) - step / 2

    def place(loss: np.ndarray) -> np.ndarray:
        """The x at which P/Q has this loss; -inf below the least one."""
        with np.errstate(divide="ignore", invalid="ignore"):
            x = noise**2 * np.log((np.exp(loss) - (1 - rate)) / rate) + 0.5
        return np.where(np.isnan(x), -np.inf, x)

    less = place(edges)
    mixture = (1 - rate) * stats.norm.cdf(less, 0, noise) + rate * stats.norm.cdf(less, 1, noise)
    more = stats.norm.sf(place(-edges), 0, noise)  # Q against P: the loss falls with x

    def divergence(cumulative: np.ndarray) -> Callable[[float], float]:
        mass = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(np.diff(cumulative))) ** rounds, bins)
        composed = np.fft.fftshift(np.maximum(mass, 0))

        def at(epsilon: float) -> float:
            above = losses > epsilon
            return float(np.sum(composed[above] * -np.expm1(epsilon - losses[above])))

        return at

    both = [divergence(mixture), divergence(more)]
    low, high = 0.0, reach
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if max(d(middle) for d in both) > delta else (low, middle)
    return high


def renyi(rate: float, noise: float, rounds: int, delta: float) -> float:
    """Mironov, Talwar and Zhang (2019, section 3.3) at whole orders, and their conversion as Canonne, Kamath and Steinke
    (2020, proposition 12) sharpened it: an upper bound."""
    found = []
    for order in range(2, 200):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        told = rounds * float(np.logaddexp.reduce(terms)) / (order - 1)
        found.append(told + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return min(found)


@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "delta"),
    [(0.05, 1.0, 50, 1e-5), (0.1, 2.0, 200, 1e-6), (0.02, 0.8, 30, 1e-4), (0.5, 3.0, 10, 1e-3), (0.01, 1.0, 1, 1e-3)],
)
def test_epsilon_is_that_of_a_second_implementation(rate: float, noise: float, rounds: int, delta: float) -> None:
    found = spent(rate, noise, rounds, delta)
    assert found == pytest.approx(integrated(rate, noise, rounds, delta), rel=2e-3, abs=2e-3)
    assert found < renyi(rate, noise, rounds, delta) < 1.6 * found + 0.5


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang (2018, theorem 8): of N(mu, 1) and N(0, 1), exactly."""
    return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu))


def test_without_sampling_epsilon_is_the_normal_mechanism_s() -> None:
    for noise, rounds in ((1.0, 1), (2.0, 9), (5.0, 4)):
        found = spent(1.0, noise, rounds, 1e-5)
        assert gaussian_delta(math.sqrt(rounds) / noise, found) == pytest.approx(1e-5, rel=0.02)


def test_local_epsilon_is_of_whoever_was_asked_most() -> None:
    """c1 was asked three times: twice without votes, once with; two clipped updates may be 2 * clip apart."""
    settings = private("local", noise=4.0, delta=1e-5)
    mixed = privacy.multiplier(
        private("local", noise=4.0, votes_noise=3.0), Plan({}, returns={"keep": ("uint8", (1,))})
    )
    assert mixed == pytest.approx((1 / 16 + 1 / 9) ** -0.5)
    found = privacy.epsilon(settings, 0.1, [(4.0, ["c0", "c1"]), (4.0, ["c1"]), (mixed, ["c1", "c2"])])
    assert gaussian_delta(2 * math.sqrt(3 / 16 + 1 / 9), found) == pytest.approx(1e-5, rel=0.02)
    assert privacy.epsilon(settings, 0.1, []) == 0.0


def test_votes_and_changes_add_up_as_one_mechanism() -> None:
    """On one sample, two normal mechanisms are one in the plane; integrated along the line between the two means."""
    returns = {"keep": ("uint8", (1,))}
    both = privacy.multiplier(private(noise=2.0, votes_noise=3.0), Plan({}, returns=returns))
    found = privacy.epsilon(private(noise=2.0, votes_noise=3.0, delta=1e-5), 0.1, [(2.0, ()), (both, ())] * 10)
    assert both == pytest.approx(6 / math.sqrt(13))
    assert spent(0.1, 2.0, 20, 1e-5) < found < spent(0.1, both, 20, 1e-5)
    assert privacy.epsilon(private(delta=1e-5), 0.1, [(both, ())] * 20) == pytest.approx(
        integrated(0.1, both, 20, 1e-5), rel=2e-3
    )


def test_without_noise_there_is_no_bound() -> None:
    assert spent(0.1, 0.0, 3, 1e-5) == math.inf
    assert privacy.multiplier(private(noise=1.0, votes_noise=0.0), Plan({}, returns={"keep": ("uint8", (1,))})) == 0.0


# ---- votes


@settings(deadline=None, max_examples=50)
@given(size=strategies.integers(1, 40), voters=strategies.integers(1, 12), seed=strategies.integers(0, 1000))
def test_plain_votes_are_counted_to_the_bit(size: int, voters: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    masks = draw.integers(0, 2, (voters, size)).astype(bool)
    empty = Adapter({}, 1.0, {})
    updates = {f"c{at:02}": Update(empty, 1, arrays={"keep": np.packbits(mask)}) for at, mask in enumerate(masks)}
    assert np.array_equal(vote(toy.Arrived(updates), "keep", size), masks.sum(axis=0) / voters)


def test_private_votes_are_shares_of_the_expected_cohort() -> None:
    """Two of an expected four vote on nine bits; who did not come stands for neither."""
    empty = Adapter({}, 1.0, {})
    masks = np.array([[1, 1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0, 0, 0, 1]])
    updates = {f"c{at}": Update(empty, 1, arrays={"keep": np.packbits(mask)}) for at, mask in enumerate(masks)}

    def shares(round: int, noise: float) -> np.ndarray:
        return vote(noised(updates, empty, 4.0, returns=["keep"], round=round, votes_noise=noise), "keep", 9)

    np.testing.assert_allclose(shares(1, 0.0), 0.5 + (masks - 0.5).sum(axis=0) / 4)
    draws = np.array([shares(round, 2.0) - shares(round, 0.0) for round in range(100)])
    assert draws.std() == pytest.approx(
        2.0 * 1.5 / 4, rel=5 / math.sqrt(2 * draws.size)
    )  # sqrt(9) / 2 is a vote's length


def test_local_votes_are_turned_as_the_noise_says() -> None:
    """A bit's vote of 1/2 is turned where the noise, z sqrt(bits) / 2 wide, goes farther than it."""
    mask = np.packbits(np.random.default_rng(0).integers(0, 2, 4096))
    turned = privacy._turned(mask, private("local", votes_noise=0.02), KEY, "keep", 1)
    share = np.unpackbits(mask ^ turned).mean()
    expected = stats.norm.sf(1 / (0.02 * math.sqrt(4096)))
    assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 4096))
    assert np.array_equal(privacy._turned(mask, private("local", votes_noise=0.0), KEY, "keep", 1), mask)


# ---- every method


ONE_BY_ONE = "it reads clients' updates one by one"
CHOOSE = "its clients choose what they send by their own rows"
RANKS = "its clients send 'ranks', which is no packed bit mask"
NOTHING = "nothing of it travels, so there is nothing to protect"
REFUSED: dict[str, dict[str, str]] = {
    "central": {
        "fedex_lora": "it takes a second sum of clients' changes", "flexlora": ONE_BY_ONE, "flora": ONE_BY_ONE,
        "hetlora": ONE_BY_ONE, "legend": ONE_BY_ONE, "local_only": NOTHING, "pf2lora": RANKS, "raflora": ONE_BY_ONE,
    },
    "local": {
        "hetlora": CHOOSE, "legend": "its merge reads clients' 'forward_seconds', which does not travel",
        "local_only": NOTHING, "lora_a2": CHOOSE, "pf2lora": RANKS,
    },
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "fed_plora-drop": {"rest": "drop"}, "fed_plora-examples": {"weights": "examples"}, "fed_plora-fold": {"rest": "fold"},
    "fedara-threshold": {"arbitration": "threshold"}, "hetlora-contributor": {"form": "contributor"},
    "hetlora-uniform": {"form": "uniform"}, "legend-deep": {"depth": "full"},
}  # fmt: skip
ALLOWED = {"round", "accuracy", "loss", "components", "modules_alive", "lowest_active_block", "noise_multiplier", "epsilon",
           "delta", "budget", "agreement", "personal_clients", "evaluation_bytes"}  # fmt: skip
COUNTS = {*BYTES, "clients_ok", "clients_failed", "clients_out"}


@pytest.mark.parametrize("kind", ["central", "local"])
@pytest.mark.parametrize("name", [*toy.FIRST, *(pytest.param(name, marks=toy.EXHAUSTIVE) for name in VARIANTS)])
def test_every_method_is_private_or_refused(name: str, kind: str, tmp_path: Path) -> None:
    """Those that are not refused before anything runs get through all rounds, and tell nothing that they may not."""
    method = name.partition("-")[0]
    more: dict[str, Any] = {"target_rank": 1} if method == "fedara" else {}
    built = methods.build({"name": method, **more, **VARIANTS.get(name, {})})
    settings = private(kind, **({"votes_noise": 1.0} if method == "fedara" else {}))
    sent = list[tuple[str, bytes]]()

    def overhear(client: str, frame: bytes) -> list[tuple[str, bytes]]:
        sent.append((client, frame))
        return [(client, frame)]

    f = toy.federation(
        built, tmp_path / "run", rounds=3, privacy=settings, carry=lambda engine: toy.Tampering(engine, overhear)
    )
    (f.store.path / "noise.key").write_bytes(KEY)
    check = (settings, built, method, f.begin, f.server.engine.fleet(), 0)
    if reason := REFUSED[kind].get("legend" if method == "legend" else name):
        with pytest.raises(ConfigError) as refusal:
            privacy.check(*check)
        assert str(refusal.value) == f"privacy.kind={kind}: method {method} has no private form: {reason}"
        return
    privacy.check(*check)
    events = f.play()
    assert all(event["ok"] for event in events["client"])
    rows = [json.loads(line) for line in (f.store.path / "rounds.jsonl").read_text().splitlines()]
    epsilons = [row["epsilon"] for row in rows]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] > 0
    for row in rows:
        told = {name for name, value in row.items() if value is not None}
        assert told <= (ALLOWED | COUNTS if kind == "local" else ALLOWED)
    for line in (f.store.path / "clients.jsonl").read_text().splitlines():
        assert json.loads(line).keys() <= {"round", "client", "ok", "error", *BYTES}
    assert sent
    for client, frame in sent:
        meta, tensors = unpack(frame)
        if kind == "local":
            assert (meta["examples"], meta["metrics"]) == (1, {})
        arrays = {name for name in tensors if name.startswith("arrays.")}
        assert arrays <= {"arrays.keep"}
        assert "ids" not in tensors or (kind, method) == ("central", "lora_a2"), client


@dataclass(frozen=True)
class Careless:
    """FedAvg that also looks at what every client lost."""

    look: str = "metrics"
    default_lr: ClassVar[float] = 3e-3

    def begin(self, spec: Any, rounds: int, seed: int) -> State:
        return FedAvg().begin(spec, rounds, seed)

    def plan(self, state: State, cohort: Any, seed: int) -> dict[str, Plan]:
        returns = {"note": ("uint8", (2,))} if state.round and self.look == "late" else {}
        return {client: replace(plan, returns=returns) for client, plan in FedAvg().plan(state, cohort, seed).items()}

    def train(self, jobs: Iterable[Job]) -> Iterator[Update]:
        return (job.fit(job) for job in jobs)

    def merge(self, state: State, updates: Any) -> State:
        merged = FedAvg().merge(state, updates)
        if self.look == "metrics":
            return replace(merged, metrics={"worst": max(update.metrics["loss"] for _, update in updates)})
        if self.look == "late" and state.round:
            return replace(merged, metrics={"notes": float(sum(u.arrays["note"][0] for _, u in updates))})
        return replace(merged, metrics={"came": float(len(updates))}) if self.look == "count" else merged


@pytest.mark.parametrize(
    ("kind", "look", "reason"),
    [("central", "metrics", "one by one"), ("local", "metrics", "reads clients' 'loss'"), ("central", "count", "counts"),
     ("central", "late", "one by one")],
)  # fmt: skip
def test_a_method_of_one_s_own_is_tried_too(kind: str, look: str, reason: str) -> None:
    """In every kind of round that its plans tell apart, not in the first one only."""
    method = Careless(look)
    settings = private(kind, **({"votes_noise": 1.0} if look == "late" else {}))
    with pytest.raises(ConfigError, match=reason):
        privacy.check(settings, method, "careless", method.begin(toy.small(), 3, 0), toy.cohort("c0", "c1"), 0)


# ---- what stays unsaid, and for whom


def test_a_client_that_protects_itself_answers_no_question_and_quotes_no_error(tmp_path: Path) -> None:
    def fail(job: Job) -> Update:
        raise PrivacyError("row 3 holds 'a secret'")  # one of ours, whose words would otherwise travel

    def alter(site: Any) -> Any:
        return replace(site, fit=fail) if site.device.id == "c1" else site

    f = toy.federation(FedAvg(), tmp_path / "run", rounds=1, privacy=private("local"), alter=alter)
    told = f.play()["client"]
    assert [event["error"] for event in told if not event["ok"]] == ["Error: the message stays with the client"]
    site, fleet = f.sites["c0"], f.server.engine.fleet()
    plans = f.server._plans(f.last, {"c0": fleet["c0"]})
    plan = replace(plans["c0"], train={}, frozen=plans["c0"].train, up="")
    from fedrank.client import handle

    reply = handle(f.server.wire.request("evaluate", "c0", plan, f.last), site)
    assert unpack(reply)[0]["metrics"] == {"rows": 0.0}


@pytest.mark.parametrize("kind", ["central", "local"])
def test_seed_and_config_do_not_give_the_noise_away(kind: str, tmp_path: Path) -> None:
    """Two runs of one config: other cohorts or noise, and so other adapters; the keys lie nowhere else."""
    sent = list[bytes]()

    def overhear(name: str, frame: bytes) -> list[tuple[str, bytes]]:
        sent.append(frame)
        return [(name, frame)]

    runs = []
    for name in "ab":
        f = toy.federation(
            FedAvg(), tmp_path / name, rounds=2, cohort=4, privacy=private(kind),
            carry=lambda engine: toy.Tampering(engine, overhear),
        )  # fmt: skip
        f.play()
        runs.append(f)
    one, two = (f.last.adapter for f in runs)
    assert np.count_nonzero(apart(one, two)) == vector(one).size
    keys = sorted(tmp_path.rglob("noise.key"))
    assert len({key.read_bytes() for key in keys}) == len(keys) == (2 if kind == "central" else 8)
    for key in keys:
        assert len(key.read_bytes()) == 32
        assert key.stat().st_mode & 0o077 == 0
    others = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "noise.key"]
    for secret in (key.read_bytes() for key in keys):
        for form in (secret, secret.hex().encode()):
            assert not any(form in content for content in [*others, *sent])


@pytest.mark.parametrize("kind", ["central", "local"])
@pytest.mark.parametrize(
    "method", [FedAvg(), pytest.param(FedARA(target_rank=1), marks=slow)], ids=["fedavg", "fedara"]
)
def test_a_private_run_resumes_to_the_same_bits(kind: str, method: Any, tmp_path: Path) -> None:
    settings = private(kind, **({"votes_noise": 1.0} if isinstance(method, FedARA) else {}))
    f = toy.federation(method, tmp_path / "run", rounds=3, privacy=settings)
    left = dict[int, Path]()

    def copy(event: dict) -> None:
        if event["event"] == "cohort":  # before a round; what it writes then is to be played again
            number = event["round"] - 1
            left[number] = shutil.copytree(f.store.path, tmp_path / str(number))

    events = f.play(watch=copy)
    for number, path in left.items():
        again = toy.federation(method, path, rounds=3, privacy=settings)
        if kind == "local":  # one key has to be there, or a client would make another
            for client in toy.CLIENTS:
                shutil.copytree(f.store.private.root / client, path / "clients" / client, dirs_exist_ok=True)
        rows = again.play(again.last)["round"]
        assert toy.equal(again.last, f.last), number
        assert [row["epsilon"] for row in rows] == [row["epsilon"] for row in events["round"][number:]]
    if kind == "central":
        (left[2] / "noise.key").unlink()
        lost = toy.federation(method, left[2], rounds=3, privacy=settings)
        with pytest.raises(StoreError, match="cannot go on to the same bits"):
            lost.play(lost.states[2])


# ---- configs, the command line, whole runs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("texts")
    toy.write(folder, train=toy.texts(64, 0), test=toy.texts(24, 1))
    return {
        "data": {"path": str(folder), "partition": {"kind": "iid"}}, "clients": {"count": 8}, "adapter": {"rank": 4},
        "rounds": {"count": 3, "cohort": 4, "evaluate_every": 1, "personal": 0}, "local": {"max_length": 16},
        "privacy": {"kind": "central", "clip": 0.5, "noise": 0.8, "delta": 1e-2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy.kind=none"], "clip, noise, delta: with kind none nothing is clipped or noised"),
        (["privacy={kind: central, clip: 1}"], "kind=central needs noise, delta too"),
        (["privacy={kind: local, noise: 1, delta: 0.01}"], "kind=local needs clip too"),
        (["privacy.clip=0"], "privacy.clip"),
        (["privacy.noise=-1"], "privacy.noise"),
        (["privacy.delta=1"], "privacy.delta"),
        (["privacy.sigma=1"], "unknown key 'privacy.sigma'"),
        (["rounds.personal=null"], "rounds.personal: clients' own scores would leave them without noise"),
        (["rounds.exactness=true"], "rounds.exactness"),
        (["data.split=validation", "data.partition.kind=natural"], "data.split=validation"),
        (["privacy.delta=0.2"], "below one over the 8 clients"),
        (["method.name=flora"], "method flora has no private form: it reads clients' updates one by one"),
        (["method.name=fedara"], "privacy.votes_noise: clients of this method vote"),
        (["privacy.votes_noise=1"], "privacy.votes_noise: clients of fedavg cast no votes"),
    ],
)
def test_what_cannot_be_private_is_told_before_a_run(
    config: dict[str, Any], overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        fedrank.run(config, *overrides, out=tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_accountant_s_library_is_asked_for_where_it_is_missing(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fedrank\[privacy\]"):
        fedrank.run(config, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"fedrank\[privacy\]"):
        forecast(load(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["central", pytest.param("local", marks=slow)])
def test_a_whole_private_run(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """Its epsilon is in every round, in the summary, on the screen, and in what `fedrank cost` says beforehand."""
    overrides = [f"privacy.kind={kind}", "server.optimizer=fedadam"]
    run = fedrank.run(config, *overrides, out=tmp_path / "run")
    last = run.rounds[-1]
    assert run.summary["epsilon"] == last["epsilon"] > run.rounds[0]["epsilon"] > 0
    assert run.summary["delta"] == last["delta"] == 0.01
    assert run.summary["accuracy"] is not None
    for name in ("wall_seconds", "train_seconds", "device_joules", "peak_memory_bytes", "clock_seconds"):
        assert run.summary[name] is None
    assert (run.summary["bytes_up"] is None) == (run.summary["clients_ok"] is None) == (kind == "central")
    assert (run.path / "adapter" / "adapter_model.safetensors").exists()
    before = forecast(load(config, overrides))
    assert before["epsilon"] == pytest.approx(run.summary["epsilon"])
    assert before["round"]["slowest_seconds"] > 0
    shown = CliRunner().invoke(cli.app, ["show", str(run.path)])
    assert shown.exit_code == 0
    assert f"epsilon {last['epsilon']:.3g} at delta 0.01" in shown.output
    with pytest.raises(ConfigError, match="epsilon hangs on it"):
        fedrank.resume(run.path, "rounds.cohort=2")
    more = fedrank.resume(run.path, "rounds.count=+1")
    assert more.summary["epsilon"] > last["epsilon"]
    assert more.rounds[:3] == run.rounds[:3]


def test_clipping_alone_claims_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    run = fedrank.run(config, "privacy.noise=0", "rounds.count=1", out=tmp_path / "run")
    assert run.summary["epsilon"] is None
    assert "no bound" in CliRunner().invoke(cli.app, ["show", str(run.path)]).output


def test_baselines_are_not_fitted_to_what_is_protected(config: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    found = CliRunner().invoke(cli.app, ["run", str(file), "--baselines", "--out", str(tmp_path / "run")])
    assert found.exit_code == 2
    assert "without noise" in found.stderr.replace("\n", " ")


# ---- attacks


@pytest.fixture(scope="module")
def arrived(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What three toy clients sent after a real round, and a fourth's canary: a change along one random direction."""
    found = dict[str, Update]()

    @dataclass(frozen=True)
    class Kept:
        default_lr: ClassVar[float] = FedAvg.default_lr
        begin, plan, train = FedAvg.begin, FedAvg.plan, FedAvg.train

        def merge(self, state: State, updates: Any) -> State:
            found.update(dict(updates))
            return FedAvg().merge(state, updates)

    f = toy.federation(Kept(), tmp_path_factory.mktemp("arrived") / "run", rounds=1)
    f.play()
    some = dict([*f.begin.adapter.ids.items()][:1])  # of one module and the head, for speed
    before, draw = f.begin.adapter.take(some), np.random.default_rng(0)
    found = {client: replace(update, adapter=update.adapter.take(some)) for client, update in found.items()}
    direction = privacy.each(lambda part: draw.normal(size=part.shape), before)
    length = np.linalg.norm(vector(direction))
    canary = Update(privacy.each(lambda at, step: (at + 10 * step / length).astype(np.float32), before, direction), 8)
    return SimpleNamespace(before=before, updates=found, canary=canary, direction=vector(direction) / length)


def scores(arrived: SimpleNamespace, runs: int, settings: PrivacySettings | None) -> tuple[np.ndarray, np.ndarray]:
    """How far the released change goes along the canary, without the canary's client and with it, in so many runs each."""
    result = []
    for present in (False, True):
        updates = (
            {**arrived.updates, "c3": arrived.canary}
            if present
            else {c: u for c, u in arrived.updates.items() if c != "c3"}
        )
        found = []
        for at in range(runs):
            some: Any = toy.Arrived(updates)
            if settings is not None:
                key = b"%032d" % (2 * at + present)
                some = Noised(some, arrived.before, "BeAh", [], 4.0, settings, key, 1)
            found.append(float(apart(average(arrived.before, some), arrived.before) @ arrived.direction))
        result.append(np.array(found))
    return result[0], result[1]


def test_a_smoke_of_the_benchmark_leaves_its_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parents[1] / "benchmarks" / "privacy.py"
    monkeypatch.syspath_prepend(str(file.parent))
    benchmark = SimpleNamespace(**runpy.run_path(str(file)))
    played = []

    def play(folder: Path, config: dict[str, Any]) -> Path:
        folder.mkdir(parents=True)
        (folder / "rounds.jsonl").write_text(json.dumps({"round": 1, "accuracy": 0.5}))
        (folder / "summary.json").write_text(json.dumps({"epsilon": None}))
        played.append(config)
        return folder

    (tmp_path / "results").mkdir()
    monkeypatch.setitem(benchmark.main.__globals__, "play", play)
    monkeypatch.setitem(benchmark.main.__globals__, "HERE", tmp_path)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["privacy.py", "--data", "rows", "--out", str(out), "--workers", "1", "--smoke"])
    benchmark.main()
    assert [config["rounds"]["count"] for config in played] == [2] * 5  # pilots with and without, none, and two noises
    assert json.loads((out / "privacy.json").read_text())["accuracy"]["none"]["mean"] == 0.5
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.slow
def test_a_canary_is_found_without_noise_and_as_seldom_as_epsilon_says_with_it(arrived: SimpleNamespace) -> None:
    """The best test of a normal mechanism gains 2 Phi(1 / (2 z)) - 1 in true over false alarms (Dong, Roth and Su, 2022)."""
    out, there = scores(arrived, 1, None)
    assert there[0] > 50 * abs(out[0])
    runs = 400
    for noise in (1.0, 4.0):
        settings = private(noise=noise, clip=0.5)
        out, there = scores(arrived, runs, settings)
        epsilon = privacy.epsilon(settings, 1.0, [(noise, ())])
        half = (out.mean() + there.mean()) / 2
        advantage = (there > half).mean() - (out > half).mean()
        assert advantage == pytest.approx(2 * stats.norm.cdf(1 / (2 * noise)) - 1, abs=0.12)  # 0.035 is one deviation
        for at in np.quantile(np.concatenate([out, there]), np.linspace(0.02, 0.98, 25)):
            # true alarms at least, false ones at most, both with a probability of 0.9999
            least = stats.beta.ppf(1e-4, (there > at).sum() + 1e-9, (there <= at).sum() + 1)
            most = stats.beta.ppf(1 - 1e-4, (out > at).sum() + 1, (out <= at).sum() + 1e-9)
            assert least <= math.exp(epsilon) * most + settings.delta


def canary() -> tasks.Encoded:
    """Eight times one text under a label that is not its letters'."""
    rows = Rows(["abbabaab"] * 8, label=np.full(8, 2))
    return tasks.encode(rows, toy.encoder().tokenizer, "classify", 16)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_canary_text_is_learnt_without_noise_and_hidden_by_it(tmp_path: Path) -> None:
    """Membership by the final model's loss on the text, in runs with the client that holds it and without: the share of
    pairs in which the loss is lower with it; 1/2 is chance. Keys are known, so that it repeats."""
    encoded = canary()
    scorer, fit = Scorer(toy.trainer(FedAvg.default_lr)), toy.trainer(FedAvg.default_lr).fit

    def holds(site: Any) -> Any:
        mine = replace(site, fit=lambda job: fit(job, rows=np.arange(8), encoded=encoded))
        return mine if site.device.id == "c3" else site

    def told(settings: PrivacySettings | None, runs: int) -> float:
        losses: dict[bool, list[float]] = {True: [], False: []}
        for at, there in ((at, there) for at in range(runs) for there in losses):
            f = toy.federation(
                FedAvg(), tmp_path / f"{settings is None}-{at}-{there}", epochs=4, seed=at, privacy=settings,
                alter=holds if there else lambda site: site,
            )  # fmt: skip
            (f.store.path / "noise.key").write_bytes(bytes([at, there]) * 16)
            f.play()
            losses[there].append(scorer.evaluate(f.last.adapter, encoded, np.arange(8), ())["loss"])
        return float(np.less.outer(losses[True], losses[False]).mean())

    plain, hidden = told(None, 2), told(private(clip=0.2, noise=4.0), 12)
    assert plain == 1.0
    # Over 3 rounds at z = 4 the best test tells a pair apart in Phi(mu / sqrt 2) of the cases, mu = sqrt(3) / 4; of 12 runs
    # each, a share's deviation is sqrt(25 / (12 * 144)).
    assert hidden <= stats.norm.cdf(math.sqrt(3) / 4 / math.sqrt(2)) + 2 * math.sqrt(25 / (12 * 144))
