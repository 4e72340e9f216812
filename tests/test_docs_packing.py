"""The blocks of docs/packing.md run, in order, and do what the page says."""

import re
from pathlib import Path

import torch

import rlkern

PAGE = (Path(__file__).parents[1] / "docs" / "packing.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
CU = torch.tensor([0, 4, 5, 9])


def test_blocks():
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(1, 11, generator=g) - 1
    batch = {"cu_seq_lens_q": CU, "response_mask": torch.rand(1, 11, generator=g) < 0.7}
    names = {"rlkern": rlkern, "torch": torch, "batch": batch, "old_logp": old, "logp": old + 0.1, "advantages": torch.tensor([1.0, -1, 2])}
    names |= {"cu_seqlens": CU, "ids": torch.arange(11), "is_response": torch.ones(11, dtype=torch.bool), "logits": torch.randn(11, 16, generator=g)}
    gspo, boundary, own, micro_batches = BLOCKS
    exec(gspo, names)
    padded = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4)
    for i, (start, end) in enumerate(zip(CU[:-1], CU[1:], strict=True)):
        padded[0][i, : end - start] = batch["response_mask"][0, start:end]
    expected = rlkern.gspo_loss(padded[1] + 0.1, padded[1], names["advantages"], padded[0])
    torch.testing.assert_close(names["loss"], expected.loss)
    exec(boundary, names)
    assert names["targets"].tolist() == [1, 2, 3, -100, -100, 6, 7, 8, -100, -100, -100]
    assert names["mask"].tolist() == [True, True, True, False, False, True, True, True, False, False, False]
    assert (names["logp"][~names["pack"].mask] == 0).all()
    names["old_logp"] = names["logp"].detach() - 0.1
    exec(own, names)
    torch.testing.assert_close(names["mean_ratio"], torch.tensor([1, 0, 1]) * torch.tensor(0.1).exp())
    assert names["my_loss"].isfinite()

    logp, old = torch.randn(8, generator=g), torch.randn(8, generator=g)
    whole = rlkern.packed(lengths=[4, 4])
    w = torch.tensor([0.25, 0.125])
    leaf = logp.clone().requires_grad_()
    rlkern.gspo_loss(leaf, old, torch.tensor([1.0, -1]), whole, aggregation=w).loss.backward()
    halves = [torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5, 6, 7])]
    parts = []
    for index, cu in zip(halves, ([0, 2, 3], [0, 2, 5]), strict=True):
        own_logp = logp[index].requires_grad_()
        parts.append({"cu_seqlens": torch.tensor(cu), "mask": torch.ones(len(index)), "logp": own_logp, "old": old[index]})
    names |= {"parts": parts, "lengths": whole.lengths, "advantages": torch.tensor([1.0, -1]), "w": w}
    exec(micro_batches, names)
    for index, part in zip(halves, parts, strict=True):
        torch.testing.assert_close(part["logp"].grad, leaf.grad[index], rtol=1e-5, atol=1e-7)


def test_forms():
    """Every call of the table gives sequences of lengths 3, 0 (or none), 2."""
    calls = re.findall(r"\| `(packed\(.*?)`", PAGE)
    assert len(calls) == 6
    ids = torch.tensor([[0, 1, 2, 0, 1, 0]])
    names = {
        "packed": rlkern.packed,
        "mask": torch.ones(1, 6),
        "S": 2,
        "cu_seqlens": torch.tensor([0, 3, 3, 5]),
        "cu_padded": torch.tensor([0, 4, 4, 6]),
    }
    names |= {
        "cu": torch.tensor([0, 3, 3, 5]),
        "x": torch.nested.nested_tensor([torch.ones(3), torch.ones(0), torch.ones(3)[:2]], layout=torch.jagged),
    }
    for call in calls:
        given = ids if "position" in call else torch.tensor([[1, 1, 1, 2, 2, 0]])
        mask = torch.ones(5) if "offsets" in call else names["mask"]
        pack = eval(call, names | {"ids": given, "mask": mask})
        assert [n for n in pack.lengths.tolist() if n] == [3, 2], call
