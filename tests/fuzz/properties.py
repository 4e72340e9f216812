"""Numbers and gradients of the public functions, against float64, on what hypothesis draws.

Each property is a function that raises where something is wrong, and a strategy of its arguments. It holds on
every instruction set. Tolerances are those of the tests that own the references.
"""

from __future__ import annotations

import itertools
import math
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import hypothesis
import kept_oracle
import oracle
import pair_oracle
import sampler_oracle
import torch
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from torch import Tensor, inf, nan, tensor  # noqa: F401  # the last three are what `code` writes

import rlkern
from rlkern import reference
from rlkern.backends import native

from . import drawn
from .drawn import laid_out
from .parts import say

EXAMPLES = 60  # of one property, then comes the next
SHRINKING = 15  # seconds for a smaller case than the first that fails

PROPERTIES: dict[str, tuple[Callable, st.SearchStrategy[dict]]] = {}


def given(strategy: Callable[[], st.SearchStrategy[dict]]):
    """Registers a property with what draws its arguments."""

    def decorator(check: Callable) -> Callable:
        PROPERTIES[check.__name__] = (check, strategy())
        return check

    return decorator


def options(**strategies) -> st.SearchStrategy[dict]:
    """Some of them, the others left out."""
    return st.fixed_dictionaries({}, optional=strategies)


def _close(got: Tensor, want: Tensor, rtol: float, atol: float, what: str) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}")


def _leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()


def _precision(x: Tensor) -> float:
    return oracle.TOLERANCE[torch.float64 if x.dtype == torch.float64 else torch.float32]


def _near(x: Tensor, bound: Tensor | float) -> bool:
    """Whether rounding could put one on the other side."""
    return bool(((x - bound).abs() <= 1e-4 * (1 + x.abs())).any())


# --- rows of logits -----------------------------------------------------------------------------------------


@st.composite
def _token_stats(draw):
    lead, vocab, dtype = draw(st.sampled_from(drawn.LEADS)), draw(st.sampled_from(drawn.VOCABS)), draw(st.sampled_from(drawn.DTYPES))
    capped = draw(options(softcap=st.sampled_from((1.0, 5.0, 30.0)), logit_scale=st.sampled_from((0.5, 2.0))))
    k = draw(st.sampled_from(((), (), (1,), (3,))))
    more = draw(options(min_p=st.sampled_from((0.01, 0.1, 0.9))) | options(min_prob=st.sampled_from((0.001, 0.02))) | st.just({"with_tail": bool(k)}))
    odd = not capped and not more.get("with_tail")  # a tail below the smallest number is none
    targets = draw(drawn.integers((*lead, *k), 0, vocab))
    ignored = draw(drawn.masks(targets.shape))
    return {
        "logits": draw(drawn.rows(lead, vocab, dtype, odd=odd)),
        "targets": targets if ignored is None else targets.masked_fill(~ignored, -100),
        "layout": draw(st.sampled_from(drawn.LAYOUTS)),
        "mask": draw(drawn.masks(lead)),
        "temperature": 1.0 if capped else draw(drawn.temperatures(lead, dtype)),
        "with_sum_sq": draw(st.booleans()),
        "only": draw(st.none() | st.sampled_from((["logp"], ["entropy"], ["logp", "entropy"]))),
        **more,
        **capped,
    }


@given(_token_stats)
def token_stats(logits: Tensor, targets: Tensor, layout: str, mask: Tensor | None, temperature, min_p=None, min_prob=None, **more) -> None:
    logits = laid_out(logits, layout)
    if min_p is not None or min_prob is not None:
        t = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        u = reference.transform(logits.double(), more.get("logit_scale", 1.0), more.get("softcap")) / t
        top = u.amax(-1, keepdim=True) + math.log(min_p) if min_p is not None else u.logsumexp(-1, keepdim=True) + math.log(min_prob)
        if _near(u, top):
            return
    oracle.check(logits, targets, mask=mask, temperature=temperature, min_p=min_p, min_prob=min_prob, **more)


