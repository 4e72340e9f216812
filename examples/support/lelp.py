"""LELP: a teacher's classes split into pseudo-classes, by where its features lie (arXiv 2409.20449)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _unread(features: Tensor, weight: Tensor) -> Tensor:
    """[N, d] without the directions that a softmax over weight [C, d] sees: differences of rows."""
    _, sizes, directions = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    read = directions[sizes > sizes[0] * max(weight.shape) * torch.finfo(weight.dtype).eps]
    return features - features @ read.T @ read


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], every one as likely as every other."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def pseudo_classes(
    features: Tensor, probabilities: Tensor, count: int, *, weight: Tensor | None, beta: float = 0.3, generator: torch.Generator | None
) -> Tensor:
    """The probability of every class, shared out among `count` = S pseudo-classes of it:

        q[n, c, s] = p[n, c] softmax_s((z[n] - m_c) D_c / (s_c beta))

    z are the features without the directions that the teacher's output layer reads: those are in p already.
    Of the rows that the teacher counts to class c, m_c is the mean of z, D_c [d, S] are the first S principal
    directions, rotated at random so that each has a share of the variance, and s_c is the root mean square of
    all their projections. Null space, directions and rotation are the paper's; the scale s_c beta is not.

    Args:
        features: [N, d], the inputs of the teacher's output layer.
        probabilities: [N, C], the teacher's p; a row counts to its likeliest class.
        count: S >= 1.
        weight: [C, d], the teacher's output layer; None leaves the features as they are.
        beta: > 0; the smaller, the nearer is a share to 0 or 1.
        generator: of the rotations, on the CPU; None leaves the principal directions as they are.

    Returns:
        [N, C, S] float64; sums over S are p, and with S = 1 it is p.

    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, rows of p that are no
            distribution, a class without a row, and S above the rank of a class's z - m_c.
    """
    shapes = [list(x.shape) for x in (features, probabilities)] + ([] if weight is None else [list(weight.shape)])
    n, d = features.shape if features.dim() == 2 else (-1, -1)
    classes = probabilities.shape[-1] if probabilities.dim() == 2 else -1
    if shapes[:2] != [[n, d], [n, classes]] or shapes[2:] not in ([], [[classes, d]]):
        raise ValueError(f"features [N, d], probabilities [N, C] and weight [C, d] are expected, got {', '.join(map(str, shapes))}")
    if count < 1 or not 0 < beta < math.inf:
        raise ValueError(f"count >= 1 and a positive finite beta are expected, got {count} and {beta}")
    for name, x in (("features", features), ("probabilities", probabilities), ("weight", weight)):
        if x is not None and not x.isfinite().all():
            raise ValueError(f"{name} must be finite, got {(~x.isfinite()).sum()} of {x.numel()} numbers that are not")
    sums = probabilities.double().sum(-1)
    if (probabilities < 0).any() or ((sums - 1).abs() > 1e-3).any():
        raise ValueError(f"probabilities must be distributions, got sums from {sums.min().item():.4g} to {sums.max().item():.4g}")
    z, p = features.double(), probabilities.double()
    if weight is not None:
        z = _unread(z, weight.double())
    members = p.argmax(-1)
    shares = []
    for c in range(p.shape[1]):
        own = z[members == c]
        if not len(own):
            raise ValueError(f"every class needs examples, got none of {len(z)} that the teacher counts to class {c}")
        centre = own.mean(0)
        _, sizes, directions = torch.linalg.svd(own - centre, full_matrices=False)
        rank = int((sizes > max(own.shape) * torch.finfo(own.dtype).eps * own.norm()).sum())
        if count > rank:
            raise ValueError(f"count must be at most {rank}, the rank of the {len(own)} examples of class {c}, got {count}")
        directions = directions[:count].T
        if generator is not None:
            directions = directions @ _rotation(count, generator)
        scale = ((own - centre) @ directions).square().mean().sqrt()
        shares.append(((z - centre) @ directions / (scale * beta)).softmax(-1))
    return p.unsqueeze(-1) * torch.stack(shares, 1)
