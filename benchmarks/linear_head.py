"""Time and memory from hidden states to a loss's gradients: the plans of rlkern's linear head, and others'.

    python benchmarks/linear_head.py                    [1024, 1024] x [32768, 1024] in bfloat16
    python benchmarks/linear_head.py --shape 256x1024x151936 --computes ce --frozen --rounds 21 --out file
    python benchmarks/linear_head.py --device cuda --shape 8192x4096x151936 --computes ce --no-compile

Rounds are interleaved. "products alone" are the three matrix products (of a frozen head two) without anything
between them. Others' functions are executed where they are installed: PyTorch's linear_cross_entropy, TRL's
chunked log-probabilities, on a GPU Liger's fused linear cross entropy. Memory is beside the inputs, the
gradients included.
"""

import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from contenders import load_file
from measure import DTYPES, argument_parser, arguments, interleaved, machine, median, spread
from table import megabytes
from torch import Tensor

import rlkern

PRODUCTS = "products alone"
EAGER = "eager"
ENTROPY = 0.01  # its coefficient in the loss
COMPUTES = ("logp+entropy", "ce")


class Head(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]

    @property
    def parameters(self) -> list[Tensor]:
        return [x for x in self[:2] if x.requires_grad]


def make_head(shape: tuple[int, int, int], dtype: torch.dtype, device: str, frozen: bool) -> Head:
    """Logits of standard deviation 2."""
    n, h, vocab = shape
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, h, generator=g, device=device).mul_(2).to(dtype)
    weight = torch.randn(vocab, h, generator=g, device=device).div_(h**0.5).to(dtype)
    targets = torch.randint(vocab, (n,), generator=g, device=device)
    return Head(hidden.requires_grad_(), weight.requires_grad_(not frozen), targets)


def _loss(logp: Tensor, entropy: Tensor | None) -> Tensor:
    loss = -logp.mean()
    return loss if entropy is None else loss - ENTROPY * entropy.mean()


def _eager(head: Head, entropy: bool) -> Tensor:
    log_p = F.log_softmax((head.hidden @ head.weight.T).float(), dim=-1)
    logp = log_p.gather(-1, head.targets.unsqueeze(-1)).squeeze(-1)
    return _loss(logp, -(log_p.exp() * log_p).sum(-1) if entropy else None)


@functools.cache
def _compiled():
    return torch.compile(_eager)


def _token_stats(head: Head, entropy: bool) -> Tensor:
    stats = rlkern.token_stats(head.hidden @ head.weight.T, head.targets, with_entropy=entropy, inplace_backward=True)
    return _loss(stats.logp, stats.entropy)


def _linear(head: Head, entropy: bool, **plan) -> Tensor:
    stats = rlkern.linear_token_stats(head.hidden, head.weight, head.targets, with_entropy=entropy, **plan)
    return _loss(stats.logp, stats.entropy)


def _known(head: Head, entropy: bool, **plan) -> Tensor:
    n = len(head.targets)

    def loss(rows):
        return -(rows.logp + ENTROPY * rows.entropy).sum() / n if entropy else -rows.logp.sum() / n

    return rlkern.linear_fused_loss(head.hidden, head.weight, head.targets, loss=loss, with_entropy=entropy, **plan).loss


def _torch(head: Head, entropy: bool) -> Tensor:
    return F.linear_cross_entropy(head.hidden, head.weight, head.targets)


@functools.cache
def _trl_function():
    """From its file. What it imports from TRL's trainers matters with DeepSpeed only."""
    module = load_file("trl", "kernels/chunked_logprob.py")
    module.__package__ = "_peer_trl.kernels"
    for name in ("_peer_trl", "_peer_trl.kernels", "_peer_trl.trainer", "_peer_trl.trainer.utils"):
        sys.modules[name] = ModuleType(name)
    sys.modules["_peer_trl.trainer.utils"].maybe_gather_lm_head_ctx = lambda *_: nullcontext()
    return module.ChunkedLogProbFunction


def _trl(head: Head, entropy: bool) -> Tensor:
    outputs = ("entropy",) if entropy else ()
    logp, h, *_ = _trl_function().apply(head.hidden, head.weight, None, head.targets, 1.0, 32_768, None, 1.0, outputs)
    return _loss(logp, h)


def _liger(head: Head, entropy: bool) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(head.hidden, head.weight, head.targets)[0]


Loss = Callable[[Head, bool], Tensor]


