"""Exactly K of the tokens, K known to the device only. See primitives/selection.py."""

from .primitives.selection import fraction_count, select_bottom, select_random, select_top

__all__ = ["fraction_count", "select_bottom", "select_random", "select_top"]
