"""What to train on next: rules that choose prompts from what earlier rollouts say.

A rule is an object with `propose(budget)`, which returns a `Plan`, and `update(signals)`. It lives on the
host, in float64, with a random generator of its own. `collect` makes the signals of a step from its rewards
and advantages with one read of the device. The rules: Uniform, SEC, DUMP, CLPO here, PCL in value_sampler.py,
Knapsack in knapsack.py.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """What to roll out. A prompt may stand here twice: that is two groups."""

    prompts: Tensor  # [P] int64, rows of the pool
    counts: Tensor  # [P] int64, rollouts of each; they sum to the budget

    def groups(self) -> Tensor:
        """[N]: the place in the plan that each rollout belongs to, for `rlkern.advantages`."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)


class Signals(NamedTuple):
    """What came back, one row a scored rollout, [N]."""

    prompt: Tensor  # int64, rows of the pool
    family: Tensor  # int64
    reward: Tensor  # float64
    advantage: Tensor  # float64


class Pool:
    """M prompts in families 0 to F - 1.

    Args:
        family: [M] int64, of each prompt.
        features: [M, D] float, what a value model sees of a prompt.
    """

    def __init__(self, family: Tensor, features: Tensor):
        if family.dtype != torch.int64 or family.dim() != 1 or not len(family):
            raise ValueError(f"family must be int64 [M] with M >= 1, got {family.dtype} {list(family.shape)}")
        if family.min() < 0:
            raise ValueError(f"families are numbered from 0, got {family.min().item()}")
        if features.dim() != 2 or len(features) != len(family):
            raise ValueError(f"features must be [M, D] with a row for each of the {len(family)} prompts, got {list(features.shape)}")
        self.family, self.features = family, features
        self.sizes = family.bincount()
        if (self.sizes == 0).any():
            empty = (self.sizes == 0).nonzero().flatten().tolist()
            raise ValueError(f"every family from 0 to {len(self.sizes) - 1} must have a prompt; these have none: {empty}")
        self._members = [(family == f).nonzero().flatten() for f in range(len(self.sizes))]

    def draw(self, families: Tensor, generator: torch.Generator) -> Tensor:
        """A random prompt of each family [P] -> rows [P]. Without replacement where a family has enough."""
        rows = torch.empty_like(families)
        for f in families.unique().tolist():
            places, members = families == f, self._members[f]
            count = int(places.sum())
            if count <= len(members):
                picked = torch.randperm(len(members), generator=generator)[:count]
            else:
                picked = torch.randint(len(members), (count,), generator=generator)
            rows[places] = members[picked]
        return rows


def collect(pool: Pool, plan: Plan, reward: Tensor, advantage: Tensor) -> Signals:
    """The signals of a step, from [N] tensors on any device. Reads the device once.

    A rollout with a NaN reward was not scored. It is left out: its advantage, 0, is no evidence. Nor is that
    of a group's only scored rollout: `rlkern.advantages.grpo(singletons="zero")` makes it 0.
    """
    prompt = plan.prompts.repeat_interleave(plan.counts)
    for name, x in (("reward", reward), ("advantage", advantage)):
        if x.shape != prompt.shape:
            raise ValueError(f"{name} must be [{len(prompt)}], a value for each rollout of the plan, got {list(x.shape)}")
    reward, advantage = torch.stack([reward.detach().double(), advantage.detach().double()]).cpu()
    scored = ~reward.isnan()
    if not scored.any():
        raise ValueError(f"no rollout was scored: all {len(reward)} rewards are NaN")
    return Signals(*(x[scored] for x in (prompt, pool.family[prompt], reward, advantage)))


def checked(pool: Pool, signals: Signals, rates: bool = False) -> Signals:
    """The signals, if they are those of prompts of the pool; with `rates` only if rewards are in [0, 1]."""
    shapes = {name: list(x.shape) for name, x in signals._asdict().items()}
    if signals.prompt.dim() != 1 or any(shape != shapes["prompt"] for shape in shapes.values()):
        raise ValueError(f"signals must be four tensors [N], got {shapes}")
    if not len(signals.prompt):
        raise ValueError("signals must hold a rollout, got none")
    least, most = (x.item() for x in signals.prompt.aminmax())
    if least < 0 or most >= len(pool.family):
        raise ValueError(f"prompt must be rows of the pool, from 0 to {len(pool.family) - 1}, got {least} to {most}")
    if not signals.family.equal(pool.family[signals.prompt]):
        raise ValueError("family must be that of each prompt in the pool, and is not")
    for name in ("reward", "advantage"):
        x = getattr(signals, name)
        bad = x[~x.isfinite()]
        if len(bad):
            raise ValueError(f"signals must be finite, but {name} is {bad[0].item()} in {len(bad)} of {len(x)} rollouts")
    if rates and ((signals.reward < 0) | (signals.reward > 1)).any():
        raise ValueError(f"this rule needs rewards in [0, 1], got {signals.reward.min().item()} to {signals.reward.max().item()}")
    return signals


