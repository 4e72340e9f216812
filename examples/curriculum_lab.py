"""Curriculum lab: what to train on next, and how to weigh rewards; reinforcement learning of a small model.

    python examples/curriculum_lab.py [--study samplers] [--methods uniform SEC DUMP PCL Knapsack] [--seeds 3]
    python examples/curriculum_lab.py --study weights

Samplers: a small transformer adds numbers of one to four digits. Supervised learning leaves it good at one
digit and bad at four. Then it learns from the same number of rollouts with each rule that chooses prompts:
SEC, DUMP, PCL, Knapsack RL and CLPO, against prompts at random. The rules read absolute advantages, success
rates and counts of the steps before (support/samplers.py, value_sampler.py, knapsack.py).

Weights: sums are to be right and answers short. The two rewards are weighed by fixed weights, by gradients
and by hypervolume (support/reward_weights.py).

docs/curriculum_lab.md has the results, and what they show and do not show.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from functools import partial
from pathlib import Path

import torch
from support import curriculum_report, curriculum_train, weights_report, weights_train
from support.processes import run_all

import rlkern

STUDIES = {"samplers": (curriculum_train, curriculum_report, 3), "weights": (weights_train, weights_report, 2)}  # and how many seeds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="samplers")
    later = {"default": argparse.SUPPRESS}  # it depends on the study
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="samplers or rules of weights to compare (default: those of the page)", **later)
    parser.add_argument("--seeds", type=int, help="runs of each method (default: 3 of samplers, 2 of weights)", **later)
    parser.add_argument("--steps", type=int, help="reinforcement-learning steps of each run (default: 120 of samplers, 90 of weights)", **later)
    parser.add_argument("--rollouts", type=int, default=384, help="a step")
    parser.add_argument("--group", type=int, default=8, help="rollouts of a prompt; Knapsack gives 2 to 32, and this on average")
    parser.add_argument("--minibatches", type=int, default=4, help="updates a step")
    parser.add_argument("--lr", type=float, default=4e-4, help="learning rate; it falls to 0 by REX")
    parser.add_argument("--warm-up-steps", type=int, default=4000, help="supervised steps at most")
    parser.add_argument("--rare", type=float, default=0.01, help="samplers: share of four-digit sums in the supervised warm-up")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture and the CSV file")
    args = parser.parse_args()
    training, _, seeds = STUDIES[args.study]
    args = argparse.Namespace(**{"methods": training.DEFAULT, "seeds": seeds, "steps": training.Settings().steps} | vars(args))
    unknown = [name for name in args.methods if name not in training.METHODS]
    if unknown:
        parser.error(f"--methods: {args.study} has no {', '.join(map(repr, unknown))}; it has {', '.join(map(repr, training.METHODS))}")
    if len(set(args.methods)) < len(args.methods):
        parser.error(f"--methods must name each once, got {' '.join(args.methods)}")
    for name, least in (("seeds", 1), ("steps", 2), ("group", 2), ("minibatches", 1), ("warm_up_steps", 1), ("workers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.rollouts < args.group:
        parser.error(f"--rollouts must be at least --group, the {args.group} of one prompt, got {args.rollouts}")
    if args.study == "weights" and args.rollouts % args.group:
        parser.error(f"--rollouts must be a multiple of --group, {args.group}, got {args.rollouts}")
    if args.minibatches > args.rollouts:
        parser.error(f"--minibatches must not exceed the {args.rollouts} rollouts of a step, got {args.minibatches}")
    if not 0 <= args.rare < 0.2:
        parser.error(f"--rare must be in [0, 0.2), got {args.rare}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr must be positive and finite, got {args.lr}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, got the file {args.out}")
    options = {"rare": args.rare} if args.study == "samplers" else {}
    args.settings = training.Settings(args.steps, args.rollouts, args.group, args.minibatches, args.lr, warm_up_steps=args.warm_up_steps, **options)
    for name in args.methods if args.study == "samplers" else ():
        try:  # a first plan, before the minutes of the warm-up
            training.new_sampler(name, args.settings.task(0), args.settings, 0).propose(args.rollouts)
        except ValueError as error:
            parser.error(f"--methods {name} --rollouts {args.rollouts} --group {args.group}: {error}")
    return args


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    training, report, _ = STUDIES[args.study]
    settings, seeds = args.settings, range(args.seeds)
    print(f"rlkern {rlkern.__version__}, torch {torch.__version__}, {args.workers} processes; CPU kernels: {rlkern.backend_info()['native']}")

    warm = run_all("supervised warm-up", partial(training.supervised, settings=settings), [(seed,) for seed in seeds], args.workers, args.seeds)
    for (seed,), (_, reached) in warm.items():
        print(f"seed {seed}: {reached}")
    starts = {seed: start for (seed,), (start, _) in warm.items()}
    jobs = [(method, seed) for method in args.methods for seed in seeds]
    runs = run_all("reinforcement learning", partial(training.train, starts=starts, settings=settings), jobs, args.workers, len(jobs) * args.steps)

    report.print_table(runs, settings)
    name = {"samplers": "curriculum_lab", "weights": "reward_weights"}[args.study]
    print(f"\ncsv: {report.write_csv(runs, settings, args.out / f'{name}.csv')}\npicture: {report.draw(runs, settings, args.out / f'{name}.png')}")
    print("A tiny task: it shows how the rules act, not which of them suits a language model.")
    print(f"everything together: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
