"""The entropy lab runs; its tasks, its fit, its prediction and its comparison of methods are right."""

import csv
import math
import pathlib
import sys

import one_process
import pytest
import torch

import rlkern

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


pytest.importorskip("matplotlib")
sys.path.insert(0, str(EXAMPLES))

import entropy_lab  # noqa: E402
from support import arithmetic, entropy_report, entropy_train, model, rollout, seeds  # noqa: E402


def test_addition():
    task = arithmetic.Addition(2, held_out=100, seed=0)
    prompts, right = task.encode(torch.tensor([4875, 9999, 3]))
    plus, equals = arithmetic.PLUS, arithmetic.EQUALS
    assert prompts.tolist() == [[4, 8, plus, 7, 5, equals], [9, 9, plus, 9, 9, equals], [0, 0, plus, 0, 3, equals]]
    assert right.tolist() == [[3, 2, 1], [8, 9, 1], [3, 0, 0]]  # 123, 198, 003: lowest digit first
    answers = torch.tensor([[3, 2, 1], [8, 9, 0], [3, 0, 0]])
    assert arithmetic.rewards(answers, right).tolist() == [1, 0, 1]
    assert not set(task.held_out.tolist()) & set(task.pairs.tolist())
    assert len(task.held_out) + len(task.pairs) == 10_000


def test_divisors():
    task = arithmetic.Divisors(held_out=200, seed=0)
    prompts, right = task.encode(torch.tensor([136, 121, 990]))
    assert prompts.tolist() == [[1, 3, 6, arithmetic.EQUALS], [1, 2, 1, arithmetic.EQUALS], [9, 9, 0, arithmetic.EQUALS]]
    answers = [[10 * a + b for a, b in row if a >= 0] for row in right.tolist()]
    assert answers == [[n for n in range(99, 9, -1) if number % n == 0] for number in (136, 121, 990)]
    assert right.shape == (3, len(answers[2]), 2)
    given = torch.tensor([[1, 7], [1, 2], [1, 2]]), torch.tensor([[6, 8], [1, 1], [9, 0]])
    assert [arithmetic.rewards(x, right).tolist() for x in given] == [[1, 0, 0], [1, 1, 1]]
    every = sorted(task.held_out.tolist() + task.numbers.tolist())
    assert every == [n for n in range(100, 1000) if any(n % d == 0 for d in range(10, 100))]
    assert not set(task.held_out.tolist()) & set(task.numbers.tolist())


def small_model(task):
    torch.manual_seed(0)
    net = model.Transformer(arithmetic.VOCAB, task.prompt_length + task.answer_length, width=16, depth=1)
    for parameter in net.parameters():
        parameter.data *= 5  # far from uniform
    return net


def test_success_is_that_of_all_answers():
    task = arithmetic.Divisors(held_out=200, seed=0)
    net, numbers = small_model(task), torch.tensor([136, 990, 200])
    p = entropy_train.success(net, task, numbers)
    prompts, right = task.encode(numbers)
    answers = torch.cartesian_prod(*[torch.arange(arithmetic.VOCAB)] * 2)
    for i in range(3):
        ids = torch.cat([prompts[i].expand(len(answers), -1), answers], -1)
        mass = rollout.answer_stats(net, ids, 2).logp.sum(-1).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-5)
        expected = (mass * arithmetic.rewards(answers, right[i].expand(len(answers), -1, -1))).sum()
        assert p[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_warm_up_and_accuracy_where_one_answer_is_right():
    task = arithmetic.Addition(1, held_out=20, seed=0)
    net = small_model(task)
    assert rollout.warm_up(net, task, until=1e-9, batch=64, lr=2e-3, max_steps=200)[1] > 0
    assert 0 <= rollout.accuracy(net, task, greedy=True) <= 1


def test_warm_up_learns_all_answers():
    task = arithmetic.Divisors(held_out=200, seed=0)
    net = small_model(task)
    before = entropy_train.success(net, task, task.numbers).mean()
    assert rollout.warm_up(net, task, until=1.0, batch=64, lr=2e-3, max_steps=20)[0] == 20
    assert entropy_train.success(net, task, task.numbers).mean() > before


def test_predicted_change_is_the_derivative_of_the_entropy():
    torch.manual_seed(0)
    before, change = 2 * torch.randn(20, 12, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)

    def entropy(z):
        return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)

    for step in (1e-3, 1e-4):
        measured = entropy(before + step * change) - entropy(before)
        predicted = entropy_train.predicted_change(before, before + step * change)
        assert (measured - predicted).abs().max() < 5 * step**2  # the second order is left
    shifted = entropy_train.predicted_change(before, before + 3.0)
    assert shifted.abs().max() < 1e-12  # a constant changes no probability


