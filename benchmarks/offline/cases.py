"""The launches that users cause, recorded without a GPU: the package's launchers run on meta tensors."""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from rlkern.backends.contract import PairKind, PairState, State
from rlkern.backends.gradient_memory import new_gradient

BATCH, TIME = 8, 1024  # rows come as [8, 1024, V], the shape in which trainers hold them
TEMPERATURE, IGNORE, LOG_KEPT, BETA = 0.7, -100, -3.0, 0.3

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# name -> (vocabulary, elements between rows). Of 50304 all rows start on 16 bytes, of 50257 and 262145 not.
LAYOUTS = {"V=151936": (151936, 151936), "V=50257 padded": (50257, 50304)}
LAYOUTS |= {"V=50257": (50257, 50257), "V=262144 odd stride": (262144, 262145)}

FORWARD = {"forward": {}, "forward +sum_sq": {"sum_sq": True}, "forward +kept": {"kept": 1}, "forward K=8": {"targets": 8}}
BACKWARD = {
    "backward logp": {"grads": ("logp",)},
    "backward logp+entropy": {"grads": ("logp", "entropy")},
    "backward all": {"grads": ("logp", "entropy", "logsumexp", "sum_sq", "kept")},
    "backward K=128": {"grads": ("logp", "entropy"), "targets": 128},
}
GRADS = BACKWARD["backward all"]["grads"]
PAIR_FORWARD = {
    "pair reverse_kl": {"kind": PairKind.REVERSE_KL},
    "pair mixed_kl +stats": {"kind": PairKind.MIXED_KL, "stats": True},
    "pair cross_entropy": {"kind": PairKind.CROSS_ENTROPY},
    "pair jsd": {"kind": PairKind.JSD},
}
PAIR_BACKWARD = {
    "pair backward reverse_kl": {"kind": PairKind.REVERSE_KL, "grads": ("divergence",)},
    "pair backward mixed_kl +stats": {"kind": PairKind.MIXED_KL, "grads": ("divergence", "logp", "entropy")},
    "pair backward jsd": {"kind": PairKind.JSD, "grads": ("divergence",)},
}
PAIR_GRADS = ("divergence", "logp", "entropy", "logsumexp")
VARIANTS = {**FORWARD, **BACKWARD, **PAIR_FORWARD, **PAIR_BACKWARD}


@dataclass(frozen=True)
class Case:
    """One launch: which kernel variant, on which element type and row layout."""

    variant: str
    dtype: str
    layout: str
    shape: tuple | None = None  # a launch shape in place of the table's, and what it is called
    label: str = ""

    @property
    def backward(self) -> bool:
        return self.variant in BACKWARD or self.variant in PAIR_BACKWARD

    @property
    def rows(self) -> int:
        """Rows of logits at once."""
        return 2 if self.variant in PAIR_FORWARD or self.variant in PAIR_BACKWARD else 1

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype].itemsize


def core_cases() -> list[Case]:
    """Every variant in bf16 on the common layout; the two of most losses on every layout, and in fp32."""
    cases = [Case(variant, "bf16", "V=151936") for variant in VARIANTS]
    for variant in ("forward", "backward logp+entropy"):
        cases += [Case(variant, "bf16", layout) for layout in LAYOUTS]
        cases += [Case(variant, "fp32", layout) for layout in ("V=151936", "V=50257")]
    cases.append(Case("forward +kept", "bf16", "V=262144 odd stride"))  # rows so long that all architectures split them
    return list(dict.fromkeys(cases))


def all_cases() -> list[Case]:
    return [Case(variant, dtype, layout) for variant in VARIANTS for dtype in DTYPES for layout in LAYOUTS]


def other_cases() -> list[Case]:
    return [case for case in all_cases() if case not in core_cases()]


