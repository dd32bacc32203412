"""Kernels of the MoE layer by hand: experts, code rows, router, rows on their way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from layer_shapes import changed, shape
from real_model import recipe

from vqmoe_megatron.plan.flops import layer_flops
from vqmoe_megatron.plan.hardware import PROFILES
from vqmoe_megatron.plan.kernels import Kernel
from vqmoe_megatron.plan.moe_kernels import SORT_BYTES, moe_kernels
from vqmoe_megatron.plan.shape import LayerShape

H100 = PROFILES["H100"]
LAYER = shape(
    num_local_tokens=8192, hidden_size=1024, moe_ffn_hidden_size=320, num_moe_experts=64,
    bytes_per_element=2, num_codes=896, gated_linear_unit=True, execution="code_space",
    expert_model_parallel_size=8,
)  # fmt: skip
MODEL = recipe([]).model


def kernels(layer: LayerShape, hardware=H100, model=MODEL) -> list[Kernel]:
    return list(moe_kernels(model, layer, hardware))


def named(found: list[Kernel], part: str, name: str, phase: str = "forward") -> Kernel:
    (one,) = (k for k in found if (k.part, k.name, k.phase) == (part, name, phase))
    return one


def test_experts_read_rows_and_weights() -> None:
    forward = named(kernels(LAYER), "expert GEMMs", "grouped products")
    rows, weights = 8192, 8 * 3 * 1024 * 320
    assert forward.operations == 2 * 3 * 1024 * 320 * rows
    assert forward.read_bytes == 2 * (rows * (1024 + 320) + weights)
    assert forward.written_bytes == 2 * rows * (640 + 1024)
    assert forward.unit == "bf16_tensor_core"
    backward = named(kernels(LAYER), "expert GEMMs", "grouped products gradients", "backward")
    assert backward.operations == layer_flops(LAYER)["dispatched"].backward
    # four steps' microbatches in one layer: 1.9e11 operations, 0.24 ms at 800 TFLOP/s
    both = 4 * (forward.operations + backward.operations)
    assert both == pytest.approx(1.9e11, rel=0.02)
    seconds = 4 * (forward.operation_seconds(H100) + backward.operation_seconds(H100))
    assert seconds == pytest.approx(0.24e-3, rel=0.02)


def test_code_rows_join_the_grouped_product_or_read_the_weights_themselves() -> None:
    joined = named(kernels(LAYER), "code rows", "grouped products")
    alone = named(kernels(changed(LAYER, path="discrete")), "code rows", "grouped products")
    weights = 2 * 8 * 3 * 1024 * 320
    assert joined.operations == alone.operations == 2 * 3 * 1024 * 320 * 896 // 8
    assert alone.read_bytes - joined.read_bytes == weights
    assert (joined.launches, alone.launches) == (0, 2)
    once = named(
        kernels(changed(LAYER, table_per_step=True)), "code rows", "grouped products", "step"
    )
    assert once.read_bytes == alone.read_bytes and once.launches == 2


@pytest.mark.parametrize(
    ("dtype", "hardware", "forward", "backward"),
    [
        ("fp32", H100, "bf16_tensor_core", "fp32_fma"),  # Transformer Engine's forward product
        ("fp32", replace(H100, kernels="local"), "fp32_fma", "fp32_fma"),
        (None, replace(H100, kernels="local"), "bf16_tensor_core", "bf16_tensor_core"),
    ],
)
def test_the_router_multiplies_in_its_own_dtype(dtype, hardware, forward, backward) -> None:
    found = kernels(LAYER, hardware, replace(MODEL, moe_router_dtype=dtype))
    assert named(found, "router and gate", "router").unit == forward
    gradients = named(found, "router and gate", "router gradients", "backward")
    assert gradients.unit == backward and gradients.operations == 2 * 2 * 8192 * 1024 * 64


@pytest.mark.parametrize(("ranks", "num_gathers", "num_sorts"), [(1, 2, 1), (8, 4, 2)])
def test_rows_are_gathered_at_every_stop(ranks: int, num_gathers: int, num_sorts: int) -> None:
    layer = changed(LAYER, expert_model_parallel_size=ranks)
    rows, ids = 8192 * 1024 * 2, 8192 * SORT_BYTES
    joined = rows  # with the code rows
    moved = named(kernels(layer), "dispatch", "rows")
    assert moved.read_bytes == moved.written_bytes == (
        num_gathers * rows + joined + num_sorts * ids
    )  # fmt: skip


def test_every_path_has_its_parts() -> None:
    def parts(**changes) -> set[str]:
        return {kernel.part for kernel in kernels(changed(LAYER, **changes))}

    discrete = {"code rows", "search", "combine", "straight-through", "codebook statistics"}
    continuous = {"router and gate", "dispatch", "expert GEMMs"}
    assert parts() == discrete | continuous | {"element-wise"}
    assert parts(path="continuous", execution="auto") == continuous | {"element-wise"}
    assert parts(path="discrete") == discrete | {"element-wise"}
    assert parts(path="discrete", execution="tokens") == (
        discrete - {"code rows"} | {"dispatch", "expert GEMMs", "element-wise"}
    )


def test_a_shared_expert_reads_the_tokens_of_all_tensor_ranks() -> None:
    layer = changed(
        LAYER, path="continuous", execution="auto", tensor_model_parallel_size=2,
        moe_shared_expert_intermediate_size=640,
    )  # fmt: skip
    found = kernels(layer)
    forward = named(found, "shared expert", "products")
    tokens, width = 2 * 8192, 320
    assert forward.operations == 2 * 3 * 1024 * width * tokens
    assert forward.operations == layer_flops(layer)["shared_expert"].forward
    assert forward.read_bytes == 2 * (tokens * (1024 + width) + 3 * 1024 * width)
    assert forward.written_bytes == 2 * tokens * (2 * width + 1024)
    added = named(found, "shared expert", "sum")
    assert (added.read_bytes, added.written_bytes) == (2 * 8192 * 1024 * 2, 8192 * 1024 * 2)


def test_one_expert_has_neither_router_nor_dispatch() -> None:
    one = changed(
        LAYER, path="continuous", execution="auto", num_moe_experts=1, expert_model_parallel_size=1
    )
    assert {kernel.part for kernel in kernels(one)} == {"expert GEMMs", "element-wise"}
    sharded = kernels(changed(one, expert_tensor_parallel_size=2))
    assert {kernel.part for kernel in sharded} == {"expert GEMMs", "element-wise", "dispatch"}
    assert not [kernel for kernel in sharded if kernel.name == "weighted sum"]
