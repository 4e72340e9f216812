"""Top-K distillation in verl: rlkern's losses through verl's own functions, against verl's and float64."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed (requirements-trainers.txt)", allow_module_level=True)

from tensordict import TensorDict
from verl.trainer.distillation import losses as verl_losses
from verl.trainer.distillation.fsdp import losses as fsdp
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig

from rlkern.integrations import verl_distillation

B, T, V, K = 3, 4, 41, 6
LENGTHS = (7, 5, 6)  # of prompt and response


@pytest.fixture(autouse=True)
def registered():
    verl_distillation.register()
    yield
    verl_distillation.unregister()


def configs(mode, **loss):
    own = DistillationLossConfig(loss_mode=mode, topk=K, use_policy_gradient=False, use_task_rewards=False, **loss)
    actor = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, strategy="fsdp")
    return actor, DistillationConfig(enabled=False, distillation_loss=own)


def draw(dtype=torch.float64, noise=0.5, scale=3.0):
    """Packed student logits [1, N, V], the teacher's [N, V] and its top K, nested as in verl."""
    g = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    teacher = scale * torch.randn(n, V, generator=g, dtype=torch.float64)
    student = (teacher + noise * torch.randn(n, V, generator=g, dtype=torch.float64)).to(dtype)
    top = teacher.log_softmax(-1).to(torch.float64 if dtype == torch.float64 else torch.float32).topk(K)
    logp, ids = (torch.nested.as_nested_tensor(list(x.split(LENGTHS)), layout=torch.jagged) for x in top)
    return student.unsqueeze(0).requires_grad_(), teacher, logp, ids


def data(logp, ids):
    """A micro-batch as verl's engine hands it over: prompts of 3, responses of the rest."""
    responses = [torch.zeros(length - 3, dtype=torch.long) for length in LENGTHS]
    nest = lambda xs: torch.nested.as_nested_tensor(xs, layout=torch.jagged)  # noqa: E731
    fields = {
        "teacher_logprobs": logp,
        "teacher_ids": ids,
        "prompts": nest([torch.zeros(3, dtype=torch.long) for _ in LENGTHS]),
        "responses": nest(responses),
        "response_mask": nest([torch.ones(len(r), dtype=torch.long) for r in responses]),
        "attention_mask": nest([torch.ones(length, dtype=torch.long) for length in LENGTHS]),
        "input_ids": nest([torch.zeros(length, dtype=torch.long) for length in LENGTHS]),
    }
    return TensorDict(fields, batch_size=[B])


def outputs(mode, student, logp, ids, **loss):
    """What verl's logits processor returns."""
    actor, distillation = configs(mode, **loss)
    return verl_losses.distillation_ppo_loss(actor, distillation, data={"teacher_logprobs": logp, "teacher_ids": ids}, student_logits=student)


@pytest.mark.parametrize("loss", [{}, {"log_prob_min_clamp": None}, {"log_prob_min_clamp": -3.0}, {"use_chunked_topk": True}], ids=str)
def test_forward_kl_topk_is_verls(loss):
    student, _, logp, ids = draw()
    theirs, ours = (outputs(f"{prefix}forward_kl_topk", student, logp, ids, **loss) for prefix in ("", "rlkern_"))
    assert list(ours) == list(theirs)
    # verl's divergence is in float32
    torch.testing.assert_close({k: v.double() for k, v in ours.items()}, {k: v.double() for k, v in theirs.items()}, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(x["distillation_losses"].cos().sum(), student)[0] for x in (theirs, ours)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_kl_topk_is_closer_to_float64_than_verls(dtype):
    student, _, logp, ids = draw(dtype, noise=1e-2)
    wide, at, m = student.detach().double().requires_grad_(), ids.values(), logp.values().double()
    exact = (m.exp() * (m - wide[0].log_softmax(-1).gather(-1, at))).sum(-1)
    theirs, ours = (outputs(f"{prefix}forward_kl_topk", student, logp, ids)["distillation_losses"] for prefix in ("", "rlkern_"))
    errors = [(x[0].double() - exact).abs().max().item() for x in (theirs, ours)]
    slopes = [torch.autograd.grad(x.sum(), leaf)[0].double() for x, leaf in ((theirs, student), (ours, student), (exact, wide))]
    wrong = [(x - slopes[2]).norm().item() for x in slopes[:2]]
    assert errors[1] < 2e-6 and errors[1] <= errors[0], errors
    assert wrong[1] <= 1.01 * wrong[0], wrong


def formula(teacher, student, ids, kind, beta=0.5):
    """Over K ids and all others as one, from probabilities."""
    both = []
    for x in (student, teacher):
        p = x.softmax(-1)
        listed = p.gather(-1, ids)
        rest = p.scatter(-1, ids, 0).sum(-1, keepdim=True)
        both.append(torch.cat([listed, rest], -1))
    p, q = both
    forward, reverse = (q * (q / p).log()).sum(-1), (p * (p / q).log()).sum(-1)
    mix = beta * q + (1 - beta) * p
    jsd = (beta * q * (q / mix).log() + (1 - beta) * p * (p / mix).log()).sum(-1)
    return {"forward_kl": forward, "reverse_kl": reverse, "mixed_kl": beta * forward + (1 - beta) * reverse, "jsd": jsd}[kind]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "mixed_kl", "jsd"])
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_buckets_against_the_formula(kind, beta):
    verl_distillation.register(beta=beta)
    student, teacher, logp, ids = draw()
    found = outputs(f"rlkern_{kind}_bucket", student, logp, ids, log_prob_min_clamp=None)
    wide = student.detach().clone().requires_grad_()
    exact = formula(teacher, wide[0], ids.values(), kind, beta)
    torch.testing.assert_close(found["distillation_losses"][0], exact, rtol=1e-9, atol=1e-11)
    slopes = [torch.autograd.grad(x.cos().sum(), leaf)[0] for x, leaf in ((found["distillation_losses"], student), (exact, wide))]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-11)


