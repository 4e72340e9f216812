"""Trainers' functions of vocabulary-parallel logits, on two gloo ranks, against formulas of whole rows."""

import contextlib
import functools
import math
import re
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks, try_on_ranks
from torch.nn.functional import cross_entropy, one_hot

import rlkern
from rlkern.integrations import areal, megatron, miles, nemo_rl, skyrl, slime, torchtitan, verl
from rlkern.integrations.versions import other_arguments

V, B, S, T = 14, 2, 3, 0.7  # seven columns a rank


@contextlib.contextmanager
def stub(**attributes):
    """Modules of Megatron or a trainer, by dotted name with _ for each dot, with these attributes."""
    names, before = {}, dict(sys.modules)
    for name, values in attributes.items():
        full = name.replace("__", ".")
        for n in range(1, full.count(".") + 2):
            part = ".".join(full.split(".")[:n])
            if part not in names:
                names[part] = sys.modules[part] = types.ModuleType(part)
                names[part].__path__ = []
                if n > 1:
                    setattr(names[part.rpartition(".")[0]], part.rpartition(".")[2], names[part])
        vars(names[full]).update(values)
    try:
        yield names
    finally:
        for name in names:
            sys.modules.pop(name)
            if name in before:
                sys.modules[name] = before[name]


def draw(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(B, S, V, generator=g, dtype=torch.float64) * 3).to(dtype)
    x[0, 1] += 1e4
    x[1, 0, 8:13] = -math.inf
    ids = torch.tensor([[0, 6, 7], [3, 13, 10]])
    keep = torch.rand(B, S, V, generator=g) < 0.5
    return x, ids, keep | (torch.arange(V) == 1)


# --- the calls: (this rank's logits, ids, keep-mask, group, first column) -> tuple of results ----------

OOV = torch.tensor([[False, True, False], [False, False, True]])  # an id of no rank
PADDED, UNEVEN = 11, 13


def own_columns(mask, start, x):
    return rows(mask[..., start : start + x.shape[-1]])


def with_oov(ids):
    return ids.masked_fill(OOV, V + 5)


def with_ignored(ids):
    return ids.masked_fill(OOV, -100)


def topk(ids):
    return torch.stack([ids, (ids + 9) % V, with_oov(ids)], -1)


def csr(keep):
    """Ids and offsets of each row's set."""
    sets = rows(keep)
    return sets.nonzero()[:, 1], torch.cat([torch.zeros(1, dtype=torch.int64), sets.sum(-1).cumsum(0)])


def lists(keep):
    return rlkern.Kept.csr(*csr(keep))


def miles_lists(x, keep, tp_rank):
    n = len(x)
    return miles.build_local_sampling_mask(x, *csr(keep), torch.arange(n), response_length=n, tp_rank=tp_rank)


def skyrl_scores(x, ids, group, start, **head):
    values, offsets = csr(draw()[2])
    support = SimpleNamespace(values=values, row_lengths=offsets.diff())
    at = {"vocab_start_index": start, "vocab_end_index": start + 7, "tp_group": group}
    options = {"compute_entropy": True, "entropy_requires_grad": True, **head}
    return skyrl.sample_support_csr_scores(x, ids, support, torch.arange(len(ids)), **at, **options)[:2]


