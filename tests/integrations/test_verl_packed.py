"""verl's actor loss on packed responses against verl's own on padded ones, with the same losses."""

import pytest
import torch

pytest.importorskip("verl")
tensordict = pytest.importorskip("tensordict")
from test_verl import config  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402

from rlkern.integrations import verl  # noqa: E402
from rlkern.integrations.verl_packed import packed_ppo_loss, packed_responses  # noqa: E402

PROMPTS, RESPONSES = (3, 1, 2, 5), (4, 1, 6, 2)


def nested(rows):
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged)


def batch(seed=0, **info):
    g = torch.Generator().manual_seed(seed)
    per_token = {name: nested([torch.randn(n, generator=g) for n in RESPONSES]) for name in ("advantages", "ref_log_prob")}
    old = [-torch.rand(n, generator=g) for n in RESPONSES]
    fields = per_token | {"old_log_probs": nested(old), "rollout_is_weights": nested([torch.rand(n, generator=g) for n in RESPONSES])}
    fields |= {"response_mask": nested([torch.rand(n, generator=g) < 0.8 for n in RESPONSES])}
    for name, sizes in (("prompts", PROMPTS), ("responses", RESPONSES)):
        fields[name] = nested([torch.zeros(n, dtype=torch.int64) for n in sizes])
    data = tensordict.TensorDict(fields, batch_size=[len(PROMPTS)])
    for name, value in ({"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | info).items():
        data.set_non_tensor(name, value)
    sizes = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    logp = -torch.rand(sum(sizes), generator=g)
    entropy = nested(torch.rand(sum(sizes), generator=g).split(sizes))
    return data, logp, sizes, entropy


def test_the_same_tokens():
    data, logp, sizes, _ = batch()
    padded = no_padding_2_padding(nested(logp.split(sizes)), data)
    tokens, pack = packed_responses(nested(logp.split(sizes)), data)
    assert torch.equal(tokens, torch.cat([row[:n] for row, n in zip(padded, RESPONSES, strict=True)]))
    assert pack.cu_seqlens.tolist() == [0, 4, 5, 11, 13]


MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@pytest.mark.parametrize(
    ("name", "mode"), [*(("vanilla", mode) for mode in MODES), *((name, MODES[1]) for name in ("gspo", "geo_mean", "kl_cov", "dro"))]
)
def test_the_same_loss(name, mode):
    names = verl.register(name)
    try:
        for info in ({}, {"dp_size": 2, "batch_num_tokens": 20, "global_batch_size": 8}):
            results = []
            for loss in (ppo_loss, packed_ppo_loss):
                data, logp, sizes, entropy = batch(**info)
                leaf = logp.requires_grad_()
                own = config(policy={"loss_mode": names[0]}, use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type="low_var_kl", entropy_coeff=0.1,
                             loss_agg_mode=mode, loss_scale_factor=6.0)  # fmt: skip
                value, metrics = loss(own, {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, entropy.offsets()), "entropy": entropy}, data)
                (gradient,) = torch.autograd.grad(value, leaf)
                results.append((value.detach(), gradient, {k: float(m.aggregate()) if hasattr(m, "aggregate") else m for k, m in metrics.items()}))
            torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    finally:
        verl.unregister()


def test_other_losses_are_refused():
    data, logp, sizes, _ = batch()
    with pytest.raises(ValueError, match="loss_mode must be one of rlkern's, rlkern_<name>, to take packed tokens, got 'vanilla'"):
        packed_ppo_loss(config(), {"log_probs": nested(logp.split(sizes))}, data)