@st.composite
def _divergence(draw):
    lead, vocab = draw(st.sampled_from(drawn.LEADS)), draw(st.sampled_from(drawn.VOCABS))
    dtype = draw(st.sampled_from(drawn.DTYPES))
    other_dtype = draw(st.sampled_from([dtype] if dtype == torch.float64 else drawn.DTYPES[:3]))
    return {
        "logits": draw(drawn.rows(lead, vocab, dtype, odd=False)),
        "other": draw(drawn.rows(lead, vocab, other_dtype, odd=False)),
        "layouts": draw(st.tuples(st.sampled_from(drawn.LAYOUTS), st.sampled_from(drawn.LAYOUTS))),
        "kind": draw(st.sampled_from(pair_oracle.KINDS)),
        "beta": draw(st.sampled_from((0.1, 0.5, 0.9))),
        **draw(options(temperature=drawn.temperatures(lead, dtype), other_temperature=drawn.temperatures(lead, dtype))),
    }


@given(_divergence)
def divergence(logits: Tensor, other: Tensor, layouts: tuple[str, str], kind: str, beta: float, **temperatures) -> None:
    """By both rows, and the statistics beside it."""
    z, w = laid_out(logits, layouts[0]), laid_out(other, layouts[1])
    value, gradient, largest = pair_oracle.precise(z, w, kind, beta, **temperatures)
    loose = 1 if z.dtype != torch.float64 else 1e-6
    got, d_z = pair_oracle.both(z, w, kind=kind, beta=beta, **temperatures)
    _close(got, value, 1e-5 * loose, 1e-7 * loose, "value")
    pair_oracle.assert_gradient(d_z, gradient, largest.clamp(min=1e-3), 2e-5 * loose)
    stats = rlkern.pair_stats(z, w, kind=kind, beta=beta, **temperatures)
    own = reference.token_stats(z.double(), None, temperatures.get("temperature", 1.0))
    _close(stats.divergence, value, 1e-5 * loose, 1e-7 * loose, "divergence of pair_stats")
    _close(stats.entropy, own.entropy, 1e-5 * loose, 1e-6 * loose, "entropy of pair_stats")
    _close(stats.logsumexp, own.logsumexp, 1e-5 * loose, 1e-6 * loose, "logsumexp of pair_stats")


@st.composite
def _sampler(draw):
    lead, vocab = draw(st.sampled_from(drawn.LEADS)), draw(st.sampled_from(drawn.VOCABS))
    dtype = draw(st.sampled_from(drawn.DTYPES))
    rules = options(top_k=st.integers(1, vocab), top_p=st.sampled_from((1e-4, 0.3, 0.5, 0.9, 0.9999)), min_p=st.sampled_from((1e-5, 0.1, 0.5, 1.0)))
    how = options(temperature=drawn.temperatures(lead, dtype), order=st.sampled_from(("joint", "top_k_first")))
    return {"logits": draw(drawn.rows(lead, vocab, dtype)), "layout": draw(st.sampled_from(drawn.LAYOUTS)), **draw(rules), **draw(how)}


@given(_sampler)
def sampler_threshold(logits: Tensor, layout: str, **rules) -> None:
    logits = laid_out(logits, layout)
    if rules.keys() & {"top_p", "min_p"} or rules.get("top_k", logits.shape[-1]) < logits.shape[-1]:
        sampler_oracle.check(logits, **rules)
    else:
        assert (rlkern.sampler_threshold(logits, **rules) == -inf).all(), "no rule restricts"


@st.composite
def _kept(draw):
    n, vocab, dtype = draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from(drawn.VOCABS)), draw(st.sampled_from(drawn.DTYPES))
    outside = draw(st.sampled_from(kept_oracle.OUTSIDE))
    k = draw(st.sampled_from((1, 3))) if outside == "minus_inf" else 1
    return {
        "logits": draw(drawn.rows((n,), vocab, dtype, odd=False)),
        "targets": draw(drawn.integers((n, k), 0, vocab)),
        "order": draw(st.integers(0, 99)),
        "counts": draw(drawn.integers((n, 1), 0, min(8, vocab) + 1)),
        "kind": draw(st.sampled_from(kept_oracle.KINDS)),
        "empty": draw(st.sampled_from(("everything", "nothing"))),
        "outside": outside,
        "mask": draw(drawn.masks((n,))),
        "temperature": draw(drawn.temperatures((n,), dtype)),
        "with_full": draw(st.booleans()),
        "garbage": draw(st.sampled_from((None, math.nan, math.inf))),
    }


