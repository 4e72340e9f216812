"""The launches that users cause, recorded without a GPU: the package's launchers run on meta tensors."""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from rlkern.backends.contract import Keep, KeptKind, Outside, PairKind, PairState, SetKind, State
from rlkern.backends.gradient_memory import new_gradient

BATCH, TIME = 8, 1024  # rows come as [8, 1024, V], the shape in which trainers hold them
TEMPERATURE, IGNORE, LOG_KEPT, BETA, SOFTCAP = 0.7, -100, -3.0, 0.3, 30.0

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# name -> (vocabulary, elements between rows). Of 50304 all rows start on 16 bytes, of 50257 and 262145 not.
LAYOUTS = {"V=151936": (151936, 151936), "V=50257 padded": (50257, 50304)}
LAYOUTS |= {"V=50257": (50257, 50257), "V=262144 odd stride": (262144, 262145)}

FORWARD = {"forward": {}, "forward +sum_sq": {"sum_sq": True}, "forward +kept": {"kept": 1}, "forward K=8": {"targets": 8}}
FORWARD |= {"forward K=128 +tail": {"targets": 128, "kept": KeptKind.UNLISTED}}
FORWARD |= {"forward +bits": {"keep": SetKind.BITS}, "forward +mask": {"keep": SetKind.MASK}, "forward +at_least": {"keep": SetKind.AT_LEAST}}
FORWARD |= {"kept masses": {"kept": KeptKind.MIN_PROB, "masses": True}}
FORWARD |= {"moments": {"of": "moments"}, "DID": {"of": "did", "reads": 2}}
_PAIR = {"of": "pair", "reads": 2}
PAIR_FORWARD = {
    "pair reverse_kl": {"kind": PairKind.REVERSE_KL, **_PAIR},
    "pair mixed_kl +stats": {"kind": PairKind.MIXED_KL, "stats": True, **_PAIR},
    "pair cross_entropy": {"kind": PairKind.CROSS_ENTROPY, **_PAIR},
    "pair jsd": {"kind": PairKind.JSD, **_PAIR},
    "pair jsd +softcap": {"kind": PairKind.JSD, "softcap": SOFTCAP, **_PAIR},
    "pair mixture sums": {"kind": PairKind.JSD, "sums": True, **_PAIR},
}
FORWARD |= PAIR_FORWARD
FORWARD |= {"forward +softcap": {"softcap": SOFTCAP}, "forward +kept +softcap": {"kept": 1, "softcap": SOFTCAP}}
BACKWARD = {
    "backward logp": {"grads": ("logp",)},
    "backward logp+entropy": {"grads": ("logp", "entropy")},
    "backward all": {"grads": ("logp", "entropy", "logsumexp", "sum_sq", "kept")},
    "backward K=128": {"grads": ("logp", "entropy"), "targets": 128},
    "backward K=128 +tail": {"grads": ("logp", "kept"), "targets": 128, "kept": KeptKind.UNLISTED},
    "backward +bits": {"grads": ("logp", "entropy"), "keep": SetKind.BITS},
    "backward +bits full": {"grads": ("logp", "entropy"), "keep": SetKind.BITS, "full": True},
    "moments backward": {"of": "moments"},
    "DID backward": {"of": "did", "reads": 2},
    "DID backward both": {"of": "did", "reads": 2, "writes": 2},
    "pair backward reverse_kl": {"kind": PairKind.REVERSE_KL, "grads": ("divergence",), **_PAIR},
    "pair backward mixed_kl +stats": {"kind": PairKind.MIXED_KL, "grads": ("divergence", "logp", "entropy"), **_PAIR},
    "pair backward jsd": {"kind": PairKind.JSD, "grads": ("divergence",), **_PAIR},
    "backward +softcap": {"grads": ("logp", "entropy"), "softcap": SOFTCAP},
    "backward K=128 +softcap": {"grads": ("logp", "entropy"), "targets": 128, "softcap": SOFTCAP},
    "pair backward reverse_kl +softcap": {"kind": PairKind.REVERSE_KL, "grads": ("divergence",), "softcap": SOFTCAP, **_PAIR},
}
RARE = ("forward +mask", "forward +at_least")
GRADS = BACKWARD["backward all"]["grads"]
PAIR_GRADS = ("divergence", "logp", "entropy", "logsumexp")


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
        return self.variant in BACKWARD

    @property
    def options(self) -> dict:
        return {**FORWARD, **BACKWARD}[self.variant]

    @property
    def module(self) -> str:
        """The file of rlkern.triton_kernels that launches it."""
        return self.options.get("of", "token_stats")

    @property
    def reads(self) -> int:
        """Rows of logits that a sweep reads."""
        return self.options.get("reads", 1)

    @property
    def writes(self) -> int:
        return self.options.get("writes", 1) if self.backward else 0

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype].itemsize