def family_means(values: Tensor, family: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and number of values [N] by family, both [count]; the mean of none is 0."""
    number = family.bincount(minlength=count)
    return family.bincount(values, minlength=count) / number.clamp(min=1), number


class Uniform:
    """The baseline: a family at random for every prompt, `group` rollouts each.

    Args:
        pool: the prompts.
        group: rollouts of an ordinary prompt, at least 2.
        generator: a CPU generator of this sampler's own.
    """

    def __init__(self, pool: Pool, group: int, generator: torch.Generator):
        if group < 2:
            raise ValueError(f"group must be at least 2 rollouts a prompt, got {group}")
        self.pool, self.group, self.generator = pool, group, generator

    def even_counts(self, budget: int) -> Tensor:
        """[P] rollouts of each prompt, P = budget // group. A remainder goes one each to the first."""
        if budget < self.group:
            raise ValueError(f"the budget must be at least the {self.group} rollouts of one prompt, got {budget}")
        prompts = budget // self.group
        return budget // prompts + (torch.arange(prompts) < budget % prompts).long()

    def probabilities(self) -> Tensor:
        """[F], of the families"""
        return torch.full((len(self.pool.sizes),), 1 / len(self.pool.sizes), dtype=torch.float64)

    def draw(self, count: int) -> Tensor:
        """Rows [count] of prompts, the family of each drawn on its own."""
        families = torch.multinomial(self.probabilities(), count, replacement=True, generator=self.generator)
        return self.pool.draw(families, self.generator)

    def propose(self, budget: int) -> Plan:
        """What to roll out next. ValueError if `budget` is less than one group."""
        counts = self.even_counts(budget)
        return Plan(self.draw(len(counts)), counts)

    def update(self, signals: Signals) -> None:
        """Takes in what the rollouts of the last plan gave."""
        checked(self.pool, signals)


class SEC(Uniform):
    """Self-evolving curriculum (arXiv 2505.14970): a bandit. Its arms are families, its gain is mean |A|.

    Q_f += alpha (mean |A| of this step's rollouts of f - Q_f), Q = 0 at first; p = softmax(Q / tau).

    Args:
        alpha: 0.5 in the paper.
        tau: 1.0 for Countdown, 0.4 for mathematics, 0.2 for arms of two dimensions in the paper.
        decay_unseen: a family without a rollout counts as mean |A| = 0, as in the released program; by
            default its Q stays.
    """

    def __init__(self, pool: Pool, group: int, generator: torch.Generator, *, alpha: float = 0.5, tau: float = 0.4, decay_unseen: bool = False):
        super().__init__(pool, group, generator)
        if not 0 < alpha <= 1 or not tau > 0:
            raise ValueError(f"alpha must be in (0, 1] and tau positive, got {alpha} and {tau}")
        self.alpha, self.tau, self.decay_unseen = alpha, tau, decay_unseen
        self.q = torch.zeros(len(pool.sizes), dtype=torch.float64)

    def probabilities(self) -> Tensor:
        return (self.q / self.tau).softmax(0)

    def update(self, signals: Signals) -> None:
        gain, number = family_means(checked(self.pool, signals).advantage.abs(), signals.family, len(self.q))
        seen = (number > 0) | self.decay_unseen
        self.q += self.alpha * torch.where(seen, gain - self.q, 0)


class DUMP(Uniform):
    """DUMP (arXiv 2504.09710): an upper confidence bound of mean |A| by family.

    score_f = mean of the last `window` |A| of f + sqrt(2 ln(N + 1) / (n_f + 1)); p = softmax(score / tau).
    n_f counts the rollouts of f since the beginning, N all of them, at least 1.
    """

    def __init__(self, pool: Pool, group: int, generator: torch.Generator, *, window: int = 300, tau: float = 0.1):
        super().__init__(pool, group, generator)
        if window < 1 or not tau > 0:
            raise ValueError(f"window must be at least 1 and tau positive, got {window} and {tau}")
        self.tau = tau
        self.recent = [deque(maxlen=window) for _ in pool.sizes]
        self.seen = torch.zeros(len(pool.sizes), dtype=torch.float64)

    def scores(self) -> Tensor:
        """[F]"""
        means = torch.tensor([sum(r) / len(r) if r else 0.0 for r in self.recent], dtype=torch.float64)
        return means + (2 * math.log(max(1, self.seen.sum().item()) + 1) / (self.seen + 1)).sqrt()

    def probabilities(self) -> Tensor:
        return (self.scores() / self.tau).softmax(0)

    def update(self, signals: Signals) -> None:
        for f, a in zip(checked(self.pool, signals).family.tolist(), signals.advantage.abs().tolist(), strict=True):
            self.recent[f].append(a)
        self.seen += signals.family.bincount(minlength=len(self.seen))


class CLPO(Uniform):
    """CLPO's difficulty (arXiv 2509.25004): hard where a group's success rate <= t_hard, easy above t_medium.

    The paper has a language model rewrite prompts by difficulty, which is not here. What remains is half of
    the KL penalty on hard prompts: `rlkern.grpo_loss(kl_coef=clpo.kl_coef, kl_scale=clpo.kl_scale(rate))`.
    """

    kl_coef = 0.001

    def __init__(self, pool: Pool, group: int, generator: torch.Generator, *, t_hard: float = 0.25, t_medium: float = 0.75):
        super().__init__(pool, group, generator)
        if not 0 <= t_hard <= t_medium <= 1:
            raise ValueError(f"0 <= t_hard <= t_medium <= 1 is expected, got {t_hard} and {t_medium}")
        self.t_hard, self.t_medium = t_hard, t_medium

    def difficulty(self, rate: Tensor) -> Tensor:
        """Success rates -> 2 hard, 1 medium, 0 easy."""
        return (rate <= self.t_medium).long() + (rate <= self.t_hard)

    def kl_scale(self, rate: Tensor) -> Tensor:
        return torch.where(self.difficulty(rate) == 2, 0.5, 1.0)