def test_a_bucket_mends_what_verl_clamps_away():
    """A student with more mass on the teacher's ids than the teacher: negative sums, which verl sets to 0."""
    student, teacher, logp, ids = draw(torch.float32, noise=0.0)
    with torch.no_grad():
        student[0].scatter_add_(-1, ids.values(), torch.full((sum(LENGTHS), K), 1.5))
    verls, bucket = (outputs(mode, student, logp, ids)["distillation_losses"] for mode in ("forward_kl_topk", "rlkern_forward_kl_bucket"))
    assert (verls < 0).all() and (bucket > 0).all()
    (slope,) = torch.autograd.grad(bucket.sum(), student)
    assert (slope[0].gather(-1, ids.values()).sum(-1) > 0).all()  # downhill, the student gives some back


@pytest.mark.parametrize("mode", [f"rlkern_{name}" for name in verl_distillation.LOSSES])
def test_padding_rows_do_no_harm(mode):
    """verl pads with one id K times, of log-probability 0. The loss masks them: no NaN may come back."""
    student, _, logp, ids = draw(torch.float32)
    logp.values()[7:12], ids.values()[7:12] = 0, 3
    losses = outputs(mode, student, logp, ids)["distillation_losses"]
    kept = torch.ones(sum(LENGTHS), dtype=torch.bool)
    kept[7:12] = False
    (slope,) = torch.autograd.grad(torch.where(kept, losses, 0).sum(), student)
    assert slope.isfinite().all() and not slope[0, 7:12].any() and losses[0, kept].isfinite().all()


def test_the_loss_and_its_metrics_come_out_of_verl():
    student, _, logp, ids = draw(torch.float32)
    mode = "rlkern_forward_kl_bucket"
    actor, distillation = configs(mode)
    model_output = {k: torch.nested.nested_tensor_from_jagged(v[0], logp.offsets()) for k, v in outputs(mode, student, logp, ids).items()}
    values, metrics = verl_losses.get_distillation_loss_fn(mode)(actor, distillation, model_output, data(logp, ids))
    theirs, others = verl_losses.get_distillation_loss_fn("forward_kl_topk")(actor, distillation, model_output, data(logp, ids))
    assert torch.equal(values, theirs) and metrics.keys() == others.keys() and "distillation/overlap_ratio" in metrics
    assert verl_losses.get_distillation_loss_settings(mode).use_topk


def test_register_and_unregister():
    stock = [verl_losses.DISTILLATION_LOSS_REGISTRY, verl_losses.DISTILLATION_SETTINGS_REGISTRY]
    verl_distillation.unregister()
    before, function = [dict(x) for x in stock], fsdp.compute_forward_kl_topk
    assert function.__module__ == fsdp.__name__
    assert verl_distillation.register("jsd_bucket") == ("rlkern_jsd_bucket",)
    assert verl_distillation.register() == tuple(f"rlkern_{name}" for name in verl_distillation.LOSSES)
    student, _, logp, ids = draw()
    assert torch.equal(  # verl's own goes on as before
        outputs("forward_kl_topk", student, logp, ids)["distillation_losses"],
        function(student, logp, ids, configs("forward_kl_topk")[1], "thd")["distillation_losses"],
    )
    verl_distillation.unregister()
    assert [dict(x) for x in stock] == before and fsdp.compute_forward_kl_topk is function
    verl_distillation.unregister()


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="unknown distillation loss 'kl', expected one of 'forward_kl_topk', 'forward_kl_bucket'"):
        verl_distillation.register("kl")
    with pytest.raises(ValueError, match="beta is a fraction"):
        verl_distillation.register(beta=2.0)
    with pytest.raises(ValueError, match=r"beta of 'jsd_bucket' must be in \(0, 1\), got 0"):
        verl_distillation.register(beta=0)
    assert verl_distillation.register("mixed_kl_bucket", beta=0)
    with pytest.raises(ValueError, match="Unsupported loss mode: rlkern_jsd_bucket"):
        configs("rlkern_jsd_bucket")
    monkeypatch.setattr("verl.__version__", "0.7.0")
    with pytest.raises(ImportError, match=r"verl 0\.7\.0 is not supported by rlkern\.integrations\.verl_distillation"):
        verl_distillation.register()
    monkeypatch.undo()