def sharded(columns, group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(columns, DeviceMesh.from_group(group, "cpu", mesh=torch.arange(2)), [Shard(1)])


def rows(x):
    return x.flatten(0, 1)


CALLS = {
    "megatron": lambda x, ids, keep, group, start: (megatron.vocab_parallel_cross_entropy(x, with_ignored(ids), 0.0, group),),
    "megatron, its group": lambda x, ids, keep, group, start: (megatron.vocab_parallel_cross_entropy(x, ids),),
    "megatron fused": lambda x, ids, keep, group, start: (megatron.fused_vocab_parallel_cross_entropy(x, ids, group),),
    "megatron smoothed": lambda x, ids, keep, group, start: (megatron.vocab_parallel_cross_entropy(x.clamp(-30, 30), with_ignored(ids), 0.1, group),),
    "megatron padded": lambda x, ids, keep, group, start: (
        megatron.vocab_parallel_cross_entropy(x, ids % PADDED, 0.0, group, vocab_size=PADDED),
        megatron.vocab_parallel_cross_entropy(x.clamp(-30, 30), ids % PADDED, 0.3, group, vocab_size=PADDED),
    ),
    "verl": lambda x, ids, keep, group, start: (
        verl.vocab_parallel_log_probs_from_logits(x, ids),
        verl.vocab_parallel_entropy(x),
        verl.vocab_parallel_entropy_with_chunking(x, 2),
        verl.vocab_parallel_sum_pi_squared(x),
    ),
    "slime": lambda x, ids, keep, group, start: slime.calculate_log_probs_and_entropy(rows(x), rows(ids), group, True, 2),
    "slime kept": lambda x, ids, keep, group, start: slime.calculate_log_probs_and_entropy(
        rows(x), rows(ids), group, True, 2, own_columns(keep, start, x)
    ),
    "slime, lists": lambda x, ids, keep, group, start: slime.calculate_log_probs_and_entropy(
        rows(x), rows(ids), group, True, log_prob_keep_mask=lists(keep)
    ),
    "miles, lists": lambda x, ids, keep, group, start: miles.calculate_log_probs_and_entropy(
        rows(x), rows(ids), group, True, sampling_mask=miles_lists(rows(x), keep, start // 7)
    ),
    "skyrl, lists": lambda x, ids, keep, group, start: skyrl_scores(rows(x), rows(ids), group, start),
    "slime kept, no entropy gradient": lambda x, ids, keep, group, start: slime.calculate_log_probs_and_entropy(
        rows(x), rows(ids), group, True, log_prob_keep_mask=own_columns(keep, start, x), with_entropy_grad=False
    ),
    "miles": lambda x, ids, keep, group, start: miles.calculate_log_probs_and_entropy(rows(x), rows(ids), group, True, vocab_size=V),
    "nemo_rl": lambda x, ids, keep, group, start: (
        nemo_rl.DistributedLogprob.apply(x, with_oov(ids), start, start + 7, group, False),
        nemo_rl.ChunkedDistributedLogprob.apply(x, ids, start, start + 7, 2, group, False),
        nemo_rl.ChunkedDistributedEntropy.apply(x, 2, group, False),
    ),
    "nemo_rl gather": lambda x, ids, keep, group, start: (
        nemo_rl.ChunkedDistributedGatherLogprob.apply(x, topk(ids), start, start + 7, 2, group, False),
    ),
    "skyrl": lambda x, ids, keep, group, start: (
        skyrl.ChunkedDistributedLogprob.apply(x, with_oov(ids), start, start + 7, 2, group),
        skyrl.vocab_parallel_entropy(x, chunk_size=2),
    ),
    "areal": lambda x, ids, keep, group, start: (
        areal.gather_logprobs(x, ids, T, group),
        *areal.gather_logprobs_entropy(x, ids, T, tp_group=group, chunk_size=1),
    ),
    "torchtitan": lambda x, ids, keep, group, start: (
        torchtitan._LossParallelCrossEntropy.apply(rows(x)[:, : UNEVEN - start], rows(with_ignored(ids % UNEVEN)), group, UNEVEN),
        torchtitan._LossParallelCrossEntropy.apply(rows(x)[:, : UNEVEN - start], rows(ids % UNEVEN), group, UNEVEN, "none"),
    ),
    "torchtitan log-probabilities": lambda x, ids, keep, group, start: torchtitan.compute_logprobs(
        rows(x), rows(ids), return_entropy=True, tp_group=group
    ),
    "torchtitan, its mesh": lambda x, ids, keep, group, start: (torchtitan.compute_logprobs(rows(x), rows(ids)),),
    "torchtitan, a DTensor": lambda x, ids, keep, group, start: (torchtitan.compute_logprobs(sharded(rows(x), group), rows(ids)),),
}


# --- what they are of whole rows ----------------------------------------------------------------------------


def logp_of(x, ids):
    return x.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy_of(x):
    logp = x.log_softmax(-1)
    return -torch.where(logp == -math.inf, 0, logp.exp() * logp.clamp(min=-1e9)).sum(-1)


def summing_logp_of(x, ids):
    """What the sum over ranks gives where no rank has the id: value 0, gradient of -logsumexp."""
    lse = x.logsumexp(-1)
    return torch.where(ids < V, logp_of(x, ids.clamp(max=V - 1)), lse.detach() - lse)


def kept_of(x, ids, keep):
    return x.masked_fill(~(keep | one_hot(ids, V).bool()), -math.inf)


def kept_logp_of(x, ids, keep):
    return logp_of(kept_of(x, ids, keep), ids)


def smoothed_of(x, ids, smoothing):
    """(1 - smoothing) of the target's loss, the rest even over the others'."""
    n, loss = x.shape[-1], -x.log_softmax(-1)
    target = loss.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (1 - smoothing) * target + smoothing / (n - 1) * (loss.sum(-1) - target)


EXPECTED = {
    "megatron": lambda x, ids, keep: (-logp_of(x, ids).masked_fill(OOV, 0),),
    "megatron, its group": lambda x, ids, keep: (-logp_of(x, ids),),
    "megatron fused": lambda x, ids, keep: (-logp_of(x, ids),),
    "megatron smoothed": lambda x, ids, keep: (smoothed_of(x.clamp(-30, 30), ids, 0.1).masked_fill(OOV, 0),),
    "megatron padded": lambda x, ids, keep: (
        -logp_of(x[..., :PADDED], ids % PADDED),
        smoothed_of(x.clamp(-30, 30)[..., :PADDED], ids % PADDED, 0.3),
    ),
    "verl": lambda x, ids, keep: (logp_of(x, ids), entropy_of(x), entropy_of(x), x.softmax(-1).square().sum(-1)),
    "slime": lambda x, ids, keep: (rows(logp_of(x, ids)).unsqueeze(-1), rows(entropy_of(x))),
    "slime kept": lambda x, ids, keep: (rows(kept_logp_of(x, ids, keep)).unsqueeze(-1), rows(entropy_of(x))),
    "slime, lists": lambda x, ids, keep: (rows(kept_logp_of(x, ids, keep)).unsqueeze(-1), rows(entropy_of(x))),
    "miles, lists": lambda x, ids, keep: (rows(kept_logp_of(x, ids, keep)).unsqueeze(-1), rows(entropy_of(x))),
    "skyrl, lists": lambda x, ids, keep: (rows(kept_logp_of(x, ids, keep)), rows(entropy_of(kept_of(x, ids, keep)))),
    "slime kept, no entropy gradient": lambda x, ids, keep: (rows(kept_logp_of(x, ids, keep)).unsqueeze(-1), rows(entropy_of(x)).detach()),
    "miles": lambda x, ids, keep: (rows(logp_of(x, ids)).unsqueeze(-1), rows(entropy_of(x))),
    "nemo_rl": lambda x, ids, keep: (summing_logp_of(x, with_oov(ids)), logp_of(x, ids), -entropy_of(x)),
    "nemo_rl gather": lambda x, ids, keep: (torch.stack([summing_logp_of(x, i) for i in topk(ids).unbind(-1)], -1),),
    "skyrl": lambda x, ids, keep: (summing_logp_of(x, with_oov(ids)), entropy_of(x)),
    "areal": lambda x, ids, keep: (logp_of(x / T, ids), logp_of(x / T, ids), entropy_of(x / T)),
    "torchtitan": lambda x, ids, keep: (
        cross_entropy(rows(x)[:, :UNEVEN], rows(with_ignored(ids % UNEVEN)), reduction="sum"),
        -rows(logp_of(x[..., :UNEVEN], ids % UNEVEN)),
    ),
    "torchtitan log-probabilities": lambda x, ids, keep: (rows(logp_of(x, ids)), rows(entropy_of(x)).detach()),
    "torchtitan, its mesh": lambda x, ids, keep: (rows(logp_of(x, ids)),),
    "torchtitan, a DTensor": lambda x, ids, keep: (rows(logp_of(x, ids)),),
}


def with_gradient(x, results):
    """The results, and the gradient of a sum of them with weights of their own."""
    loss = sum((r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    (gradient,) = torch.autograd.grad(loss, x)
    return [r.detach() for r in results], gradient


def on_a_rank(group, rank, dtype):
    """All calls, with Megatron's group and torchtitan's mesh in place; padding is NaN."""
    whole, ids, keep = draw(dtype)
    mesh = SimpleNamespace(mesh_dim_names=("dp", "tp"), get_group={"tp": group}.get)
    state, titan = {"get_tensor_model_parallel_group": lambda: group}, {"current_spmd_mesh": lambda: mesh}
    found = {}
    with stub(megatron__core__parallel_state=state, torchtitan__distributed__spmd_types=titan):
        for name, call in CALLS.items():
            shard = whole[..., rank * 7 : rank * 7 + 7].clone()
            if name == "megatron padded":
                shard[..., PADDED - rank * 7 :] = math.nan
            shard.requires_grad_()
            before = shard.detach().clone()
            found[name] = with_gradient(shard, call(shard, ids, keep, group, rank * 7))
            assert shard.detach().equal(before) or before.isnan().any(), f"{name} wrote into the logits"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_two_ranks(dtype):
    ranks = on_ranks(2, on_a_rank, dtype)
    whole, ids, keep = draw(dtype)
    x = whole.double()
    scale = 1e-10 if dtype == torch.float64 else 1e-5
    for name, expected_of in EXPECTED.items():
        leaf = x.clone().requires_grad_()
        expected, gradient = with_gradient(leaf, expected_of(leaf, ids, keep))
        for rank, found in enumerate(ranks):
            results, own = found[name]
            assert [r.shape for r in results] == [e.shape for e in expected], name
            assert all(r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for r in results), name
            for r, e in zip(results, expected, strict=True):
                torch.testing.assert_close(r.double(), e, rtol=scale, atol=scale, msg=lambda m, name=name: f"{name}: {m}")
            wide = {"rtol": 2**-6, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": scale, "atol": scale}
            assert own.dtype == dtype
            torch.testing.assert_close(own.double(), gradient[..., rank * 7 : rank * 7 + 7], **wide, msg=lambda m, name=name: f"{name}: {m}")
        for a, b in zip(*(found[name][0] for found in ranks), strict=True):
            assert torch.equal(a, b), f"{name} differs between the ranks"


def heads(group, rank):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((B, S, 5), (V, 5)))
    shard = weight[rank * 7 : rank * 7 + 7]
    _, ids, keep = draw()
    head = {"lm_head_weight": shard, "temperature": T}
    found = []
    for call, over in (
        (lambda: verl.linear_cross_entropy(hidden, shard, ids, T, "none", group), lambda x: x),
        (lambda: skyrl_scores(rows(hidden), rows(ids), group, rank * 7, **head), lambda x: kept_of(x, ids, keep)),
    ):
        results, gradient = with_gradient(hidden, call())
        x = over(hidden @ weight.T / T)
        exact, whole = with_gradient(hidden, [rows(logp_of(x, ids)), rows(entropy_of(x))])
        torch.testing.assert_close(list(results), exact, rtol=1e-10, atol=1e-10)
        found.append((gradient, whole))
    return found


def test_heads():
    """verl's and SkyRL's: the gradient of hidden is a share of the sum, as there."""
    for (first, whole), (second, _) in zip(*on_ranks(2, heads), strict=True):
        torch.testing.assert_close(first + second, whole, rtol=1e-10, atol=1e-10)
        assert (first - whole).abs().max() > 0.1


def edges(group, rank):
    whole, ids, keep = draw()
    shard = whole[..., rank * 7 : rank * 7 + 7].clone().requires_grad_()
    start = rank * 7
    assert not nemo_rl.DistributedLogprob.apply(shard, ids, start, start + 7, group, True).requires_grad
    assert not nemo_rl.ChunkedDistributedEntropy.apply(shard, 2, group, True).requires_grad
    logp, entropy = slime.calculate_log_probs_and_entropy(shard[0, :0], ids[0, :0], group, True)
    assert logp.shape == entropy.shape == (0,)
    assert slime.calculate_log_probs_and_entropy(rows(shard), rows(ids), group)[1] is None
    assert not miles.calculate_log_probs_and_entropy(rows(shard), rows(ids), group, True, False)[1].requires_grad
    detached = torchtitan.compute_logprobs(rows(shard), rows(ids), return_entropy=True, tp_group=group)
    assert detached[0].requires_grad and not detached[1].requires_grad


def test_edges():
    on_ranks(2, edges)


def wrong(group, rank, name):
    whole, ids, keep = draw()
    shard, sets = whole[..., rank * 7 : rank * 7 + 7], rlkern.Kept.at_least(torch.zeros(B * S))
    calls = {
        "a target beyond": lambda: megatron.vocab_parallel_cross_entropy(shard, with_oov(ids), 0.0, group),
        "a target in the padding": lambda: megatron.vocab_parallel_cross_entropy(shard, ids, 0.0, group, vocab_size=12),
        "smoothing": lambda: megatron.vocab_parallel_cross_entropy(shard, ids, 1.0, group),
        "columns": lambda: torchtitan._LossParallelCrossEntropy.apply(rows(shard), rows(ids), group, 15),
        "reduction": lambda: torchtitan._LossParallelCrossEntropy.apply(rows(shard), rows(ids), group, 14, "mean"),
        "mask": lambda: slime.calculate_log_probs_and_entropy(rows(shard), rows(ids), group, log_prob_keep_mask=rows(keep)),
        "sampling": lambda: nemo_rl.DistributedLogprobWithSampling.apply(shard, ids, group, 3, 1.0),
        "start": lambda: skyrl.DistributedLogprob.apply(shard, ids, 0, 7, group),
        "sets": lambda: slime.calculate_log_probs_and_entropy(rows(shard), rows(ids), group, log_prob_keep_mask=sets),
    }
    calls[name]()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a target beyond", IndexError, "target 19 "),
        ("a target in the padding", IndexError, "target 13 "),
        ("smoothing", ValueError, r"label_smoothing must be in \[0, 1\), got 1"),
        ("columns", ValueError, r"columns must follow one another, but they leave a gap at 7: \[0, 7\) on rank 0, \[8, 15\) on rank 1"),
        ("reduction", ValueError, "unknown reduction 'mean'"),
        ("mask", ValueError, r"log_prob_keep_mask must have the shape of this rank's logits, \(6, 7\), got \(6, 14\)"),
        ("sampling", ValueError, "tp_group: vocabulary-parallel logits are not supported"),
        ("start", ValueError, "columns must follow one another, but they overlap at 0"),
        ("sets", TypeError, "keep must be made by Kept.ids"),
    ],
)
def test_errors(name, kind, message):
    """On both ranks."""
    for error in try_on_ranks(2, wrong, name):
        assert isinstance(error, kind) and re.search(message, str(error)), error


# --- patching -----------------------------------------------------------------------------------------------


def test_without_megatron():
    for call in (megatron.patch, lambda: megatron.vocab_parallel_cross_entropy(*draw()[:2])):
        with pytest.raises(ImportError, match="megatron-core.*no module megatron"):
            call()
    for trainer in (areal, nemo_rl, skyrl, miles):
        with pytest.raises(ImportError, match=r"patch needs .*github\.com.*no module"):
            trainer.patch()


def test_patching_megatron():
    def vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing=0.0, tp_group=None): ...

    def fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group): ...

    own = {f.__name__: f for f in (vocab_parallel_cross_entropy, fused_vocab_parallel_cross_entropy)}
    unfused, fused = ({name: f} for name, f in own.items())
    parts = {"megatron__core__tensor_parallel__cross_entropy": unfused, "megatron__core__fusions__fused_cross_entropy": fused}
    with stub(**parts, megatron__core__models__language_module=own) as modules:
        used = modules["megatron.core.models.language_module"]
        x, ids, _ = draw()
        group = SimpleNamespace()
        with megatron.patch(vocab_size=PADDED):
            logits, labels = x.masked_fill(torch.arange(V) >= PADDED, math.nan), ids % PADDED
            group = None
            with stub(megatron__core__parallel_state={"get_tensor_model_parallel_group": lambda: group}):
                loss = used.vocab_parallel_cross_entropy(logits, labels)
                assert torch.equal(loss, used.fused_vocab_parallel_cross_entropy(logits, labels, group))
            torch.testing.assert_close(loss.double(), -logp_of(x.double()[..., :PADDED], labels), rtol=1e-5, atol=1e-5)
        assert used.vocab_parallel_cross_entropy is vocab_parallel_cross_entropy
        modules["megatron.core.fusions.fused_cross_entropy"].fused_vocab_parallel_cross_entropy = lambda logits: None
        with pytest.raises(ImportError, match=r"this Megatron's fused_vocab_parallel_cross_entropy takes \['logits'\]"):
            megatron.patch()