@given(_kept)
def kept_sets(logits: Tensor, targets: Tensor, order: int, counts: Tensor, kind: str, empty: str, mask, with_full, garbage, **more) -> None:
    by = logits if kind == "at_least" else torch.rand(logits.shape, generator=torch.Generator().manual_seed(order))
    places = by.double().argsort(-1, descending=True)
    sets = torch.zeros_like(by, dtype=torch.bool).scatter_(-1, places, torch.arange(by.shape[-1]) < counts)
    mask = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    more = {"mask": mask, "with_sum_sq": True, "min_p": None, "softcap": None, **more}
    kept_oracle.check(kept_oracle.case_of(logits, targets, sets, kind, empty, more, order), with_full, garbage)


@st.composite
def _did(draw):
    lead, vocab, dtype = draw(st.sampled_from(drawn.LEADS)), draw(st.sampled_from(drawn.VOCABS)), draw(st.sampled_from(drawn.DTYPES))
    names = ("logits", "reference_logits")
    x = {name: draw(drawn.rows(lead, vocab, dtype, odd=False, infinite=name == "logits")) for name in names}
    return {**x, "layout": draw(st.sampled_from(drawn.LAYOUTS)), "temperature": draw(drawn.temperatures(lead, dtype))}


@given(_did)
def did_entropy(logits: Tensor, reference_logits: Tensor, layout: str, temperature) -> None:
    x, y = laid_out(logits, layout), laid_out(reference_logits, layout)
    leaves, exact = [x.detach().requires_grad_(), y.detach().requires_grad_()], [_leaf(x, torch.float64), _leaf(y, torch.float64)]
    got = rlkern.token_did_entropy(*leaves, temperature=temperature)
    want = reference.token_did_entropy(*exact, temperature)
    _same(got, want, leaves, exact)


def _same(got: Tensor, want: Tensor, leaves: list[Tensor], exact: list[Tensor], scale: float = 1.0) -> None:
    """Values, to a part of the `scale` of what they are the sums of; gradients for upstream 1, 2, ..."""
    tol = _precision(leaves[0])
    _close(got, want, tol, 0.3 * tol * scale, "values")
    upstream = torch.arange(1.0, got.numel() + 1, dtype=torch.float64).view(got.shape)
    finite = want.isfinite()
    for values in (got, want):
        (torch.where(finite, values.double(), 0) * upstream).sum().backward()
    for i, (x, y) in enumerate(zip(leaves, exact, strict=True)):
        rtol = max(tol, oracle.TOLERANCE[x.dtype])
        smallest = 2**-25 if x.dtype == torch.float16 else 0
        atol = tol * y.grad.abs().nan_to_num(0, 0, 0).max().item() + smallest + 1e-13 if y.numel() else 0
        _close(x.grad, y.grad, rtol, atol, f"gradient {i}")


# --- sums over sequences ------------------------------------------------------------------------------------


@st.composite
def _sequences(draw):
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    n, vocab, dtype = sum(lengths), draw(st.sampled_from((1, 2, 7, 33))), draw(st.sampled_from(drawn.DTYPES))
    labels, ignored = draw(drawn.integers((n,), 0, vocab)), draw(drawn.masks((n,)))
    return {
        "logits": draw(drawn.rows((n,), vocab, dtype, odd=False, infinite=False)),
        "labels": labels if ignored is None else labels.masked_fill(~ignored, -100),
        "lengths": lengths,
        "average": draw(st.booleans()),
    }


