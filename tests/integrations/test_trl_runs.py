"""TRL's trainers for 20 steps, stock against patched; rlkern's losses against TRL's own or a formula."""

import functools
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

import trl_runs  # noqa: E402
from trl.trainer import utils  # noqa: E402

import rlkern  # noqa: E402
import rlkern.integrations.trl as integration  # noqa: E402
from rlkern.integrations.trl import versions  # noqa: E402

ops = importlib.import_module("rlkern.primitives.token_stats")  # the package has a function of that name
linear = importlib.import_module("rlkern.primitives.linear")
needs_fused_head = pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="DPOTrainer needs TRL 1.15")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The rows that go through rlkern's kernels, call by call."""
    seen = []

    def counted(original):
        def counting(rows, *args, **options):
            seen.append(rows.shape[:-1].numel())
            return original(rows, *args, **options)

        return counting

    for module, name in ((ops, "row_stats"), (linear, "_linear_token_stats")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return seen


# --- stock against patched ----------------------------------------------------------------------------------

VARIANTS = {
    "dpo": (trl_runs.dpo, {}),
    "dpo, lora": (trl_runs.dpo, {"lora": True}),
    "dpo, checkpointing": (trl_runs.dpo, {"gradient_checkpointing": True}),
    "dpo, three losses, accumulation": (
        trl_runs.dpo,
        {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1, 0.2, 0.01], "gradient_accumulation_steps": 2},
    ),
    "grpo": (trl_runs.grpo, {}),
    "grpo, off-policy, kl, entropy bonus": (trl_runs.grpo, {"num_iterations": 2, "beta": 0.1, "entropy_coef": 0.01}),
    "grpo, lora": (trl_runs.grpo, {"lora": True, "num_iterations": 2, "beta": 0.1}),
    "grpo, checkpointing": (trl_runs.grpo, {"gradient_checkpointing": True, "num_iterations": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_stock_against_patched(tiny_model, calls, variant):
    run, options = VARIANTS[variant]
    stock = run(tiny_model, **options)
    assert not calls
    with integration.patch():
        patched = run(tiny_model, **options)
    assert len(calls) >= trl_runs.STEPS
    assert len(stock.steps) == trl_runs.STEPS
    trl_runs.assert_same(stock, patched)
    for a, b in zip(stock.steps, patched.steps, strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        for key in ("entropy", "logps/chosen", "rewards/margins", "mean_token_accuracy", "logits/rejected", "kl", "clip_ratio/region_mean"):
            assert math.isclose(a.metrics.get(key, 0), b.metrics.get(key, 0), rel_tol=1e-4, abs_tol=1e-5), key
    assert (stock.weights - patched.weights).norm() < 1e-4 * stock.weights.norm()


@pytest.mark.parametrize("run", [trl_runs.dpo, trl_runs.grpo], ids=["dpo", "grpo"])
def test_bfloat16(tiny_model, calls, run):
    """One step, before rounding of the weights drives the runs apart."""
    options = {"max_steps": 1, "model_init_kwargs": {"dtype": "bfloat16"}}
    stock = run(tiny_model, **options)
    with integration.patch():
        patched = run(tiny_model, **options)
    assert calls
    trl_runs.assert_same(stock, patched, rtol=2**-7, gradient_rtol=2**-6)


def test_a_trainer_that_exists_is_patched_and_released(tiny_model, calls):
    stock = trl_runs.dpo(tiny_model, max_steps=2)
    trainer, model = stock.trainer, stock.trainer.model
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer.compute_loss(model, batch).item()
    assert not calls
    with pytest.raises(ZeroDivisionError, match="in the block"), integration.patch():
        assert math.isclose(trainer.compute_loss(model, batch).item(), before, rel_tol=1e-5)
        assert calls
        raise ZeroDivisionError("in the block")
    calls.clear()
    assert trainer.compute_loss(model, batch).item() == before and not calls


def test_the_page_runs_and_names_what_exists(calls, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "trainers" / "trl.md").read_text()
    patches, patch = [], integration.patch
    monkeypatch.setattr(integration, "patch", lambda: patches.append(patch()))
    try:
        exec(re.search(r"```python\n(.*?)```", page, flags=re.S)[1], {"__name__": "page"})
    finally:
        [p.undo() for p in patches]
    assert len(patches) == 1 and calls
    assert not [name for name in re.findall(r"\brlkern\.(\w+)", page) if name != "integrations" and not hasattr(rlkern, name)]
    assert not [name for name in integration.POLICY_LOSSES if f"`{name}`" not in page]
    assert all(f"| {major}.{minor}" in page for major, minor in versions.REPLACEMENTS)


# --- GRPOTrainer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_grpo_loss_equals_trls_own(tiny_model, loss_type):
    """With accumulation, old policies, KL term and entropy bonus, so that every normalisation matters."""
    options = {"max_steps": 4, "num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.05, "entropy_coef": 0.01}
    options["loss_type"] = loss_type
    stock = trl_runs.grpo(tiny_model, **options)
    ours = trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra={"policy_loss": "grpo"}, **options)
    trl_runs.assert_same(stock, ours)
    for a, b in zip(stock.steps, ours.steps, strict=True):
        kept = a.metrics.keys() - {"clip_ratio/low_min", "clip_ratio/high_max"}
        assert kept <= b.metrics.keys() and {"rlkern/ratio_max", "rlkern/clip_fraction_low"} <= b.metrics.keys()
        for key in kept - {"step_time", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}:
            assert math.isclose(a.metrics[key], b.metrics[key], rel_tol=1e-4, abs_tol=1e-5), key


def test_metrics_are_those_of_all_micro_batches(tiny_model, monkeypatch):
    """3 of 12 and 3 of 4 clipped: 6 of 16, the largest ratio; the next step starts anew."""
    loss = rlkern.ppo_loss

    def clipped(count, tokens, largest):
        d = torch.zeros(1, tokens)
        d[:, :count] = largest
        return loss(d - 2, torch.full_like(d, -2.0), torch.ones(1), torch.ones_like(d)).metrics

    parts = iter([clipped(3, 12, 0.5), clipped(3, 4, 1.0), clipped(0, 10, 0.0), clipped(1, 2, 0.3)])

    @functools.wraps(loss)
    def ppo(logp, *args, **options):
        output = loss(logp, *args, **options)
        return output._replace(metrics=next(parts)) if logp.requires_grad else output

    monkeypatch.setitem(integration.POLICY_LOSSES, "ppo", ppo)
    run = trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra={"policy_loss": "ppo"}, max_steps=2, gradient_accumulation_steps=2)
    for step, clip, largest, tokens in zip(run.steps, (6 / 16, 1 / 12), (math.e, math.exp(0.3)), (16, 12), strict=True):
        for name in ("clip_ratio/high_mean", "clip_ratio/region_mean", "rlkern/clip_fraction_high"):
            assert math.isclose(step.metrics[name], clip, rel_tol=1e-6), name
        assert math.isclose(step.metrics["rlkern/ratio_max"], largest, rel_tol=1e-6) and step.metrics["rlkern/tokens"] == tokens


def test_sapo_loss_equals_trls_own(tiny_model):
    """Under TRL's default loss_type, which a loss that is defined over sequences does not follow."""
    options = {"max_steps": 4, "num_iterations": 2, "gradient_accumulation_steps": 2, "beta": 0.05, "lora": True}
    stock = trl_runs.grpo(tiny_model, loss_type="sapo", **options)
    ours = trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra={"policy_loss": "sapo"}, **options)
    trl_runs.assert_same(stock, ours)


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov", "lp_reg", "nft"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_losses_that_trl_lacks_train(tiny_model, loss, iterations):
    options = {
        "clip_cov": {"select_ratio": 0.3, "cov_low": -1.0},
        "kl_cov": {"select_ratio": 0.2, "select_over": "group"},
        "lp_reg": {"rho": 0.3, "min_p": 0.1},
        "nft": {},
    }[loss]
    extra = {"policy_loss": loss, "policy_loss_options": options}
    with integration.patch():
        run = trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra=extra, max_steps=4, num_iterations=iterations, beta=0.1 * (iterations - 1))
    assert all(math.isfinite(s.loss) and s.gradient.isfinite().all() and s.gradient.norm() > 0 for s in run.steps)
    key = {"nft": "rlkern/success_rate"}.get(loss, "rlkern/selected_fraction")
    assert all(0 <= s.metrics[key] < 1 for s in run.steps) and any(s.metrics[key] for s in run.steps)
    assert "clip_ratio/low_min" not in run.steps[0].metrics


def plain_rows(trainer, model, inputs):
    """float64 log-softmax of the completion's rows, and its tokens, from the model's plain forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    n = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -n - 1 : -1]
    return torch.log_softmax(logits.double() / trainer.temperature, -1), inputs["completion_ids"]


def oracle_of_proxy(rows, ids, min_p):
    """Lp-Reg's q at the tokens: renormalised over those with at least min_p times the largest probability."""
    kept = rows >= rows.amax(-1, keepdim=True) + math.log(min_p)
    q = rows.masked_fill(~kept, -math.inf).log_softmax(-1)
    return q.gather(-1, ids[..., None])[..., 0], torch.where(kept, rows.exp(), 0).sum(-1).log()


def given_to(monkeypatch, name: str) -> list[tuple]:
    """What the trainer hands to the policy loss of that name: a list of (args, options)."""
    seen, original = [], integration.POLICY_LOSSES[name]

    @functools.wraps(original)
    def spy(*args, **options):
        seen.append((args, options))
        return original(*args, **options)

    monkeypatch.setitem(integration.POLICY_LOSSES, name, spy)
    return seen


def stepped(tiny_model, policy_loss, options=None, **config):
    """A trainer after two steps, and a batch as it trains on, from the policy before the second."""
    extra = {"policy_loss": policy_loss, "policy_loss_options": options}
    trainer = trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra=extra, max_steps=2, num_iterations=2, **config).trainer
    trainer.model.train()
    return trainer, dict(trainer._buffered_inputs[0])


