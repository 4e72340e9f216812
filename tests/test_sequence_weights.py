"""Weights and counts of a whole optimizer batch: every mode, dealt to ranks, in micro-batches, packed."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, subgroups
from thread_ranks import thread_ranks

import rlkern
from rlkern import batch_count, parallel, sequence_weights

F64 = torch.float64
T = 7
DOCS = Path(__file__).parents[1] / "docs"
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


@pytest.mark.parametrize("refusing", [1, 2])
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"mode": "no mode"}, {"mode": "grpo"}),
        ({"mode": "grpo", "groups": 1}, {"mode": "grpo"}),
        ({"mode": "prompt-mean", "groups": torch.ones(2), "num_groups": 3}, {"mode": "prompt-mean", "groups": torch.tensor([0, 2]), "num_groups": 3}),
    ],
)
def test_ranks_that_refuse_without_a_header(monkeypatch, wrong, right, refusing):
    """As on GPUs, where the host may not read. The others do not wait, and do not train on a wrong count."""
    monkeypatch.setattr(parallel.Meeting, "exchanges", False)

    def weights(group):
        try:
            return sequence_weights(lengths=torch.tensor([3, 2]), group=group, **(right if group.place == 0 else wrong))
        except (TypeError, ValueError) as error:
            return error

    with thread_ranks(1 + refusing) as run:
        got, *errors = run(weights)
    assert got.isnan().all() and all(isinstance(error, (TypeError, ValueError)) for error in errors)


# --- data parallel, context parallel, micro-batches ---------------------------------------------------------

SIZES = torch.tensor([8, 3, 0, 11, 1, 6, 4, 0, 9, 5, 2, 7])  # 12 sequences, 6 a data-parallel rank, 2 a micro-batch
ADVANTAGES = torch.linspace(-1, 1.5, len(SIZES), dtype=F64)
PROMPT_IDS = torch.tensor([0, 0, 1, 1, 2, 2, 0, 3, 3, 1, 4, 4])  # some on both ranks


def whole_batch():
    """(features, targets, old, reference, mask) of all tokens, and where sequences start."""
    g = torch.Generator().manual_seed(11)
    cu = torch.nn.functional.pad(SIZES.cumsum(0), (1, 0))
    n = int(cu[-1])
    x, ids = torch.randn(n, 4, generator=g, dtype=F64), torch.randint(5, (n, 1), generator=g)
    return x, ids, *(torch.randn(2, n, generator=g, dtype=F64) / 3 - 1.6), torch.rand(n, generator=g) < 0.8, cu


def head_of_all():
    return torch.linspace(-1, 1, 20, dtype=F64).view(4, 5).requires_grad_()


def gradient_of(loss, tokens, packs, weights):
    """d loss / d head, added up over packs; tokens: one index a pack."""
    x, ids, old, reference, _, _ = whole_batch()
    head = head_of_all()
    for at, (rows, pack), w in zip(tokens, packs, weights, strict=True):
        logp = (x[at] @ head).log_softmax(-1).gather(-1, ids[at]).view(1, -1)  # a micro-batch may have S tokens
        loss(logp, old[at].view(1, -1), reference[at].view(1, -1), ADVANTAGES[rows], pack, w).backward()
    return head.grad


def gspo(logp, old, reference, advantages, pack, w):
    return rlkern.gspo_loss(logp, old, advantages, pack, clip_low=0.3, clip_high=0.3, aggregation=w).loss


def grpo(logp, old, reference, advantages, pack, w):
    return rlkern.grpo_loss(logp, old, advantages, pack, reference_logp=reference, kl_coef=0.1, aggregation=w).loss


def dpo(logp, old, reference, advantages, pack, w):
    """Pairs are neighbours. w: ranks that gradients are averaged over / all pairs."""
    policy, ref = pack.sums(logp, reference)
    return rlkern.dpo_loss(policy[::2], policy[1::2], ref[::2], ref[1::2]).losses.sum() * w


def gspo_of_the_page(logp, old, reference, advantages, pack, w):
    return rlkern.gspo_loss(logp, old, advantages, pack, aggregation=w).loss


STEPS = {"gspo": (gspo, "seq-mean-token-mean"), "grpo": (grpo, "prompt-mean"), "dpo": (dpo, None)}


def weights_of(mode, packs, rows, **ranks):
    """One tensor a pack."""
    if mode is None:
        return [2 * ranks.get("averaged_over", 1) / len(SIZES)] * len(packs)
    prompts = {"groups": PROMPT_IDS[rows], "num_groups": 5} if mode in PROMPTS else {}
    return sequence_weights(mode, packs, **prompts, **ranks).split([pack.num_seqs for pack in packs])


def of_one_process(loss, mode):
    cu, mask, rows = whole_batch()[-1], whole_batch()[-2], slice(0, len(SIZES))
    pack = rlkern.packed(cu, mask)
    return gradient_of(loss, [slice(None)], [(rows, pack)], weights_of(mode, [pack], rows))


def of_four(group, rank):
    """Gradients by name, averaged over the ranks: data-parallel rank // 2, context-parallel rank % 2."""
    row, column = rank - rank % 2, rank % 2
    context_group, data_group = subgroups[row, row + 1], subgroups[column, column + 2]
    *_, mask, cu = whole_batch()
    first = 6 * (rank // 2)
    tokens, packs = [], []
    for start in range(first, first + 6, 2):  # micro-batches, each sequence in zigzag quarters
        index, lengths = [], []
        for i in (start, start + 1):
            bounds = [int(cu[i]) + round(int(SIZES[i]) * quarter / 4) for quarter in range(5)]
            kept = [t for c in (rank % 2, 3 - rank % 2) for t in range(bounds[c], bounds[c + 1])]
            index, lengths = index + kept, [*lengths, len(kept)]
        tokens.append(torch.tensor(index, dtype=torch.int64))
        packs.append((slice(start, start + 2), rlkern.packed(lengths=lengths, mask=mask[tokens[-1]], group=context_group)))
    gradients = {"docs/parallel.md": gradient_of_the_page(tokens, packs, context_group, data_group)}
    for name, (loss, mode) in STEPS.items():
        w = weights_of(mode, [pack for _, pack in packs], slice(first, first + 6), group=data_group, averaged_over=4)
        gradients[name] = gradient_of(loss, tokens, packs, w)
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=group)
    return {name: gradient / 4 for name, gradient in gradients.items()}


