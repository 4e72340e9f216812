"""A small transformer: pre-norm blocks, causal or bidirectional attention, tied embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = list[Tensor]  # keys and values [B, heads, T, width / heads] of the tokens before; empty at first


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if past is not None:
            past[:] = k, v
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and t == k.shape[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, vocab: int, length: int, width: int = 128, depth: int = 3, heads: int = 4, causal: bool = True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def hidden(self, ids: Tensor, cache: list[Past] | None = None) -> Tensor:
        """ids [B, T] -> what the output matrix is multiplied with [B, T, width]

        With a cache, a list a block and empty at first, ids are those that follow what it holds: a prompt at
        first, then one token at a time.
        """
        seen = cache[0][0].shape[2] if cache and cache[0] else 0
        x = self.tokens(ids) + self.positions(torch.arange(seen, seen + ids.shape[1], device=ids.device))
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, past)
        return self.norm(x)

    def forward(self, ids: Tensor, cache: list[Past] | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V]"""
        return F.linear(self.hidden(ids, cache), self.tokens.weight)

    def empty_cache(self) -> list[Past]:
        return [[] for _ in self.blocks]
