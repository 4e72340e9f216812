"""Time and memory of one Monte-Carlo draw of diffusion BGPO, logits to gradient, against eager PyTorch.

    python benchmarks/bgpo.py                    bfloat16 logits [4, 256, 32768], half of the positions masked
    python benchmarks/bgpo.py --shape 1x512x126464 --masked 0.3 --dtype fp32 --rounds 21 --out results.json

Rounds are interleaved. "eager" is what training codes write: float32 log_softmax of all positions, gather,
mask. "eager, masked rows" takes the masked rows out first. "packed" starts from the logits of the masked rows
alone: a model that gathers its hidden states before the head computes no others.
"""

import functools
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import DTYPES, argument_parser, arguments, interleaved, machine, median, spread
from table import megabytes
from torch import Tensor

import rlkern

EAGER = "eager"


class Draw(NamedTuple):
    logits: Tensor  # [B, S, V]
    targets: Tensor
    mask: Tensor
    weight: Tensor  # [B]
    advantages: Tensor
    old_elbo: Tensor
    scale: float


def make_draw(shape: tuple[int, int, int], masked: float, dtype: torch.dtype, device: str) -> Draw:
    """Off-policy by a few percent, advantages of both signs."""
    batch, length, vocab = shape
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape, dtype=dtype, device=device)
    for rows in logits:
        rows.copy_(torch.randn(rows.shape, generator=g, device=device).mul_(2))
    targets = torch.randint(vocab, (batch, length), generator=g, device=device)
    mask = torch.rand(batch, length, generator=g, device=device).argsort(-1) < round(masked * length)
    weight = torch.full((batch,), length / max(1, round(masked * length)), device=device)
    advantages = torch.where(torch.arange(batch, device=device) % 2 == 0, 1.0, -1.0)
    elbo = rlkern.masked_elbo(logits, targets, weight, mask=mask)
    return Draw(logits, targets, mask, weight, advantages, elbo + 0.03 * length * torch.randn(batch, generator=g, device=device), 1 / length)


def _loss(draw: Draw, *rows: Tensor, **options) -> Tensor:
    options |= {"mc_weight": 1.0, "seq_weight": 1 / len(draw.weight), "ratio_scale": draw.scale}
    return rlkern.bgpo_loss(*rows, draw.advantages, draw.old_elbo, **options).loss


def bgpo(draw: Draw, logits: Tensor, inplace: bool = False) -> Tensor:
    return _loss(draw, logits, draw.targets, draw.weight, mask=draw.mask, inplace_backward=inplace)


def packed(draw: Draw, rows: Tensor) -> Tensor:
    sequence = draw.mask.nonzero()[:, 0]
    return _loss(draw, rows, draw.targets[draw.mask], draw.weight[sequence], seq_idx=sequence, num_seqs=len(draw.weight))


def bound(draw: Draw, ell: Tensor) -> Tensor:
    d = draw.scale * (ell - draw.old_elbo)
    return -torch.where(draw.advantages >= 0, draw.advantages * (1 + d), draw.advantages * d.exp()).mean()


def eager(draw: Draw, logits: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1).gather(-1, draw.targets.unsqueeze(-1)).squeeze(-1)
    return bound(draw, (draw.weight[:, None] * logp * draw.mask).sum(-1))


def eager_masked_rows(draw: Draw, logits: Tensor) -> Tensor:
    logp = logits[draw.mask].float().log_softmax(-1).gather(-1, draw.targets[draw.mask].unsqueeze(-1)).squeeze(-1)
    sequence = draw.mask.nonzero()[:, 0]
    return bound(draw, draw.weight * torch.zeros_like(draw.weight).index_add(0, sequence, logp))


class Contender(NamedTuple):
    name: str
    loss: Callable[[Draw, Tensor], Tensor]
    packed: bool = False

    def logits(self, draw: Draw) -> Tensor:
        """What it starts from, as a leaf."""
        return (draw.logits[draw.mask] if self.packed else draw.logits).detach().requires_grad_()


CONTENDERS = (
    Contender("rlkern", bgpo),
    Contender("rlkern, in place", lambda draw, logits: bgpo(draw, logits, inplace=True)),
    Contender("rlkern, packed", packed, packed=True),
    Contender(EAGER, eager),
    Contender("eager, masked rows", eager_masked_rows),
)


def gradient(contender: Contender, draw: Draw) -> tuple[Tensor, Tensor]:
    """(loss, gradient by the contender's logits). The in-place one overwrites `draw.logits`."""
    leaf = contender.logits(draw)
    loss = contender.loss(draw, leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def measure(draw: Draw, rounds: int) -> dict[str, dict]:
    """Milliseconds of forward plus backward and peak bytes beyond the logits, by contender."""

    def phases(contender):
        leaf = contender.logits(draw)
        return lambda _: contender.loss(draw, leaf), lambda loss: torch.autograd.grad(loss, leaf)[0]

    times, peaks = interleaved({c.name: functools.partial(phases, c) for c in CONTENDERS}, draw.logits, rounds)
    totals = {name: [sum(t) for t in found] for name, found in times.items()}
    return {name: {"ms": median(t), "spread": spread(t), "peak_bytes": peaks[name]} for name, t in totals.items()}


def main() -> None:
    parser = argument_parser(__doc__, "device", "dtype", "rounds", "threads")
    parser.add_argument("--shape", default="4x256x32768", metavar="BxSxV")
    parser.add_argument("--masked", type=float, default=0.5, help="fraction of the positions that the draw masked")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = arguments(parser)
    shape = tuple(int(n) for n in args.shape.split("x"))
    results = measure(make_draw(shape, args.masked, DTYPES[args.dtype], args.device), args.rounds)

    info = machine() | {"load": os.getloadavg()[0]}
    where = info["gpu"] if args.device == "cuda" else f"{info['cpu']}, {info['threads']} threads, load {info['load']:.1f}"
    print(f"{args.dtype} logits {list(shape)}, {args.masked:.0%} masked; {where}")
    print(f"{'':20} {'ms':>9} {'spread':>7} {'peak MB':>8} {'speed':>7}")
    for name, entry in results.items():
        print(f"{name:20} {entry['ms']:9.2f} {entry['spread']:7.0%} {megabytes(entry):>8} {results[EAGER]['ms'] / entry['ms']:6.1f}x")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"machine": info, "shape": shape, "dtype": args.dtype, "masked": args.masked, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
