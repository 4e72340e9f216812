"""token_divergence and pair_stats of rows whose columns are cut over ranks, or into segments."""

import math

import pair_oracle as oracle
import pytest
import torch
from ranks import compiles, on_ranks, try_on_ranks

import rlkern
from rlkern import gkd_divergence, pair_stats, token_divergence
from rlkern.backends.contract import PairKind
from rlkern.primitives import sharded_stats
from rlkern.primitives.pair_rows import PairOptions, compute_pair, write_pair_gradient
from rlkern.primitives.row_stats import IGNORED, targets_in_part

INF = math.inf
DIVERGENCES = tuple(kind for kind in oracle.NATIVE if kind != "cross_entropy")
VOCAB, REAL = 128, 121  # columns of all ranks, and ids
CUTS = {1: (0, 128), 2: (0, 64, 128), 3: (0, 80, 96, 128), 4: (0, 32, 32, 96, 128)}  # uneven, one of none


def rows(dtype, seed=0):
    """Pairs that differ much, little, by a constant, not at all; some with shards at -inf."""
    z, w = (x.view(3, 6, VOCAB) for x in oracle.draw(18, VOCAB, dtype=dtype, seed=seed))
    noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)
    z[0, 1] *= 30
    w[0, 2] = z[0, 2] + 1e-3 * noise
    w[0, 3] = z[0, 3] + 40 + 1e-2 * noise
    w[0, 4] = z[0, 4]
    w[0, 5] = 20 - z[0, 5]
    z[1, 0, 64:] = w[1, 0, 64:] = -INF
    z[1, 1, :32] = w[1, 1, :32] = -INF
    w[1, 2, 80:96] = -INF
    z[1, 3, 80:96] = -INF
    z[1, 4, :64], w[1, 4, 64:] = -INF, -INF
    w[1, 5, 7] = z[1, 5, 100] = -INF
    z[2, 0, 100], w[2, 1, 3] = math.nan, INF
    z[2, 2], w[2, 3] = -INF, -INF
    z[..., REAL:] = w[..., REAL:] = math.nan  # padding is not read
    targets = torch.randint(REAL, (3, 6), generator=torch.Generator().manual_seed(seed))
    targets[2, 4] = -100
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 5] = False
    return z, w, targets, mask


def cases(dtype):
    """Options of a call, and whether it has targets."""
    per_row = torch.linspace(0.5, 2, 18, dtype=dtype).view(3, 6)
    many = {"temperature": 0.7}, {"temperature": per_row, "other_temperature": 1.2}, {"softcap": 30.0, "logit_scale": 0.8, "temperature": per_row}
    for i, kind in enumerate(oracle.NATIVE):
        yield {"kind": kind, "beta": 0.3, "other_grad": kind != "cross_entropy", **many[i % 3]}, True
        yield {"kind": kind, "beta": 0.7, **many[(i + 1) % 3]}, i % 2 == 1


def run(z, w, targets, mask, **options):
    """(PairStats, gradient by the logits, by the other) of a loss that weighs all results, by row."""
    leaves = z.clone().requires_grad_(), w.clone().requires_grad_()
    stats = pair_stats(*leaves, targets, mask=mask, **options)
    total = 0.0
    for i, x in enumerate(stats):
        if x is not None and x.requires_grad:
            total = total + (torch.where(x.isfinite(), x, 0) * torch.linspace(0.5, i + 1, x.numel(), dtype=x.dtype).view_as(x)).sum()
    total.backward()
    return [x if x is None else x.detach() for x in stats], *(x.grad for x in leaves)


def columns_of(group, rank, world):
    first, end = CUTS[world][rank : rank + 2]
    return slice(first, end), {"group": group, "vocab_start": first, "vocab_size": REAL}


def on_columns(group, rank, world, dtype):
    """`run` of every case, of a rank's columns."""
    z, w, targets, mask = rows(dtype)
    here, at = columns_of(group, rank, world)
    return [run(z[..., here], w[..., here], targets if named else None, mask, **at, **options) for options, named in cases(dtype)]


