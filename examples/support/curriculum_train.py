"""Reinforcement learning in which a sampler chooses the prompts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlkern

from .arithmetic import VOCAB, Families, rewards
from .grpo_step import Answers, update
from .knapsack import Knapsack
from .model import Transformer
from .processes import advance, load, parameters
from .rollout import answer_stats, evenly, sample, warm_up
from .samplers import CLPO, DUMP, SEC, Pool, Uniform, collect, family_means
from .schedules import rex
from .value_sampler import PCL

METHODS = {"uniform": Uniform, "SEC": SEC, "DUMP": DUMP, "PCL": PCL, "Knapsack": Knapsack, "CLPO": CLPO}
DEFAULT = tuple(METHODS)[:-1]  # CLPO without a model that rewrites prompts is uniform sampling with a small KL penalty
FAMILIES = ("1 digit", "2 digits", "3 digits", "4 digits")


class Settings(NamedTuple):
    steps: int = 120
    rollouts: int = 384  # a step
    group: int = 8  # rollouts of an ordinary prompt
    minibatches: int = 4  # updates a step
    lr: float = 4e-4
    evaluations: int = 10
    warm_up_to: float = 0.5  # sampled accuracy on sums of three digits
    warm_up_steps: int = 4000  # at most
    pool: int = 512  # prompts a family
    held_out: int = 256  # a family
    rare: float = 0.01  # share of four-digit sums in the warm-up

    def task(self, seed: int) -> Families:
        return Families(len(FAMILIES), self.pool, self.held_out, seed, shares=(0.5, 0.3, 0.2 - self.rare, self.rare), watched=2)


@dataclass
class Run:
    """What one training left behind. Lists have a value, or one a family, for every step."""

    shares: list[list[float]] = field(default_factory=list)  # of the families in the rollouts
    useful: list[float] = field(default_factory=list)  # share of rollouts whose advantage is not 0
    useful_groups: list[float] = field(default_factory=list)  # share of groups with such a rollout
    reward: list[list[float]] = field(default_factory=list)  # mean by family, NaN without a rollout
    held_out: list[tuple[int, list[float]]] = field(default_factory=list)  # (step, sampled accuracy by family)
    sampler_seconds: float = 0.0  # of choosing and taking in


def new_model(task: Families) -> Transformer:
    return Transformer(VOCAB, task.prompt_length + task.answer_length, width=64, depth=2)


def supervised(seed: int, settings: Settings) -> tuple[dict, str]:
    """What all runs of a seed begin with: the parameters, and how good they are."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = settings.task(seed)
    model = new_model(task)
    steps, _ = warm_up(model, task, until=settings.warm_up_to, batch=256, lr=2e-3, max_steps=settings.warm_up_steps)
    advance(1)
    reached = ", ".join(f"{a:.2f}" for a in accuracies(model, task))
    return parameters(model), f"{steps} supervised steps: accuracy {reached} on {', '.join(FAMILIES)}"


def accuracies(model: nn.Module, task: Families) -> list[float]:
    """Of sampled answers to the held-out prompts, by family."""
    sizes = [len(pairs) for pairs in task.test]
    prompts, right = task.encode(torch.cat(task.test))
    correct = rewards(sample(model, prompts, task.answer_length)[:, task.prompt_length :], right)
    return [part.mean().item() for part in correct.split(sizes)]


def new_sampler(name: str, task: Families, settings: Settings, seed: int) -> Uniform:
    """Over the task's pool of prompts. Features, for PCL's value model, are a prompt's tokens, one-hot."""
    prompts, _ = task.encode(task.pool)
    pool = Pool(task.pool_family, F.one_hot(prompts, VOCAB).flatten(1).double())
    return METHODS[name](pool, settings.group, torch.Generator().manual_seed(seed))


def train(name: str, seed: int, starts: dict[int, dict], settings: Settings) -> Run:
    """One run with a sampler, on one thread, from the parameters of its seed. All spend equal rollouts."""
    torch.set_num_threads(1)
    task, run = settings.task(seed), Run()
    model, start = new_model(task), new_model(task)
    for net in (model, start):
        load(net, starts[seed])
    prompts, right = task.encode(task.pool)
    sampler = new_sampler(name, task, settings, seed)
    pool = sampler.pool
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rex, steps=settings.steps))
    kl_coef = sampler.kl_coef if isinstance(sampler, CLPO) else 0.0
    torch.manual_seed(seed + 1)
    run.held_out.append((0, accuracies(model, task)))
    measured = evenly(settings.steps, settings.evaluations)
    for step in range(1, settings.steps + 1):
        began = time.perf_counter()
        plan = sampler.propose(settings.rollouts)
        run.sampler_seconds += time.perf_counter() - began

        rows, groups = plan.prompts.repeat_interleave(plan.counts), plan.groups()
        ids = sample(model, prompts[rows], task.answer_length)
        reward = rewards(ids[:, task.prompt_length :], right[rows])
        advantages = rlkern.advantages.grpo(reward, groups, singletons="zero").clamp(-5, 5)  # Knapsack's program clips; groups of 8 never get there
        with torch.no_grad():
            logp = answer_stats(model, ids, task.answer_length).logp
            answers = Answers(ids, logp, torch.ones_like(logp), advantages)
            if kl_coef:
                rate = (groups.bincount(reward) / plan.counts)[groups]
                reference_logp = answer_stats(start, ids, task.answer_length).logp
                answers = answers._replace(reference_logp=reference_logp, kl_scale=sampler.kl_scale(rate).float())

        began = time.perf_counter()
        signals = collect(pool, plan, reward, advantages)
        sampler.update(signals)
        run.sampler_seconds += time.perf_counter() - began
        record(run, pool.family[rows], groups, reward, advantages)

        for index in torch.randperm(len(ids)).chunk(settings.minibatches):
            update(model, optimizer, answers.take(index), kl_coef)
        schedule.step()
        if step in measured:
            run.held_out.append((step, accuracies(model, task)))
        advance(1)
    return run


def record(run: Run, family: Tensor, groups: Tensor, reward: Tensor, advantages: Tensor) -> None:
    """All [N], of the rollouts of a step."""
    means, count = family_means(reward.double(), family, len(FAMILIES))
    useful = (advantages != 0).double()
    run.shares.append((count / len(family)).tolist())
    run.reward.append(means.where(count > 0, math.nan).tolist())
    run.useful.append(useful.mean().item())
    run.useful_groups.append((groups.bincount(useful) > 0).double().mean().item())
