"""The memory of a large gradient is used again, and never while somebody holds it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlkern import token_stats
from rlkern.backends import gradient_memory

LIKE = torch.empty(128, 70_001)


@pytest.fixture(autouse=True)
def nothing_kept():
    gradient_memory.release()
    yield
    gradient_memory.release()


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def describe(tensor):
    """In a function, so that no assert keeps the tensor for its message."""
    return address(tensor), tensor.shape, tensor.stride(), tensor.dtype


def test_freed_memory_is_used_again_for_sizes_that_fit():
    here = address(gradient_memory.empty(LIKE))
    for like in (LIKE, LIKE[:70], LIKE.to(torch.bfloat16)):
        found = describe(gradient_memory.empty(like))
        assert found == (here, like.shape, like.stride(), like.dtype)
    larger = LIKE.repeat(3, 1)
    assert describe(gradient_memory.empty(larger))[1] == larger.shape
    assert gradient_memory._kept[0].nbytes() == larger.numel() * 4


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t[3], lambda t: t.numpy(), lambda t: t.untyped_storage(), torch.utils.dlpack.to_dlpack])
def test_memory_that_is_held_is_left_alone(hold):
    first = gradient_memory.empty(LIKE)
    here = address(first)
    held = hold(first)
    del first
    now = address(gradient_memory.empty(LIKE))
    assert now != here
    del held


def test_shared_memory_is_left_alone():
    first = gradient_memory.empty(LIKE).share_memory_()
    storage = gradient_memory._kept[0]
    del first
    assert gradient_memory.empty(LIKE).untyped_storage() is not storage


def test_small_tensors_keep_nothing():
    assert gradient_memory.empty(torch.empty(3, 5)).shape == (3, 5) and not gradient_memory._kept


def test_release_gives_it_back():
    gradient_memory.empty(LIKE)
    assert gradient_memory._kept
    gradient_memory.release()
    assert not gradient_memory._kept


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
            mine = gradient_memory.empty(LIKE)
            mine[:, ::5000] = number
            assert (mine[:, ::5000] == number).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_gradients_of_threads_are_those_of_one_thread():
    x, y = torch.randn(64, 70_001), torch.arange(64)

    def gradient(number):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(token_stats(leaf, y, temperature=1.0 + number).logp.sum(), leaf)[0]

    alone = [gradient(number).clone() for number in range(4)]

    def work(number):
        return all(torch.equal(gradient(number), alone[number]) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
