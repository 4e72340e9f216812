"""Under pytest-benchmark: `pytest benchmarks/test_speed.py --benchmark-group-by=param:case`

Not part of `make test`. On a GPU every call ends in a synchronisation, so small sizes show launch latency.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from contenders import BOTH, LOGP, contenders  # noqa: E402
from measure import PAIRS, Case, inputs  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((8192, 32_000), (8192, 151_936)) if DEVICE == "cuda" else ((64, 32_768), (32, 151_936))
CASES = [Case(DEVICE, dtype, *shape, kind) for kind in (BOTH, LOGP, *PAIRS) for dtype in ("bf16", "fp32") for shape in SHAPES]
CONTENDERS = [c for c in contenders(DEVICE)[0] if not c.slow]


@pytest.fixture(params=CASES, ids=str, scope="module")
def case(request):
    torch.manual_seed(0)
    return request.param, inputs(request.param)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: f"{c.computes}:{c.name}")
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_speed(benchmark, case, contender, phase):
    case, (x, y, grads) = case
    if contender.computes != case.computes:
        pytest.skip("computes something else")
    if phase != "forward" and not contender.backward:
        pytest.skip("has no gradient")
    scratch = x.clone() if contender.in_place else x

    def prepare():
        if contender.in_place:
            scratch.copy_(x)
        return (), {}

    def run():
        leaf = scratch.detach().requires_grad_(contender.backward)
        outputs = contender.forward(leaf, y)
        if phase != "forward":
            torch.autograd.grad(outputs, leaf, [g[: o.shape[0]].to(o.dtype) for o, g in zip(outputs, grads, strict=False)])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=prepare, rounds=7, warmup_rounds=2)