def test_lp_reg_is_given_the_old_policys_proxy(tiny_model, monkeypatch):
    trainer, inputs = stepped(tiny_model, "lp_reg", {"min_p": 0.05})
    old = type(trainer.model).from_pretrained(tiny_model, dtype=torch.float32)  # generation was before the first step
    seen = given_to(monkeypatch, "lp_reg")
    trainer._compute_loss(trainer.model, inputs)
    ((logp, old_logp, proxy_logp, advantages, mask), options) = seen[0]
    counted = mask.bool()
    for model, found in ((old, old_logp), (trainer.model, logp)):
        rows, ids = plain_rows(trainer, model, inputs)
        torch.testing.assert_close(found.double()[counted], rows.gather(-1, ids[..., None])[..., 0][counted], atol=1e-4, rtol=1e-4)
    expected, _ = oracle_of_proxy(*plain_rows(trainer, old, inputs), 0.05)
    torch.testing.assert_close(proxy_logp.double()[counted], expected[counted], atol=1e-4, rtol=1e-4)
    assert (proxy_logp[counted] == -math.inf).any() and (proxy_logp[counted] > -math.inf).any()
    assert not torch.allclose(logp[counted], old_logp[counted], atol=1e-3) and logp.requires_grad
    assert torch.equal(advantages, inputs["advantages"]) and options["aggregation"] == "dapo"

    on_policy = {k: v for k, v in inputs.items() if k not in ("old_per_token_logps", "rlkern_old_proxy_logp")}
    trainer._compute_loss(trainer.model, on_policy)
    ((_, old_logp, proxy_logp, *_), _) = seen[1]
    expected, _ = oracle_of_proxy(*plain_rows(trainer, trainer.model, inputs), 0.05)
    assert old_logp is None and not proxy_logp.requires_grad
    torch.testing.assert_close(proxy_logp.double()[counted], expected[counted], atol=1e-4, rtol=1e-4)


