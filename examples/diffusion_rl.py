"""Diffusion RL: a small masked-diffusion model learns 4x4 sudoku; memory and reward against draws.

    python examples/diffusion_rl.py [--steps 30] [--quick] [--seed 0] [--out out]

1. A bidirectional transformer learns, supervised by LLaDA's masked loss, until its samples solve 20 %.
2. The gradients of three objectives are compared in float64, each from n draws of masks an answer:
       naive   the objective of arXiv 2510.11683, Eq. 6-7, through autograd: the graphs of all n draws at once
       exact   the same gradient from two passes, one draw at a time: rlkern.elbo_coeff, rlkern.masked_elbo
       bound   BGPO's lower bound of it, one pass, one draw at a time: rlkern.bgpo_loss
3. An update of each is measured for n = 1, 4, 16, 64, every pair in a process of its own.
4. Reinforcement learning starts from there with each: groups of answers, reward 1 if solved, else 0.

docs/diffusion.md has the results, and what they show and do not show.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch
from support.diffusion_memory import measure
from support.diffusion_objectives import OBJECTIVES
from support.diffusion_report import draw, print_gradients, print_memory, print_runs, write_csv
from support.diffusion_train import Settings, gradient_differences, train
from support.masked_diffusion import new_model, pretrain, solved
from support.processes import parameters, run_all

import rlkern


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="reinforcement-learning steps of each run")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of draws n to compare, ascending")
    parser.add_argument("--prompts", type=int, default=16, help="puzzles a step")
    parser.add_argument("--group", type=int, default=8, help="answers a puzzle")
    parser.add_argument("--minibatches", type=int, default=2, help="updates a step; all but the first are off-policy")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the reinforcement learning")
    parser.add_argument("--pretrain-to", type=float, default=0.2, help="share of held-out puzzles solved at which supervised learning ends")
    parser.add_argument("--pretrain-steps", type=int, default=1000, help="supervised steps at most")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes at a time, of one thread each")
    parser.add_argument("--quick", action="store_true", help="n = 1, 4, hardly any learning: shows that everything runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture and the CSV files")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.steps, arguments.prompts, arguments.pretrain_steps = [1, 4], 2, 4, 20
    for name, least in (("steps", 1), ("pretrain_steps", 1), ("prompts", 1), ("group", 2), ("minibatches", 1), ("workers", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if len(arguments.samples) < 2 or arguments.samples[0] < 1 or any(a >= b for a, b in zip(arguments.samples, arguments.samples[1:], strict=False)):
        parser.error(f"--samples must be two or more numbers from 1, ascending, got {arguments.samples}")
    if arguments.minibatches > arguments.prompts * arguments.group:
        parser.error(f"--minibatches must not exceed the {arguments.prompts * arguments.group} answers of a step, got {arguments.minibatches}")
    if not 0 < arguments.pretrain_to < 1 or not arguments.lr > 0:
        parser.error("--pretrain-to must be in (0, 1) and --lr positive")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are too small to share
    torch.manual_seed(args.seed)
    print(f"rlkern {rlkern.__version__}, torch {torch.__version__}, {args.workers} processes; CPU kernels: {rlkern.backend_info()['native']}")
    settings = Settings(args.steps, args.prompts, args.group, args.minibatches, args.lr, held_out=50 if args.quick else 1000, seed=args.seed)

    task, model = settings.task(), new_model()
    steps = pretrain(model, task, until=args.pretrain_to, cells=settings.cells, max_steps=args.pretrain_steps, seed=args.seed)
    before, size = solved(model, task.held_out, settings.cells), sum(p.numel() for p in model.parameters())
    print(
        f"{size / 1e3:.0f} k parameters; after {steps} supervised steps one sampled answer each solves {before:.0%} of {settings.held_out} held-out "
        f"puzzles ({time.perf_counter() - began:.0f} s)"
    )
    draws = args.samples[-1] if args.quick else 16
    print_gradients(gradient_differences(model, task, settings, draws), draws)

    print()
    jobs = [(objective, n) for n in reversed(args.samples) for objective in OBJECTIVES]  # the longest first
    per_step = sum(n for _, n in jobs)
    memory = run_all("memory", measure, jobs, args.workers, per_step)
    runs = run_all("reinforcement learning", partial(train, start=parameters(model), settings=settings), jobs, args.workers, per_step * args.steps)

    print_memory(memory)
    print_runs(runs, before)
    print("\ncsv: " + ", ".join(map(str, write_csv(memory, runs, args.out))))
    print(f"picture: {draw(memory, runs, before, settings.held_out, args.out / 'diffusion_rl.png')}")
    print("One seed of a tiny task: it shows what the draws cost and that the objectives agree, not which of them suits a language model.")
    print(f"everything together: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
