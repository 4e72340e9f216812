"""Triton kernels, one file per primitive. They import torch and triton only; `rlkern.backends` holds the calling convention."""