@given(_sequences)
def sequence_logps(logits: Tensor, labels: Tensor, lengths: list[int], average: bool) -> None:
    """Of a pack. Each sequence has the same bits alone."""
    exact, leaf = _leaf(logits, torch.float64), _leaf(logits)
    got = rlkern.sequence_logps(leaf, labels, average=average, packed=rlkern.packed(lengths=lengths))
    sums, alone, at = [], [], 0
    for length in lengths:
        x, y = exact[at : at + length], labels[at + 1 : at + length]
        logp, counts = x[: max(length - 1, 0)].log_softmax(-1), y != -100
        total = (logp.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1) * counts).sum() + 0 * exact.sum()
        sums.append(total / counts.sum().clamp(min=1) if average else total)
        if length:
            own = slice(at, at + length)
            alone.append(rlkern.sequence_logps(logits[own], labels[own], average=average, packed=rlkern.packed(lengths=[length])))
        at += length
    _same(got, torch.stack(sums), [leaf], [exact])
    assert [x.item() for x, length in zip(got, lengths, strict=True) if length] == [x.item() for x in alone], "a sequence alone has other bits"


@st.composite
def _values(draw):
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    n = sum(lengths)
    mask = draw(drawn.masks((n,)))
    return {"values": draw(drawn.numbers((n,), -1e4, 1e4, draw(st.sampled_from(drawn.DTYPES)))), "mask": mask, "lengths": lengths}


@given(_values)
def packed_sums(values: Tensor, mask: Tensor | None, lengths: list[int]) -> None:
    """Sums, means, largest and smallest of a pack; and each token gets its sequence's number back."""
    pack = rlkern.packed(lengths=lengths, mask=mask)
    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    garbage = values.masked_fill(~counts, nan)
    for name in ("sum", "mean"):
        exact, leaf = _leaf(values, torch.float64), _leaf(garbage)
        parts = [torch.where(m, x, 0) for x, m in zip(exact.split(lengths), counts.split(lengths), strict=True)]
        numbers = torch.stack([x.sum() for x in parts])
        want = numbers if name == "sum" else numbers / torch.stack([m.sum() for m in counts.split(lengths)]).clamp(min=1)
        _same(getattr(pack, name)(leaf), want, [leaf], [exact])
    want = [x[m].max().item() if m.any() else -inf for x, m in zip(values.split(lengths), counts.split(lengths), strict=True)]
    assert pack.max(garbage).tolist() == want, "max"
    x = torch.arange(1.0, len(lengths) + 1)
    assert torch.equal(pack.spread(x), x.repeat_interleave(tensor(lengths))), "spread"


# --- losses -------------------------------------------------------------------------------------------------


@st.composite
def _grpo(draw):
    shape, dtype = draw(st.sampled_from(((1, 1), (2, 3), (3, 5), (0, 2), (2, 0)))), draw(st.sampled_from(drawn.DTYPES))
    x = {name: draw(drawn.numbers(shape, -3, 0, dtype)) for name in ("logp", "old_logp", "reference_logp")}
    mask = draw(drawn.masks(shape))
    x |= {"advantages": draw(drawn.numbers(shape[:1], -4, 4, dtype)), "mask": torch.ones(shape, dtype=torch.bool) if mask is None else mask}
    return {**x, "clip_low": draw(st.sampled_from((0.1, 0.2, 1.0))), "clip_high": draw(st.sampled_from((0.1, 0.28)))}


@given(_grpo)
def grpo_loss(logp, old_logp, reference_logp, advantages, mask, clip_low: float, clip_high: float) -> None:
    """min(r A, clip(r) A), and k3 of a reference, a mean over tokens; garbage where masked."""
    exact = _leaf(logp, torch.float64)
    ratio, a = (exact - old_logp.double()).exp(), advantages.double().unsqueeze(-1)
    if _near(ratio.detach(), 1 - clip_low) or _near(ratio.detach(), 1 + clip_high):
        return
    d = reference_logp.double() - exact
    terms = -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a) + 0.1 * (d.exp() - d - 1)
    want = torch.where(mask, terms, 0).sum() / mask.sum().clamp(min=1)
    leaf = _leaf(logp.masked_fill(~mask, nan))
    given = {"clip_low": clip_low, "clip_high": clip_high, "reference_logp": reference_logp, "kl_coef": 0.1, "kl_kind": "k3"}
    got = rlkern.grpo_loss(leaf, old_logp, advantages, mask, **given).loss
    _same(got, want, [leaf], [exact], scale=max([1.0, *terms.detach().abs().flatten().tolist()]))