class _Theirs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vocab_parallel_logits, target, vocab_start_index, vocab_end_index, group, inference_only=False): ...


def test_patching_the_others():
    """Each replaces its functions where they are imported, and refuses other arguments."""
    for trainer, name, function in (
        (areal, "areal__utils__functional__vocab_parallel", "gather_logprobs"),
        (nemo_rl, "nemo_rl__distributed__model_utils", "ChunkedDistributedEntropy"),
        (miles, "miles__backends__training_utils__loss_hub__math_utils", "calculate_log_probs_and_entropy"),
        (skyrl, "skyrl__backends__skyrl_train__distributed__megatron__model_utils", "DistributedLogprob"),
    ):
        ours = {n: getattr(trainer, n) for n in trainer.__all__}
        with stub(**{name: ours | {"patch": None}}) as modules:
            engine = modules[name.partition("__")[0]]
            vars(modules[name.replace("__", ".")])[function] = theirs = _Theirs if function == "DistributedLogprob" else _copy(ours[function])
            setattr(engine, function, theirs)
            with trainer.patch():
                assert getattr(engine, function) is ours[function]
            assert getattr(engine, function) is theirs
            vars(modules[name.replace("__", ".")])[function] = lambda: None
            with pytest.raises(ImportError, match=f"{function} takes"):
                trainer.patch()


