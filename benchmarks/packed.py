"""`make bench-packed`: losses of packed tokens against the padded form of the same ones, and eager PyTorch.

    python benchmarks/packed.py                                         16,384 and 131,072 tokens
    python benchmarks/packed.py --sizes 65536x128 --device cuda --json out.json

From log-probabilities to their gradient: GSPO, Clip-Cov, and DPO of neighbouring pairs. Lengths differ by up
to a factor of 3. The padded form stands in [S, longest], so it computes on more elements. The eager side is
packed and adds up with index_add. Building the pack is timed apart. Rounds are interleaved. Memory is beside
the inputs.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import argument_parser, arguments, interleaved, machine, median, spread
from table import columns, megabytes
from torch import Tensor

import rlkern
from rlkern.primitives.packing import sequences_of

SIZES = [(16_384, 64), (16_384, 512), (131_072, 64), (131_072, 512), (131_072, 2_000)]
PACKED, PADDED, EAGER, BUILD = "packed", "padded", "eager, packed", "rlkern.packed"


def draw(tokens: int, sequences: int, device: str) -> dict[str, Tensor]:
    """logp, old, mask [N], one advantage a sequence, cu_seqlens; a tenth of the tokens does not count."""
    g = torch.Generator(device).manual_seed(0)
    shares = (0.5 + torch.rand(sequences, generator=g, device=device)).cumsum(0)
    cu_seqlens = F.pad((shares * (tokens / shares[-1])).round().long(), (1, 0))
    cu_seqlens[-1] = tokens
    logp = -torch.rand(tokens, generator=g, device=device)
    old = logp + 0.1 * torch.randn(tokens, generator=g, device=device)
    mask = torch.rand(tokens, generator=g, device=device) < 0.9
    return {"logp": logp, "old": old, "mask": mask, "advantages": torch.randn(sequences, generator=g, device=device), "cu_seqlens": cu_seqlens}


def padded(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [S, longest], 0 in the padding."""
    lengths = cu_seqlens.diff()
    out = x.new_zeros(len(lengths), int(lengths.max()))
    out[torch.arange(out.shape[1], device=x.device) < lengths.unsqueeze(1)] = x
    return out


# --- the losses: (logp, old, mask or pack, advantages) -> loss --------------------------------------------


def gspo(logp, old, mask, advantages):
    return rlkern.gspo_loss(logp, old, advantages, mask).loss


def clip_cov(logp, old, mask, advantages):
    return rlkern.clip_cov_loss(logp, old, advantages, mask, generator=torch.Generator(logp.device).manual_seed(0)).loss


def dpo(logp, old, mask, advantages):
    sequences = sequences_of(mask, logp)
    policy, reference = sequences.sum(logp), sequences.sum(old)
    return rlkern.dpo_loss(policy[::2], policy[1::2], reference[::2], reference[1::2]).losses.mean()


class EagerPack:
    """As trainers write it: sums of float32 by index_add."""

    def __init__(self, mask: Tensor, cu_seqlens: Tensor):
        self.mask, self.sequences = mask, len(cu_seqlens) - 1
        self.index = torch.repeat_interleave(torch.arange(self.sequences, device=mask.device), cu_seqlens.diff(), output_size=len(mask))
        self.lengths = self.sum(mask.float()).clamp(min=1)

    def sum(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.sequences).index_add(0, self.index, x * self.mask)


def eager_gspo(logp, old, pack, advantages):
    mean = pack.sum((logp - old).detach()) / pack.lengths
    ratio = (mean[pack.index] + logp - logp.detach()).clamp(max=10).exp()
    a = advantages[pack.index]
    values = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 3e-4, 1 + 4e-4))
    return (pack.sum(values) / pack.lengths).mean()


def eager_clip_cov(logp, old, pack, advantages):
    def mean(x):
        return (x * pack.mask).sum() / pack.mask.sum()

    a = advantages[pack.index]
    ratio = (logp - old).exp()
    values = torch.maximum(-a * ratio, -a * ratio.clamp(0, 2))
    covariance = (a - mean(a)) * (logp - mean(logp)).detach()
    candidates = ((covariance > 1) & (covariance < 5) & (values == -a * ratio) & pack.mask).nonzero().squeeze(-1)
    keep = torch.ones_like(logp)
    if len(candidates) > 0:
        keep[candidates[torch.randperm(len(candidates), device=logp.device)[: max(int(2e-4 * pack.mask.sum().item()), 1)]]] = 0
    return mean(values * keep)


