"""The only files that know a trainer. rlkern imports none of them: rlkern.integrations.trl needs TRL."""
