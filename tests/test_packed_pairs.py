"""Losses of pairs and responses from packed logits: as padded, in any layout, over ranks and in parts."""

import math
import re
from pathlib import Path

import pytest
import torch
from dpo_formulas import WITHOUT_REFERENCE, draw_logits
from thread_ranks import thread_ranks
from torch.testing import assert_close

import rlkern
from rlkern import dpo_loss_from_logits, kto_loss_from_logits, next_tokens, packed, sequence_logps, token_logprobs
from rlkern.losses.preference.dpo_types import PAIR_LOSSES

F64 = torch.float64


class Packing:
    """Padded rows [B, T] one behind the other: each in a slot that ends with its last label, or later, some
    slots with a hole; padding at the end."""

    def __init__(self, labels, order=None, holes=False, slots=None, seed=1):
        g = torch.Generator().manual_seed(seed)
        batch, length = labels.shape
        order = torch.arange(batch) if order is None else order
        ends = torch.where((labels if slots is None else slots) != -100, torch.arange(1, length + 1), 0).amax(-1)[order]
        slots = torch.minimum(ends + torch.randint(0, 2, (batch,), generator=g), torch.tensor(length))
        self.index = torch.cat([i * length + torch.arange(n) for i, n in zip(order, slots, strict=True)] + [torch.tensor([0, 1])])
        cu = torch.nn.functional.pad(slots.cumsum(0), (1, 0)).int()
        self.pack = packed(cu, num_tokens=len(self.index), seq_lens=ends if holes else None)
        self.labels = torch.where(self.pack.seq_idx < batch, self.tokens(labels), 3)  # nothing of the padding counts
        if holes:
            self.labels[self.pack.seq_idx == batch] = 4

    def tokens(self, x):
        return x.flatten(0, 1)[self.index]


def both(call, logits, labels, per_sequence=(), per_token=(), **packing):
    """(outputs, gradient of the logits) padded and packed, the latter at the places of the former.

    call(logits, labels, packed, *per_sequence, *per_token)
    """
    results = []
    p = Packing(labels, **packing)
    order = packing.get("order")
    for pack in (None, p.pack):
        x = logits.detach().clone().requires_grad_()
        rows = x if pack is None else p.tokens(x)
        sequences = [s if pack is None or order is None else s[order] for s in per_sequence]
        out = call(rows, labels if pack is None else p.labels, pack, *sequences, *(t if pack is None else p.tokens(t) for t in per_token))
        weights = torch.linspace(0.5, 1.5, len(out[0]), dtype=out[0].dtype)
        results.append((out, torch.autograd.grad((out[0] * weights).sum(), x)[0]))
    return results


