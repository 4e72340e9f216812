"""Kept sets: importance ratios of tokens sampled with top-p, with and without the sampler's sets.

    python examples/kept_sets.py [--top-p 0.9 0.8] [--seed 0] [--out out]

1. A small transformer learns some windows of Python's standard library.
2. Its bfloat16 copy is the engine: it continues prompts with top-p, and returns the sets it drew from.
3. The trainer, float32, scores the same tokens: over the whole vocabulary, and over the replayed sets.

Without any update both are the same policy, so ratios should be 1 but for rounding. Prints their table and
draws their histograms to a PNG.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import torch
from support.corpus import read_sources, train_tokenizer
from support.kept_report import Ratios, draw, print_table
from support.model import Transformer
from support.pairs import random_windows
from support.top_p import generate
from support.train import pretrain
from torch import Tensor, nn

import rlkern
from rlkern.integrations.rollouts import kept_from_vllm


def ratios(model: nn.Module, engine: nn.Module, prompts: Tensor, count: int, top_p: float, temperature: float, seed: int) -> Ratios:
    completions = generate(engine, prompts, count, top_p=top_p, temperature=temperature, generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([prompts, torch.stack([c.token_ids for c in completions])], -1)  # [B, T]
    sampler_logp = torch.stack([c.logprobs for c in completions])

    # The collator: one list of ids a drawn token. The trainer: moved with the labels to the rows of logits.
    drawn = torch.zeros_like(ids, dtype=torch.bool)
    drawn[:, prompts.shape[1] :] = True
    at_tokens = kept_from_vllm(completions, drawn)
    keep, labels, mask = at_tokens.next_tokens(), rlkern.next_tokens(ids), rlkern.next_tokens(drawn.long(), ignore_index=0)
    with torch.no_grad():
        logits = model(ids)
        plain = rlkern.token_stats(logits, labels, mask=mask, temperature=temperature)
        replayed = rlkern.token_stats(logits, labels, mask=mask, temperature=temperature, keep=keep)
        unshifted = rlkern.token_stats(logits, labels, mask=mask, temperature=temperature, keep=at_tokens)

    def ratio(stats: rlkern.TokenStats) -> Tensor:
        return (stats.logp[mask == 1] - sampler_logp.flatten()).exp()

    return Ratios(
        top_p,
        {"whole vocabulary": ratio(plain), "replayed sets": ratio(replayed)},
        replayed.target_kept[mask == 1].double().mean().item(),
        unshifted.target_kept[mask == 1].double().mean().item(),
        torch.cat([c.sampling_mask.offsets.diff() for c in completions]),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--windows", type=int, default=96, help="of text to learn; their beginnings are the prompts")
    parser.add_argument("--tokens", type=int, default=48, help="of a continuation")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--warmup-steps", type=int, default=260, help="language-model steps before")
    parser.add_argument("--vocab", type=int, default=2048, help="entries of the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    arguments = parser.parse_args()
    if not all(0 < p <= 1 for p in arguments.top_p):
        parser.error(f"--top-p must be in (0, 1], got {arguments.top_p}")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the layers are too small to share
    texts = read_sources(limit_bytes=1_500_000, seed=args.seed)
    tokenizer = train_tokenizer(texts, args.vocab)
    length = args.prompt_tokens + args.tokens
    files = [e.ids for e in tokenizer.encode_batch(texts) if len(e.ids) > length + 1]
    windows = random_windows(files, args.windows, length + 1, random.Random(args.seed))

    # Few windows read many times: the model is sure of most tokens, as a large one is.
    model = Transformer(tokenizer.get_vocab_size(), length, width=96, depth=2)
    settings = {"batch": 16, "length": length, "lr": 4e-3, "seed": args.seed, "dtype": torch.float32}
    pretrain(model, windows.tolist(), rlkern.sequence_logps, steps=args.warmup_steps, **settings)
    engine = copy.deepcopy(model).bfloat16()
    prompts = windows[:, : args.prompt_tokens]
    results = [ratios(model, engine, prompts, args.tokens, p, args.temperature, args.seed) for p in args.top_p]
    print_table(results)
    print(f"\npicture: {draw(results, args.out / 'kept_sets.png')}")
    print(f"everything together: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
