"""A pytest plugin (-p empty_cache): each test gives back the GPU memory it used. Otherwise every worker keeps what its largest test needed, and
eight of them together need more than a card has."""

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
