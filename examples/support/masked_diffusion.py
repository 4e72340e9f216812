"""A small masked-diffusion model at work: writing answers by unmasking, and supervised learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rlkern

from .model import Transformer
from .sudoku import CELLS, MASK, VOCAB, Sudoku, rewards


def new_model(vocab: int = VOCAB, width: int = 48, depth: int = 2) -> Transformer:
    return Transformer(vocab, CELLS, width=width, depth=depth, causal=False)


@torch.no_grad()
def unmask(model: nn.Module, ids: Tensor, cells: int) -> Tensor:
    """Fills the masked places of ids [N, T], `cells` a pass: the likeliest of the samples stay."""
    while (ids == MASK).any():  # rows may differ in the number of masked places
        probabilities = model(ids).index_fill(-1, torch.tensor(MASK), -torch.inf).softmax(-1)
        tokens = torch.multinomial(probabilities.flatten(0, 1), 1).view_as(ids)
        confidence = probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).masked_fill(ids != MASK, -1)
        chosen = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, confidence.topk(cells).indices, True)
        ids = torch.where(chosen & (ids == MASK), tokens, ids)
    return ids


def solved(model: nn.Module, puzzles: Tensor, cells: int) -> float:
    """Share of the puzzles that one sampled answer each solves."""
    return rewards(puzzles, unmask(model, puzzles, cells)).mean().item()


def pretrain(model: nn.Module, task: Sudoku, *, until: float, cells: int, max_steps: int, seed: int, batch: int = 128, lr: float = 3e-3) -> int:
    """LLaDA's loss, one draw a grid, until that share of 200 held-out puzzles is right. Returns the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(1, max_steps + 1):
        puzzles, grids = task.draw(batch)
        response = puzzles == MASK
        mask, weight = rlkern.diffusion.count_masks(response, 1, seed=1_000_000 * seed + step, draw=0)
        elbo = rlkern.masked_elbo(model(torch.where(mask, MASK, grids)), grids, weight, mask=mask)
        optimizer.zero_grad()
        (-elbo / response.sum(-1)).mean().backward()
        optimizer.step()
        if step % 10 == 0 and solved(model, task.held_out[:200], cells) >= until:
            break
    return step
