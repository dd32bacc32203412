"""Megatron-LM's arguments are read from a pickle without running anything that it names."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

from vqmoe_megatron.config import ModelConfig
from vqmoe_megatron.upcycle.megatron_args import argument_problems, stored_arguments


class Runs:
    """Unpickled the usual way, it leaves a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "common.pt")
    return folder


def test_plain_values_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    arguments = argparse.Namespace(
        num_layers=2, swiglu=True, params_dtype=torch.bfloat16, attention_backend=Runs(trap)
    )
    found = stored_arguments(saved(tmp_path, {"args": arguments, "tensor": torch.ones(3)}))
    assert found is not None
    assert (found["num_layers"], found["swiglu"]) == (2, True)
    assert not trap.exists()
    torch.load(tmp_path / "common.pt", weights_only=False)  # the trap is one
    assert trap.exists()


@pytest.mark.parametrize("content", [{}, {"args": 3}, [1], torch.ones(2)])
def test_without_arguments_there_are_none(content: object, tmp_path: Path) -> None:
    assert stored_arguments(saved(tmp_path, content)) is None


def test_a_folder_without_the_file_or_with_another_has_none(tmp_path: Path) -> None:
    assert stored_arguments(tmp_path) is None
    (tmp_path / "common.pt").write_bytes(b"no file of torch")
    assert stored_arguments(tmp_path) is None


LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=2,
    normalization="RMSNorm",
    gated_linear_unit=True,
)
SAME = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "swiglu": True,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "moe_router_topk": 2,
}


def test_equal_settings_are_no_problem() -> None:
    assert argument_problems(SAME, LLAMA, has_experts=False) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads=4"),
        ({"group_query_attention": False}, "num_query_groups=8"),
        ({"swiglu": False}, "model.gated_linear_unit: recipe True, the source's args swiglu=False"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5: a recipe has 1.0"),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
    ],
)
def test_each_difference_is_named(changed: dict, said: str) -> None:
    (problem,) = argument_problems(SAME | changed, LLAMA, has_experts=False)
    assert said in problem


def test_the_router_counts_where_there_is_one() -> None:
    (problem,) = argument_problems(SAME, LLAMA, has_experts=True)
    assert "model.moe_router_topk: recipe 1" in problem