@dataclass
class Launch:
    """A kernel with the arguments its launcher gave it."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict


class _Recorder:
    """Stands in for a kernel, and notes its launches."""

    def __init__(self, kernel, launches: list[Launch]):
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self._launches.append(Launch(self._kernel, grid, args, kwargs))

        return launch


@contextmanager
def _pretending(module, target, case: Case) -> Iterator[None]:
    """The module's launchers take tensors to be on `target`, a GPUTarget, and the launch shape of `case`."""
    hip = target.backend == "hip"
    card = module.gpu(torch.device("cpu"))._replace(capability=(0, 0) if hip else divmod(target.arch, 10), warp_size=target.warp_size, amd=hip)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "gpu", lambda device: card))
        if case.shape:
            name = ("pair_" if case.rows == 2 else "") + ("backward_shape" if case.backward else "forward_shape")
            stack.enter_context(mock.patch.object(module, name, lambda *_: case.shape))
        yield


@contextmanager
def _recording(module) -> Iterator[list[Launch]]:
    """While it lasts, the module's `*_kernel`s note their launches instead of running."""
    launches: list[Launch] = []
    recorders = {name: _Recorder(value, launches) for name, value in vars(module).items() if name.endswith("_kernel")}
    with mock.patch.multiple(module, **recorders):
        yield launches


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(case: Case) -> torch.Tensor:
    """One more token than is scored, as in logits[:, :-1]."""
    vocab, stride = LAYOUTS[case.layout]
    return torch.empty_strided((BATCH, TIME, vocab), ((TIME + 1) * stride, stride, 1), dtype=DTYPES[case.dtype], device="meta")


def record(case: Case, gpu) -> list[Launch]:
    """The launches that `case` stands for, as rlkern.triton_kernels makes them on `gpu`, a GPUTarget."""
    module = importlib.import_module("rlkern.triton_kernels." + ("pair" if case.rows == 2 else "token_stats"))
    with _pretending(module, gpu, case), _recording(module) as launches:
        (_launch_pair if case.rows == 2 else _launch_token_stats)(module, case)
    return launches


def _launch_token_stats(module, case: Case) -> None:
    rows, logits, options = BATCH * TIME, _logits(case), VARIANTS[case.variant]
    mask, n_targets = _meta(rows, dtype=torch.bool), options.get("targets", 1)
    targets, state = _meta(rows, n_targets, dtype=torch.int64), _meta(rows, State.TARGETS + n_targets)
    if case.backward:
        wanted = options["grads"]
        grads = tuple((_meta(rows, n_targets) if name == "logp" else _meta(rows)) if name in wanted else None for name in GRADS)
        module.token_stats_backward(logits, targets, mask, TEMPERATURE, IGNORE, state, grads, new_gradient(logits))
    else:
        sum_sq = _meta(rows) if options.get("sum_sq") else None
        kept = _meta(rows) if options.get("kept") else None
        out = (_meta(rows, n_targets), _meta(rows), _meta(rows), sum_sq, kept, state)
        module.token_stats_forward(logits, targets, mask, TEMPERATURE, IGNORE, options.get("kept", 0), LOG_KEPT, out)


def _launch_pair(module, case: Case) -> None:
    rows, logits, other, options = BATCH * TIME, _logits(case), _logits(case), VARIANTS[case.variant]
    mask, state = _meta(rows, dtype=torch.bool), _meta(rows, PairState.WIDTH)
    stats = options.get("stats") or "logp" in options.get("grads", ())
    targets = _meta(rows, 1, dtype=torch.int64) if stats else None
    common = (logits, other, targets, mask, TEMPERATURE, TEMPERATURE, IGNORE, options["kind"], BETA)
    if case.backward:
        grads = tuple(_meta(rows) if name in options["grads"] else None for name in PAIR_GRADS)
        module.pair_backward(*common, state, grads, new_gradient(logits))
    else:
        module.pair_forward(*common, (_meta(rows), *(_meta(rows) if stats else None for _ in range(6)), state))