def test_lp_reg_full_takes_the_kept_mass_with_its_gradient(tiny_model, monkeypatch):
    extra = {"policy_loss": "lp_reg", "policy_loss_options": {"kl_term": "full", "rho": 0.5, "min_p": 0.1}}
    trainer = trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra=extra, max_steps=2).trainer
    trainer.model.train()
    inputs, seen = dict(trainer._buffered_inputs[0]), given_to(monkeypatch, "lp_reg")
    trainer._compute_loss(trainer.model, inputs)
    ((_, old_logp, _, _, mask), options) = seen[0]
    _, mass = oracle_of_proxy(*plain_rows(trainer, trainer.model, inputs), 0.1)
    counted = mask.bool()
    assert old_logp is None and options["kept_logmass"].requires_grad
    torch.testing.assert_close(options["kept_logmass"].double()[counted], mass[counted], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="kl_term='full' needs the kept set of the current policy"):
        trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra=extra, num_iterations=2)


def in_halves(completions, **kwargs):
    return [None if i == 3 else float(len(c) % 2) for i, c in enumerate(completions)]


def test_nft_is_given_rewards_and_the_groups_success_rate(tiny_model, monkeypatch):
    trainer, _ = stepped(tiny_model, "nft", reward=in_halves)
    texts = trainer._logs["completion"]
    rewards = torch.tensor([[math.nan if r is None else r for r in in_halves(list(texts))]]).view(-1, 4)
    output = trainer._buffered_inputs[0]
    order = [trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True).index(t) for t in texts]
    rates = rewards.nanmean(1, keepdim=True).expand(-1, 4).flatten()
    seen = given_to(monkeypatch, "nft")
    trainer._compute_loss(trainer.model, output)
    ((_, _, success_rate, correct, mask), options) = seen[0]
    for row, (reward, rate) in zip(order, zip(rewards.flatten().tolist(), rates.tolist(), strict=True), strict=True):
        if math.isnan(reward):
            assert not mask[row].any() and output["completion_mask"][row].any()
        else:
            assert correct[row] == reward and math.isclose(success_rate[row], rate, rel_tol=1e-6)
            assert torch.equal(mask[row], output["completion_mask"][row])
    assert "weights" not in options


