"""Quickstart: the same DPO training on real text twice, with the usual PyTorch loss and with rlkern's.

    python examples/quickstart.py [--steps 32] [--seed 0] [--out out]

1. A subword tokenizer of 32,768 entries is trained on the sources of Python's standard library.
2. Preference pairs are cut from them: the true continuation of a prompt against a corrupted one.
3. A small transformer learns the text for a moment. A frozen copy of it is the reference model.
4. DPO starts twice from that model, on the same batches: eager PyTorch, then `rlkern.dpo_loss_from_logits`.

Prints both losses, the reward accuracy on held-out pairs, seconds and peak memory. Draws them to a PNG.
Results repeat for the same seed, machine and thread count; seconds do not.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from support.corpus import read_sources, train_tokenizer
from support.model import Transformer
from support.pairs import IGNORE, make_pairs
from support.report import draw, print_comparison, print_table
from support.train import pair_logps, pretrain, train_dpo
from torch import Tensor

import rlkern

# --- the loss as it is usually written ----------------------------------------------------------------------


def eager_sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each completion. [2B, T, V] and [2B, T] -> [2B]"""
    logits, labels = logits[:, :-1], labels[:, 1:]
    token_logps = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (token_logps * (labels != IGNORE)).sum(-1)


def eager_dpo(logits: Tensor, labels: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    chosen, rejected = (eager_sequence_logps(logits, labels) - reference_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


# --- the loss with rlkern -----------------------------------------------------------------------------------


def rlkern_dpo(logits: Tensor, labels: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    return rlkern.dpo_loss_from_logits(logits, labels, reference_logps, beta=beta).losses.mean()


# ------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help="DPO steps of each run")
    parser.add_argument("--warmup-steps", type=int, default=120, help="language-model steps before DPO")
    parser.add_argument("--pairs", type=int, default=4, help="preference pairs in a batch")
    parser.add_argument("--held-out", type=int, default=48, help="pairs kept for the reward accuracy")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row, prompt included")
    parser.add_argument("--vocab", type=int, default=32_768, help="entries of the tokenizer")
    parser.add_argument("--lr", type=float, default=1e-4, help="highest learning rate of DPO")
    parser.add_argument("--beta", type=float, default=0.1, help="DPO's beta")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the logits; bfloat16 runs the model under autocast")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    arguments = parser.parse_args()
    for name in ("steps", "warmup_steps", "pairs", "held_out"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    for name, least in (("length", 16), ("vocab", 512)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if not arguments.beta > 0:
        parser.error(f"--beta must be positive, got {arguments.beta}")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    backends = rlkern.backend_info()
    print(f"rlkern {rlkern.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads; CPU kernels: {backends['native']}")

    # 1. text and tokenizer
    texts = read_sources(limit_bytes=12_000_000, seed=args.seed)
    held_out_texts, train_texts = texts[: len(texts) // 10], texts[len(texts) // 10 :]
    tokenizer = train_tokenizer(train_texts, args.vocab)
    vocab = tokenizer.get_vocab_size()
    train_files, held_out_files = ([e.ids for e in tokenizer.encode_batch(t)] for t in (train_texts, held_out_texts))
    tokens, seconds = sum(map(len, train_files)), time.perf_counter() - began
    print(f"{len(texts)} files of Python's standard library, {tokens:,} tokens to train on, a vocabulary of {vocab:,} ({seconds:.0f} s)")

    # 2. pairs
    train = make_pairs(train_files, args.steps * args.pairs, args.length, args.seed)
    held_out = make_pairs(held_out_files, args.held_out, args.length, args.seed + 1)
    print(f"{len(train)} preference pairs to train on, {len(held_out)} of {len(held_out_files)} other files held out, {args.length} tokens each")

    # 3. a model that knows the text a little, and its log-probabilities as the reference
    model = Transformer(vocab, args.length)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"a transformer of {size:.1f} M parameters; logits [{2 * args.pairs}, {args.length}, {vocab}] in {args.dtype}\n")
    files = [ids for ids in train_files if len(ids) > args.length]
    settings = {"batch": 4, "length": args.length, "lr": 2e-3, "dtype": dtype}
    pretrain(model, files, rlkern.sequence_logps, steps=args.warmup_steps, seed=args.seed, **settings)
    settings = {"batch": args.pairs, "dtype": dtype}
    train_reference = pair_logps(model, train, rlkern.sequence_logps, title="reference, training pairs", **settings)
    held_out_reference = pair_logps(model, held_out, rlkern.sequence_logps, title="reference, held-out pairs", **settings)

    # 4. the same training with either loss
    runs = {}
    for title, loss, logps in (("eager PyTorch", eager_dpo, eager_sequence_logps), ("rlkern", rlkern_dpo, rlkern.sequence_logps)):
        runs[title] = train_dpo(
            f"DPO, {title}",
            copy.deepcopy(model),
            (train, train_reference),
            (held_out, held_out_reference),
            loss=lambda *tensors, loss=loss: loss(*tensors, beta=args.beta),
            logps=logps,
            lr=args.lr,
            **settings,
        )

    logits_mb = 2 * args.pairs * args.length * vocab * dtype.itemsize / 1e6
    print_comparison(runs)
    print_table(runs, logits_mb)
    print(f"\npicture: {draw(runs, logits_mb, args.out / 'quickstart.png')}")
    print(f"everything together: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