def core_cases() -> list[Case]:
    """Every variant but the rare in bf16 on the common layout, moments and pairs off a boundary too; the two
    of most losses on every layout, and in fp32."""
    cases = [Case(variant, "bf16", "V=151936") for variant in (*FORWARD, *BACKWARD) if variant not in RARE]
    for variant in ("forward", "backward logp+entropy"):
        cases += [Case(variant, "bf16", layout) for layout in LAYOUTS]
        cases += [Case(variant, "fp32", layout) for layout in ("V=151936", "V=50257")]
    cases += [Case(variant, "bf16", "V=50257") for variant in ("moments", "moments backward", "DID", "DID backward", "pair reverse_kl")]
    cases.append(Case("forward +kept", "bf16", "V=262144 odd stride"))  # rows so long that all architectures split them
    return list(dict.fromkeys(cases))


def common_cases() -> list[Case]:
    """Those of them in bf16 on the common layout."""
    return [case for case in core_cases() if (case.dtype, case.layout) == ("bf16", "V=151936")]


def all_cases() -> list[Case]:
    """Every variant of token_stats on every type and layout. Of tails, sets, masses and the others, which
    share its loads, some, of softcaps the common one."""
    selection = (("bf16", "V=151936"), ("bf16", "V=50257"), ("fp32", "V=151936"))
    everything = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    variants = {**FORWARD, **BACKWARD}
    return [
        Case(variant, *where)
        for variant, options in variants.items()
        for where in (
            selection[:1] if "softcap" in options else selection if options.keys() & {"of", "keep", "masses"} or "tail" in variant else everything
        )
    ]


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
            name = ("pair_" if case.module == "pair" else "") + ("backward_shape" if case.backward else "forward_shape")
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


def record(case: Case, gpu) -> list[Launch]:
    """The launches that `case` stands for, as rlkern.triton_kernels makes them on `gpu`, a GPUTarget."""
    module = importlib.import_module(f"rlkern.triton_kernels.{case.module}")
    vocab, stride = LAYOUTS[case.layout]
    rows = BATCH * TIME
    # one more token than is scored, as in logits[:, :-1]
    shape, strides = (BATCH, TIME, vocab), ((TIME + 1) * stride, stride, 1)
    logits, other = (torch.empty_strided(shape, strides, dtype=DTYPES[case.dtype], device="meta") for _ in range(2))
    with _pretending(module, gpu, case), _recording(module) as launches:
        _LAUNCHERS[case.module](module, case, rows, logits, other, _meta(rows, dtype=torch.bool))
    return launches