def test_a_groups_covariance():
    """The mean of the tokens' covariances over a group is the group's own, whatever the rest of the batch."""
    torch.manual_seed(0)
    groups, group = 5, 8
    logp = -torch.rand(groups * group, 2)
    correct = (torch.rand(groups * group) < 0.4).float()
    advantages = rlkern.advantages.grpo(correct, group)
    batch = entropy_train.Batch(torch.zeros(groups * group, 6), logp, logp, advantages, correct, torch.ones_like(logp))
    changes = entropy_train.compare(batch, group, torch.zeros(groups, 12), torch.zeros(groups, 12))
    alone = [
        rlkern.token_covariance(logp[i : i + group, :1], advantages[i : i + group], torch.ones(group, 1)).mean()
        for i in range(0, groups * group, group)
    ]
    assert changes.covariance == pytest.approx([x.item() for x in alone], abs=1e-6)
    assert changes.measured == changes.predicted == changes.moved == [0] * groups


def test_scores():
    task = arithmetic.Divisors(held_out=200, seed=0)
    net = small_model(task)
    p = [entropy_train.success(net, task, numbers) for numbers in (task.numbers, task.held_out)]
    expected = [x.item() for q in p for x in (q.mean(), (1 - (1 - q) ** 8).mean())]
    assert expected[1] > 1.5 * expected[0] > 0
    assert entropy_train.evaluate(net, task) == pytest.approx([*expected, rollout.accuracy(net, task, greedy=True)])


def test_the_loop(monkeypatch):
    """Learning rates, when scores are taken, and that a step's first update is what is measured."""
    task = arithmetic.Divisors(held_out=200, seed=0)
    net, rates, entropies, states = small_model(task), [], [], []
    descend, roll_out = rollout.descend, entropy_train.roll_out

    def entropy():
        with torch.no_grad():
            return rlkern.entropy_from_logits(net(states[-1])[:, -1])

    def roll_out_and_keep(*args):
        batch, h = roll_out(*args)
        states.append(batch.ids[::4, : task.prompt_length])
        return batch, h

    def descend_and_keep(model, optimizer, loss):
        before = entropy()
        descend(model, optimizer, loss)
        rates.append(optimizer.param_groups[0]["lr"])
        entropies.append(entropy() - before)

    monkeypatch.setattr(entropy_train, "roll_out", roll_out_and_keep)
    monkeypatch.setattr(entropy_train, "descend", descend_and_keep)
    settings = entropy_train.Settings(steps=23, prompts=6, group=4, minibatches=3, lr=1e-2, min_p=0.02)
    run = entropy_train.train(net, task, entropy_lab.grpo, settings)
    assert rates == pytest.approx([1e-2 * min(1.0, step / 20) for step in range(1, 24) for _ in range(3)])
    assert [step for step, _ in run.scores] == [0, 2, 4, 6, 9, 11, 13, 16, 18, 20, 23]
    assert len(run.changes) == len(run.reward) == len(run.entropy) == 23
    assert max(abs(x) for changes in run.changes for x in changes.measured) > 1e-3
    for changes, first in zip(run.changes, entropies[::3], strict=True):
        assert changes.measured == pytest.approx(first.tolist(), abs=1e-6)


def test_fit():
    entropy = [1.0, 0.7, 0.5, 0.2, 0.1]
    run = entropy_train.Run(reward=[0.9 - 0.25 * math.exp(h) for h in entropy], entropy=entropy)
    assert entropy_report.fit(run) == pytest.approx((0.25, 0.9, 1.0))
    assert entropy_report.fit(entropy_train.Run(reward=[0.5, 0.5], entropy=[1.0, 1.0])) == (0, 0.5, 0)
    fitted = entropy_report.line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert entropy_report.line([], []) == (0, 0, 0)
    assert fitted == pytest.approx((2, 1, 1)) and fitted(4) == pytest.approx(9)


