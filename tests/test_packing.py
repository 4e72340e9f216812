"""rlkern.packed, and losses on packs: as on padded rows, whatever the layout, also with parts elsewhere.

Every loss also runs packed in the battery (check_packed) and in the fuzz.
"""

import math

import pytest
import torch
from loss_battery import Packing
from thread_ranks import thread_ranks
from torch._dynamo.testing import CompileCounterWithBackend

import rlkern
from rlkern import next_tokens, packed

F64 = torch.float64
CU = torch.tensor([0, 3, 4, 4, 8], dtype=torch.int32)
MASK = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1, 1])


def lengths_of(pack):
    return pack.lengths[: pack.num_seqs].tolist()


# --- construction -------------------------------------------------------------------------------------------


def test_what_a_pack_says():
    pack = packed(CU, MASK)
    assert pack.seq_idx.tolist() == [0, 0, 0, 1, 3, 3, 3, 3, 4, 4]
    assert pack.mask.tolist() == [True] * 5 + [False] + [True] * 2 + [False] * 2
    assert (pack.cu_seqlens.tolist(), pack.lengths.tolist(), pack.num_seqs) == (CU.tolist(), [3, 1, 0, 3], 4)
    x = torch.arange(10.0).masked_fill(~pack.mask, math.nan).requires_grad_()
    assert pack.sum(x).tolist() == [3, 3, 0, 17] and pack.mean(x).tolist() == pytest.approx([1, 3, 0, 17 / 3])
    assert pack.max(x).tolist() == [2, 3, -math.inf, 7] and pack.min(x).tolist() == [0, 3, math.inf, 4]
    assert pack.rank()[:8].tolist() == [0, 1, 2, 0, 0, 1, 1, 2]
    assert pack.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 1, 1, 2, 4, 4, 4, 4, 0, 0]
    (pack.sum(x) * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 2, 4, 0, 4, 4, 0, 0]
    rows = rlkern.primitives.packing.Rows(torch.tensor([[True, True, False], [False, False, False], [True, False, True]]))
    y = torch.arange(9.0).view(3, 3)
    assert (rows.sum(y).tolist(), rows.max(y).tolist(), rows.min(y).tolist()) == ([1, 0, 14], [1, -math.inf, 8], [0, math.inf, 6])
    assert rows.rank().tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ({"lengths": [3, 0, 2]}, [3, 0, 2]),
        ({"lengths": torch.tensor([3, 0, 2]), "num_tokens": 7}, [3, 0, 2]),
        ({"position_ids": torch.tensor([0, 1, 2, 0, 1, 0, 0, 0])}, [3, 2, 1, 1, 1]),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]]), "num_seqs": 2}, [3, 2]),
        ({"position_ids": torch.tensor([[0, 1, 2], [3, 4, 0]]), "num_seqs": 4}, [3, 2, 1, 0]),
        ({"segment_ids": torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]]), "padding_id": 0}, [2, 1, 0, 1, 3]),
        ({"segment_ids": torch.tensor([[0, 0, 1, 1, 1]]), "num_seqs": 2}, [2, 3]),
        ({"segment_ids": torch.zeros(1, 0, dtype=torch.int64), "num_seqs": 2}, [0, 0]),
        ({"cu_seqlens": torch.tensor([0, 4, 8, 12]), "num_tokens": 12, "seq_lens": torch.tensor([3, 0, 4])}, [3, 0, 4]),
        ({"cu_seqlens": torch.tensor([0]), "num_tokens": 2}, []),
    ],
)
def test_forms(given, lengths):
    pack = packed(**given)
    assert lengths_of(pack) == lengths
    assert pack.sum(torch.ones(pack.mask.numel()))[: pack.num_seqs].tolist() == lengths
    assert [(pack.seq_idx[pack.mask] == i).sum().item() for i in range(len(lengths))] == lengths


