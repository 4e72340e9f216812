"""Sets of kept ids from engines' outputs, and the functions of trainers that take them, against float64.

The trainers' functions are those of public copies of their repositories in autumn 2026. What they compute is
restated here.
"""

import math
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rlkern
from rlkern import Kept
from rlkern.integrations import miles, nemo_rl, openrlhf, prime_rl, skyrl, slime, twinkle, verl
from rlkern.integrations.rollouts import drawn_rows, kept_from_lists, kept_from_sglang, kept_from_vllm

LISTS = [[[1, 2], [3], [0, 4, 5]], [[2]], [[7, 8], [], [9]]]
DRAWN = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0]])
V = 11


def arrays(lists):
    ids = torch.tensor([i for row in lists for i in row], dtype=torch.int32)
    lengths = torch.tensor([len(row) for row in lists], dtype=torch.int32)
    return ids, lengths, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def sampling_mask(lists):
    ids, _, offsets = arrays(lists)
    return SimpleNamespace(token_ids=ids.tolist(), offsets=offsets.tolist())  # of vLLM and twinkle


def chunk(lists):
    ids, lengths, _ = arrays(lists)
    return SimpleNamespace(lengths=lengths.numpy(), token_ids=ids.numpy(), logprobs=None)  # of SGLang


def wire(lists):
    ids, lengths, _ = arrays(lists)
    return SimpleNamespace(ids=ids.numpy().tobytes(), counts=lengths.numpy().tobytes(), logprobs=None)  # of prime-rl


def miles_mask(lists):
    ids, _, offsets = arrays(lists)
    return SimpleNamespace(ids=ids, offsets=offsets)


a, b, c = LISTS
FORMS = {
    "lists": lambda: kept_from_lists(LISTS, DRAWN),
    "tensors": lambda: kept_from_lists([tuple(torch.tensor(row) for row in lists) for lists in LISTS], DRAWN),
    "packed": lambda: kept_from_lists(LISTS, DRAWN.flatten()),
    "csr": lambda: kept_from_lists([sampling_mask(x) for x in LISTS], DRAWN),
    "miles": lambda: kept_from_lists([miles_mask(x) for x in LISTS], DRAWN),
    "chunks": lambda: kept_from_lists([chunk(x) for x in LISTS], DRAWN),
    "bytes": lambda: kept_from_lists([wire(x) for x in LISTS], DRAWN > 0),
    "vllm": lambda: kept_from_vllm(
        [SimpleNamespace(outputs=[SimpleNamespace(sampling_mask=sampling_mask(x)) for x in (a, b)]), SimpleNamespace(sampling_mask=sampling_mask(c))],
        DRAWN,
    ),
    "vllm 0.28": lambda: kept_from_vllm([SimpleNamespace(sampling_mask=SimpleNamespace(token_ids=x)) for x in LISTS], DRAWN),
    "json": lambda: kept_from_lists([vars(sampling_mask(x)) for x in LISTS], DRAWN),
    "vllm http": lambda: kept_from_vllm([{"sampling_mask": x} for x in LISTS], DRAWN),
    "sglang": lambda: kept_from_sglang([{"meta_info": {"output_token_sampling_mask": x}} for x in LISTS], DRAWN),
    "sglang meta": lambda: kept_from_sglang([{"output_token_sampling_mask": x} for x in LISTS], DRAWN),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_sets(form):
    keep = FORMS[form]()
    assert keep.entries.tolist() == [1, 2, 3, 0, 4, 5, 2, 7, 8, 9] and keep.begin.tolist() == [0, 2, 3, 6, 7, 9, 9]
    assert keep.end.tolist() == [2, 3, 6, 7, 9, 9, 10] and keep.empty == "everything"
    rows = torch.tensor([[-1, -1, 0, 1, 2], [-1, 3, -1, -1, -1], [4, -1, 5, 6, -1]])
    assert torch.equal(keep.rows, rows.flatten() if form == "packed" else rows)
    assert torch.equal(drawn_rows(DRAWN), rows)


def sets_of(keep, vocab=V):
    """[..., V] bool, row by row."""
    full = torch.ones(*keep.rows.shape, vocab, dtype=torch.bool)
    for place, j in zip(full.view(-1, vocab), keep.rows.flatten().tolist(), strict=True):
        ids = keep.entries[keep.begin[j] : keep.end[j]].long() if j >= 0 else []
        if len(ids):
            place.zero_()[ids] = True
    return full


def over(logits, sets, target):
    """log p of the target, with it in its set, and the entropy; float64."""
    u = logits.double()
    sets = sets.scatter(-1, target.unsqueeze(-1), True)
    log_q = torch.where(sets, u.masked_fill(~sets, -math.inf).log_softmax(-1), 0)
    return log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(sets * log_q.exp() * log_q).sum(-1)


def same(results, expected, leaf, exact, **tolerance):
    """Values, and the gradients of a weighted sum of them all."""
    tolerance = tolerance or {"rtol": 1e-5, "atol": 2e-6}
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x.double(), y, **tolerance)
    for values, of in ((results, leaf), (expected, exact)):
        weighted = [(x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in values]
        sum(weighted[1:], weighted[0]).backward()
        assert of.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, **tolerance)


