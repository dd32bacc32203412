"""Modules that keep fp32 through the casts of whole models, their children's tensors too."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.keeps_float32 import KeepsFloat32


class Kept(KeepsFloat32):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), 1.0 + 2**-20))
        self.register_buffer("table", torch.full((2,), 1.0 + 2**-20))
        self.register_buffer("ids", torch.tensor([3]))
        self.child = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_casts_change_neither_dtype_nor_bits(cast: str) -> None:
    kept = Kept()
    model = torch.nn.Sequential(kept, torch.nn.Linear(2, 2))
    before = {name: value.clone() for name, value in kept.state_dict().items()}
    getattr(model, cast)()
    for name, value in kept.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert model[1].weight.dtype == {
        "bfloat16": torch.bfloat16, "half": torch.float16, "float": torch.float32
    }[cast]  # fmt: skip


def test_fp64_and_devices_are_followed() -> None:
    kept = Kept().double()
    assert kept.weight.dtype == kept.table.dtype == kept.child.weight.dtype == torch.float64
    assert kept.ids.dtype == torch.int64
    moved = Kept().to("meta")
    assert all(value.device.type == "meta" for value in moved.state_dict().values())
    both = Kept().to(device="meta", dtype=torch.bfloat16)
    assert both.weight.device.type == "meta" and both.weight.dtype == torch.float32
