"""Processes that share a vocabulary or a batch: what each holds, that they agree, and what they gather.

The ranks of a group call the same function with arguments that must match. Sizes that differ would end in
garbage or an abort (gloo), or undefined behaviour (NCCL). So on CPUs a header of a few numbers goes round
before anything else, and every rank draws the same conclusion from it. A rank whose own arguments are wrong
takes part before it raises; nobody waits for it. On a GPU the host must not read: there such a rank sends
NaN, which the others find in their results. RLKERN_DEBUG=1 sends the header there too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_count, check_group
from .operator import DEBUG, traced

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def world(group: Any) -> int:
    """How many processes a group has; one where there is none."""
    return 1 if group is None else dist.get_world_size(group)


def check_member(group: Any, name: str = "group") -> None:
    """None, or a process group that this process belongs to."""
    if torch.compiler.is_compiling():  # Dynamo looks into few attributes of a group
        return
    if group is not None and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: this process does not belong to it")
    check_group(group, name)


def vocab_range(columns: int, group: Any = None) -> tuple[int, int]:
    """The ids [start, end) of this rank's columns where all ranks hold `columns` of them, in rank order.

    Raises TypeError, ValueError: for another number, and for what is no group of this process.
    """
    check_count("columns", columns, 1)
    check_member(group)
    start = 0 if group is None else dist.get_rank(group) * columns
    return start, start + columns


# --- collectives --------------------------------------------------------------------------------------------


def gather(x: Tensor, group_name: str, ranks: int) -> Tensor:
    """[ranks, *x.shape], x of every rank in rank order. One collective; traced, it is a functional one."""
    if traced(x):
        flat = x.contiguous().view(1, -1)  # of any number of dimensions
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(flat, ranks, group_name)
        return torch.ops._c10d_functional.wait_tensor(gathered).view(ranks, *x.shape)
    out = x.new_empty(ranks, *x.shape)
    _gather_into(out, x.contiguous(), group_of(group_name))
    return out


def add_up(x: Tensor, group_name: str) -> Tensor:
    """The sum of x over the ranks. It may be x itself, overwritten."""
    if traced(x):
        total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
        return torch.ops._c10d_functional.wait_tensor(total)
    x = x.contiguous()
    dist.all_reduce(x, group=group_of(group_name))
    return x


def group_of(name: str) -> Any:
    """The process group of that name: operators take names."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _gather_into(out: Tensor, x: Tensor, group: Any) -> None:
    # torch 2.13 renamed the function, and warns of the old name.
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into(out.view(-1), x.view(-1), group=group)


# --- agreement ----------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """What this rank holds of rows that are cut over the ranks of a group."""

    group_name: str  # "": no other rank
    ranks: int
    start: int  # id of the first column
    vocab: int  # ids below this are the vocabulary; UNKNOWN where only the host could learn it
    segments: int  # parts of a row here, 0: one, wherever the rank's columns begin


UNKNOWN = 1 << 62  # as vocab: more than any id


class Said(NamedTuple):
    """The header of a rank."""

    refused: int
    rows: int
    targets: int  # a row
    dtype: int
    columns: int
    start: int
    vocab: int  # -1: not given
    options: int  # a digest
    lowest: int  # of the targets that count; 0 without any
    highest: int


_NAMES = {"rows": "the number of rows", "targets": "the number of targets a row", "dtype": "the dtype"}