CASES = [{"loss_type": kind} for kind in PAIR_LOSSES] + [
    {"ld_alpha": 0.3, "loss_type": ("sigmoid", "ipo_norm", "sft")},
    {"ld_alpha": 0.0},
    {"use_weighting": True, "max_weight": 0.05},
    {"loss_type": ("simpo", "sft"), "ld_alpha": 0.5, "use_weighting": True},
    {"temperature": 0.7, "f_divergence": "js_divergence"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_packed_pairs_are_padded_pairs(options):
    logits, other, labels = draw_logits()
    kinds = options.get("loss_type", "sigmoid")
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if "exo_pair" in kinds:
        options = options | {"label_smoothing": 0.1}
    reference = {"per_sequence": [sequence_logps(other, labels)]}
    targets = next_tokens(labels)
    if "ld_alpha" in options:
        reference = {"per_token": [torch.where(targets == -100, math.nan, token_logprobs(other, targets))]}
    if set(kinds) & set(WITHOUT_REFERENCE):
        reference = {}
    for holes in (False, True):
        padded, here = both(
            lambda x, ids, pack, ref=None: dpo_loss_from_logits(x, ids, ref, packed=pack, **options), logits, labels, holes=holes, **reference
        )
        assert_close(here, padded, rtol=1e-12, atol=1e-14)


def test_pairs_in_turn():
    logits, other, labels = draw_logits()
    reference = sequence_logps(other, labels)
    order = torch.tensor([0, 3, 1, 4, 2, 5])

    def loss(x, ids, pack, ref, **options):
        return dpo_loss_from_logits(x, ids, ref, packed=pack, loss_type=("sigmoid_norm", "sft"), **options)

    padded, here = both(
        lambda x, ids, pack, ref: loss(x, ids, pack, ref, pairs="interleaved" if pack else "halves"), logits, labels, [reference], order=order
    )
    assert_close(here, padded, rtol=1e-12, atol=1e-14)
    in_turn = loss(logits[order], labels[order], None, reference[order], pairs="interleaved")
    assert_close(in_turn, padded[0], rtol=1e-12, atol=1e-14)
    ld = {"ld_alpha": 0.2, "reference_free": True}
    assert_close(
        dpo_loss_from_logits(logits[order], labels[order], None, pairs="interleaved", **ld), dpo_loss_from_logits(logits, labels, None, **ld)
    )


def test_a_mask_of_the_pack_is_of_the_rows():
    logits, _, labels = draw_logits()
    p = Packing(labels)
    flat, ids = p.tokens(logits), p.labels.clamp(min=0)
    by_labels = dpo_loss_from_logits(flat, p.labels, None, packed=p.pack, reference_free=True)
    cu = p.pack.cu_seqlens
    rows = next_tokens(p.labels != -100, False, packed=p.pack)
    for x, y, mask in ((flat, ids, rows), (flat.unsqueeze(0), ids.unsqueeze(0), rows.unsqueeze(0).int())):
        assert_close(dpo_loss_from_logits(x, y, None, packed=packed(cu, mask), reference_free=True), by_labels)
        assert_close(sequence_logps(x, y, packed=packed(cu, mask)), sequence_logps(logits, labels))


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps(average):
    logits, _, labels = draw_logits()
    padded, here = both(lambda x, ids, pack: [sequence_logps(x, ids, average=average, packed=pack)], logits, labels, holes=True)
    assert_close(here, padded, rtol=1e-12, atol=1e-14)
    p, targets = Packing(labels), next_tokens(labels)
    aligned = sequence_logps(p.tokens(logits), p.tokens(targets), average=average, shift=False, packed=p.pack)
    assert_close(aligned, padded[0][0])


def test_kto():
    logits, other, labels = draw_logits()
    desirable = torch.tensor([1, 0, 1, 1, 0, 0])
    targets = next_tokens(labels)
    tokens = torch.where(targets == -100, math.nan, token_logprobs(other, targets))
    for reference in ({"per_sequence": [sequence_logps(other, labels)]}, {"per_token": [tokens]}):
        padded, here = both(
            lambda x, ids, pack, ref: kto_loss_from_logits(x, ids, ref, desirable, kl=0.2, weights=torch.arange(6.0), packed=pack),
            logits, labels, holes=True, **reference,
        )  # fmt: skip
        assert_close(here, padded, rtol=1e-12, atol=1e-14)


def test_sums_have_the_bits_of_padded_ones():
    """Accumulated in float64 and rounded once, whatever lies between: float32 losses are equal in bits."""
    logits, other, labels = draw_logits(pairs=20, length=60, dtype=torch.float32)
    reference = sequence_logps(other, labels)
    padded, here = both(lambda x, ids, pack, ref: dpo_loss_from_logits(x, ids, ref, packed=pack), logits, labels, [reference])
    assert all(map(torch.equal, padded[0], here[0])) and torch.equal(padded[1], here[1])
    exact = token_logprobs(logits, next_tokens(labels)).double().sum(-1).float()
    assert torch.equal(sequence_logps(logits, labels), exact)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_sft_labels(pairs):
    """The NLL over prompt and response of the chosen rows, as TRL's ORPO has it, in one pass."""
    logits, _, labels = draw_logits()
    chosen, rejected = (slice(0, 3), slice(3, 6)) if pairs == "halves" else (slice(0, 6, 2), slice(1, 6, 2))
    everything = torch.where(torch.arange(7) < 6, torch.where(labels == -100, 5, labels), -100)
    everything[rejected] = 9  # of no matter
    logp = token_logprobs(logits, next_tokens(everything))[chosen, :5]
    plain = dpo_loss_from_logits(logits, labels, None, loss_type="orpo", pairs=pairs).losses
    for kind, nll in (("sft", -logp.mean().expand(3)), ("sft_norm", -logp.mean(-1))):
        options = {"loss_type": ("orpo", kind), "loss_weights": (1.0, 0.5), "pairs": pairs, "use_weighting": False}

        def loss(x, ids, pack, sft, options=options):
            return dpo_loss_from_logits(x, ids, None, sft_labels=sft, packed=pack, **options)

        assert_close(loss(logits, labels, None, everything).losses, plain + 0.5 * nll)
        padded, here = both(loss, logits, labels, per_token=[everything], slots=everything)
        assert_close(here, padded, rtol=1e-12, atol=1e-14)
    weighted = {"loss_type": ("orpo", "sft"), "loss_weights": (1.0, 0.0), "pairs": pairs, "use_weighting": True}
    bare = dpo_loss_from_logits(logits, labels, None, loss_type="orpo", pairs=pairs, use_weighting=True)
    assert_close(dpo_loss_from_logits(logits, labels, None, sft_labels=everything, **weighted), bare)


def test_nothing_crosses_sequences():
    """NaN of one pair stays there, and rows that do not count are not read."""
    logits, _, labels = draw_logits(dtype=torch.float32)
    p = Packing(labels, holes=True)
    flat = p.tokens(logits).detach()
    expected = dpo_loss_from_logits(flat, p.labels, None, packed=p.pack, reference_free=True).losses
    counted = next_tokens(p.labels, packed=p.pack) != -100
    flat[~counted & (p.pack.seq_idx != 6)] = math.nan
    flat[-2:] = math.nan
    flat[(p.pack.seq_idx == 0) & counted] = math.nan
    flat.requires_grad_()
    losses = dpo_loss_from_logits(flat, p.labels, None, packed=p.pack, reference_free=True).losses
    assert losses[0].isnan() and torch.equal(losses[1:], expected[1:])
    others = (p.pack.seq_idx != 0) & (p.pack.seq_idx != 3)  # 3: the other one of the pair
    assert torch.autograd.grad(losses[1:].sum(), flat)[0][others].isfinite().all()


def test_padding_between_the_halves_reaches_nothing():
    """A policy that is its reference has a loss of log 2 a pair, with a padding slot in the middle too."""
    logits, _, labels = draw_logits()
    p = Packing(labels)
    middle = int(p.pack.cu_seqlens[3])
    pad = torch.full((2,), 7)
    ids = torch.cat([p.labels[:middle], pad, p.labels[middle:]])
    x = torch.cat([(flat := p.tokens(logits))[:middle], torch.randn(2, flat.shape[1], dtype=F64), flat[middle:]])
    cu = p.pack.cu_seqlens.clone()
    lengths = cu.diff()
    cu[4:] += 2
    cu[3] += 2  # the last slot of the first half is longer than its sequence
    pack = packed(cu, num_tokens=len(ids), seq_lens=lengths)
    losses = dpo_loss_from_logits(x, ids, sequence_logps(x, ids, packed=pack), packed=pack).losses
    assert_close(losses, torch.full((3,), math.log(2), dtype=F64))


@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 1, 1, 1]], ids=str)
def test_nothing_to_count(lengths):
    pack = packed(lengths=lengths, num_tokens=sum(lengths) + 1)
    logits = torch.randn(pack.mask.numel(), 5, requires_grad=True)
    labels = torch.zeros(len(logits), dtype=torch.int32)
    losses = dpo_loss_from_logits(logits, labels, torch.zeros(len(lengths)), packed=pack).losses
    assert_close(losses, torch.full((len(lengths) // 2,), math.log(2)))
    assert not torch.autograd.grad(losses.sum(), logits)[0].any()
    assert kto_loss_from_logits(logits, labels, torch.zeros(len(lengths)), torch.ones(len(lengths)), kl=0.0, packed=pack).losses.tolist() == [
        0.5
    ] * len(lengths)


def test_over_ranks_that_hold_parts():
    """Context parallelism: every rank has the losses of whole responses, and the ranks' gradients add up."""
    logits, other, labels = draw_logits()
    p, targets = Packing(labels), next_tokens(labels)
    ids = p.tokens(targets)
    reference, tokens = sequence_logps(other, labels), torch.where(ids == -100, math.nan, p.tokens(token_logprobs(other, targets)))
    desirable = torch.tensor([1, 0, 1, 1, 0, 0])
    half = torch.arange(7) % 3 == 0
    mine = [p.tokens(half.expand(6, 7)), p.tokens(~half.expand(6, 7))]
    counts = [torch.stack([(m & (p.pack.seq_idx == i)).sum() for i in range(6)]) for m in mine]

    def losses(x, ids, pack, tokens):
        one = dpo_loss_from_logits(x, ids, tokens, shift=False, use_weighting=True, loss_type=("ipo_norm", "sft"), packed=pack)
        return one.losses.sum() + kto_loss_from_logits(x, ids, reference, desirable, kl=0.1, shift=False, packed=pack).losses.sum()

    flat = p.tokens(logits).detach().requires_grad_()
    expected = losses(flat, ids, p.pack, tokens)
    exact = torch.autograd.grad(expected, flat)[0]

    def part(group):
        here = mine[group.place]
        x = flat.detach()[here].requires_grad_()
        pack = packed(lengths=counts[group.place], num_tokens=len(x), group=group)
        loss = losses(x, ids[here], pack, tokens[here])
        before = len(group.calls)
        gradient = torch.autograd.grad(loss, x)[0]
        assert len(group.calls) == before  # nothing in the backward
        return loss.detach(), gradient, here, pack

    with thread_ranks(2) as run:
        results = run(part)
        for loss, gradient, here, _ in results:
            assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
            assert_close(gradient, exact[here], rtol=1e-11, atol=1e-14)

        def in_order(group):
            *_, here, pack = results[group.place]
            dpo_loss_from_logits(flat[here], ids[here], None, ld_alpha=0.5, reference_free=True, packed=pack)

        with pytest.raises(ValueError, match=r"ld_alpha counts the tokens.*packed\(group=\)"):
            run(in_order)


def test_two_phases_over_micro_batches():
    """The code of docs/losses.md, on responses cut in three."""
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    (recipe,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "full_lengths" in block)
    logits, other, labels = draw_logits()
    reference, targets = sequence_logps(other, labels), next_tokens(labels)
    flat = logits.detach().clone()
    cuts = (slice(0, 2), slice(2, 5), slice(5, 7))
    parts = []
    for cut in cuts:
        ids = targets[:, cut].reshape(-1)
        x = flat[:, cut].reshape(len(ids), -1).requires_grad_()
        parts.append((x, ids, packed(lengths=[len(ids) // 6] * 6, num_tokens=len(ids), full_lengths=torch.full((6,), 7))))
    names = {"parts": parts, "reference_logps": reference, "model": lambda rows: rows, "rlkern": rlkern, "torch": torch}
    exec(recipe, names)
    expected = dpo_loss_from_logits(logits, labels, reference).losses
    assert_close(names["losses"], expected)
    exact = torch.autograd.grad(expected.mean(), logits)[0]
    for cut, (rows, _, _) in zip(cuts, parts, strict=True):
        assert_close(rows.grad.view(6, -1, 11), exact[:, cut])
    with pytest.raises(ValueError, match=r"packed must hold whole sequences.*two phases, see docs/losses.md"):
        dpo_loss_from_logits(*parts[0][:2], reference, packed=parts[0][2])


ids = torch.zeros(5, dtype=torch.long)
x = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("error", "message", "pack", "reference", "options"),
    [
        (ValueError, "packed must hold pairs, an even number of sequences, got 3", packed(lengths=[2, 2, 1]), torch.zeros(3), {}),
        (ValueError, "packed must have the 5 tokens of logits and labels, got 4", packed(lengths=[2, 2]), torch.zeros(2), {}),
        (ValueError, "packed must have a number of sequences that the host knows", packed(segment_ids=ids), torch.zeros(2), {}),
        (TypeError, "packed must be a Packed, as rlkern.packed returns it, or None, got Tensor", ids, torch.zeros(2), {}),
        (ValueError, "unknown pairs 'thirds', expected one of 'halves', 'interleaved'", packed(lengths=[2, 3]), torch.zeros(2), {"pairs": "thirds"}),
        (ValueError, r"reference_logps must be \[S\], \[S, 1\] or one a token.*got \(3,\)", packed(lengths=[2, 3]), torch.zeros(3), {}),
        (ValueError, r"reference_logps must be .*one a token for ld_alpha", packed(lengths=[2, 3]), torch.zeros(2), {"ld_alpha": 0.5}),
        (ValueError, "'simpo' has no reference: reference_logps must be None", packed(lengths=[2, 3]), torch.zeros(2), {"loss_type": "simpo"}),
        (ValueError, "sft_labels are for the loss types 'sft' and 'sft_norm', got them with 'sigmoid'", None, torch.zeros(2), {"sft_labels": ids}),
        (ValueError, "sft_labels must be the labels wherever both count", None, torch.zeros(2), {"sft_labels": ids + 1, "loss_type": "sft"}),
    ],
)
def test_errors(error, message, pack, reference, options):
    rows, labels = (x, ids) if pack is not None else (x[:4].view(2, 2, 3), ids[:4].view(2, 2))
    options = {name: value[:4].view(2, 2) if name == "sft_labels" else value for name, value in options.items()}
    with pytest.raises(error, match=message):
        dpo_loss_from_logits(rows, labels, reference, packed=pack, **options)


def test_one_number_a_token_or_a_sequence():
    pack = packed(lengths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"reference_logps \[4\] may be one a token or one a sequence"):
        dpo_loss_from_logits(x[:4], ids[:4], torch.zeros(4), packed=pack)
    assert dpo_loss_from_logits(x[:4], ids[:4], torch.zeros(4, 1), packed=pack).losses.shape == (2,)
    assert rlkern.sequence_logps(x, ids, packed=packed(segment_ids=ids)).shape == (5,)