def test_nft_refuses_rewards_that_are_no_probabilities(tiny_model):
    with pytest.raises(ValueError, match=r"in \[0, 1\], got .* to .*reward functions return 0 or 1"):
        trl_runs.grpo(tiny_model, integration.GRPOTrainer, extra={"policy_loss": "nft"}, reward=lambda completions, **_: [-1.0] * len(completions))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_importance_weights_and_tool_masks_reach_the_loss(tiny_model, monkeypatch, loss_type):
    """As vLLM's correction and tool calls put them into a batch. The completions are shorter than allowed."""
    trainer, inputs = stepped(tiny_model, "ppo", loss_type=loss_type)
    for key in ("completion_ids", "completion_mask", "old_per_token_logps"):
        inputs[key] = inputs[key][:, :6]
    shape = inputs["completion_mask"].shape
    torch.manual_seed(0)
    inputs["importance_sampling_ratio"] = weights = torch.rand(shape)
    inputs["tool_mask"] = tools = (torch.rand(shape) < 0.7).long()
    seen = given_to(monkeypatch, "ppo")
    loss = trainer._compute_loss(trainer.model, inputs)
    ((logp, old_logp, advantages, mask), options) = seen[0]
    assert torch.equal(mask, inputs["completion_mask"] * tools) and options["weights"] is weights
    ratio, a = (logp - old_logp).exp(), advantages[:, None]
    values = weights * torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * mask
    expected = (values.sum(1) / mask.sum(1).clamp(min=1)).mean() if loss_type == "grpo" else values.sum() / (8 * len(values))
    torch.testing.assert_close(loss, expected)


