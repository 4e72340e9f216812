"""TRL on rlkern's kernels.

    import rlkern.integrations.trl
    rlkern.integrations.trl.patch()          # before or after the trainer is made; or: with rlkern.integrations.trl.patch(): trainer.train()

and trainers with losses that TRL does not have: `GRPOTrainer(policy_loss="clip_cov", ...)`, `DPOTrainer(rlkern_loss="ipo", ...)`.
"""

from trl.trainer import utils as _utils

from ..patching import Patch
from .dpo import DPOTrainer
from .grpo import POLICY_LOSSES, GRPOTrainer
from .versions import UnknownTRLError, known_replacements

__all__ = ["POLICY_LOSSES", "DPOTrainer", "GRPOTrainer", "UnknownTRLError", "patch"]


def patch() -> Patch:
    """Replaces TRL's log-probabilities, entropies and fused LM head by rlkern's, in every module of TRL that uses them.

    Replaced are `selective_log_softmax`, `entropy_from_logits`, `selective_log_softmax_and_entropy` and the autograd function behind
    `add_fused_lm_head`, wherever TRL imported them; a module that TRL imports later gets the replacements too. Trainers that exist already are
    patched as well: they look the functions up when they call them.

    Returns:
        the Patch: `with patch(): ...` or `.undo()` puts back exactly what stood there, nested and overlapping patches in any order. It is in force in
        the whole process, all threads included, until every one of them is undone. For good: call it and drop the result.

    Raises:
        UnknownTRLError: (an ImportError) for a release of TRL that has not been tested; nothing has been changed then.
    """
    replacements = known_replacements()
    return Patch.everywhere("trl", [(_utils, name, new) for name, new in replacements.items()])
