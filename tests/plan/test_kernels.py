"""The time of a kernel by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vqmoe_megatron.plan.flops import Flops
from vqmoe_megatron.plan.hardware import GB, PROFILES, TERA
from vqmoe_megatron.plan.kernels import (
    PARTS,
    Kernel,
    ProductBytes,
    model_unit,
    moved,
    products,
    rows_of,
)

H100 = PROFILES["H100"]
ROUND = replace(
    H100,
    bf16_roof_flops_per_second=100 * TERA,
    fp32_roof_flops_per_second=10 * TERA,
    memory_roof_bytes_per_second=1000 * GB,
    launch_seconds=1e-6,
)


def kernel(unit: str, operations: int, read: int = 0, written: int = 0, launches: int = 0):
    return Kernel("search", "one", "forward", unit, operations, read, written, launches)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        (kernel("bf16_tensor_core", 100 * TERA), 1.0),
        (kernel("fp32_fma", 100 * TERA), 10.0),
        (kernel("bf16_tensor_core", 100 * TERA, 1500 * GB, 500 * GB), 2.0),  # bytes take longer
        (kernel("bandwidth", 0, 500 * GB, 250 * GB), 0.75),
        (kernel("fp32_fma", 10 * TERA, launches=500_000), 1.5),
    ],
)
def test_the_unit_that_it_runs_on_decides(group: Kernel, seconds: float) -> None:
    assert group.seconds(ROUND) == pytest.approx(seconds)
    assert group.times(3).seconds(ROUND) == pytest.approx(3 * seconds)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32", "copied"),
    [("H100", 800, 60, 3.0), ("H200", 790, 60, 4.3), ("CPU", 0.025, 0.025, 0.008)],
)
def test_roofs(name: str, bf16: float, fp32: float, copied: float) -> None:
    profile = PROFILES[name]
    assert profile.roof_flops_per_second("bf16_tensor_core") == pytest.approx(bf16 * TERA)
    assert profile.roof_flops_per_second("fp32_fma") == pytest.approx(fp32 * TERA)
    assert profile.memory_roof_bytes_per_second == pytest.approx(copied * TERA)
    for profile in PROFILES.values():
        for is_bf16, unit in ((True, "bf16_tensor_core"), (False, "fp32_fma")):
            peak = profile.peak_flops_per_second(is_bf16)
            assert 0 < profile.roof_flops_per_second(unit) < peak


def test_rows_say_by_what_they_are_bound() -> None:
    found = rows_of(
        [
            moved("element-wise", "norm", "forward", 100 * GB, 0),
            kernel("bf16_tensor_core", 100 * TERA, launches=250_000),
            kernel("fp32_fma", TERA, read=200 * GB),  # its bytes take longer than its operations
        ],
        ROUND,
    )
    assert [row.part for row in found] == ["search", "element-wise"]  # in the order of PARTS
    search = found[0]
    assert search.seconds_by_bound == pytest.approx(
        {"bf16_tensor_core": 1.0, "launches": 0.25, "bandwidth": 0.2}
    )
    assert search.kernel_seconds == pytest.approx((1.25, 0.2))
    assert search.seconds == pytest.approx(sum(search.seconds_by_bound.values()))
    assert len(set(PARTS)) == len(PARTS)


def test_a_linear_layer_forward_and_backward() -> None:
    """[5, 3] @ [3, 7] in bf16: 30 bytes of inputs, 70 of outputs, 21 weights."""
    flops = Flops(2 * 5 * 3 * 7, 4 * 5 * 3 * 7)
    forward, gradients, accumulation = products(
        "search", "one", "fp32_fma", flops, ProductBytes(30, 70, 21, 2)
    )
    assert (forward.read_bytes, forward.written_bytes) == (30 + 42, 70)
    # input gradient from outputs and weights, weight gradient from outputs and inputs
    assert (gradients.read_bytes, gradients.written_bytes) == (70 + 42 + 70 + 30, 30 + 42)
    # main gradients are fp32: read, added to, written
    assert (accumulation.read_bytes, accumulation.written_bytes) == (42 + 84, 84)
    assert (forward.operations, gradients.operations) == (210, 420)
    assert [k.launches for k in (forward, gradients, accumulation)] == [1, 2, 1]


def test_the_model_s_dtype_decides_the_unit() -> None:
    assert model_unit(2) == "bf16_tensor_core" and model_unit(4) == "fp32_fma"
