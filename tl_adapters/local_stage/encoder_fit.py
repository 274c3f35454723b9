"""The encoder of one feature, fitted to the activations that it should have: a convex problem, solved by Newton steps.

    minimize over w, b   sum_{i: c_i > 0} m_i (x_i w + b - c_i)^2  +  sum_{i: c_i = 0} m_i max(0, x_i w + b)^2

x are inputs, c the wanted activations of a ReLU feature and m the weights of the inputs. Where the feature should be
active its pre-activation is regressed on the wanted one; where it should not, only pre-activations above 0 count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3
"""Weight of |w|^2 for each dimension of the inputs, as if there were so many inputs more."""
BIAS_RIDGE = 1e-6
"""Ridge on the bias, which keeps the Newton system regular where no input is active."""
SMALLEST_STEP = 0.05
"""Shortest share of a Newton step that is tried before the fit ends."""
CONVERGED = 1e-4
"""The fit ends where a step lowers the loss by less than this share."""


class Encoder(NamedTuple):
    """Weights and bias of one feature's encoder."""

    w: Float[Tensor, "d"]
    b: Float[Tensor, ""]


@torch.no_grad()
def fit_encoder(
    x: Float[Tensor, "n d"],
    wanted: Float[Tensor, "n"],
    *,
    weights: Float[Tensor, "n"] | None = None,
    start: Encoder | None = None,
    ridge: float = RIDGE,
    steps: int = 10,
) -> Encoder | None:
    """Return the encoder whose ReLU activations are closest to ``wanted``; None where fewer than 3 are above 0.

    Args:
        x: inputs, in whitened coordinates, in which a ridge treats all directions alike.
        wanted: activations to reproduce, >= 0.
        weights: how many inputs each one stands for; None is 1 for all.
        start: where Newton's steps start; None is the mean of the active inputs.
        ridge: weight of |w|^2, per dimension of the inputs and per unit of the active ones' mean weight.
        steps: most Newton steps.
    """
    active = wanted > 0
    if int(active.sum()) < 3:
        return None
    scale = wanted[active].square().mean().sqrt()
    problem = _Problem(x, wanted / scale, torch.ones_like(wanted) if weights is None else weights, active, ridge)
    solution = problem.solve(
        problem.first_guess() if start is None else torch.cat([start.w, start.b[None]]) / scale, steps
    )
    return Encoder(solution[:-1] * scale, solution[-1] * scale)


class _Point(NamedTuple):
    """A solution (w, b) in one vector, and the pre-activations that it gives on active and inactive inputs."""

    solution: Tensor
    active: Tensor
    inactive: Tensor

    def towards(self, other: _Point, share: float) -> _Point:
        """The point at a share of the way to another, without a product, since pre-activations are linear."""
        return _Point(*(torch.lerp(ours, theirs, share) for ours, theirs in zip(self, other, strict=True)))


class _Problem:
    """The convex problem of one feature; solutions are (w, b) in one vector."""

    def __init__(self, x: Tensor, wanted: Tensor, weights: Tensor, active: Tensor, ridge: float) -> None:
        rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.active, self.inactive = rows[active], rows[~active]
        self.wanted, self.active_weights, self.inactive_weights = wanted[active], weights[active], weights[~active]
        self.ridge = torch.full_like(rows[0], ridge * x.shape[1] * float(self.active_weights.mean()))
        self.ridge[-1] = BIAS_RIDGE
        weighted = self.active * self.active_weights[:, None]
        self.hessian = weighted.T @ self.active + torch.diag(self.ridge)
        self.gradient = weighted.T @ self.wanted

    def first_guess(self) -> Tensor:
        """The mean of the active inputs (Fisher's discriminant in whitened coordinates), above 0 on 90 % of them."""
        direction = self.active[:, :-1].mean(0)
        direction = direction / direction.norm().clamp(min=1e-6)
        scores = self.active[:, :-1] @ direction
        cut = scores.kthvalue(1 + len(scores) // 10).values
        return torch.cat([direction, -cut[None]])

    def at(self, solution: Tensor) -> _Point:
        """A solution with the pre-activations that it gives."""
        return _Point(solution, self.active @ solution, self.inactive @ solution)

    def loss(self, point: _Point) -> float:
        """The loss with its ridge."""
        active = self.active_weights @ (point.active - self.wanted).square()
        inactive = self.inactive_weights @ point.inactive.clamp(min=0).square()
        return float(active + inactive + self.ridge @ point.solution.square())

    def solve(self, solution: Tensor, steps: int) -> Tensor:
        """Newton steps, each halved until the loss falls."""
        point = self.at(solution)
        best = self.loss(point)
        for _ in range(steps):
            wrong = point.inactive > 0
            rows = self.inactive[wrong]
            hessian = self.hessian + (rows * self.inactive_weights[wrong][:, None]).T @ rows
            newton, share = self.at(torch.linalg.solve(hessian, self.gradient)), 1.0
            while (loss := self.loss(next_point := point.towards(newton, share))) > best and share > SMALLEST_STEP:
                share /= 2
            if loss > best:
                break
            point, previous, best = next_point, best, loss
            if previous - best < CONVERGED * previous:
                break
        return point.solution
