"""Every block of docs/diffusion.md runs, in order, and all its loops for one objective give one gradient."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "diffusion.md"
VOCAB = 13
FSDP2 = not torch.__version__.startswith("2.6.")  # whose fully_shard asks a CPU for streams


class Output(NamedTuple):
    logits: torch.Tensor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.lm_head = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB)
        self.double()

    def backbone(self, ids):
        x = self.embed(ids)
        return x + torch.tanh(self.mix(x.cumsum(1)))

    def forward(self, ids):
        return Output(self.lm_head(self.backbone(ids)))


class Recorder:
    """An optimizer that keeps the gradients instead of using them."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def step(self):
        self.steps.append([p.grad.clone() for p in self.model.parameters()])

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # what nn.Linear returns; nobody writes into it
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_page_runs(tmp_path):
    model, sharded = Model(), Model()
    lengths = torch.tensor([5, 1, 0, 4])
    place = torch.arange(8) - 2
    page = {
        "model": model,
        "sharded": sharded,
        "optimizer": Recorder(model),
        "mask_id": VOCAB - 1,
        "ids": torch.randint(VOCAB - 1, (4, 8), generator=torch.Generator().manual_seed(1)),
        "response": (place >= 0) & (place < lengths.unsqueeze(-1)),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.3], dtype=torch.float64),
        "step": 5,
        "n": 4,
    }
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
            if "fully_shard" in block and not FSDP2:
                continue
            exec(compile(block, PAGE.name, "exec"), page)
            if "old_elbo = " in block:  # the policy moves away from the one that sampled
                with torch.no_grad():
                    for own, other in zip(model.parameters(), sharded.parameters(), strict=True):
                        own += 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(own.numel()), dtype=own.dtype)
                        other.copy_(own)
        fsdp = [p.grad.full_tensor() for p in sharded.parameters()] if FSDP2 else []
    finally:
        torch.distributed.destroy_process_group()

    torch.testing.assert_close(page["mask"], page["draws"].mask[:, 3])
    assert page["stats"].d.abs().max() > 0.01 and page["acc"].metrics()["elbo"] < 0
    loop, accumulator, preset, ddp, two_passes, espo, packed = page["optimizer"].steps
    for other in (accumulator, preset, ddp, packed, *([fsdp] if FSDP2 else [])):
        for got, want in zip(other, loop, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)  # 1 / lengths is float32
    for got, want, bound in zip(two_passes, espo, loop, strict=True):  # both are PPO's clip on exp((B - B_old) / L)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(got, bound, rtol=1e-6, atol=1e-9)