def contenders(computes: str, device: str, compiled: bool = True) -> dict[str, Loss]:
    """By name; those of other packages only if they are installed."""
    found: dict[str, Loss] = {
        "rlkern": _linear,
        "rlkern, kept logits": functools.partial(_linear, workspace=1 << 40),
        "rlkern, tiles": functools.partial(_linear, workspace=1),
        "rlkern, known": _known,
        "rlkern, known in chunks of 512": functools.partial(_known, chunk_rows=512),
        "rlkern, token_stats of all logits": _token_stats,
        EAGER: _eager,
    }
    if compiled:
        found["compiled"] = lambda head, entropy: _compiled()(head, entropy)
    if computes == "ce" and hasattr(F, "linear_cross_entropy"):
        found["PyTorch linear_cross_entropy"] = _torch
    if find_spec("trl"):
        found["TRL chunked_logprob"] = _trl
    if computes == "ce" and device == "cuda" and find_spec("liger_kernel"):
        found["Liger fused linear cross-entropy"] = _liger
    return found


def _products(head: Head):
    """As phases: the logits, then what the gradients of hidden and weight take."""
    with torch.no_grad():
        d_logits = torch.zeros(len(head.hidden), len(head.weight), dtype=head.hidden.dtype, device=head.hidden.device)

    def backward(_):
        with torch.no_grad():
            return d_logits @ head.weight, d_logits.T @ head.hidden if head.weight.requires_grad else None

    return (lambda _: head.hidden.detach() @ head.weight.detach().T), backward


def phases(loss: Loss, head: Head, entropy: bool):
    return (lambda _: loss(head, entropy)), (lambda value: torch.autograd.grad(value, head.parameters))


def measure(head: Head, computes: str, rounds: int, compiled: bool = True) -> dict[str, dict]:
    """Milliseconds of forward plus backward and peak bytes beside the inputs, by contender."""
    entropy = computes == "logp+entropy"
    found, absent = {PRODUCTS: functools.partial(_products, head)}, {}
    for name, loss in contenders(computes, head.hidden.device.type, compiled).items():
        try:
            torch.autograd.grad(loss(head, entropy), head.parameters)
            found[name] = functools.partial(phases, loss, head, entropy)
        except Exception as error:  # a version that does not run here
            absent[name] = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
        gc.collect()
    times, peaks = interleaved(found, head.hidden.detach(), rounds)
    totals = {name: [sum(t) for t in each] for name, each in times.items()}
    return {n: {"ms": median(t), "min_ms": min(t), "spread": spread(t), "peak_bytes": peaks[n]} for n, t in totals.items()} | absent


def table(results: dict[str, dict]) -> str:
    base, lines = results[PRODUCTS]["ms"], [f"{'':34} {'ms':>9} {'spread':>7} {'x products':>11} {'x eager':>8} {'peak MB':>8}"]
    for name, entry in results.items():
        if "error" in entry:
            lines.append(f"{name:34} {entry['error']}")
            continue
        eager = results[EAGER]["ms"] / entry["ms"]
        lines.append(f"{name:34} {entry['ms']:9.2f} {entry['spread']:7.0%} {entry['ms'] / base:11.2f} {eager:8.2f} {megabytes(entry):>8}")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__, "device", "dtype", "rounds", "threads", rounds=5)
    parser.add_argument("--shape", default="1024x1024x32768", metavar="NxHxV")
    parser.add_argument("--computes", choices=COMPUTES, nargs="+", default=COMPUTES[:1])
    parser.add_argument("--frozen", action="store_true", help="the matrix takes no gradient")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = arguments(parser)
    shape = tuple(int(n) for n in args.shape.split("x"))
    info = machine() | {"load": os.getloadavg()[0]}
    where = info["gpu"] if args.device == "cuda" else f"{info['cpu']}, {info['threads']} threads, load {info['load']:.1f}"
    document = {"machine": info, "shape": shape, "dtype": args.dtype, "frozen": args.frozen, "cases": {}}
    for computes in args.computes:
        results = measure(make_head(shape, DTYPES[args.dtype], args.device, args.frozen), computes, args.rounds, not args.no_compile)
        print(f"{computes}, {args.dtype}, N x H x V = {args.shape}{', frozen' if args.frozen else ''}; {where}")
        print(table(results), flush=True)
        document["cases"][computes] = results
        if args.out:
            with open(args.out, "w") as file:
                json.dump(document, file, indent=1)


if __name__ == "__main__":
    main()
