"""The sets that an inference engine sampled from, as it returns them, laid out for a trainer's batch.

    keep = kept_from_vllm(llm.generate(prompts, sampling), drawn)      # in the collator
    stats = rlkern.token_stats(logits, rlkern.next_tokens(ids), keep=keep.next_tokens())

No engine is imported: what counts is the names of the attributes. See docs/kept_sets.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..checks import as_bool, expect, shown
from ..operator import values_readable
from ..primitives import Kept

__all__ = ["drawn_rows", "kept_from_lists", "kept_from_sglang", "kept_from_vllm"]

_IDS = ("token_ids", "ids")  # what engines and trainers call them
_LENGTHS = ("lengths", "counts")


def drawn_rows(drawn: Tensor) -> Tensor:
    """Which list belongs to a token, if every drawn token has one, in order: for `Kept.csr(rows=...)`.

    Args:
        drawn: [...] bool or number, not 0 at the tokens that have a list.

    Returns:
        [...] int64: 0, 1, 2, ... at these tokens, -1 elsewhere.

    Raises:
        TypeError: drawn is not a tensor of that kind.
    """
    expect("drawn", drawn, "real", "[...]")
    here = as_bool(drawn)
    return torch.where(here, here.flatten().cumsum(0).view(here.shape) - 1, -1)


def kept_from_lists(samples: Sequence[Any], drawn: Tensor, *, empty: str = "everything") -> Kept:
    """One list of token ids for each token that an engine drew -> the sets of a batch's tokens.

    Each set stands beside the token that was drawn from it. `Kept.next_tokens` moves the sets to the rows of
    logits that predict these tokens, as `rlkern.next_tokens` moves the labels.

    Args:
        samples: the batch's samples in order. Of each either a list of lists; or an object with token_ids (or
            ids) and offsets, list j being token_ids[offsets[j] : offsets[j + 1]]; or with lengths (or counts)
            in place of offsets; or with token_ids alone, a list of lists. A dict with these keys does, too,
            as a rollout comes back from a JSON file. In turn: HTTP answers and SGLang;
            vLLM, twinkle and miles; SGLang's chunks and prime-rl's bytes; the first vLLM that returned sets.
        drawn: [B, T] bool or number, not 0 at the tokens that the engine drew, on the device that the sets
            shall be on. Samples may be packed: any shape with their tokens in order.
        empty: what an empty list means, see `Kept`. Tokens without a list are over everything.

    Raises:
        TypeError, ValueError: for samples of no such form; on a CPU also where samples and drawn have
            different numbers of tokens.
    """
    rows = drawn_rows(drawn)
    if not isinstance(samples, Sequence) or isinstance(samples, (str, bytes)):
        raise TypeError(f"samples must be a list with the sets of every sample, got {shown(samples)}")
    parts = [_ids_and_counts(sample, f"samples[{i}]") for i, sample in enumerate(samples)]
    if values_readable(drawn):
        _check_tokens([len(counts) for _, counts in parts], drawn)
    nothing = torch.empty(0, dtype=torch.int32)
    ids, counts = (torch.cat([nothing, *part]) for part in (zip(*parts, strict=True) if parts else ((), ())))
    return Kept.counts(ids.to(drawn.device), counts.to(drawn.device), rows=rows, empty=empty)


def kept_from_vllm(outputs: Iterable[Any], drawn: Tensor) -> Kept:
    """The sets of vLLM's outputs, from 0.28 on with LLM(return_sampling_mask=True, ...).

    Args:
        outputs: what `LLM.generate` returns, or completions of it, or the choices of an HTTP answer, in the
            batch's order. The n completions of a request follow one another.
        drawn: as of `kept_from_lists`.

    Raises:
        TypeError, ValueError: as `kept_from_lists`; for a completion without sets.
    """
    completions = chain.from_iterable(getattr(output, "outputs", (output,)) for output in _several(outputs))
    needs = "vLLM's outputs have a sampling_mask if the engine is told return_sampling_mask=True"
    return kept_from_lists([_field(completion, "sampling_mask", needs) for completion in completions], drawn)


def kept_from_sglang(outputs: Iterable[Any], drawn: Tensor) -> Kept:
    """The sets of SGLang's outputs, for requests with return_sampling_mask.

    Args:
        outputs: the dicts of `Engine.generate` or of HTTP answers, or their meta_info, in the batch's order.
        drawn: as of `kept_from_lists`.

    Raises:
        TypeError, ValueError: as `kept_from_lists`; for an output without sets.
    """
    infos = [output.get("meta_info", output) if isinstance(output, Mapping) else output for output in _several(outputs)]
    needs = "SGLang's meta_info has an output_token_sampling_mask for requests with return_sampling_mask"
    return kept_from_lists([_field(info, "output_token_sampling_mask", needs) for info in infos], drawn)


def _several(outputs: Any) -> Iterable[Any]:
    if isinstance(outputs, Mapping) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs must be a list with the output of every sample, got {shown(outputs)}")
    return outputs


def _field(output: Any, name: str, needs: str) -> Any:
    value = _attribute(output, (name,))
    if value is None:
        raise ValueError(f"outputs: one has no {name}. {needs}")
    return value


def _attribute(x: Any, names: Sequence[str]) -> Any:
    """The first of the attributes, or of a mapping's entries, that is there."""
    values = (x.get(name) if isinstance(x, Mapping) else getattr(x, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _integers(x: Any, name: str) -> Tensor:
    """[M] int32 or int64, of anything that holds integers; bytes are int32."""
    try:
        if len(x) == 0:
            made = torch.empty(0, dtype=torch.int32)
        else:
            made = torch.frombuffer(bytearray(x), dtype=torch.int32) if isinstance(x, bytes) else torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        made = None
    if made is None or made.dim() != 1 or made.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 [M], got {shown(x) if made is None else f'{made.dtype} {tuple(made.shape)}'}")
    return made.cpu()


def _ids_and_counts(sample: Any, name: str) -> tuple[Tensor, Tensor]:
    """([M] ids, [R] the length of each list) of one sample."""
    ids, offsets, lengths = _attribute(sample, _IDS), _attribute(sample, ("offsets",)), _attribute(sample, _LENGTHS)
    if ids is None or (offsets is None and lengths is None):
        return _from_nested(sample if ids is None else ids, name)
    ids = _integers(ids, f"the ids of {name}")
    if offsets is None:
        counts = _integers(lengths, f"the lengths of {name}")
    else:
        counts = _integers(offsets, f"the offsets of {name}").diff()
    if (counts < 0).any() or counts.sum() != len(ids):
        raise ValueError(f"{name} has {len(ids)} ids for lists of {counts.sum().item()} in all")
    return ids, counts


def _from_nested(lists: Any, name: str) -> tuple[Tensor, Tensor]:
    try:
        ids, counts = array("i", chain.from_iterable(lists)), array("i", map(len, lists))
    except (TypeError, OverflowError):
        raise TypeError(f"{name} must be lists of token ids, one for each token drawn, or have ids and offsets, got {shown(lists)}") from None
    return tuple(torch.frombuffer(x, dtype=torch.int32) if x else torch.empty(0, dtype=torch.int32) for x in (ids, counts))  # type: ignore


def _check_tokens(lists: list[int], drawn: Tensor) -> None:
    here = as_bool(drawn)
    if drawn.dim() == 2 and len(drawn) == len(lists):
        for i, (found, tokens) in enumerate(zip(lists, here.sum(-1).tolist(), strict=True)):
            if found != tokens:
                raise ValueError(f"samples[{i}] has sets for {found} tokens, and drawn marks {tokens} in row {i}")
    elif sum(lists) != here.sum():
        raise ValueError(f"samples have sets for {sum(lists)} tokens, and drawn marks {here.sum().item()}")
