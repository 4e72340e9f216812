"""OpenRLHF: its log_probs_from_logits, compute_entropy and PolicyLoss, by name and signature.

    import rlkern.integrations.openrlhf

    patch = rlkern.integrations.openrlhf.patch()     # in every process that trains
    patch.undo()                                     # or: with rlkern.integrations.openrlhf.patch(): ...

Each can also be imported and called without OpenRLHF. See docs/trainers/openrlhf.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import torch
from torch import Tensor, nn

from .. import primitives
from ..checks import as_bool, check_choice, check_flags, check_number, computing_dtype, shown
from ..losses import aggregate, ppo_loss
from ..primitives.packing import Rows
from ..primitives.ratio import clipped_surrogate
from .patching import Patch
from .versions import Releases

__all__ = ["SUPPORTED_VERSIONS", "PolicyLoss", "compute_entropy", "log_probs_from_logits", "patch"]

SUPPORTED_VERSIONS = ("0.11.2",)  # releases before it have other options in PolicyLoss
_USER, _INSTALL = "rlkern.integrations.openrlhf.patch", f"openrlhf=={SUPPORTED_VERSIONS[-1]}"
_RELEASES = Releases("OpenRLHF", lambda: metadata.version("openrlhf"), _USER, SUPPORTED_VERSIONS, _INSTALL)
_LARGEST_LOG_RATIO = 20.0  # OpenRLHF's, of "ppo"


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0, *, keep: primitives.Kept | Tensor | None = None) -> Tensor:
    """openrlhf.models.utils.log_probs_from_logits: logits [..., V], labels [...] -> [...].

    The result is float32, whatever the dtype of the logits. OpenRLHF's divides the logits by the temperature
    in place; this leaves them as they are.

    keep: not OpenRLHF's: the sets that the softmax is over, see docs/kept_sets.md.
    """
    return primitives.token_logprobs(logits, labels, temperature=temperature, keep=keep)


def compute_entropy(logits: Tensor) -> Tensor:
    """openrlhf.models.utils.compute_entropy: [..., V] -> [...], in nats, float32; probability 0 at -inf."""
    return primitives.entropy_from_logits(logits)


class PolicyLoss(nn.Module):
    """openrlhf.models.PolicyLoss: its arguments, its five results.

    Args:
        clip_eps_low, clip_eps_high: the ratio stops mattering below 1 - low (A < 0), above 1 + high (A > 0).
        dual_clip: c > 1 bounds the ratio of tokens with A < 0; None does not.
        token_level_loss: the mean over tokens; False: the mean over sequences of their means.
        policy_loss_type: "ppo"; or "gspo", PPO on the sequence's mean log-probability. "gspo" is always a
            mean over sequences.
        is_correction_level: "off", "token" or "seq": whose loss is corrected for the rollout's
            log-probabilities. With "gspo" any level but "off" takes the ratio to the rollout policy.
        is_correction_mode: "mask" drops what is outside of the threshold and weighs the rest by
            pi_train / pi_rollout; "clip" clamps the weight to the threshold.
        is_correction_gating: what is compared with the threshold: "ratio", "binary_kl" or "tv".
        is_correction_threshold: (low, high).

    A weight can be so large that the losses of the batch would overflow. It is bounded then, so that their
    sum stays finite; OpenRLHF's loss is infinite there.

    Raises:
        TypeError, ValueError: for options other than these.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        check_number("clip_eps_low", clip_eps_low, 0, 1)
        check_number("clip_eps_high", clip_eps_high, 0)
        if dual_clip is not None:
            check_number("dual_clip", dual_clip)
            if not dual_clip > 1:
                raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
        check_flags(token_level_loss=token_level_loss)
        check_choice("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        check_choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        check_choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        check_choice("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        threshold = is_correction_threshold
        if not isinstance(threshold, Sequence) or len(threshold) != 2 or isinstance(threshold, str):
            raise TypeError(f"is_correction_threshold must be a pair (low, high), got {shown(threshold)}")
        for bound in threshold:
            check_number("is_correction_threshold", bound, 0)
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode 'clip' bounds the ratio of a token: it needs is_correction_level 'token' and "
                f"is_correction_gating 'ratio', got {is_correction_level!r} and {is_correction_gating!r}"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and threshold[0] > 0:
            raise ValueError(
                f"is_correction_gating {is_correction_gating!r} has an upper bound only: is_correction_threshold must "
                f"be (0, bound), got {tuple(threshold)}"
            )
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All [B, T] -> (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio).

        The last two are None without a correction. The last four are means over the tokens, 0 without any;
        OpenRLHF weighs them by the tokens of the micro-batch. At level "seq" is_filter_ratio is a mean over
        sequences, and OpenRLHF weighs it by tokens all the same.

        Args:
            batch_num_tokens, global_batch_size: counts of the whole batch; None takes this batch's.
            dp_size: so many processes average their gradients.
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else as_bool(action_mask)
        rollout = None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(f"is_correction_level {self.is_correction_level!r} needs rollout_log_probs= [B, T], got None")
            rollout = rollout_log_probs

        count = batch_num_tokens if self.token_level_loss else global_batch_size
        normalizer = None if count is None else count / dp_size

        logp, old_logp, weights = log_probs, old_log_probs, None
        vllm_kl = is_filter_ratio = None
        if self.policy_loss_type == "gspo":
            # A sequence's ratio is exp(mean log ratio): PPO in which each token has the mean of its sequence.
            rows = Rows(mask)
            logp = rows.spread(rows.mean(log_probs)).expand_as(log_probs)
            old_logp = rows.spread(rows.mean(old_log_probs if rollout is None else rollout)).expand_as(log_probs)
        elif rollout is not None:
            dtype = computing_dtype(log_probs)  # an exponential of float16 overflows at 11
            weights, outside = self._correction(old_log_probs.detach().to(dtype), rollout.detach().to(dtype), mask)
            weights = torch.minimum(weights, self._largest_weights(log_probs, old_log_probs, advantages, normalizer))
            by_sequence, outside = self.is_correction_level == "seq", outside.float()
            is_filter_ratio = outside.mean() if by_sequence else aggregate(outside, mask)
            vllm_kl = aggregate((rollout - old_log_probs).detach(), mask)

        loss, metrics = ppo_loss(
            logp,
            old_logp,
            advantages,
            mask,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            log_ratio_clamp=_LARGEST_LOG_RATIO if self.policy_loss_type == "ppo" else None,
            weights=weights,
            aggregation="token-mean" if self.token_level_loss else "seq-mean-token-mean",
            normalizer=normalizer,
        )
        ppo_kl = aggregate((old_log_probs - log_probs).detach(), mask)
        return loss, metrics["clip_fraction_low"] + metrics["clip_fraction_high"], ppo_kl, vllm_kl, is_filter_ratio

    def _largest_weights(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, normalizer: float | None) -> Tensor:
        """[B, T]: with weights up to these, the losses add up to at most half of the largest number."""
        logp, old_logp, advantages = (x.detach().to(computing_dtype(logp)) for x in (logp, old_logp, advantages))
        ratio = (logp - old_logp).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
        size = clipped_surrogate(ratio, advantages, self.clip_eps_low, self.clip_eps_high, self.dual_clip).abs()
        largest = torch.finfo(size.dtype).max / (2 * max(size.numel(), 1)) / size.clamp(min=1)
        if normalizer is None:
            return largest
        return largest * torch.as_tensor(normalizer, dtype=size.dtype, device=size.device).clamp(max=1)

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The weight [B, T] of each token's loss; what is outside of the threshold, [B, T] or [B, 1]."""
        low, high = self.is_correction_threshold
        log_ratio = old - rollout
        if self.is_correction_gating == "ratio":
            statistic = log_ratio
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            if self.is_correction_gating == "tv":
                statistic = (p - q).abs()
            else:
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if self.is_correction_level == "seq":
            # NaN for an empty sequence, as in OpenRLHF: it is outside of the threshold
            rows = Rows(mask)
            statistic = rows.spread(rows.mean(statistic).masked_fill(rows.lengths == 0, torch.nan))
        if self.is_correction_gating == "ratio":
            statistic = statistic.exp()
        inside = (statistic >= low) & (statistic <= high)
        if self.is_correction_mode == "clip":
            return statistic.clamp(low, high), ~inside
        return torch.where(inside, log_ratio.exp(), 0), ~inside


def patch() -> Patch:
    """Replaces OpenRLHF's log_probs_from_logits, compute_entropy and PolicyLoss.

    They are replaced wherever OpenRLHF imports them, now or later, until the `Patch` is undone. A trainer
    that was built meanwhile keeps its PolicyLoss.

    Raises:
        ImportError: OpenRLHF is not there, or not one of SUPPORTED_VERSIONS.
    """
    _RELEASES.check()
    from openrlhf.models import loss, utils

    replacements = (
        (utils, "log_probs_from_logits", log_probs_from_logits),
        (utils, "compute_entropy", compute_entropy),
        (loss, "PolicyLoss", PolicyLoss),
    )
    return Patch.everywhere("openrlhf", replacements)
