"""`make bench-parallel`: token_stats of vocabularies that are cut over 1, 2 and 4 processes, on gloo.

    python benchmarks/parallel.py                          512 rows, bfloat16
    python benchmarks/parallel.py --rows 2048 --columns 16384 --vocab 65536 --worlds 1 2 --out file

Log-probability and entropy, then their gradient, against the same with three all_reduces each, as verl and
Megatron-LM write them in PyTorch. Weak scaling keeps the columns of a process, strong scaling the vocabulary.
"no group" is token_stats of the rank's own columns as if they were all: the rest of the time is for the
others. Collectives are those of forward + backward; on CPUs rlkern also sends a header of ten integers.

Each process has one thread. Rounds are interleaved and begin with a barrier; a time is the slowest process's,
and the figure is the median over the rounds. More processes than cores share these.
"""

import contextlib
import functools
import json
import os
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from measure import DTYPES, argument_parser, arguments, machine, median, spread
from table import columns
from torch import Tensor

import rlkern

RLKERN, ALONE, EAGER = "rlkern", "rlkern, no group", "eager, 3 + 3 all_reduces"

# --- as Megatron-LM and verl write it -----------------------------------------------------------------------


def _all_reduce(x: Tensor, group, op=dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(x, op, group=group)
    return x


class _EagerLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, start, group):
        x = logits.float() if logits.dtype != torch.float32 else logits.clone()
        x.sub_(_all_reduce(x.amax(-1, keepdim=True), group, dist.ReduceOp.MAX))
        own = (ids - start).unsqueeze(-1)
        foreign = (own < 0) | (own >= x.shape[-1])
        own = own.masked_fill(foreign, 0)
        at_target = _all_reduce(x.gather(-1, own).masked_fill(foreign, 0), group)
        total = _all_reduce(x.exp_().sum(-1, keepdim=True), group)
        ctx.save_for_backward(x.div_(total), own, foreign)
        ctx.dtype = logits.dtype
        return (at_target - total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        softmax, own, foreign = ctx.saved_tensors
        d = softmax.neg_().scatter_add_(-1, own, (~foreign).float())
        return d.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None, None, None


class _EagerEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, group):
        x = logits.float()
        largest = _all_reduce(x.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
        softmax = (x - largest).exp_()
        total = _all_reduce(softmax.sum(-1, keepdim=True), group)
        mean = _all_reduce((softmax.div_(total) * x).sum(-1, keepdim=True), group)
        ctx.save_for_backward(x, softmax, mean)
        ctx.dtype = logits.dtype
        return (largest + total.log() - mean).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        x, softmax, mean = ctx.saved_tensors
        return softmax.mul_(mean - x).mul_(grad.unsqueeze(-1)).to(ctx.dtype), None


def eager(logits: Tensor, ids: Tensor, group) -> tuple[Tensor, Tensor]:
    start, _ = rlkern.parallel.vocab_range(logits.shape[-1], group)
    return _EagerLogp.apply(logits, ids, start, group), _EagerEntropy.apply(logits, group)


def fused(logits: Tensor, ids: Tensor, group) -> tuple[Tensor, Tensor]:
    stats = rlkern.token_stats(logits, ids, group=group)
    return stats.logp, stats.entropy


def alone(logits: Tensor, ids: Tensor, group) -> tuple[Tensor, Tensor]:
    return fused(logits, ids % logits.shape[-1], None)


CONTENDERS = {RLKERN: fused, ALONE: alone, EAGER: eager}

# --- in each process ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """A list of (bytes that a rank sends, whether it is a header of integers), filled inside."""
    calls, originals = [], {}

    def counting(original, *args, **kwargs):
        x = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
        calls.append((x.nbytes, not x.is_floating_point()))
        return original(*args, **kwargs)

    for name in ("all_gather_single", "all_gather_into_tensor", "all_reduce"):
        if hasattr(dist, name):
            originals[name] = getattr(dist, name)
            setattr(dist, name, functools.partial(counting, originals[name]))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def shard(rows: int, vocab: int, dtype: torch.dtype, group) -> tuple[Tensor, Tensor]:
    """(this rank's logits as a leaf, ids), the same rows for any number of ranks."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (rows,), generator=g)
    start, end = rlkern.parallel.vocab_range(vocab // dist.get_world_size(group), group)
    logits = torch.empty(rows, end - start, dtype=dtype)
    for i, row in enumerate(logits):
        row.copy_(2 * torch.randn(vocab, generator=g.manual_seed(i))[start:end])
    return logits.requires_grad_(), ids


def forward_backward(function, logits: Tensor, ids: Tensor, group) -> tuple[float, float]:
    """Seconds of both."""
    began = time.perf_counter()
    outputs = function(logits, ids, group)
    middle = time.perf_counter()
    torch.autograd.grad(outputs, logits, [torch.ones_like(x) for x in outputs])
    return middle - began, time.perf_counter() - middle


def measured(rows: int, vocab: int, dtype: torch.dtype, rounds: int, group) -> dict[str, dict]:
    logits, ids = shard(rows, vocab, dtype, group)
    found, times = {}, {name: [] for name in CONTENDERS}
    for name, function in CONTENDERS.items():
        with counted() as forward:
            outputs = function(logits, ids, group)
        with counted() as backward:
            torch.autograd.grad(outputs, logits, [torch.ones_like(x) for x in outputs])
        payloads = [size for size, header in forward if not header]
        found[name] = {
            **{"forward_collectives": len(payloads), "bytes_a_rank": sum(payloads), "headers": len(forward) - len(payloads)},
            "backward_collectives": len(backward),
        }
    for _ in range(rounds):
        for name, function in CONTENDERS.items():
            dist.barrier(group)
            times[name].append(forward_backward(function, logits, ids, group))
    for name, each in times.items():
        slowest = torch.tensor(each, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        forward, totals = (1e3 * slowest[:, 0]).tolist(), (1e3 * slowest.sum(-1)).tolist()
        found[name] |= {"forward_ms": median(forward), "ms": median(totals), "min_ms": min(totals), "spread": spread(totals)}
    return found


def call_cost(group, calls: int, rounds: int = 20) -> dict[str, dict[str, float]]:
    """Microseconds of a call on rows so small that they take no time: the least of the medians of blocks."""
    logits, ids = shard(8, 64, torch.float32, group)
    ids, of = ids % logits.shape[-1], {"none": None, "group": group}
    medians = {name: [] for name in of}
    for i in range(rounds + 1):
        for name, with_group in of.items():
            each = [forward_backward(fused, logits, ids, with_group) for _ in range(calls)]
            if i:  # the first block warms up
                medians[name].append((1e6 * median(f for f, _ in each), 1e6 * median(f + b for f, b in each)))
    return {name: dict(zip(("forward_us", "us"), map(min, zip(*each, strict=True)), strict=True)) for name, each in medians.items()}


def serve(rank: int, world: int, folder: str, args) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    group, of = dist.group.WORLD, functools.partial(measured, args.rows, dtype=DTYPES[args.dtype], rounds=args.rounds)
    found = {
        "weak": of(world * args.columns, group=group),
        "strong": of(args.vocab, group=group),
        "call": call_cost(group, args.calls),
    }
    if rank == 0:
        with open(os.path.join(folder, "found.json"), "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------


def run(world: int, args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(serve, (world, folder, args), nprocs=world)
        with open(os.path.join(folder, "found.json")) as file:
            return json.load(file)


def table(results: dict[int, dict], kind: str, rows: int) -> str:
    lines = [["processes", "", "forward ms", "total ms", "spread", "x eager: forward", "total", "collectives", "bytes a row"]]
    for world, found in results.items():
        eager = found[kind][EAGER]
        for name, e in found[kind].items():
            speed = [f"{eager[key] / e[key]:.1f}" for key in ("forward_ms", "ms")]
            sent = [f"{e['forward_collectives']} + {e['backward_collectives']}", f"{e['bytes_a_rank'] / rows:.0f}"]
            lines.append([str(world), name, f"{e['forward_ms']:.2f}", f"{e['ms']:.2f}", f"{e['spread']:.0%}", *speed, *sent])
    return columns(lines, words=2)


def main() -> None:
    parser = argument_parser(__doc__, "dtype", "rounds", rounds=11)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=8192, help="of a process, in weak scaling")
    parser.add_argument("--vocab", type=int, default=32768, help="of all processes, in strong scaling")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--calls", type=int, default=100, help="a block, for the cost of a call")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    parser.set_defaults(device="cpu")
    args = arguments(parser)
    if any(args.vocab % world for world in args.worlds):
        parser.error(f"--vocab must be a multiple of the numbers of processes, got {args.vocab} and {args.worlds}")
    torch.set_num_threads(1)
    info = machine() | {"load": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    print(f"{args.dtype}, {args.rows} rows; {info['cpu']}, {info['cores']} cores, one thread a process, load {info['load']:.1f}")
    results = {world: run(world, args) for world in args.worlds}
    if max(args.worlds) > info["cores"]:
        print(f"more than {info['cores']} processes share the cores: their times say what that costs, not how the method scales")
    print(f"\nweak scaling, {args.columns:,} columns a process\n{table(results, 'weak', args.rows)}")
    print(f"\nstrong scaling, {args.vocab:,} columns in all\n{table(results, 'strong', args.rows)}")
    lines = [["a call on 8 x 64, us", "forward", "with backward"]]
    for world, found in results.items():
        lines += [[f"{world} process{'es' * (world > 1)}, {name}", f"{e['forward_us']:.0f}", f"{e['us']:.0f}"] for name, e in found["call"].items()]
    print(f"\n{columns(lines)}")
    if 1 in results:
        with_group, without = (results[1]["call"][name]["us"] for name in ("group", "none"))
        print(f"a group of one costs {with_group - without:.0f} us a call")
    if args.out:
        with open(args.out, "w") as file:
            shape = {"rows": args.rows, "columns": args.columns, "vocab": args.vocab, "dtype": args.dtype}
            json.dump({"machine": info, **shape, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