def test_difference():
    values = {("GRPO", 0): 0.1, ("GRPO", 1): 0.3, ("GRPO", 2): 0.2, ("KL-Cov", 0): 0.2, ("KL-Cov", 1): 0.5, ("KL-Cov", 2): 0.5}
    runs = {key: entropy_train.Run(entropy=[value]) for key, value in values.items()}
    found = entropy_report.difference(runs, "KL-Cov", entropy_report.late_entropy)
    assert found == pytest.approx((0.2, 0.1 / math.sqrt(3))) and str(found) == "+0.200 +- 0.058"
    alone = seeds.paired([0.3], [0.4])
    assert alone.mean == pytest.approx(-0.1) and math.isnan(alone.error) and str(alone) == "-0.100"
    assert seeds.smooth([1.0, math.nan, 3.0, math.nan, math.nan], 2)[:4] == [1, 1, 3, 3]
    assert math.isnan(seeds.smooth([1.0, math.nan, 3.0, math.nan, math.nan], 2)[4])


def test_relations():
    """Of two seeds with two steps of two prompts each. Differences are taken within a seed."""

    def run(*steps):
        return entropy_train.Run(changes=[entropy_train.Changes(m, p, d, c) for m, p, d, c in steps])

    runs = {
        ("GRPO", 0): run(([1, 3], [1, 2], [0.1, 0.9], [4, 6]), ([0, 2], [3, 4], [0.2, 0.3], [2, 2])),
        ("GRPO", 1): run(([5, 5], [5, 6], [0.4, 0.6], [1, 3]), ([7, 9], [7, 8], [0.1, 0.1], [0, 2])),
        ("KL-Cov", 0): run(([0, 0], [0, 0], [0, 0], [0, 0])),
    }
    found = entropy_report.relations(runs, "GRPO")
    assert found["logits"] == ([1, 2, 3, 4, 5, 6, 7, 8], [1, 3, 0, 2, 5, 5, 7, 9])
    assert found["small"] == ([1, 3, 4, 5, 7, 8], [1, 0, 2, 5, 7, 9])
    assert found["sampled"] == ([4, 6, 2, 2, 1, 3, 0, 2], [1, 3, 0, 2, 5, 5, 7, 9])
    assert found["mean"] == ([5, 2, 2, 1], [2, 1, 5, 8])
    assert found["next"] == ([-3, -1], [-1, 3])


@pytest.fixture
def threads():
    """The lab's jobs set one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_lab_runs(tmp_path, monkeypatch, capsys, threads):
    options = "--steps 2 --prompts 4 --minibatches 2 --warm-up-steps 5 --seeds 2 --methods GRPO KL-Cov --out".split()
    monkeypatch.setattr(sys, "argv", ["entropy_lab.py", *options, str(tmp_path)])
    monkeypatch.setattr(entropy_lab, "run_all", one_process.run_all)
    entropy_lab.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "entropy_lab.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "entropy_lab.csv").open()))
    assert len(rows) == 12 and {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in ("GRPO", "KL-Cov") for s in "01"}
    for seed in "01":  # all runs of a seed begin with the same answers
        assert len({row["entropy"] for row in rows if row["seed"] == seed and row["step"] == "1"}) == 1
    for name in ("GRPO", "KL-Cov", "R^2", "paired by seed", "Cov(log pi, advantage)"):
        assert name in printed


@pytest.mark.parametrize(
    "options, error",
    [
        ("--seeds 1", "--seeds must be at least 2, got 1"),
        ("--methods KL-Cov", "--methods must name each once and GRPO"),
        ("--methods GRPO GRPO", "must name each once"),
        (f"--out {__file__}", "--out must be a folder"),
        ("--lr inf", "--lr must be positive"),
    ],
)
def test_bad_arguments_get_one_line(options, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["entropy_lab.py", *options.split()])
    with pytest.raises(SystemExit):
        entropy_lab.parse_arguments()
    assert error in capsys.readouterr().err.splitlines()[-1]
