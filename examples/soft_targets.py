"""Soft targets: what a student of a two-class problem can learn from its teacher's features.

    python examples/soft_targets.py [--seeds 5] [--steps 400] [--subclasses 4]

The task is whether a handwritten digit is even (scikit-learn's digits, 8 x 8). A teacher of two wide layers
learns it. Small students then learn from

    labels       one class each: a distribution with a 1 and a 0
    teacher      the teacher's two probabilities, at temperature 4 (it is almost always sure)
    subclasses   each class split along directions of the teacher's features, after LELP (arXiv 2409.20449):
                 the class's probability times a softmax of projections on the principal components of its
                 features

and all with the same loss, `rlkern.token_divergence(kind="cross_entropy")`: the row of the "other" policy is
the logarithm of any distribution, and a 0 becomes -inf, which counts for nothing. Students are measured on
digits that neither they nor the teacher saw. The last column says how much more is right than from labels,
by seed, and how that varies: a mean within its spread shows nothing.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rlkern

CLASSES = 2


class Network(nn.Module):
    def __init__(self, width: int, out: int, depth: int = 1):
        super().__init__()
        sizes = [64, *[width] * depth]
        layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def fit(network: Network, x: Tensor, soft: Tensor, steps: int, g: torch.Generator) -> Network:
    """Trains on distributions soft [N, C]. The loss sees rows of logits and rows of log-probabilities."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    log_soft = soft.log()
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=g)
        loss = rlkern.token_divergence(network(x[rows]), log_soft[rows], kind="cross_entropy").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def subclasses(teacher: Network, x: Tensor, labels: Tensor, count: int, sharpness: float = 3.0) -> Tensor:
    """[N, C * count]: each class's probability, split by where the teacher's features lie within the class.

    The components are of the features of that class, without the directions in which the teacher's own head
    reads them: those are in its probabilities already.
    """
    with torch.no_grad():
        features, p = teacher.body(x), teacher(x).softmax(-1)
        read, _ = torch.linalg.qr(teacher.head.weight.T)
        features = features - features @ read @ read.T
        parts = []
        for c in range(CLASSES):
            own = features[labels == c]
            components = torch.linalg.svd(own - own.mean(0), full_matrices=False).Vh[:count]
            projections = (features - own.mean(0)) @ components.T
            split = (sharpness * projections / projections[labels == c].std(0)).softmax(-1)
            parts.append(p[:, c : c + 1] * split)
        return torch.cat(parts, -1)


def accuracy(network: Network, x: Tensor, labels: Tensor) -> float:
    """Of the likeliest class, which is a sum over its subclasses."""
    with torch.no_grad():
        logits = network(x).view(len(x), CLASSES, -1).logsumexp(-1)
    return (logits.argmax(-1) == labels).double().mean().item()


def run(seed: int, steps: int, count: int, width: int) -> dict[str, float]:
    """Accuracy on held-out digits of the teacher and of each student."""
    g = torch.Generator().manual_seed(seed)
    digits = load_digits()
    x, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target % 2)
    order = torch.randperm(len(x), generator=g)
    train, test = order[:900], order[900:]
    one_hot = nn.functional.one_hot(labels, CLASSES).float()
    torch.manual_seed(seed)
    teacher = fit(Network(128, CLASSES, depth=2), x[train], one_hot[train], 2 * steps, g)
    with torch.no_grad():
        soft = {"labels": one_hot[train], "teacher": (teacher(x[train]) / 4).softmax(-1)}
    soft["subclasses"] = subclasses(teacher, x[train], labels[train], count)
    result = {"the teacher itself": accuracy(teacher, x[test], labels[test])}
    for name, targets in soft.items():
        torch.manual_seed(seed)
        student = fit(Network(width, targets.shape[1]), x[train], targets, steps, torch.Generator().manual_seed(seed))
        result[name] = accuracy(student, x[test], labels[test])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs, each with another split and other weights")
    parser.add_argument("--steps", type=int, default=400, help="of a student; the teacher takes twice as many")
    parser.add_argument("--subclasses", type=int, default=4, help="of each class")
    parser.add_argument("--width", type=int, default=8, help="of a student")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the layers are too small to share
    start = time.perf_counter()
    runs = [run(seed, arguments.steps, arguments.subclasses, arguments.width) for seed in range(arguments.seeds)]
    table = {name: torch.tensor([r[name] for r in runs], dtype=torch.float64) * 100 for name in runs[0]}
    print(f"{'learned from':<20}{'accuracy':>10}{'spread':>8}{'over labels, seed by seed':>30}")
    for name, values in table.items():
        gain = values - table["labels"]
        print(f"{name:<20}{values.mean():>9.2f}%{values.std():>8.2f}{gain.mean():>+18.2f} +- {gain.std():.2f}")
    print(f"{arguments.seeds} seeds, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
