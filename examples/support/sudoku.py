"""A task with a verifiable answer: 4x4 sudoku. Of several solutions of a puzzle each is right."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

MASK = 0  # an empty cell: what a masked-diffusion model fills in. The digits are 1 to 4
VOCAB = 5
CELLS = 16
_ROWS = torch.arange(16).view(4, 4)
_BOXES = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
UNITS = torch.cat([_ROWS, _ROWS.T, _BOXES])  # [12, 4], the cells of every row, column and box


def _complete(cells: Tensor, units: Tensor) -> Tensor:
    """Whether each unit holds the digits 1 to 4: [N, C] -> [N, U]."""
    return (cells[:, units].sort(-1).values == torch.arange(1, 5)).all(-1)


def all_grids() -> Tensor:
    """The 288 filled grids: [288, 16]."""
    rows = torch.tensor(list(permutations((1, 2, 3, 4))))
    halves = torch.cat([rows.repeat_interleave(24, 0), rows.repeat(24, 1)], -1)
    halves = halves[_complete(halves, _BOXES[:2]).all(-1)]  # two rows that fill two boxes
    grids = torch.cat([halves.repeat_interleave(len(halves), 0), halves.repeat(len(halves), 1)], -1)
    return grids[_complete(grids, UNITS).all(-1)]


class Sudoku:
    """Puzzles of 16 cells, clues or MASK. A sixth of the grids is held out and never trained on."""

    def __init__(self, clues: tuple[int, int], held_out: int, seed: int):
        self.clues = clues  # the fewest and the most of a puzzle
        self.generator = torch.Generator().manual_seed(seed)
        grids = all_grids()
        grids = grids[torch.randperm(len(grids), generator=self.generator)]
        kept = len(grids) // 6
        self.grids = grids[kept:]
        self.held_out = self._puzzles(grids[:kept], held_out)[0]

    def _puzzles(self, grids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        grids = grids[torch.randint(len(grids), (count,), generator=self.generator)]
        clues = torch.randint(self.clues[0], self.clues[1] + 1, (count, 1), generator=self.generator)
        rank = torch.rand(count, CELLS, generator=self.generator).argsort(-1).argsort(-1)
        return torch.where(rank < clues, grids, MASK), grids

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Training puzzles and the grids they were made from, [count, 16] each."""
        return self._puzzles(self.grids, count)


def rewards(puzzles: Tensor, answers: Tensor) -> Tensor:
    """1 for a filled grid that keeps the rules and every clue, else 0. [N, 16] and [N, 16] -> [N] float"""
    keeps_clues = ((puzzles == MASK) | (puzzles == answers)).all(-1)
    return (keeps_clues & _complete(answers, UNITS).all(-1)).float()
