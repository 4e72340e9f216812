"""torchtitan: loss-parallel cross-entropy and log-probabilities, by torchtitan's names and arguments.

As of torchtitan's main branch of August 2026 (commit b5bcd76c): call these in place of its functions; nothing
is patched. See docs/trainers/megatron.md.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, distributed

from .. import primitives
from ..checks import check_choice, check_count
from ..dtensors import is_dtensor
from ..parallel import world
from ..primitives.sharded_stats import Columns, refuse_rows

__all__ = ["compute_logprobs"]


class _LossParallelCrossEntropy:
    """torchtitan.components.loss._LossParallelCrossEntropy."""

    @staticmethod
    def apply(logits: Tensor, labels: Tensor, tp_group: Any, global_vocab_size: int, reduction: str = "sum") -> Tensor:
        """[T, V_local] and [T] -> the sum of -log p, or with reduction="none" [T]; float32.

        Rank r holds the ids from ceil(V / ranks) r on, the last one fewer if need be. Columns beyond V are
        padding. A label of -100 has a loss of 0 and no gradient.

        Raises:
            TypeError, ValueError, IndexError: as `rlkern.token_stats`; for another reduction. On CPUs for
                another number of columns.
        """
        try:
            check_choice("reduction", reduction, ("sum", "none"))
            check_count("global_vocab_size", global_vocab_size, 1)
        except Exception as error:
            refuse_rows(error, logits, Columns(tp_group))
        share = -(-global_vocab_size // world(tp_group))
        start = min(global_vocab_size, share * (0 if tp_group is None else distributed.get_rank(tp_group)))
        loss = -primitives.token_logprobs(logits, labels, group=tp_group, vocab_start=start, vocab_size=global_vocab_size)
        return loss.sum() if reduction == "sum" else loss


def _current_group() -> Any:
    """The tensor-parallel group of torchtitan's current mesh, on its spmd_types backend; None elsewhere."""
    spmd = sys.modules.get("torchtitan.distributed.spmd_types")
    mesh = None if spmd is None else spmd.current_spmd_mesh()
    return mesh.get_group("tp") if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) else None


def compute_logprobs(logits: Tensor, labels: Tensor, *, return_entropy: bool = False, tp_group: Any = None) -> Tensor | tuple[Tensor, Tensor]:
    """torchtitan.components.loss.compute_logprobs: [T, V] and [T] -> [T]. No logits are gathered.

    Args:
        logits: whole, a DTensor sharded on its last dimension, or this rank's columns.
        labels: those of the local rows. -100: both results are 0.
        return_entropy: also return the entropy, without gradient, as there.
        tp_group: not torchtitan's: whose ranks hold the vocabulary, of which logits are this rank's columns.
            None: that of torchtitan's current mesh on its spmd_types backend, else logits are whole.

    Raises:
        TypeError, ValueError, IndexError: as `rlkern.token_stats`.
    """
    group = _current_group() if tp_group is None and not is_dtensor(logits) else tp_group
    stats = primitives.token_stats(logits, labels, with_entropy=return_entropy, group=group)
    return (stats.logp, stats.entropy.detach()) if return_entropy else stats.logp
