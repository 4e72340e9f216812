"""The two phases of the quickstart: a short language-model warm-up, and DPO with a loss that it is handed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .measure import Meter
from .pairs import Pairs, random_windows
from .progress import Progress

LogpsFunction = Callable[[Tensor, Tensor], Tensor]  # logits [2B, T, V], labels [2B, T] -> [2B]
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [2B, T, V], labels [2B, T], reference logps [2B] -> scalar


def run_model(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of `dtype`: matrix products in bfloat16 under autocast, as in trainers, or all in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(ids)


def _optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, lr: float) -> None:
    """Ten steps up, then straight down to a tenth."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / max(1, steps))


def _update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def pretrain(
    model: nn.Module, files: list[list[int]], logps: LogpsFunction, *, steps: int, batch: int, length: int, lr: float, seed: int, dtype: torch.dtype
) -> list[float]:
    """Next-token prediction on windows of `files`; `logps` sums over a row. Returns each step's loss."""
    rng, optimizer = random.Random(seed), _optimizer(model, lr)
    progress, losses = Progress("language model warm-up", steps), []
    for step in range(steps):
        _set_rate(optimizer, step, steps, lr)
        ids = random_windows(files, batch, length, rng)
        loss = -logps(run_model(model, ids, dtype), ids).mean() / (length - 1)
        loss.backward()
        _update(model, optimizer)
        losses.append(loss.item())
        progress.update(step + 1, f"loss {losses[-1]:.2f}")
    return losses


@torch.no_grad()
def pair_logps(model: nn.Module, pairs: Pairs, logps: LogpsFunction, *, batch: int, dtype: torch.dtype, title: str | None = None) -> Tensor:
    """Log-probability of every completion, [P, 2] (chosen, rejected). A `title` asks for a progress line."""
    progress = Progress(title, len(pairs)) if title else None
    out = []
    for start in range(0, len(pairs), batch):
        ids, labels = pairs.batch(slice(start, start + batch))
        out.append(logps(run_model(model, ids, dtype), labels).view(2, -1).T)
        if progress:
            progress.update(min(start + batch, len(pairs)))
    return torch.cat(out)


class Evaluation(NamedTuple):
    step: int
    accuracy: float  # share of held-out pairs whose chosen reward is the higher one
    margin: float  # chosen less rejected log-ratio to the reference, mean over the pairs, in nats; the rewards are beta times that


@dataclass
class Run:
    """What one DPO training left behind."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)


def _evaluate(step: int, policy_logps: Tensor, reference_logps: Tensor) -> Evaluation:
    """Of [P, 2] log-probabilities. A tie counts half: before the first step every pair is one."""
    chosen, rejected = (policy_logps - reference_logps).double().unbind(1)
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    return Evaluation(step, wins.mean().item(), (chosen - rejected).mean().item())


def _loss_and_gradient(loss: LossFunction, logits: Tensor, labels: Tensor, reference: Tensor, meter: Meter) -> tuple[float, Tensor]:
    """The loss and its gradient by the logits. The graph is cut there, so the meter sees the loss alone."""
    leaf = logits.detach().requires_grad_()
    with meter.measured():
        value = loss(leaf, labels, reference)
        value.backward()
    return value.item(), leaf.grad


def train_dpo(
    title: str,
    model: nn.Module,
    train: tuple[Pairs, Tensor],
    held_out: tuple[Pairs, Tensor],
    *,
    loss: LossFunction,
    logps: LogpsFunction,
    batch: int,
    lr: float,
    dtype: torch.dtype,
    evaluations: int = 5,
) -> Run:
    """One pass of DPO over the pairs, `batch` a step. `train`, `held_out` come with reference logps [P, 2].

    Held-out pairs are looked at after the last step, half-way, at a quarter, ...: most is learned early.
    """
    pairs, reference = train
    steps = len(pairs) // batch
    run, optimizer, progress = Run(), _optimizer(model, lr), Progress(title, steps)
    run.evaluations.append(_evaluate(0, held_out[1], held_out[1]))
    evaluate_after = {max(1, steps >> i) for i in range(evaluations)}
    for step in range(steps):
        _set_rate(optimizer, step, steps, lr)
        index = slice(step * batch, (step + 1) * batch)
        ids, labels = pairs.batch(index)
        logits = run_model(model, ids, dtype)
        value, gradient = _loss_and_gradient(loss, logits, labels, reference[index].T.reshape(-1), run.meter)
        logits.backward(gradient)
        del logits, gradient  # before the next batch's logits exist
        _update(model, optimizer)
        run.losses.append(value)
        if step + 1 in evaluate_after:
            run.evaluations.append(_evaluate(step + 1, pair_logps(model, held_out[0], logps, batch=batch, dtype=dtype), held_out[1]))
        progress.update(step + 1, f"loss {value:.4f}, held-out accuracy {run.evaluations[-1].accuracy:.0%}")
    return run