def draw(*shape, seed=0, vocab=V):
    """Logits as leaves in float32 and float64, and targets."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, vocab, generator=g)
    return logits.clone().requires_grad_(), logits.double().requires_grad_(), torch.randint(vocab, shape, generator=g)


def test_a_trainers_step_from_the_engines_lists():
    """Sets beside the tokens, moved with the labels; bits and lists agree."""
    leaf, exact, ids = draw(3, 5)
    labels, mask = rlkern.next_tokens(ids), rlkern.next_tokens(DRAWN, ignore_index=0)
    at_tokens = kept_from_lists(LISTS, DRAWN)
    stats = rlkern.token_stats(leaf, labels, mask=mask, keep=at_tokens.next_tokens())
    sets = sets_of(at_tokens)
    logp, entropy = over(exact[:, :-1], sets[:, 1:], ids[:, 1:])
    here = mask[:, :-1] == 1
    kept = sets[:, 1:].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert torch.equal(stats.target_kept[:, :-1][here], kept[here]) and 0 < kept[here].sum() < here.sum()
    packed = torch.nn.functional.pad(sets, (0, 5)).view(3, 5, 2, 8).int()
    of_bits = rlkern.token_stats(leaf, labels, mask=mask, keep=Kept.bits((packed << torch.arange(8)).sum(-1).to(torch.uint8)).next_tokens())
    torch.testing.assert_close(of_bits.logp, stats.logp)
    same((stats.logp[:, :-1][here], stats.entropy[:, :-1][here]), (logp[here], entropy[here]), leaf, exact)


def test_part_of_a_batch():
    """Its rows in another order, with the same lists."""
    logits, _, ids = draw(3, 5)
    whole, part = kept_from_lists(LISTS, DRAWN).to("cpu"), torch.tensor([2, 0])
    expected = rlkern.token_logprobs(logits, ids, keep=whole)[part]
    assert torch.equal(rlkern.token_logprobs(logits[part], ids[part], keep=replace(whole, rows=whole.rows[part])), expected)
    meta = whole.to("meta", non_blocking=True)
    assert meta.rows.device.type == meta.entries.device.type == meta.end.device.type == "meta" and meta.empty == whole.empty
    assert Kept.ids(ids).to("meta").begin is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kept_from_lists(LISTS, None), TypeError, "drawn must be a bool or number tensor"),
        (lambda: kept_from_lists(None, DRAWN), TypeError, "samples must be a list with the sets of every sample, got None"),
        (lambda: kept_from_lists([[1, 2, 3], b, c], DRAWN), TypeError, r"samples\[0\] must be lists of token ids"),
        (lambda: kept_from_lists([a, [[1.5]], c], DRAWN), TypeError, r"samples\[1\] must be lists of token ids"),
        (lambda: kept_from_lists([a, [[2**40]], c], DRAWN), TypeError, r"samples\[1\] must be lists of token ids"),
        (lambda: kept_from_lists([a, None, c], DRAWN), TypeError, r"samples\[1\] must be lists of token ids.* got None"),
        (lambda: kept_from_lists([SimpleNamespace(ids=[1.5], offsets=[0, 1])], DRAWN), TypeError, r"the ids of samples\[0\] must be int32 or int64"),
        (lambda: kept_from_lists([SimpleNamespace(ids=b"abc", counts=b"")], DRAWN), TypeError, r"the ids of samples\[0\] must be int32 or int64"),
        (lambda: kept_from_lists([SimpleNamespace(ids=[1, 2], offsets=[0, 1])], DRAWN), ValueError, r"samples\[0\] has 2 ids for lists of 1 in all"),
        (lambda: kept_from_lists([SimpleNamespace(ids=[1, 2], offsets=[0, 3, 2])], DRAWN), ValueError, r"samples\[0\] has 2 ids"),
        (lambda: kept_from_lists([a[:2], b, [*c, [1]]], DRAWN), ValueError, r"samples\[0\] has sets for 2 tokens, and drawn marks 3 in row 0"),
        (lambda: kept_from_lists([a, b], DRAWN.view(1, -1)), ValueError, "samples have sets for 4 tokens, and drawn marks 7"),
        (lambda: kept_from_vllm([SimpleNamespace(sampling_mask=None)], DRAWN), ValueError, "no sampling_mask.*return_sampling_mask=True"),
        (lambda: kept_from_sglang([{"meta_info": {}}], DRAWN), ValueError, "no output_token_sampling_mask.*return_sampling_mask"),
        (lambda: kept_from_sglang({"meta_info": {}}, DRAWN), TypeError, "outputs must be a list with the output of every sample, got dict"),
        (lambda: kept_from_vllm(SimpleNamespace(outputs=[]), DRAWN), TypeError, "outputs must be a list .* got SimpleNamespace"),
        (lambda: Kept.samples([], [], DRAWN), TypeError, "ids must be a list of tensors, one a sample, got no sample"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_empty_batch():
    keep = kept_from_lists([], torch.zeros(0, 4))
    assert keep.rows.shape == (0, 4) and keep.entries.numel() == 0
    assert kept_from_lists([[], []], torch.zeros(2, 3)).rows.eq(-1).all()


# --- trainers -----------------------------------------------------------------------------------------------


def padded(n, k, targets, seed=0):
    """[n, k] ids, -1 among them; of every third row the target is missing, the last row is empty."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, V, generator=g).argsort(-1)[:, :k]
    ids = torch.where((ids == targets.view(-1, 1)) | (torch.rand(n, k, generator=g) < 0.3), -1, ids)
    ids[:, 0] = torch.where(torch.arange(n) % 3 > 0, targets.flatten(), -1)
    ids[-1] = -1
    return ids.int()


