"""Every way from logits to log-probabilities, entropies and divergences: `outputs = forward(x, y)`.

`x` is [N, V] and requires grad, `y` [N] int64; `forward` returns (logp, entropy) or (logp,), from which
autograd takes the gradient. A contender that returns losses instead (-logp) costs the same. For two rows `y`
is (other logits, targets), and `forward` returns (divergence,) or (divergence, logp, entropy). Contenders are
compared only with those that compute the same thing. Peers are optional: one that is not installed, or does
not load, is reported in one line and left out.
"""

import ast
import functools
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import PAIRS
from table import EAGER
from torch import Tensor

import rlkern

LOGP, BOTH = "logp", "logp+entropy"
GKD_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # in GKD's trainers and Liger


class Contender(NamedTuple):
    name: str
    computes: str  # LOGP, BOTH or one of PAIRS
    forward: Callable[..., tuple[Tensor, ...]]
    kind: str = "eager"  # "rlkern", "eager", "compiled" or "peer"
    in_place: bool = False  # the gradient (or the forward) overwrites the logits
    backward: bool = True  # False: a forward without gradient
    slow: bool = False  # seconds to compile for every new shape


def _rlkern_both(x, y, inplace=False):
    stats = rlkern.token_stats(x, y, inplace_backward=inplace)
    return stats.logp, stats.entropy


def _rlkern_logp(x, y, inplace=False):
    return (rlkern.token_logprobs(x, y, inplace_backward=inplace),)


def _rlkern_pair(computes, x, y, inplace=False):
    (other, targets), (kind, *more) = y, computes.split("+")
    if not more:
        return (rlkern.token_divergence(x, other, kind=kind, inplace_backward=inplace),)
    stats = rlkern.pair_stats(x, other, targets, kind=kind, inplace_backward=inplace)
    return stats.divergence, stats.logp, stats.entropy


def log_softmax_both(x, y):
    """Float32 log_softmax once, gather, and -sum p log p from it."""
    log_p = F.log_softmax(x.float(), dim=-1)
    return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def logsumexp_both(x, y):
    """verl's way: logp from logsumexp, entropy as logsumexp - sum softmax * x; in float32."""
    x = x.float()
    lse = torch.logsumexp(x, dim=-1)
    p = torch.softmax(x, dim=-1)
    return x.gather(-1, y.unsqueeze(-1)).squeeze(-1) - lse, lse - (p * x).sum(-1)


