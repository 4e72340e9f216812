"""DistillationTrainer and GKDTrainer in float32, stock and patched, each step's loss against float64."""

import importlib
import math

import pytest
import torch

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

import trl_runs  # noqa: E402
from test_trl_distillation import formula  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

import rlkern.integrations.trl as integration  # noqa: E402
from rlkern.integrations.patching import Patch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*trl.experimental")
cpu = pytest.mark.skipif(
    not hasattr(distillation_trainer, "ChunkedDivergenceFunction") and not hasattr(distillation_trainer, "_chunk"),
    reason="TRL 1.15's own loss runs on a CPU in Triton's interpreter only",
)


def gkd_in_float64(stock, exact):
    """The function of logits that stands there, noting what TRL's own gives of the same in float64."""
    cls = importlib.import_module("trl.experimental.gkd").GKDTrainer
    current = cls.generalized_jsd_loss

    def recording(student_logits, teacher_logits, **options):
        with torch.no_grad():
            exact.append(stock(student_logits.double(), teacher_logits.double(), **options).item())
        return current(student_logits=student_logits, teacher_logits=teacher_logits, **options)

    return cls, "generalized_jsd_loss", staticmethod(recording)


def distillation_in_float64(stock, exact):
    current = distillation_trainer._chunked_divergence_loss

    def recording(student, teacher, weight, other_weight, mask, beta, *args, num_items_in_batch=None, temperature=1.0, **options):
        sides = ([student.double(), weight.double(), None], [teacher.double(), other_weight.double(), None])
        with torch.no_grad():
            exact.append(formula(*sides, beta, mask, num_items_in_batch, temperature)[0].item())
        options |= {"num_items_in_batch": num_items_in_batch, "temperature": temperature}
        return current(student, teacher, weight, other_weight, mask, beta, *args, **options)

    return distillation_trainer, "_chunked_divergence_loss", recording


VARIANTS = {
    "gkd": (trl_runs.gkd, gkd_in_float64, {}),
    "gkd, forward kl, accumulation": (trl_runs.gkd, gkd_in_float64, {"beta": 0.0, "gradient_accumulation_steps": 2, "max_steps": 4}),
    "distillation": pytest.param(trl_runs.distillation, distillation_in_float64, {}, marks=cpu),
    "distillation, jsd, accumulation": pytest.param(
        trl_runs.distillation, distillation_in_float64, {"beta": 0.5, "gradient_accumulation_steps": 2, "max_steps": 4}, marks=cpu
    ),
}


@pytest.mark.parametrize(("run", "in_float64", "options"), VARIANTS.values(), ids=VARIANTS)
def test_steps_stock_against_patched(tiny_model, run, in_float64, options):
    teacher, errors, runs = trl_runs.moved(tiny_model, 1e-3), [], []
    stock = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    for patched in (False, True):
        exact: list[float] = []
        with integration.patch() if patched else Patch([]), Patch([in_float64(stock, exact)]):
            runs.append(run(tiny_model, teacher, **options))
        micro = options.get("gradient_accumulation_steps", 1)
        assert len(exact) == options.get("max_steps", trl_runs.STEPS) * micro
        sums = [sum(exact[i : i + micro]) for i in range(0, len(exact), micro)]
        errors.append(max(abs(step.loss - x) / abs(x) for step, x in zip(runs[-1].steps, sums, strict=True)))
    print(f"\nlargest relative error of a loss of about {runs[1].steps[0].loss:.1e}: stock {errors[0]:.1e}, patched {errors[1]:.1e}")
    assert errors[1] < 1e-5 and errors[1] < errors[0], errors
    trl_runs.assert_same(*runs, rtol=2 * errors[0] + 1e-5, gradient_rtol=2e-2)
    for a, b in zip(*(r.steps for r in runs), strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        assert math.isclose(a.metrics.get("entropy", 0), b.metrics.get("entropy", 0), rel_tol=1e-3)
