"""The curriculum lab: its tasks and its loop are right, both studies run, and bad options get one line."""

import csv
import itertools
import math
import pathlib
import re
import sys

import one_process
import pytest
import torch
from every_case import EVERY_CASE

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
PAGE = EXAMPLES.parent / "docs" / "curriculum_lab.md"
pytest.importorskip("matplotlib")
sys.path.insert(0, str(EXAMPLES))

import curriculum_lab  # noqa: E402
from support import curriculum_report, curriculum_train, weights_train  # noqa: E402
from support.arithmetic import END, EndedAddition, Families  # noqa: E402
from support.grpo_step import Answers, loss, update  # noqa: E402
from support.model import Transformer  # noqa: E402
from support.rollout import answer_stats, sample  # noqa: E402
from support.schedules import rex  # noqa: E402

import rlkern  # noqa: E402

SMALL = curriculum_train.Settings(steps=3, rollouts=76, group=8, minibatches=2, evaluations=2, warm_up_steps=10, pool=20, held_out=12)


@pytest.fixture(autouse=True)
def one_thread():
    """As in the lab, whose jobs set it for themselves."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_page_runs(capsys):
    text = PAGE.read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    exec(block, {"__name__": "page"})
    p = [float(x) for x in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert sum(p) == pytest.approx(1, abs=1e-3) and max(p) == p[1]
    assert not [name for name in re.findall(r"`rlkern\.(\w+)", text) if not hasattr(rlkern, name)]
    files = {name: (EXAMPLES / "support" / file).read_text() for name, file in re.findall(r"^\| `(\w+)` \|[^|]*\| `(\w+\.py)`", text, flags=re.M)}
    assert len(files) == 7 and all(f"class {name}(" in source for name, source in files.items())


def test_families_are_apart():
    task = Families(4, pool=512, held_out=256, seed=0, shares=(0.5, 0.3, 0.19, 0.01), watched=2)
    assert [len(x) for x in task.test] == [33, 256, 256, 256] and task.held_out is task.test[2]
    assert task.pool_family.bincount().tolist() == [67, 512, 512, 512] and len(task.pool) == 67 + 3 * 512
    digits = [torch.maximum(x // 10**4, x % 10**4) for x in (torch.cat([a, b]) for a, b in zip(task.test, task.train, strict=True))]
    assert [(int(x.min()), int(x.max())) for x in digits] == [(0, 9), (10, 99), (100, 999), (1000, 9999)]
    for held_out, train in zip(task.test, task.train, strict=True):
        assert not set(held_out.tolist()) & set(train.tolist()) and len(train) == len(train.unique())
    prompts, right = task.draw(2000)
    a, b = ((prompts[:, 5 * i : 5 * i + 4] * torch.tensor([1000, 100, 10, 1])).sum(-1) for i in (0, 1))
    assert (right * 10 ** torch.arange(5)).sum(-1).equal(a + b)
    shares = torch.bucketize(torch.maximum(a, b), torch.tensor([10, 100, 1000]), right=True).bincount(minlength=4) / 2000
    assert (shares - task.shares).abs().max() < 0.04


def test_answers_that_end():
    task = EndedAddition(2, held_out=500, seed=0)
    prompts, right = task.encode(torch.tensor([4875, 102, 0, 9999]))
    sums = [[3, 2, 1], [3], [0], [8, 9, 1]]
    assert right.shape == (4, 7)
    for row, digits in zip(right.tolist(), sums, strict=True):
        end = row.index(END)
        assert row[: len(digits)] == digits and not any(row[len(digits) : end]) and len(digits) <= end <= len(digits) + 3
    assert task.correct(right, right).tolist() == [1, 1, 1, 1]
    idle = [int(task.response(task.encode(torch.tensor([4875]))[1]).sum()) - 4 for _ in range(40)]
    assert set(idle) == {0, 1, 2, 3}

    right = task.encode(torch.tensor([5007] * 8))[1]  # 57
    answers = torch.tensor(
        [
            [7, 5, END, 1, 2, 3, 4],
            [7, 5, 0, 0, 0, 0, END],
            [7, 5, 0, 0, 0, 0, 0],  # does not end
            [7, END, 5, END, 0, 0, 0],
            [7, 5, 1, END, 0, 0, 0],
            [5, 7, END, 0, 0, 0, 0],
            [END, 7, 5, END, 0, 0, 0],
            [7, 5, 0, END, END, 0, 0],
        ]
    )
    assert task.correct(answers, right).tolist() == [1, 1, 0, 0, 0, 0, 0, 1]
    assert task.response(answers).sum(-1).tolist() == [3, 7, 7, 2, 4, 3, 1, 4]
    zero = task.encode(torch.tensor([0, 0]))[1]
    assert task.correct(torch.tensor([[0, END, 0, 0, 0, 0, 0], [END] * 7]), zero).tolist() == [1, 0]


def test_sampling_with_a_cache_is_sampling_without():
    torch.manual_seed(0)
    model = Transformer(13, 9, width=16, depth=2).double()
    for p in model.parameters():
        p.data.mul_(10)
    prompts = torch.randint(13, (50, 4))
    ids = prompts
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], -1)
        cache = model.empty_cache()
        logits = torch.cat([model(ids[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 6))], 1)
    assert len(ids[:, 4:].unique()) > 5
    assert sample(model, prompts, 5, greedy=True).equal(ids)
    torch.testing.assert_close(logits, model(ids[:, :6]))


def numbers(ids: torch.Tensor, digits: int) -> tuple[list[int], list[int], list[list[int]]]:
    """a, b and the answer's tokens of rows "a+b=answer"."""
    rows = ids.tolist()
    read = [[int("".join(map(str, row[at : at + digits]))) for row in rows] for at in (0, digits + 1)]
    return *read, [row[2 * digits + 2 :] for row in rows]