def row_loop_both(x, y, sequences=8, chunk=128):
    """TRL's way without its kernel, in the logits' dtype: logp by sequence, entropy by chunks of rows."""
    logps, entropies = [], []
    for rows, labels in zip(x.chunk(sequences), y.chunk(sequences), strict=True):
        if x.dtype == torch.float32:
            logps.append(rows.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(rows, dim=-1))
        else:
            logps.append(F.log_softmax(rows, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    for rows in x.split(chunk):
        log_p = F.log_softmax(rows, dim=-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


def log_softmax_logp(x, y):
    return (F.log_softmax(x.float(), dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1),)


def logsumexp_logp(x, y):
    x = x.float()
    return (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(x, dim=-1),)


def cross_entropy_logp(x, y):
    return (F.cross_entropy(x.float(), y, reduction="none"),)


def log_softmax_pair(computes, x, y):
    """Float32 log_softmax of both rows once, F.kl_div; the JSD as in TRL's generalized_jsd_loss."""
    (other, targets), (kind, *more) = y, computes.split("+")
    log_p, log_q = F.log_softmax(x.float(), dim=-1), F.log_softmax(other.float(), dim=-1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True)

    if kind == "jsd":
        log_m = torch.logsumexp(torch.stack([log_p + math.log(0.5), log_q + math.log(0.5)]), dim=0)
        divergence = 0.5 * kl(log_q, log_m) + 0.5 * kl(log_p, log_m)
    else:
        divergence = kl(log_p, log_q) if kind == "reverse_kl" else kl(log_q, log_p)
    outputs = (divergence.sum(-1),)
    return (*outputs, log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)) if more else outputs


def _file_of(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.exists():
        raise ImportError(f"this version of {package} has no {path}")
    return file


def load_file(package: str, path: str):
    """A module of an installed package by its file alone, without the package's own imports."""
    file = _file_of(package, path)
    name = "_peer_" + package + "_" + file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_function(package: str, path: str, name: str):
    """A function or static method that needs only torch and F, without what its file imports."""
    file = _file_of(package, path)
    found = next((node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef) and node.name == name), None)
    if found is None:
        raise ImportError(f"this version of {package} has no {name} in {path}")
    found.decorator_list = []
    namespace = {"torch": torch, "F": F}
    exec(compile(ast.Module([found], []), str(file), "exec"), namespace)
    return namespace[name]


def trl_gkd() -> list[Contender]:
    loss = _load_function("trl", "experimental/gkd/gkd_trainer.py", "generalized_jsd_loss")

    def divergence(beta, x, y):
        return (loss(x, y[0], beta=beta, reduction="none").sum(-1),)

    return [Contender("TRL generalized_jsd_loss", kind, functools.partial(divergence, beta), "peer") for kind, beta in GKD_BETA.items()]


def _trl() -> list[Contender]:
    kernel = load_file("trl", "kernels/logprob_entropy.py").selective_log_softmax_and_entropy
    return [Contender("TRL kernel", BOTH, lambda x, y: kernel(x, y), "peer"), Contender("TRL kernel", LOGP, lambda x, y: kernel(x, y)[:1], "peer")]


def _liger() -> list[Contender]:
    cross_entropy = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    grpo = importlib.import_module("liger_kernel.ops.grpo_loss")
    jsd = importlib.import_module("liger_kernel.ops.jsd").LigerJSDFunction

    def ce(x, y):
        return (cross_entropy.apply(x, y, None, -100, 0.0, 0.0, "none", None, False)[0],)

    def grpo_loss(x, y):  # old_logp=None makes the ratio 1; it drops the last position, so N - 1 rows
        advantages = torch.ones(1, device=x.device)
        loss = grpo.GrpoLossFunction.apply(
            x[None], None, None, y[None, 1:].contiguous(), advantages, None, 1.0, 0.0, 0.2, 0.2, False, "grpo", None, False
        )
        return (loss[0].squeeze(0),)

    def selective(x, y):
        return (grpo.fused_selective_log_softmax(x.detach()[None], y[None], 1.0).squeeze(0),)

    def divergence(beta, x, y):  # takes log-probabilities, returns one number for all rows
        return (jsd.apply(F.log_softmax(x.float(), dim=-1), F.log_softmax(y[0].float(), dim=-1), None, beta)[None],)

    return [
        *(Contender("Liger JSD", kind, functools.partial(divergence, beta), "peer") for kind, beta in GKD_BETA.items()),
        Contender("Liger cross-entropy", LOGP, ce, "peer", in_place=True),
        Contender("Liger GRPO loss", LOGP, grpo_loss, "peer"),
        Contender("Liger selective log-softmax", LOGP, selective, "peer", backward=False),
    ]


def _flash_attention() -> list[Contender]:
    cross_entropy = load_file("flash_attn", "ops/triton/cross_entropy.py").cross_entropy_loss
    return [
        Contender("flash-attn cross-entropy", LOGP, lambda x, y: cross_entropy(x, y)[:1], "peer"),
        Contender("flash-attn cross-entropy, in place", LOGP, lambda x, y: cross_entropy(x, y, inplace_backward=True)[:1], "peer", in_place=True),
    ]


def _quack() -> list[Contender]:
    cross_entropy = importlib.import_module("quack.cross_entropy").cross_entropy
    return [Contender("quack cross-entropy", LOGP, lambda x, y: (cross_entropy(x, y, reduction="none"),), "peer")]


_PLAIN = {"TRL GKD": trl_gkd}
_KERNELS = {"TRL": _trl, "Liger": _liger, "flash-attn": _flash_attention, "quack": _quack}


def _compiled(forward):
    # A fresh wrapper per case: static shapes give the compiler its best code.
    return torch.compile(forward, dynamic=False, fullgraph=True)


def contenders(device: str, peers: bool = True) -> tuple[list[Contender], list[str]]:
    """Those that exist on `device` ("cpu" or "cuda"; peers too if asked), a line for each that is absent."""
    eager = {
        BOTH: {EAGER: log_softmax_both, "eager logsumexp (verl)": logsumexp_both, "eager row loop (TRL)": row_loop_both},
        LOGP: {EAGER: log_softmax_logp, "eager logsumexp": logsumexp_logp, "eager cross_entropy": cross_entropy_logp},
    }
    eager |= {pair: {EAGER: functools.partial(log_softmax_pair, pair)} for pair in PAIRS}
    fused_forms = {BOTH: _rlkern_both, LOGP: _rlkern_logp} | {pair: functools.partial(_rlkern_pair, pair) for pair in PAIRS}
    found = []
    for computes, fused in fused_forms.items():
        found += [Contender("rlkern", computes, fused, "rlkern")]
        found += [Contender("rlkern, in place", computes, functools.partial(fused, inplace=True), "rlkern", in_place=True)]
        found += [Contender(name, computes, forward) for name, forward in eager[computes].items()]
        for name, forward in zip(("log_softmax", "logsumexp"), eager[computes].values(), strict=False):
            found += [Contender(f"compiled {name}", computes, _compiled(forward), "compiled", slow=True)]
    absent = []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name, load in (_PLAIN | _KERNELS).items() if peers else ():
        if name in _KERNELS and device == "cpu" and not interpreted:
            absent.append(f"{name}: its kernels need a GPU")
            continue
        try:
            found += load()
        except Exception as error:  # whatever keeps a peer from loading, the others run on
            absent.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return found, absent