def test_prime_rl():
    leaf, exact, index = draw(2, 6)
    kept = padded(12, 5, index).view(2, 6, 5)
    sets = torch.zeros(2, 6, V + 1, dtype=torch.bool).scatter(-1, kept.long() % (V + 1), True)[..., :V]
    replay = sets.gather(-1, index.unsqueeze(-1))
    logp, _ = over(exact, sets | ~replay, index)
    assert 0 < replay.sum() < 12
    assert torch.equal(
        prime_rl.selective_log_softmax_with_kept(leaf, index, kept), prime_rl.selective_log_softmax_with_sampling_mask(leaf, index, kept)
    )
    same([prime_rl.selective_log_softmax_with_sampling_mask(leaf, index, kept)], [logp], leaf, exact)


def keep_mask(ids, offsets, totals, responses, length, cp_rank, cp_size, allgather):
    """slime's bool mask, token by token: row p of a sample's sequence predicts token p + 1."""
    sequence = []  # of each position of the whole sequence its sample, and place in it
    for s, total in enumerate(totals):
        places = [(s, p) for p in range(total)]
        if cp_size > 1 and not allgather:
            size = math.ceil(total / (2 * cp_size))
            places += [None] * (2 * cp_size * size - total)
            halves = [places[i * size : (i + 1) * size] for i in (cp_rank, 2 * cp_size - 1 - cp_rank)]
            places = halves[0] + halves[1]
        sequence += places
    if allgather:
        sequence = sequence[cp_rank * length :]
    keep = torch.ones(length, V, dtype=torch.bool)
    for row, place in zip(keep, sequence, strict=False):
        r = -1 if place is None else place[1] + 1 - (totals[place[0]] - responses[place[0]])
        if place is not None and 0 <= r < min(responses[place[0]], len(offsets[place[0]]) - 1):
            row.zero_()[ids[place[0]][offsets[place[0]][r] : offsets[place[0]][r + 1]].long()] = True
    return keep


