"""Pseudo-classes are what LELP says, the losses of the example too, and the example runs and shows a gain."""

import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from every_case import EVERY_CASE

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import few_class_distillation as example  # noqa: E402
from support.lelp import pseudo_classes  # noqa: E402

N, D, S, BETA = 60, 12, 3, 0.3


def teacher(classes=2, seed=0):
    """Features [N, D], output layer [classes, D] and probabilities of a made-up teacher, in float64."""
    rng = numpy.random.default_rng(seed)
    weight = rng.normal(size=(classes, D))
    features = rng.normal(size=(N, D)) * rng.uniform(0.2, 3, D) + rng.normal(size=D)
    logits = (features - features.mean(0)) @ weight.T
    p = numpy.exp(logits - logits.max(1, keepdims=True))
    return torch.tensor(features), torch.tensor(weight), torch.tensor(p / p.sum(1, keepdims=True))


def generator():
    return torch.Generator().manual_seed(0)


def mixing(features, weight, p, q, c):
    """[S, S]: M of log q[:, c] = (projections on principal directions / (s_c beta)) M + a number a row.

    The projections are numpy's: of the null space from a complete basis, of the covariance's eigenvectors.
    """
    z, p, q = features.numpy(), p.numpy(), q.numpy()
    if weight is not None:
        differences = weight.numpy()[1:] - weight.numpy()[:1]
        basis = numpy.linalg.qr(differences.T, mode="complete")[0][:, len(differences) :]
        z = z @ basis
    own = z[p.argmax(1) == c]
    directions = numpy.linalg.eigh(numpy.cov(own.T))[1][:, ::-1][:, :S]
    y = (z - own.mean(0)) @ directions
    y /= numpy.sqrt(((own - own.mean(0)) @ directions).var()) * BETA
    log_shares = numpy.log(q[:, c] / p[:, c, None])
    log_shares -= log_shares.mean(1, keepdims=True)
    m = numpy.linalg.lstsq(y, log_shares, rcond=None)[0]
    numpy.testing.assert_allclose(y @ m, log_shares, rtol=1e-8, atol=1e-8)
    return m


CENTRED = numpy.eye(S) - 1 / S


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("null_space", [True, False])
def test_against_the_formula(classes, null_space):
    features, weight, p = teacher(classes)
    removed = weight if null_space else None
    q = pseudo_classes(features, p, S, weight=removed, beta=BETA, generator=generator())
    assert q.shape == (N, classes, S) and q.dtype == torch.float64
    torch.testing.assert_close(q.sum(-1), p)
    found = [mixing(features, removed, p, q, c) for c in range(classes)]
    for m in found:  # of an orthogonal matrix: it keeps lengths, but for what a softmax does not see
        numpy.testing.assert_allclose(m.T @ m, CENTRED, atol=1e-8)
    assert numpy.abs(numpy.abs(found[0]) - numpy.abs(found[1])).max() > 0.05  # a rotation for every class

    q = pseudo_classes(features, p, S, weight=removed, beta=BETA, generator=None)
    for c in range(classes):  # no rotation: the principal directions, whose signs are free
        m = mixing(features, removed, p, q, c)
        signs = numpy.sign(numpy.diag(m))
        numpy.testing.assert_allclose(m, signs[:, None] * CENTRED, atol=1e-8)


def test_rotations_are_as_likely_as_each_other():
    """Over many generators a rotated direction prefers no side of any principal one, and none of them."""
    features, weight, p = teacher()
    options = {"weight": weight, "beta": BETA}
    draws = [pseudo_classes(features, p, S, generator=torch.Generator().manual_seed(i), **options) for i in range(300)]
    m = numpy.stack([mixing(features, weight, p, q, 0) for q in draws])
    assert numpy.abs(m.mean(0)).max() < 5 * numpy.sqrt(2 / 9 / 300)
    numpy.testing.assert_allclose((m**2).mean(0), numpy.full((S, S), 2 / 9), atol=0.06)


def test_what_the_teacher_reads_changes_no_share():
    features, weight, p = teacher(3)
    q = pseudo_classes(features, p, S, weight=weight, generator=generator())
    t = torch.linspace(-5, 5, N, dtype=torch.float64).unsqueeze(-1)
    moved = features + t * (weight[1] - weight[0]) + t.flip(0) * (weight[2] - weight[0])
    torch.testing.assert_close(pseudo_classes(moved, p, S, weight=weight, generator=generator()), q, rtol=1e-9, atol=1e-12)
    seen = pseudo_classes(features, p, S, weight=None, generator=generator())
    assert (pseudo_classes(moved, p, S, weight=None, generator=generator()) - seen).abs().max() > 0.1
    alike = features + t * weight.mean(0)  # moves all logits alike: no softmax sees it, and the shares may
    assert (pseudo_classes(alike, p, S, weight=weight, generator=generator()) - q).abs().max() > 0.01


