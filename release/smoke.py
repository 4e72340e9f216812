"""Whether an installed rlkern works: run outside of the source tree, by the Python that it is installed in.

python smoke.py                   # imports, a loss with its gradient, `python -m rlkern doctor`
python smoke.py --without-torch   # only loads the CPU kernels and computes a row with them
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import math
import subprocess
import sys
from pathlib import Path


def with_torch() -> str:
    import torch

    import rlkern

    where = Path(rlkern.__file__).resolve().parent
    assert where.parent.name == "site-packages", f"imported from {where}, expected from site-packages"
    assert importlib.metadata.version("rlkern") == rlkern.__version__
    logits = torch.randn(6, 9, 1001, requires_grad=True)
    labels = torch.randint(1001, (6, 9))
    loss = rlkern.dpo_loss_from_logits(logits, labels, torch.zeros(6), beta=0.1).losses.mean()
    (gradient,) = torch.autograd.grad(loss, logits)

    x = logits.detach().double().requires_grad_()
    logps = x[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)
    chosen, rejected = logps.chunk(2)
    exact = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact, x)[0], rtol=1e-4, atol=1e-6)

    report = subprocess.run([sys.executable, "-m", "rlkern", "doctor", "--seconds", "2"], text=True, capture_output=True)
    print(report.stdout, report.stderr)
    assert report.returncode == 0, "the doctor found something wrong"
    return f"torch {torch.__version__}, native {rlkern.backend_info()['native'].split('(')[0].strip()}, doctor 0"


class Numbers:
    """What the kernels ask of a tensor."""

    def __init__(self, *numbers: float):
        self.of = (ctypes.c_float * len(numbers))(*numbers)

    def data_ptr(self) -> int:
        return ctypes.addressof(self.of)

    def stride(self) -> tuple[int, int]:
        return len(self.of), len(self.of)


def without_torch() -> str:
    ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
    folder = Path(importlib.util.find_spec("rlkern").origin).parent
    (library,) = folder.glob("_cpu.*")
    spec = importlib.util.spec_from_file_location("_cpu", library)
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    states = len(cpu.constants["State"])
    logits, entropy, logsumexp = Numbers(*[0.5] * 100), Numbers(-1), Numbers(-1)
    rows = {"dtype": cpu.constants["DType"].index("float32"), "logits": logits, "rows": 1, "inner": 1, "vocab": 100, "targets": None}
    rows |= {
        "n_targets": 0,
        "mask": None,
        "temperature": 1.0,
        "temperatures": None,
        "ignore_index": -100,
        "state": Numbers(*[0] * states),
        "threads": 1,
    }
    results = {"softcap": 0.0, "kept_kind": 0, "log_kept": 0.0, "logp": None, "entropy": entropy, "logsumexp": logsumexp}
    for isa in cpu.isas():
        cpu.use_isa(isa)
        cpu.token_stats_forward(rows, results | {"sum_sq_prob": None, "kept_logmass": None})
        assert abs(entropy.of[0] - math.log(100)) < 1e-5 and abs(logsumexp.of[0] - 0.5 - math.log(100)) < 1e-5, isa
    return f"{library.name} loads and computes: {', '.join(cpu.isas())}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-torch", action="store_true")
    print(without_torch() if parser.parse_args().without_torch else with_torch())
