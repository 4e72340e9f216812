"""What the labs of reinforcement learning share: sampling, statistics of answers, warming up, one update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import rlkern

from .arithmetic import Divisors, Sums, rewards
from .model import Transformer


@torch.no_grad()
def sample(model: Transformer, prompts: Tensor, count: int, greedy: bool = False) -> Tensor:
    """Continues every prompt by `count` tokens: [N, P] -> [N, P + count]."""
    ids, cache = [prompts], model.empty_cache()
    for _ in range(count):
        logits = model(ids[-1], cache)[:, -1]
        ids.append(logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1))
    return torch.cat(ids, -1)


def answer_stats(model: nn.Module, ids: Tensor, answer_length: int, **options) -> rlkern.TokenStats:
    """Log-probability and entropy of every answer token from the logits. Fields are [N, answer_length]."""
    logits = model(ids[:, :-1])[:, -answer_length:]
    return rlkern.token_stats(logits, ids[:, -answer_length:], **options)


def accuracy(model: Transformer, task: Sums | Divisors, greedy: bool) -> float:
    prompts, right = task.encode(task.held_out)
    answers = sample(model, prompts, task.answer_length, greedy)[:, task.prompt_length :]
    return rewards(answers, right).mean().item()


def warm_up(
    model: Transformer, task: Sums | Divisors, *, until: float, batch: int, lr: float, max_steps: int, measure: Callable[[], float] | None = None
) -> tuple[int, float]:
    """Supervised until `measure`, by default sampled held-out accuracy, is `until`. -> steps, accuracy

    Where several answers are right, one of them is drawn each time.
    """
    measure = measure or partial(accuracy, model, task, greedy=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    reached = 0.0
    for step in range(1, max_steps + 1):
        prompts, right = task.draw(batch)
        if right.dim() == 3:
            right = right[torch.arange(batch), torch.multinomial((right[..., 0] >= 0).float(), 1)[:, 0]]
        loss = -answer_stats(model, torch.cat([prompts, right], -1), task.answer_length).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            reached = measure()
            if reached >= until:
                return step, reached
    return max_steps, reached


def evenly(steps: int, times: int) -> set[int]:
    """The steps, of 1 to `steps`, after which to measure: so many, the last among them."""
    return {max(1, steps * (i + 1) // times) for i in range(times)}


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer, with the gradient's norm clipped at 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
