"""Bytes that this rank sends, counted where torch dispatches its collectives.

P ranks of a group, n bytes of a rank's block:

    all-to-all of blocks       what leaves for other ranks
    all-gather of n bytes      (P - 1) n
    reduce-scatter to n bytes  (P - 1) n
    all-reduce of n bytes      2 (P - 1) / P n
    broadcast of n bytes       (P - 1) n from its source, nothing from the others
    send of n bytes            n

What a collective costs on the wire depends on its algorithm; these are the conventions of
``plan/wire.py``. Every call of a collective ends in one operator of torch's ``c10d`` library,
by whatever Python name it was called, so that none is missed; an operator that is not known here
raises. The same counter serves real ranks, and a fake process group where nothing is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

c10d = torch.ops.c10d
OTHER = "other"

# (collective, axis) -> [calls, bytes]
Counted = dict[tuple[str, str], tuple[int, Fraction]]


class CollectiveCounter(TorchDispatchMode):
    """While entered, counts what this thread's collectives send; the calls go through unchanged.

    Calls that send nothing (groups of one rank, receives, broadcasts from elsewhere) are left out.

    Raises:
        RuntimeError: for a collective that it has no rule for; nothing is left out unseen.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        """``axes``: name of a process group -> name of its axis; others are ``other``."""
        super().__init__()
        self.axes = axes
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: dict[tuple[str, str], Fraction] = {}

    @property
    def counted(self) -> Counted:
        """Calls and bytes by collective and axis."""
        return {key: (self._calls[key], self._bytes[key]) for key in sorted(self._calls)}

    def reset(self) -> None:
        """Forget what was counted."""
        self._calls.clear()
        self._bytes.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count ``func`` when it is a collective, then run it."""
        if func.namespace == "c10d":
            self.count(func, args)
            return self.run_collective(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def run_collective(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a collective; a simulation does something else instead."""
        return func(*args, **kwargs)

    def count(self, func: Any, args: Sequence[Any]) -> None:
        """Write down what one call sends."""
        if func in SILENT:
            return
        rule = RULES.get(func)
        if rule is None:
            raise RuntimeError(f"{func}: no rule says how many bytes this collective sends")
        collective, position, measure = rule
        group = ProcessGroup.unbox(args[position])
        if num_bytes := measure(args, group.rank(), group.size()):
            # Between two stages only, though Megatron uses the world's group as a second channel
            # where both directions run at once.
            axis = "pp" if collective == "send" else self.axes.get(group.group_name, OTHER)
            self.add(collective, axis, num_bytes)

    def add(self, collective: str, axis: str, num_bytes: Fraction) -> None:
        """Add one call to the sums."""
        key = collective, axis
        self._calls[key] += 1
        self._bytes[key] = self._bytes.get(key, Fraction(0)) + num_bytes


def process_group_axes() -> dict[str, str]:
    """Name of every process group of this rank -> its axis, as ``plan/wire.py`` names them.

    A plan counts no context parallelism (``plan/uncounted``), so groups with and without it are the
    same ranks and the same axis. No communication.
    """
    from megatron.core import parallel_state as state

    axes = {torch.distributed.group.WORLD.group_name: "world"}
    for name, groups in {
        "tp": (
            state.get_tensor_model_parallel_group(),
            state.get_tensor_and_context_parallel_group(),
        ),
        "pp": (state.get_pipeline_model_parallel_group(),),
        "ep": (state.get_expert_model_parallel_group(),),
        "expt_tp": (state.get_expert_tensor_parallel_group(),),
        "dp": (
            state.get_data_parallel_group(),
            state.get_data_parallel_group(with_context_parallel=True),
        ),
        "expt_dp": (state.get_expert_data_parallel_group(),),
        "tp_dp": (
            state.get_tensor_and_data_parallel_group(),
            state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        ),
        "tp_pp": (state.get_model_parallel_group(),),
        "expt_tp_ep": (state.get_expert_tensor_and_model_parallel_group(),),
        "expt_tp_ep_pp": (state.get_expert_tensor_model_pipeline_parallel_group(),),
        "embedding": (state.get_embedding_group(check_initialized=False),),
        "world": (state.get_intra_distributed_optimizer_instance_group(),),  # of one instance
    }.items():
        for group in groups:
            if group is not None and group != torch.distributed.GroupMember.NON_GROUP_MEMBER:
                axes.setdefault(group.group_name, name)
    return axes


Measure = Callable[[Sequence[Any], int, int], Fraction]


def _gathered(position: int) -> Measure:
    return lambda args, rank, size: Fraction((size - 1) * _num_bytes(args[position]))


def _all_reduced(args: Sequence[Any], rank: int, size: int) -> Fraction:
    return Fraction(2 * (size - 1) * _num_bytes(args[0]), size)


def _reduce_scattered_blocks(args: Sequence[Any], rank: int, size: int) -> Fraction:
    return Fraction(_num_bytes([block for blocks in args[1] for block in blocks])) - _num_bytes(
        args[0]
    )


def _exchanged(args: Sequence[Any], rank: int, size: int) -> Fraction:
    rows, splits = args[1], args[4]
    num_bytes = _num_bytes(rows)
    if not splits:
        return Fraction(num_bytes * (size - 1), size)
    row_bytes = prod(rows.shape[1:]) * rows.element_size()
    return Fraction(num_bytes - splits[rank] * row_bytes)


def _broadcast(args: Sequence[Any], rank: int, size: int) -> Fraction:
    return Fraction((size - 1) * _num_bytes(args[0]) if args[2] == rank else 0)


def _sent(args: Sequence[Any], rank: int, size: int) -> Fraction:
    return Fraction(_num_bytes(args[0]))


def _num_bytes(tensors: torch.Tensor | Sequence[torch.Tensor]) -> int:
    parts = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return sum(part.numel() * part.element_size() for part in parts)


# operator -> name, position of its process group, rule
RULES: dict[Any, tuple[str, int, Measure]] = {
    c10d.alltoall_base_.default: ("all_to_all", 2, _exchanged),
    c10d.allgather_.default: ("all_gather", 2, _gathered(1)),
    c10d._allgather_base_.default: ("all_gather", 2, _gathered(1)),
    c10d.allgather_into_tensor_coalesced_.default: ("all_gather", 2, _gathered(1)),
    c10d.reduce_scatter_.default: ("reduce_scatter", 2, _reduce_scattered_blocks),
    c10d._reduce_scatter_base_.default: ("reduce_scatter", 2, _gathered(0)),
    c10d.reduce_scatter_tensor_coalesced_.default: ("reduce_scatter", 2, _gathered(0)),
    c10d.allreduce_.default: ("all_reduce", 1, _all_reduced),
    c10d.allreduce_coalesced_.default: ("all_reduce", 1, _all_reduced),
    c10d.broadcast_.default: ("broadcast", 1, _broadcast),
    c10d.send.default: ("send", 1, _sent),
}
SILENT = {c10d.recv_.default, c10d.barrier.default}
