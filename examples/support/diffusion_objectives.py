"""Three ways to the gradient of an update of a masked-diffusion model (arXiv 2510.11683), from n draws.

All three add to the parameters' .grad. The first keeps the graphs of all n draws, the others that of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlkern

from .sudoku import MASK


class Answers(NamedTuple):
    """A minibatch of sampled answers, B of them."""

    ids: Tensor  # [B, T] clues and answer
    response: Tensor  # [B, T] bool, the answer's places
    advantages: Tensor  # [B]
    rows: Tensor  # [B], numbers in the whole rollout: they and the seed make the masks
    seed: int

    def take(self, index: Tensor) -> Answers:
        return Answers(*(x[index] for x in self[:4]), self.seed)

    @property
    def scale(self) -> Tensor:
        """[B], what the log ratios are multiplied with: 1 / the number of tokens of the answer."""
        return 1 / self.response.sum(-1)


def _draw(answers: Answers, n: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw j of n: noisy ids and masked places, [B, T], and weight [B]. The same when drawn again."""
    mask, weight = rlkern.diffusion.count_masks(answers.response, n, seed=answers.seed, rollouts=answers.rows, draw=j)
    return torch.where(mask, MASK, answers.ids), mask, weight


@torch.no_grad()
def elbos(model: nn.Module, answers: Answers, n: int) -> Tensor:
    """[B, n], of every draw: what an update compares with once the policy has moved on."""
    draws = (_draw(answers, n, j) for j in range(n))
    return torch.stack([rlkern.masked_elbo(model(noisy), answers.ids, weight, mask=mask) for noisy, mask, weight in draws], -1)


def naive(model: nn.Module, answers: Answers, n: int, old_elbo: Tensor | None) -> None:
    """mean of A exp(s (B - old B)), B the mean ELBO over the draws, by autograd: Eq. 6 and 7."""
    ell = []
    for j in range(n):
        noisy, mask, weight = _draw(answers, n, j)
        logp = model(noisy).log_softmax(-1).gather(-1, answers.ids.unsqueeze(-1)).squeeze(-1)
        ell.append(weight * torch.where(mask, logp, 0).sum(-1))
    elbo = torch.stack(ell, -1)
    d = answers.scale * (elbo - (elbo.detach() if old_elbo is None else old_elbo)).mean(-1)
    (-answers.advantages * d.exp()).mean().backward()


def exact(model: nn.Module, answers: Answers, n: int, old_elbo: Tensor | None) -> None:
    """The same gradient: one pass finds each answer's coefficient, a second backpropagates by draws."""
    slope = answers.advantages
    if old_elbo is not None:
        slope = rlkern.elbo_coeff(elbos(model, answers, n).mean(-1), old_elbo.mean(-1), answers.advantages, ratio_scale=answers.scale)
    for j in range(n):
        noisy, mask, weight = _draw(answers, n, j)
        ell = rlkern.masked_elbo(model(noisy), answers.ids, weight, mask=mask, inplace_backward=True)
        (-slope * answers.scale * ell / n).mean().backward()


def bound(model: nn.Module, answers: Answers, n: int, old_elbo: Tensor | None) -> None:
    """BGPO's lower bound of the objective, a sum over the draws: Eq. 13 and 14."""
    for j in range(n):
        noisy, mask, weight = _draw(answers, n, j)
        loss, _ = rlkern.bgpo_loss(
            *(model(noisy), answers.ids, weight, answers.advantages, None if old_elbo is None else old_elbo[:, j]),
            mask=mask,
            mc_weight=1 / n,
            seq_weight=1 / len(answers.ids),
            ratio_scale=answers.scale,
            inplace_backward=True,
        )
        loss.backward()


Objective = Callable[[nn.Module, Answers, int, "Tensor | None"], None]
OBJECTIVES: dict[str, Objective] = {"naive": naive, "exact": exact, "bound": bound}


def gradient(objective: str, model: nn.Module, answers: Answers, n: int, old_elbo: Tensor | None) -> Tensor:
    """All parameters' gradients in one vector."""
    model.zero_grad()
    OBJECTIVES[objective](model, answers, n, old_elbo)
    return torch.cat([p.grad.flatten() for p in model.parameters()])
