"""The bilevel step: against closed forms, against differences, and inside local training (PF2LoRA's spec, 10.1)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fedrank
import toy
from fedrank import levels, parts
from fedrank.adapter import Adapter, Block, from_arrays, kaiming
from fedrank.config import Local
from fedrank.protocol import Job, Lower, ModelSpec, Plan, Update, rng
from fedrank.training import course, fused, models, tasks, twice
from fedrank.training.bilevel import DerivativeError, Loss, begin, hypergradient
from fedrank.training.compute import Compute
from fedrank.training.course import drawn_batches
from fedrank.training.hooks import live, mounted
from fedrank.training.local import Trainer
from fedrank.training.scoring import Scorer

OUT, IN, R, P = 5, 4, 3, 2
RATE = 0.3
DERIVATIVES = ("double", "finite", "first")
Arrays = list[np.ndarray]


# ---- least squares: f = ||W X - Y||^2 / 2N, W = W0 + s (B A + D C), so that dF/dW = W S - T


def problem(seed: int = 0) -> tuple[Arrays, Arrays, list[tuple[np.ndarray, np.ndarray]]]:
    """x = (B, A), y = (D, C), nothing zero, and (X, Y) of the lower and the upper batch."""
    draw = rng(seed, "least squares")
    sizes = [(OUT, R), (R, IN)], [(OUT, P), (P, IN)]
    x, y = ([draw.normal(size=size) for size in part] for part in sizes)
    data = [(draw.normal(size=(IN, 9)), draw.normal(size=(OUT, 9))) for _ in range(2)]
    return x, y, data


def moments(data: tuple[np.ndarray, np.ndarray], w0: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """S = X X' / N and T = (Y - W0 X) X' / N."""
    inputs, outputs = data
    rest = outputs if w0 is None else outputs - w0 @ inputs
    return inputs @ inputs.T / inputs.shape[1], rest @ inputs.T / inputs.shape[1]


def closed_form(
    x: Arrays, y: Arrays, inner: Any, outer: Any, rate: float, scale: float = 1.0
) -> tuple[Arrays, Arrays, Arrays]:
    """h, y+ and the first-order part of h, by hand (section 3.1, with the scale)."""
    (b, a), (d, c), (s, t), (s1, t1) = x, y, inner, outer
    p = scale * (b @ a + d @ c) @ s - t
    d1, c1 = d - rate * scale * p @ c.T, c - rate * scale * d.T @ p
    p1 = scale * (b @ a + d1 @ c1) @ s1 - t1
    first = [scale * p1 @ a.T, scale * b.T @ p1]
    vd, vc = scale * p1 @ c1.T, scale * d1.T @ p1
    dp = scale * (vd @ c + d @ vc) @ s
    return [first[0] - rate * scale * dp @ a.T, first[1] - rate * scale * b.T @ dp], [d1, c1], first


def closed_maml(x: Arrays, inner: Any, outer: Any, rate: float) -> Arrays:
    """(I - rate H(x)) v at v = grad f(x - rate grad f(x)), by hand."""
    (b, a), (s, t), (s1, t1) = x, inner, outer
    p = b @ a @ s - t
    b1, a1 = b - rate * p @ a.T, a - rate * b.T @ p
    p1 = b1 @ a1 @ s1 - t1
    vb, va = p1 @ a1.T, b1.T @ p1
    dp = (vb @ a + b @ va) @ s
    return [vb - rate * (dp @ a.T + p @ va.T), va - rate * (vb.T @ p + b.T @ dp)]


def squares(data: tuple[np.ndarray, np.ndarray], copied: bool = False) -> Callable[..., Tensor]:
    inputs, outputs = map(torch.tensor, data)

    def loss(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        w = x[0] @ x[1] + (0 if copied else y[0] @ y[1])
        return (w @ inputs - outputs).pow(2).sum() / (2 * inputs.shape[1])

    return loss


def tensors(arrays: Arrays) -> list[Tensor]:
    return [torch.tensor(array) for array in arrays]


def assert_near(found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def test_the_hypergradient_is_the_closed_form_of_least_squares():
    x, y, data = problem()
    h, moved, first = closed_form(x, y, *map(moments, data), RATE)
    _, found, after = hypergradient(*map(squares, data), tensors(x), tensors(y), RATE, "double")
    assert_near(found, h, 1e-12)
    assert_near(after, moved, 1e-12)
    _, found, after = hypergradient(*map(squares, data), tensors(x), tensors(y), RATE, "first")
    assert_near(found, first, 1e-12)
    assert_near(after, moved, 1e-12)
    assert np.linalg.norm(first[0] - h[0]) > 0.5 * np.linalg.norm(h[0])  # so that the test discriminates


@pytest.mark.parametrize("copied", [False, True])
def test_a_kernel_without_a_second_derivative_is_named_and_finite_differences_do_without_one(copied):
    x, y = (torch.tensor(rng(seed, "kernel").normal(size=(1, 1, 3, 4))) for seed in range(2))

    def by(kernel: SDPBackend) -> Loss:
        def loss(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
            value = x[0] * y[0]
            with sdpa_kernel(kernel):
                return nn.functional.scaled_dot_product_attention(value, value, value).pow(2).sum()

        return loss

    fused, plain, lower = by(SDPBackend.FLASH_ATTENTION), by(SDPBackend.MATH), None if copied else [y]
    with pytest.raises(DerivativeError, match=r"method\.derivative: finite"):
        hypergradient(fused, fused, [x], lower, 0.1, "double")
    _, found, _ = hypergradient(fused, fused, [x], lower, 0.1, "finite")
    _, expected, _ = hypergradient(plain, plain, [x], lower, 0.1, "double")
    _, first, _ = hypergradient(plain, plain, [x], lower, 0.1, "first")
    assert_near(found, expected, 1e-6)
    assert torch.linalg.norm(first[0] - expected[0]) > 0.01 * torch.linalg.norm(expected[0])


def test_other_errors_of_the_last_backward_pass_are_themselves():
    def full(above: Tensor) -> None:
        raise RuntimeError("out of memory")

    def loss(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        return (x[0] * y[0]).sum()

    def outer(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        found = loss(x, y)
        found.register_hook(full)
        return found

    with pytest.raises(RuntimeError, match="out of memory"):
        hypergradient(loss, outer, [torch.ones(2)], [torch.ones(2)], 0.1, "double")


@pytest.mark.parametrize("derivative", ["double", "finite"])
def test_per_fedavgs_hypergradient_is_its_closed_form(derivative):
    x, _, data = problem()
    expected = closed_maml(x, *map(moments, data), 0.1)
    functions = [squares(part, copied=True) for part in data]
    _, found, _ = hypergradient(*functions, tensors(x), None, 0.1, derivative)
    assert_near(found, expected, 1e-9)
    _, first, _ = hypergradient(*functions, tensors(x), None, 0.1, "first")
    assert np.linalg.norm(np.asarray(first[0]) - expected[0]) > 0.1 * np.linalg.norm(expected[0])


@pytest.mark.parametrize("copied", [False, True])
def test_02_h_is_the_gradient_through_the_lower_step_by_central_differences(copied):
    x, y, data = problem()
    inner, outer = (squares(part, copied) for part in data)

    def through(at: list[Tensor]) -> Tensor:
        below = at if copied else tensors(y)
        below = [value.detach().requires_grad_() for value in below]
        slope = torch.autograd.grad(inner(below if copied else at, below), below)
        after = [value - RATE * down for value, down in zip(below, slope, strict=True)]
        return outer(after if copied else at, after).detach()

    _, found, _ = hypergradient(inner, outer, tensors(x), None if copied else tensors(y), RATE, "double")
    expected, e = [np.zeros_like(part) for part in x], 1e-6
    for part, into in zip(range(2), expected, strict=True):
        for index in np.ndindex(into.shape):
            ends = []
            for sign in (1, -1):
                there = tensors(x)
                there[part][index] += sign * e
                ends.append(float(through(there)))
            into[index] = (ends[0] - ends[1]) / (2 * e)
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_03_without_a_rate_h_is_the_plain_gradient(derivative):
    x, y, data = problem()
    loss, found, after = hypergradient(*map(squares, data), tensors(x), tensors(y), 0.0, derivative)
    leaves = [value.requires_grad_() for value in tensors(x)]
    plain = squares(data[1])(leaves, tensors(y))
    assert loss == plain.detach()
    assert_near(found, torch.autograd.grad(plain, leaves), 1e-14)
    assert all(torch.equal(a, b) for a, b in zip(after, tensors(y), strict=True))


def product(inner: Any, x: list[Tensor], y: list[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """H_xy v = d/dx <d inner / dy, v>, written out (form b)."""
    x, y = ([value.detach().requires_grad_() for value in part] for part in (x, y))
    slope = torch.autograd.grad(inner(x, y), y, create_graph=True)
    return torch.autograd.grad(sum((g * w).sum() for g, w in zip(slope, v, strict=True)), x)


def test_04_the_three_forms_agree():
    x, y, data = problem()
    inner, outer = map(squares, data)
    _, double, after = hypergradient(inner, outer, tensors(x), tensors(y), RATE, "double")
    _, finite, _ = hypergradient(inner, outer, tensors(x), tensors(y), RATE, "finite")
    tops = [value.requires_grad_() for value in [*tensors(x), *after]]
    found = torch.autograd.grad(outer(tops[:2], tops[2:]), tops)
    cross = product(inner, tensors(x), tensors(y), found[2:])
    explicit = [g - RATE * part for g, part in zip(found[:2], cross, strict=True)]
    assert_near(double, explicit, 1e-12)
    assert_near(finite, explicit, 1e-6)


@pytest.mark.parametrize("derivative", ["double", "finite"])
def test_05_the_second_order_term_is_linear_in_v(derivative):
    """An upper loss <v, y> has v as its gradient, so that h = -rate H v."""
    x, y, (data, _) = problem()
    u, v = (tensors(problem(seed)[1]) for seed in (1, 2))

    def term(weights: list[Tensor]) -> list[Tensor]:
        def outer(above: Sequence[Tensor], below: Sequence[Tensor]) -> Tensor:
            zero = sum(0 * part.sum() for part in above)
            return zero + sum((w * part).sum() for w, part in zip(weights, below, strict=True))

        return hypergradient(squares(data), outer, tensors(x), tensors(y), RATE, derivative)[1]

    both = term([2 * a - 3 * b for a, b in zip(u, v, strict=True)])
    apart = [2 * a - 3 * b for a, b in zip(term(u), term(v), strict=True)]
    assert_near(both, apart, 1e-12 if derivative == "double" else 1e-6)
    assert_near(term(u), [-RATE * part for part in product(squares(data), tensors(x), tensors(y), u)], 1e-6)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_06_the_second_order_term_is_zero_where_the_lower_gradient_is(derivative):
    """The upper batch is fitted exactly after the lower step, but for what the upper variables alone add."""
    x, y, (data, other) = problem()
    _, (d1, c1), _ = closed_form(x, y, moments(data), moments(other), RATE)
    fitted = (other[0], (x[0] @ x[1] + d1 @ c1) @ other[0])

    def outer(above: Sequence[Tensor], below: Sequence[Tensor]) -> Tensor:
        return squares(fitted)(above, below) + above[0].pow(2).sum()

    _, found, _ = hypergradient(squares(data), outer, tensors(x), tensors(y), RATE, derivative)
    np.testing.assert_allclose(found[0], 2 * x[0], rtol=1e-9)
    np.testing.assert_allclose(found[1], 0, atol=1e-9)


def test_a_lower_gradient_of_exactly_zero_divides_nothing():
    x, y, (data, _) = problem()

    def outer(above: Sequence[Tensor], below: Sequence[Tensor]) -> Tensor:
        return above[0].sum() + above[1].sum() + 0 * below[0].sum() + 0 * below[1].sum()

    _, found, _ = hypergradient(squares(data), outer, tensors(x), tensors(y), RATE, "finite")
    assert all(torch.equal(part, torch.ones_like(part)) for part in found)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_attention_keeps_its_fused_kernel_but_where_a_second_derivative_is_taken(derivative):
    x, y, (data, _) = problem()
    fused: dict[str, list[bool]] = {"inner": [], "outer": []}

    def noted(name: str) -> Callable[..., Tensor]:
        def loss(above: Sequence[Tensor], below: Sequence[Tensor]) -> Tensor:
            fused[name].append(torch.backends.cuda.flash_sdp_enabled())
            return squares(data)(above, below)

        return loss

    hypergradient(noted("inner"), noted("outer"), tensors(x), tensors(y), RATE, derivative)
    assert fused == {"inner": {"double": [False], "finite": [True] * 3, "first": [True]}[derivative], "outer": [True]}


def test_without_upper_variables_only_the_lower_step_is_taken():
    x, y, data = problem()
    fixed = tensors(x)
    _, h, after = hypergradient(
        lambda _, below: squares(data[0])(fixed, below), squares(data[1]), [], tensors(y), RATE, "double"
    )
    assert h == []
    assert_near(after, closed_form(x, y, *map(moments, data), RATE)[1], 1e-12)


# ---- mounted on a model


def pair(x: Arrays, y: Arrays, scale: float) -> tuple[Adapter, Adapter]:
    """The two levels as adapters of one module, the private ids after the common ones."""
    (b, a), (d, c) = ([part.astype(np.float32) for part in arrays] for arrays in (x, y))
    upper = Adapter({"m": Block(np.arange(R), b, None, a)}, scale, {})
    return upper, Adapter({"m": Block(np.arange(R, R + P), d, None, c)}, scale, {})


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_two_mounted_levels_take_the_step_of_the_closed_form(derivative):
    x, y, data = problem(3)
    scale, layer = 0.5, nn.Linear(IN, OUT, bias=False)
    w0 = rng(3, "base").normal(size=(OUT, IN))
    layer.weight = nn.Parameter(torch.tensor(w0, dtype=torch.float32), requires_grad=False)
    common, private = pair(x, y, scale)
    upper = live(common, Adapter({}, scale, {}), "BeAh", "cpu")
    two = begin(upper, Lower(RATE, private, derivative), "BeAh", "cpu", None)

    def loss(part: tuple[np.ndarray, np.ndarray]) -> Tensor:
        inputs, outputs = (torch.tensor(array.T, dtype=torch.float32) for array in part)
        return (layer(inputs) - outputs).pow(2).sum() / (2 * len(inputs))

    with mounted({"m": layer}, {}, upper), mounted({"m": layer}, {}, two.lower):
        two.step(lambda: loss(data[0]), lambda: loss(data[1]))
    h, (d1, c1), first = closed_form(x, y, *(moments(part, w0) for part in data), RATE, scale)
    expected = first if derivative == "first" else h
    grads = [upper.grads["B"].numpy().reshape(R, OUT).T, upper.grads["A"].numpy().reshape(R, IN)]
    assert_near(grads, expected, 1e-2 if derivative == "finite" else 1e-5)
    kept = from_arrays(two.private, scale)
    assert_near([kept.blocks["m"].B, kept.blocks["m"].A], [d1, c1], 1e-5)
    assert kept.blocks["m"].ids.tolist() == [3, 4]
    assert toy.same(upper.export(common), common)  # the upper variables are the optimizer's to move


# ---- in local training


ROWS = np.arange(20)


def work(learn: str = "BeAh", round: int = 1, spec: ModelSpec | None = None, **settings: Any) -> Job:
    spec = spec or toy.encoder().spec
    adapter = spec.with_head(kaiming(spec.shapes, 2, spec.scale, rng(0, "start")))
    moved = rng(0, "moved")
    blocks = {n: replace(b, B=moved.normal(0, 0.1, b.B.shape).astype(np.float32)) for n, b in adapter.blocks.items()}
    job = toy.job(spec, replace(adapter, blocks=blocks), Plan(adapter.ids, learn=learn), print, round=round)
    return replace(job, local=Local(**{"batch_size": 8, "clip": None, **settings}))


def private(zero: bool = False, job: Job | None = None) -> Adapter:
    start = levels.private(work() if job is None else job, 2)
    draw = rng(0, "private")
    blocks = {n: replace(b, B=draw.normal(0, 0.1, b.B.shape).astype(np.float32)) for n, b in start.blocks.items()}
    return start if zero else replace(start, blocks=blocks)


def gradients(job: Job, lower: Lower | None, teacher: Trainer | None = None) -> list[dict[str, np.ndarray]]:
    """The upper gradient of every step."""
    seen: list[dict[str, np.ndarray]] = []
    (teacher or toy.trainer(1e-2)).fit(
        job, ROWS, lambda values, grads: seen.append({n: g.clone().numpy() for n, g in grads.items()}), lower
    )
    return seen


def flat(step: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(step.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("copied", [False, True])
def test_04_differences_agree_with_double_backward_in_a_transformer(copied, dropout):
    """Which needs attention with a second derivative, and the same dropout in all lower passes."""
    job = work(steps=1, dropout=dropout)
    below = None if copied else private()
    rate = 0.2 if copied else 3.0
    steps = [flat(gradients(job, Lower(rate, below, derivative))[0]) for derivative in DERIVATIVES]
    double, finite, first = steps
    assert np.linalg.norm(first - double) > 0.1 * np.linalg.norm(double)
    assert np.linalg.norm(finite - double) < 0.02 * np.linalg.norm(first - double)


def test_dropout_ends_where_nothing_learns_in_two_levels_as_in_one():
    """Below the lowest block that learns there is none, the embeddings' included."""
    job, seen = work(steps=1, dropout=0.3), []
    top = [name for name in job.adapter.blocks if f".{toy.encoder().spec.blocks - 1}." in name]
    plan = replace(job.plan, train={name: job.plan.train[name] for name in top})
    job = replace(job, plan=plan, adapter=replace(job.adapter, blocks={name: job.adapter.blocks[name] for name in top}))
    teacher = toy.trainer(1e-2)
    layers = [layer for layer in teacher.frozen.network.modules() if isinstance(layer, torch.nn.Dropout)]

    def look(values: Any, grads: Any) -> None:
        seen.append([layer.training for layer in layers])

    teacher.fit(job, ROWS, look, None)
    below = private(job=job)
    below = replace(below, blocks={name: below.blocks[name] for name in top})
    teacher.fit(job, ROWS, look, Lower(1.0, below, "first"))
    assert seen[0] == seen[1]
    assert 0 < sum(seen[0]) < len(layers)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_04_and_in_a_decoder(kind, tmp_path):
    """With a causal mask, and heads that share keys."""
    model = toy.loaded(kind, tmp_path)
    data = tasks.encode(toy.texts(20, 0), model.tokenizer, "classify", 16)
    job, teacher = work(steps=1, spec=model.spec), Trainer(model, data, data, 1e-2, 1, "cpu")
    below = private(job=job)
    double, finite, first = (flat(gradients(job, Lower(3.0, below, form), teacher)[0]) for form in DERIVATIVES)
    assert np.linalg.norm(first - double) > 0.1 * np.linalg.norm(double)
    assert np.linalg.norm(finite - double) < 0.02 * np.linalg.norm(first - double)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_packed_rows_give_what_padded_rows_do(kind, derivative, tmp_path):
    """Of several lengths, some of which share a tile, with and without a causal mask."""
    found, name = [], str(toy.saved(kind, tmp_path))
    model = models.load(toy.settings(model={"name": name, "pooling": "mean"}), toy.LABELS)
    data = tasks.encode(toy.texts(20, 0), model.tokenizer, "classify", 16)
    job = work(steps=1, spec=model.spec)
    lower = Lower(1.0, private(job=job), derivative)
    for padded in (False, True):
        teacher = Trainer(model, data, data, 1e-2, 1, "cpu")
        if padded:
            teacher.frozen.first = None
        assert teacher.frozen.packs is not padded
        found.append(flat(gradients(job, lower, teacher)[0]))
    assert_near([found[0]], [found[1]], 1e-3 if derivative == "finite" else 1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_in_bfloat16_the_second_order_term_is_what_it_is_in_float32(copied):
    """Its direction is within a few degrees: rounded as any gradient is."""
    terms, job = [], work(steps=1)
    lower = Lower(0.2, None) if copied else Lower(3.0, private())
    for compute in ("bfloat16", "float32"):
        model = toy.encoder()
        data = tasks.encode(toy.texts(20, 0), model.tokenizer, "classify", 16)
        teacher = Trainer(model, data, data, 1e-2, 1, "cpu", Compute(compute, "torch"))
        assert teacher.frozen.dtype == getattr(torch, compute)
        double, first = (flat(gradients(job, replace(lower, derivative=d), teacher)[0]) for d in ("double", "first"))
        terms.append(double - first)
    found, expected = terms
    assert found @ expected > 0.995 * np.linalg.norm(found) * np.linalg.norm(expected)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=0.1)


