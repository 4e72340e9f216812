"""`make bench-losses`: Clip-Cov, KL-Cov and Lp-Reg, bf16 logits to their gradient, against eager PyTorch.

    python benchmarks/losses.py                                  2048 tokens, a vocabulary of 32,768
    python benchmarks/losses.py --rows 4096 --vocab 151936 --device cuda --json out.json

The eager side restates the methods' published code: float32 log_softmax and gather, a selection through
nonzero, randperm and topk on the host, numbers for the log read with item(). Its Lp-Reg gets the proxy from a
second softmax: probabilities below min_p times the largest are filled up with -1e4 and the rest is
renormalised. All contenders run once a round, in turn; medians over the rounds.
"""

import json
import sys

import torch
from measure import DTYPES, argument_parser, arguments, interleaved, machine, median, spread
from table import columns, megabytes
from torch import Tensor

import rlkern

SEQUENCES, MIN_P = 8, 0.02


def _gather_logp(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / (mask.sum() + 1e-8)


def _surrogate(ratio, advantages, low, high):
    return torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - low, 1 + high))


def eager_clip_cov(logits, ids, old_logp, advantages, mask, *, select_ratio=2e-4):
    logp = _gather_logp(logits, ids)
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    values = _surrogate(ratio, advantages, 1.0, 1.0)
    covariance = (advantages - _mean(advantages, mask)) * (logp - _mean(logp, mask)).detach()
    outside = (values != -advantages * ratio) | (mask == 0)
    covariance = covariance.masked_fill(outside, -torch.inf)
    candidates = ((covariance > 1.0) & (covariance < 5.0)).nonzero()
    keep = torch.ones_like(logp)
    if len(candidates) > 0:
        quota = max(int(select_ratio * mask.sum().item()), 1)
        drawn = candidates[torch.randperm(len(candidates))[:quota].to(candidates.device)]
        keep[drawn[:, 0], drawn[:, 1]] = 0
    metrics = {"clipped": _mean((keep == 0).float(), mask).item(), "kl": _mean(-log_ratio, mask).item()}
    return _mean(values * keep, mask), metrics


def eager_kl_cov(logits, ids, old_logp, advantages, mask, *, select_ratio=2e-3, kl_coef=1.0):
    logp = _gather_logp(logits, ids)
    log_ratio = logp - old_logp
    plain = -advantages * log_ratio.exp()
    values = plain.clone()
    counted = (mask.flatten() > 0).nonzero().squeeze(-1)
    if len(counted) > 0:
        a, x = advantages.flatten()[counted].detach().cpu(), logp.flatten()[counted].detach().cpu()
        covariance = (a - a.mean()) * (x - x.mean())
        largest = torch.topk(covariance, max(1, int(len(counted) * select_ratio))).indices
        chosen = counted[largest.to(counted.device)]
        rows, cols = chosen // logp.shape[1], chosen % logp.shape[1]
        values[rows, cols] = (plain + kl_coef * log_ratio.abs())[rows, cols]
    return _mean(values, mask), {"kl": _mean(log_ratio.abs(), mask).item()}


def _eager_proxy(logits, ids):
    """log-probability of the token after min-p and renormalisation; about -1e4 for a token filtered out."""
    with torch.no_grad():
        p = torch.softmax(logits.float(), dim=-1)
        dropped = p < MIN_P * p.max(dim=-1, keepdim=True).values
        return _gather_logp(logits.masked_fill(dropped, -1e4), ids)


def eager_lp_reg(logits, ids, old_logp, advantages, mask, *, rho=0.01):
    proxy = _eager_proxy(logits, ids)
    logp = _gather_logp(logits, ids)
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    values = _surrogate(ratio, advantages, 1.0, 9.0)
    metrics = {"clipped": _mean((values != -advantages * ratio).float(), mask).item(), "kl": _mean(-log_ratio, mask).item()}
    group = ((mask > 0) & (advantages < 0)).flatten().nonzero().squeeze(-1)
    n = max(1, int(len(group) * rho))
    if n > 1:
        x, q = logp.flatten()[group], proxy.flatten()[group]
        rare = torch.topk(x.detach(), n, largest=False).indices
        rare = rare[x.detach()[rare] < q[rare]]
        chosen = group[rare]
        d = q[rare] - x[rare]
        k3 = torch.clamp(d.exp() - d - 1, -10, 10)
        values = values.flatten().index_put((chosen,), (-advantages * ratio).flatten()[chosen] + k3).view_as(values)
    return _mean(values, mask), metrics


LOSSES = {  # name: (eager loss of logits, rlkern's loss of the statistics, what these need)
    "Clip-Cov": (eager_clip_cov, lambda stats, *tokens, **options: rlkern.clip_cov_loss(stats.logp, *tokens, **options), {}),
    "KL-Cov": (eager_kl_cov, lambda stats, *tokens, **options: rlkern.kl_cov_loss(stats.logp, *tokens, **options), {}),
    "Lp-Reg": (
        eager_lp_reg,
        lambda stats, old, *tokens, **options: rlkern.lp_reg_loss(stats.logp, old, stats.proxy_logp, *tokens, **options),
        {"min_p": MIN_P},
    ),
}


