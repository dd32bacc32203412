"""The recorder names what a graph would get wrong: it can fail."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.runtime.recorded_graph import RecordedGraph
from vqmoe_megatron.runtime.static_graph import Captured


class Faulty:
    """Does something at its fourth run, the second replay, that a graph would not repeat."""

    def __init__(self, fault: str) -> None:
        self.fault, self.num_calls = fault, 0
        self.table = torch.ones(4)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        self.num_calls += 1
        is_wrong = self.num_calls == 4
        if self.fault == "address" and is_wrong:
            self.old, self.table = self.table, torch.full((4,), 2.0).clone()
        y = x * self.table
        if self.fault == "operation" and is_wrong:
            y = y + 0.0
        if self.fault == "shape" and is_wrong:
            y = torch.cat([y[:2], y[2:]])
        elif self.fault == "shape":
            y = torch.cat([y[:1], y[1:]])
        if self.fault == "item":
            y = y * y.sum().item()
        if self.fault == "nonzero":
            y = y + torch.nonzero(y[:, 0]).numel()
        return (y,)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("address", "operation 0 of a captured function changed"),
        ("operation", "did 1 operations at the capture and 2 now"),
        ("shape", "of a captured function changed"),
    ],
)
def test_the_recorder_sees_what_changes_between_steps(fault: str, message: str) -> None:
    captured = Captured(Faulty(fault), [], [], RecordedGraph)
    x = torch.rand(3, 4, requires_grad=True)
    captured(x)[0].sum().backward()
    with pytest.raises(ValueError, match=message):
        captured(x)


@pytest.mark.parametrize("fault", ["item", "nonzero"])
def test_the_recorder_refuses_to_wait_for_the_device(fault: str) -> None:
    captured = Captured(Faulty(fault), [], [], RecordedGraph)
    with pytest.raises(ValueError, match="waits for the device: it cannot be captured"):
        captured(torch.rand(3, 4, requires_grad=True))