def test_evaluation_takes_the_whole_batch_as_one_window(tiny_model):
    results, options = [], {"max_steps": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_eval_batch_size": 8}
    for trainer, extra in ((trl.GRPOTrainer, {}), (integration.GRPOTrainer, {"policy_loss": "grpo"})):
        made = trl_runs.grpo(tiny_model, trainer, extra=extra, **options).trainer
        torch.manual_seed(0)
        results.append(made.evaluate(trl_runs.prompts().select(range(8)))["eval_loss"])
    assert math.isclose(*results, rel_tol=1e-4, abs_tol=1e-6)


# --- DPOTrainer ---------------------------------------------------------------------------------------------


@needs_fused_head
@pytest.mark.parametrize("options", [{}, {"lora": True}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_dpo_loss_equals_trls_own(tiny_model, options):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, **options}
    stock = trl_runs.dpo(tiny_model, **options)
    ours = trl_runs.dpo(tiny_model, integration.DPOTrainer, extra={"rlkern_loss": "sigmoid"}, **options)
    trl_runs.assert_same(stock, ours)
    for a, b in zip(stock.steps, ours.steps, strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        for key in a.metrics:
            assert math.isclose(a.metrics[key], b.metrics[key], rel_tol=1e-4, abs_tol=1e-5), key


def response_logps(model, batch):
    """float64 sums over the response, [2B], and its tokens' number, from the model's plain forward."""
    logp = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double().log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    return (logp.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask).sum(1), mask.sum(1)


@needs_fused_head
@pytest.mark.parametrize("loss", ["ipo", "ipo_norm", "cdpo", "reference_free"])
def test_dpo_losses_that_trl_lacks(tiny_model, loss):
    name, options = {
        "cdpo": ("sigmoid", {"label_smoothing": 0.2}),
        "reference_free": ("sigmoid", {"reference_free": True}),
    }.get(loss, (loss, None))
    extra = {"rlkern_loss": name, "rlkern_loss_options": options}
    trainer = trl_runs.dpo(tiny_model, integration.DPOTrainer, extra=extra, max_steps=3, beta=0.3).trainer
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = (trainer.precompute_ref_logps, trainer.loss_types, trainer.loss_weights)
    found = trainer.compute_loss(trainer.model, batch)
    assert (trainer.precompute_ref_logps, trainer.loss_types, trainer.loss_weights) == before == (False, ["sigmoid"], [1.0])
    policy, lengths = response_logps(trainer.model, batch)
    reference = response_logps(trainer.ref_model, batch)[0] if loss != "reference_free" else torch.zeros_like(policy)
    ratio = policy - reference
    chosen, rejected = ratio.chunk(2)
    u = 0.3 * (chosen - rejected)
    if loss == "ipo":
        expected = (chosen - rejected - 1 / 0.6).square()
    elif loss == "ipo_norm":
        expected = (chosen / lengths.chunk(2)[0] - rejected / lengths.chunk(2)[1] - 1 / 0.6).square()
    else:
        smoothing = (options or {}).get("label_smoothing", 0)
        expected = -(1 - smoothing) * u.sigmoid().log() - smoothing * (-u).sigmoid().log()
    torch.testing.assert_close(found.double(), expected.mean(), atol=1e-5, rtol=1e-5)
    parameters = list(trainer.model.parameters())
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected.mean(), parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@needs_fused_head
def test_an_error_in_the_model_leaves_the_dpo_trainer_as_it_was(tiny_model):
    trainer = trl_runs.dpo(tiny_model, integration.DPOTrainer, extra={"rlkern_loss": ["sigmoid", "sft"]}, max_steps=1).trainer
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def broken(**kwargs):
        raise MemoryError("in the model")

    with pytest.raises(MemoryError, match="in the model"):
        trainer.compute_loss(broken, batch)
    assert (trainer.precompute_ref_logps, trainer.loss_types, trainer.loss_weights) == (False, ["sigmoid"], [1.0])
    evaluated = trainer.evaluate(trl_runs.pairs().select(range(4)))
    assert math.isfinite(evaluated["eval_loss"]) and "eval_rewards/margins" in evaluated
