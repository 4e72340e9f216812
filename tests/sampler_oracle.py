"""What sampler_threshold keeps, by sorting in float64."""

import math

import torch

from rlkern import sampler_threshold


def defined(x, top_k=None, top_p=None, min_p=None, temperature=1.0, order="top_k_first"):
    """The smallest kept of rows [R, V], by sorting."""
    x = x.double().sort(-1, descending=True).values
    t = temperature.double().unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    greater = torch.searchsorted(-x, -x)  # how many are
    finite = x > -math.inf
    alive = finite if min_p is None else finite & (x >= x[:, :1] + math.log(min_p) * t)
    if top_k is not None:
        alive = alive & (greater < top_k)
    if top_p is not None:
        p = (x / t).masked_fill(~(finite if order == "joint" else alive), -math.inf).softmax(-1)
        alive = alive & ((p.cumsum(-1) - p).gather(-1, greater) < top_p)
    return torch.where(alive, x, math.inf).amin(-1)


def check(x, device="cpu", **rules):
    """Exactly the definition's, but for a mass within 1e-9 of top_p."""
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in rules.items()}
    got = sampler_threshold(x.to(device), **given)
    assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and got.shape == x.shape[:-1] and not got.requires_grad
    got = got.cpu().double().flatten()
    flat, rules = x.reshape(-1, x.shape[-1]), {n: v.flatten() if isinstance(v, torch.Tensor) else v for n, v in rules.items()}
    assert (flat.double() == got.unsqueeze(-1)).any(-1).all()  # one of the row's own
    few, many = (defined(flat, **rules | ({"top_p": rules["top_p"] + d} if "top_p" in rules else {})) for d in (-1e-9, 1e-9))
    assert ((many <= got) & (got <= few)).all(), (got, few, many)
