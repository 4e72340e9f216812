"""The loop of the entropy lab: sample groups of answers, score them, update in minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlkern

from .arithmetic import Addition, Sums, rewards
from .model import Transformer
from .progress import Progress


class Batch(NamedTuple):
    """Sampled answers and what the losses need to know of them; N answers of K tokens."""

    ids: Tensor  # [N, T] prompt and answer
    old_logp: Tensor  # [N, K]
    proxy_logp: Tensor  # [N, K], of the old policy without its least likely tokens (Lp-Reg)
    advantages: Tensor  # [N]
    correct: Tensor  # [N]
    success_rate: Tensor  # [N], of the prompt's group
    mask: Tensor  # [N, K]

    def take(self, index: Tensor) -> Batch:
        return Batch(*(x[index] for x in self))


Loss = Callable[[rlkern.TokenStats, Batch], rlkern.LossOutput]


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


def accuracy(model: nn.Module, task: Sums, greedy: bool) -> float:
    prompts, right = task.encode(task.held_out)
    answers = sample(model, prompts, task.answer_length, greedy)[:, task.prompt_length :]
    return rewards(answers, right).mean().item()


def warm_up(
    model: nn.Module, task: Sums, *, until: float, batch: int, lr: float, max_steps: int, measure: Callable[[], float] | None = None
) -> tuple[int, float]:
    """Supervised until `measure`, by default sampled held-out accuracy, is `until`. -> steps, accuracy"""
    measure = measure or partial(accuracy, model, task, greedy=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    reached = 0.0
    for step in range(1, max_steps + 1):
        prompts, right = task.draw(batch)
        loss = -answer_stats(model, torch.cat([prompts, right], -1), task.answer_length).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            reached = measure()
            if reached >= until:
                return step, reached
    return max_steps, reached


@torch.no_grad()
def roll_out(model: nn.Module, task: Addition, prompts: int, group: int, min_p: float) -> tuple[Batch, Tensor]:
    """A batch of prompts * group answers, and the policy's entropy at every token of them."""
    ids, right = (x.repeat_interleave(group, 0) for x in task.draw(prompts))
    ids = sample(model, ids, task.answer_length)
    stats = answer_stats(model, ids, task.answer_length, min_p=min_p)
    correct = rewards(ids[:, task.prompt_length :], right)
    success_rate = correct.view(-1, group).mean(-1).repeat_interleave(group)
    advantages = rlkern.advantages.grpo(correct, group)
    return Batch(ids, stats.logp, stats.proxy_logp, advantages, correct, success_rate, torch.ones_like(stats.logp)), stats.entropy


@dataclass
class Run:
    """What one training left behind, a value a step."""

    reward: list[float] = field(default_factory=list)  # of the answers sampled for training
    entropy: list[float] = field(default_factory=list)  # of the policy that sampled them, nats a token
    held_out: list[tuple[int, float, float]] = field(default_factory=list)  # (step, sampled accuracy, greedy accuracy)


def train(title: str, model: nn.Module, task: Addition, loss: Loss, *, steps, prompts, group, minibatches, lr, min_p, evaluate_every) -> Run:
    """`steps` times: sample, then one pass over them in `minibatches`, all but the first off-policy."""
    run, progress = Run(), Progress(title, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    run.held_out.append((0, accuracy(model, task, greedy=False), accuracy(model, task, greedy=True)))
    for step in range(1, steps + 1):
        batch, entropy = roll_out(model, task, prompts, group, min_p)
        for index in torch.randperm(len(batch.ids)).chunk(minibatches):
            part = batch.take(index)
            out = loss(answer_stats(model, part.ids, task.answer_length), part)
            optimizer.zero_grad()
            out.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        run.reward.append(batch.correct.mean().item())
        run.entropy.append(entropy.mean().item())
        if step % evaluate_every == 0 or step == steps:
            run.held_out.append((step, accuracy(model, task, greedy=False), accuracy(model, task, greedy=True)))
        progress.update(step, f"reward {run.reward[-1]:.2f}, entropy {run.entropy[-1]:.3f}")
    return run
