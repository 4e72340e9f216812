"""`make bench-keep`: token_stats over each row's kept ids, by format, against no set and eager masked_fill.

    python benchmarks/kept_sets.py                        [512, 32768] in bfloat16, 8 ids a row
    python benchmarks/kept_sets.py --shape 128x151936 --ids 82 --dtype fp32 --rounds 31 --out file
    python benchmarks/kept_sets.py --device cuda --shape 8192x151936

Log-probability and entropy, then their gradient. Rounds are interleaved. Memory is beside the inputs, the
gradient included. Below: sampler_threshold against sorting, as engines and trainers write it.
"""

import functools
import json
import math

import torch
import torch.nn.functional as F
from measure import DTYPES, argument_parser, arguments, interleaved, machine, median, spread
from table import columns, megabytes
from torch import Tensor

import rlkern
from rlkern import Kept

PLAIN, EAGER, SORT = "no set", "eager masked_fill", "eager sort + cumsum"


def packed(mask: Tensor) -> Tensor:
    """[N, V] as bits, uint8 [N, ceil(V / 8)]."""
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).view(len(mask), -1, 8)
    return (bits << torch.arange(8, device=mask.device)).sum(-1).to(torch.uint8)


def sets(logits: Tensor, ids: Tensor) -> dict[str, Kept | Tensor]:
    """Sets of as many ids a row, by format; a threshold keeps a row's largest."""
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids, True)
    counts = torch.full((len(ids),), ids.shape[-1], device=ids.device)
    lists = ids.int()
    return {
        "lists": Kept.counts(lists.flatten(), counts),
        "lists, padded": Kept.ids(F.pad(lists, (0, 8), value=-1)),
        "bits": Kept.bits(packed(mask)),
        "bool mask": Kept.mask(mask),
        "threshold": Kept.at_least(logits.float().topk(ids.shape[-1], -1).values[:, -1]),
    }


def _eager(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """With the entropy that does not become NaN."""
    log_p = F.log_softmax(x.float().masked_fill(~mask, -math.inf), -1)
    return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1), torch.special.entr(log_p.exp()).sum(-1)


def _stats(x: Tensor, y: Tensor, **options) -> tuple[Tensor, ...]:
    stats = rlkern.token_stats(x, y, **options)
    return tuple(value for value in (stats.logp, stats.entropy, stats.full_entropy) if value is not None)


def _sorted(x: Tensor, top_p: float) -> Tensor:
    """The threshold of top-p by sorting."""
    ordered = x.float().sort(-1, descending=True).values
    p = ordered.softmax(-1)
    kept = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, kept - 1).squeeze(-1)


def contenders(logits: Tensor, ids: Tensor) -> dict:
    """name -> (logits, targets) -> outputs"""
    formats = sets(logits, ids)
    mask = formats["bool mask"].entries
    found = {PLAIN: _stats, **{name: functools.partial(_stats, keep=keep) for name, keep in formats.items()}}
    found["lists, with_full"] = functools.partial(_stats, keep=formats["lists"], with_full=True)
    return found | {EAGER: functools.partial(_eager, mask=mask)}


def phases(forward, logits: Tensor, targets: Tensor):
    def backward(outputs):
        return torch.autograd.grad(outputs, logits, [torch.ones_like(x) for x in outputs])

    return (lambda _: forward(logits, targets)), backward


def summary(times: dict, peaks: dict) -> dict[str, dict]:
    """Medians in milliseconds, forward and in all."""
    found = {}
    for name, each in times.items():
        totals = [sum(t) for t in each]
        found[name] = {"forward_ms": median([t[0] for t in each]), "ms": median(totals), "spread": spread(totals), "peak_bytes": peaks[name]}
    return found


def table(results: dict[str, dict], base: str) -> str:
    rows = [["", "forward ms", "total ms", "spread", f"x {base}: forward", "total", "peak MB"]]
    for name, entry in results.items():
        by = [f"{results[base][key] / entry[key]:.2f}" for key in ("forward_ms", "ms")]
        rows.append([name, f"{entry['forward_ms']:.3f}", f"{entry['ms']:.3f}", f"{entry['spread']:.0%}", *by, megabytes(entry)])
    return columns(rows)


def main() -> None:
    parser = argument_parser(__doc__, "device", "dtype", "rounds", "threads", rounds=21)
    parser.add_argument("--shape", default="512x32768", metavar="NxV")
    parser.add_argument("--ids", type=int, default=8, help="a row keeps")
    parser.add_argument("--top-p", type=float, default=0.9, help="of sampler_threshold")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = arguments(parser)
    n, vocab = (int(size) for size in args.shape.split("x"))
    g = torch.Generator(args.device).manual_seed(0)
    logits = (2 * torch.randn(n, vocab, generator=g, device=args.device)).to(DTYPES[args.dtype]).requires_grad_()
    ids = torch.rand(n, vocab, generator=g, device=args.device).topk(args.ids, -1).indices
    info = machine()
    where = info["gpu"] if args.device == "cuda" else f"{info['cpu']}, {info['threads']} threads"
    print(f"{args.dtype}, N x V = {args.shape}, {args.ids} ids a row; {where}")
    found = {name: functools.partial(phases, forward, logits, ids[:, 0]) for name, forward in contenders(logits.detach(), ids).items()}
    results = summary(*interleaved(found, logits.detach(), args.rounds))
    print(table(results, PLAIN), flush=True)
    x = logits.detach()
    thresholds = {
        "sampler_threshold": functools.partial(rlkern.sampler_threshold, top_p=args.top_p),
        SORT: functools.partial(_sorted, top_p=args.top_p),
    }
    alone = {name: (lambda of=of: ((lambda _: of(x)), lambda _: None)) for name, of in thresholds.items()}
    sampler = summary(*interleaved(alone, x, max(3, args.rounds // 3)))
    print(f"top_p {args.top_p}\n{table(sampler, SORT)}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"machine": info, "shape": [n, vocab], "dtype": args.dtype, "ids": args.ids, "results": results, "sampler": sampler}, file, indent=1
            )


if __name__ == "__main__":
    main()
