"""Reinforcement learning with two rewards, right answers and short ones, weighed by a rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlkern

from .arithmetic import END, EndedAddition
from .grpo_step import Answers, loss, update
from .model import Transformer
from .processes import advance, load, parameters
from .reward_weights import FixedWeights, GradientWeights, HypervolumeScale, advantages
from .rollout import answer_stats, sample, warm_up
from .schedules import rex

METHODS = {  # the first weight is that of right answers
    "fixed .25": partial(FixedWeights, (0.25, 0.75)),
    "fixed .5": partial(FixedWeights, (0.5, 0.5)),
    "fixed .75": partial(FixedWeights, (0.75, 0.25)),
    "gradient .5, c .01": partial(GradientWeights, (0.5, 0.5), c=0.01),
    "gradient .25, c .1": partial(GradientWeights, (0.25, 0.75), c=0.1),
    "gradient .25, c .01": partial(GradientWeights, (0.25, 0.75), c=0.01),
    "hypervolume .5, rewards": partial(HypervolumeScale, (0.5, 0.5), on="rewards"),
    "hypervolume .5, advantages": partial(HypervolumeScale, (0.5, 0.5), on="advantages"),
}
DEFAULT = tuple(METHODS)


class Settings(NamedTuple):
    steps: int = 90
    rollouts: int = 384
    group: int = 8
    minibatches: int = 4
    lr: float = 4e-4
    warm_up_to: float = 0.4  # sampled accuracy
    warm_up_steps: int = 4000  # at most
    held_out: int = 256

    def task(self, seed: int) -> EndedAddition:
        return EndedAddition(2, self.held_out, seed)


class Point(NamedTuple):
    """Of sampled answers to held-out prompts."""

    accuracy: float
    length: float  # tokens, END included


@dataclass
class Run:
    """What one training left behind: a value before training and one after every step."""

    points: list[Point] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)  # of right answers
    scale: list[float] = field(default_factory=list)


def new_model(task: EndedAddition) -> Transformer:
    return Transformer(END + 1, task.prompt_length + task.answer_length, width=64, depth=2)


@torch.no_grad()
def measure(model: Transformer, task: EndedAddition) -> Point:
    prompts, right = task.encode(task.held_out)
    answers = sample(model, prompts, task.answer_length)[:, task.prompt_length :]
    return Point(task.correct(answers, right).mean().item(), task.response(answers).sum(-1).float().mean().item())


def supervised(seed: int, settings: Settings) -> tuple[dict, str]:
    """What all runs of a seed begin with: the parameters, and how good they are."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = settings.task(seed)
    model = new_model(task)
    until = {"until": settings.warm_up_to, "measure": lambda: measure(model, task).accuracy}
    steps, _ = warm_up(model, task, batch=256, lr=2e-3, max_steps=settings.warm_up_steps, **until)
    advance(1)
    point = measure(model, task)
    return parameters(model), f"{steps} supervised steps: accuracy {point.accuracy:.2f}, length {point.length:.1f}"


def objective_gradients(model: nn.Module, answers: Answers, rewards: Tensor, groups: Tensor) -> Tensor:
    """[K, D]: the gradient of the loss with the advantages of each column of rewards [N, K] alone."""
    rows = []
    for alone in rewards.unbind(-1):
        value = loss(model, answers._replace(advantages=rlkern.advantages.grpo(alone, groups)))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    return torch.stack(rows)


def train(name: str, seed: int, starts: dict[int, dict], settings: Settings) -> Run:
    """One run with a rule, on one thread, from the parameters of its seed."""
    torch.set_num_threads(1)
    task, run, rule = settings.task(seed), Run(), METHODS[name]()
    model = new_model(task)
    load(model, starts[seed])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rex, steps=settings.steps))
    torch.manual_seed(seed + 1)
    task.generator.manual_seed(seed + 1)
    tokens = answered = 0

    def validate() -> None:
        point = measure(model, task)
        rule.validated(torch.tensor([point.accuracy, 1 - point.length / task.answer_length], dtype=torch.float64))
        run.points.append(point)
        run.weight.append(rule.weights[0].item())
        run.scale.append(rule.scale)

    validate()
    for _ in range(settings.steps):
        prompts, right = (x.repeat_interleave(settings.group, 0) for x in task.draw(settings.rollouts // settings.group))
        groups = torch.arange(len(prompts)) // settings.group
        ids = sample(model, prompts, task.answer_length)
        response = task.response(ids[:, task.prompt_length :])
        length = response.sum(-1)
        tokens, answered = tokens + length.sum(), answered + len(length)
        brief = length < tokens / answered  # than the mean of all responses so far
        rewards = torch.stack([task.correct(ids[:, task.prompt_length :], right), brief.float()], -1)
        with torch.no_grad():
            old_logp = answer_stats(model, ids, task.answer_length).logp
        answers = Answers(ids, old_logp, response.float(), torch.zeros(len(ids)))
        rule.before_update(partial(objective_gradients, model, answers, rewards, groups))
        answers = answers._replace(advantages=advantages(rewards, groups, rule))
        for index in torch.randperm(len(ids)).chunk(settings.minibatches):
            update(model, optimizer, answers.take(index))
        schedule.step()
        validate()
        advance(1)
    return run
