"""Without a GPU the Triton kernels run in Triton's interpreter, so the whole suite runs on any machine.

Workers of pytest-xdist compute on one thread each. With more, waiting threads keep the cores from the other
workers, and small models take ten times as long.
"""

import contextlib
import gc
import os
import zlib
from collections import defaultdict

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import torch  # noqa: E402
from every_case import EVERY_CASE  # noqa: E402
from torch.testing import _comparison  # noqa: E402

# The tolerances of assert_close unless a test says otherwise. PyTorch's own 1e-7 for float64 lets a float32
# in the middle of a computation pass. Its absolute 1e-5 for float32 is one per cent of a gradient of 1e-3.
_comparison._DTYPE_PRECISIONS.update({torch.float64: (1e-11, 1e-12), torch.float32: (1.3e-6, 1e-6)})

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    with contextlib.suppress(ImportError):
        import interpreter

        interpreter.look_up_the_language_once()
        interpreter.describe_types_once()
        interpreter.pass_over_nan()

import rlkern  # noqa: E402
from rlkern import backends  # noqa: E402

BACKENDS = ("reference", "native", "triton")
ONE_IN = 5


def pytest_report_header() -> str | None:
    return None if EVERY_CASE else f"one in {ONE_IN} of the cases in Triton's interpreter; RLKERN_EVERY_CASE=1 runs all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow tests come first: one that begins last lets the other workers wait for it.

    All interpreted cases would take half of the time. Of each test's one in ONE_IN runs, picked by a checksum
    of their names: always the same, and not every Nth of one parameter.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if EVERY_CASE:
        return
    cases = defaultdict(list)
    for item in items:
        parameters = item.callspec.id if hasattr(item, "callspec") else ""
        if item.path.stem.startswith("test_triton_") or "triton" in parameters.split("-"):
            cases[item.path, item.originalname].append(item)
    left_out = set()
    for of_test in cases.values():
        of_test.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        left_out.update(of_test[-(-len(of_test) // ONE_IN) :])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Garbage collections pass over what thousands of tests hold: each took a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test with each backend. A missing one is a failure, unless RLKERN_TEST_WITHOUT names it.
    "native avx2" stands for the C++ kernels of that instruction set."""
    name, _, isa = request.param.partition(" ")
    module = backends.load(name)
    if isinstance(module, Exception):
        if name in os.environ.get("RLKERN_TEST_WITHOUT", "").split(","):
            pytest.skip(f"{name}: {module}")
        raise module
    with rlkern.use_backend(name):
        if not isa:
            yield name
            return
        before = module.isa()
        module.use_isa(isa)
        yield name
        module.use_isa(before)


@pytest.fixture
def device(backend) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