def eager_dpo(logp, old, pack, advantages):
    margins = pack.sum(logp) - pack.sum(old)
    return -F.logsigmoid(0.1 * (margins[::2] - margins[1::2])).mean()


LOSSES: dict[str, tuple[Callable, Callable]] = {"GSPO": (gspo, eager_gspo), "Clip-Cov": (clip_cov, eager_clip_cov), "DPO": (dpo, eager_dpo)}


def forms(x: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Any]]:
    """(logp, old, mask) of each contender."""
    cu_seqlens = x["cu_seqlens"]
    rows = [padded(x[name], cu_seqlens) for name in ("logp", "old", "mask")]
    return {
        PADDED: (rows[0], rows[1], rows[2]),
        PACKED: (x["logp"], x["old"], rlkern.packed(cu_seqlens, x["mask"])),
        EAGER: (x["logp"], x["old"], EagerPack(x["mask"], cu_seqlens)),
    }


def _phases(loss: Callable, logp: Tensor, *rest: Any):
    """forward, backward"""
    x = logp.detach().requires_grad_()
    return (lambda _: loss(x, *rest)), (lambda value: torch.autograd.grad(value, x)[0])


def run(tokens: int, sequences: int, device: str, rounds: int) -> list[dict]:
    x = draw(tokens, sequences, device)
    entries, contenders = [], {BUILD: lambda: (lambda _: rlkern.packed(x["cu_seqlens"], x["mask"]),)}
    of = forms(x)
    for name, (ours, eager) in LOSSES.items():
        for form, arguments_of in of.items():
            loss = eager if form == EAGER else ours
            contenders[f"{name}: {form}"] = lambda loss=loss, args=arguments_of: _phases(loss, *args, x["advantages"])
    times, peaks = interleaved(contenders, x["logp"], rounds)
    for contender, phases in times.items():
        totals, name = [sum(t) for t in phases], contender.partition(":")[0]
        base = None if contender == BUILD else [sum(t) for t in times[f"{name}: {PADDED}"]]
        entry = {"contender": contender, "ms": median(totals), "min_ms": min(totals), "spread": spread(totals), "peak_bytes": peaks[contender]}
        entry |= {"of_padded": base and median(totals) / median(base), "min_of_padded": base and min(totals) / min(base)}
        entries.append({"tokens": tokens, "sequences": sequences, "elements": of[PADDED][0].numel(), **entry})
    return entries


def render(entries: list[dict]) -> str:
    rows = [["", "ms", "least", "spread", "/ padded", "least", "extra MB"]]
    for e in entries:
        shares = ["-" if e[key] is None else f"{e[key]:.2f}" for key in ("of_padded", "min_of_padded")]
        rows.append([e["contender"], f"{e['ms']:.3f}", f"{e['min_ms']:.3f}", f"{100 * e['spread']:.0f}%", *shares, megabytes(e)])
    return columns(rows)


def _sizes(text: str) -> tuple[int, int]:
    tokens, sequences = (int(number) for number in text.split("x"))
    if sequences < 2 or sequences % 2 or tokens < sequences:
        raise ValueError(f"tokens x sequences, these even and at most as many, got {text}")
    return tokens, sequences


def main() -> int:
    parser = argument_parser(__doc__, "device", "rounds", "threads", rounds=31)
    parser.add_argument("--sizes", type=_sizes, nargs="+", default=SIZES, metavar="TOKENSxSEQUENCES")
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    args = arguments(parser)
    info = machine()
    print("\n".join(f"{key}: {value}" for key, value in info.items()))
    results = []
    for tokens, sequences in args.sizes:
        entries = run(tokens, sequences, args.device, args.rounds)
        print(f"\n{tokens:,} tokens in {sequences:,} sequences, {entries[0]['elements']:,} elements padded, {args.device}\n{render(entries)}")
        results += entries
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": info, "results": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
