"""The curriculum lab: its tasks and its loop are right, both studies run, and bad options get one line."""

import csv
import math
import pathlib
import pickle
import re
import sys

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
from support.grpo_step import Answers  # noqa: E402
from support.model import Transformer  # noqa: E402
from support.rollout import sample  # noqa: E402

import rlkern  # noqa: E402

SMALL = curriculum_train.Settings(steps=3, rollouts=36, group=8, minibatches=2, evaluations=2, warm_up_steps=10, pool=20, held_out=12)


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


@pytest.fixture(scope="module")
def starts():
    torch.manual_seed(0)
    model = curriculum_train.new_model(SMALL.task(0))
    return {0: {name: value.clone().numpy() for name, value in model.state_dict().items()}}


@pytest.mark.parametrize("name", curriculum_train.METHODS)
def test_three_steps(name, starts):
    run, again = (curriculum_train.train(name, 0, starts, SMALL) for _ in range(2))
    assert run.shares == again.shares and run.useful == again.useful and run.held_out == again.held_out
    assert len(run.useful) == len(run.useful_groups) == len(run.reward) == len(run.shares) == 3
    assert all(sum(shares) == pytest.approx(1) for shares in run.shares) and all(0 <= x <= 1 for x in run.useful)
    assert [step for step, _ in run.held_out] == [0, 2, 3]
    assert all(math.isfinite(x) for _, accuracies in run.held_out for x in accuracies)


def test_what_is_recorded():
    from support.samplers import Signals

    run = curriculum_train.Run()
    family = torch.tensor([0, 0, 2, 2, 2])
    signals = Signals(family, family, torch.tensor([1, 0, 1, 1, 1]).double(), torch.tensor([1, -1, 0, 0, 0]).double())
    curriculum_train.record(run, signals, torch.tensor([0, 0, 1, 1, 1]))
    assert run.shares == [[0.4, 0, 0.6, 0]] and run.useful == [0.4] and run.useful_groups == [0.5]
    assert run.reward[0][0] == 0.5 and run.reward[0][2] == 1 and math.isnan(run.reward[0][1])


def test_report():
    settings = curriculum_train.Settings(rollouts=100)
    held_out = [(0, [0.5, 0.4, 0.3, 0.0]), (1, [0.6, 0.5, 0.66, 0.0]), (2, [0.7, 0.6, 0.5, 0.3]), (3, [0.8, 0.7, 0.7, 0.6])]
    run = curriculum_train.Run(useful=[0.2, 0.4], held_out=held_out)
    assert curriculum_report.final(run) == pytest.approx([0.7, 0.6, 0.62, 0.3])
    assert curriculum_report.rollouts_until(run, settings) == 100
    assert math.isnan(curriculum_report.rollouts_until(curriculum_train.Run(held_out=held_out[:1]), settings))
    assert curriculum_report.results(run)["A != 0"] == pytest.approx(0.3)
    assert curriculum_report.paired([0.1, 0.2, 0.3]) == "+0.200 +- 0.058" and curriculum_report.paired([0.1]) == "+0.100"


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


def test_the_weights_of_a_run():
    settings = weights_train.Settings(steps=2, rollouts=32, minibatches=2, held_out=10, warm_up_steps=10)
    start, reached = weights_train.supervised(0, settings)
    assert "10 supervised steps" in reached
    runs = {name: weights_train.train(name, 0, {0: start}, settings) for name in ("fixed .5", "gradient .25, c .1", "hypervolume .5, advantages")}
    for run in runs.values():
        assert len(run.points) == len(run.weight) == len(run.scale) == 3
        assert all(0 <= p.accuracy <= 1 and 1 <= p.length <= 7 for p in run.points)
    assert runs["fixed .5"].weight == [0.5] * 3 and runs["fixed .5"].scale == [1] * 3
    assert len(set(runs["gradient .25, c .1"].weight)) == 3
    assert runs["hypervolume .5, advantages"].scale[0] == 1 and runs["hypervolume .5, advantages"].scale[1] >= 0.5


@pytest.mark.parametrize(
    "options, error",
    [
        ("--methods uniform SECC", "samplers has no 'SECC'; it has 'uniform', 'SEC', 'DUMP', 'PCL', 'Knapsack', 'CLPO'"),
        ("--study weights --methods SEC", "weights has no 'SEC'; it has 'fixed .25'"),
        ("--rollouts 7", "--rollouts must be at least --group, the 8 of one prompt, got 7"),
        ("--group 1", "--group must be at least 2, got 1"),
        ("--group 40", "--group must not exceed 32, got 40"),
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--minibatches 500", "--minibatches must not exceed the 384 rollouts of a step, got 500"),
        ("--rare 0.2", "--rare must be in [0, 0.2), got 0.2"),
        ("--lr nan", "--lr must be positive, got nan"),
        ("--study loss", "invalid choice: 'loss'"),
    ],
)
def test_bad_options_get_one_line(options, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curriculum_lab.py", *options.split()])
    with pytest.raises(SystemExit):
        curriculum_lab.parse_arguments()
    assert error in capsys.readouterr().err.splitlines()[-1]


def _one_after_another(title, function, jobs, workers, total):
    """run_all in this process; a job's function and result still have to travel."""
    return {job: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(function))(*job))) for job in jobs}


@pytest.mark.parametrize("study, name", [("samplers", "curriculum_lab"), ("weights", "reward_weights")])
def test_lab_runs(study, name, tmp_path, monkeypatch, capsys):
    small = "--steps 2 --seeds 2 --rollouts 32 --warm-up-steps 10".split()
    methods = {"samplers": ("uniform", "PCL"), "weights": ("fixed .5", "gradient .5, c .01")}[study]
    monkeypatch.setattr(sys, "argv", ["curriculum_lab.py", "--study", study, "--methods", *methods, "--out", str(tmp_path), *small])
    monkeypatch.setattr(curriculum_lab, "run_all", _one_after_another)
    curriculum_lab.main()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert [row["step"] for row in rows] == (["1", "2"] if study == "samplers" else ["0", "1", "2"]) * 4
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
