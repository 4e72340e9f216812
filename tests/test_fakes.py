"""What compile and export are told of the operators: fake tensors have the shapes and dtypes of real ones."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import rlkern

ROWS, V, H = (2, 3), 7, 5
EVERYTHING = {"with_sum_sq": True, "min_p": 0.1}
TOKENS = torch.zeros(ROWS, dtype=torch.long)
SEVERAL = torch.zeros(*ROWS, 4, dtype=torch.long)


def lists(y):
    return rlkern.Kept.ids(torch.stack([y + 1, y], -1))


CALLS = {
    "token_stats": (lambda x, y: rlkern.token_stats(x, y, **EVERYTHING), (*ROWS, V), TOKENS),
    "token_stats of several": (lambda x, y: rlkern.token_stats(x, y), (*ROWS, V), SEVERAL),
    "token_logprobs": (lambda x, y: (rlkern.token_logprobs(x, y, temperature=0.7),), (*ROWS, V), TOKENS),
    "entropy": (lambda x, y: (rlkern.entropy_from_logits(x),), (*ROWS, V), TOKENS),
    "sampler": (lambda x, y: (rlkern.sampler_threshold(x, top_p=0.9, min_p=0.1, mask=y == 0),), (*ROWS, V), TOKENS),
    "linear": (lambda h, y: rlkern.linear_token_stats(h, h.detach().new_ones(V, H), y, **EVERYTHING), (*ROWS, H), TOKENS),
    "linear of several": (lambda h, y: rlkern.linear_token_stats(h, h.detach().new_ones(V, H), y), (*ROWS, H), SEVERAL),
    "linear kept": (
        lambda h, y: rlkern.linear_token_stats(h, h.detach().new_ones(V, H), y, keep=lists(y), max_dense_rows=1, with_sum_sq=True),
        (*ROWS, H),
        TOKENS,
    ),
    "linear divergence": (lambda h, y: rlkern.linear_pair_stats(h, h.detach().new_ones(V, H), h, h.detach().new_ones(V, H), y), (*ROWS, H), TOKENS),
    "linear loss": (
        lambda h, y: (rlkern.linear_fused_loss(h, h.detach().new_ones(V, H), y, advantages=y[:, 0] + 1.0, loss="reinforce", entropy_coef=0.1).loss,),
        (*ROWS, H),
        TOKENS,
    ),
    "divergence": (lambda x, y: (rlkern.token_divergence(x, x.detach() * 2),), (*ROWS, V), TOKENS),
    "divergence by both": (lambda x, y: (rlkern.token_divergence(x, x * 2, kind="jsd", other_grad=True, vocab=5),), (*ROWS, V), TOKENS),
    "pair": (lambda x, y: rlkern.pair_stats(x, x.detach() * 2, y), (*ROWS, V), TOKENS),
    "pair without targets": (lambda x, y: rlkern.pair_stats(x, x.detach() * 2, temperature=0.7), (*ROWS, V), TOKENS),
    "did": (lambda x, y: (rlkern.token_did_entropy(x, x.detach() * 2),), (*ROWS, V), TOKENS),
    "elbo": (lambda x, y: (rlkern.masked_elbo(x, y, x.detach().new_ones(ROWS), mask=y == 0),), (*ROWS, V), TOKENS),
    "covariance": (lambda x, y: (rlkern.token_covariance(x, x.detach() + 1, y == 0),), ROWS, TOKENS),
    "z_loss": (lambda x, y: (rlkern.spherical_z_loss(x, y, reduction="none"),), (*ROWS, V), TOKENS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_fakes_look_like_results(name, dtype):
    call, shape, targets = CALLS[name]

    def look(x, y):
        fields = [t for t in call(x, y) if t is not None]
        sums = [t.sum() for t in fields if t.requires_grad]
        grads = torch.autograd.grad(sums, x) if sums else ()
        return [(tuple(t.shape), t.dtype, t.stride()) for t in (*fields, *grads)]

    x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype).requires_grad_()
    with FakeTensorMode() as mode:
        fake = look(mode.from_tensor(x), mode.from_tensor(targets))
    assert fake == look(x, targets)
