"""The launch table: what it asks of a card, and what it gives for it."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from rlkern.triton_kernels import launch  # noqa: E402


@pytest.fixture
def cards(monkeypatch):
    """Two cards that differ; returns what they were asked."""
    asked = []

    def capability(device):
        asked.append(device)
        return (10, 0) if device.index else (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.version, "hip", None)
    launch.gpu.cache_clear()
    yield asked
    launch.gpu.cache_clear()


def test_each_card_is_asked_once_and_for_itself(cards):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for _ in range(3):
        assert launch.gpu(first).capability == (9, 0) and launch.gpu(second).capability == (10, 0)
    assert cards == [first, second]


def test_tensors_on_a_cpu_ask_nothing(cards):
    assert launch.gpu(torch.device("cpu")) == launch.Gpu((0, 0), 32, False) and not cards


@pytest.mark.parametrize("vocab", [1, 255, 256, 1000, 4096, 32_000, 50_257, 151_936, 262_144, 2**21])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("card", [launch.Gpu(), launch.Gpu((9, 0)), launch.Gpu((10, 0)), launch.Gpu(warp_size=64, amd=True)], ids=str)
def test_shapes_fit_the_row(card, aligned, size, vocab):
    forward, backward = launch.forward_shape(card, vocab, size, aligned), launch.backward_shape(card, vocab, size, aligned)
    for shape in (forward, backward):
        assert shape.block & (shape.block - 1) == 0 and 256 <= shape.block < max(512, 4 * vocab)
        assert shape.block * size // (32 * shape.warps) >= 16, "a thread loads 16 bytes or more"
    assert forward.splits & (forward.splits - 1) == 0 and vocab >= forward.splits * forward.block or forward.splits == 1
