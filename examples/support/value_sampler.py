"""PCL: prompts of which a value model expects that half of the answers are right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .samplers import Plan, Pool, Signals, Uniform, checked, family_means


class PCL(Uniform):
    """Prompt curriculum learning (arXiv 2510.01135).

    Draws `candidates` times as many prompts as it needs, and keeps those whose expected reward is nearest to
    0.5. The value model is then fitted to the prompts' mean rewards by squared error. No rollout is spent on
    it. The paper's is a language model of its own, this one a small network on `pool.features`.

    Args:
        candidates: 4 here; the paper's number is not known to us.
        hidden, lr, passes: of the value network, of its AdamW, over a step's prompts.
    """

    def __init__(self, pool: Pool, group: int, generator: torch.Generator, *, candidates=4, hidden=64, lr=3e-3, passes=4):
        super().__init__(pool, group, generator)
        for name, number in (("candidates", candidates), ("hidden", hidden), ("passes", passes)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.candidates, self.passes = candidates, passes
        width = pool.features.shape[1]
        layers = [nn.utils.skip_init(nn.Linear, a, b, dtype=torch.float64) for a, b in ((width, hidden), (hidden, 1))]
        for layer in layers:  # from the sampler's own generator: nobody else's random numbers move
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        self.network = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=lr)

    def value(self, prompts: Tensor) -> Tensor:
        """Expected reward of rows [P] of the pool."""
        return self.network(self.pool.features[prompts].double()).squeeze(-1).sigmoid()

    @torch.no_grad()
    def propose(self, budget: int) -> Plan:
        counts = self.even_counts(budget)
        drawn = self.draw(self.candidates * len(counts))
        return Plan(drawn[nearest_to_half(self.value(drawn), len(counts))], counts)

    def update(self, signals: Signals) -> None:
        prompts, index = checked(self.pool, signals, rates=True).prompt.unique(return_inverse=True)
        means, _ = family_means(signals.reward, index, len(prompts))
        for _ in range(self.passes):
            self.optimizer.zero_grad()
            (self.value(prompts) - means).square().mean().backward()
            self.optimizer.step()


def nearest_to_half(value: Tensor, count: int) -> Tensor:
    """Places of the `count` values nearest to 0.5. Of equally near ones the first come first."""
    return (value - 0.5).abs().argsort(stable=True)[:count]