NUCLEI = [arrays([[1, 2], [3], [0, 4, 5], [6, 1]]), arrays([[2], [9, 10]]), arrays([[7, 8], [3, 4, 5]])]


@pytest.mark.parametrize(("cp_size", "allgather"), [(1, False), (2, False), (3, False), (2, True)])
def test_slimes_sets(cp_size, allgather):
    ids, offsets = [x[0] for x in NUCLEI], [x[2] for x in NUCLEI]
    totals, responses = [7, 3, 9], [3, 2, 3]  # the first has a set more than tokens, the third one less
    length = {(1, False): 20, (2, False): 22, (3, False): 24, (2, True): 10}[cp_size, allgather]
    for rank in range(cp_size):
        keep = slime.nucleus_sets(ids, offsets, totals, responses, length=length, cp_rank=rank, cp_size=cp_size, allgather_cp=allgather)
        expected = keep_mask(ids, offsets, totals, responses, length, rank, cp_size, allgather)
        assert torch.equal(sets_of(keep), expected) and not expected.all()
    lazy = [SimpleNamespace(load=lambda x=x: x) for x in (ids[0], offsets[0])]  # a TensorRef
    assert torch.equal(slime.nucleus_sets([lazy[0]], [lazy[1]], [7], [4], length=7).rows, torch.tensor([-1, -1, 0, 1, 2, 3, -1], dtype=torch.int32))
    without = slime.nucleus_sets([[], ids[1]], [[], offsets[1]], [3, 3], [2, 2], length=6)
    assert without.rows.tolist() == [-1, -1, -1, 0, 1, -1]
    with pytest.raises(ValueError, match="length must hold the"):
        slime.nucleus_sets(ids, offsets, totals, responses, length=2)
    with pytest.raises(ValueError, match="response_lengths must be below total_lengths"):
        slime.nucleus_sets(ids, offsets, [3, 3, 9], responses, length=20)


@pytest.mark.parametrize("trainer", [slime, miles])
def test_slimes_and_miles_log_probs(trainer):
    """Over the sets; the entropy of the whole vocabulary."""
    ids, offsets = (x[0] for x in NUCLEI), (x[2] for x in NUCLEI)
    keep = slime.nucleus_sets(list(ids), list(offsets), [7, 3, 4], [4, 2, 2], length=14)
    sets, grad = sets_of(keep), {"with_entropy_grad" if trainer is slime else "entropy_requires_grad": False}
    for given in (keep, sets):
        leaf, exact, tokens = draw(14)
        name = {"log_prob_keep_mask" if trainer is slime else "sampling_mask": given}
        logp, entropy = trainer.calculate_log_probs_and_entropy(leaf, tokens, None, with_entropy=True, **name)
        assert logp.shape == (14, 1)
        full = over(exact, torch.ones_like(sets), tokens)[1]
        same((logp.squeeze(-1), entropy), (over(exact, sets, tokens)[0], full), leaf, exact)
        assert not trainer.calculate_log_probs_and_entropy(leaf, tokens, None, with_entropy=True, **grad, **name)[1].requires_grad
        assert trainer.calculate_log_probs_and_entropy(leaf, tokens, None, **name)[1] is None
    logp, entropy = trainer.calculate_log_probs_and_entropy(leaf, tokens, None, with_entropy=True)
    torch.testing.assert_close(entropy.double(), full.detach(), rtol=1e-5, atol=1e-6)
    empty = trainer.calculate_log_probs_and_entropy(leaf[:0], tokens[:0], None, with_entropy=True)
    assert [x.shape for x in empty] == [(0,), (0,)]
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup or None, got SimpleNamespace"):
        trainer.calculate_log_probs_and_entropy(leaf, tokens, SimpleNamespace())


