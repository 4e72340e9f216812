"""Tensor parallelism: GRPO of a small transformer whose output matrix is cut over several processes.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [--steps 24] [--seed 0]
    python examples/tensor_parallel.py                       one process that holds all of it

1. Each process holds the transformer and its own rows of the output matrix. None has all logits of a row.
2. Answers are drawn by Gumbel-max over the processes. The reward is the share of tokens that belong to the
   prompt's class.
3. `rlkern.linear_token_stats(..., group=)` gives every process the log-probabilities and entropies of whole
   rows, and `rlkern.grpo_loss` their loss.

Before every update rank 0 also gives the parameters to an undivided model in plain PyTorch and computes loss
and gradients of the same answers there. The example fails where the two differ by more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from support.vocab_parallel import Policy, ShardedPolicy
from torch import Tensor

import rlkern

BOUND = 1e-9  # float64; without the sum of the hidden states' gradient over the ranks it is 0.1 and more


def loss_of(logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """The same for both models."""
    mask = torch.ones_like(logp)
    return rlkern.grpo_loss(logp, old_logp, advantages, mask).loss - 1e-3 * rlkern.aggregate(entropy, mask)


def rewards(answers: Tensor, prompts: Tensor, classes: int) -> Tensor:
    """[N, K], [N, 1] -> [N]: the share of tokens whose id is the prompt's modulo `classes`."""
    return (answers % classes == prompts % classes).double().mean(-1)


class Step(NamedTuple):
    reward: float
    entropy: float
    loss: float
    loss_off: float  # from one process
    gradients_off: float  # the largest of all, by the largest gradient


def train(group: dist.ProcessGroup, args: argparse.Namespace) -> list[Step]:
    """Every step's numbers, which rank 0 prints; it alone has the differences."""
    rank = dist.get_rank(group)
    torch.manual_seed(args.seed)  # every rank begins with all of the same model
    whole = Policy(args.vocab, 1 + args.tokens, args.width, args.depth).double()
    model = ShardedPolicy(copy.deepcopy(whole), group)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    draws = torch.Generator().manual_seed(args.seed)
    steps = []
    for step in range(1, args.steps + 1):
        prompts = torch.arange(args.prompts).remainder(args.classes).repeat_interleave(args.group).unsqueeze(-1)
        ids = model.sample(prompts, args.tokens, draws)
        reward = rewards(ids[:, 1:], prompts, args.classes)
        advantages = rlkern.advantages.grpo(reward, args.group)
        old_logp = model.stats(ids, args.tokens).logp.detach()
        loss_off = gradients_off = 0.0
        for _ in range(args.updates):
            stats = model.stats(ids, args.tokens)
            loss = loss_of(stats.logp, stats.entropy, old_logp, advantages)
            optimizer.zero_grad()
            loss.backward()
            parameters, gradients = model.whole(lambda p: p.detach()), model.whole(lambda p: p.grad)
            if rank == 0:
                wanted_loss, wanted = in_one_process(whole, parameters, ids, old_logp, advantages)
                loss_off = max(loss_off, (loss - wanted_loss).abs().item())
                largest = max(x.abs().max() for x in wanted)
                gradients_off = max(gradients_off, *((a - b).abs().max() / largest for a, b in zip(gradients, wanted, strict=True)))
            optimizer.step()
        steps.append(Step(reward.mean().item(), stats.entropy.mean().item(), loss.item(), loss_off, float(gradients_off)))
        if rank == 0 and (step == 1 or step % max(1, args.steps // 12) == 0):
            print("{:>4} {:>8.3f} {:>9.3f} {:>10.5f} {:>10.1e} {:>14.1e}".format(step, *steps[-1]), flush=True)
    return steps


def in_one_process(whole: Policy, parameters: list[Tensor], ids: Tensor, *of_loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the undivided model with these parameters."""
    with torch.no_grad():
        for mine, given in zip(whole.parameters(), parameters, strict=True):
            mine.copy_(given)
    loss = loss_of(*whole.stats(ids, ids.shape[1] - 1), *of_loss)
    return loss.detach(), list(torch.autograd.grad(loss, list(whole.parameters())))


# ------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--updates", type=int, default=2, help="a step, all but the first off-policy")
    parser.add_argument("--vocab", type=int, default=251, help="ids; the last process pads its share")
    parser.add_argument("--classes", type=int, default=4, help="of ids, and prompts")
    parser.add_argument("--prompts", type=int, default=16, help="a step")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=6, help="of an answer")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name in ("steps", "updates", "classes", "prompts", "group", "tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    world, rank = dist.get_world_size(), dist.get_rank()
    if rank == 0:
        columns = -(-args.vocab // world)
        print(f"rlkern {rlkern.__version__}, torch {torch.__version__}; {world} process{'es' * (world > 1)}, gloo, float64")
        print(f"{args.vocab:,} ids: each process holds {columns:,} rows of the output matrix, {world * columns - args.vocab} of them padding\n")
        print("step   reward   entropy       loss   loss off  gradients off")
    steps = train(group, args)
    if rank == 0:
        of_loss, of_gradients = max(s.loss_off for s in steps), max(s.gradients_off for s in steps)
        print(f"\nlargest difference from one process in {args.steps * args.updates} updates: loss {of_loss:.1e}, gradients {of_gradients:.1e}")
        print(f"everything together: {time.perf_counter() - began:.0f} s")
        if not max(of_loss, of_gradients) < BOUND:
            raise SystemExit(f"the processes differ from one process by more than {BOUND:.0e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
