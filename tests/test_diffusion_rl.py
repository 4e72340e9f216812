"""The diffusion example: its task, sampler, three objectives and memory counter are right, and it runs."""

import copy
import csv
import itertools
import pathlib
import subprocess
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from support.diffusion_memory import Retained  # noqa: E402
from support.diffusion_objectives import Answers, elbos, gradient  # noqa: E402
from support.diffusion_train import OBJECTIVES, Settings, gradient_differences, train  # noqa: E402
from support.masked_diffusion import new_model, pretrain, unmask  # noqa: E402
from support.processes import run_all  # noqa: E402
from support.sudoku import MASK, Sudoku, all_grids, rewards  # noqa: E402

import rlkern  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """As in the example."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _valid(grid: list[int]) -> bool:
    """The rules of 4x4 sudoku, spelled out."""
    cells = [grid[i : i + 4] for i in range(0, 16, 4)]
    lines = [*cells, *map(list, zip(*cells, strict=True))]
    lines += [[cells[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return all(sorted(line) == [1, 2, 3, 4] for line in lines)


def test_task():
    grids = all_grids()
    assert grids.shape == (288, 16) and len(grids.unique(dim=0)) == 288
    assert all(map(_valid, grids.tolist()))

    task = Sudoku((4, 6), held_out=300, seed=0)
    puzzles, solutions = task.draw(300)
    assert set((puzzles != MASK).sum(-1).tolist()) == {4, 5, 6}
    assert rewards(puzzles, solutions).all()
    known = set(map(tuple, task.grids.tolist()))
    assert len(known) == 240 and {tuple(s) for s in solutions.tolist()} <= known
    unseen = torch.tensor([g for g in map(tuple, grids.tolist()) if g not in known])
    assert (((task.held_out[:, None] == unseen) | (task.held_out[:, None] == MASK)).all(-1)).any(-1).all()


def test_rewards():
    generator = torch.Generator().manual_seed(0)
    grid = all_grids()[100]
    answers = [grid.clone() for _ in range(60)]
    for answer in answers[1:]:  # break a few cells, the clues too
        answer[torch.randint(16, (2,), generator=generator)] = torch.randint(0, 5, (2,), generator=generator)
    answers = torch.stack([*answers, *all_grids()])
    puzzle = torch.where(torch.arange(16) < 5, grid, MASK)
    expected = [float(_valid(a) and a[:5] == grid[:5].tolist()) for a in answers.tolist()]
    assert 1 < sum(expected) < len(expected) - 200
    assert rewards(puzzle.expand_as(answers), answers).tolist() == expected


def test_unmask():
    truth = torch.tensor([[1, 2, 3, 4, 1, 2], [4, 4, 3, 3, 2, 1]])
    sure = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]]).expand(2, -1) + 30  # column 1 is the likeliest, then 3, 5, 4, 2, 0
    seen = []

    def model(ids):
        seen.append(ids)
        assert len(seen) < 6, "the sampler does not come to an end"
        logits = torch.zeros(2, 6, 5).scatter(-1, truth.unsqueeze(-1), sure.unsqueeze(-1)).double()
        logits[..., MASK] = 1e3  # a model that would rather write nothing
        return logits

    ids = torch.tensor([[3, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 2]])
    filled = unmask(model, ids, 2)
    assert filled.tolist() == [[3, 2, 3, 4, 1, 2], [4, 4, 1, 1, 2, 2]]  # the clues stay, though the model disagrees with all of them
    assert [s.tolist() for s in seen] == [
        [[3, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 2]],
        [[3, 2, 0, 4, 0, 0], [0, 4, 1, 1, 2, 2]],
        [[3, 2, 0, 4, 1, 2], [4, 4, 1, 1, 2, 2]],
    ]


@pytest.fixture
def batch():
    """A float64 model and 12 answers with 10 to 12 masked places, advantages of both signs and a zero."""
    torch.manual_seed(0)
    puzzles, grids = Sudoku((4, 6), held_out=1, seed=0).draw(12)
    advantages = torch.randn(12, dtype=torch.float64)
    advantages[3] = 0
    model = new_model(width=16).double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model, Answers(grids, puzzles == MASK, advantages, torch.arange(12) + 100, seed=7)


def _oracle(model, answers, n, old, bounded):
    """Gradient of Eq. 6-7, or of the bound of Eq. 13-14, written anew but for the masks, rlkern's."""
    mask, weight = rlkern.diffusion.count_masks(answers.response, n, seed=answers.seed, rollouts=answers.rows)
    value = 0.0
    for b in range(len(answers.ids)):
        length, a, d = answers.response[b].sum(), answers.advantages[b], []
        for j in range(n):
            noisy = answers.ids[b].masked_fill(mask[b, j], 0)
            losses = torch.nn.functional.cross_entropy(model(noisy[None])[0], answers.ids[b], reduction="none")
            assert weight[b, j] == (length / mask[b, j].sum()).float()
            ell = -(losses * mask[b, j]).sum() * weight[b, j]
            d.append((ell - (ell.detach() if old is None else old[b, j])) * (1 / length))
        d = torch.stack(d)
        value = value + a * ((1 + d).mean() if bounded and a >= 0 else d.exp().mean() if bounded else d.mean().exp()) / len(answers.ids)
    return torch.cat([g.flatten() for g in torch.autograd.grad(-value, list(model.parameters()))])