def test_miles_sets():
    ids, _, offsets = NUCLEI[0]
    keep = miles.build_local_sampling_mask(torch.zeros(3, V), ids.tolist(), offsets.tolist(), [0, 2, 3], response_length=4, tp_rank=0)
    assert [row.nonzero().flatten().tolist() for row in sets_of(keep)] == [[1, 2], [0, 4, 5], [1, 6]]
    for change, message in (
        ({"response_length": 5}, "response_length . 1 = 6 entries, got 5"),
        ({"response_indices": [0]}, "response_indices must name a token for each"),
    ):
        arguments = {"response_indices": [0, 2, 3], "response_length": 4, "tp_rank": 0} | change
        with pytest.raises(ValueError, match=message):
            miles.build_local_sampling_mask(torch.zeros(3, V), ids, offsets, **arguments)
    with pytest.raises(ValueError, match="true_on_policy"):
        miles.calculate_log_probs_and_entropy(torch.zeros(1, V), torch.zeros(1).long(), None, true_on_policy=True)


@pytest.fixture
def megatron(monkeypatch):
    """slime with what `patch` replaces, in a context-parallel group of two."""

    def calculate_log_probs_and_entropy(
        logits, tokens, tp_group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, with_entropy_grad=True
    ): ...

    def _build_topp_keep_mask(
        T,  # noqa: N803
        vocab_local,
        device,
        top_p_token_ids,
        top_p_token_offsets,
        total_lengths,
        response_lengths,
        allgather_cp,
    ): ...

    names = ("slime", "slime.utils", "slime.utils.ppo_utils", "slime.backends", "slime.backends.megatron_utils", "slime.backends.megatron_utils.loss")
    for name in (*names, "megatron", "megatron.core", "megatron.core.mpu"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    mpu, loss, utils = (sys.modules[name] for name in ("megatron.core.mpu", names[-1], names[2]))
    mpu.get_context_parallel_rank, mpu.get_context_parallel_world_size = lambda: 1, lambda: 2
    utils.calculate_log_probs_and_entropy = loss.calculate_log_probs_and_entropy = calculate_log_probs_and_entropy
    loss._build_topp_keep_mask = _build_topp_keep_mask
    return SimpleNamespace(loss=loss, utils=utils)


def test_patching_slime(megatron):
    before = dict(vars(megatron.loss))
    ids, offsets = [x[0].tolist() for x in NUCLEI], [x[2].tolist() for x in NUCLEI]
    with slime.patch():
        assert (
            megatron.loss.calculate_log_probs_and_entropy is megatron.utils.calculate_log_probs_and_entropy is slime.calculate_log_probs_and_entropy
        )
        keep = megatron.loss._build_topp_keep_mask(22, V, "cpu", ids, offsets, [7, 3, 9], [4, 2, 3], False)
        assert torch.equal(keep.rows, slime.nucleus_sets(ids, offsets, [7, 3, 9], [4, 2, 3], length=22, cp_rank=1, cp_size=2).rows)
    assert dict(vars(megatron.loss)) == before
    megatron.loss._build_topp_keep_mask = lambda T, device: None  # noqa: N803
    with pytest.raises(ImportError, match=r"this slime's _build_topp_keep_mask takes \['T', 'device'\]"):
        slime.patch()


def test_without_slime():
    with pytest.raises(ImportError, match="needs slime and Megatron"):
        slime.patch()


@pytest.mark.parametrize("head", [False, True])
def test_skyrl(head):
    """Entropy over the set; 0 at tokens without one."""
    ids, lengths, _ = arrays([[1, 2], [3], [], [0, 4, 5]])
    rows = torch.tensor([[-1, 3, 0], [2, 1, -1]])
    targets = torch.tensor([[0, 4, 1], [5, 3, 2]])
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 8, generator=g), torch.randn(V, 8, generator=g)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    arguments = {"vocab_start_index": 0, "vocab_end_index": V, "tp_group": None, "compute_entropy": True, "entropy_requires_grad": True}
    arguments |= {"lm_head_weight": weight, "temperature": 0.7} if head else {}
    source = leaf if head else leaf @ weight.T
    support = SimpleNamespace(values=ids, row_lengths=lengths)
    scores = skyrl.sample_support_csr_scores(source, targets, support, rows, **arguments)
    valid = torch.tensor([[False, True, True], [False, True, False]])
    assert torch.equal(scores.valid_mask, valid) and not scores.logprobs[~valid].any() and not scores.entropy[~valid].any()
    keep = Kept.counts(ids, lengths, rows=rows)
    logp, entropy = over(exact @ weight.T.double() / (0.7 if head else 1), sets_of(keep), targets)
    same((scores.logprobs[valid], scores.entropy[valid]), (logp[valid], entropy[valid]), leaf, exact)
    plain = skyrl.sample_support_csr_scores(source, targets, support, rows, **arguments | {"entropy_requires_grad": False})
    assert not plain.entropy.requires_grad and plain.logprobs.requires_grad
    without = skyrl.sample_support_csr_scores(
        source, targets, support, rows, **arguments | {"entropy_requires_grad": False, "compute_entropy": False}
    )
    assert without.entropy is None
    with pytest.raises(ValueError, match="vocab_start must be 0 or None without other ranks, got 2"):
        skyrl.sample_support_csr_scores(source, targets, support, rows, **arguments | {"vocab_start_index": 2})


