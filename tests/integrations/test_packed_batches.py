"""docs/trainers/packed_batches.md: its calls on what the trainers' collators return, and its blocks."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import rlkern  # noqa: E402

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "trainers" / "packed_batches.md").read_text()
CALLS = re.findall(r"\| `(packed\(.*)` \|", PAGE)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
FEATURES = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}, {"input_ids": [9, 4], "labels": [9, 4]}]
SIZES = [3, 1, 2]


def flattened():
    return transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(FEATURES)


def trl_batch():
    collator = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    return collator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)(FEATURES)


@pytest.mark.parametrize("call", CALLS)
def test_calls(call):
    """Sequences of 3, 1 and 2 tokens, whatever the trainer has."""
    names = {"packed": rlkern.packed, "torch": torch, "S": 3, "batch": flattened(), "mask": torch.ones(1, 6)}
    names |= {"cu_seqlens": torch.tensor([0, 3, 4, 6], dtype=torch.int32), "rows_mask": torch.ones(2, 4)}
    names |= {"loss_masks": [torch.ones(n) for n in SIZES], "attention_mask": torch.tensor([[1, 1, 1, 2], [1, 1, 0, 0]])}
    names["x"] = torch.nested.nested_tensor([torch.ones(n) for n in SIZES], layout=torch.jagged)
    if "padded[" in call:
        names |= {"padded": trl_batch(), "padded_mask": torch.ones(1, 8)}
    if "p.cu" in call:
        cu, slots = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (SIZES, [4, 4, 4]))
        names |= {"p": SimpleNamespace(cu_seqlens_q=cu, cu_seqlens_q_padded=slots), "mask": torch.ones(12)}
    pack = eval(call, names)
    rows = pack.seq_idx[pack.mask].tolist()
    if "padding_id" in call:  # a run of padding is an empty sequence
        assert [n for n in pack.lengths.tolist() if n] == SIZES and rows == sorted(rows)
    else:
        assert pack.lengths.tolist() == SIZES and rows == [0, 0, 0, 1, 2, 2]


def test_the_calls_are_all_there():
    forms = [re.search(r"(position_ids|segment_ids|lengths)=|x\.offsets|p\.cu|cu_seq", call).group() for call in CALLS]
    assert forms == ["cu_seq", "p.cu", "position_ids=", "cu_seq", "segment_ids=", "position_ids=", "cu_seq", "segment_ids=", "x.offsets", "lengths="]
    assert len(BLOCKS) == 3


def test_trls_pad_tokens_are_sequences_of_its_own():
    """As the page warns: "grpo" counts them, means over sequences with tokens do not."""
    batch = trl_batch()
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 7, 8]
    mask, values = rlkern.next_tokens(batch["labels"]) != -100, torch.ones(1, 8)
    own, theirs = rlkern.packed(position_ids=batch["position_ids"], mask=mask, num_seqs=3), rlkern.packed(batch["cu_seq_lens_q"], mask)
    assert rlkern.aggregate(values, own, "grpo") == torch.tensor(2 / 3) and rlkern.aggregate(values, theirs, "grpo") == torch.tensor(2 / 5)
    assert rlkern.aggregate(values, own, "seq-mean-token-mean") == rlkern.aggregate(values, theirs, "seq-mean-token-mean") == 1


def model(seed=0):
    """Logits of each token by itself, so that rows and packs can be compared."""
    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda input_ids, position_ids: SimpleNamespace(logits=table[input_ids] + position_ids.unsqueeze(-1) * table[0])


def naive(features):
    """One log-probability a label, in rows without padding."""
    sums, counts = [], []
    for x in features:
        ids, labels = torch.tensor([x["input_ids"]]), torch.tensor(x["labels"])
        logp = model()(ids, torch.arange(ids.shape[1]).unsqueeze(0)).logits[0].log_softmax(-1)
        picked = [logp[t, labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] != -100]
        sums.append(sum(picked, torch.zeros((), dtype=torch.float64)))
        counts.append(len(picked))
    return torch.stack(sums), torch.tensor(counts)


def test_the_block_of_transformers():
    names = {"rlkern": rlkern, "features": FEATURES, "model": model(), "DataCollatorWithFlattening": transformers.DataCollatorWithFlattening}
    exec(BLOCKS[0], names)
    sums, counts = naive(FEATURES)
    torch.testing.assert_close(names["loss"], -(sums[counts > 0] / counts[counts > 0]).mean(), rtol=1e-12, atol=0)
    assert names["pack"].lengths.tolist() == counts.tolist() == [2, 0, 1]


def test_the_block_of_pairs():
    chosen, rejected = FEATURES[::2], [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}]
    reference = torch.tensor([-2.0, -1, -3, -2], dtype=torch.float64)
    names = {"rlkern": rlkern, "chosen": chosen, "rejected": rejected, "model": model(), "reference_logps": reference}
    names["DataCollatorWithFlattening"] = transformers.DataCollatorWithFlattening
    exec(BLOCKS[1], names)
    logps = naive(chosen + rejected)[0]
    torch.testing.assert_close(names["logps"], logps, rtol=1e-12, atol=0)
    margin = 0.1 * ((logps - reference)[:2] - (logps - reference)[2:])
    torch.testing.assert_close(names["losses"], -torch.nn.functional.logsigmoid(margin), rtol=1e-12, atol=0)


def test_the_block_of_lists():
    g = torch.Generator().manual_seed(0)
    names = {"rlkern": rlkern, "torch": torch, "loss_masks": [torch.tensor([1, 1, 0]), torch.tensor([0]), torch.tensor([1, 1])]}
    names |= {name: [torch.randn(n, generator=g, dtype=torch.float64) for n in SIZES] for name in ("log_probs", "old_log_probs", "advantages")}
    exec(BLOCKS[2], names)
    expected = 0
    for logp, old, a, mask in zip(*(names[name] for name in ("log_probs", "old_log_probs", "advantages", "loss_masks")), strict=True):
        ratio = (logp - old).exp()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
        expected += (loss * mask).sum() / mask.sum().clamp(min=1)
    torch.testing.assert_close(names["summed"], expected, rtol=1e-12, atol=0)
