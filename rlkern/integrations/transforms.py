"""What a Hugging Face model does with its raw logits, read from its config."""

from __future__ import annotations

import math
from typing import Any

# As transformers 5.23 applies them. Granite and MiniCPM3 divide by logits_scaling.
_MULTIPLY = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse and Grok
_CAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, 3n, 4; RecurrentGemma; xLSTM


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)


def logit_transforms(config: Any, *, other: bool = False) -> dict[str, float | None]:
    """The scale and softcap of a model's raw logits, as keyword arguments of `rlkern.token_stats` and others.

        stats = rlkern.linear_token_stats(hidden, model.lm_head.weight, ids, **logit_transforms(model.config))

    Only for raw logits, as of hidden states times the head's weight. The `.logits` of the model itself are
    scaled and capped already: with these arguments that would happen twice.

    Args:
        config: a `transformers` config, or anything with its attributes; of a multimodal model the text's
            part counts.
        other: for the second model of `rlkern.token_divergence` and its like: the names start with "other_",
            and no softcap is math.inf, as None means that of the first model.

    Returns:
        {"logit_scale": float, "softcap": float | None}. Of a model without either, 1.0 and None.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    scale = None if getattr(config, "model_type", "") == "mpt" else _first(config, _MULTIPLY)  # MPT has one and does not use it
    scale = 1.0 if scale is None else scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        scale = scale * scaling if str(getattr(config, "model_type", "")).startswith("hyperclovax") else scale / scaling
    elif getattr(config, "dim_model_base", None):  # MiniCPM with a config of its own
        scale *= config.dim_model_base / config.hidden_size
    softcap = _first(config, _CAP) or None
    if other:
        return {"other_logit_scale": float(scale), "other_softcap": float(softcap or math.inf)}
    return {"logit_scale": float(scale), "softcap": softcap and float(softcap)}