def by_hooks(job: Job) -> Update:
    """One level's training, as two are trained."""
    trainer = toy.trainer(1e-2)
    one, frozen = course.begin(course.Ask(job, ROWS, None, None), 1e-2, "cpu"), trainer.frozen
    with (
        trainer._training(frozen, job, list(trainer.model.modules)),
        fused.unmounted(frozen),
        mounted(frozen.layers, frozen.heads, one.live),
    ):
        for batch in one.batches:
            loss = trainer._upper(frozen, trainer.train, batch)
            loss.backward()
            one.step(loss, None, 8)
    return one.update()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("private_rank", [0, 2])
def test_09_without_a_second_level_training_is_the_plain_one(private_rank, derivative, dropout):
    """To the bit: without private components, or with ones that stand at D = 0, which are trained by hooks."""
    job = work(epochs=2, dropout=dropout, clip=1.0)
    plain = by_hooks(job) if private_rank else toy.trainer(1e-2).fit(job, ROWS)
    below = private(zero=True) if private_rank else Adapter({}, job.adapter.scale, {})
    found = toy.trainer(1e-2).fit(job, ROWS, lower=Lower(0.0, below, derivative))
    assert toy.same(found.adapter, plain.adapter)
    assert found.metrics["loss"] == plain.metrics["loss"]
    assert not plain.private
    kept = from_arrays(found.private, below.scale)
    assert toy.same(kept, below)


