"""Tasks with verifiable answers: sums, where one answer is right, and divisors, where several are."""

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


class Divisors:
    """Prompts "136=", answers a divisor of two digits: "17", "34" and "68" are right.

    The numbers are those from 100 to 999 that have one. Held-out numbers never occur in training.
    """

    prompt_length, answer_length = 4, 2

    def __init__(self, held_out: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        numbers, self.divisors = torch.arange(100, 1000), torch.arange(10, 100)
        numbers = numbers[(numbers.unsqueeze(-1) % self.divisors == 0).any(-1)]
        shuffled = numbers[torch.randperm(len(numbers), generator=self.generator)]
        self.held_out, self.numbers = shuffled[:held_out], shuffled[held_out:]

    def encode(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> prompts [N, 4] and all right answers [N, R, 2], the largest first, filled up with -1."""
        prompts = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10, torch.full_like(numbers, EQUALS)], -1)
        divides = numbers.unsqueeze(-1) % self.divisors == 0
        found = torch.where(divides, self.divisors, -1).sort(-1, descending=True).values[:, : divides.sum(-1).max()]
        return prompts, torch.where(found.unsqueeze(-1) < 0, -1, torch.stack([found // 10, found % 10], -1))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`encode` of training numbers, with replacement."""
        return self.encode(self.numbers[torch.randint(len(self.numbers), (count,), generator=self.generator)])


def rewards(answers: Tensor, right: Tensor) -> Tensor:
    """1 for an answer that is right, else 0. [N, K] and the right ones, [N, K] or [N, R, K] -> [N] float"""
    return (answers.unsqueeze(1) == right.view(len(answers), -1, answers.shape[-1])).all(-1).any(-1).float()
