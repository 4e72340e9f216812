"""Weights and counts of a whole optimizer batch: every mode, dealt to ranks, in micro-batches, packed."""

import pytest
import torch
from thread_ranks import thread_ranks

import rlkern
from rlkern import batch_count, sequence_weights

F64 = torch.float64
T = 7
MODES = ("token-mean", "bnpo", "dapo", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "grpo", "dr_grpo")
PROMPTS = ("prompt-mean", "prompt-seq-mean")


def naive(mode, losses, prompts):
    """The mean of a list of lists of token losses, written out."""
    tokens, full = [x for row in losses for x in row], [row for row in losses if row]
    if mode in ("token-mean", "bnpo", "dapo"):
        return sum(tokens) / len(tokens)
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in full) / len(full)
    if mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        return sum(tokens) / (len(full) if mode == "seq-mean-token-sum" else T)
    if mode == "grpo":
        return sum(sum(row) / len(row) for row in full) / len(losses)
    if mode == "dr_grpo":
        return sum(tokens) / len(losses) / T
    by_prompt = {}
    for row, prompt in zip(losses, prompts, strict=True):
        if row:
            by_prompt.setdefault(prompt, []).append(row)
    if mode == "prompt-mean":
        means = [sum(x for row in rows for x in row) / sum(map(len, rows)) for rows in by_prompt.values()]
    else:
        means = [sum(sum(row) / len(row) for row in rows) / len(rows) for rows in by_prompt.values()]
    return sum(means) / len(means)


def options_of(mode):
    return {"length": float(T)} if mode in ("dr_grpo", "seq-mean-token-sum-norm") else {}


def test_numbers():
    losses = [[1.0] * 4, [2.0], [4.0], [5.0] * 2]
    expected = {"token-mean": 2.5, "grpo": 3.0, "prompt-mean": 2.933333, "prompt-seq-mean": 3.0}
    without_second = {"grpo": 2.5, "prompt-seq-mean": 2.75}
    for rows, numbers in ((losses, expected), ([losses[0], [], *losses[2:]], without_second)):
        lengths, ids = torch.tensor([len(row) for row in rows]), torch.tensor([0, 0, 1, 1])
        for mode, number in numbers.items():
            w = sequence_weights(mode, lengths, groups=ids if mode in PROMPTS else None)
            total = sum(weight * sum(row) for weight, row in zip(w.tolist(), rows, strict=True))
            assert total == pytest.approx(number, abs=1e-6), mode


def part_of_loss(group, place, world, mode, sizes, values, prompts, home):
    """The loss of the sequences of one rank, in two micro-batches."""
    own, mask = home == place, torch.arange(T) < sizes[:, None]
    more = {"groups": prompts[own], "num_groups": 5} if mode in PROMPTS else options_of(mode)
    given = (sizes[own], mask[own], [mask[own][:1], mask[own][1:]])[int(sizes[0]) % 3]
    w = sequence_weights(mode, given, group=group, averaged_over=world, **more)
    assert w.dtype == F64 and len(w) == own.sum()
    parts = [rlkern.aggregate(values[own][rows], mask[own][rows], w[rows]) for rows in (slice(0, 1), slice(1, None))]
    return sum(parts).item() / world


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES + PROMPTS)
def test_dealt_at_random(mode, world):
    """Sequences on ranks, which share prompts; some empty, some ranks without any."""
    g = torch.Generator().manual_seed(world)
    for _ in range(5):
        sizes, prompts, home = (torch.randint(0, n, (9,), generator=g) for n in (T + 1, 4, world))
        values = torch.randn(9, T, generator=g, dtype=F64)
        expected = naive(mode, [row[:n].tolist() for row, n in zip(values, sizes.tolist(), strict=True)], prompts.tolist())
        x = (world, mode, sizes, values, prompts, home)
        if world == 1:
            total = part_of_loss(None, 0, *x)
        else:
            with thread_ranks(world) as run:
                total = sum(run(lambda group, x=x: part_of_loss(group, group.place, *x)))
        assert total == pytest.approx(expected, abs=1e-12)


def test_prompts_of_one_rank_need_no_numbers():
    lengths, ids = torch.tensor([4, 1, 0, 2, 3]), torch.tensor([10**12, 10**12, -5, 7, 7])
    for mode in PROMPTS:
        numbered = sequence_weights(mode, lengths, groups=torch.tensor([2, 2, 0, 1, 1]), num_groups=3)
        assert torch.equal(sequence_weights(mode, lengths, groups=ids), numbered)
        assert numbered[2] == 0  # an empty prompt counts nowhere
    assert torch.equal(sequence_weights("prompt-mean", lengths[:4], groups=2), sequence_weights("prompt-mean", lengths[:4], groups=ids[[0, 0, 3, 3]]))