def test_slots_with_holes():
    pack = packed(torch.tensor([0, 4, 8]), torch.tensor([1, 0, 1, 1, 1, 1, 1, 1]), seq_lens=torch.tensor([3, 2]))
    assert pack.seq_idx.tolist() == [0, 0, 0, 2, 1, 1, 2, 2] and pack.lengths.tolist() == [2, 2]
    assert next_tokens(torch.arange(8), -1, packed=pack).tolist() == [1, 2, -1, -1, 5, -1, -1, -1]


def test_next_tokens_stay_in_their_sequence():
    pack = packed(CU, MASK)
    assert next_tokens(torch.arange(10), -1, packed=pack).tolist() == [1, 2, -1, -1, 5, 6, 7, -1, -1, -1]
    assert next_tokens(MASK.bool().view(1, 10), False, packed=pack).tolist() == [[True, True, False, False, False, True, True, False, False, False]]
    assert next_tokens(torch.arange(0), -1, packed=packed(lengths=[])).tolist() == []
    with pytest.raises(ValueError, match=r"labels must have the 10 tokens of the pack, got shape \(9,\)"):
        next_tokens(torch.arange(9), packed=pack)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "exactly one of cu_seqlens, lengths, position_ids, segment_ids, got none"),
        ({"cu_seqlens": CU, "lengths": [8]}, ValueError, "got cu_seqlens and lengths"),
        ({"cu_seqlens": CU}, ValueError, "needs mask= or num_tokens= beside cu_seqlens"),
        ({"cu_seqlens": CU + 1, "num_tokens": 10}, ValueError, "must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2]), "num_tokens": 10}, ValueError, "cu_seqlens must not descend"),
        ({"cu_seqlens": CU, "mask": MASK[:7]}, ValueError, "must end within the 7 tokens of mask or num_tokens, got 8"),
        ({"cu_seqlens": CU, "mask": MASK, "num_tokens": 9}, ValueError, "num_tokens must be the number of elements of mask, 10, got 9"),
        ({"cu_seqlens": CU.float(), "mask": MASK}, TypeError, "cu_seqlens must be an integer tensor"),
        ({"cu_seqlens": CU[:0], "mask": MASK}, ValueError, r"cu_seqlens must be \[S \+ 1\]"),
        ({"cu_seqlens": CU, "mask": MASK, "num_seqs": 3}, ValueError, "num_seqs must be the number of sequences, 4 by cu_seqlens, got 3"),
        ({"cu_seqlens": CU, "mask": MASK, "seq_lens": CU}, ValueError, "seq_lens"),
        ({"cu_seqlens": CU, "mask": MASK, "seq_lens": torch.tensor([3, 2, 0, 4])}, ValueError, "seq_lens must be from 0 to the sizes"),
        ({"cu_seqlens": CU, "mask": MASK, "full_lengths": torch.tensor([3, 1, 0, 2])}, ValueError, "full_lengths must be at least"),
        ({"lengths": [3, -1], "num_tokens": 4}, ValueError, "lengths must not be negative, nor more than there is memory for, got -1 to 3"),
        ({"position_ids": torch.arange(4), "mask": MASK}, ValueError, r"mask must have the 4 tokens of position_ids, got shape \(10,\)"),
        ({"position_ids": torch.arange(4), "padding_id": 0}, ValueError, "padding_id is an integer for segment_ids"),
    ],
)
def test_construction_errors(given, error, message):
    with pytest.raises(error, match=message):
        packed(**given)


def test_a_nested_tensor_is_refused():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"pass .values\(\), and packed\(x.offsets\(\)\)"):
        packed(nested)
    assert packed(nested.offsets(), nested.values()).lengths.tolist() == [2, 3]


# --- the numbers of a small pack ----------------------------------------------------------------------------

