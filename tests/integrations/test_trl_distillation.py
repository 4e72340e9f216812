"""TRL's distillation losses, its own against those that patch() puts there, and both against float64."""

import importlib
import math
import subprocess
import sys

import pytest
import torch

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from torch.nn.functional import kl_div  # noqa: E402
from trl.trainer import distillation_trainer, utils  # noqa: E402
from trl.trainer.base_trainer import _BaseTrainer  # noqa: E402

import rlkern.integrations.trl as integration  # noqa: E402
from rlkern.integrations.patching import Patch  # noqa: E402
from rlkern.integrations.trl import distillation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*trl.experimental")
TRAINERS = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}


def trainer(name: str) -> type:
    return getattr(importlib.import_module(f"trl.experimental.{name}"), TRAINERS[name])


def rows(*lead, vocab=41, dtype=torch.float64, noise=1.0):
    g = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(*lead, vocab, generator=g, dtype=torch.float64)
    student = teacher + noise * torch.randn(*lead, vocab, generator=g, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def labels(*lead):
    made = torch.arange(torch.Size(lead).numel()).view(lead) % 40
    return made.masked_fill(made % 3 == 1, -100)


def both(name, *args, **options):
    """(loss, gradient) of TRL's own function and of ours."""
    cls, results = trainer(name), []
    for patched in (False, True):
        student = args[0].detach().clone().requires_grad_()
        with integration.patch() if patched else Patch([]):
            loss = cls.generalized_jsd_loss(student, *args[1:], **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), student)))
    return results


# --- from logits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"labels": labels(3, 5), "num_items_in_batch": 7},
        {"labels": labels(3, 5), "num_items_in_batch": torch.tensor(7.0), "temperature": 0.7},
        {"labels": labels(3, 5)},
        {"labels": labels(3, 5), "reduction": "sum"},
        {"labels": labels(3, 5), "reduction": "mean"},
        {"temperature": 1.7},
        {"reduction": "mean"},
        {"labels": labels(3, 5), "reduction": "none"},
    ],
    ids=lambda o: ", ".join(f"{k}={v}" for k, v in o.items() if k != "labels") + ("" if "labels" in o else ", no labels"),
)
def test_losses_from_logits_are_trls(name, beta, options):
    student, teacher = rows(3, 6)
    stock, ours = both(name, student[:, :-1], teacher[:, :-1], beta=beta, **options)
    torch.testing.assert_close(ours, stock, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("options", [{"num_items_in_batch": 7}, {"reduction": "mean"}, {"temperature": 0.6}], ids=str)
def test_top_k_of_iw_opd(beta, add_tail, options):
    student, teacher = rows(3, 5)
    stock, ours = both("iw_opd", student, teacher, labels(3, 5), beta, top_k=4, add_tail=add_tail, **options)
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)
    stock, ours = both("iw_opd", student, teacher, None, beta, top_k=41)  # all of the vocabulary
    torch.testing.assert_close(ours, stock, rtol=1e-11, atol=1e-13)


def test_two_dimensions_and_probabilities_of_gold():
    student, teacher = rows(7)
    stock, ours = both("gold", student, teacher, beta=0.5)
    torch.testing.assert_close(ours, stock, rtol=1e-11, atol=1e-13)
    stock, ours = both("gold", student.detach().softmax(-1), teacher.softmax(-1), beta=0.5, logits_are_probs=True)
    assert stock[0] == ours[0] and torch.equal(stock[1], ours[1])


def test_no_label_at_all_and_a_teacher_that_trains():
    student, teacher = rows(2, 3)
    stock, ours = both("gkd", student, teacher, torch.full((2, 3), -100))
    assert ours[0] == stock[0] == 0 and not ours[1].any()
    teacher.requires_grad_()
    grads = []
    for patched in (False, True):
        with integration.patch() if patched else Patch([]):
            grads.append(torch.autograd.grad(trainer("gkd").generalized_jsd_loss(student, teacher), (student, teacher)))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closer_to_float64_than_trls(beta, dtype):
    """A student that is near its teacher, as at the end of a run."""
    student, teacher = rows(16, 8, vocab=2001, noise=1e-2, dtype=dtype)
    exact = both("gkd", student.double(), teacher.double(), beta=beta)[0]
    stock, ours = both("gkd", student, teacher, beta=beta)
    errors = [((loss.double() - exact[0]).abs() / exact[0]).item() for loss, _ in (stock, ours)]
    slopes = [((g.double() - exact[1]).norm() / exact[1].norm()).item() for _, g in (stock, ours)]
    assert errors[1] < 3e-6 and errors[1] < errors[0] / 10, errors
    assert slopes[1] < (2**-8 if dtype == torch.bfloat16 else 1e-4) and slopes[1] <= slopes[0], slopes


def test_a_masked_vocabulary_is_no_nan():
    student, teacher = rows(2, 3)
    hidden = torch.arange(41) >= 35
    student, teacher = (x.detach().masked_fill(hidden, -math.inf) for x in (student, teacher))
    stock, ours = both("gkd", student, teacher)
    exact, _ = both("gkd", student[..., :35], teacher[..., :35])
    assert stock[0].isnan()
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours[1][..., :35], exact[1], rtol=1e-11, atol=1e-13)