class Meeting:
    """A call that all ranks of a group make, as a context: checks inside it, what needs all of them after it.

    Inside it say what the call is about, by `about` and `covers`. Leaving it, the ranks exchange that. If one
    raised inside, or they disagree, every rank raises: the first its own error, the others a ValueError that
    is the same on all of them. A group of one process exchanges nothing.

    Args:
        function: its name, which must be the same on all ranks.
        group: a process group or None.
        x: whose device decides: on a CPU the header is exchanged. None if it is not known.
    """

    def __init__(self, function: str, group: Any, x: Any):
        check_member(group)
        self.function, self.group, self.ranks = function, group, world(group)
        self.device = x.device if isinstance(x, Tensor) else None
        self.traced = torch.compiler.is_compiling() or (isinstance(x, Tensor) and traced(x))
        self.said = Said(0, 0, 0, 0, 0, 0, -1, 0, 0, 0)
        self.payloads: list[tuple[bool, Tensor]] = []  # of a rank that refuses, where no header is exchanged
        self.everyone: list[Said] = []  # all headers, once they were exchanged
        self.asked: Mapping[str, Any] = {}

    @property
    def group_name(self) -> str:
        return "" if self.ranks == 1 else self.group.group_name

    def about(self, *, rows: int = 0, targets: int = 0, dtype: Any = None, options: Mapping[str, Any] | None = None) -> None:
        """What must be the same on all ranks; options by name."""
        if self.ranks == 1:
            return
        self.asked = {"the function": self.function, **(options or {})}
        digest = digest_of(repr(self.asked).encode())
        code = _DTYPES.index(dtype) if dtype in _DTYPES else -1
        self.said = self.said._replace(rows=rows, targets=targets, dtype=code, options=digest)

    def covers(self, columns: int, vocab_start: int | None, vocab_size: int | None, lowest: int = 0, highest: int = 0) -> None:
        """The columns that this rank holds, as its caller says, and the range of its targets."""
        if self.ranks > 1:
            start, vocab = first_column(self.group, columns, vocab_start), -1 if vocab_size is None else vocab_size
            self.said = self.said._replace(columns=columns, start=start, vocab=vocab, lowest=lowest, highest=highest)

    def would_send(self, payloads: Callable[[], list[Tensor]]) -> None:
        """What the call sends, in its shape, dtype and device: sent as NaN if this rank refuses on a GPU.
        Integers are sent as the least of them."""
        self._would(False, payloads)

    def would_add(self, payloads: Callable[[], list[Tensor]]) -> None:
        """As `would_send`, of what the ranks add up. Call both in the order of the collectives."""
        self._would(True, payloads)

    def _would(self, adds: bool, payloads: Callable[[], list[Tensor]]) -> None:
        if self.ranks > 1 and not self.exchanges and not self.traced:
            self.payloads += [(adds, payload) for payload in payloads()]

    @property
    def exchanges(self) -> bool:
        """Whether a header goes round."""
        if self.ranks == 1 or self.traced:
            return False
        on_cpu = self.device.type == "cpu" if self.device is not None else self._only_cpus()
        return on_cpu or (DEBUG and self.device is not None)

    def _only_cpus(self) -> bool:
        return dist.get_backend(self.group) == "gloo"

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        if self.exchanges:
            self._exchange(error is not None)
        elif error is not None and self.ranks > 1:
            for adds, payload in self.payloads:
                payload.fill_(float("nan") if payload.dtype.is_floating_point else torch.iinfo(payload.dtype).min)
                if adds:
                    add_up(payload, self.group_name)
                else:
                    gather(payload, self.group_name, self.ranks)

    def _exchange(self, refuses: bool) -> None:
        mine = torch.tensor(self.said._replace(refused=int(refuses)), dtype=torch.int64, device=self.device or "cpu")
        everyone = mine.new_empty(self.ranks, len(mine))
        _gather_into(everyone, mine, self.group)
        if refuses:
            return
        self.everyone = [Said(*row) for row in everyone.tolist()]
        refusing = [rank for rank, said in enumerate(self.everyone) if said.refused]
        if refusing:
            refuse(self, refusing)
        for field, name in _NAMES.items():
            values = [getattr(said, field) for said in self.everyone]
            if len(set(values)) > 1:
                self._disagree(name, [_dtype_name(value) for value in values] if field == "dtype" else values)
        if len({said.options for said in self.everyone}) > 1:
            asked: list[Any] = [None] * self.ranks
            dist.all_gather_object(asked, self.asked, group=self.group)
            for name in dict.fromkeys(name for options in asked for name in options):
                values = [options.get(name) for options in asked]
                if any(value != values[0] for value in values):
                    self._disagree(name, values)

    def _disagree(self, what: str, by_rank: Sequence[Any]) -> NoReturn:
        raise ValueError(f"{self.function}: the ranks of the group must agree on {what}, got {', '.join(map(str, by_rank))} by rank")


def refuse(meeting: Meeting, ranks: Sequence[int]) -> NoReturn:
    """Raises what a rank says when those others have raised an error of their own."""
    raise ValueError(f"{meeting.function}: {_ranks(ranks)} of the group refused {'its' if len(ranks) == 1 else 'their'} arguments")