def test_objectives(batch):
    model, answers = batch
    n, close = 3, {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(gradient("naive", model, answers, n, None), _oracle(model, answers, n, None, bounded=False), **close)
    for objective in ("exact", "bound"):
        torch.testing.assert_close(gradient(objective, model, answers, n, None), gradient("naive", model, answers, n, None), **close)

    old = elbos(model, answers, n)
    assert old.shape == (12, n)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    naive, bound = (_oracle(model, answers, n, old, bounded) for bounded in (False, True))
    assert (naive - bound).abs().max() > 1e-2 * naive.abs().max()  # off-policy they differ
    for objective, expected in (("naive", naive), ("exact", naive), ("bound", bound)):
        torch.testing.assert_close(gradient(objective, model, answers, n, old), expected, **close)


def test_draws_survive_a_split(batch):
    model, answers = batch
    index = torch.tensor([7, 2, 11])
    torch.testing.assert_close(elbos(model, answers.take(index), 4), elbos(model, answers, 4)[index])


def test_gradient_differences(batch):
    settings = Settings(steps=2, prompts=3, group=2, minibatches=2, lr=1e-2, held_out=4, seed=0)
    found = gradient_differences(batch[0], settings.task(), settings, n=3)
    assert set(found) == {"exact", "bound"}
    assert max(found["exact"]) < 1e-12 and found["bound"].on_policy < 1e-12 < 1e-5 < found["bound"].off_policy


def test_pretraining_learns():
    torch.manual_seed(0)
    task, model = Sudoku((4, 6), held_out=20, seed=0), new_model()
    puzzles, grids = task.draw(100)
    mask, weight = rlkern.diffusion.count_masks(puzzles == MASK, 1, seed=123, draw=0)

    def elbo():
        with torch.no_grad():
            return rlkern.masked_elbo(model(torch.where(mask, MASK, grids)), grids, weight, mask=mask).mean().item()

    before = elbo()
    assert pretrain(model, task, until=1.1, cells=4, max_steps=30, seed=0) == 30
    assert elbo() > 0.97 * before > before  # both negative; 11 cells of four digits: -15.2 for a guess
    assert pretrain(model, task, until=0.0, cells=4, max_steps=40, seed=0) == 10


def test_training_repeats():
    settings = Settings(steps=2, prompts=2, group=4, minibatches=2, lr=1e-3, held_out=10, seed=0, cells=6)
    torch.manual_seed(0)
    start = {name: value.clone().numpy() for name, value in new_model().state_dict().items()}
    first, second = (train("bound", 2, start, settings) for _ in range(2))
    assert len(first.reward) == 2 and 0 <= first.solved <= 1
    assert first[:2] == second[:2]


def test_training_compares_with_the_policy_that_answered(monkeypatch):
    calls = []

    def objective(model, answers, n, old_elbo):
        calls.append((copy.deepcopy(model), answers, n, old_elbo))
        sum(p.sum() for p in model.parameters()).backward()

    monkeypatch.setitem(OBJECTIVES, "recorded", objective)
    settings = Settings(steps=2, prompts=2, group=3, minibatches=3, lr=1e-2, held_out=4, seed=0, cells=6)
    train("recorded", 4, {name: value.numpy() for name, value in new_model().state_dict().items()}, settings)
    assert len(calls) == 6
    for first, *later in (calls[:3], calls[3:]):
        assert first[3] is None
        for model, answers, n, old_elbo in later:
            torch.testing.assert_close(old_elbo, elbos(first[0], answers, n))
            assert (old_elbo - elbos(model, answers, n)).abs().max() > 1e-3  # the policy has moved on
        assert sorted(torch.cat([call[1].rows for call in (first, *later)]).tolist()) == list(range(6))
    assert calls[0][1].seed != calls[3][1].seed


def test_retained_bytes():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100, requires_grad=True)  # so that weight is kept as well
    retained = Retained([weight])
    with torch.autograd.graph.saved_tensors_hooks(retained.pack, lambda saved: saved.tensor):
        y = (x @ weight).exp()  # keeps x and its own result
        z = (y.view(-1).sin() + y.flatten().cos()).sum()  # y again, twice, as views
    assert retained.bytes == retained.most == 2 * 50 * 100 * 4
    z.backward()
    del y, z
    assert retained.bytes == 0 and retained.most == 2 * 50 * 100 * 4


@pytest.mark.slow
def test_run_all_raises_what_a_job_raises():
    pytest.importorskip("matplotlib")
    assert run_all("division", divmod, [(7, 2), (9, 4)], 1, total=1) == {(7, 2): (3, 1), (9, 4): (2, 1)}
    with pytest.raises(ZeroDivisionError, match="by zero"):
        run_all("division", divmod, [(7, 2), (1, 0)], 2, total=1)


@pytest.mark.slow
def test_example_runs(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--quick", "--workers", "1", "--out", str(tmp_path)]
    result = subprocess.run([sys.executable, str(EXAMPLES / "diffusion_rl.py"), *options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "diffusion_rl.png").stat().st_size > 10_000
    steps = list(csv.DictReader((tmp_path / "diffusion_rl_rewards.csv").open()))
    pairs = list(itertools.product(("naive", "exact", "bound"), ("1", "4")))
    assert sorted((s["objective"], s["n"], s["step"]) for s in steps) == sorted((*pair, step) for pair in pairs for step in "12")
    summary = {(row["objective"], row["n"]): row for row in csv.DictReader((tmp_path / "diffusion_rl.csv").open())}
    assert set(summary) == set(pairs)
    for field, naive_grows, ours_grow in (("retained_bytes", 3.9, 1.0), ("peak_bytes", 2, 1.05)):
        growth = {o: float(summary[o, "4"][field]) / float(summary[o, "1"][field]) for o in ("naive", "exact", "bound") if summary[o, "1"][field]}
        assert all(value > naive_grows if objective == "naive" else value <= ours_grow for objective, value in growth.items()), (field, growth)
    for text in ("on-policy", "n = 4 : n = 1", "held-out"):
        assert text in result.stdout
