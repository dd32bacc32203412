"""What a simulated tensor answers where a program reads its value."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqmoe_megatron.simulate.fake_tensors import FakeValues


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    with FakeTensorMode(), FakeValues():
        yield


@pytest.mark.parametrize("value", [2, 2.5, False])
def test_what_the_program_wrote_is_read_again(value: object) -> None:
    written = torch.tensor([value])
    assert written.item() == value
    assert written.detach().item() == value  # as recompute hands it to its second pass


def test_what_is_computed_is_that_of_a_step_that_goes_well() -> None:
    assert torch.zeros(1, dtype=torch.int64).item() == 0  # nobody asks for a stop
    assert torch.zeros(3).norm().item() == 1.0
    assert torch.zeros(3).isfinite().all().item() is True
    assert torch.zeros(4, 2, dtype=torch.bool).nonzero().shape == (8, 2)


def test_what_was_changed_since_is_computed() -> None:
    total = torch.tensor([5])
    total += torch.zeros(1, dtype=torch.int64)
    assert total.item() == 0
