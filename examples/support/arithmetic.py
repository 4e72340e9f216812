"""A task with a verifiable answer: sums of two numbers with carries, written digit by digit."""

from __future__ import annotations

import torch
from torch import Tensor

PLUS, EQUALS = 10, 11
VOCAB = 12  # the digits, + and =


class Addition:
    """Prompts "123+456=", answers with the lowest digit first, "9750": a carry depends on digits before.

    Prompts and answers have one length each: no padding. Held-out pairs of numbers never occur in training.
    """

    def __init__(self, digits: int, held_out: int, seed: int):
        self.digits, self.prompt_length, self.answer_length = digits, 2 * digits + 2, digits + 1
        self.generator = torch.Generator().manual_seed(seed)
        pairs = torch.randperm(10 ** (2 * digits), generator=self.generator)
        self.held_out, self.pairs = pairs[:held_out], pairs[held_out:]

    def _digits(self, x: Tensor, count: int) -> Tensor:
        """[N] -> [N, count], lowest first"""
        return x.unsqueeze(-1) // 10 ** torch.arange(count) % 10

    def encode(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of pairs [N] -> prompts [N, 2 digits + 2] and right answers [N, digits + 1]."""
        a, b = pairs // 10**self.digits, pairs % 10**self.digits
        signs = [torch.full((len(pairs), 1), sign) for sign in (PLUS, EQUALS)]
        prompts = torch.cat([self._digits(a, self.digits).flip(-1), signs[0], self._digits(b, self.digits).flip(-1), signs[1]], -1)
        return prompts, self._digits(a + b, self.answer_length)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`encode` of training pairs, with replacement."""
        return self.encode(self.pairs[torch.randint(len(self.pairs), (count,), generator=self.generator)])


def rewards(answers: Tensor, right: Tensor) -> Tensor:
    """1 for an answer whose every digit is right, else 0. [N, K] -> [N] float"""
    return (answers == right).all(-1).float()