def _keep(kind: int | None, logits, rows: int) -> Keep | None:
    if kind is None:
        return None
    a, b, vocab = logits.shape
    sets = {
        SetKind.BITS: lambda: _meta(a, b, -(-vocab // 32) * 4, dtype=torch.uint8),  # of int32 words
        SetKind.MASK: lambda: _meta(a, b, vocab, dtype=torch.bool),
        SetKind.AT_LEAST: lambda: _meta(rows),
    }
    return Keep(kind, sets[kind](), Outside.INCLUDE)


def _launch_token_stats(module, case: Case, rows: int, logits, other, mask) -> None:
    options = case.options
    n_targets = options.get("targets", 1)
    targets, softcap = _meta(rows, n_targets, dtype=torch.int64), options.get("softcap", 0.0)
    keep = _keep(options.get("keep"), logits, rows)
    if case.backward:
        wanted = options["grads"]
        grads = tuple((_meta(rows, n_targets) if name == "logp" else _meta(rows)) if name in wanted else None for name in GRADS)
        kind, state = options.get("kept", 0), _meta(rows, State.TARGETS + n_targets)
        full = (_meta(rows, 3), _meta(rows), _meta(rows)) if options.get("full") else None
        module.token_stats_backward(logits, targets, mask, TEMPERATURE, IGNORE, kind, state, grads, new_gradient(logits), softcap, keep, full)
    elif options.get("masses"):
        state, out = _meta(rows, State.TARGETS + n_targets), _meta(rows, 2)
        module.token_stats_kept_masses(logits, targets, mask, TEMPERATURE, IGNORE, options["kept"], state, out, softcap)
    else:
        sum_sq = _meta(rows) if options.get("sum_sq") else None
        kept = _meta(rows) if options.get("kept") else None
        out = (_meta(rows, n_targets), _meta(rows), _meta(rows), sum_sq, kept, _meta(rows, State.TARGETS + n_targets))
        keep_out = None if keep is None else (_meta(rows, n_targets, dtype=torch.bool), None, None, None)
        module.token_stats_forward(logits, targets, mask, TEMPERATURE, IGNORE, options.get("kept", 0), LOG_KEPT, out, softcap, keep, keep_out)


def _launch_moments(module, case: Case, rows: int, logits, other, mask) -> None:
    targets, mean, each = _meta(rows, 1, dtype=torch.int64), _meta(rows, 2), (_meta(rows), _meta(rows))
    if case.backward:
        module.row_moments_backward(logits, targets, mask, IGNORE, mean, each, new_gradient(logits))
    else:
        module.row_moments_forward(logits, targets, mask, IGNORE, (*each, mean))


def _launch_did(module, case: Case, rows: int, logits, other, mask) -> None:
    state, entropy = _meta(rows, State.TARGETS), _meta(rows)
    if case.backward:
        out = (new_gradient(logits), new_gradient(other) if case.writes == 2 else None)
        module.did_entropy_backward(logits, other, mask, TEMPERATURE, state, entropy, out)
    else:
        module.did_entropy_forward(logits, other, mask, TEMPERATURE, (entropy, state))


def _launch_pair(module, case: Case, rows: int, logits, other, mask) -> None:
    options, state = case.options, _meta(rows, PairState.WIDTH)
    stats = options.get("stats") or "logp" in options.get("grads", ())
    targets = _meta(rows, 1, dtype=torch.int64) if stats else None
    common = (logits, other, targets, mask, TEMPERATURE, TEMPERATURE, IGNORE, options["kind"], BETA)
    caps = (options.get("softcap", 0.0),) * 2
    if options.get("sums"):
        module.pair_mixture_sums(logits, other, mask, TEMPERATURE, TEMPERATURE, options["kind"], BETA, state, _meta(rows, 2), *caps)
    elif case.backward:
        grads = tuple(_meta(rows) if name in options["grads"] else None for name in PAIR_GRADS)
        module.pair_backward(*common, state, grads, new_gradient(logits), *caps)
    else:
        module.pair_forward(*common, (_meta(rows), *(_meta(rows) if stats else None for _ in range(6)), state), *caps)


_LAUNCHERS = {"token_stats": _launch_token_stats, "moments": _launch_moments, "did": _launch_did, "pair": _launch_pair}
