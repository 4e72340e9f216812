"""Entropy lab: what policy losses do to the entropy of a small model, and what that does to its answers.

    python examples/entropy_lab.py [--steps 150] [--seeds 3] [--out out]

1. A small transformer learns, supervised, to name a two-digit divisor of a number: 136= 17, 34 or 68.
   It stops early, when one answer in eight is right and the policy still tries many.
2. From there reinforcement learning starts with each loss: groups of answers, reward 1 for any divisor.
   GRPO's entropy falls to almost nothing while most numbers still have no right answer.
3. Entropy and accuracy are compared over several seeds. Of single steps the measured change of the entropy
   is compared with what arXiv 2505.22617 predicts from the covariance.

docs/entropy_lab.md has the results, and what they show and do not show.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from functools import partial
from pathlib import Path

import torch
from support.arithmetic import VOCAB, Divisors
from support.entropy_report import draw, print_differences, print_relations, print_table, write_csv
from support.entropy_train import Batch, Run, Settings, train
from support.model import Transformer
from support.processes import advance, load, parameters, run_all
from support.rollout import warm_up

import rlkern

# --- the losses ---------------------------------------------------------------------------------------------
# Each with its paper's settings. But a minibatch has 384 tokens. One of them, 0.26 %, is the least that
# Clip-Cov and KL-Cov select; their paper has 0.02 % and 0.2 %. Both also run with 2 %.


def grpo(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    return rlkern.grpo_loss(new.logp, old.old_logp, old.advantages, old.mask)


def clip_cov(new: rlkern.TokenStats, old: Batch, select_ratio: float = 2e-4) -> rlkern.LossOutput:
    return rlkern.clip_cov_loss(new.logp, old.old_logp, old.advantages, old.mask, select_ratio=select_ratio, preset="prime")


def kl_cov(new: rlkern.TokenStats, old: Batch, select_ratio: float = 2e-3) -> rlkern.LossOutput:
    return rlkern.kl_cov_loss(new.logp, old.old_logp, old.advantages, old.mask, select_ratio=select_ratio, preset="prime")


def lp_reg(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    return rlkern.lp_reg_loss(new.logp, old.old_logp, old.proxy_logp, old.advantages, old.mask, rho=0.01)


METHODS = {
    "GRPO": grpo,
    "Clip-Cov": clip_cov,
    "Clip-Cov 2 %": partial(clip_cov, select_ratio=0.02),
    "KL-Cov": kl_cov,
    "KL-Cov 2 %": partial(kl_cov, select_ratio=0.02),
    "Lp-Reg": lp_reg,
}

# ------------------------------------------------------------------------------------------------------------


def new_task_and_model(seed: int) -> tuple[Divisors, Transformer]:
    torch.set_num_threads(1)  # the matrices are too small to share
    torch.manual_seed(seed)
    task = Divisors(held_out=200, seed=seed)
    return task, Transformer(VOCAB, task.prompt_length + task.answer_length, width=64, depth=2)


def begin(seed: int, steps: int) -> dict:
    """Parameters after so many supervised steps."""
    task, model = new_task_and_model(seed)
    warm_up(model, task, until=1.0, batch=256, lr=2e-3, max_steps=steps)
    advance(1)
    return parameters(model)


def learn(method: str, seed: int, starts: dict, settings: Settings) -> Run:
    """One run. All runs of a seed begin with the same model, prompts and random numbers."""
    task, model = new_task_and_model(seed)
    load(model, starts[seed,])
    torch.manual_seed(seed + 1)
    task.generator.manual_seed(seed + 1)
    return train(model, task, METHODS[method], settings)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="reinforcement-learning steps of each run")
    parser.add_argument("--prompts", type=int, default=96, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--minibatches", type=int, default=4, help="updates a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the reinforcement learning")
    parser.add_argument("--min-p", type=float, default=0.02, help="Lp-Reg's proxy drops tokens below this fraction of the likeliest")
    parser.add_argument("--warm-up-steps", type=int, default=200, help="supervised steps before")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds count from here")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}".replace("%", "%%")
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture and the CSV file")
    arguments = parser.parse_args()
    least = {"steps": 2, "prompts": 1, "group": 2, "minibatches": 1, "warm_up_steps": 1, "seeds": 2, "first_seed": 0, "workers": 1}
    for name, bound in least.items():
        if getattr(arguments, name) < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {getattr(arguments, name)}")
    if arguments.minibatches > arguments.prompts * arguments.group:
        parser.error(f"--minibatches must not exceed the {arguments.prompts * arguments.group} answers of a step, got {arguments.minibatches}")
    if "GRPO" not in arguments.methods or len(set(arguments.methods)) < len(arguments.methods):
        parser.error(f"--methods must name each once and GRPO, which the others are compared with, got {' '.join(arguments.methods)}")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out must be a folder, got the file {arguments.out}")
    if not 0 < arguments.min_p <= 1:
        parser.error(f"--min-p must be in (0, 1], got {arguments.min_p}")
    if not 0 < arguments.lr < math.inf:
        parser.error(f"--lr must be positive and finite, got {arguments.lr}")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    print(f"rlkern {rlkern.__version__}, torch {torch.__version__}, {args.workers} processes; CPU kernels: {rlkern.backend_info()['native']}")
    settings = Settings(args.steps, args.prompts, args.group, args.minibatches, args.lr, args.min_p)
    seeds = range(args.first_seed, args.first_seed + args.seeds)

    starts = run_all("supervised", partial(begin, steps=args.warm_up_steps), [(seed,) for seed in seeds], args.workers, args.seeds)
    jobs = [(method, seed) for seed in seeds for method in args.methods]
    runs = run_all("reinforcement learning", partial(learn, starts=starts, settings=settings), jobs, args.workers, len(jobs) * args.steps)

    print_table(runs)
    print_differences(runs)
    print_relations(runs)
    print(f"\ncsv: {write_csv(runs, args.out / 'entropy_lab.csv')}\npicture: {draw(runs, args.out / 'entropy_lab.png')}")
    print("A tiny model and a tiny task: it shows how the losses act on entropy, not which of them suits a language model.")
    print(f"everything together: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
