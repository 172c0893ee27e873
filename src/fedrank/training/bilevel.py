"""The bilevel local step: the lower variables take one SGD step, and the upper gradient is taken through it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedrank import levels
from fedrank.adapter import Adapter, to_arrays
from fedrank.protocol import Lower
from fedrank.training.hooks import Live, live

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
DISTANCE = {torch.float32: 1e-3, torch.float64: 1e-5}  # of the two points of a central difference


class DerivativeError(RuntimeError):
    """A model through which the upper gradient cannot be taken."""


def hypergradient(
    inner: Loss, outer: Loss, x: Sequence[Tensor], y: Sequence[Tensor] | None, rate: float,
    derivative: Literal["double", "finite", "first"],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The loss, the upper gradient h, and the lower variables y+ after their step.

    y+ = y - rate * d inner(x, y) / dy, and h is the gradient of x -> outer(x, y - rate * d inner(x, y) / dy)
    with y held fixed: h = outer_x(x, y+) - rate * inner_xy(x, y) v, where v = outer_y(x, y+) (Hao et al., 2025,
    arXiv:2503.03920; one step, as in MAML). "finite" takes the product with v from two more gradients,
    "first" leaves it out. y None: the lower variables are a copy of the upper ones (MAML: Finn et al., 2017),
    both losses get them twice, and h = v - rate * H(x) v. Without upper variables only the lower step is taken.
    DerivativeError where "double" meets an operation that has no second derivative.
    """
    x = [value.detach().requires_grad_() for value in x]
    copied, y = y is None, x if y is None else [value.detach().requires_grad_() for value in y]
    if not y:
        loss = outer(x, y)
        return loss.detach(), list(torch.autograd.grad(loss, x)), []
    through = bool(x) and derivative == "double"
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH) if through else nullcontext():
        loss = inner(x, y)
    slope = torch.autograd.grad(loss, y, create_graph=through)
    moved = [value - rate * down for value, down in zip(y, slope, strict=True)]
    if not x:
        return loss.detach(), [], [value.detach() for value in moved]
    if not through:
        moved = [value.detach().requires_grad_() for value in moved]
    loss = outer(moved if copied else x, moved)
    if derivative == "finite":
        found = torch.autograd.grad(loss, moved if copied else [*x, *moved])
        h, v = list(found[: len(x)]), found[-len(y) :]
        size = torch.linalg.vector_norm(torch.cat([part.reshape(-1) for part in v]))
        if size > 0:
            e = DISTANCE[size.dtype] / size
            ahead, behind = (_gradient(inner, x, y, v, sign * e, copied) for sign in (1, -1))
            h = [g - rate * (a - b) / (2 * e) for g, a, b in zip(h, ahead, behind, strict=True)]
    else:
        try:
            h = list(torch.autograd.grad(loss, moved if copied and not through else x))
        except RuntimeError as error:
            if "derivative for" in str(error) or "differentiate twice" in str(error):
                raise DerivativeError(
                    "a part of this model has no second derivative; method.derivative: finite needs none"
                ) from error
            raise
    return loss.detach(), h, [value.detach() for value in moved]


def _gradient(
    inner: Loss, x: list[Tensor], y: list[Tensor], v: Sequence[Tensor], far: Tensor, copied: bool
) -> tuple[Tensor, ...]:
    """The upper gradient of the inner loss at y + far * v."""
    there = [(value.detach() + far * part).requires_grad_(copied) for value, part in zip(y, v, strict=True)]
    x = there if copied else x
    return torch.autograd.grad(inner(x, there), x)


@dataclass(frozen=True, eq=False)
class Bilevel:
    """The two levels of one client's training. lower None: a copy of the upper one."""

    upper: Live
    lower: Live | None
    rule: Lower
    optimizer: torch.optim.Optimizer | None

    @property
    def single(self) -> bool:
        """Whether there is nothing to learn below: training is then the plain one."""
        return self.lower is not None and not self.lower.values

    def step(self, inner: Callable[[], Tensor], outer: Callable[[], Tensor]) -> Tensor:
        """Move the lower variables, leave the upper gradient in `upper.grads`, and return the loss after the move.

        inner, outer: the loss on the batch of either level, of whatever is mounted. With nothing to learn above,
        the loss is the inner one, before the move.
        """

        def at(loss: Callable[[], Tensor]) -> Loss:
            def bound(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
                self.upper.bind(x)
                if self.lower is not None:
                    self.lower.bind(y)
                return loss()

            return bound

        x, y = list(self.upper.values.values()), None if self.lower is None else list(self.lower.values.values())
        loss, h, moved = hypergradient(at(inner), at(outer), x, y, self.rule.rate, self.rule.derivative)
        for grad, new in zip(self.upper.grads.values(), h, strict=True):
            grad.copy_(new)
        if y is not None:
            for value, new in zip(y, moved, strict=True):
                value.copy_(new)
        return loss

    @property
    def private(self) -> dict[str, np.ndarray]:
        """What stays with the client: the lower components as trained, and the upper optimizer's moments."""
        found: dict[str, np.ndarray] = {}
        if self.lower is not None and self.rule.private is not None:
            found |= to_arrays(self.lower.export(self.rule.private))
        if self.optimizer is not None:
            for name, value in self.upper.values.items():
                state = self.optimizer.state[value]
                found |= {f"{levels.MOMENTS}{name}/{key}": part.cpu().numpy() for key, part in state.items()}
        return found


def begin(upper: Live, rule: Lower, learn: str, device: str, optimizer: torch.optim.Optimizer | None) -> Bilevel:
    """The lower level on the device, and the optimizer's moments as they were left in the last round."""
    empty = Adapter({}, upper.scale, {})
    lower = None if rule.private is None else live(rule.private, empty, learn, device)
    for path, array in rule.moments.items():
        name, _, key = path.rpartition("/")
        value = upper.values[name]
        assert optimizer is not None
        optimizer.state[value][key] = torch.tensor(array, device=value.device)
    return Bilevel(upper, lower, rule, optimizer)