@st.composite
def _dpo(draw):
    n, dtype = draw(st.sampled_from((0, 1, 4))), draw(st.sampled_from(drawn.DTYPES))
    names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    x = {name: draw(drawn.numbers((n,), -500, 0, dtype)) for name in names}
    return {**x, "beta": draw(st.sampled_from((0.01, 0.1, 1.0))), "label_smoothing": draw(st.sampled_from((0.0, 0.1, 0.4)))}


@given(_dpo)
def dpo_loss(beta: float, label_smoothing: float, **logps: Tensor) -> None:
    leaves, exact = [_leaf(x) for x in logps.values()], [_leaf(x, torch.float64) for x in logps.values()]
    margin = beta * ((exact[0] - exact[1]) - (exact[2] - exact[3]))
    log_sigmoid = torch.nn.functional.logsigmoid
    want = -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
    got = rlkern.dpo_loss(*leaves, beta=beta, label_smoothing=label_smoothing).losses
    _same(got, want, leaves[:2], exact[:2])


# --- the search ---------------------------------------------------------------------------------------------


def examine(name: str, round: int, seed: int, database=None, begins: Callable[[], None] = lambda: None) -> str | None:
    """What is wrong with a property on some instruction set, or None: the error, the smallest case as a line
    of code, and hypothesis's own way to repeat it."""
    check, strategy = PROPERTIES[name]
    failed, end = {}, math.inf  # code of a failing case -> the error

    @hypothesis.seed(random.Random(f"{seed} {name} {round}").getrandbits(64))
    @hypothesis.settings(max_examples=EXAMPLES, database=database, deadline=None, print_blob=True, report_multiple_bugs=False,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(strategy)
    def test(arguments: dict) -> None:
        nonlocal end
        if time.monotonic() > end and drawn.code(arguments) not in failed:
            return  # enough of looking for a smaller case
        begins()
        for isa in native.isas():
            native.use_isa(isa)
            try:
                check(**arguments)
            except Exception as error:
                end = min(end, time.monotonic() + SHRINKING)
                code = drawn.code(arguments)
                failed.pop(code, None)
                failed[code] = f"{isa}: {traceback.format_exception_only(error)[0].strip()[:600]}\n    {name}({code})"
                raise

    before = native.isa()
    try:
        test()
    except Exception as error:
        if not failed:  # a fault of the strategies
            raise
        notes = [note.strip() for note in getattr(error, "__notes__", []) if "reproduce_failure" in note]
        return "\n    ".join([list(failed.values())[-1], *notes])
    finally:
        native.use_isa(before)
    return None


def search(folder: Path, seed: int, first: int, end: float) -> None:
    """Says what it finds until `end` of time.monotonic(). Of a property that fails one case is enough."""
    left = list(PROPERTIES)
    database = DirectoryBasedExampleDatabase(folder / "corpus" / "properties")
    for round in itertools.count(first):
        for name in list(left):
            if time.monotonic() > end:
                return
            where = f"{name}:{round}"
            say("covers", name)
            if wrong := examine(name, round, seed, database, lambda where=where: say("call", where)):
                left.remove(name)
                say("found", where, wrong.replace("\n", " | "))
        if not left:
            return


def again(where: str, seed: int) -> str | None:
    name, round = where.split(":")
    if name not in PROPERTIES or not round.isdecimal():
        raise ValueError(f"expected PROPERTY:ROUND with one of {', '.join(PROPERTIES)}, got {where}")
    return examine(name, int(round), seed)
