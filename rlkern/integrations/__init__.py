"""The only files that know a trainer. Nothing is imported here: `import rlkern.integrations.trl` needs TRL, rlkern does not."""
