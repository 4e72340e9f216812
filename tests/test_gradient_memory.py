"""The memory of a large gradient is used again, and never while somebody holds it."""

import threading

import pytest
import torch

from rlkern import token_stats
from rlkern.backends import gradient_memory as spare

LIKE = torch.empty(128, 70_001)


@pytest.fixture(autouse=True)
def nothing_kept():
    spare.release()
    yield
    spare.release()


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def describe(tensor):
    """In a function, so that no assert keeps the tensor for its message."""
    return address(tensor), tensor.shape, tensor.stride(), tensor.dtype


def test_freed_memory_is_used_again_for_sizes_that_fit():
    here = address(spare.empty(LIKE))
    for like in (LIKE, LIKE[:70], LIKE.to(torch.bfloat16)):
        found = describe(spare.empty(like))
        assert found == (here, like.shape, like.stride(), like.dtype)
    larger = LIKE.repeat(3, 1)
    assert describe(spare.empty(larger))[1] == larger.shape
    assert spare._kept[0].nbytes() == larger.numel() * 4


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t[3], lambda t: t.numpy(), lambda t: t.untyped_storage(), torch.utils.dlpack.to_dlpack])
def test_memory_that_is_held_is_left_alone(hold):
    first = spare.empty(LIKE)
    here = address(first)
    held = hold(first)
    del first
    now = address(spare.empty(LIKE))
    assert now != here
    del held


def test_shared_memory_is_left_alone():
    first = spare.empty(LIKE).share_memory_()
    storage = spare._kept[0]
    del first
    assert spare.empty(LIKE).untyped_storage() is not storage


def test_small_tensors_keep_nothing():
    assert spare.empty(torch.empty(3, 5)).shape == (3, 5) and not spare._kept


def test_release_gives_it_back():
    spare.empty(LIKE)
    assert spare._kept
    spare.release()
    assert not spare._kept


def test_gradients_of_successive_steps_are_right_and_share_memory():
    x = torch.randn(64, 70_001, requires_grad=True)
    y = torch.arange(64)
    addresses, kept = set(), []
    for step in range(4):
        (grad,) = torch.autograd.grad(token_stats(x, y).logp.sum(), x)
        expected = -torch.softmax(x.detach(), -1)
        expected[y, y] += 1
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        addresses.add(address(grad))
        if step == 1:
            kept = [grad, grad.clone()]
        del grad
    assert torch.equal(*kept)  # a gradient that is kept is not written again
    assert len(addresses) == 2


def test_threads_never_share():
    def work(number):
        for _ in range(20):
            mine = spare.empty(LIKE)
            mine[:, ::5000] = number
            wrong.append(bool((mine[:, ::5000] != number).any()))

    wrong = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80 and not any(wrong)
