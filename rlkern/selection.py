"""Selects exactly K of the tokens, where only the device knows K. See primitives/selection.py."""

from .primitives.selection import fraction_count, select_bottom, select_random, select_top

__all__ = ["fraction_count", "select_bottom", "select_random", "select_top"]
