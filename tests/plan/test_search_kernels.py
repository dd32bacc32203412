"""The search on its unit: billion_64's figures by hand, and which search runs where."""

from __future__ import annotations

import pytest
from layer_shapes import changed, shape

from vqmoe_megatron.plan.flops import search_flops
from vqmoe_megatron.plan.hardware import PROFILES
from vqmoe_megatron.plan.kernels import Kernel
from vqmoe_megatron.plan.search_kernels import (
    LEAST_SPLIT_WIDTH,
    UNCERTAIN_SHARE_PERCENT,
    plain_search,
    search_kernels,
    split_search,
)
from vqmoe_megatron.plan.shape import LayerShape

H100 = PROFILES["H100"]
# recipes/scale/billion_64.yaml: the tokens of a step on one of 16 ranks in one layer
BILLION = shape(
    num_local_tokens=32768, hidden_size=1024, moe_ffn_hidden_size=320, num_moe_experts=64,
    bytes_per_element=2, num_codes=896,
)  # fmt: skip
ONE = 2 * 32768 * 896 * 1024  # 6.0e10


def named(kernels: list[Kernel], name: str) -> Kernel:
    (found,) = (kernel for kernel in kernels if kernel.name == name)
    return found


def operations(kernels: list[Kernel], unit: str) -> int:
    return sum(kernel.operations for kernel in kernels if kernel.unit == unit)


def test_fp32_multiply_adds_take_a_millisecond() -> None:
    found = named(plain_search(BILLION), "fp32 products")
    assert found.operations == ONE == search_flops(BILLION)
    assert found.unit == "fp32_fma"
    assert found.seconds(H100) == pytest.approx(1.0e-3, rel=0.01)


def test_two_products_of_the_tensor_cores_take_a_sixth() -> None:
    found = named(split_search(BILLION), "split products")
    assert found.operations == 2 * ONE and found.unit == "bf16_tensor_core"
    assert found.operation_seconds(H100) == pytest.approx(0.15e-3, rel=0.01)
    assert found.read_bytes == 32768 * 1024 * 2 + 896 * 1024 * 2 * 2  # high and low
    assert found.written_bytes == 32768 * 12
    before, after = (
        sum(k.seconds(H100) for k in search)
        for search in (plain_search(BILLION), split_search(BILLION))
    )
    assert after < before / 4  # with norms, the split, the decision and uncertain tokens


def test_uncertain_tokens_are_searched_again_in_fp32() -> None:
    assert UNCERTAIN_SHARE_PERCENT == 2
    found = named(split_search(BILLION), "uncertain tokens again")
    assert found.unit == "fp32_fma" and found.operations == 2 * ONE // 100
    assert named(split_search(BILLION), "decision").read_bytes == 32768 * 12


@pytest.mark.parametrize(
    ("changes", "num_products"),
    [({}, 2), ({"bytes_per_element": 4}, 3), ({"code_dim": 64}, 3)],
)
def test_fp32_tokens_need_three_products(changes, num_products: int) -> None:
    layer = changed(BILLION, **changes)
    found = search_kernels(layer, "cuda")
    assert named(found, "split products").operations == num_products * (
        2 * 32768 * 896 * layer.code_width
    )


def test_a_projection_runs_in_fp32_before_the_search() -> None:
    found = search_kernels(changed(BILLION, code_dim=64), "cuda")
    projection, cast = named(found, "projection"), named(found, "tokens to fp32")
    assert projection.unit == "fp32_fma" and projection.operations == 2 * 32768 * 64 * 1024
    assert cast.read_bytes == 32768 * 1024 * 2 and cast.written_bytes == 32768 * 1024 * 4
    in_fp32 = search_kernels(changed(BILLION, code_dim=64, bytes_per_element=4), "cuda")
    assert not any(kernel.name == "tokens to fp32" for kernel in in_fp32)


@pytest.mark.parametrize(
    ("device", "changes", "is_split"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"num_code_slices": 16}, True),  # 64 columns each
        ("cuda", {"num_code_slices": 32}, False),
        ("cuda", {"code_dim": 64}, True),
        ("cuda", {"code_dim": 63}, False),
    ],
)
def test_where_the_split_search_runs(device: str, changes, is_split: bool) -> None:
    layer = changed(BILLION, **changes)
    found = search_kernels(layer, device)
    assert bool(operations(found, "bf16_tensor_core")) == is_split
    if not is_split:
        assert operations(found, "fp32_fma") == search_flops(layer)


def test_slices_share_the_operations_of_one_code() -> None:
    product = changed(BILLION, num_code_slices=4)
    assert operations(split_search(product), "bf16_tensor_core") == 2 * ONE
    assert named(split_search(product), "decision").read_bytes == 4 * 32768 * 12


def test_without_codes_nothing_is_searched() -> None:
    layer: LayerShape = changed(BILLION, path="continuous")
    assert search_kernels(layer, "cuda") == []


def test_the_plan_splits_what_the_package_splits() -> None:
    from vqmoe_megatron.vq.split_search import MIN_WIDTH

    assert LEAST_SPLIT_WIDTH == MIN_WIDTH


def test_implicit_codes_are_rounded_and_residual_ones_searched_at_every_depth() -> None:
    fixed = {"freeze_codebook": True, "codebook_update": "gradient", "init": "uniform"}
    implicit = changed(BILLION, quantizer="lfq", code_dim=8, num_codes=256, **fixed)
    found = search_kernels(implicit, "cuda")
    assert [kernel.name for kernel in found] == ["tokens to fp32", "projection", "rounding"]
    assert search_flops(implicit) == named(found, "projection").operations == 2 * 32768 * 8 * 1024
    assert named(found, "rounding").read_bytes < 32768 * 8 * (4 + 16) + 1
    depths = changed(BILLION, quantizer="residual", num_code_slices=3)
    assert search_flops(depths) == 3 * ONE
    assert named(plain_search(depths), "fp32 products").operations == 3 * ONE
