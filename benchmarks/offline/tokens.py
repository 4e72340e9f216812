"""The kernels over tokens (covariance, selection, ratios), parts of rows, kept ids and samplers' thresholds,
judged by what they occupy alone.

They move a few bytes a token or the rows of listed ids, a row of logits hundreds of thousands, and a
threshold takes as many sweeps of a row as its values ask for: a bound on bandwidth would tell nothing.
"""

import importlib
from dataclasses import asdict, dataclass

import torch

from rlkern.backends.contract import Keep, KeptKind, Outside, PairKind, PairPart, PairState, SetKind, State

from .build import build, target
from .cases import Launch, _meta, _recording
from .machine import Resources, read_resources
from .model import DEVICES, occupancy

TOKENS = 262_144
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Row:
    kernel: str
    dtype: str
    arch: str
    launches: int  # in one call
    programs: int
    warps: int
    resources: Resources

    @property
    def resident(self) -> dict[str, int]:
        """Product -> programs per SM or CU."""
        return {d.name: occupancy(self.resources, self.warps, d)[0] for d in DEVICES.values() if d.arch == self.arch}


def record(dtype: torch.dtype, gpu) -> list[Launch]:
    """The launches of each of them, as rlkern.triton_kernels makes them on `gpu`, a GPUTarget."""
    covariance, selection, ratio = (importlib.import_module(f"rlkern.triton_kernels.{name}") for name in ("covariance", "selection", "ratio"))
    values, mask = _meta(TOKENS, dtype=dtype), _meta(TOKENS, dtype=torch.bool)
    bounds = (0.8, 1.2, 3.0, -20.0, 20.0)
    with _recording(covariance) as means, _recording(selection) as selections, _recording(ratio) as ratios:
        covariance.token_covariance(values, values, mask, covariance.covariance_sums(values, values, mask), values)
        selection.select_fraction(values, mask, mask, 0.01, 1, 2, mask)
        selection.selected_means(values, mask, mask, values)
        ratio.ratio_terms(values, values, values, mask, mask, bounds, (values, mask, values))
        ratio.kl_terms(values, values, mask, 3, False, 10.0, values)
    return (
        means
        + selections
        + ratios
        + _record_sequences(dtype)
        + _record_merge(dtype)
        + _record_kept(dtype)
        + _record_lists(dtype)
        + _record_sampler(dtype)
    )


def _record_sequences(dtype: torch.dtype) -> list[Launch]:
    """Two sums of each of 64 packed sequences, and back."""
    module = importlib.import_module("rlkern.triton_kernels.sequence_sums")
    with _recording(module) as launches:
        offsets, sums = _meta(65, dtype=torch.int64), _meta(2, 64, dtype=torch.float64)
        values, mask = _meta(2, TOKENS, dtype=dtype), _meta(TOKENS, dtype=torch.bool)
        module.sequence_sums(values, mask, offsets, sums)
        module.sequence_spread(_meta(64, dtype=dtype), mask, _meta(TOKENS, dtype=torch.int64), values[0])
    return launches


def _record_merge(dtype: torch.dtype) -> list[Launch]:
    """Of as many parts as a large group of ranks has."""
    token_stats = importlib.import_module("rlkern.triton_kernels.token_stats")
    n = TOKENS // 32
    parts, of_rows, logp = _meta(64, n, State.TARGETS + 8, dtype=dtype), _meta(n, dtype=dtype), _meta(n, 8, dtype=dtype)
    targets, mask = _meta(n, 8, dtype=torch.int64), _meta(n, dtype=torch.bool)
    with _recording(token_stats) as launches:
        out = (logp, of_rows, of_rows, of_rows, None, parts[0])
        token_stats.token_stats_merge(parts, targets, mask, 0.7, -100, KeptKind.MIN_PROB, -3.0, out)
    pair, state = importlib.import_module("rlkern.triton_kernels.pair"), _meta(n, PairState.WIDTH, dtype=dtype)
    with _recording(pair) as of_pairs:
        parts = _meta(64, n, PairPart.WIDTH, dtype=dtype)
        pair.pair_merge(parts, mask, 0.7, 0.7, PairKind.MIXED_KL, 0.5, (*(of_rows,) * 7, state))
    return launches + of_pairs