HELD = [("auto", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
HEADS = {
    (kind, *held, levels)
    for kind in ("bert", "llama", "albert")
    for held in HELD
    for levels in ("one level", *DERIVATIVES)
}
QUICK = {(k, d, c, way) for k, d, c, way in HEADS if way != "first" and (k == "bert" or (d, way) == ("auto", "double"))}


@pytest.mark.parametrize(
    ("kind", "dtype", "compute", "levels"),
    [pytest.param(*one, marks=() if one in QUICK else toy.EXHAUSTIVE) for one in sorted(HEADS)],
)
def test_a_head_of_the_model_s_own_is_float32_whatever_is_before_it(kind, dtype, compute, levels, tmp_path):
    """From the set-up of a run to a client's scores; and where blocks share their weights."""
    toy.saved(kind, tmp_path / "model")
    (tmp_path / "data").mkdir()
    toy.write(tmp_path / "data", train=toy.texts(32, 0), test=toy.texts(16, 1))
    method = (
        {"name": "fedavg"} if levels == "one level" else {"name": "pf2lora", "private_rank": 1, "derivative": levels}
    )
    run = fedrank.run(
        {
            "model": {"name": str(tmp_path / "model"), "dtype": dtype}, "engine": {"compute": compute, "workers": 1},
            "data": {"path": str(tmp_path / "data"), "partition": {"kind": "iid"}}, "clients": {"count": 2},
            "rounds": {"count": 1, "cohort": 2}, "adapter": {"rank": 2}, "method": method,
            "local": {"steps": 2, "batch_size": 8, "max_length": 16},
        },
        out=tmp_path / "run",
    )  # fmt: skip
    (row,) = run.rounds
    assert np.isfinite(row["train_loss"])
    assert row["clients_failed"] == 0
    before, after = run.state.adapter.dense, parts.prepare(run.config).spec.dense
    assert all(np.any(before[name] != after[name]) for name in after)


def test_the_lower_batches_are_drawn_apart():
    job = work()
    upper, lower = list(drawn_batches(ROWS, job.local, job)), list(drawn_batches(ROWS, job.local, job, "lower batches"))
    assert sorted(np.concatenate(lower)) == sorted(np.concatenate(upper)) == sorted(ROWS)
    assert not np.array_equal(upper[0], lower[0])


def test_both_levels_move_and_the_head_is_part_of_the_upper_one():
    job, below = work(), private()
    update = toy.trainer(1e-2).fit(job, ROWS, lower=Lower(0.1, below))
    before, after = toy.arrays(job.adapter), toy.arrays(update.adapter)
    assert all(np.any(after[name] != array) for name, array in before.items() if not name.endswith("/ids"))
    assert before.keys() == after.keys()
    kept = from_arrays(update.private, below.scale)
    assert kept.blocks.keys() == below.blocks.keys()
    assert all(np.any(kept.blocks[n].B != b.B) and np.any(kept.blocks[n].A != b.A) for n, b in below.blocks.items())
    assert not kept.dense
    assert update.metrics["rows_seen"] == 2 * len(ROWS)  # those of both levels


@pytest.mark.parametrize("learn", ["BAh", "B", "h"])
def test_each_level_moves_only_what_the_plan_lets_learn(learn):
    job, below = work(learn), private()
    update = toy.trainer(1e-2).fit(job, ROWS, lower=Lower(0.1, below))
    kept = from_arrays(update.private, below.scale)
    for one, other in ((job.adapter, update.adapter), (below, kept)):
        before, after = toy.arrays(one), toy.arrays(other)
        moved = {
            "h" if n.startswith("dense/") else n.rpartition("/")[2] for n in before if np.any(after[n] != before[n])
        }
        assert moved == {f for f in learn if f != "h" or one.dense}


def test_the_upper_optimizer_goes_on_where_it_was():
    """Two rounds of one step each on the same rows are one round of two, if and only if the moments are kept."""
    rows = ROWS[:8]

    def fit(job: Job, below: Adapter, moments: dict[str, np.ndarray]) -> Any:
        return toy.trainer(1e-2).fit(job, rows, lower=Lower(0.1, below, moments=moments))

    together = fit(work(steps=2), private(), {})
    one = fit(work(steps=1), private(), {})
    kept = levels.moments(one.private)
    assert {name.rpartition("/")[2] for name in kept} == {"step", "exp_avg", "exp_avg_sq"}
    again = replace(work(steps=1, round=2), adapter=one.adapter)
    below = from_arrays(one.private, again.adapter.scale)
    apart, fresh = fit(again, below, kept), fit(again, below, {})
    gap = [max(np.abs(a - b).max() for a, b in zip(toy.arrays(u.adapter).values(), toy.arrays(together.adapter).values(), strict=True))
           for u in (apart, fresh)]  # fmt: skip
    assert gap[0] < 1e-4
    assert gap[1] > 1e-3
    assert float(levels.moments(apart.private)["B/step"]) == 2


def values(adapter: Adapter) -> dict[str, Tensor]:
    """The flat tensors of an adapter in LoRA's form, and its head's, by their names in training."""
    return dict(live(adapter, Adapter({}, adapter.scale, {}), "BAh", "cpu").values)


def test_where_nothing_above_learns_the_lower_level_takes_plain_sgd_steps():
    job = work(steps=1)
    alone = replace(job, plan=Plan({}, learn="BAh"), adapter=Adapter({}, job.adapter.scale, {}))
    update = toy.trainer(1e-2).fit(alone, ROWS, lower=Lower(0.5, job.adapter))
    assert not update.adapter.blocks
    moved = from_arrays(update.private, job.adapter.scale)
    (batch,) = drawn_batches(ROWS, job.local, job, "lower batches")
    seen: list[dict[str, Tensor]] = []
    toy.trainer(1e-2).fit(job, batch, lambda values, grads: seen.append({n: g.clone() for n, g in grads.items()}))
    (before, after), (gradient,) = (values(a) for a in (job.adapter, moved)), seen
    assert gradient.keys() == before.keys()
    for name, part in gradient.items():
        torch.testing.assert_close(after[name], before[name] - 0.5 * part, rtol=1e-5, atol=1e-7)
        assert part.norm() > 1e-4


# ---- what it costs


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_the_passes_that_plans_name_are_those_that_are_made(derivative, copied, wide):
    """Counted by torch, with eager attention, whose products it sees; what is small here shrinks with the width."""
    teacher, job = wide
    teacher, rows = replace(teacher), np.arange(8)
    teacher.frozen.first = None  # packed rows have other products in attention

    def count(work: Callable[[], Any]) -> int:
        with toy.flops() as counter:
            work()
        return counter.get_total_flops()

    plain = count(lambda: teacher.fit(job, rows))
    forward = count(lambda: Scorer(teacher).evaluate(job.adapter, teacher.train, rows))
    below = None if copied else levels.private(job, 1)
    found = count(lambda: teacher.fit(job, rows, lower=Lower(0.1, below, derivative)))
    ahead, back = levels.PASSES[derivative]
    assert found == pytest.approx(ahead * forward + back * (plain - forward), rel=0.06)


@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("longest", [32, 64])
@pytest.mark.parametrize("copied", [False, True])
def test_of_packed_rows_that_fill_their_tiles_too(copied, longest, rows, wide):
    """Within a hundredth."""
    model = models.load(
        toy.settings(model={"name": wide[0].model.source, "pooling": "mean"}, adapter={"rank": 2}), toy.LABELS
    )
    data = tasks.encode(toy.texts(8, 0), model.tokenizer, "classify", 16)
    teacher, job = Trainer(model, data, data, 1e-2, 1, "cpu"), work(steps=1, spec=model.spec)
    assert teacher.frozen.packs
    below = None if copied else levels.private(job, 1)

    def step(rows: tasks.Encoded) -> None:
        local = job.local.model_copy(update={"batch_size": len(rows)})
        teacher.fit(replace(job, local=local), np.arange(len(rows)), lower=Lower(0.1, below), encoded=rows)

    said, batch = twice.kept(teacher.frozen, 512, data, step), twice._rows(data, rows, longest)
    with toy.saved_for_backward(teacher.frozen.network.state_dict(keep_vars=True).values()) as most:
        step(batch)
        found = most()
    assert found == pytest.approx(np.dot(said, [*twice._sizes(batch.lengths, True), rows, 1]), rel=0.01)


def test_a_model_that_reads_few_tokens_is_counted_too(tmp_path):
    """Whose pairs of tokens follow from the tokens."""
    base = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 260,
    }
    config = transformers.BertConfig(**base, max_position_embeddings=20, num_labels=4)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    toy.encoder().tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    toy.write(tmp_path / "data", train=toy.texts(32, 0), test=toy.texts(16, 1))
    made = parts.prepare(toy.settings(
        model={"name": str(tmp_path / "model"), "pooling": "mean"}, method={"name": "pf2lora", "private_rank": 1},
        data={"path": str(tmp_path / "data"), "partition": {"kind": "iid"}}, clients={"count": 2}, local={"max_length": 16},
    ))  # fmt: skip
    assert made.machine.packed
    assert all(part >= 0 for part in made.spec.execution.twice)


@pytest.mark.parametrize("copied", [False, True])
def test_what_a_few_tokens_keep_says_what_many_do(copied, wide):
    """To the byte: what is saved for backward passes grows with tokens, pairs of them, and rows."""
    teacher, job = wide
    below = None if copied else levels.private(job, 1)

    def step(rows: tasks.Encoded) -> None:
        local = job.local.model_copy(update={"steps": 1, "batch_size": len(rows)})
        teacher.fit(replace(job, local=local), np.arange(len(rows)), lower=Lower(0.1, below), encoded=rows)

    said = twice.kept(teacher.frozen, 512, teacher.train, step)
    assert all(part > 0 for part in said)
    count, longest = len(teacher.train), int(teacher.train.lengths.max())
    with toy.saved_for_backward(teacher.model.network.state_dict(keep_vars=True).values()) as most:
        step(teacher.train)
        found = most()
    assert found == pytest.approx(np.dot(said, [count * longest, count * longest**2, count, 1]), rel=1e-9)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Job]:
    """A model in which the adapter's own products weigh little."""
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        num_labels=4, attn_implementation="eager",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    toy.encoder().tokenizer.save_pretrained(folder)
    model = models.load(toy.settings(model={"name": str(folder)}, adapter={"rank": 2}), toy.LABELS)
    model.base.set_attn_implementation("eager")
    data = tasks.encode(toy.texts(8, 0), model.tokenizer, "classify", 16)
    start = model.spec.with_head(kaiming(model.spec.shapes, 2, model.spec.scale, rng(0, "start")))
    job = toy.job(model.spec, start, Plan(start.ids), print)
    return Trainer(model, data, data, 1e-2, 1, "cpu"), job
