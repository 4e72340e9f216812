"""The example of soft targets runs, and its subclasses are distributions that keep the classes."""

import pathlib
import sys

import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import soft_targets  # noqa: E402


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soft_targets.py", "--seeds", "2", "--steps", "30", "--subclasses", "3"])
    threads = torch.get_num_threads()
    try:
        soft_targets.main()
    finally:
        torch.set_num_threads(threads)
    rows = {line[:20].strip(): float(line[20:29]) for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert list(rows) == ["the teacher itself", "labels", "teacher", "subclasses"]
    assert all(60 < accuracy <= 100 for accuracy in rows.values())  # two classes of equal size


def test_subclasses_split_their_class_along_what_its_probability_does_not_say():
    torch.manual_seed(0)
    teacher, x = soft_targets.Network(16, 2), torch.rand(50, 64)
    labels = torch.arange(50) % 2
    soft = soft_targets.subclasses(teacher, x, labels, 3)
    assert soft.shape == (50, 6)
    torch.testing.assert_close(soft.view(50, 2, 3).sum(-1), teacher(x).softmax(-1).detach())
    assert soft.view(50, 2, 3)[:, 0].var(0).min() > 1e-3
    with torch.no_grad():  # the head's own directions may grow without limit: the split stays
        before = (soft.view(50, 2, 3) / soft.view(50, 2, 3).sum(-1, keepdim=True)).clone()
        teacher.head.weight *= 3
        after = soft_targets.subclasses(teacher, x, labels, 3).view(50, 2, 3)
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before, rtol=1e-4, atol=1e-5)


def test_a_label_is_a_distribution_with_zeros():
    torch.manual_seed(0)
    network, x, labels = soft_targets.Network(4, 2), torch.rand(20, 64), torch.arange(20) % 2
    logits = network(x)
    one_hot = torch.nn.functional.one_hot(labels, 2).float()
    loss = soft_targets.rlkern.token_divergence(logits, one_hot.log(), kind="cross_entropy")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
