"""Divisibility rules and the equations they are reported as."""

from __future__ import annotations

from collections.abc import Iterator

GEMM_BYTES = 16  # torch's grouped_mm refuses strides that are no multiple of it, on every device


def remainder(name: str, value: int, divisor: str, size: int, advice: str) -> Iterator[str]:
    """Yield ``name % divisor != 0`` with its numbers, unless ``size`` divides ``value``."""
    if value % size:
        yield f"{name} % {divisor} != 0: {value} % {size} = {value % size}; {advice}"


def expert_width_errors(
    hidden_size: int, moe_ffn_hidden_size: int, element_bytes: int, etp: int = 1
) -> Iterator[str]:
    """Yield what keeps experts of these widths, cut over ``etp`` ranks, from the grouped GEMM."""
    aligned = GEMM_BYTES // element_bytes
    yield from remainder(
        "hidden_size",
        hidden_size,
        str(aligned),
        aligned,
        f"the experts' grouped GEMM takes rows of a multiple of {GEMM_BYTES} bytes",
    )
    yield from remainder(
        "moe_ffn_hidden_size",
        moe_ffn_hidden_size,
        f"(ETP * {aligned} = {etp} * {aligned})",
        etp * aligned,
        "every expert-tensor-parallel rank holds an equal share, and the grouped GEMM takes shares "
        f"of a multiple of {GEMM_BYTES} bytes",
    )
