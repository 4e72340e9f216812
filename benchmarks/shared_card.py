"""A pytest plugin (-p shared_card) for workers that share a GPU.

Each test gives back the memory it used: what the largest tests of eight workers need is more than a card has.
A kernel that reads or writes astray costs the process its card: all later tests fail there, at once, and such
a worker takes the tests from the others. It ends instead, and xdist starts another one.
"""

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"{item.nodeid} lost the card: {error}", flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
