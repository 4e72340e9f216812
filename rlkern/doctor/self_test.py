"""Each backend against plain float64 formulas: results and gradients, on small inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, reference
from ..losses.policy.ppo import ppo_loss
from ..losses.preference.dpo import dpo_loss
from ..primitives.covariance import token_covariance
from ..primitives.did import token_did_entropy
from ..primitives.divergence import token_divergence
from ..primitives.kept_sets import Kept
from ..primitives.linear import linear_token_stats
from ..primitives.moments import row_moments
from ..primitives.sampler import sampler_threshold
from ..primitives.token_stats import token_stats

# Of numbers that are computed in float32; of float64; gradients are rounded to the dtype of the logits once.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 2**-7, torch.float16: 2**-10}
VOCAB = 777  # no multiple of anything
LONG = 40_001  # several tiles, threads and programs a row


class Verdict(NamedTuple):
    checks: int
    wrong: tuple[str, ...]  # one line each
    seconds: float


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(seed: int, dtype: torch.dtype, holes: bool = False) -> tuple[Tensor, Tensor]:
    """(logits [3, 4, V], ids [3, 4]); with holes a third of the logits is -inf."""
    logits = 3 * _draw(seed, 3, 4, VOCAB)
    ids = torch.arange(12).view(3, 4) * 61 % VOCAB
    if holes:
        logits = logits.masked_fill((torch.arange(VOCAB) % 3 == 1) & (torch.arange(VOCAB) != ids.unsqueeze(-1)), float("-inf"))
    return logits.to(dtype), ids


class Case(NamedTuple):
    name: str
    function: Callable[..., Any]  # rlkern's
    formula: Callable[..., Any]  # takes the same inputs in float64
    inputs: tuple[Tensor, ...]
    leaves: int = 1  # so many of the inputs get gradients

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype


def _exactly(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of rows"""
    exact = reference.token_stats(x, None)
    return x.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1), exact.entropy