def gradient_of_the_page(tokens, packs, context_group, data_group):
    """As `gradient_of`, by the block with packs."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", (DOCS / "parallel.md").read_text(), re.S) if "cp_group" in block]
    x, ids, old, _, mask, _ = whole_batch()
    head, names = head_of_all(), {"rlkern": rlkern, "cp_group": context_group, "dp_group": data_group}
    names["micro_batches"] = [
        {"cu_seqlens": pack.cu_seqlens, "mask": mask[at], "inputs": x[at].unsqueeze(0), "ids": ids[at].view(1, -1),
         "old_logp": old[at].unsqueeze(0), "advantages": ADVANTAGES[rows]} for at, (rows, pack) in zip(tokens, packs, strict=True)
    ]  # fmt: skip
    exec(block, names | {"model": lambda inputs: inputs @ head})
    return head.grad


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_data_and_context_parallel_micro_batches():
    """Two by two gloo processes of three micro-batches have the gradients of one process."""
    steps = STEPS | {"docs/parallel.md": (gspo_of_the_page, "seq-mean-token-mean")}
    expected = {name: of_one_process(*step) for name, step in steps.items()}
    assert all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for gradients in on_ranks(4, of_four):
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-15)


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page():
    """docs/losses.md, "One average over micro-batches and processes": gradients of the whole batch."""
    section = (DOCS / "losses.md").read_text().split("### One average over")[1].split("\n## ")[0]
    with_count, with_weights = re.findall(r"```python\n(.*?)```", section, re.S)
    g = torch.Generator().manual_seed(3)
    old, advantages, lengths = torch.randn(6, T, generator=g), torch.randn(6, generator=g), torch.tensor([7, 2, 0, 3, 1, 5])
    mask, prompts = torch.arange(T) < lengths.unsqueeze(-1), torch.tensor([0, 0, 1, 2, 2, 2])
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]

    def leaf():
        return (old + 0.1).requires_grad_()

    count_leaf, weights_leaf = leaf(), leaf()
    names = {"rlkern": rlkern, "data_group": None, "ranks": 1, "model": None, "log_probs": lambda _, m: count_leaf[m["rows"]]}
    names["micro_batches"] = [{"rows": rows, "old_logp": old[rows], "advantages": advantages[rows], "mask": mask[rows]} for rows in cuts]
    exec(with_count, names)
    names |= {"logp": weights_leaf, "old_logp": old, "advantages": advantages, "mask": mask, "lengths": lengths, "prompt_ids": prompts, "P": 3}
    exec(with_weights, names | {"micro_batches": cuts})
    for got, make in ((count_leaf, lambda x: rlkern.ppo_loss(x, old, advantages, mask).loss),
                      (weights_leaf, lambda x: prompt_mean(-(x - old).exp() * advantages.unsqueeze(-1), mask, prompts))):  # fmt: skip
        wanted = leaf()
        make(wanted).backward()
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-7)


def prompt_mean(values, mask, prompts):
    means = [values[prompts == p][mask[prompts == p]].mean() for p in prompts.unique() if mask[prompts == p].any()]
    return sum(means) / len(means)