# --- from hidden states -------------------------------------------------------------------------------------

WIDTHS, V = (12, 7), 53


def heads(dtype=torch.float64, bias=True, noise=None):
    """Hidden states [2, 6, H] and heads of student and teacher; with noise, of the student moved."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student = normal(2, 6, WIDTHS[0]), normal(V, WIDTHS[0]), normal(V) if bias else None
    teacher = normal(2, 6, WIDTHS[1]), normal(V, WIDTHS[1]), normal(V) if bias else None
    if noise is not None:
        teacher = student[0] + noise * normal(*student[0].shape), *student[1:]
    student, teacher = ([None if x is None else x.to(dtype).clone() for x in side] for side in (student, teacher))
    return [None if x is None else x.requires_grad_() for x in student], teacher


MASK = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1]])


def chunked(student, teacher, beta, mask=MASK, **options):
    first = {"chunk_size": 4} if hasattr(distillation_trainer, "_chunk") else {}  # TRL 1.14
    function, weights = distillation_trainer._chunked_divergence_loss, (student[1], teacher[1])
    biases = {"student_lm_head_bias": student[2], "teacher_lm_head_bias": teacher[2]}
    return function(student[0], teacher[0], *weights, mask, beta, **first, **biases, **options)


def formula(student, teacher, beta, mask=MASK, num_items_in_batch=None, temperature=1.0, scales=(1.0, 1.0), caps=(math.inf, math.inf)):
    """(loss, sum of entropies, tokens), in the dtype of what is given."""
    z = (torch.nn.functional.linear(*side) * scale for side, scale in zip((student, teacher), scales, strict=True))
    capped = (x if cap == math.inf else cap * (x / cap).tanh() for x, cap in zip(z, caps, strict=True))
    l, m = ((x / temperature).log_softmax(-1) for x in capped)  # noqa: E741
    p, q = l.exp(), m.exp()
    if beta in (0, 1):
        per_token = (q * (m - l) if beta == 0 else p * (l - m)).sum(-1)
    else:
        mix = ((1 - beta) * p + beta * q).log()
        per_token = sum(w * kl_div(mix, x, reduction="none", log_target=True).sum(-1) for w, x in ((beta, m), (1 - beta, l)))
    tokens = mask.sum()
    loss = (per_token * mask).sum() / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    return loss, (-(p * l).sum(-1) * mask).sum(), tokens


def differentiated(result, student):
    return *(x.detach() for x in result), *torch.autograd.grad(result[0], [x for x in student if x is not None])


needs_cpu = pytest.mark.skipif(
    hasattr(distillation_trainer, "ChunkedDivergenceFunction") is False and not hasattr(distillation_trainer, "_chunk"),
    reason="TRL 1.15's own runs on a CPU in Triton's interpreter only",
)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_items_in_batch": torch.tensor(9)}, {"num_items_in_batch": 5, "temperature": 0.7}, {"scales": (0.5, 2.0), "temperature": 1.3}]
    + [{"caps": (3.0, math.inf), "scales": (0.5, 2.0)}, {"caps": (math.inf, 2.0)}, {"caps": (4.0, 2.5), "temperature": 0.8}],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_from_hidden_states(beta, options, bias):
    student, teacher = heads(bias=bias)
    trls = {k: v for k, v in options.items() if k not in ("scales", "caps")}
    if "scales" in options:
        trls |= dict(zip(("student_logit_scale", "teacher_logit_scale"), options["scales"], strict=True))
    if "caps" in options:
        caps = (None if cap == math.inf else cap for cap in options["caps"])
        trls |= dict(zip(("student_final_logit_softcapping", "teacher_final_logit_softcapping"), caps, strict=True))
    with integration.patch():
        ours = differentiated(chunked(student, teacher, beta, **trls), student)
    torch.testing.assert_close(ours, differentiated(formula(student, teacher, beta, **options), student), rtol=1e-10, atol=1e-12)


@needs_cpu
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_from_hidden_states_is_closer_to_float64_than_trls(beta, dtype):
    student, teacher = heads(dtype, bias=False, noise=1e-3 if dtype == torch.float32 else 2e-2)
    exact = [[None if x is None else x.detach().double().requires_grad_() for x in side] for side in (student, teacher)]
    expected = differentiated(formula(*exact, beta), exact[0])
    stock = differentiated(chunked(student, teacher, beta), student)
    with integration.patch():
        ours = differentiated(chunked(student, teacher, beta), student)
    errors = [((r[0].double() - expected[0]).abs() / expected[0]).item() for r in (stock, ours)]
    assert errors[1] < 2e-4 and errors[1] < errors[0] / 3, errors
    for a, b, c in zip(stock[3:], ours[3:], expected[3:], strict=True):
        wrong = [((g.double() - c).norm() / c.norm()).item() for g in (a, b)]
        assert wrong[1] < max(1.5 * wrong[0], 2e-6), wrong  # the logits round alike
    assert ours[2] == stock[2]
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize("options", [{"teacher_logit_scale": 0.0}, {"student_logit_scale": -1.0}], ids=str)
def test_what_rlkern_lacks_is_trls_own(options):
    student, teacher = heads(torch.float32)
    stock = differentiated(chunked(student, teacher, 0.5, **options), student)
    with integration.patch():
        ours = differentiated(chunked(student, teacher, 0.5, **options), student)
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


def test_a_rank_without_tokens_and_a_float32_head():
    student, teacher = heads()
    with integration.patch():
        loss, entropy, tokens = chunked(student, teacher, 0.5, mask=torch.zeros_like(MASK))
        assert (loss, entropy, tokens) == (0, 0, 0) and not any(g.any() for g in torch.autograd.grad(loss, student))
        mixed = [student[0].bfloat16(), student[1].float(), student[2].float()]
        under = chunked(mixed, [x.bfloat16() for x in teacher], 0.5)[0]
        expected = formula([x.bfloat16().double() for x in mixed], [x.bfloat16().double() for x in teacher], 0.5)[0]
    torch.testing.assert_close(under.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_with_padded_vocabulary():
    """TRL reads as many of its rows as the student has."""
    student, teacher = heads()
    wider = [teacher[0], torch.cat([teacher[1], torch.full((11, WIDTHS[1]), math.nan)]), torch.cat([teacher[2], torch.zeros(11)])]
    with integration.patch():
        assert torch.equal(chunked(student, wider, 0.5)[0], chunked(student, teacher, 0.5)[0])
        with pytest.raises(ValueError, match=r"vocab must be at most the rows of weight \(53\) and of other_weight \(50\)"):
            chunked(student, [teacher[0], teacher[1][:50], teacher[2][:50]], 0.5)


# --- patch --------------------------------------------------------------------------------------------------


def own(cls) -> object:
    return vars(cls)["generalized_jsd_loss"]


def test_patch_replaces_and_puts_back_the_same_objects():
    classes = [trainer(name) for name in TRAINERS]
    before = [*map(own, classes), distillation_trainer._chunked_divergence_loss]

    def now():
        return [*map(own, classes), distillation_trainer._chunked_divergence_loss]

    def is_ours(x):
        return getattr(x, "__func__", x).__module__ == distillation.__name__

    with integration.patch():
        first = now()
        assert all(map(is_ours, first)) and all(isinstance(x, staticmethod) for x in first[:3])
        with integration.patch():
            assert all(a is b or a.__func__ is b.__func__ for a, b in zip(now(), first, strict=True))
        assert all(a is b for a, b in zip(now(), first, strict=True))
    assert all(a is b for a, b in zip(now(), before, strict=True)) and "__init_subclass__" not in vars(_BaseTrainer)
    one, two = integration.patch(), integration.patch()
    one.undo()
    assert all(map(is_ours, now()))
    two.undo()
    assert all(a is b for a, b in zip(now(), before, strict=True)) and "__init_subclass__" not in vars(_BaseTrainer)


def reloaded(name):
    for module in [m for m in sys.modules if m.startswith(f"trl.experimental.{name}")]:
        del sys.modules[module]
    return trainer(name)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_trainer_imported_while_patched_is_patched_and_restored(order):
    patches = [integration.patch(), integration.patch()]
    late = reloaded("gkd")
    assert own(late).__func__.__module__ == distillation.__name__
    patches[order[0]].undo()
    assert own(late).__func__.__module__ == distillation.__name__
    patches[order[1]].undo()
    assert own(late).__func__.__module__ == late.__module__ and "__init_subclass__" not in vars(_BaseTrainer)
    assert own(reloaded("gkd")).__func__.__module__ == late.__module__


def test_the_users_own_trainer_is_left_alone():
    base = trainer("gkd")

    class GKDTrainer(base):
        @staticmethod
        def generalized_jsd_loss(*args, **kwargs):
            return "mine"

    before = own(GKDTrainer)
    with integration.patch():

        class Later(base):
            @staticmethod
            def generalized_jsd_loss(*args, **kwargs):
                return "mine too"

        assert own(GKDTrainer) is before and Later.generalized_jsd_loss() == "mine too"

        class Inherits(base):
            pass

        assert Inherits.generalized_jsd_loss.__module__ == distillation.__name__


def test_a_known_release_with_other_arguments_is_refused():
    cls = trainer("gkd")
    stand = [(distillation_trainer, "_chunked_divergence_loss", lambda logits: None)], [(cls, "generalized_jsd_loss", staticmethod(lambda x: None))]
    for replaced, name in zip(stand, ("_chunked_divergence_loss", "GKDTrainer.generalized_jsd_loss"), strict=True):
        with Patch(replaced), pytest.raises(integration.UnknownTRLError, match=f"the arguments of its {name} are"):
            integration.patch()
        assert utils.selective_log_softmax.__module__ == "trl.trainer.utils" and "__init_subclass__" not in vars(_BaseTrainer)


def test_patch_does_not_import_what_is_experimental():
    code = "import sys, rlkern.integrations.trl as t; t.patch(); print([m for m in sys.modules if m.startswith('trl.experimental.g')])"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
