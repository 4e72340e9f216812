"""Importing this registers rlkern's losses with verl and patches it: actor_rollout_ref.model.external_lib=rlkern.integrations.verl_plugin."""

from .verl import patch, register

register()
patch()