def _record_kept(dtype: torch.dtype) -> list[Launch]:
    """Of an output matrix in bfloat16 where sums are float32."""
    kept = importlib.import_module("rlkern.triton_kernels.kept")
    n, pairs, width, vocab, ids = TOKENS // 32, TOKENS // 4, 4096, 151_936, torch.int32
    held = torch.bfloat16 if dtype == torch.float32 else dtype
    hidden, weight = _meta(1, n, width, dtype=held), _meta(1, vocab, width, dtype=held)
    tokens, row, offsets, values = _meta(pairs, dtype=ids), _meta(pairs, dtype=ids), _meta(n + 1, dtype=torch.int64), _meta(pairs, dtype=dtype)
    targets, counted, of_rows, state = _meta(n, 1, dtype=ids), _meta(n, dtype=torch.bool), _meta(n, dtype=dtype), _meta(n, State.KEPT, dtype=dtype)
    with _recording(kept) as launches:
        kept.kept_logits(hidden, weight, weight[0, :, 0], tokens, row, values)
        kept.kept_hidden_gradient(weight, tokens, offsets, values, hidden[0])
        kept.kept_weight_gradient(hidden, tokens, row, values, weight[0])
        kept.kept_rows_forward(values, tokens, row, offsets, targets, counted, of_rows, (of_rows, of_rows, of_rows, of_rows, state, targets))
        kept.kept_rows_backward(values, row, offsets, targets, of_rows, state, (of_rows,) * 4, values)
    return launches


def _record_sampler(dtype: torch.dtype) -> list[Launch]:
    """Of logits in bfloat16 where sums are float32."""
    sampler = importlib.import_module("rlkern.triton_kernels.sampler")
    n, held = TOKENS // 32, torch.bfloat16 if dtype == torch.float32 else dtype
    with _recording(sampler) as launches:
        logits, thresholds = _meta(8, n // 8, 151_936, dtype=held), _meta(n, dtype=dtype)
        sampler.sampler_threshold(logits, _meta(n, dtype=torch.bool), 0.7, 50, 0.9, -3.0, False, thresholds)
    return launches


def _record_lists(dtype: torch.dtype) -> list[Launch]:
    """Row statistics over padded lists, of logits in bfloat16 where sums are float32."""
    kept_lists = importlib.import_module("rlkern.triton_kernels.kept_lists")
    n, vocab, held = TOKENS // 32, 151_936, torch.bfloat16 if dtype == torch.float32 else dtype
    logits, targets, counted = _meta(1, n, vocab, dtype=held), _meta(n, 1, dtype=torch.int64), _meta(n, dtype=torch.bool)
    of_rows, state, full_state = _meta(n, dtype=dtype), _meta(n, State.TARGETS + 1, dtype=dtype), _meta(n, 3, dtype=dtype)
    keep = Keep(SetKind.LISTS, _meta(n * 64, dtype=torch.int32), Outside.INCLUDE, open_empty=True)
    of_row = (logits, targets, counted, of_rows, -100, KeptKind.MIN_P)
    with _recording(kept_lists) as launches:
        kept_lists.listed_forward(*of_row, -3.0, (of_rows,) * 5 + (state,), 0.0, keep, counted)
        kept_lists.listed_backward(*of_row, state, (of_rows,) * 5, 0.0, keep, (full_state, of_rows, of_rows)).write(logits)
    return launches


def analyse(arch: str, dtypes=("fp32",)) -> list[Row]:
    """One row for each kernel and type. All launches of a kernel in one call run the same code."""
    rows = []
    for dtype in dtypes:
        launches: dict[str, list[Launch]] = {}
        for launch in record(DTYPES[dtype], target(arch)):
            launches.setdefault(launch.kernel.__name__, []).append(launch)
        for kernel, (first, *others) in launches.items():
            compiled = build(first, arch)
            rows.append(Row(kernel, dtype, arch, 1 + len(others), first.grid[0], compiled.metadata.num_warps, read_resources(compiled)))
    return rows


def text(rows: list[Row]) -> str:
    lines = [f"one number a token, {TOKENS:,} tokens: kernel, type, architecture, launches x programs / warps, registers, bytes spilled, shared"]
    for r in rows:
        occupied = f"{r.resources.registers:4} {r.resources.spilled_bytes:3} {r.resources.shared_bytes:6}"
        lines.append(f"{r.kernel:26}{r.dtype:6}{r.arch:8}{r.launches:2} x {r.programs} / {r.warps} {occupied}")
    return "\n".join(lines)


def data(rows: list[Row]) -> list[dict]:
    return [asdict(row) | {"resident": row.resident} for row in rows]
