"""Few-class distillation: a student of a two-class problem learns pseudo-classes of its teacher's features.

    python examples/few_class_distillation.py [--seeds 8] [--transfer 200] [--hidden 0] [--temperature 2]

The task is whether a handwritten digit is odd (scikit-learn's digits, 8 x 8). A teacher with two layers of
128 learns it from 1297 labels. Students see a few of these images and learn from

    labels           the true ones, of the same few images
    distillation     the teacher's two probabilities
    LELP             pseudo-classes: each class split by the teacher's features (support/lelp.py)

and from what tells why LELP differs: LELP without its rotation, without its null space, and with the features
of other images; only the sums over each class, of as many outputs as LELP has; the ten digits themselves. All
learn by the same loss, and all are measured on 500 digits that nobody saw.

docs/distillation.md has the results, and what they show and do not show.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from support.lelp import pseudo_classes
from support.progress import Progress
from torch import Tensor, nn

import rlkern

CLASSES = 2
IMAGES = 1297  # that the teacher learns from; the other 500 are the test
BATCH = 64


class Network(nn.Module):
    def __init__(self, hidden: list[int], outputs: int):
        super().__init__()
        sizes = [64, *hidden]
        layers = [layer for a, b in zip(sizes, hidden, strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def merge(logits: Tensor, groups: int) -> Tensor:
    """[N, G S] -> [N, G]: logits of groups of S outputs that stand together."""
    return logits.unflatten(-1, (groups, -1)).logsumexp(-1)


def loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[N]: T^2 KL(targets, softmax(logits / T)) for distributions targets [N, G] and logits [N, G S].

    The logarithm of a distribution is a row of logits, and the -inf of a 0 is legal.
    """
    rows = merge(logits / temperature, targets.shape[1])
    return rlkern.token_divergence(rows, targets.log(), kind="forward_kl") * temperature**2


def fit(network: Network, x: Tensor, targets: Tensor, temperature: float, epochs: int, seed: int) -> Network:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(network(x[rows]), targets[rows], temperature).mean().backward()
            optimizer.step()
    return network


@torch.no_grad()
def accuracy(network: Network, x: Tensor, labels: Tensor) -> float:
    return (merge(network(x), CLASSES).argmax(-1) == labels).double().mean().item()


def run(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Accuracy on unseen digits of the teacher and of each student."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x, digits = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    labels = digits % CLASSES
    unseen, unseen_labels, x, digits = x[IMAGES:], labels[IMAGES:], x[:IMAGES], digits[:IMAGES]
    one_hot = nn.functional.one_hot(labels[:IMAGES]).float()

    torch.manual_seed(seed)
    teacher = fit(Network([128, 128], CLASSES), x, one_hot, 1, 30, seed)
    x, digits, one_hot = x[: args.transfer], digits[: args.transfer], one_hot[: args.transfer]
    with torch.no_grad():
        features, p = teacher.body(x), (teacher(x) / args.temperature).softmax(-1)
    weight = teacher.head.weight.detach()

    def lelp(features: Tensor = features, weight: Tensor | None = weight, rotate: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(seed) if rotate else None
        return pseudo_classes(features, p, args.subclasses, weight=weight, beta=args.beta, generator=generator).flatten(1)

    others = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    by_parity = nn.functional.one_hot(digits % CLASSES * 5 + digits // CLASSES, 10).float()
    outputs = CLASSES * args.subclasses
    students = {  # targets, temperature, outputs
        "labels": (one_hot, 1, CLASSES),
        "distillation": (p, args.temperature, CLASSES),
        "LELP": (lelp(), args.temperature, outputs),
        "LELP without rotation": (lelp(rotate=False), args.temperature, outputs),
        "LELP without null space": (lelp(weight=None), args.temperature, outputs),
        "LELP, other features": (lelp(features[others]), args.temperature, outputs),
        "class sums only": (p, args.temperature, outputs),
        "the ten digits": (by_parity, 1, 10),
    }
    result = {"the teacher": accuracy(teacher, unseen, unseen_labels)}
    for name, (targets, temperature, size) in students.items():
        torch.manual_seed(seed)
        student = Network([args.hidden] if args.hidden else [], size)
        result[name] = accuracy(fit(student, x, targets, temperature, args.epochs, seed), unseen, unseen_labels)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="runs, each with another split of the images and other weights")
    parser.add_argument("--transfer", type=int, default=200, help="images that a student sees, 1297 at most")
    parser.add_argument("--hidden", type=int, default=0, help="hidden units of a student; 0 is a linear one")
    parser.add_argument("--subclasses", type=int, default=5, help="pseudo-classes of each class")
    parser.add_argument("--temperature", type=float, default=2.0, help="of teacher and student")
    parser.add_argument("--beta", type=float, default=0.3, help="the smaller, the nearer are pseudo-classes to 0 or 1")
    parser.add_argument("--epochs", type=int, default=150, help="of a student")
    arguments = parser.parse_args()
    for name, least, most in (("seeds", 2, 1000), ("transfer", 2, IMAGES), ("hidden", 0, 4096), ("subclasses", 1, 128), ("epochs", 1, 10_000)):
        if not least <= getattr(arguments, name) <= most:
            parser.error(f"--{name} must be from {least} to {most}, got {getattr(arguments, name)}")
    for name, least, most in (("temperature", 0.1, 100), ("beta", 0.01, 100)):
        if not least <= getattr(arguments, name) <= most:
            parser.error(f"--{name} must be from {least} to {most}, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the layers are too small to share
    runs, progress = [], Progress("seeds", args.seeds)
    for seed in range(args.seeds):
        try:
            runs.append(run(seed, args))
        except ValueError as error:  # such as more pseudo-classes than so few images have directions
            sys.exit(f"{Path(__file__).name}: --transfer {args.transfer} --subclasses {args.subclasses}: {error}")
        progress.update(seed + 1)
    table = {name: 100 * torch.tensor([r[name] for r in runs], dtype=torch.float64) for name in runs[0]}
    print(f"\n{'learned from':<28}{'accuracy':>9}{'sd':>7}{'LELP is better by':>21}")
    for name, values in table.items():
        better = table["LELP"] - values
        paired = f"{better.mean():>+14.2f} +- {better.std() / len(runs) ** 0.5:.2f}" if name != "LELP" else ""
        print(f"{name:<28}{values.mean():>8.2f}%{values.std():>7.2f}{paired}")
    print(f"\n{args.seeds} seeds, {args.transfer} images, {'linear students' if not args.hidden else f'{args.hidden} hidden units'}.", end=" ")
    print(f"sd: of the seeds; +-: standard error of the mean difference, seed by seed. {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