def draw(rows: int, vocab: int, dtype: torch.dtype, device: str):
    """(logits [B, T, V], ids, old_logp, advantages, mask [B, T]): ratios around 1, a tenth masked."""
    g = torch.Generator(device).manual_seed(0)
    shape = (SEQUENCES, rows // SEQUENCES)
    logits = torch.empty(*shape, vocab, dtype=dtype, device=device)
    for part in logits:
        part.copy_(torch.randn(part.shape, generator=g, device=device).mul_(2))
    ids = torch.randint(vocab, shape, generator=g, device=device)
    taken = 4 + 6 * torch.rand(shape, generator=g, device=device) ** 0.3
    logits.scatter_(-1, ids.unsqueeze(-1), taken.unsqueeze(-1).to(dtype))
    old_logp = rlkern.token_logprobs(logits, ids) + 0.1 * torch.randn(shape, generator=g, device=device)
    advantages = torch.randn(shape, generator=g, device=device)
    return logits, ids, old_logp, advantages, (torch.rand(shape, generator=g, device=device) < 0.9).float()


def eager_phases(loss, logits, tokens):
    """forward, backward; each gets what the one before returned."""
    x = logits.detach().requires_grad_()
    return (lambda _: loss(x, *tokens)[0]), (lambda value: torch.autograd.grad(value, x)[0])


def rlkern_phases(loss, needs, logits, tokens, in_place: bool):
    """Statistics, loss, gradient of the statistics, gradient of the logits. The middle two are [B, T]."""
    x, (ids, *tokens) = logits.detach().requires_grad_(), tokens
    return (
        lambda _: rlkern.token_stats(x, ids, mask=tokens[-1], with_entropy=False, inplace_backward=in_place, **needs),
        lambda stats: (stats.logp, loss(stats, *tokens).loss),
        lambda pair: (pair[0], torch.autograd.grad(pair[1], pair[0])[0]),
        lambda pair: torch.autograd.grad(pair[0], x, pair[1])[0],
    )


def run(rows: int, vocab: int, dtype: str, device: str, rounds: int) -> list[dict]:
    logits, *tokens = draw(rows, vocab, DTYPES[dtype], device)
    entries = []
    for name, (eager, fused, needs) in LOSSES.items():
        contenders = {
            "eager": lambda eager=eager: eager_phases(eager, logits, tokens),
            "rlkern": lambda fused=fused, needs=needs: rlkern_phases(fused, needs, logits, tokens, False),
            "rlkern, in place": lambda fused=fused, needs=needs: rlkern_phases(fused, needs, logits, tokens, True),
        }
        times, peaks = interleaved(contenders, logits, rounds)
        base = median([sum(t) for t in times["eager"]])
        for contender, phases in times.items():
            totals = [sum(t) for t in phases]
            entry = {"loss": name, "contender": contender, "ms": median(totals), "spread": spread(totals), "ratio": base / median(totals)}
            entry |= {"peak_bytes": peaks[contender], "tokens_ms": None, "tokens_share": None}
            if len(phases[0]) == 4:
                parts = [sum(t[1:3]) for t in phases]
                shares = [part / total for part, total in zip(parts, totals, strict=True)]
                entry |= {"tokens_ms": median(parts), "tokens_share": median(shares)}
            entries.append(entry)
    return entries


def render(entries: list[dict]) -> str:
    rows = [["", "ms", "spread", "x eager", "extra MB", "[B, T] ms", "share"]]
    for e in entries:
        figures = [f"{e['ms']:.2f}", f"{100 * e['spread']:.0f}%", f"{e['ratio']:.1f}", megabytes(e)]
        tokens = ["-", "-"] if e["tokens_ms"] is None else [f"{e['tokens_ms']:.2f}", f"{100 * e['tokens_share']:.1f}%"]
        rows.append([f"{e['loss']}: {e['contender']}", *figures, *tokens])
    return columns(rows)


def main() -> int:
    parser = argument_parser(__doc__, "device", "dtype", "rounds", "threads", rounds=9)
    parser.add_argument("--rows", type=int, default=2048, help=f"tokens, a multiple of {SEQUENCES}")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    args = arguments(parser)
    if args.rows % SEQUENCES or args.rows <= 0:
        parser.error(f"--rows must be a positive multiple of {SEQUENCES}, got {args.rows}")
    info = machine()
    print("\n".join(f"{key}: {value}" for key, value in info.items()))
    entries = run(args.rows, args.vocab, args.dtype, args.device, args.rounds)
    gradient = args.rows * args.vocab * DTYPES[args.dtype].itemsize
    print(f"\n{args.rows:,} tokens, V = {args.vocab:,}, {args.dtype}, {args.device}; one gradient is {gradient / 1e6:,.0f} MB\n{render(entries)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": info, "rows": args.rows, "vocab": args.vocab, "dtype": args.dtype, "results": entries}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
