"""What dpo_loss, dpo_loss_from_logits and sequence_logps refuse, and in which words."""

import math

import pytest
import torch

from rlkern import dpo_loss, dpo_loss_from_logits, sequence_logps

v = torch.zeros
ids = torch.zeros(4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "policy_rejected_logps must be a float tensor", (v(3), v(3, dtype=torch.long), v(3), v(3)), {}),
        (TypeError, "got list", ([1.0], v(1), v(1), v(1)), {}),
        (TypeError, "reference_chosen_logps.*None", (v(3), v(3), None, v(3)), {"reference_free": True}),
        (TypeError, "reference_chosen_logps.*None", (v(3), v(3), None, None), {}),
        (TypeError, "policy_chosen_logps.*None", (None, v(3), None, None), {"reference_free": True}),
        (ValueError, r"policy_rejected_logps must have the shape of policy_chosen_logps \(3,\), got \(4,\)", (v(3), v(4), v(3), v(3)), {}),
        (ValueError, r"must be \[B\].*\(3, 2\)", (v(3, 2), v(3, 2), v(3, 2), v(3, 2)), {}),
        (ValueError, "on the device of", (v(3), v(3), v(3), v(3, device="meta")), {}),
        (ValueError, "beta must be positive", (v(3),) * 4, {"beta": 0.0}),
        (ValueError, "beta must be positive", (v(3),) * 4, {"beta": -1.0}),
        (ValueError, "beta must be positive", (v(3),) * 4, {"beta": math.nan}),
        (TypeError, "beta must be a number", (v(3),) * 4, {"beta": "0.1"}),
        (ValueError, "label_smoothing", (v(3),) * 4, {"label_smoothing": 0.5}),
        (ValueError, "label_smoothing", (v(3),) * 4, {"label_smoothing": -0.1, "loss_type": "robust"}),
        (ValueError, "takes no label_smoothing", (v(3),) * 4, {"label_smoothing": 0.1, "loss_type": "hinge"}),
        (ValueError, "takes no label_smoothing", (v(3),) * 4, {"label_smoothing": 0.1, "ipo": True}),
        (ValueError, "exo_pair.*needs label_smoothing", (v(3),) * 4, {"loss_type": "exo_pair"}),
        (ValueError, "unknown loss_type 'kto'.*'sigmoid'.*'sft'", (v(3),) * 4, {"loss_type": "kto"}),
        (ValueError, "empty", (v(3),) * 4, {"loss_type": ()}),
        (ValueError, "ipo=True", (v(3),) * 4, {"ipo": True, "loss_type": "hinge"}),
        (ValueError, "one entry for each of the 1", (v(3),) * 4, {"loss_weights": [1.0, 2.0]}),
        (ValueError, "finite", (v(3),) * 4, {"loss_weights": [math.inf]}),
        (TypeError, "loss_weights must be a number", (v(3),) * 4, {"loss_weights": ["1"]}),
        (ValueError, "unknown f_divergence 'kl'.*'reverse_kl'", (v(3),) * 4, {"f_divergence": "kl"}),
        (ValueError, "f_alpha must be finite", (v(3),) * 4, {"f_divergence": "alpha_divergence", "f_alpha": math.inf}),
        (ValueError, "discopop_tau", (v(3),) * 4, {"loss_type": "discopop", "discopop_tau": 0.0}),
        (ValueError, "'sigmoid_norm' needs chosen_lengths=", (v(3),) * 4, {"loss_type": ["hinge", "sigmoid_norm"]}),
        (ValueError, "'ipo_norm' needs rejected_lengths=", (v(3),) * 4, {"loss_type": "ipo_norm", "chosen_lengths": v(3)}),
        (ValueError, "'sft' needs chosen_lengths=", (v(3),) * 4, {"loss_type": "sft"}),
        (ValueError, "chosen_lengths must have the shape", (v(3),) * 4, {"loss_type": "sft", "chosen_lengths": v(4)}),
        (TypeError, "chosen_lengths", (v(3),) * 4, {"loss_type": "sft", "chosen_lengths": [1, 2, 3]}),
        (ValueError, "weights must have the shape", (v(3),) * 4, {"weights": v(2)}),
        (ValueError, "'aot' sorts the batch", (v(3),) * 4, {"weights": v(3), "loss_type": "aot"}),
        (ValueError, "'aot_unpaired' sorts the batch", (v(3),) * 4, {"weights": v(3), "loss_type": ["sigmoid", "aot_unpaired"]}),
    ],
)
def test_dpo_loss_errors(error, message, args, options):
    with pytest.raises(error, match=message):
        dpo_loss(*args, **options)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, r"\[2B, T, V\].*\(3, 5, 7\)", (v(3, 5, 7), ids[:3], v(3)), {}),
        (ValueError, r"\[2B, T, V\]", (v(4, 7), ids[:, 0], v(4)), {}),
        (ValueError, r"labels must be \(4, 5\) for logits \(4, 5, 7\), got \(4, 4\)", (v(4, 5, 7), ids[:, :4], v(4)), {}),
        (TypeError, "labels must be an integer tensor", (v(4, 5, 7), v(4, 5), v(4)), {}),
        (TypeError, "logits must be a tensor", (None, ids, v(4)), {}),
        (TypeError, "logits must be float32", (ids.unsqueeze(-1), ids, v(4)), {}),
        (ValueError, r"reference_logps must be \[2B\] or \[2B, T\].* here \(4,\) or \(4, 5\).*got \(2,\)", (v(4, 5, 7), ids, v(2)), {}),
        (ValueError, r"reference_logps must be \[2B, T\].*ld_alpha, here \(4, 5\).*got \(4,\)", (v(4, 5, 7), ids, v(4)), {"ld_alpha": 0.5}),
        (ValueError, "reference_logps must be on the device", (v(4, 5, 7), ids, v(4, device="meta")), {}),
        (TypeError, "reference_logps must be a float tensor.*int64", (v(4, 5, 7), ids, ids[:, 0]), {}),
        (TypeError, "reference_logps must be a float tensor.*None", (v(4, 5, 7), ids, None), {}),
        (ValueError, r"ld_alpha must be in \[0, 1\]", (v(4, 5, 7), ids, v(4, 5)), {"ld_alpha": 1.5}),
        (TypeError, "ld_alpha must be a number", (v(4, 5, 7), ids, v(4, 5)), {"ld_alpha": "1"}),
        (ValueError, "'aot' sorts the batch.*use_weighting", (v(4, 5, 7), ids, v(4)), {"use_weighting": True, "loss_type": "aot"}),
        (ValueError, "max_weight", (v(4, 5, 7), ids, v(4)), {"max_weight": 1.0}),
        (ValueError, "max_weight", (v(4, 5, 7), ids, v(4)), {"max_weight": 0.0, "use_weighting": True}),
        (ValueError, "beta must be positive", (v(4, 5, 7), ids, v(4)), {"beta": -0.1}),
        (ValueError, "unknown loss_type", (v(4, 5, 7), ids, v(4)), {"loss_type": "nope"}),
        (IndexError, "9", (v(4, 5, 7), ids + 9, v(4)), {}),
    ],
)
def test_from_logits_errors(error, message, args, options):
    with pytest.raises(error, match=message):
        dpo_loss_from_logits(*args, **options)


def test_sequence_logps_errors():
    with pytest.raises(ValueError, match="labels must be"):
        sequence_logps(v(4, 5, 7), ids[:, :4])
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        sequence_logps(v(4, 5, 7), v(4, 5))
    with pytest.raises(ValueError, match="temperature"):
        sequence_logps(v(4, 5, 7), ids, temperature=0.0)
