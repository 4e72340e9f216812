"""Whether every case runs: with RLKERN_EVERY_CASE=1, and on a GPU. Else slow tests run some of theirs."""

import os

import torch

EVERY_CASE = os.environ.get("RLKERN_EVERY_CASE") == "1" or torch.cuda.is_available()