def test_scales_and_order():
    features, weight, p = teacher(3)
    q = pseudo_classes(features, p, S, weight=weight, generator=None)
    torch.testing.assert_close(pseudo_classes(7 * features + 3, p, S, weight=weight, generator=None), q, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(pseudo_classes(features.float(), p.float(), S, weight=weight.float(), generator=None), q, rtol=1e-4, atol=1e-6)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(pseudo_classes(features, p[:, order], S, weight=weight[order], generator=None), q[:, order], rtol=1e-8, atol=1e-12)
    sharp = pseudo_classes(features, p, S, weight=weight, generator=None, beta=0.1)
    torch.testing.assert_close(((q / p[..., None]) ** 3 / ((q / p[..., None]) ** 3).sum(-1, keepdim=True)), sharp / p[..., None])


def test_one_pseudo_class_is_the_class():
    features, weight, p = teacher()
    assert torch.equal(pseudo_classes(features, p, 1, weight=weight, generator=generator()), p.unsqueeze(-1))


def test_planted_subclasses_are_found():
    """Four clouds a class that the teacher does not tell apart; the likeliest pseudo-class tells most."""
    rng = torch.Generator().manual_seed(0)
    labels, planted = torch.arange(800) % 2, torch.arange(800) // 2 % 4
    clouds = 3 * torch.randn(2, 4, 16, generator=rng)
    features = clouds[labels, planted] + 0.5 * torch.randn(800, 16, generator=rng)
    weight = torch.zeros(2, 16)
    weight[1, 0] = 4.0
    features[:, 0] = 2.0 * labels - 1
    p = (features @ weight.T).softmax(-1)
    purities = []
    for seed in range(5):
        likeliest = pseudo_classes(features, p, 4, weight=weight, generator=torch.Generator().manual_seed(seed))[torch.arange(800), labels].argmax(-1)
        counts = torch.zeros(2, 4, 4).index_put((labels, likeliest, planted), torch.ones(800), accumulate=True)
        purities.append(counts.max(-1).values.sum().item() / 800)
    assert sum(purities) / 5 > 0.7, purities


@pytest.mark.parametrize(("groups", "size"), [(2, 1), (2, 3), (6, 1), (1, 6)])
def test_loss_of_merged_outputs(groups, size):
    rng = numpy.random.default_rng(1)
    logits, q = rng.normal(size=(8, groups * size)) * 3, rng.dirichlet(numpy.ones(groups), 8)
    q[0] = numpy.eye(groups)[0]  # zeros count for nothing
    e = numpy.exp(logits / 2)
    student = (e / e.sum(1, keepdims=True)).reshape(8, groups, size).sum(-1)
    expected = 4 * numpy.where(q > 0, q * (numpy.log(q.clip(1e-300)) - numpy.log(student)), 0).sum(1)
    loss = example.loss(torch.tensor(logits), torch.tensor(q), 2.0)
    numpy.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_loss_is_that_of_classes_and_of_pseudo_classes():
    features, weight, p = teacher(3)
    q = pseudo_classes(features, p, S, weight=weight, generator=generator())
    logits = numpy.random.default_rng(2).normal(size=(N, 3, S))
    student = numpy.exp(logits / 2) / numpy.exp(logits / 2).sum((1, 2), keepdims=True)
    of_classes = (p.numpy() * numpy.log(p.numpy() / student.sum(-1))).sum(-1)
    shares, of_student = (q / p[..., None]).numpy(), student / student.sum(-1, keepdims=True)
    of_shares = (p.numpy() * (shares * numpy.log(shares / of_student)).sum(-1)).sum(-1)
    loss = example.loss(torch.tensor(logits).flatten(1), q.flatten(1), 2.0)
    numpy.testing.assert_allclose(loss.numpy(), 4 * (of_classes + of_shares), rtol=1e-9)


def test_a_label_is_a_distribution_with_zeros():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 4, dtype=torch.float64, requires_grad=True), torch.arange(20) % 4
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    loss, expected = example.loss(logits, one_hot, 1), torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(expected.sum(), logits))


def test_accuracy_is_of_the_likeliest_class():
    logits = torch.tensor([[2.0, 1.9, 2.1, 0.0], [0.0, 0.0, 0.4, 0.4]])  # the likeliest output of the first is of class 1
    assert example.accuracy(torch.nn.Identity(), logits, torch.tensor([0, 1])) == 1


