"""Bytes that this rank sends to others, counted where collectives are called.

P ranks of a group, n bytes of a rank's block:

    all-to-all of blocks       what leaves for other ranks
    all-gather of n bytes      (P - 1) n
    reduce-scatter to n bytes  (P - 1) n; of blocks of unequal sizes, those of the other ranks
    all-reduce of n bytes      2 (P - 1) / P n

What a collective costs on the wire depends on its algorithm; these are the conventions of
``plan/wire_cost.py``. While :func:`counting` is open, torch's collectives are wrapped under every
name by which the layer and Megatron's call them; the calls go through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from unittest import mock

import torch
from megatron.core.tensor_parallel import mappings
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Sent:
    """One collective: what this rank sent."""

    is_backward: bool
    collective: str  # all_to_all | all_gather | reduce_scatter | all_reduce
    group: str
    num_bytes: Fraction


@dataclass
class WireCounter:
    """Collects what is sent; the caller says in which pass."""

    groups: Mapping[str, ProcessGroup]  # by the name that is written down
    is_backward: bool = False
    sent: list[Sent] = field(default_factory=list)

    def enter_pass(self, is_backward: bool) -> None:
        """Say which pass runs from here on."""
        self.is_backward = is_backward

    def add(self, collective: str, group: ProcessGroup | None, num_bytes: Fraction) -> None:
        """Write down one collective, unless nothing left this rank."""
        if num_bytes:
            name = next((n for n, known in self.groups.items() if known is group), "other")
            self.sent.append(Sent(self.is_backward, collective, name, num_bytes))


@contextmanager
def counting(counter: WireCounter) -> Iterator[None]:
    """Count every collective of this process into ``counter`` until the block ends."""
    functions = _wrappers(counter)
    with ExitStack() as stack:
        for name, wrapper in functions.items():
            stack.enter_context(mock.patch.object(torch.distributed, name, wrapper))
        # Megatron bound these two names when it was imported.
        for name, wrapped in (
            ("dist_all_gather_func", "all_gather_into_tensor"),
            ("dist_reduce_scatter_func", "reduce_scatter_tensor"),
        ):
            stack.enter_context(mock.patch.object(mappings, name, functions[wrapped]))
        yield


def _wrappers(counter: WireCounter) -> dict[str, Callable]:
    """Functions with the signatures of torch.distributed's, as far as they are used."""
    real = {
        name: getattr(torch.distributed, name)
        for name in (
            "all_to_all_single",
            "all_gather_into_tensor",
            "all_gather",
            "reduce_scatter_tensor",
            "reduce_scatter",
            "all_reduce",
        )
    }

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: ProcessGroup | None = None,
        **options: object,
    ) -> object:
        rank, num_ranks = _place(group)
        kept = input.shape[0] // num_ranks
        if input_split_sizes is not None:
            kept = int(input_split_sizes[rank])
        counter.add("all_to_all", group, Fraction(input[kept:].nbytes))
        return real["all_to_all_single"](
            output, input, output_split_sizes, input_split_sizes, group=group, **options
        )

    def gather(name: str) -> Callable:
        def all_gather(
            output: object,
            block: torch.Tensor,
            group: ProcessGroup | None = None,
            **options: object,
        ) -> object:
            counter.add("all_gather", group, Fraction(block.nbytes * (_place(group)[1] - 1)))
            return real[name](output, block, group=group, **options)

        return all_gather

    def reduce_scatter_tensor(
        output: torch.Tensor,
        input: torch.Tensor,
        *operation: object,
        group: ProcessGroup | None = None,
        **options: object,
    ) -> object:
        counter.add("reduce_scatter", group, Fraction(output.nbytes * (_place(group)[1] - 1)))
        return real["reduce_scatter_tensor"](output, input, *operation, group=group, **options)

    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        *operation: object,
        group: ProcessGroup | None = None,
        **options: object,
    ) -> object:
        leaving = sum(block.nbytes for block in input_list) - output.nbytes
        counter.add("reduce_scatter", group, Fraction(leaving))
        return real["reduce_scatter"](output, input_list, *operation, group=group, **options)

    def all_reduce(
        tensor: torch.Tensor,
        *operation: object,
        group: ProcessGroup | None = None,
        **options: object,
    ) -> object:
        num_ranks = _place(group)[1]
        num_bytes = Fraction(2 * (num_ranks - 1) * tensor.nbytes, num_ranks)
        counter.add("all_reduce", group, num_bytes)
        return real["all_reduce"](tensor, *operation, group=group, **options)

    return {
        "all_to_all_single": all_to_all_single,
        "all_gather_into_tensor": gather("all_gather_into_tensor"),
        "all_gather": gather("all_gather"),
        "reduce_scatter_tensor": reduce_scatter_tensor,
        "reduce_scatter": reduce_scatter,
        "all_reduce": all_reduce,
    }


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    """This rank in the group, and its size; None is the world."""
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