def test_packs():
    mask = torch.rand(11) < 0.7
    pack = rlkern.packed(torch.tensor([0, 4, 4, 9]), mask)
    for mode in ("token-mean", "grpo", "seq-mean-token-mean"):
        assert torch.equal(sequence_weights(mode, pack), sequence_weights(mode, pack.lengths))
        x = torch.randn(11, dtype=F64)
        torch.testing.assert_close(rlkern.aggregate(x, pack, sequence_weights(mode, pack)), rlkern.aggregate(x, pack, mode))
        unknown = rlkern.packed(position_ids=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0]), mask=mask)
        assert batch_count("grpo", [pack, unknown]) == 3 + 4


def test_batch_count():
    """Micro-batches of two ranks against one process; rows that are cut over the ranks of a context group."""
    masks = [torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[0, 1, 0, 1.0]]), torch.zeros(0, 4), torch.ones(2, 4, dtype=torch.bool)]
    counts = {"token-mean": 12, "dapo": 12, "seq-mean-token-mean": 4, "seq-mean-token-sum": 4, "grpo": 5}
    for mode, count in counts.items():
        assert batch_count(mode, masks) == count
        assert batch_count(mode, torch.tensor([2, 0, 2, 4, 4])) == count
        assert batch_count(mode, masks, averaged_over=4) == count / 4
        with thread_ranks(2) as run:
            pieces = masks[1:], masks[:1]
            assert run(lambda group: batch_count(mode, pieces[group.place], group=group).item()) == [count] * 2  # noqa: B023
            if mode in ("token-mean", "seq-mean-token-sum"):
                columns = [[mask[:, at : at + 2] for mask in masks] for at in (0, 2)]
                assert run(lambda group: batch_count(mode, columns[group.place], context_group=group).item()) == [count] * 2  # noqa: B023
    assert batch_count("token-mean", masks[0]) == 2
    for error, words, arguments in (
        (ValueError, "divides by a length", ("dr_grpo", masks)),
        (ValueError, "at least one tensor", ("token-mean", [])),
        (TypeError, "lengths must be integers .B., a mask .B, T., a Packed, or a list", ("token-mean", 3)),
        (TypeError, "lengths must be an integer tensor", ("token-mean", torch.ones(3))),
        (ValueError, "unknown mode", ("mean", masks)),
    ):
        with pytest.raises(error, match=words):
            batch_count(*arguments)
    with thread_ranks(2) as run, pytest.raises(ValueError, match="divides by a sequence's length"):
        run(lambda group: batch_count("grpo", masks, context_group=group))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "grpo"])
def test_normalizer_of_a_whole_batch(mode):
    """Micro-batches of different sizes add up to the loss of all rows."""
    g = torch.Generator().manual_seed(5)
    logp, old, advantages = (torch.randn(4, n, generator=g) for n in (6, 6, 1))
    mask = torch.rand(4, 6, generator=g) < 0.7
    mask[1] = False
    whole = rlkern.ppo_loss(logp, old, advantages, mask, aggregation=mode).loss
    pieces = [[x[rows] for x in (logp, old, advantages, mask)] for rows in (slice(0, 1), slice(1, 4))]
    count = batch_count(mode, [piece[3] for piece in pieces])
    torch.testing.assert_close(sum(rlkern.ppo_loss(*piece, aggregation=mode, normalizer=count).loss for piece in pieces), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, "unknown mode 'mean'"),
        ({"mode": "prompt-mean"}, "groups is for the prompt modes, which need it, got mode='prompt-mean' and groups None"),
        ({"mode": "grpo", "groups": 1}, "groups is for the prompt modes"),
        ({"mode": "prompt-mean", "groups": torch.tensor([0, 3, 1]), "num_groups": 3}, r"groups must be in \[0, num_groups = 3\), got 0 to 3"),
        ({"mode": "prompt-mean", "groups": 1, "num_groups": 3}, "num_groups numbers the prompts of groups="),
        ({"mode": "dr_grpo"}, "length is T of"),
        ({"mode": "grpo", "length": 3.0}, "length is T of"),
        ({"mode": "grpo", "lengths": torch.tensor([1, -1])}, "lengths must not be negative, got -1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_weights(**({"lengths": torch.tensor([1, 2, 3])} | arguments))


def test_ranks_that_disagree():
    with thread_ranks(2) as run, pytest.raises(ValueError, match="unknown mode 'no mode'"):
        run(lambda group: sequence_weights("grpo" if group.place else "no mode", torch.tensor([1]), group=group))