def _of_rows() -> Iterator[Case]:
    def stats(x: Any) -> tuple[Tensor, ...]:
        return x.entropy, x.logsumexp, x.sum_sq_prob, x.kept_logmass

    def rows(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        found = token_stats(x, y, temperature=0.7, min_p=0.02, with_sum_sq=True)
        return found.logp, *stats(found)

    def rows_exactly(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return _exactly(x / 0.7, y)[0], *stats(reference.token_stats(x, None, 0.7, min_p=0.02))

    for dtype in TOLERANCE:
        yield Case("token_stats", rows, rows_exactly, _rows(1, dtype))
    yield Case("token_stats, -inf", rows, rows_exactly, _rows(2, torch.float32, holes=True))
    many = (3 * _draw(13, 1, 48, LONG)).float(), torch.arange(48).unsqueeze(0) * 797 % LONG
    yield Case("token_stats, long rows", rows, rows_exactly, many)

    mask, temperature = torch.arange(12).view(3, 4) != 0, torch.linspace(0.5, 2, 12).view(3, 4)
    several = torch.stack([_rows(1, torch.float32)[1], torch.arange(12).view(3, 4)], -1)
    several[0, 1, 0] = several[0, 2] = -7  # one target of a row ignored, both of a row

    def options(x: Tensor, y: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        found = token_stats(x, y, mask=mask, temperature=t, ignore_index=-7, softcap=5.0, logit_scale=1.1, with_tail=True)
        return found.logp, found.entropy, found.logsumexp, found.tail_logmass

    def options_exactly(x: Tensor, y: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        u = 5 * (1.1 * x / 5).tanh() / t.unsqueeze(-1)
        counted, listed = (y != -7) & mask.unsqueeze(-1), torch.zeros_like(u, dtype=torch.bool)
        for k in range(y.shape[-1]):
            listed = listed | ((torch.arange(u.shape[-1]) == y[..., k : k + 1]) & counted[..., k : k + 1])
        log_p, read = u.log_softmax(-1), counted.any(-1)
        logp = log_p.gather(-1, y.clamp(min=0)).where(counted, 0)
        others = -(log_p.exp() * log_p).sum(-1), u.logsumexp(-1), log_p.masked_fill(listed, float("-inf")).logsumexp(-1)
        return logp, *(value.where(read, 0) for value in others)

    yield Case("token_stats, options", options, options_exactly, (_rows(14, torch.float32)[0], several, mask, temperature))

    def entries(x: Tensor, y: Tensor) -> Tensor:
        """[..., V]: the ids 5, 16, ... and the row's own."""
        ids = torch.arange(x.shape[-1], device=x.device)
        return (ids % 11 == 5) | (ids == y.unsqueeze(-1))

    def kept(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = token_stats(x, y, keep=Kept.mask(entries(x, y)))
        return found.logp, found.entropy

    def kept_exactly(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _exactly(x.masked_fill(~entries(x, y), float("-inf")), y)

    def listed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = token_stats(x, y, keep=Kept.ids(torch.arange(5, x.shape[-1], 11, device=x.device).expand(*y.shape, -1)))
        return found.logp, found.entropy

    yield Case("token_stats, keep", kept, kept_exactly, _rows(5, torch.float32))
    yield Case("token_stats, keep listed ids", listed, kept_exactly, _rows(5, torch.float32))

    def threshold_exactly(x: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
        most = x.topk(top_k).values
        p = (most / 2).softmax(-1)
        p = p.where(p >= min_p * p[..., :1], 0)
        p = p / p.sum(-1, keepdim=True)
        return most.masked_fill((p == 0) | (p.cumsum(-1) - p >= top_p), float("inf")).amin(-1)

    cuts: tuple[dict[str, Any], ...] = ({"top_k": 20, "top_p": 0.9}, {"top_k": 200, "top_p": 0.95, "min_p": 0.1})
    for rules in cuts:
        function, formula = partial(sampler_threshold, temperature=2.0, **rules), partial(threshold_exactly, **rules)
        yield Case(f"sampler_threshold, {', '.join(rules)}", function, formula, _rows(8, torch.float32)[:1], leaves=0)
    yield Case("row_moments", row_moments, reference.row_moments, _rows(15, torch.float32))


def _of_two_rows() -> Iterator[Case]:
    inputs = _rows(3, torch.float32)[0], _rows(4, torch.float32)[0]
    for kind in ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl"):
        options: dict[str, Any] = {"kind": kind, "beta": 0.3, "temperature": 0.7, "other_temperature": 1.3}
        yield Case(f"token_divergence, {kind}", partial(token_divergence, **options), partial(reference.token_divergence, **options), inputs)

    def masked(x: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        return token_divergence(x, other, mask=mask)

    def masked_exactly(x: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        return reference.token_divergence(x, other).where(mask, 0)

    yield Case("token_divergence, mask", masked, masked_exactly, (*inputs, torch.arange(12).view(3, 4) % 3 > 0))
    yield Case("token_did_entropy", token_did_entropy, reference.token_did_entropy, inputs, leaves=2)


def _of_hidden_states() -> Iterator[Case]:
    def linear(hidden: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_token_stats(hidden, weight, y)
        return found.logp, found.entropy

    def linear_exactly(hidden: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _exactly(hidden @ weight.T, y)

    inputs = _draw(6, 3, 4, 48).float(), _draw(7, VOCAB, 48).float() / 7, _rows(1, torch.float32)[1]
    yield Case("linear_token_stats", linear, linear_exactly, inputs, leaves=2)


def _of_tokens() -> Iterator[Case]:
    old = -_draw(10, 3, 17).abs()
    tokens = (old + 0.3 * _draw(9, 3, 17)).float(), old.float(), _draw(11, 3, 17).float(), _draw(12, 3, 17) < 1

    def ppo(x: Tensor, *others: Tensor) -> Tensor:
        return ppo_loss(x, *others).loss

    def ppo_exactly(x: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        ratio = (x - old).exp()
        return -(torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).sum() / mask.sum()

    def covariance_exactly(x: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, (a - a[mask].mean()) * (x - x[mask].mean()), 0)

    def dpo(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1).losses

    def dpo_exactly(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected - (reference_chosen - reference_rejected)))

    yield Case("ppo_loss", ppo, ppo_exactly, tokens)
    yield Case("token_covariance", token_covariance, covariance_exactly, (tokens[0], tokens[2], tokens[3]), leaves=0)
    yield Case("dpo_loss", dpo, dpo_exactly, tuple(50 * _draw(20 + i, 9).float() for i in range(4)), leaves=2)


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor], leaves: int) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients of the first so many inputs)"""
    x = [t.requires_grad_() for t in inputs[:leaves]] + inputs[leaves:]
    results = function(*x)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    if not leaves:
        return outputs, []
    # Upstream gradients that differ from entry to entry, the same for both sides.
    upstream = [torch.linspace(-1, 1, t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape) for t in outputs]
    return outputs, list(torch.autograd.grad(outputs, x[:leaves], upstream))


def _error(got: Tensor, exact: Tensor, tolerance: float) -> float:
    """The largest error in tolerances; infinite where a number should be and is not."""
    got, exact = got.detach().cpu().double(), exact.detach().double()
    error = (got - exact).abs() / (tolerance * (1 + exact.abs()))
    error = error.masked_fill(got == exact, 0)  # infinities
    error = error.masked_fill((exact == 0) & (got != 0), float("inf"))  # masked, or without a probability
    return float("inf") if error.isnan().any() else error.max().item()


def _wrong(case: Case, device: str) -> str | None:
    """What is wrong with it, in one line."""
    of_values = TOLERANCE[torch.float64 if case.dtype == torch.float64 else torch.float32]
    name = f"{case.name} of {str(case.dtype).removeprefix('torch.')}"
    exact_inputs = [x.to(torch.float64, copy=True) if x.is_floating_point() else x for x in case.inputs]
    exact, exact_gradients = _with_gradients(case.formula, exact_inputs, case.leaves)
    try:
        outputs, gradients = _with_gradients(case.function, [x.detach().to(device, copy=True) for x in case.inputs], case.leaves)
        errors = [_error(*pair, of_values) for pair in zip(outputs, exact, strict=True)]
        errors += [_error(*pair, TOLERANCE[case.dtype]) for pair in zip(gradients, exact_gradients, strict=True)]
    except Exception as error:  # a kernel may fail in any way: that is the finding
        return f"{name}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return None if max(errors) <= 1 else f"{name}: off by {max(errors):.1g} times the tolerance"


def self_test(backend: str, device: str = "cpu") -> Verdict:
    """Runs every case with this backend, on `device`."""
    start = time.perf_counter()
    with backends.use_backend(backend):
        lines = [_wrong(case, device) for cases in (_of_rows, _of_two_rows, _of_hidden_states, _of_tokens) for case in cases()]
    return Verdict(len(lines), tuple(filter(None, lines)), time.perf_counter() - start)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The C++ kernels for this instruction set, inside the block."""
    native: Any = backends.load("native")
    before = native.isa()
    native.use_isa(name)
    try:
        yield
    finally:
        native.use_isa(before)
