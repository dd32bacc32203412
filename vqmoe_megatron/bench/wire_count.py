"""Bytes that this rank sends to others, collective by collective, and in which pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch.distributed import ProcessGroup

from vqmoe_megatron.runtime.collective_counter import CollectiveCounter


@dataclass(frozen=True)
class Sent:
    """One collective: what this rank sent."""

    is_backward: bool
    collective: str  # all_to_all | all_gather | reduce_scatter | all_reduce
    group: str
    num_bytes: Fraction


class WireCounter(CollectiveCounter):
    """While entered, lists what is sent; the caller says in which pass."""

    def __init__(self, groups: Mapping[str, ProcessGroup]) -> None:
        """``groups``: process groups by the name that is written down; others are ``other``."""
        super().__init__({group.group_name: name for name, group in reversed(groups.items())})
        self.is_backward = False
        self.sent: list[Sent] = []

    def enter_pass(self, is_backward: bool) -> None:
        """Say which pass runs from here on."""
        self.is_backward = is_backward

    def add(self, collective: str, axis: str, num_bytes: Fraction) -> None:
        """List one collective."""
        self.sent.append(Sent(self.is_backward, collective, axis, num_bytes))
