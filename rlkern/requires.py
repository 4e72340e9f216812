"""Checks at import that PyTorch is there and new enough, before anything else asks more of it."""

OLDEST = (2, 6)


def check_torch() -> None:
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
    found = str(torch.__version__)
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(f"{needs}, found {found}: {mend}", name="rlkern")
