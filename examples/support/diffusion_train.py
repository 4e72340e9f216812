"""Reinforcement learning of the diffusion example: sample groups of answers, score them, update in parts."""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlkern

from .diffusion_objectives import OBJECTIVES, Answers, elbos, gradient
from .masked_diffusion import new_model, solved, unmask
from .processes import advance, load
from .sudoku import MASK, Sudoku, rewards


class Settings(NamedTuple):
    steps: int
    prompts: int  # a step
    group: int  # answers a prompt
    minibatches: int  # updates a step
    lr: float
    held_out: int  # puzzles
    seed: int
    clues: tuple[int, int] = (4, 6)  # of a puzzle
    cells: int = 1  # written a pass when sampling

    def task(self) -> Sudoku:
        return Sudoku(self.clues, self.held_out, self.seed)


class Run(NamedTuple):
    """What one training left behind."""

    reward: list[float]  # of the answers sampled for training, a value a step
    solved: float  # share of held-out puzzles at the end
    seconds: float  # of the one thread's time, whatever else ran


def roll_out(model: nn.Module, task: Sudoku, settings: Settings, seed: int) -> tuple[Answers, Tensor]:
    """prompts * group answers, and their rewards."""
    puzzles = task.draw(settings.prompts)[0].repeat_interleave(settings.group, 0)
    ids = unmask(model, puzzles, settings.cells)
    reward = rewards(puzzles, ids)
    return Answers(ids, puzzles == MASK, rlkern.advantages.grpo(reward, settings.group), torch.arange(len(ids)), seed), reward


def update(model: nn.Module, optimizer: torch.optim.Optimizer, objective: str, answers: Answers, n: int, old_elbo: Tensor | None) -> None:
    optimizer.zero_grad(set_to_none=False)  # gradients stay where they are: what an update takes of memory is then due to the draws
    OBJECTIVES[objective](model, answers, n, old_elbo)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(objective: str, n: int, start: dict, settings: Settings) -> Run:
    """One run from the parameters `start`, on one thread. Runs of one seed begin with equal random numbers.

    The learning rate rises for five steps, then falls to zero. A step's first minibatch is on-policy.
    """
    began = time.process_time()
    torch.set_num_threads(1)
    task, model = settings.task(), new_model()
    load(model, start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    torch.manual_seed(settings.seed + 1)
    task.generator.manual_seed(settings.seed + 1)
    history = []
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / 5) * (1 - step / settings.steps)
        answers, reward = roll_out(model, task, settings, seed=1_000_000 * settings.seed + step)
        history.append(reward.mean().item())
        parts = [answers.take(index) for index in torch.randperm(len(reward)).chunk(settings.minibatches)]
        old = [None, *(elbos(model, part, n) for part in parts[1:])]
        for part, old_elbo in zip(parts, old, strict=True):
            update(model, optimizer, objective, part, n, old_elbo)
        advance(n)
    return Run(history, solved(model, task.held_out, settings.cells), time.process_time() - began)


class Differences(NamedTuple):
    """Of an objective's gradient from the naive one, the largest entry relative to the largest there."""

    on_policy: float
    off_policy: float


def gradient_differences(model: nn.Module, task: Sudoku, settings: Settings, n: int) -> dict[str, Differences]:
    """In float64, with random advantages. Off-policy is one update later, all at the same parameters."""
    model = copy.deepcopy(model).double()
    answers, reward = roll_out(model, task, settings, seed=0)
    answers = answers._replace(advantages=torch.randn(len(reward), dtype=torch.float64))
    old_elbo = elbos(model, answers, n)
    found = {name: [] for name in OBJECTIVES if name != "naive"}
    for _ in range(2):
        naive = gradient("naive", model, answers, n, old_elbo)
        for name, values in found.items():
            values.append(((gradient(name, model, answers, n, old_elbo) - naive).abs().max() / naive.abs().max()).item())
        update(model, torch.optim.AdamW(model.parameters(), lr=settings.lr), "naive", answers, n, old_elbo)
    return {name: Differences(*values) for name, values in found.items()}
