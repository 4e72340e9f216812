"""Calls that atheris steers: it changes bytes, and keeps those that reach new lines of rlkern."""

import hashlib
import os
import re
import sys
import time
import warnings
from pathlib import Path

import atheris
import torch  # noqa: F401  # before rlkern: its lines are not to be counted

with atheris.instrument_imports(include=["rlkern", "fuzz"]):
    from . import byte_calls

from .parts import say


def run(part: str, folder: Path, seed: int, end: float) -> None:
    """Until `end` of time.monotonic(); then the process ends. A crash leaves its bytes in the folder as
    `PART-crash-...`, all else is said."""
    corpus = folder / "corpus" / part
    corpus.mkdir(parents=True, exist_ok=True)
    covered, found = set(), set()

    def covers(name: str) -> None:
        if name not in covered:
            covered.add(name)
            say("covers", name)

    def one(data: bytes) -> None:
        say("call")
        wrong = byte_calls.run(part, data, covers)
        if wrong and (kind := re.sub(r"\d+", "0", wrong)[:80]) not in found:
            found.add(kind)
            file = folder / f"{part}-{hashlib.sha1(data).hexdigest()[:12]}"
            file.write_bytes(data)
            say("found", os.path.relpath(file), wrong.replace("\n", " "))

    warnings.filterwarnings("ignore")
    limits = [f"-max_total_time={max(1, round(end - time.monotonic()))}", f"-max_len={byte_calls.LONGEST[part]}", "-timeout=60", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *limits, f"-seed={seed + 1}", f"-artifact_prefix={folder / part}-", str(corpus)], one)
    atheris.Fuzz()