def test_errors():
    features, weight, p = teacher()
    options = {"weight": weight, "generator": None}
    with pytest.raises(ValueError, match="none of 60 that the teacher counts to class 1"):
        pseudo_classes(features, torch.tensor([[0.9, 0.1]]).expand(N, 2), S, **options)
    for bad in (torch.nan, torch.inf):
        spoiled = features.clone()
        spoiled[3, 4] = bad
        with pytest.raises(ValueError, match="features must be finite, got 1 of 720"):
            pseudo_classes(spoiled, p, S, **options)
        with pytest.raises(ValueError, match="weight must be finite, got 24 of 24"):
            pseudo_classes(features, p, S, weight=weight * bad, generator=None)
    shapes = ((features[1:], p, weight), (features, p[:, 0], weight), (features[0], p, None), (features, p, weight[:, 1:]), (features, p, weight[:1]))
    for f, q, w in shapes:
        with pytest.raises(ValueError, match=r"weight \[C, d\] are expected, got \["):
            pseudo_classes(f, q, S, weight=w, generator=None)
    for count, beta in ((0, BETA), (S, 0), (S, -1), (S, torch.nan), (S, torch.inf)):
        with pytest.raises(ValueError, match=f"count >= 1 and a positive finite beta are expected, got {count} and {beta}"):
            pseudo_classes(features, p, count, beta=beta, **options)
    with pytest.raises(ValueError, match="probabilities must be finite, got 120 of 120"):
        pseudo_classes(features, p * torch.nan, S, **options)
    for bad in (3 * p, p.log(), torch.tensor([[1.5, -0.5]]).expand(N, 2)):
        with pytest.raises(ValueError, match="probabilities must be distributions, got sums from"):
            pseudo_classes(features, bad, S, **options)


def test_more_pseudo_classes_than_directions():
    features, weight, p = teacher()
    assert pseudo_classes(features, p, D - 1, weight=weight, generator=None).isfinite().all()  # one direction is read
    with pytest.raises(ValueError, match="at most 11, the rank of the"):
        pseudo_classes(features, p, D, weight=weight, generator=None)
    assert pseudo_classes(features, p, D, weight=None, generator=None).isfinite().all()

    of_0, of_1 = (p.argmax(-1) == 0).nonzero().flatten(), (p.argmax(-1) == 1).nonzero().flatten()
    rows = torch.cat([of_0[:4], of_1[:10]])  # four rows differ from their mean in three directions
    assert pseudo_classes(features[rows], p[rows], 3, weight=weight, generator=None).isfinite().all()
    with pytest.raises(ValueError, match="at most 3, the rank of the 4 examples of class 0, got 4"):
        pseudo_classes(features[rows], p[rows], 4, weight=weight, generator=None)
    for constant in (features[:1].expand(N, D), torch.full_like(features, 0.1), torch.zeros_like(features)):
        with pytest.raises(ValueError, match="at most 0"):
            pseudo_classes(constant, p, 1, weight=weight, generator=None)


NAMES = ["the teacher", "labels", "distillation", "LELP", "LELP without rotation", "LELP without null space"]
NAMES += ["LELP, other features", "class sums only", "the ten digits"]


def run_main(monkeypatch, capsys, *options):
    """{name: (accuracy in %, by how much LELP is better)}, as printed."""
    monkeypatch.setattr(sys, "argv", ["few_class_distillation.py", *options])
    threads = torch.get_num_threads()
    try:
        example.main()
    finally:
        torch.set_num_threads(threads)
    rows = re.findall(r"^(\S.*?) +(\d+\.\d\d)% +\d+\.\d\d(?: +([+-]\d+\.\d\d) \+- \d+\.\d\d)?$", capsys.readouterr().out, flags=re.M)
    return {name: (float(accuracy), float(better or 0)) for name, accuracy, better in rows}


def test_it_runs(monkeypatch, capsys):
    table = run_main(monkeypatch, capsys, "--seeds", "2", "--epochs", "25", "--transfer", "120", "--subclasses", "3", "--hidden", "8")
    assert list(table) == NAMES
    assert table["the teacher"][0] > 95
    assert all(accuracy > 60 for accuracy, _ in table.values())  # two classes of equal size
    for accuracy, better in table.values():
        assert abs(table["LELP"][0] - accuracy - better) < 0.02


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "1", "--seeds must be from 2 to 1000, got 1"),
        ("--transfer", "1298", "--transfer must be from 2 to 1297, got 1298"),
        ("--hidden", "-1", "--hidden must be from 0 to 4096, got -1"),
        ("--subclasses", "0", "--subclasses must be from 1 to 128, got 0"),
        ("--epochs", "0", "--epochs must be from 1 to 10000, got 0"),
        ("--temperature", "0", "--temperature must be from 0.1 to 100, got 0.0"),
        ("--temperature", "inf", "--temperature must be from 0.1 to 100, got inf"),
        ("--beta", "nan", "--beta must be from 0.01 to 100, got nan"),
    ],
)
def test_bad_options(monkeypatch, capsys, option, value, message):
    monkeypatch.setattr(sys, "argv", ["few_class_distillation.py", option, value])
    with pytest.raises(SystemExit):
        example.main()
    assert message in capsys.readouterr().err


def test_too_few_images_get_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["few_class_distillation.py", "--transfer", "6", "--subclasses", "9"])
    with pytest.raises(SystemExit, match="few_class_distillation.py: --transfer 6 --subclasses 9: count must be at most"):
        example.main()


@pytest.mark.slow
@pytest.mark.skipif(not EVERY_CASE, reason="a minute; RLKERN_EVERY_CASE=1 runs it")
def test_pseudo_classes_help_a_linear_student(monkeypatch, capsys):
    table = run_main(monkeypatch, capsys)
    assert table["distillation"][1] >= 2 and table["LELP, other features"][1] >= 2
    assert table["the ten digits"][1] < 0 and table["the teacher"][1] < 0
