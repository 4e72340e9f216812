"""DTensors among the arguments: which columns of the rows a process holds, and its own part of each tensor.

Logits may be sharded on their last dimension over one dimension of the mesh, and on others by rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_dtensor(x: Any) -> bool:
    return hasattr(x, "device_mesh")  # without an import of torch.distributed.tensor, which takes a while


def _shown(name: str, x: Any) -> str:
    return f"{name} has placements {tuple(x.placements)}"


class Rows(NamedTuple):
    """How the rows of a DTensor lie on its mesh."""

    mesh: Any
    placements: tuple  # Replicate where the columns are sharded
    shape: tuple  # of all rows

    def local(self, x: Any) -> Any:
        """This process's part of a tensor by row. What is no DTensor has only local rows already."""
        if not is_dtensor(x):
            return x
        return x.redistribute(self.mesh, self.placements).to_local()

    def whole(self, x: Tensor | None) -> Any:
        """A DTensor of what was computed of the local rows."""
        if x is None:
            return None
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*self.shape, *x.shape[len(self.shape) :]))
        strides = [shape[i + 1 :].numel() for i in range(len(shape))]
        return DTensor.from_local(x, self.mesh, self.placements, run_check=False, shape=shape, stride=tuple(strides))


def local_columns(name: str, x: Any, group: Any, vocab_start: int | None, vocab_size: int | None) -> tuple[Tensor, dict[str, Any], Rows]:
    """(local part, group=, vocab_start= and vocab_size= for it, the rows) of a DTensor [..., V].

    Raises ValueError for a group beside it, and for placements that are not shards of rows and columns.
    """
    from torch.distributed.tensor import Replicate

    if group is not None or vocab_start is not None:
        raise ValueError(f"{name} is a DTensor, which says itself how it is sharded: expected group and vocab_start None")
    last = x.dim() - 1
    over = [i for i, placement in enumerate(x.placements) if getattr(placement, "dim", None) in (last, -1)]
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"{_shown(name, x)}: expected Shard or Replicate, redistribute what is Partial")
    if len(over) > 1 or any(type(x.placements[i]).__name__ != "Shard" for i in over):
        raise ValueError(f"{_shown(name, x)}: expected the last dimension as Shard({last}) on at most one dimension of the mesh")
    placements = tuple(Replicate() if i in over else placement for i, placement in enumerate(x.placements))
    rows = Rows(x.device_mesh, placements, tuple(x.shape[:-1]))
    if not over:
        return x.to_local(), {"group": None, "vocab_start": None, "vocab_size": vocab_size}, rows
    return x.to_local(), _columns(x, over[0], last, vocab_size), rows


def _columns(x: Any, mesh_dim: int, dim: int, vocab_size: int | None) -> dict[str, Any]:
    """group=, vocab_start= and vocab_size= of a DTensor with `dim` sharded over a dimension of its mesh."""
    mesh, vocab = x.device_mesh, x.shape[dim]
    most = -(-vocab // mesh.size(mesh_dim))  # as torch.chunk cuts: the last ranks may hold less, or nothing
    start = min(vocab, most * mesh.get_local_rank(mesh_dim))
    return {"group": mesh.get_group(mesh_dim), "vocab_start": start, "vocab_size": vocab if vocab_size is None else vocab_size}


def local_head(
    hidden: Any, weight: Any, bias: Any, group: Any, vocab_start: int | None, vocab_size: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Any], Rows | None]:
    """((hidden, weight, bias) of this process, keywords for them, the rows) of a DTensor of weight [V, H].

    With a DTensor of hidden states, replicated where the matrix is sharded; or with plain ones and the group
    that the matrix is sharded over. Raises TypeError and ValueError for anything else.
    """
    from torch.distributed.tensor import Partial, Replicate

    if not is_dtensor(weight):
        raise TypeError("weight must be a DTensor beside a DTensor of hidden, got a plain tensor")
    if vocab_start is not None:
        raise ValueError(f"weight is a DTensor, which says itself how it is sharded: expected vocab_start None, got {vocab_start}")
    mesh = weight.device_mesh
    over = [i for i, placement in enumerate(weight.placements) if type(placement).__name__ == "Shard" and placement.dim == 0]
    if is_dtensor(hidden):
        if group is not None:
            raise ValueError("hidden and weight are DTensors, which say themselves how they are sharded: expected group None")
        if hidden.device_mesh != mesh:
            raise ValueError(f"hidden and weight must be on one mesh, got {hidden.device_mesh} and {mesh}")
        if any(placement.is_partial() or getattr(placement, "dim", None) in (hidden.dim() - 1, -1) for placement in hidden.placements):
            raise ValueError(f"{_shown('hidden', hidden)}: expected it sharded by rows or replicated")
        over = [i for i in over if hidden.placements[i].is_replicate()]
    else:
        over = [i for i in over if mesh.get_group(i) == group]
    others = [placement for i, placement in enumerate(weight.placements) if i not in over]
    if len(over) != 1 or not all(placement.is_replicate() for placement in others):
        where = "where hidden is replicated" if is_dtensor(hidden) else "that of group"
        both = f"{_shown('weight', weight)}{', ' + _shown('hidden', hidden) if is_dtensor(hidden) else ''}"
        raise ValueError(f"{both}: expected weight as Shard(0) on one dimension of the mesh, {where}, and replicated on others")
    at, of_weight, rows = _columns(weight, over[0], 0, vocab_size), list(weight.placements), None
    if is_dtensor(hidden):
        of_hidden = list(hidden.placements)
        rows = Rows(mesh, tuple(of_hidden), tuple(hidden.shape[:-1]))
        of_weight = [Partial() if placement.is_shard() else w for placement, w in zip(of_hidden, of_weight, strict=True)]
        of_hidden[over[0]] = Partial()
        hidden = hidden.to_local(grad_placements=of_hidden)
        at["hidden_grad"] = "partial"
    if bias is not None:
        wanted = [Replicate()] * mesh.ndim
        wanted[over[0]] = weight.placements[over[0]]
        bias = bias.redistribute(mesh, wanted).to_local(grad_placements=of_weight) if is_dtensor(bias) else bias
    return (hidden, weight.to_local(grad_placements=of_weight), bias), at, rows