def test_twinkle():
    leaf, exact, labels = draw(3, 5)
    masks = [sampling_mask(lists) for lists in LISTS]
    logp = twinkle.replayed_selective_log_softmax(leaf, labels, DRAWN > 0, masks, 0.7)
    assert logp.dtype == torch.float32 and not logp[DRAWN == 0].any()
    expected, _ = over(exact / 0.7, sets_of(kept_from_lists(masks, DRAWN)), labels)
    same([logp], [torch.where(DRAWN > 0, expected, 0)], leaf, exact)
    with pytest.raises(ValueError, match=r"samples\[0\] has sets for 1 tokens, and drawn marks 2"):
        twinkle.replayed_selective_log_softmax(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.ones(1, 2), [sampling_mask([[0]])], 1.0)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.6), (3, 1.0), (4, 0.8), (-1, 0.9)])
def test_nemo_rl(top_k, top_p):
    leaf, exact, target = draw(2, 6)
    order = exact.detach().argsort(-1, descending=True)
    ordered = exact.detach().gather(-1, order)
    if top_k is not None and top_k > 0:
        ordered[..., top_k:] = -math.inf
    p = ordered.softmax(-1)
    sets = torch.zeros(2, 6, V, dtype=torch.bool).scatter(-1, order, (p.cumsum(-1) - p < top_p) & (p > 0))
    inside = sets.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    assert 0 < inside.sum() < 12
    logp = nemo_rl.ChunkedDistributedLogprobWithSampling.apply(leaf, target, None, top_k, top_p, 2, False)
    assert torch.equal(logp.isinf(), ~inside) and torch.equal(logp, nemo_rl.DistributedLogprobWithSampling.apply(leaf, target, None, top_k, top_p))
    same([logp.masked_fill(~inside, 0)], [over(exact, sets, target)[0].masked_fill(~inside, 0)], leaf, exact)


def test_verl_and_openrlhf():
    leaf, exact, labels = draw(3, 5)
    keep = kept_from_lists(LISTS, DRAWN)
    logp = verl.logprobs_from_logits(leaf, labels, keep=keep)
    assert torch.equal(logp, openrlhf.log_probs_from_logits(leaf, labels, keep=keep))
    same([logp], [over(exact, sets_of(keep), labels)[0]], leaf, exact)