def close(x, wanted, tolerance, at_least=1.0):
    """Relative, but for values below at_least. The same values are infinite or NaN."""
    finite = wanted.isfinite()
    assert torch.equal(x[~finite].nan_to_num(7), wanted[~finite].nan_to_num(7))
    error = (x - wanted)[finite].abs() / wanted[finite].abs().clamp(min=at_least)
    assert error.numel() == 0 or error.max() < tolerance, (error.max().item(), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_shards_are_the_whole_rows(world, dtype):
    z, w, targets, mask = rows(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for (options, named), *by_rank in zip(cases(dtype), *on_ranks(world, on_columns, world, dtype), strict=True):
        wanted, *gradients = run(z, w, targets if named else None, mask, vocab=REAL, **options)
        stats = [rank[0] for rank in by_rank]
        for i, whole in enumerate(wanted):
            assert all((of_rank[i] is None) == (whole is None) for of_rank in stats)
            if whole is not None:
                assert all(torch.equal(of_rank[i].nan_to_num(7), stats[0][i].nan_to_num(7)) for of_rank in stats)
                # With two temperatures an error of one part in 1e7 of the logits counts as a difference.
                close(stats[0][i], whole, tolerance, 1e-6 if i == 0 and "other_temperature" not in options else 1.0)
        defined = wanted[-2].isfinite() & wanted[-1].isfinite()
        for j, whole in enumerate(gradients, 1):
            parts = [rank[j] for rank in by_rank]
            if whole is None:
                assert parts == [None] * world
                continue
            gradient = torch.cat(parts, -1)
            assert not gradient[..., REAL:].any() and not gradient[2, 5].any()
            close(gradient[defined], whole[defined], tolerance)


def nearly_equal_rows():
    """Multiples of 2^-14 in float32: their differences are exact. Half of them also differ by a constant."""
    z, noise = (x.mul(2**14).round() / 2**14 for x in oracle.draw(6, VOCAB, seed=5))
    w = z + noise / 2**14
    w[3:] += 64
    return z, w


def on_nearly_equal_rows(group, rank):
    z, w = nearly_equal_rows()
    here, at = columns_of(group, rank, 3)
    found = []
    for kind in DIVERGENCES:
        leaf = z[:, here].clone().requires_grad_()
        value = token_divergence(leaf, w[:, here], kind=kind, beta=0.3, **at)
        value.sum().backward()
        found.append((value.detach().double(), leaf.grad.double()))
    return found


def test_nearly_equal_rows_keep_their_digits():
    z, w = nearly_equal_rows()
    for kind, *by_rank in zip(DIVERGENCES, *on_ranks(3, on_nearly_equal_rows), strict=True):
        wanted, gradient, largest = oracle.precise(z[:, :REAL], w[:, :REAL], kind, 0.3)
        assert wanted.max() < 1e-7
        assert (by_rank[0][0] / wanted - 1).abs().max() < 1e-6, kind
        dz = torch.cat([dz for _, dz in by_rank], -1)[:, :REAL]
        assert ((dz - gradient).abs().amax(-1) / largest).max() < 2e-6, kind


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", oracle.NATIVE)
def test_segments_are_the_whole_rows(kind, backend):
    z, w, targets, mask = rows(torch.float64)
    with rlkern.use_backend(backend):
        for options, named in cases(torch.float64):
            if options["kind"] == kind and named:
                wanted, *gradients = run(z, w, targets, mask, vocab=REAL, **options)
                stats, *of_segments = run(z, w, targets, mask, vocab_size=REAL, segments=8, **options)
                for x, whole in zip(stats, wanted, strict=True):
                    close(x, whole, 1e-10)
                defined = wanted[-2].isfinite() & wanted[-1].isfinite()
                for x, whole in zip(of_segments, gradients, strict=True):
                    assert x is whole or close(x[defined], whole[defined], 1e-10) is None


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_gradient_of_some_columns_has_the_bits_of_all(backend):
    with rlkern.use_backend(backend):
        whole, parts = gradient_by_columns(torch.device("cpu"))
        assert torch.equal(whole, parts)


def gradient_by_columns(device):
    """The gradient by the logits of whole rows, at once and from some columns at a time."""
    z, w = (x.to(device) for x in oracle.draw(6, VOCAB, seed=3))
    y = torch.tensor([0, 31, 32, 100, -100, 127], device=device)
    o = PairOptions(0.7, 0.7, -100, PairKind.MIXED_KL, 0.3, VOCAB, True, True)
    state = compute_pair(z, w, y, None, None, None, *o)[-1]
    grads = [torch.linspace(-1, 1 + i, 6, device=device) for i in range(4)]
    whole, parts = torch.empty_like(z), torch.empty_like(z)
    write_pair_gradient(whole, z, w, y, None, None, None, *o, state, *grads)
    for first, stop in ((0, 32), (32, 96), (96, VOCAB)):
        here, targets = o._replace(ignore_index=IGNORED, vocab=stop - first), targets_in_part(y, first, stop, VOCAB, -100)
        columns = (x[:, first:stop] for x in (parts, z, w))
        write_pair_gradient(*columns, targets, None, None, None, *here, state, *grads)
    return whole, parts


def in_segments(group, rank, world):
    z, w, targets, mask = rows(torch.float32)
    here = slice(rank * VOCAB // world, (rank + 1) * VOCAB // world)
    at = {"group": group, "vocab_size": REAL, "segments": 8}
    return [run(z[..., here], w[..., here], targets, mask, kind=kind, beta=0.3, other_grad=True, **at) for kind in ("mixed_kl", "jsd")]


def test_segments_have_the_same_bits_on_any_number_of_ranks():
    z, w, targets, mask = rows(torch.float32)
    for i, kind in enumerate(("mixed_kl", "jsd")):
        wanted, *gradients = run(z, w, targets, mask, kind=kind, beta=0.3, other_grad=True, vocab_size=REAL, segments=8)
        for world in (1, 2, 4):
            by_rank = [rank[i] for rank in on_ranks(world, in_segments, world)]
            for stats, *_ in by_rank:
                assert all(torch.equal(x.nan_to_num(7), whole.nan_to_num(7)) for x, whole in zip(stats, wanted, strict=True))
            for j, whole in enumerate(gradients, 1):
                assert torch.equal(torch.cat([rank[j] for rank in by_rank], -1).nan_to_num(7), whole.nan_to_num(7))


def on_one_rank(group, rank):
    z, w, targets, mask = rows(torch.float32)
    plain = run(z, w, targets, mask, kind="jsd", vocab=REAL)
    both = [run(z, w, targets, mask, kind="jsd", vocab_size=REAL, **at) for at in ({}, {"group": group, "vocab_start": 0})]
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for results in both for x, y in zip(results[0], plain[0], strict=True)) and all(
        torch.equal(results[1].nan_to_num(7), plain[1].nan_to_num(7)) for results in both
    )


def test_one_rank_is_the_plain_call():
    assert on_ranks(1, on_one_rank) == [True]


def counted(group, rank):
    """How often ranks wait for one another in a forward, and in a backward; and the gradient in place."""
    z, w, targets, _ = (x[0] for x in rows(torch.float32))
    z, w = z.nan_to_num(0), w.nan_to_num(0)
    here, at = columns_of(group, rank, 2)
    gathered, gather = [], sharded_stats.gather
    sharded_stats.gather = lambda x, *group: (gathered.append(x.shape), gather(x, *group))[1]
    try:
        found = []
        for kind in ("reverse_kl", "skew_forward_kl"):
            gradients = []
            for in_place in (False, True):
                leaf = z[..., here].clone().requires_grad_()
                logits = leaf * 1
                stats = pair_stats(logits, w[..., here], targets, kind=kind, inplace_backward=in_place, **at)
                forward = len(gathered)
                (stats.divergence.sum() + 2 * stats.logp.sum()).backward()
                gradients.append(leaf.grad)
                found.append((forward, len(gathered) - forward))
                gathered.clear()
            found.append(torch.equal(*gradients))
        with torch.no_grad():
            value = gkd_divergence(z[..., here], w[..., here], 0.5, **at)
            found.append(torch.equal(value, token_divergence(z[..., here], w[..., here], kind="jsd", **at)))
        return found
    finally:
        sharded_stats.gather = gather


def test_collectives():
    assert on_ranks(2, counted) == [[(1, 0), (1, 0), True, (2, 0), (2, 0), True, True]] * 2


def compiled(group, rank):
    z, w, targets, mask = rows(torch.float32)
    here, at = columns_of(group, rank, 2)

    def loss(z, w, targets):
        stats = pair_stats(z, w, targets, kind="jsd", mask=mask, other_grad=True, temperature=0.7, **at)
        return stats.divergence[0].sum() + stats.logp[0].sum(), stats.other_entropy

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [x[..., here].clone().requires_grad_() for x in (z, w)]
        total, entropy = function(*leaves, targets)
        total.backward()
        found.append([total.detach(), entropy[0].detach(), *(x.grad[0] for x in leaves)])
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(*found, strict=True))


@compiles
def test_compiles_as_one_graph():
    assert on_ranks(2, compiled) == [True, True]


def test_opcheck():
    ops, checks = torch.ops.rlkern, ("test_schema", "test_faketensor")
    z, w = oracle.draw(3, 64, seed=1)
    rows = torch.tensor([0, -100, 60]), torch.tensor([True, True, False]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0])
    for targets, with_stats in ((rows[0], True), (None, False)):
        o = PairOptions(1.0, 1.0, -100, PairKind.JSD, 0.3, 60, with_stats, with_stats)
        of_rows = (targets, *rows[1:], *o)
        parts = ops.pair_parts(z, w, *of_rows, 0, 4)
        torch.library.opcheck(ops.pair_merge.default, (parts, *of_rows), test_utils=checks)
    *_, state = ops.pair_merge(parts, *of_rows)
    torch.library.opcheck(ops.pair_parts.default, (z, w, *of_rows, 0, 4), test_utils=checks)
    torch.library.opcheck(ops.pair_mixture_sums.default, (z, w, *of_rows, 0, 4, state), test_utils=checks)


