"""Knapsack RL (arXiv 2509.25849): how many rollouts each prompt is worth."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from .samplers import Plan, Pool, Signals, Uniform, checked


def value(p: float, n: int) -> float:
    """V(p, n): the chance that n answers are neither all right nor all wrong, times p (1 - p)^2."""
    if p in (0, 1):
        return 0.0
    return (-math.expm1(n * math.log1p(-p)) - p**n) * p * (1 - p) ** 2


def step(p: float, n: int) -> float:
    """V(p, n + 1) - V(p, n). It falls with n >= 1."""
    return p * (1 - p) ** 2 * ((1 - p) * p**n + p * (1 - p) ** n)


def knapsack(rates: Sequence[float], budget: int, low: int, high: int) -> list[int]:
    """The counts in [low, high] that sum to `budget` and have the largest sum of V(rate, count).

    One rollout at a time goes where it adds most. For low >= 1 that is exact: V is concave in n from there.
    """
    if not all(0 <= p <= 1 for p in rates):
        raise ValueError(f"rates must be in [0, 1], got {list(rates)}")
    if low < 1:
        raise ValueError(f"low must be at least 1 rollout a prompt, got {low}: from 0 the value is not concave")
    if not low * len(rates) <= budget <= high * len(rates):
        raise ValueError(f"{len(rates)} prompts with {low} to {high} rollouts each take {low * len(rates)} to {high * len(rates)}, got {budget}")
    counts = [low] * len(rates)
    heap = [(-step(p, low), i) for i, p in enumerate(rates)]
    heapq.heapify(heap)
    for _ in range(budget - low * len(rates)):
        while counts[heap[0][1]] == high:
            heapq.heappop(heap)
        i = heap[0][1]
        counts[i] += 1
        heapq.heapreplace(heap, (-step(rates[i], counts[i]), i))
    return counts


def _in_turns(counts: list[int], rows: list[int], amount: int, high: int) -> int:
    """Adds `amount` to counts of `rows`, one each in turns, up to `high`. Returns what nobody could take."""
    while amount and (free := [i for i in rows if counts[i] < high]):
        for i in free[:amount]:
            counts[i] += 1
        amount -= len(free[:amount])
    return amount


def allocate(rates: Sequence[float], budget: int, group: int, low: int = 2, high: int = 32) -> list[int]:
    """Rollouts of each prompt from its success rate, NaN where that is not known. They sum to `budget`.

    1. Unknown prompts get `group`, the others at least `low`.
    2. An undecided prompt, 0 < p < 1, wants so many that it shows both outcomes with 90 %. What the budget
       has beyond all that goes in turns to prompts with p = 0.
    3. The rest goes to the undecided by `knapsack`. What they cannot take goes to p = 0, unknown, p = 1.

    The released program gives undecided prompts no value for their `low` rollouts, which can cost 8 % of the
    objective, and divides by zero where all prompts are undecided and the budget has something to spare.
    """
    if not low <= group <= high:
        raise ValueError(f"low <= group <= high is expected, got {low}, {group}, {high}")
    if not all(math.isnan(p) or 0 <= p <= 1 for p in rates):
        raise ValueError(f"rates must be in [0, 1], or NaN if not known, got {list(rates)}")
    rows = {kind: [] for kind in ("unknown", "never", "always", "undecided")}
    for i, p in enumerate(rates):
        rows["unknown" if math.isnan(p) else "never" if p == 0 else "always" if p == 1 else "undecided"].append(i)
    counts = [group if math.isnan(p) else low for p in rates]
    if not sum(counts) <= budget <= high * len(rates):
        raise ValueError(f"these {len(rates)} prompts take {sum(counts)} to {high * len(rates)} rollouts, got a budget of {budget}")
    undecided = [rates[i] for i in rows["undecided"]]
    both = (math.log(0.1) / max(math.log(p), math.log1p(-p)) for p in undecided)
    wanted = sum(max(low, math.ceil(min(high, n))) - low for n in both)
    left = budget - sum(counts)
    spare = max(0, left - wanted)
    left -= spare - _in_turns(counts, rows["never"], spare, high)
    taken = min(low * len(undecided) + left, high * len(undecided))
    for i, n in zip(rows["undecided"], knapsack(undecided, taken, low, high), strict=True):
        counts[i] = n
    left = budget - sum(counts)
    for kind in ("never", "unknown", "always"):
        left = _in_turns(counts, rows[kind], left, high)
    return counts


class Knapsack(Uniform):
    """Prompts drawn as by `Uniform`; `allocate` says how many rollouts each gets.

    The success rate of a prompt is the mean of its last `window` rewards, known from `known_from` on.
    """

    def __init__(self, pool: Pool, group: int, generator: torch.Generator, *, low=2, high=32, window=16, known_from=8):
        super().__init__(pool, group, generator)
        if not 1 <= low <= group <= high:
            raise ValueError(f"1 <= low <= group <= high is expected, got {low}, {group}, {high}")
        if not 1 <= known_from <= window:
            raise ValueError(f"1 <= known_from <= window is expected, got {known_from}, {window}")
        self.low, self.high, self.known_from = low, high, known_from
        self.rewards = defaultdict(lambda: deque(maxlen=window))

    def rate(self, prompt: int) -> float:
        seen = self.rewards.get(prompt, ())
        return sum(seen) / len(seen) if len(seen) >= self.known_from else math.nan

    def propose(self, budget: int) -> Plan:
        prompts = self.draw(len(self.even_counts(budget)))
        rates = [self.rate(i) for i in prompts.tolist()]
        return Plan(prompts, torch.tensor(allocate(rates, budget, self.group, self.low, self.high)))

    def update(self, signals: Signals) -> None:
        for prompt, reward in zip(checked(self.pool, signals, rates=True).prompt.tolist(), signals.reward.tolist(), strict=True):
            self.rewards[prompt].append(reward)
