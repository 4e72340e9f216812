"""Checks at import that PyTorch is there and new enough, and numpy, before anything else needs them."""

import re
from importlib.util import find_spec

OLDEST = (2, 6)


def check_packages() -> None:
    """Raises ImportError in one line that says what was found and what is expected."""
    needs = f"rlkern needs PyTorch {OLDEST[0]}.{OLDEST[1]} or newer"
    mend = f"pip install 'torch>={OLDEST[0]}.{OLDEST[1]}'"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        # The name lets `python -m rlkern` print this line alone.
        raise ImportError(f"{needs}, found none: {mend}", name="rlkern") from None
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise ImportError(f"{needs}, found {torch.__version__}: {mend}", name="rlkern")
    if not find_spec("numpy"):
        raise ImportError("rlkern needs numpy, found none: pip install numpy", name="rlkern")