def test_patching_verl():
    """Its functions of vocabulary-parallel logits too, where there is Megatron."""
    utils = pytest.importorskip("verl.utils")
    names = (
        "vocab_parallel_log_probs_from_logits",
        "vocab_parallel_entropy",
        "vocab_parallel_entropy_with_chunking",
        "vocab_parallel_sum_pi_squared",
    )
    with stub(megatron__core__parallel_state={"get_tensor_model_parallel_group": lambda: None}):
        module = pytest.importorskip("verl.utils.megatron.tensor_parallel")
        before = dict(vars(module))
        x, ids, _ = draw()
        with verl.patch():
            assert all(getattr(module, name) is getattr(verl, name) for name in names if hasattr(module, name))
            torch.testing.assert_close(module.vocab_parallel_log_probs_from_logits(x, ids).double(), logp_of(x.double(), ids), rtol=1e-5, atol=1e-5)
        assert dict(vars(module)) == before
    del utils.megatron.tensor_parallel, sys.modules[module.__name__]  # it has the stub


def _copy(function):
    """Another object with the same arguments."""
    if isinstance(function, type):
        return type(function.__name__, (), {"apply": function.apply})
    return functools.wraps(function)(lambda *args, **options: None)


def test_options_by_keyword_are_more():
    def theirs(a, b): ...

    def ours(a, b, *, c=None): ...

    def others(a, b, *, c): ...

    owner = SimpleNamespace(f=theirs)
    assert not list(other_arguments(owner, {"f": ours})) and list(other_arguments(owner, {"f": others}))
