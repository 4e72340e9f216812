"""Tasks with verifiable answers: sums, where one answer is right, and divisors, where several are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLUS, EQUALS = 10, 11
VOCAB = 12  # the digits, + and =
END = 12  # one more token, of answers that say where they end


class Sums:
    """Prompts "123+456=", answers with the lowest digit first, "9750": a carry depends on digits before.

    Prompts and answers have one length each: no padding. Numbers a, b are one number, a 10^digits + b.
    """

    def __init__(self, digits: int, seed: int):
        self.digits, self.prompt_length, self.answer_length = digits, 2 * digits + 2, digits + 1
        self.generator = torch.Generator().manual_seed(seed)

    def _digits(self, x: Tensor, count: int) -> Tensor:
        """[N] -> [N, count], lowest first"""
        return x.unsqueeze(-1) // 10 ** torch.arange(count) % 10

    def encode(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of pairs [N] -> prompts [N, 2 digits + 2] and right answers [N, digits + 1]."""
        a, b = pairs // 10**self.digits, pairs % 10**self.digits
        signs = [torch.full((len(pairs), 1), sign) for sign in (PLUS, EQUALS)]
        prompts = torch.cat([self._digits(a, self.digits).flip(-1), signs[0], self._digits(b, self.digits).flip(-1), signs[1]], -1)
        return prompts, self._digits(a + b, self.answer_length)


class Addition(Sums):
    """Sums of all pairs of numbers below 10^digits. Held-out pairs never occur in training."""

    def __init__(self, digits: int, held_out: int, seed: int):
        super().__init__(digits, seed)
        pairs = torch.randperm(10 ** (2 * digits), generator=self.generator)
        self.held_out, self.pairs = pairs[:held_out], pairs[held_out:]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`encode` of training pairs, with replacement."""
        return self.encode(self.pairs[torch.randint(len(self.pairs), (count,), generator=self.generator)])


class EndedAddition(Addition):
    """Answers of any length: the sum without leading zeros, up to 3 idle zeros that change nothing, END."""

    def __init__(self, digits: int, held_out: int, seed: int, idle: int = 3):
        super().__init__(digits, held_out, seed)
        self.idle, self.answer_length = idle, digits + 1 + idle + 1

    def encode(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [N, P], right answers [N, K] with a random number of idle zeros; behind END more of it."""
        prompts, right = super().encode(pairs)
        length = self.written(right).clamp(min=1) + torch.randint(self.idle + 1, (len(pairs),), generator=self.generator)
        return prompts, right.where(torch.arange(self.answer_length) < length.unsqueeze(-1), END)

    @staticmethod
    def written(answers: Tensor) -> Tensor:
        """[N]: places up to the highest digit that is not 0."""
        return (torch.arange(1, answers.shape[1] + 1) * (answers > 0)).amax(-1)

    @staticmethod
    def response(answers: Tensor) -> Tensor:
        """[N, K] bool: the tokens up to the first END, and this."""
        ended = (answers == END).long().cumsum(-1)
        return (ended == 0) | ((ended == 1) & (answers == END))

    def correct(self, answers: Tensor, right: Tensor) -> Tensor:
        """[N] float: 1 for the digits of the sum, any number of idle zeros, END; else 0."""
        before = [self.response(x) & (x != END) for x in (answers, right)]
        digits, expected = (x.where(b, 0) for x, b in zip((answers, right), before, strict=True))
        return ((answers == END).any(-1) & before[0].any(-1) & (digits == expected).all(-1)).float()


class Families(Sums):
    """Sums in families, one to `digits` digits of the larger number, all zero-padded to one length.

    Args:
        pool: prompts of a family that reinforcement learning chooses from, at most.
        held_out: pairs of a family that are never trained on, at most; of one-digit sums a third.
        shares: of the families in what `draw` returns.
        watched: the family whose held-out pairs are `held_out`, which say when a warm-up ends.
    """

    def __init__(self, digits: int, pool: int, held_out: int, seed: int, *, shares: Sequence[float], watched: int):
        super().__init__(digits, seed)
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.test, self.train = [], []  # a tensor of pairs for each family
        for d in range(1, digits + 1):
            a, b = torch.randint(10**d, (2, 40_000), generator=self.generator)
            largest = torch.maximum(a, b)
            of_family = largest >= (10 ** (d - 1) if d > 1 else 0)
            pairs = (a * 10**digits + b)[of_family].unique()
            pairs = pairs[torch.randperm(len(pairs), generator=self.generator)]
            apart = min(held_out, len(pairs) // 3)
            self.test.append(pairs[:apart])
            self.train.append(pairs[apart:])
        self.held_out = self.test[watched]
        pools = [pairs[:pool] for pairs in self.train]
        self.pool, self.pool_family = torch.cat(pools), torch.arange(digits).repeat_interleave(torch.tensor([len(p) for p in pools]))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`encode` of training pairs of families in the given shares, with replacement."""
        numbers = torch.multinomial(self.shares, count, replacement=True, generator=self.generator).bincount(minlength=len(self.train))
        drawn = [pairs[torch.randint(len(pairs), (int(n),), generator=self.generator)] for pairs, n in zip(self.train, numbers, strict=True)]
        return self.encode(torch.cat(drawn))


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