def faulty(group, rank, change, only):
    z, w = oracle.draw(2, 64, seed=1)
    arguments = {"group": group, "targets": torch.tensor([0, 127])}
    if only is None or rank == only:
        arguments |= change
    other = arguments.pop("other", w)
    pair_stats(z, other, **arguments)


@pytest.mark.parametrize(
    ("change", "only", "error", "message"),
    [
        ({"kind": "jsd"}, 1, ValueError, "must agree on kind, got reverse_kl, jsd by rank"),
        ({"other": torch.zeros(2, 64, dtype=torch.bfloat16)}, 1, ValueError, "must agree on other's dtype, got float32, bfloat16 by rank"),
        ({"targets": torch.tensor([0, 128])}, None, IndexError, "target 128 of row 1 is out of range for 128 logits"),
        ({"other": torch.zeros(2, 60)}, None, ValueError, "logits and other must hold the same columns, got 64 and 60"),
        ({"vocab": 60}, None, ValueError, "give vocab_size alone, got vocab=60"),
        ({"kind": "alpha"}, None, ValueError, "kind='alpha' takes no group"),
        ({"segments": 3}, None, ValueError, "segments must be a multiple of the 2 ranks"),
        ({"beta": "half"}, 0, (TypeError, ValueError), "beta must be a number|rank 0 of the group refused its arguments"),
    ],
)
def test_refuses(change, only, error, message):
    for raised in try_on_ranks(2, faulty, change, only):
        with pytest.raises(error, match=message):
            raise raised


def test_refuses_without_a_group():
    z, w = oracle.draw(2, 64)
    for change, message in (({"vocab_size": 65}, "vocab_size must be at most the 64 columns"), ({"vocab_start": 3}, "vocab_start must be 0 or None")):
        with pytest.raises(ValueError, match=message):
            token_divergence(z, w, **change)