class Watched:
    """What a run asked of the model, the sampler or rule, and the optimizer."""

    def __init__(self, module, monkeypatch):
        self.sampled, self.updates, self.plans, self.signals = [], [], [], []
        sample, update = module.sample, module.update

        def sample_and_keep(model, prompts, count):
            self.sampled.append(sample(model, prompts, count))
            return self.sampled[-1]

        def update_and_keep(model, optimizer, answers, kl_coef=0.0):
            self.updates.append((answers, optimizer.param_groups[0]["lr"], kl_coef))
            update(model, optimizer, answers, kl_coef)
            self.model = model

        monkeypatch.setattr(module, "sample", sample_and_keep)
        monkeypatch.setattr(module, "update", update_and_keep)

    def sampler(self, kind):
        def built(*args):
            sampler = kind(*args)
            propose, update = sampler.propose, sampler.update
            sampler.propose = lambda budget: self.plans.append(propose(budget)) or self.plans[-1]
            sampler.update = lambda signals: self.signals.append(signals) or update(signals)
            return sampler

        return built


@pytest.fixture(scope="module")
def starts():
    """A policy that is sometimes right: on half of the one-digit sums."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = SMALL.task(0)
    model = curriculum_train.new_model(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.cat(task.encode(task.train[0]), -1)
    for _ in range(170):
        optimizer.zero_grad()
        (-answer_stats(model, ids, task.answer_length).logp.mean()).backward()
        optimizer.step()
    return {0: {name: value.clone().numpy() for name, value in model.state_dict().items()}}


@pytest.fixture(scope="module")
def first_accuracies():
    return []


@pytest.mark.parametrize("name", curriculum_train.METHODS)
def test_three_steps(name, starts, first_accuracies, monkeypatch):
    again = curriculum_train.train(name, 0, starts, SMALL)
    seen = Watched(curriculum_train, monkeypatch)
    monkeypatch.setitem(curriculum_train.METHODS, name, seen.sampler(curriculum_train.METHODS[name]))
    run = curriculum_train.train(name, 0, starts, SMALL)
    assert run.shares == again.shares and run.useful == again.useful and run.held_out == again.held_out
    assert max(run.useful) > 0.1 and max(x for rewards in run.reward for x in rewards if not math.isnan(x)) > 0.2
    assert all(sum(shares) == pytest.approx(1) for shares in run.shares)
    assert len(run.useful) == len(run.useful_groups) == len(run.reward) == len(run.shares) == 3
    assert [step for step, _ in run.held_out] == [0, 1, 3]
    first_accuracies.append(run.held_out[0][1])
    assert first_accuracies[0] == first_accuracies[-1]  # every method begins with the same policy and numbers

    task = SMALL.task(0)
    measured, rolled = [seen.sampled[i] for i in (0, 2, 5)], [seen.sampled[i] for i in (1, 3, 4)]
    for ids, (_, accuracy) in zip(measured, run.held_out, strict=True):
        assert ids[:, :10].equal(task.encode(torch.cat(task.test))[0])
        a, b, answers = numbers(ids, 4)
        right = [sum(d * 10**i for i, d in enumerate(x)) == m + n and max(x) < 10 for m, n, x in zip(a, b, answers, strict=True)]
        sizes = [0, *itertools.accumulate(map(len, task.test))]
        assert accuracy == pytest.approx([sum(right[m:n]) / (n - m) for m, n in itertools.pairwise(sizes)], abs=1e-6)
    start = curriculum_train.new_model(task)
    start.load_state_dict({key: torch.from_numpy(value) for key, value in starts[0].items()})
    for step, (ids, plan, signals) in enumerate(zip(rolled, seen.plans, seen.signals, strict=True)):
        rows = plan.prompts.repeat_interleave(plan.counts)
        assert len(ids) == 76 and ids[:, :10].equal(task.encode(task.pool[rows])[0])
        a, b, answers = numbers(ids, 4)
        right = torch.tensor([sum(d * 10**i for i, d in enumerate(x)) == m + n and max(x) < 10 for m, n, x in zip(a, b, answers, strict=True)])
        expected = torch.cat([rlkern.advantages.grpo(part.float(), len(part)) for part in right.split(plan.counts.tolist())])
        assert signals.prompt.equal(rows) and signals.reward.equal(right.double())
        torch.testing.assert_close(signals.advantage, expected.double().clamp(-5, 5), rtol=1e-5, atol=1e-6)
        parts = seen.updates[2 * step : 2 * step + 2]
        assert sum(len(answers.ids) for answers, _, _ in parts) == 76 and parts[0][0].mask.all()
        assert {rate for _, rate, _ in parts} == {SMALL.lr * rex(step, 3)}
        given = torch.cat([answers.ids for answers, _, _ in parts])
        assert given.unique(dim=0).equal(ids.unique(dim=0))
        for answers, _, kl_coef in parts:
            if name != "CLPO":
                assert answers.reference_logp is None and kl_coef == 0
                continue
            torch.testing.assert_close(answers.reference_logp, answer_stats(start, answers.ids, 5).logp)
            assert kl_coef == 0.001
        if name == "CLPO":
            scale = torch.cat([torch.full((len(x),), 0.5 if x.float().mean() <= 0.25 else 1.0) for x in right.split(plan.counts.tolist())])
            assert torch.cat([answers.kl_scale for answers, _, _ in parts]).sort().values.equal(scale.sort().values)
    assert any((value.numpy() != starts[0][key]).any() for key, value in seen.model.state_dict().items())


def test_what_is_recorded():
    run = curriculum_train.Run()
    family, groups = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 0, 1, 1, 1])
    curriculum_train.record(run, family, groups, torch.tensor([1.0, 0, 1, 1, 1]), torch.tensor([1.0, -1, 0, 0, 0]))
    assert run.shares[0] == pytest.approx([0.4, 0, 0.6, 0]) and run.useful == pytest.approx([0.4]) and run.useful_groups == [0.5]
    assert run.reward[0][0] == 0.5 and run.reward[0][2] == 1 and math.isnan(run.reward[0][1])


@pytest.mark.parametrize("kl_coef", (0.0, 0.5))
def test_one_update(kl_coef):
    torch.manual_seed(0)
    model, model_after = (Transformer(13, 9, width=16, depth=1).double() for _ in range(2))
    model_after.load_state_dict(model.state_dict())
    ids, mask = torch.randint(13, (8, 9)), (torch.arange(3) < torch.tensor([3, 1, 2, 3, 3, 2, 1, 3]).unsqueeze(-1)).double()
    logp = model(ids[:, :-1])[:, -3:].log_softmax(-1).gather(-1, ids[:, -3:].unsqueeze(-1)).squeeze(-1)
    answers = Answers(ids, logp.detach(), mask, 50 * torch.randn(8).double(), logp.detach() - 0.3, torch.rand(8).double())
    kl = torch.exp(answers.reference_logp - logp) - (answers.reference_logp - logp) - 1
    each = -answers.advantages.unsqueeze(-1) * torch.exp(logp - answers.old_logp) + kl_coef * answers.kl_scale.unsqueeze(-1) * kl
    expected = (each * mask).sum() / mask.sum()
    torch.testing.assert_close(loss(model, answers, kl_coef), expected)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 1
    update(model_after, torch.optim.SGD(model_after.parameters(), lr=1.0), answers, kl_coef)
    for before, after in zip(model.parameters(), model_after.parameters(), strict=True):
        torch.testing.assert_close(before - after, before.grad / norm, rtol=1e-4, atol=1e-7)


def test_report():
    settings = curriculum_train.Settings(rollouts=100)
    held_out = [(0, [0.5, 0.4, 0.3, 0.0]), (1, [0.6, 0.5, 0.66, 0.0]), (2, [0.7, 0.6, 0.5, 0.3]), (3, [0.8, 0.7, 0.7, 0.6])]
    run = curriculum_train.Run(useful=[0.2, 0.4], held_out=held_out)
    assert curriculum_report.final(run) == pytest.approx([0.7, 0.6, 0.62, 0.3])
    assert curriculum_report.rollouts_until(run, settings) == 100
    assert math.isnan(curriculum_report.rollouts_until(curriculum_train.Run(held_out=held_out[:1]), settings))
    assert curriculum_report.results(run)["A != 0"] == pytest.approx(0.3)


def test_gradients_of_objectives():
    torch.manual_seed(0)
    model = Transformer(13, 9, width=16, depth=1).double()
    ids, rewards, groups = torch.randint(13, (8, 9)), torch.rand(8, 2).double(), torch.arange(8) // 4
    mask = (torch.arange(3) < torch.tensor([3, 1, 2, 3, 3, 2, 1, 3]).unsqueeze(-1)).double()
    logp = model(ids[:, :-1])[:, -3:].log_softmax(-1).gather(-1, ids[:, -3:].unsqueeze(-1)).squeeze(-1)
    answers = Answers(ids, logp.detach(), mask, torch.full((8,), math.nan))
    found = weights_train.objective_gradients(model, answers, rewards, groups)
    for i in (0, 1):
        a = rlkern.advantages.grpo(rewards[:, i], groups)
        expected = torch.autograd.grad(-(a.unsqueeze(-1) * logp * mask).sum() / mask.sum(), list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(found[i], torch.cat([g.flatten() for g in expected]), rtol=1e-9, atol=1e-12)


def test_the_weights_of_a_run(monkeypatch):
    settings = weights_train.Settings(steps=2, rollouts=32, minibatches=2, held_out=10, warm_up_steps=40)
    start, reached = weights_train.supervised(0, settings)
    assert "40 supervised steps" in reached
    runs = {name: weights_train.train(name, 0, {0: start}, settings) for name in ("fixed .5", "gradient .25, c .1", "hypervolume .5, advantages")}
    for run in runs.values():
        assert len(run.points) == len(run.weight) == len(run.scale) == 3
        assert all(0 <= p.accuracy <= 1 and 1 <= p.length <= 7 for p in run.points)
    assert runs["fixed .5"].weight == pytest.approx([0.5] * 3) and runs["fixed .5"].scale == [1] * 3
    assert len(set(runs["gradient .25, c .1"].weight)) == 3
    assert runs["hypervolume .5, advantages"].scale[0] == 1 and runs["hypervolume .5, advantages"].scale[1] >= 0.5

    seen, rewards, points = Watched(weights_train, monkeypatch), [], []
    weigh = weights_train.advantages
    monkeypatch.setattr(weights_train, "advantages", lambda r, groups, rule: rewards.append(r) or weigh(r, groups, rule))
    monkeypatch.setattr(weights_train.FixedWeights, "validated", lambda self, point: points.append(point.tolist()))
    run = weights_train.train("fixed .5", 0, {0: start}, settings)
    lengths: list[int] = []
    for ids, given in zip(seen.sampled[1::2], rewards, strict=True):
        a, b, answers = numbers(ids, 2)
        own = [row.index(END) + 1 if END in row else 7 for row in answers]
        lengths += own
        assert given[:, 1].tolist() == [float(n < sum(lengths) / len(lengths)) for n in own]
        right = [END in row and n > 1 and max(row[: n - 1]) < 10 for row, n in zip(answers, own, strict=True)]
        value = [sum(d * 10**i for i, d in enumerate(row[: n - 1])) for row, n in zip(answers, own, strict=True)]
        assert given[:, 0].tolist() == [float(ok and v == x + y) for ok, v, x, y in zip(right, value, a, b, strict=True)]
    assert 0 < sum(r[:, 1].sum() for r in rewards) < 64
    assert points == [pytest.approx([p.accuracy, 1 - p.length / 7]) for p in run.points]
    assert [rate for _, rate, _ in seen.updates] == [settings.lr * rex(step, 2) for step in (0, 0, 1, 1)]
    for answers, _, _ in seen.updates:
        assert answers.mask.sum(-1).tolist() == [row.index(END) + 1 if END in row else 7 for row in answers.ids[:, 6:].tolist()]


@pytest.mark.parametrize(
    "options, error",
    [
        ("--methods uniform SECC", "samplers has no 'SECC'; it has 'uniform', 'SEC', 'DUMP', 'PCL', 'Knapsack', 'CLPO'"),
        ("--study weights --methods SEC", "weights has no 'SEC'; it has 'fixed .25'"),
        ("--rollouts 7", "--rollouts must be at least --group, the 8 of one prompt, got 7"),
        ("--group 1", "--group must be at least 2, got 1"),
        ("--group 40", "--methods Knapsack --rollouts 384 --group 40: 1 <= low <= group <= high is expected, got 2, 40, 32"),
        ("--group 32 --rollouts 63", "these 1 prompts take 32 to 32 rollouts, got a budget of 63"),
        ("--study weights --rollouts 390", "--rollouts must be a multiple of --group, 8, got 390"),
        ("--methods SEC uniform SEC", "--methods must name each once, got SEC uniform SEC"),
        ("--lr inf", "--lr must be positive and finite, got inf"),
        (f"--out {__file__}", "--out must be a folder, got the file"),
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--minibatches 500", "--minibatches must not exceed the 384 rollouts of a step, got 500"),
        ("--rare 0.2", "--rare must be in [0, 0.2), got 0.2"),
        ("--lr nan", "--lr must be positive and finite, got nan"),
        ("--study loss", "invalid choice: 'loss'"),
    ],
)
def test_bad_options_get_one_line(options, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curriculum_lab.py", *options.split()])
    with pytest.raises(SystemExit):
        curriculum_lab.parse_arguments()
    assert error in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("study, name", [("samplers", "curriculum_lab"), ("weights", "reward_weights")])
def test_lab_runs(study, name, tmp_path, monkeypatch, capsys):
    small = "--steps 2 --seeds 2 --rollouts 32 --warm-up-steps 10".split()
    methods = {"samplers": ("uniform", "PCL"), "weights": ("fixed .5", "gradient .5, c .01")}[study]
    monkeypatch.setattr(sys, "argv", ["curriculum_lab.py", "--study", study, "--methods", *methods, "--out", str(tmp_path), *small])
    monkeypatch.setattr(curriculum_lab, "run_all", one_process.run_all)
    curriculum_lab.main()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"] * 4
    assert [row["seed"] for row in rows[:: len(rows) // 4]] == ["0", "1", "0", "1"]
    printed = capsys.readouterr().out
    for text in (*methods, "10 supervised steps", "everything together"):
        assert text in printed


@pytest.mark.slow
@pytest.mark.skipif(not EVERY_CASE, reason="five minutes; RLKERN_EVERY_CASE=1 runs it")
def test_samplers_waste_fewer_rollouts():
    settings = curriculum_train.Settings()
    starts = {0: curriculum_train.supervised(0, settings)[0]}
    useful = {n: curriculum_report.results(curriculum_train.train(n, 0, starts, settings))["A != 0"] for n in ("uniform", "DUMP", "PCL", "Knapsack")}
    for name, least in (("DUMP", 0.03), ("PCL", 0.05), ("Knapsack", 0.05)):
        assert useful[name] - useful["uniform"] >= least, useful