OLD = torch.tensor([-1, -2, -0.5, -1.5, -0.7, -1.1, -0.9, -2.5, -1, -1], dtype=F64)
D = torch.tensor([0.3, -0.3, 0.6, 1, -0.2, 9, 0.1, 0.5, 7, -7], dtype=F64)
A = torch.tensor([1, -1, 3, 2], dtype=F64)
REFERENCE = torch.tensor([-1.2, -1.5, -0.5, -1, -0.9, -1, -1, -2, 0, 0], dtype=F64)
KL_SCALE = torch.tensor([0.5, 1, 1, 2], dtype=F64)
NUMBERS = {
    "token-mean": (-0.952906, -0.945985, -0.897903, -1.114530, -1.048662, 0.608604),
    "seq-mean-token-mean": (-0.137086, -0.129336, -0.094306, -0.262794, -0.211564, 0.401553),
    "grpo": (-0.102815, -0.097002, -0.070730, -0.197096, -0.158673, 0.301165),
}


@pytest.mark.parametrize("aggregation", NUMBERS)
def test_numbers(aggregation):
    pack = packed(CU, MASK)
    garbage = [x.masked_fill(~pack.mask, math.nan) for x in (OLD + D, OLD, REFERENCE)]
    logp, old, reference = garbage
    options = {"aggregation": aggregation}
    losses = [
        rlkern.ppo_loss(logp, old, A, pack, dual_clip=3.0, **options),
        rlkern.grpo_loss(logp, old, A, pack, reference_logp=reference, kl_coef=0.1, kl_scale=KL_SCALE, **options),
        rlkern.gspo_loss(logp, old, A, pack, **options),
        rlkern.gspo_loss(logp, old, A.unsqueeze(-1), pack, clip_low=0.9, clip_high=9.0, **options),
        rlkern.gmpo_loss(logp.view(1, 10), old.view(1, 10), A, pack, **options),
        rlkern.vespo_loss(logp, old, A, pack, **options),
    ]
    assert [loss.loss.item() for loss in losses] == pytest.approx(NUMBERS[aggregation], abs=5e-7)


def test_numbers_of_nft():
    rate, correct = torch.tensor([0.5, 0.25, 0.5, 0.75], dtype=F64), torch.tensor([1, 0, 1, 0])
    loss, metrics = rlkern.nft_loss(OLD + D, OLD, rate, correct, packed(CU, MASK), ratio_type="sequence")
    assert loss.item() == pytest.approx(-0.3) and metrics["answers"] == 3


# --- random packs -------------------------------------------------------------------------------------------


def elbo_like(logp, old_logp, advantages, mask):
    return rlkern.wd1_loss(logp, advantages, mask)


LOSSES = {
    "ppo": rlkern.ppo_loss,
    "grpo": lambda *x: rlkern.grpo_loss(*x, reference_logp=x[1], kl_coef=0.1, aggregation="grpo"),
    "gspo": rlkern.gspo_loss,
    "gmpo": rlkern.gmpo_loss,
    "vespo": rlkern.vespo_loss,
    "clip_cov": lambda *x: rlkern.clip_cov_loss(*x, select_ratio=1.0, cov_low=0.3),
    "kl_cov": lambda *x: rlkern.kl_cov_loss(*x, select_ratio=0.2, aggregation="seq-mean-token-sum"),
    "wd1": elbo_like,
}


