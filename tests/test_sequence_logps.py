"""sequence_logps against a loop over tokens, the gradient it leaves in the logits, and next_tokens."""

import pytest
import torch
from dpo_formulas import draw_logits
from loss_battery import Operators
from torch.testing import assert_close

from rlkern import next_tokens, sequence_logps


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_sequence_logps(average, shift):
    logits, _, labels = draw_logits()
    if not shift:
        labels = labels.clone()
        labels[2, -1] = 5  # counts without the shift
    result = sequence_logps(logits, labels, average=average, shift=shift)
    log_p = logits.log_softmax(-1)
    for row in range(6):
        moved = labels[row].tolist()[1:] if shift else labels[row].tolist()
        picked = [log_p[row, t, y] for t, y in enumerate(moved) if y != -100]
        expected = sum(picked) / (len(picked) if average else 1) if picked else torch.zeros((), dtype=torch.float64)
        assert_close(result[row], expected)
    assert result[1] == 0  # no tokens: 0 and not NaN


def test_sequence_logps_writes_no_second_gradient():
    """The gradient comes straight from the kernel: whole logits go in, so there is no slice to undo."""
    logits, _, labels = draw_logits()
    leaf = logits.requires_grad_()
    loss = sequence_logps(leaf, labels).sum()
    with Operators() as ran:
        (gradient,) = torch.autograd.grad(loss, leaf)
    written = [func._schema.name for func, _, results in ran.calls if any(x.numel() == gradient.numel() for x in results)]
    assert written in (["rlkern::token_stats_backward"], ["rlkern::token_stats_backward", "aten::detach"])


def test_ignore_index_and_empty_time():
    logits, _, labels = draw_logits()
    by_label = sequence_logps(logits, labels.masked_fill(labels == -100, 7), ignore_index=7)
    assert_close(by_label, sequence_logps(logits, labels.masked_fill(labels == 7, -100)))
    assert sequence_logps(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long)).tolist() == [0, 0]
    assert next_tokens(torch.tensor([[1, 2, 3]]), -7).tolist() == [[2, 3, -7]]
    assert next_tokens(torch.tensor([[True, True]]), False).tolist() == [[True, False]]
    with pytest.raises(ValueError, match=r"labels must be \[\.\.\., T\]"):
        next_tokens(torch.tensor(1))
    with pytest.raises(ValueError, match="ignore_index must be False or True for labels of torch.bool"):
        next_tokens(torch.tensor([[True, True]]))
