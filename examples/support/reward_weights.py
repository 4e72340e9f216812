"""Several rewards, one loss: dynamic weights of K objectives (arXiv 2509.11452).

A rule has `weights` [K] on the simplex, a `scale`, and `on`, what the scale multiplies. It is told of every
validation point, and before an update it may ask for the gradient of each objective. `advantages` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import rlkern


class FixedWeights:
    """The baseline: weights that stay."""

    scale, on = 1.0, "rewards"

    def __init__(self, weights: Sequence[float]):
        if not all(w > 0 for w in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-9):
            raise ValueError(f"weights must be positive and sum to 1, got {list(weights)}")
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()  # so that a tiny weight can return

    @property
    def weights(self) -> Tensor:
        return self.log_weights.exp()

    def validated(self, point: Tensor) -> None:
        """Takes in the objectives [K] on validation data: before training, then after every step."""

    def before_update(self, gradients: Callable[[], Tensor]) -> None:
        """May call for the gradients [K, D] of the loss with the advantages of one objective each."""


class GradientWeights(FixedWeights):
    """w_i proportional to w_i exp(c I_i), I_i = <g_i, sum of all g>, g_i the gradient of objective i.

    The new weights maximise <w, I> - KL(w, old w) / c. The program has c = 1e-6 / 1e-5. I has the size of
    squared gradients, so a c that suits one model does not suit another.
    """

    def __init__(self, weights: Sequence[float], c: float = 0.1):
        super().__init__(weights)
        if not 0 < c < math.inf:
            raise ValueError(f"c must be positive and finite, got {c}")
        self.c = c

    def before_update(self, gradients: Callable[[], Tensor]) -> None:
        g = gradients().double().cpu()
        if g.dim() != 2 or len(g) != len(self.log_weights):
            raise ValueError(f"gradients must be [{len(self.log_weights)}, D], a row for each weight, got {list(g.shape)}")
        influence = g @ g.sum(0)
        if not influence.isfinite().all():
            raise ValueError(f"the gradients of the objectives must be finite, their products are {influence.tolist()}")
        self.log_weights = (self.log_weights + self.c * influence).log_softmax(0)


class HypervolumeScale(FixedWeights):
    """Multiplies by 0.5 + 1.5 tanh(what the last validation point added to the hypervolume of earlier ones).

    The first point is the reference. A point that is not above it in every objective adds nothing. The front
    holds the points that added something. Objectives should be of order one: tanh saturates.

    Args:
        on: "rewards", as in the paper, or "advantages". A common factor of all rewards cancels in
            `rlkern.advantages.grpo`, which divides by the standard deviation of a group. Adam takes most of a
            factor of the loss away. The released program normalises too.
    """

    def __init__(self, weights: Sequence[float], on: str = "rewards"):
        super().__init__(weights)
        if on not in ("rewards", "advantages"):
            raise ValueError(f"on must be 'rewards' or 'advantages', got {on!r}")
        self.on, self.reference = on, None

    def validated(self, point: Tensor) -> None:
        point = point.double().cpu()
        if point.shape != self.log_weights.shape or not point.isfinite().all():
            raise ValueError(f"a validation point must be {len(self.log_weights)} finite numbers, got {point.tolist()}")
        if self.reference is None:
            self.reference, self.front = point, point.new_empty(0, len(point))
            return
        self.scale = 0.5
        if (point > self.reference).all() and not (self.front >= point).all(-1).any():
            before = hypervolume(self.front, self.reference)
            self.front = torch.cat([self.front, point[None]])
            self.scale += 1.5 * math.tanh(max(0.0, hypervolume(self.front, self.reference) - before))


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Volume of what some point [N, K] dominates above the reference [K]: slices along the last objective."""
    sides = points - reference
    sides = sides[(sides > 0).all(-1)]
    if not len(sides):
        return 0.0
    if sides.shape[1] == 1:
        return sides.max().item()
    sides = sides[sides[:, -1].argsort(descending=True)]
    depth = -torch.cat([sides[:, -1], sides.new_zeros(1)]).diff()
    origin = sides.new_zeros(sides.shape[1] - 1)
    return sum(d * hypervolume(sides[: i + 1, :-1], origin) for i, d in enumerate(depth.tolist()) if d > 0)


def advantages(rewards: Tensor, groups: Tensor, rule: FixedWeights) -> Tensor:
    """GRPO's advantages [N] of rewards [N, K], weighed by the rule."""
    total = rlkern.advantages.combine_rewards(rewards, rule.weights.to(rewards))
    if rule.on == "rewards":
        return rlkern.advantages.grpo(rule.scale * total, groups)
    return rule.scale * rlkern.advantages.grpo(total, groups)