def _ranks(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"


def _dtype_name(code: int) -> str:
    return str(_DTYPES[code]).removeprefix("torch.") if code >= 0 else "another"


def digest_of(data: Any) -> int:
    """A number of 56 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")


# --- shards of a vocabulary ---------------------------------------------------------------------------------


def is_sharded(group: Any, vocab_start: Any, vocab_size: Any, segments: Any) -> bool:
    """Whether a call is about some columns of rows: those of a rank, those without padding, or segments."""
    return group is not None or vocab_start is not None or vocab_size is not None or segments is not None


def first_column(group: Any, columns: int, vocab_start: int | None) -> int:
    return dist.get_rank(group) * columns if vocab_start is None else vocab_start


def check_sizes(columns: int, ranks: int, vocab_start: int | None, vocab_size: int | None, segments: int | None) -> None:
    """Raises TypeError or ValueError for numbers that cannot describe columns of a vocabulary."""
    if vocab_start is not None:
        check_count("vocab_start", vocab_start)
        if ranks == 1 and vocab_start != 0:
            raise ValueError(f"vocab_start must be 0 or None without other ranks, got {vocab_start}")
    if vocab_size is not None:
        check_count("vocab_size", vocab_size, 1)
    if segments is None:
        if vocab_size is not None and ranks == 1 and vocab_size > columns:
            raise ValueError(f"vocab_size must be at most the {columns} columns, got {vocab_size}")
        return
    check_count("segments", segments, 1)
    if segments % ranks:
        raise ValueError(f"segments must be a multiple of the {ranks} ranks of the group, got {segments}")
    if columns * ranks % (16 * segments) or columns * ranks // segments * (segments // ranks) != columns:
        wanted = f"a multiple of {16 * segments}, for segments of the same size on every number of ranks"
        raise ValueError(f"segments={segments} needs columns on all ranks that are {wanted}, got {ranks} x {columns}: pad the vocabulary")


def check_tiling(function: str, everyone: Sequence[Said], vocab: int) -> None:
    """Raises ValueError unless the ranks' columns follow one another from 0 to at least vocab."""
    by_start = sorted(range(len(everyone)), key=lambda rank: (everyone[rank].start, everyone[rank].columns))
    end = 0
    for rank in by_start:
        said = everyone[rank]
        if said.start != end:
            what = "leave a gap" if said.start > end else "overlap"
            held = ", ".join(f"[{everyone[r].start}, {everyone[r].start + everyone[r].columns}) on rank {r}" for r in by_start)
            raise ValueError(f"{function}: the ranks' columns must follow one another, but they {what} at {min(said.start, end)}: {held}")
        end += said.columns
    if end < vocab:
        raise ValueError(f"{function}: vocab_size must be at most the columns of all ranks, {end}, got {vocab}")


def shard_of(
    function: str,
    group: Any,
    columns: int,
    vocab_start: int | None,
    vocab_size: int | None,
    segments: int | None,
    everyone: Sequence[Said] = (),
) -> Shard:
    """This rank's columns. everyone: the headers, where exchanged; ValueError where these do not fit."""
    ranks = world(group)
    if ranks == 1:
        return Shard("", 1, 0, columns if vocab_size is None else vocab_size, segments or 0)
    start, vocab = first_column(group, columns, vocab_start), vocab_size
    if segments is not None:
        held = [(said.start, said.columns) for said in everyone]
        even = all(where == (rank * columns, columns) for rank, where in enumerate(held))
        if not even or (not everyone and start != first_column(group, columns, None)):
            shown_ranges = ", ".join(f"[{first}, {first + size})" for first, size in held or [(start, columns)])
            raise ValueError(f"{function}: segments needs ranks with as many columns each, in their order, got {shown_ranges}")
    if everyone:
        sizes = [said.vocab for said in everyone]
        if len(set(sizes)) > 1:
            given = ", ".join("None" if v == -1 else str(v) for v in sizes)
            raise ValueError(f"{function}: the ranks of the group must agree on vocab_size, got {given} by rank")
        if vocab is None:
            vocab = max(said.start + said.columns for said in everyone)
        if vocab == 0:
            raise ValueError(f"{function}: some rank must hold a column, got none on any")
        check_tiling(function, everyone, vocab)
    elif vocab is None:
        vocab = ranks * columns if vocab_start is None else UNKNOWN
    return Shard(group.group_name, ranks, start, vocab, (segments or 0) // ranks)


def refusing_targets(meeting: Meeting, vocab: int) -> list[int]:
    """The ranks that hold a target outside [0, vocab)."""
    return [rank for rank, said in enumerate(meeting.everyone) if said.lowest < 0 or said.highest >= vocab]
