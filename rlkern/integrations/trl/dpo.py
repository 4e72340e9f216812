"""TRL's DPOTrainer with the preference losses of rlkern."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import trl
from trl import DPOTrainer as _DPOTrainer

from ...losses import dpo_loss
from ..patching import Patch
from ..registry import check_effect, check_options, dry_run
from .versions import UnknownTRLError, known_replacements

# Arguments of `dpo_loss` that the trainer gives
_GIVEN = (
    *("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"),
    *("beta", "ipo", "loss_type", "chosen_lengths", "rejected_lengths", "weights"),
)


class DPOTrainer(_DPOTrainer):
    """TRL's DPOTrainer whose loss is `rlkern.dpo_loss`; reference, auxiliary loss and metrics are TRL's.

    Args:
        rlkern_loss: a `loss_type` of `rlkern.dpo_loss`, or several. Not in TRL: "ipo" with sums over the
            response, as in the paper (TRL's "ipo" averages over it, here "ipo_norm"), and "sigmoid" with
            label_smoothing, conservative DPO.
        rlkern_loss_options: options of `dpo_loss`: label_smoothing, reference_free, f_divergence, f_alpha,
            discopop_tau, loss_weights. beta is that of DPOConfig.
        *args, **kwargs: TRL's.

    Raises:
        UnknownTRLError: for a release of TRL that has not been tested.
        TypeError, ValueError: for an unknown loss, options that it does not take, or a DPOConfig with an
            option that would have no effect on it.
    """

    def __init__(self, *args: Any, rlkern_loss: str | Sequence[str], rlkern_loss_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        known_replacements()
        if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
            raise UnknownTRLError(
                "rlkern.integrations.trl.DPOTrainer takes its log-probabilities from the fused LM head that TRL has "
                f"since 1.15, found TRL {trl.__version__}: pip install 'trl>=1.15'. With this one patch() works, on TRL's "
                "own DPOTrainer."
            )
        config = inspect.signature(_DPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("args")
        check_options("rlkern_loss", dpo_loss, rlkern_loss_options or {}, _GIVEN)
        self._rlkern_options = dict(rlkern_loss_options or {}, loss_type=rlkern_loss)
        beta, own = 0.1 if config is None else config.beta, self._rlkern_options
        pair = ("response", "length")
        dry_run(lambda x, n: dpo_loss(x, x, x, x, beta, chosen_lengths=n, rejected_lengths=n, **own), pair)
        if config is not None:
            _check_config(config)
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if not self.precompute_ref_logps:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = inputs | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True))
        outputs = []

        def recording(**kwargs):
            outputs.append(model(**kwargs))
            return outputs[-1]

        # TRL finds the reference done and no loss to add; it runs the model, and logs
        stock = {"precompute_ref_logps": True, "loss_types": [], "loss_weights": []}
        with Patch([(self, name, value) for name, value in stock.items()]):
            result = super()._compute_loss(recording, inputs, return_outputs)

        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = outputs[0].log_probs[:, -mask.shape[1] :].sum(1).chunk(2)
        options = dict(zip(("chosen_lengths", "rejected_lengths"), mask.sum(1).chunk(2), strict=True)) | self._rlkern_options
        logps = chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        losses = dpo_loss(*logps, self.beta, **options).losses
        return (result[0] + losses.mean(), result[1]) if return_outputs else result + losses.mean()


def _check_config(config: Any) -> None:
    """Refuses options of DPOConfig that act on TRL's own loss."""
    advice = {
        "loss_type": (list(config.loss_type) == ["sigmoid"], "leave it out, rlkern_loss takes its place"),
        "loss_weights": (config.loss_weights is None, "give loss_weights in rlkern_loss_options"),
        "label_smoothing": (config.label_smoothing == 0, "give label_smoothing in rlkern_loss_options"),
        "f_divergence_type": (config.f_divergence_type == "reverse_kl", "give f_divergence and f_alpha in rlkern_loss_options"),
        "discopop_tau": (config.discopop_tau == 0.05, "give discopop_tau in rlkern_loss_options"),
        "ld_alpha": (config.ld_alpha is None, "it is not supported here: use TRL's own trainer"),
        "use_weighting": (not config.use_weighting, "it is not supported here: use TRL's own trainer"),
    }
    check_effect(config, "rlkern_loss", advice)
