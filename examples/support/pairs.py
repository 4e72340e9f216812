"""Preference pairs from real text: the true continuation of a prompt against a corrupted one.

A batch is [2B, T] as in preference trainers: chosen rows first; labels are ids, -100 over the prompt.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Pairs(NamedTuple):
    chosen: Tensor  # [P, T] ids
    rejected: Tensor  # [P, T] ids, the same prompt
    prompt_lengths: Tensor  # [P]

    def batch(self, index: slice) -> tuple[Tensor, Tensor]:
        """ids and labels, both [2B, T], of the pairs in `index`."""
        ids = torch.cat([self.chosen[index], self.rejected[index]])
        prompt = self.prompt_lengths[index].repeat(2).unsqueeze(1)
        return ids, ids.masked_fill(torch.arange(ids.shape[1]) < prompt, IGNORE)

    def __len__(self) -> int:
        return len(self.chosen)


def _swap_neighbours(ids: list[int], rng: random.Random) -> list[int]:
    """About a third of the tokens change places with the next one."""
    ids, i = list(ids), 0
    while i + 1 < len(ids):
        if rng.random() < 0.2:
            ids[i], ids[i + 1] = ids[i + 1], ids[i]
            i += 1
        i += 1
    return ids


def _shuffle_pieces(ids: list[int], rng: random.Random, size: int = 3) -> list[int]:
    """Pieces of three tokens in a random order."""
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    rng.shuffle(pieces)
    return [token for piece in pieces for token in piece]


def _replace(ids: list[int], rng: random.Random, source: list[int]) -> list[int]:
    """A quarter of the tokens replaced by tokens drawn from another file."""
    return [rng.choice(source) if rng.random() < 0.25 else token for token in ids]


def make_pairs(files: list[list[int]], count: int, length: int, seed: int) -> Pairs:
    """`count` pairs of `length` tokens from tokenized files; the three corruptions take turns.

    Prompts are a quarter to a half of the row, so completions differ in length.
    """
    rng = random.Random(seed)
    long_enough = [ids for ids in files if len(ids) > length]
    if not long_enough:
        raise ValueError(f"expected files of more than {length} tokens, the longest of {len(files)} has {max(map(len, files), default=0)}")
    chosen, rejected, prompts = [], [], []
    while len(chosen) < count:
        ids, other = rng.choice(long_enough), rng.choice(long_enough)
        start, prompt = rng.randrange(len(ids) - length), rng.randint(length // 4, length // 2)
        row = ids[start : start + length]
        corrupt = (_swap_neighbours, _shuffle_pieces, lambda tail, rng, other=other: _replace(tail, rng, other))[len(chosen) % 3]
        bad = row[:prompt] + corrupt(row[prompt:], rng)
        if bad != row:
            chosen.append(row)
            rejected.append(bad)
            prompts.append(prompt)
    return Pairs(torch.tensor(chosen), torch.tensor(rejected), torch.tensor(prompts))


def random_windows(files: list[list[int]], batch: int, length: int, rng: random.Random) -> Tensor:
    """[batch, length] ids for language-model training, windows weighted by file length."""
    weights = [len(ids) - length for ids in files]
    rows = []
    for ids in rng.choices(files, weights=[max(0, w) for w in weights], k=batch):
        start = rng.randrange(len(ids) - length)
        rows.append(ids[start : start + length])
    return torch.tensor(rows)
