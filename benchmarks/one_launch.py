"""For a profiler: a warm forward and backward of one row and of two between cudaProfilerStart and Stop.

ncu --profile-from-start off --set full python benchmarks/one_launch.py [--shape 8192x151936] [--dtype bf16]
"""

import contextlib
import sys

import torch
from measure import PAIRS, Case, argument_parser, arguments, inputs

import rlkern


def main() -> int:
    parser = argument_parser(__doc__, "device", "dtype", device="cuda")
    parser.add_argument("--shape", default="8192x151936", metavar="NxV")
    args = arguments(parser)
    x, (other, y), grads = inputs(Case(args.device, args.dtype, *map(int, args.shape.split("x")), PAIRS[0]))
    x.requires_grad_()
    for watched in (False, True):
        if args.device == "cuda":
            torch.cuda.synchronize()
        with torch.cuda.profiler.profile() if watched and args.device == "cuda" else contextlib.nullcontext():
            stats = rlkern.token_stats(x, y)
            torch.autograd.grad((stats.logp, stats.entropy), x, grads[:2])
            torch.autograd.grad(rlkern.token_divergence(x, other), x, grads[2])
            if args.device == "cuda":
                torch.cuda.synchronize()
    print(f"launched {args.dtype} {args.shape} forward and backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())
