"""verl's actor loss on packed responses against verl's own on padded ones, with the same losses."""

import pytest
import torch

pytest.importorskip("verl")
tensordict = pytest.importorskip("tensordict")
from test_verl import config  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402

from rlkern.integrations import verl, verl_packed  # noqa: E402
from rlkern.integrations.verl_packed import packed_ppo_loss, packed_responses  # noqa: E402

PROMPTS, RESPONSES = (3, 1, 2, 5), (4, 1, 6, 2)


def nested(rows):
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged)


def batch(seed=0, response_sizes=RESPONSES, **info):
    g = torch.Generator().manual_seed(seed)
    per_token = {name: nested([torch.randn(n, generator=g) for n in response_sizes]) for name in ("advantages", "ref_log_prob")}
    old = [-torch.rand(n, generator=g) for n in response_sizes]
    fields = per_token | {"old_log_probs": nested(old), "rollout_is_weights": nested([torch.rand(n, generator=g) for n in response_sizes])}
    fields |= {"response_mask": nested([torch.rand(n, generator=g) < 0.8 for n in response_sizes])}
    for name, sizes in (("prompts", PROMPTS), ("responses", response_sizes)):
        fields[name] = nested([torch.zeros(n, dtype=torch.int64) for n in sizes])
    data = tensordict.TensorDict(fields, batch_size=[len(PROMPTS)])
    for name, value in ({"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | info).items():
        data.set_non_tensor(name, value)
    sizes = [p + r for p, r in zip(PROMPTS, response_sizes, strict=True)]
    logp = -torch.rand(sum(sizes), generator=g)
    entropy = nested(torch.rand(sum(sizes), generator=g).split(sizes))
    return data, logp, sizes, entropy


def padded(data):
    """The same batch as verl's RayPPOTrainer has it, NaN where it pads."""
    wide = {name: data[name].to_padded_tensor(float("nan")) for name in ("advantages", "ref_log_prob", "old_log_probs", "rollout_is_weights")}
    wide["response_mask"] = data["response_mask"].to_padded_tensor(False).long()
    wide |= {name: data[name].to_padded_tensor(0) for name in ("prompts", "responses")}
    before = torch.arange(max(PROMPTS)).flip(0) < torch.tensor(PROMPTS)[:, None]
    wide["attention_mask"] = torch.cat([before, torch.arange(max(RESPONSES)) < torch.tensor(RESPONSES)[:, None]], 1).long()
    made = tensordict.TensorDict(wide, batch_size=[len(PROMPTS)])
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        made.set_non_tensor(name, data[name])
    return made


def test_the_same_tokens():
    data, logp, sizes, _ = batch()
    rows, mask = packed_responses(logp, padded(data))
    theirs = no_padding_2_padding(logp, padded(data))
    assert torch.equal(rows[mask], theirs[mask]) and mask.sum() == data["response_mask"].values().sum()
    padded_rows = no_padding_2_padding(nested(logp.split(sizes)), data)
    tokens, pack = packed_responses(nested(logp.split(sizes)), data)
    assert torch.equal(tokens, torch.cat([row[:n] for row, n in zip(padded_rows, RESPONSES, strict=True)]).unsqueeze(0))
    assert pack.cu_seqlens.tolist() == [0, 4, 5, 11, 13]


MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


KINDS = ("kl", "abs", "mse", "low_var_kl", "k1+", "k2+", "k3+")
CASES = [("vanilla", mode) for mode in MODES] + [(name, MODES[1]) for name in ("gspo", "sapo", "geo_mean", "vespo", "kl_cov", "dro")]


def results(loss, data, leaf, entropy, own):
    nested_logp = torch.nested.nested_tensor_from_jagged(leaf, entropy.offsets())
    value, metrics = loss(own, {"log_probs": nested_logp, "entropy": entropy}, data)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient, {k: float(m.aggregate()) if hasattr(m, "aggregate") else m for k, m in metrics.items()}


@pytest.mark.parametrize(("name", "mode", "kind"), [(*case, KINDS[i % len(KINDS)]) for i, case in enumerate(CASES)])
def test_the_same_loss(name, mode, kind):
    """Against verl's own, which pads: a nested batch (without its masked NaN) and a padded one."""
    names = verl.register(name, options={"vespo": {"rollout_is": "token"}} if name == "vespo" else None)
    own = config(policy={"loss_mode": names[0]}, use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type=kind, entropy_coeff=0.1,
                 loss_agg_mode=mode, loss_scale_factor=6.0)  # fmt: skip
    try:
        for info in ({}, {"dp_size": 2, "batch_num_tokens": 20, "global_batch_size": 8}):
            data, logp, _, entropy = batch(**info)
            leaf = logp.requires_grad_()
            expected = results(ppo_loss, data, leaf, entropy, own)
            assert expected[1].abs().max() > 0
            for form in (data, padded(data)):
                torch.testing.assert_close(results(packed_ppo_loss, form, leaf, entropy, own), expected, rtol=1e-5, atol=1e-6)
    finally:
        verl.unregister()


@pytest.mark.parametrize("response_sizes", [(1, 1, 1, 1), (2, 0, 2, 0)], ids=str)
def test_as_many_tokens_as_sequences(response_sizes):
    """[N] might be one a sequence, and is refused where that is not clear: here it is."""
    verl.register("vanilla")
    try:
        data, logp, _, entropy = batch(response_sizes=response_sizes)
        got, expected = (
            results(loss, data, logp.clone().requires_grad_(), entropy, config(policy={"loss_mode": mode}, use_kl_loss=True, kl_loss_type="kl"))
            for loss, mode in ((packed_ppo_loss, "rlkern_vanilla"), (ppo_loss, "vanilla"))
        )
        torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-6)
    finally:
        verl.unregister()


def test_padded_length_of_padded_batches():
    """Packed, there is none: verl's loss_scale_factor must say what to divide by."""
    names, own = verl.register("vanilla"), {"loss_agg_mode": "seq-mean-token-sum-norm"}
    try:
        own = config(policy={"loss_mode": names[0]}, **own)
        data, logp, _, entropy = batch()
        leaf = logp.requires_grad_()
        expected = results(ppo_loss, data, leaf, entropy, own)
        torch.testing.assert_close(results(packed_ppo_loss, padded(data), leaf, entropy, own), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="of packed tokens needs verl's loss_scale_factor"):
            results(packed_ppo_loss, data, leaf, entropy, own)
    finally:
        verl.unregister()


def test_patch_serves_our_losses_and_leaves_others():
    """As the worker finds it: `distillation_ppo_loss` and engine_workers bind ppo_loss by name."""
    from verl.trainer.distillation import losses as distillation
    from verl.workers.utils import losses

    names = verl.register("gspo")
    data, logp, _, entropy = batch()
    leaf = logp.requires_grad_()
    try:
        with verl_packed.patch():
            assert distillation.ppo_loss is losses.ppo_loss is not ppo_loss
            ours = results(losses.ppo_loss, data, leaf, entropy, config(policy={"loss_mode": names[0]}))
            theirs = results(losses.ppo_loss, data, leaf, entropy, config())
        assert distillation.ppo_loss is losses.ppo_loss is ppo_loss
        assert torch.equal(ours[0], results(packed_ppo_loss, data, leaf, entropy, config(policy={"loss_mode": names[0]}))[0])
        assert torch.equal(theirs[0], results(ppo_loss, data, leaf, entropy, config())[0])
    finally:
        verl.unregister()


def test_other_losses_are_refused():
    data, logp, sizes, _ = batch()
    with pytest.raises(ValueError, match="loss_mode must be one of rlkern's, rlkern_<name>, to take packed tokens, got 'vanilla'"):
        packed_ppo_loss(config(), {"log_probs": nested(logp.split(sizes))}, data)
