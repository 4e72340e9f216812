"""Entropy lab: what five policy losses do to the entropy of a small model that learns to add.

    python examples/entropy_lab.py [--steps 200] [--seed 0] [--out out]

1. A small transformer learns sums such as 48+75=, supervised, until one sampled answer in five is right.
2. From there reinforcement learning starts five times: groups of answers, reward 1 if every digit is right.
   Only the loss differs: GRPO, Clip-Cov, KL-Cov, Lp-Reg, NFT.
3. Entropy and reward of every step are drawn, and R = -a exp(H) + b is fitted to each run (arXiv 2505.22617).

docs/entropy_lab.md has the results, and what they show and do not show.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from support.arithmetic import VOCAB, Addition
from support.entropy_report import draw, print_table, write_csv
from support.model import Transformer
from support.rollout import Batch, accuracy, train, warm_up

import rlkern

# --- the five losses ----------------------------------------------------------------------------------------
# The fractions are larger than the papers': a minibatch has hundreds of tokens, theirs hundreds of thousands.


def grpo(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    return rlkern.grpo_loss(new.logp, old.old_logp, old.advantages, old.mask)


def clip_cov(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    return rlkern.clip_cov_loss(new.logp, old.old_logp, old.advantages, old.mask, select_ratio=0.02, preset="verl")


def kl_cov(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    return rlkern.kl_cov_loss(new.logp, old.old_logp, old.advantages, old.mask, select_ratio=0.02, kl_coef=1.0)


def lp_reg(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    return rlkern.lp_reg_loss(new.logp, old.old_logp, old.proxy_logp, old.advantages, old.mask, rho=0.05, clip_low=0.2, clip_high=0.2)


def nft(new: rlkern.TokenStats, old: Batch) -> rlkern.LossOutput:
    undecided = (old.success_rate > 0) & (old.success_rate < 1)  # the paper drops prompts that are always or never answered
    mask = old.mask * undecided.unsqueeze(-1)
    return rlkern.nft_loss(new.logp, old.old_logp, old.success_rate, old.correct, mask, normalize=2, normalizer=old.mask.numel())


METHODS = {"GRPO": grpo, "Clip-Cov": clip_cov, "KL-Cov": kl_cov, "Lp-Reg": lp_reg, "NFT": nft}

# ------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="reinforcement-learning steps of each run")
    parser.add_argument("--prompts", type=int, default=48, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--minibatches", type=int, default=4, help="updates a step")
    parser.add_argument("--digits", type=int, default=2, help="digits of the summands")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the reinforcement learning")
    parser.add_argument("--min-p", type=float, default=0.02, help="Lp-Reg's proxy drops tokens below this fraction of the likeliest")
    parser.add_argument("--warm-up-to", type=float, default=0.2, help="accuracy at which supervised learning ends")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the matrices are too small to share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture and the CSV file")
    arguments = parser.parse_args()
    for name, least in (("steps", 2), ("prompts", 1), ("group", 2), ("minibatches", 1), ("threads", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.minibatches > arguments.prompts * arguments.group:
        parser.error(f"--minibatches must not exceed the {arguments.prompts * arguments.group} answers of a step, got {arguments.minibatches}")
    if arguments.digits not in (1, 2, 3):
        parser.error(f"--digits must be 1, 2 or 3, got {arguments.digits}")
    if not 0 < arguments.min_p <= 1 or not 0 < arguments.warm_up_to < 1 or not arguments.lr > 0:
        parser.error("--min-p must be in (0, 1], --warm-up-to in (0, 1) and --lr positive")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(
        f"rlkern {rlkern.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads; CPU kernels: {rlkern.backend_info()['native']}"
    )

    task = Addition(args.digits, held_out=min(512, 10 ** (2 * args.digits) // 4), seed=args.seed)
    model = Transformer(VOCAB, task.prompt_length + task.answer_length, width=64, depth=2)
    steps, reached = warm_up(model, task, until=args.warm_up_to, batch=256, lr=2e-3, max_steps=2000)
    parameters, greedy = sum(p.numel() for p in model.parameters()), accuracy(model, task, greedy=True)
    print(
        f"{parameters / 1e3:.0f} k parameters; after {steps} supervised steps {reached:.0%} of sampled and {greedy:.0%} of greedy answers "
        f"to held-out prompts are right ({time.perf_counter() - began:.0f} s)\n"
    )

    runs = {}
    for name, loss in METHODS.items():
        torch.manual_seed(args.seed + 1)  # every run begins with the same model, prompts and random numbers
        task.generator.manual_seed(args.seed + 1)
        settings = {"steps": args.steps, "prompts": args.prompts, "group": args.group, "minibatches": args.minibatches}
        runs[name] = train(name, copy.deepcopy(model), task, loss, lr=args.lr, min_p=args.min_p, evaluate_every=max(1, args.steps // 10), **settings)

    print_table(runs)
    print(f"\ncsv: {write_csv(runs, args.out / 'entropy_lab.csv')}\npicture: {draw(runs, args.out / 'entropy_lab.png')}")
    print("One seed of a tiny task: it shows how the losses act on entropy, not which of them suits a language model.")
    print(f"everything together: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