def test_a_thousand_random_packs():
    """With empty sequences, sequences of one token, holes, padding; float32 and float64 by turns."""
    g = torch.Generator().manual_seed(0)
    names = list(LOSSES)
    for trial in range(1000):
        dtype, tolerance = ((torch.float32, 1e-6), (F64, 1e-12))[trial % 2]
        batch, length = torch.randint(1, 9, (2,), generator=g).tolist()
        ends = torch.randint(0, length + 1, (batch, 1), generator=g) * (torch.rand(batch, 1, generator=g) < 0.8)
        mask = (torch.arange(length) < ends) & (torch.rand(batch, length, generator=g) < 0.8)
        old, d, a = (torch.randn(batch, n, generator=g, dtype=dtype) for n in (length, length, 1))
        p = Packing(mask, trial, padding=trial % 3)
        loss = LOSSES[names[trial // 2 % len(names)]]
        results = []
        for tokens, where in ((lambda x: x, mask), (p.input, p.pack)):
            logp = tokens(old + 0.3 * d).requires_grad_()
            output = loss(logp, tokens(old), a, where)
            results.append((output.loss, torch.autograd.grad(output.loss, logp)[0], output.metrics))
        (expected, gradient, metrics), (actual, packed_gradient, packed_metrics) = results
        size = max(gradient.abs().max().item(), 1.0)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=10 * tolerance)
        torch.testing.assert_close(packed_gradient, p.output(gradient), rtol=tolerance, atol=tolerance * size)
        torch.testing.assert_close(packed_metrics, metrics, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_does_not_see_its_neighbours(name):
    """NaN in one sequence reaches the gradient of no other; nor do order, slots and padding change it."""
    if name in ("clip_cov", "kl_cov", "wd1"):
        pytest.skip("compares the tokens of a batch")
    g = torch.Generator().manual_seed(3)
    sizes = [5, 1, 0, 7, 2]
    chunks = [torch.randn(3, n, generator=g) for n in sizes]
    a = torch.randn(5, generator=g)

    def gradients(order, holes=0, poison=None):
        tokens = torch.cat([torch.nn.functional.pad(chunks[i] + (math.nan if i == poison else 0), (0, holes), value=math.nan) for i in order], -1)
        cu = torch.tensor([0] + [sizes[i] + holes for i in order]).cumsum(0)
        pack = packed(cu, num_tokens=tokens.shape[1], seq_lens=torch.tensor([sizes[i] for i in order]))
        logp = (tokens[0] - 2).requires_grad_()
        loss = LOSSES[name](logp, tokens[1] * 0.1 + tokens[0] - 2, a[order], pack).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        return {i: gradient[start : start + sizes[i]] for i, start in zip(order, cu.tolist(), strict=False)}

    plain = gradients([0, 1, 2, 3, 4])
    for other in (gradients([3, 4, 2, 1, 0]), gradients([1, 0, 3, 2, 4], holes=2)):
        assert all(torch.equal(plain[i], other[i]) for i in plain)
    poisoned = gradients([0, 1, 2, 3, 4], poison=3)
    assert all(torch.equal(plain[i], poisoned[i]) for i in plain if i != 3)


@pytest.mark.parametrize("name", LOSSES)
def test_edges(name):
    for lengths, tokens in (([], 0), ([], 3), ([0, 0], 0), ([0, 0], 2), ([1, 1, 1], 3), ([4], 4)):
        logp = torch.full((1, tokens), -1.0, requires_grad=True)
        for where in (packed(lengths=lengths, num_tokens=tokens), packed(lengths=lengths, mask=torch.zeros(tokens))):
            output = LOSSES[name](logp, logp.detach() - 0.1, torch.ones(len(lengths)), where)
            (gradient,) = torch.autograd.grad(output.loss, logp)
            assert output.loss.isfinite() and gradient.isfinite().all() and all(x.isfinite() for x in output.metrics.values())
            assert where.lengths.sum() > 0 or (output.loss == 0 and (gradient == 0).all())


@pytest.mark.parametrize("name", ["gmpo", "nft"])
def test_one_compiled_graph(name):
    counter = CompileCounterWithBackend("aot_eager")
    loss = LOSSES.get(name, lambda logp, old, a, pack: rlkern.nft_loss(logp, old, a.sigmoid(), a > 0, pack, ratio_type="sequence"))

    def step(logp, old, a, cu, mask):
        return loss(logp, old, a, packed(cu, mask)).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for size in (4, 7, 30):
        cu = torch.arange(size + 1) * 3
        old, a = torch.randn(3 * size + 2), torch.randn(size)
        results = []
        for function in (compiled, step):
            logp = (old + 0.1).requires_grad_()
            with torch._dynamo.config.patch(specialize_float=True):  # symbolic floats are traced twice
                value = function(logp, old, a, cu, torch.ones(3 * size + 2))
            results.append([value.detach(), *torch.autograd.grad(value, logp)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


# --- sequences in parts -------------------------------------------------------------------------------------


def in_parts(world, seed=0, groups=None, full=False):
    """Tokens of six sequences, dealt to ranks in zigzag halves; two are empty, one is on one rank alone.

    (old, logp, [per rank: (index, pack)], the whole pack)
    """
    g = torch.Generator().manual_seed(seed)
    sizes = [8, 3, 0, 11, 1, 0]
    cu = torch.tensor([0, *sizes]).cumsum(0)
    mask = torch.rand(int(cu[-1]), generator=g) < 0.9
    whole = packed(cu, mask)
    shards = []
    for rank in range(world):
        index, lengths = [], []
        for start, n in zip(cu.tolist(), sizes, strict=False):
            bounds = [start + round(n * i / (2 * world)) for i in range(2 * world + 1)]
            own = [t for c in (rank, 2 * world - 1 - rank) for t in range(bounds[c], bounds[c + 1])]
            index += own
            lengths.append(len(own))
        shards.append((torch.tensor(index, dtype=torch.int64), lengths))
    old = torch.randn(len(mask), generator=g, dtype=F64) - 2
    return old, old + 0.3 * torch.randn(len(mask), generator=g, dtype=F64), mask, shards, whole


ADVANTAGES = torch.tensor([1.0, -0.5, 2, -1, 0.7, 0.1], dtype=F64)
RATES, CORRECT = torch.tensor([0.5, 0.25, 0.5, 0.75, 0.3, 0.9]), torch.tensor([1, 0, 1, 0, 1, 1])
IN_PARTS = {
    **{f"ppo {mode}": lambda *x, mode=mode, **o: rlkern.ppo_loss(*x, aggregation=mode) for mode in ("token-mean", "seq-mean-token-mean", "grpo")},
    "gspo": lambda *x, **o: rlkern.gspo_loss(*x, clip_low=0.2, clip_high=0.2, **o),
    "gmpo": lambda *x, **o: rlkern.gmpo_loss(*x, **o),
    "vespo": lambda *x, **o: rlkern.vespo_loss(*x, **o),
    "nft": lambda logp, old, a, pack, **o: rlkern.nft_loss(logp, old, RATES, CORRECT, pack, ratio_type="sequence", **o),
    "nash": lambda logp, old, a, pack, **o: rlkern.nash_md_loss(logp, old, RATES, pack),
    "kdrl kept": lambda *x, **o: rlkern.kdrl_loss(*x[:2], x[1], *x[2:], kd_mask=CORRECT, kd_norm="kept", aggregation="grpo"),
    "wd1": lambda logp, old, a, pack, **o: rlkern.wd1_loss(logp, a, pack),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", IN_PARTS)
def test_context_parallel_parts_add_up(name, world):
    old, values, mask, shards, whole = in_parts(world)
    logp = values.clone().requires_grad_()
    expected = IN_PARTS[name](logp, old, ADVANTAGES, whole)
    (gradient,) = torch.autograd.grad(expected.loss, logp)

    def part(group):
        index, lengths = shards[group.place]
        pack = packed(lengths=lengths, mask=mask[index], group=group)
        assert torch.equal(pack.lengths, whole.lengths)
        own = values[index].requires_grad_()
        output = IN_PARTS[name](own, old[index], ADVANTAGES, pack)
        return output.loss.detach(), torch.autograd.grad(output.loss, own)[0], output.metrics

    with thread_ranks(world) as run:
        parts = run(part)
    torch.testing.assert_close(sum(loss for loss, _, _ in parts), expected.loss.detach(), rtol=1e-12, atol=1e-14)
    for (index, _), (_, own, _) in zip(shards, parts, strict=True):
        torch.testing.assert_close(own, gradient[index], rtol=1e-12, atol=1e-15)
    if name not in ("nash", "nft", "wd1"):  # which count sequences
        merged = rlkern.reduce_metrics([metrics for _, _, metrics in parts])
        torch.testing.assert_close(merged, expected.metrics, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "nft"])
def test_parts_in_micro_batches(name):
    """Sums of all parts without gradient, then each part's loss with weights of the whole batch."""
    old, values, mask, shards, whole = in_parts(2, seed=1)
    logp = values.clone().requires_grad_()
    n = 1.0 if name == "nft" else whole.lengths.clamp(min=1) * 4
    how = {} if name == "nft" else {"aggregation": (1 / n).to(F64)}
    expected = IN_PARTS[name](logp, old, ADVANTAGES, whole, **how).loss
    (gradient,) = torch.autograd.grad(expected, logp)
    packs = [packed(lengths=lengths, mask=mask[index], full_lengths=whole.lengths) for index, lengths in shards]
    extra = {"advantages": ADVANTAGES} if name == "gmpo" else {}
    sums = sum(rlkern.log_ratio_sums(values[index], old[index], pack, of=name, **extra) for (index, _), pack in zip(shards, packs, strict=True))
    how |= {"normalizer": 1.0} if name == "nft" else {}
    total = 0
    for (index, _), pack in zip(shards, packs, strict=True):
        own = values[index].requires_grad_()
        loss = IN_PARTS[name](own, old[index], ADVANTAGES, pack, log_ratio_sums=sums, **how).loss
        torch.testing.assert_close(torch.autograd.grad(loss, own)[0], gradient[index], rtol=1e-12, atol=1e-15)
        total += loss.detach()
        with pytest.raises(ValueError, match="need log_ratio_sums="):
            IN_PARTS[name](own, old[index], ADVANTAGES, pack, **how)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=1e-14)


def test_a_rank_that_refuses_is_heard_by_all():
    def build(group):
        return packed(lengths=torch.tensor([3, 2] if group.place else [3, -2]), num_tokens=5, group=group)

    with thread_ranks(2) as run, pytest.raises(ValueError, match="lengths must not be negative"):
        run(build)


# --- weights, refusals --------------------------------------------------------------------------------------


def test_weights_are_an_aggregation():
    pack = packed(CU, MASK)
    n = pack.lengths.clamp(min=1)
    for mode, w in {
        "token-mean": torch.full((4,), 1 / 7, dtype=F64),
        "seq-mean-token-mean": 1 / (3.0 * n.double()),
        "grpo": 1 / (4.0 * n.double()),
    }.items():
        expected = rlkern.ppo_loss(OLD + D, OLD, A, pack, aggregation=mode).loss
        for weights in (w, w.unsqueeze(-1), pack.spread(w.to(F64))):
            torch.testing.assert_close(rlkern.ppo_loss(OLD + D, OLD, A, pack, aggregation=weights).loss, expected)
            torch.testing.assert_close(rlkern.gspo_loss(OLD + D, OLD, A, pack, aggregation=weights).loss,
                                       rlkern.gspo_loss(OLD + D, OLD, A, pack, aggregation=mode).loss)  # fmt: skip
    values, mask = torch.randn(3, 5, dtype=F64), torch.rand(3, 5) < 0.7
    w = torch.rand(3)
    assert rlkern.aggregate(values, mask, w).item() == pytest.approx((values * mask * w.double()[:, None]).sum().item())
    with pytest.raises(ValueError, match="normalizer must be None, got 3"):
        rlkern.aggregate(values, mask, w, normalizer=3)
    with pytest.raises(ValueError, match="aggregation mode"):
        rlkern.aggregate(values, mask, w[:2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: rlkern.ppo_loss(x, x, A, p, aggregation="dr_grpo"), "divides by the padded length"),
        (lambda x, p: rlkern.ppo_loss(x[:9], x[:9], A, p), r"logp must have the 10 tokens of the pack, got shape \(9,\)"),
        (lambda x, p: rlkern.ppo_loss(x, x, A[:3], p), r"advantages must be like logp, \[S\] or \[S, 1\], here \(10,\) or \(4,\) or \(4, 1\)"),
        (lambda x, p: rlkern.ppo_loss(x, x, x, packed(torch.arange(11), MASK)), r"advantages \[10\] may be one a token or one a sequence"),
        (lambda x, p: rlkern.ppo_loss(x, x, A, packed(position_ids=torch.arange(10))), r"advantages has one entry a sequence: .* needs num_seqs="),
        (lambda x, p: rlkern.ppo_loss(x, x, A, p._replace(whole=False)), "parts of sequences"),
        (lambda x, p: rlkern.gmpo_loss(x, x, x, p._replace(own_lengths=p.lengths)), "advantages must be one a sequence"),
        (lambda x, p: rlkern.masked_elbo(x.view(10, 1), MASK * 0, A, mask=p, seq_idx=p.seq_idx), "seq_idx and num_seqs must be None"),
        (lambda x, p: rlkern.masked_elbo(x.view(5, 2), MASK[:5] * 0, A, mask=p), "logits must have the 10 tokens of the pack"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(OLD, packed(CU, MASK))


@pytest.mark.parametrize("loss", [rlkern.clip_cov_loss, rlkern.kl_cov_loss])
def test_losses_that_compare_tokens_take_no_group(loss):
    def call(group):
        x = torch.zeros(2)
        return loss(x, x, torch.ones(1), packed(lengths=torch.tensor([2]), num_tokens=2, group=group))

    with thread_ranks(2) as run, pytest.raises(ValueError, match="takes no pack with group="):
        run(call)


def test_what_cannot_be_told_apart_is_refused():
    """As many tokens as sequences: [S, 1] beside logp [N, 1], [S] beside [N]."""
    pack, x, a = packed(torch.tensor([0, 2, 2]), num_tokens=2), torch.tensor([-1.0, -1]), torch.tensor([[1.0], [5.0]])
    assert rlkern.ppo_loss(x, None, a, pack).loss == rlkern.ppo_loss(x.view(1, 2), None, a, pack).loss == -1
    with pytest.raises(ValueError, match="may be one a token or one a sequence"):
        rlkern.ppo_loss(x.view(2, 1), None, a, pack)
    rate = torch.full((2, 1), 0.5)
    assert rlkern.nft_loss(x, x - 0.1, rate, rate > 0, pack).loss == rlkern.nft_loss(x.view(1, 2), x.view(1, 2) - 0.1, rate, rate > 0, pack).loss
    assert rlkern.log_ratio_sums(x, x - 1, pack, of="gspo").tolist() == [2, 0]


def test_weights_of_masked_tokens_reach_nothing():
    w, mask = torch.tensor([[1.0, math.nan, 2]]), torch.tensor([[True, False, True]])
    x = torch.zeros(1, 3)
    assert rlkern.ppo_loss(x, x, torch.ones(1), mask, aggregation=w).loss == rlkern.ppo_loss(x, x, torch.ones(1), mask, weights=w).loss * 2 == -3
    assert rlkern.aggregate(x + 1, packed(torch.tensor([0, 3]), mask), w) == 3


def test_impossible_tokens_in_parts():
    """-inf of one token: the mean ratio is 0, in whole sequences and in parts."""
    logp, old = torch.tensor([-1.0, -math.inf, -0.5]), torch.tensor([-1.0, -1, -1])
    pack = packed(torch.tensor([0, 3]), num_tokens=3)
    part = packed(torch.tensor([0, 3]), num_tokens=3, full_lengths=torch.tensor([3]))
    for loss, of in ((rlkern.gspo_loss, "gspo"), (rlkern.gmpo_loss, "gmpo")):
        more = {"advantages": torch.ones(1)} if of == "gmpo" else {}
        sums = rlkern.log_ratio_sums(logp, old, pack, of=of, **more)
        leaf = logp.clone().requires_grad_()
        value = loss(leaf, old, torch.ones(1), part, log_ratio_sums=sums, normalizer=1.0).loss
        assert value == loss(logp, old, torch.ones(1), pack).loss == 0
        assert torch.autograd.grad(value, leaf)[0].isfinite().all()


def test_a_nested_tensor_is_refused_everywhere():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    pack = packed(nested.offsets(), num_tokens=5)
    for call in (lambda: rlkern.gspo_loss(nested, None, torch.ones(2), pack), lambda: rlkern.ppo_loss(nested, nested, nested, nested),
                 lambda: rlkern.aggregate(nested, pack), lambda: rlkern.aggregate(nested, nested), lambda: pack.sum(nested)):  # fmt: skip
        with pytest.raises(TypeError, match="must not be a nested tensor"):
            call()


def test_arguments_of_methods():
    pack = packed(torch.tensor([0, 3, 5]), num_tokens=7)
    for values, error in (([1.0] * 7, TypeError), (torch.ones(6), ValueError), (torch.ones(7, dtype=torch.int64), TypeError)):
        with pytest.raises(error, match="values must"):
            pack.sum(values)
    with pytest.raises(ValueError, match=r"x must be \(2,\) for the pack"):
        pack.spread(torch.ones(3))


def test_vespo_weights_of_sequences_on_ranks_with_one_token():
    def call(group):
        tokens = 2 - group.place
        pack = packed(torch.tensor([0, tokens]), num_tokens=tokens, group=group)
        x = torch.full((1, tokens), -1.0)
        return rlkern.vespo_loss(x, x - 0.1, torch.ones(1, 1), pack, rollout_weights=torch.full((1, 1), 0.5)).loss

    with thread_ranks(2) as run:
        parts = run(call)
    x = torch.full((1, 3), -1.0)
    torch.testing.assert_close(
        sum(parts), rlkern.vespo_loss(x, x - 0.1, torch.ones(1), torch.ones(1, 3), rollout_weights=torch.full((1, 1), 0.5)).loss
    )


def test_elbo_of_a_pack():
    logits, targets, weight = torch.randn(1, 10, 5, dtype=F64), torch.randint(0, 5, (1, 10)), torch.tensor([2.0, 1, 1, 3])
    pack = packed(CU, MASK)
    expected = rlkern.masked_elbo(logits[0, :8], targets[0, :8], pack.spread(weight)[:8], mask=MASK[:8], seq_idx=pack.seq_idx[:8], num_seqs=4)
    torch.testing.assert_close(rlkern.masked_elbo(logits, targets, weight, mask=pack), expected)
    torch.testing.assert_close(rlkern.masked_elbo(logits[0], targets[0], pack.spread(weight), mask=pack), expected)
    loss, _ = rlkern.bgpo_loss(logits, targets, weight, A, mask=pack, mc_weight=1.0, preset="paper")
    torch.testing.assert_close(loss, -(A * 1.0).sum() / 4 + 0 * loss)


def test_known_loss_of_a_pack():
    """linear_fused_loss in chunks, packed as padded."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, ids = torch.randn(3, 5, 4, generator=g), torch.randn(7, 4, generator=g), torch.randint(0, 7, (3, 5), generator=g)
    mask = torch.rand(3, 5, generator=g) < 0.7
    old, a = -torch.rand(3, 5, generator=g) - 1, torch.randn(3, generator=g)
    pack = packed(torch.tensor([0, 5, 10, 15]), mask)
    for options in ({"loss": "ppo", "aggregation": "grpo", "entropy_coef": 0.1}, {"loss": "reinforce", "reference_logp": old, "kl_coef": 0.1}):
        results = []
        for shape, where in (((3, 5), mask), ((15,), pack), ((1, 15), pack)):
            h, w = hidden.reshape(*shape, 4).clone().requires_grad_(), weight.clone().requires_grad_()
            given = {name: x.reshape(shape) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
            loss = rlkern.linear_fused_loss(h, w, ids.reshape(shape), old.reshape(shape), a, where, chunk_rows=4, **given).loss
            gradients = torch.autograd.grad(loss, (h, w))
            results.append((loss.detach(), gradients[0].reshape(15, 4), gradients[1]))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_among_takes_the_tokens_in_any_shape():
    pack = rlkern.packed(lengths=[3, 3], mask=torch.ones(6))
    kept = torch.tensor([1, 0, 1, 1, 1, 1]).bool()
    for shape in ((6,), (1, 6), (6, 1), (2, 3)):
        assert pack.among(kept.view(shape)).lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"mask must have the 6 tokens of the pack, got shape \(5,\)"):
        pack.among(kept[:5])
