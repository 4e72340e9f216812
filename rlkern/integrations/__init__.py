"""The only files that know a trainer or a model. rlkern imports none: rlkern.integrations.trl needs TRL."""

from .transforms import logit_transforms

__all__ = ["logit_transforms"]
