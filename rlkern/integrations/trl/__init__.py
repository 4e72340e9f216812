"""TRL on rlkern's kernels.

    import rlkern.integrations.trl

    rlkern.integrations.trl.patch()                         # before or after the trainer is made
    with rlkern.integrations.trl.patch(): trainer.train()   # or so

and trainers with losses that TRL lacks: `GRPOTrainer(policy_loss=...)`, `DPOTrainer(rlkern_loss=...)`.
"""

from trl.trainer import utils as _utils

from ..patching import Patch
from .distillation import chunked_replacements, jsd_replacements
from .dpo import DPOTrainer
from .grpo import POLICY_LOSSES, GRPOTrainer
from .preference import preference_replacements
from .trainers import patch_trainers
from .versions import UnknownTRLError, known_replacements

__all__ = ["POLICY_LOSSES", "DPOTrainer", "GRPOTrainer", "UnknownTRLError", "patch"]


def patch() -> Patch:
    """Replaces TRL's log-probabilities, entropies, fused LM head and some losses by rlkern's.

    Replaced are `selective_log_softmax`, `entropy_from_logits`, `selective_log_softmax_and_entropy`, the
    autograd function behind `add_fused_lm_head` and `DistillationTrainer`'s loss, wherever TRL imports them,
    now or later, `generalized_jsd_loss` of GKDTrainer, GOLDTrainer and IWOPDTrainer, `odds_ratio_loss` of
    ORPOTrainer, `cpo_loss` of CPOTrainer and the sigmoid in KTOTrainer's loss. Trainers that exist already
    are patched as well: they look the functions up when they call them.

    Returns:
        The Patch, in force in all threads of the process until `.undo()` or the end of its `with` block.
        Patches nest and overlap in any order. For good: drop the result.

    Raises:
        UnknownTRLError: (an ImportError) for a release that has not been tested; nothing changes then.
    """
    replacements = known_replacements()
    patch = Patch.everywhere("trl", [*((_utils, name, new) for name, new in replacements.items()), *chunked_replacements()])
    try:
        patch_trainers(patch, lambda cls: [*jsd_replacements(cls), *preference_replacements(cls)])
    except BaseException:
        patch.undo()
        raise
    return patch
