"""The loop of the entropy lab: sample groups of answers, score them, update, watch the entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlkern

from .arithmetic import Divisors, rewards
from .processes import advance
from .rollout import accuracy, answer_stats, descend, evenly, sample


class Batch(NamedTuple):
    """Sampled answers and what the losses need to know of them; N answers of K tokens."""

    ids: Tensor  # [N, T] prompt and answer
    old_logp: Tensor  # [N, K]
    proxy_logp: Tensor  # [N, K], of the old policy without its least likely tokens (Lp-Reg)
    advantages: Tensor  # [N]
    correct: Tensor  # [N]
    mask: Tensor  # [N, K]

    def take(self, index: Tensor) -> Batch:
        return Batch(*(x[index] for x in self))


class Settings(NamedTuple):
    steps: int
    prompts: int  # a step
    group: int  # answers a prompt
    minibatches: int  # updates a step
    lr: float
    min_p: float  # of Lp-Reg's proxy


Loss = Callable[[rlkern.TokenStats, Batch], rlkern.LossOutput]


@torch.no_grad()
def success(model: nn.Module, task: Divisors, numbers: Tensor) -> Tensor:
    """The probability that a sampled answer is right, summed over all that are. [N] -> [N]"""
    prompts, right = task.encode(numbers)
    listed = right[..., 0] >= 0
    row = listed.nonzero()[:, 0]
    logp = answer_stats(model, torch.cat([prompts[row], right[listed]], -1), task.answer_length).logp.sum(-1)
    return torch.zeros(len(numbers)).index_add(0, row, logp.exp())


class Scores(NamedTuple):
    """How often a sampled answer is right, or one of 8, or the greedy, over training or held-out numbers."""

    trained: float
    trained_of_8: float
    held_out: float
    held_out_of_8: float
    held_out_greedy: float


def evaluate(model: nn.Module, task: Divisors) -> Scores:
    shares = []
    for numbers in (task.numbers, task.held_out):
        p = success(model, task, numbers)
        shares += [p.mean().item(), (1 - (1 - p) ** 8).mean().item()]
    return Scores(*shares, accuracy(model, task, greedy=True))


def predicted_change(before: Tensor, after: Tensor) -> Tensor:
    """First-order change of the entropy from logits to logits: [..., V] -> [...]. arXiv 2505.22617, Lemma 1.

    -Cov of log pi(a) and after_a - before_a, exactly, over a ~ pi = softmax(before).
    """
    logp = before.log_softmax(-1)
    centred = logp - (logp.exp() * logp).sum(-1, keepdim=True)
    return -(logp.exp() * centred * (after - before)).sum(-1)


class Changes(NamedTuple):
    """What an update did to the entropy of the first digit, a value a prompt, and what foretells it."""

    measured: list[float]
    predicted: list[float]  # from the change of the logits
    moved: list[float]  # the largest change of a logit, their mean aside
    covariance: list[float]  # of log-probability and advantage, from the sampled answers


@dataclass
class Run:
    """What one training left behind, a value a step."""

    reward: list[float] = field(default_factory=list)  # of the answers sampled for training
    entropy: list[float] = field(default_factory=list)  # of the policy that sampled them, nats a token
    selected: list[float] = field(default_factory=list)  # share of the tokens that the loss treated otherwise
    scores: list[tuple[int, Scores]] = field(default_factory=list)  # (step, scores)
    changes: list[Changes] = field(default_factory=list)  # of a step's first update, which is on-policy


@torch.no_grad()
def roll_out(model: nn.Module, task: Divisors, prompts: int, group: int, min_p: float) -> tuple[Batch, Tensor]:
    """A batch of prompts * group answers, and the policy's entropy at every token of them."""
    ids, right = (x.repeat_interleave(group, 0) for x in task.draw(prompts))
    ids = sample(model, ids, task.answer_length)
    stats = answer_stats(model, ids, task.answer_length, min_p=min_p)
    correct = rewards(ids[:, task.prompt_length :], right)
    advantages = rlkern.advantages.grpo(correct, group)
    return Batch(ids, stats.logp, stats.proxy_logp, advantages, correct, torch.ones_like(stats.logp)), stats.entropy


def compare(batch: Batch, group: int, before: Tensor, after: Tensor) -> Changes:
    """before, after: logits of the first digit, [prompts, V]."""
    measured = rlkern.entropy_from_logits(after) - rlkern.entropy_from_logits(before)
    # A group's advantages have mean 0, so the mean of its tokens' covariances is that of the group alone.
    covariance = rlkern.token_covariance(batch.old_logp, batch.advantages, batch.mask)[:, 0].view(-1, group).mean(-1)
    moved = after - before
    moved = (moved - moved.mean(-1, keepdim=True)).abs().amax(-1)
    return Changes(*(x.tolist() for x in (measured, predicted_change(before, after), moved, covariance)))


def train(model: nn.Module, task: Divisors, loss: Loss, settings: Settings) -> Run:
    """`steps` times: sample, then one pass over the answers in `minibatches`, all but the first off-policy.

    The learning rate rises for twenty steps. Scores are taken at the start and ten times, evenly spread.
    """
    run, measured = Run(), evenly(settings.steps, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    run.scores.append((0, evaluate(model, task)))
    for step in range(1, settings.steps + 1):
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, step / 20)
        batch, entropy = roll_out(model, task, settings.prompts, settings.group, settings.min_p)
        states = batch.ids[:: settings.group, : task.prompt_length]
        with torch.no_grad():
            before = model(states)[:, -1]
        selected = []
        for i, index in enumerate(torch.randperm(len(batch.ids)).chunk(settings.minibatches)):
            part = batch.take(index)
            out = loss(answer_stats(model, part.ids, task.answer_length), part)
            descend(model, optimizer, out.loss)
            if i == 0:
                with torch.no_grad():
                    run.changes.append(compare(batch, settings.group, before, model(states)[:, -1]))
            selected.append(float(out.metrics.get("selected_fraction", 0.0)))
        run.reward.append(batch.correct.mean().item())
        run.entropy.append(entropy.mean().item())
        run.selected.append(mean(selected))
        if step in measured:
            run.scores.append((step, evaluate(model, task)))
        advance(1)
    return run
