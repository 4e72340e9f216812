"""The Monte-Carlo draws of one micro-batch, one backward each.

For diffusion BGPO's bound, or for the exact objective in two passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_index, check_number, expect, shown
from ..operator import values_readable
from ..primitives.elbo import elbo_rows
from ..primitives.kinks import number
from ..primitives.packing import Packed
from .bgpo import Exact, bgpo_loss, check_elbo, check_old, exact_objective, log_ratio
from .options import Given, advantage_vector, bgpo_options, factor, scale_factor, vector

_MC_SAMPLES = 16  # the paper's n_t


def _draws(advantages: Tensor, old_elbo, ref_elbo, num_mc: int | None, mc_weights) -> int:
    """The number of draws. Every argument with one column a draw must agree."""
    columns: dict[str, int] = {}
    if num_mc is not None:
        check_count("num_mc", num_mc, 1)
        columns["num_mc"] = num_mc
    for name, x in {"old_elbo": old_elbo, "ref_elbo": ref_elbo}.items():
        if x is not None:
            expect(name, x, "float", "[B, n] (one column a draw)")
            expect(name, x, "float", "[B, n]", shape=(len(advantages), x.shape[1]), like=("advantages", advantages))
            columns[name] = x.shape[1]
    if isinstance(mc_weights, Tensor) and mc_weights.dtype.is_floating_point and mc_weights.dim() > 0:
        columns["mc_weights"] = mc_weights.shape[-1]
    elif mc_weights is not None:
        if not isinstance(mc_weights, Sequence) or isinstance(mc_weights, str):
            raise TypeError(f"mc_weights must be a float tensor [n] or [B, n], or a sequence of numbers, got {shown(mc_weights)}")
        for weight in mc_weights:
            check_number("mc_weights", weight)
        columns["mc_weights"] = len(mc_weights)
    if len(set(columns.values())) > 1:
        counts = ", ".join(f"{count} from {name}" for name, count in columns.items())
        raise ValueError(f"the number of draws must be one, got {counts}")
    for name, count in columns.items():
        if count < 1:
            raise ValueError(f"the number of draws must be at least 1, got {count} from {name}")
    return next(iter(columns.values()), _MC_SAMPLES)


def _weights(advantages: Tensor, mc_weights: Tensor | Sequence[float] | None, count: int) -> Sequence[float | Tensor]:
    """omega_j, for each draw a number, a 0-d tensor or one [B]."""
    if mc_weights is None:
        return [1 / count] * count
    wanted = "mc_weights must not be negative and sum to 1 over the draws, got"
    if not isinstance(mc_weights, Tensor):
        weights = [float(w) for w in mc_weights]
        if abs(sum(weights) - 1) >= 1e-3 or min(weights) < 0:
            raise ValueError(f"{wanted} {weights} with sum {sum(weights)}")
        return weights
    shapes = ((count,), (len(advantages), count))
    expect("mc_weights", mc_weights, "float", "[n] or [B, n]", shape=shapes, like=("advantages", advantages))
    total = mc_weights.sum(-1)
    if values_readable(mc_weights) and not (((total - 1).abs() < 1e-3).all() and (mc_weights >= 0).all()):
        raise ValueError(f"{wanted} sums {total.min().item()} to {total.max().item()}")
    return mc_weights.unbind(-1)


class _Draw(NamedTuple):
    loss: Tensor
    ell: Tensor
    d: Tensor
    clipped: Tensor


class BGPOAccumulator:
    """What the draws of a micro-batch share: old ELBOs, weights, metrics. One a micro-batch and step.

        acc = rlkern.BGPOAccumulator(advantages, old_elbo, seq_weight, num_mc=16, ratio_scale=1 / lengths)
        for j in range(acc.num_mc):
            acc.loss(j, model(noisy[:, j]).logits, ids, mask=mask[:, j], weight=weight[:, j]).backward()
        optimizer.step()

    mode="bound" is `bgpo_loss` for each draw. mode="exact" has the gradient of the objective itself,
    A exp(sum_j omega_j d_j), with the clip on the ratio of the whole estimate. It must know all ELBOs before
    the first backward, so a pass without gradient goes first:

        if acc.two_pass:
            with torch.no_grad():
                for j in range(acc.num_mc):
                    acc.observe(j, model(noisy[:, j]).logits, ids, mask=mask[:, j], weight=weight[:, j])

    On-policy (no old_elbo, no ref_elbo) both modes have the same gradient and neither needs that pass. In
    both, the losses of the draws sum to the loss of the micro-batch, and memory holds one draw. Data
    parallel: every process must run the same number of draws, empty ones included.

    Args:
        advantages: [B] float.
        old_elbo: [B, n] float, the draws' ELBOs under the policy that produced the data, such as the `elbo`
            of an earlier accumulator over the same draws. None: on-policy, or old_token_logp at each draw.
        seq_weight: c, a number or [B], as in `bgpo_loss`; None with a preset.
        num_mc: n; None takes it from old_elbo, ref_elbo or mc_weights, else 16.
        mode: "bound" or "exact".
        mc_weights: omega, [n] or [B, n], not negative, with sum 1 over the draws (quadrature); None is 1/n.
        ratio_scale, clip, dual_clip, max_log_ratio, preset, lengths, response_width, kl_coef, kl: as in
            `bgpo_loss`.
        ref_elbo: [B, n] float, the draws' ELBOs under the reference model.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above, and for
        weights that do not sum to 1 (read on a CPU, on a GPU with RLKERN_DEBUG=1). The methods: IndexError
        for a draw outside [0, n), RuntimeError for calls out of order.
    """

    def __init__(
        self,
        advantages: Tensor,
        old_elbo: Tensor | None = None,
        seq_weight: float | Tensor | None = None,
        num_mc: int | None = None,
        *,
        mode: str = "bound",
        mc_weights: Tensor | Sequence[float] | None = None,
        ratio_scale: float | Tensor | None = None,
        clip: tuple[float, float] | None = None,
        dual_clip: float | None = None,
        max_log_ratio: float = 20.0,
        preset: str | None = None,
        lengths: Tensor | None = None,
        response_width: int | None = None,
        ref_elbo: Tensor | None = None,
        kl_coef: float = 0.0,
        kl: str = "k2",
    ):
        check_choice("mode", mode, ("bound", "exact"))
        expect("advantages", advantages, "float", "[B] (one a sequence)")
        self.mode = mode
        self.num_mc = _draws(advantages, old_elbo, ref_elbo, num_mc, mc_weights)
        self._advantages = advantages
        self._mc_weights = _weights(advantages, mc_weights, self.num_mc)
        given = Given(
            seq_weight=seq_weight,
            ratio_scale=ratio_scale,
            clip=clip,
            dual_clip=dual_clip,
            max_log_ratio=max_log_ratio,
            ref_elbo=ref_elbo,
            kl_coef=kl_coef,
            kl=kl,
            preset=preset,
            lengths=lengths,
            response_width=response_width,
        )
        self._options = bgpo_options(given, advantages)
        self._old = None if old_elbo is None else old_elbo.detach().unbind(-1)
        self._ref = None if ref_elbo is None else ref_elbo.detach().unbind(-1)
        self._observed: dict[int, tuple[Tensor, Tensor]] = {}  # draw -> (ell, d) of the first pass
        self._seen: dict[int, _Draw] = {}  # draw -> what its loss met
        self._exact: Exact | None = None  # the first pass summed up

    @property
    def two_pass(self) -> bool:
        """Whether `loss` needs `observe` of all draws first. With old_token_logp mode="exact" does, too."""
        return self.mode == "exact" and not (self._old is None and self._ref is None)

    def observe(
        self,
        j: int,
        logits: Tensor,
        targets: Tensor,
        *,
        weight: Tensor,
        mask: Tensor | Packed | None = None,
        old_token_logp: Tensor | None = None,
        seq_idx: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
    ) -> None:
        """First pass of mode="exact": notes the ELBO of draw j, [B] numbers.

        Run the model without gradient and without dropout. Arguments as in `bgpo_loss`, the same as those of
        `loss` for this draw. RuntimeError with mode="bound".
        """
        if self.mode != "exact":
            raise RuntimeError("observe is the first pass of mode='exact'; mode='bound' has none, call loss")
        check_index("draw j", j, self.num_mc)
        rows, like = self._rows(logits, targets, weight, mask=mask, seq_idx=seq_idx, ignore_index=ignore_index)
        old = check_old(None if self._old is None else self._old[j], old_token_logp, rows, like)
        with torch.no_grad():
            token_logp = rows.token_logp(logits, temperature=temperature)
            ell = rows.sums(token_logp)
            check_elbo(ell)
            self._observed[j] = ell, scale_factor(self._options.ratio_scale, like) * log_ratio(ell, token_logp, *old, rows)
        self._exact = None

    def loss(
        self,
        j: int,
        logits: Tensor,
        targets: Tensor,
        *,
        weight: Tensor,
        mask: Tensor | Packed | None = None,
        old_token_logp: Tensor | None = None,
        seq_idx: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
    ) -> Tensor:
        """The loss of draw j, 0-d, to be backpropagated before the next draw's forward.

        It contains seq_weight and omega_j. Arguments as in `bgpo_loss`. old_token_logp replaces old_elbo;
        with mode="exact" it is `observe` that uses it. RuntimeError with mode="exact" if any of the n draws
        must be observed and was not.
        """
        check_index("draw j", j, self.num_mc)
        draw = {"mask": mask, "seq_idx": seq_idx, "ignore_index": ignore_index}
        source = {"temperature": temperature, "inplace_backward": inplace_backward}
        if self.mode == "bound":
            o = self._options
            loss, stats = bgpo_loss(
                *(logits, targets, weight, self._advantages, None if self._old is None else self._old[j]),
                mc_weight=self._mc_weights[j],
                ref_elbo=None if self._ref is None else self._ref[j],
                old_token_logp=old_token_logp,
                num_seqs=None if seq_idx is None else len(self._advantages),
                **o._asdict() | draw | source,
            )
            self._seen[j] = _Draw(loss.detach(), stats.ell, stats.d, stats.clipped)
            return loss
        rows, like = self._rows(logits, targets, weight, **draw)
        exact = self._first_pass(like, needed=self.two_pass or old_token_logp is not None)
        ell = rows.sums(rows.token_logp(logits, **source))
        check_elbo(ell)
        scale = scale_factor(self._options.ratio_scale, like)
        share = factor("seq_weight", self._options.seq_weight, like) * factor("mc_weights", self._mc_weights[j], like, 1)
        loss = -(share * (exact.value + exact.slope * (scale * (ell - ell.detach())))).sum()
        d = self._observed[j][1] if j in self._observed else torch.zeros_like(like)
        self._seen[j] = _Draw(loss.detach(), ell.detach(), d, exact.stopped.to(ell.dtype))
        return loss

    def _rows(self, logits, targets, weight, *, mask, seq_idx, ignore_index):
        """The rows of a draw, and an empty [B] in the dtype and on the device of the results."""
        n = self._advantages.shape[0]
        rows = elbo_rows(logits, targets, weight, mask=mask, seq_idx=seq_idx, num_seqs=None if seq_idx is None else n, ignore_index=ignore_index)
        if rows.num_seqs != n:
            raise ValueError(f"logits must hold the {n} sequences that the advantages are of, got shape {tuple(logits.shape)}")
        return rows, rows.weight.new_empty(n)

    def _first_pass(self, like: Tensor, needed: bool) -> Exact:
        """The objective and its derivative at the sum of all draws."""
        if self._exact is None:
            if needed:
                self._require(self._observed, "mode='exact' off-policy: the first loss")
            advantages = advantage_vector(self._advantages, like)
            scale = scale_factor(self._options.ratio_scale, like)
            d, delta = torch.zeros_like(like), torch.zeros_like(like)
            for j in range(self.num_mc) if needed else ():
                ell, log_ratio_j = self._observed[j]
                omega = factor("mc_weights", self._mc_weights[j], like, 1)
                d = d + omega * log_ratio_j
                if self._ref is not None:
                    delta = delta + omega * scale * (ell - vector("ref_elbo", self._ref[j], like))
            self._exact = exact_objective(d, None if self._ref is None else delta, advantages, self._options)
        return self._exact

    @property
    def elbo(self) -> Tensor:
        """[B, n], the ELBO of every draw as `loss` met it, for a later update.

        RuntimeError before all are there.
        """
        self._require(self._seen, "elbo")
        return torch.stack([self._seen[j].ell for j in range(self.num_mc)], -1)

    def metrics(self) -> dict[str, Tensor]:
        """Over the draws whose loss was taken. Detached 0-d tensors on the device, not read on the host.

        loss: their sum.
        elbo: mean over the sequences of sum_j omega_j ell_j, with the weights of missing draws given to those
            there.
        d_mean, d_max: of the log ratios d_j.
        clip_fraction: of (sequence, draw) without gradient because of a bound.
        ess: the effective number of draws, mean over the sequences of
            (sum_j omega_j exp(d_j))^2 / sum_j (omega_j exp(d_j))^2; n on-policy with equal weights.
        sequences, draws: how many sequences and how many (sequence, draw), by which `rlkern.reduce_metrics`
            weighs these.

        RuntimeError before the first loss.
        """
        if not self._seen:
            raise RuntimeError("metrics needs at least one loss first")
        draws = [self._seen[j] for j in sorted(self._seen)]
        loss, ell, d, clipped = (torch.stack(x, -1) for x in zip(*draws, strict=True))
        like = draws[0].ell
        omega = torch.stack([factor("mc_weights", self._mc_weights[j], like, 1) * torch.ones_like(like) for j in sorted(self._seen)], -1)
        ratio = omega * (d - d.amax(-1, keepdim=True)).exp()
        sequences, pairs = d.shape[0], d.numel()
        return {
            "loss": loss.sum(),
            "elbo": ((omega * ell).sum(-1) / omega.sum(-1)).sum() / max(sequences, 1),
            "d_mean": d.sum() / max(pairs, 1),
            "d_max": d.amax() if pairs else d.sum(),
            "clip_fraction": clipped.sum() / max(pairs, 1),
            "ess": (ratio.sum(-1).square() / ratio.square().sum(-1)).sum() / max(sequences, 1),
            "sequences": number(sequences, like),
            "draws": number(pairs, like),
        }

    def _require(self, done: dict, what: str) -> None:
        missing = [j for j in range(self.num_mc) if j not in done]
        if missing:
            first = "observe" if done is self._observed else "loss"
            raise RuntimeError(f"{what} needs {first}(j, ...) of all {self.num_mc} draws before it; missing {missing}")
