"""Every kernel compiles for an NVIDIA GPU of the Hopper generation; none is needed for that.

The interpreter runs code that the compiler refuses, and knows neither registers nor shared memory.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not importable")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vqmoe_megatron.vq import combine_triton, search_triton  # noqa: E402

pytestmark = pytest.mark.skipif(
    search_triton.IS_INTERPRETED, reason="TRITON_INTERPRET is set in this process"
)

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 227 << 10  # that one block may use on an H100 or H200
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
Kind = torch.dtype | str | int | float | None


def compiled(kernel: triton.JITFunction, kinds: dict[str, Kind], **options: int):  # noqa: ANN201
    """Compile with a pointer for each dtype, an ``i32`` or ``fp32``, or the constant given.

    Pointers and integers are multiples of 16, as tensors and their sizes mostly are.
    """
    positions = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    assert set(kinds) == set(positions)
    signature, constants, attributes = {}, {}, {}
    for name in kernel.arg_names:
        kind = kinds[name]
        if isinstance(kind, torch.dtype):
            signature[name] = f"*{NAMES[kind]}"
        elif kind in ("i32", "fp32"):
            signature[name] = kind
        else:
            signature[name] = "constexpr"
            constants[positions[name]] = kind
        if isinstance(kind, torch.dtype) or kind == "i32":
            attributes[positions[name]] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=HOPPER, options={**options, "enable_fp_fusion": True})
    assert result.metadata.shared <= SHARED_MEMORY_BYTES
    assert result.asm["cubin"]
    return result


@pytest.fixture(autouse=True)
def no_cached_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_search(config: triton.Config, precision: str, dtype: torch.dtype):  # noqa: ANN201
    kinds: dict[str, Kind] = dict.fromkeys(search_triton._nearest_kernel.arg_names, "i32")
    kinds |= {"found": torch.int64, "x": dtype, "x_stride_column": 1}
    kinds |= dict.fromkeys(("centres", "codes", "half_norms"), torch.float32)
    kinds |= {"DOT_PRECISION": precision, "BLOCK_D": search_triton.BLOCK_D, **config.kwargs}
    return compiled(
        search_triton._nearest_kernel,
        kinds,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_search_adds_in_the_order_of_the_columns(index: int, dtype: torch.dtype) -> None:
    config = search_triton.CONFIGS[index]
    ptx = compiled_search(config, "ieee", dtype).asm["ptx"]
    assert "mma" not in ptx  # no tensor cores, which round
    steps = re.findall(r"fma\.rn\.f32\s+(%\w+), %\w+, %\w+, (%\w+);", ptx)
    earlier: set[str] = set()
    num_chains = 0
    for result, addend in steps:
        num_chains += addend not in earlier
        earlier.add(result)
    num_distances = config.kwargs["BLOCK_T"] * config.kwargs["BLOCK_K"] // (32 * config.num_warps)
    assert num_chains == num_distances  # of one thread, each distance one chain
    assert len(steps) == num_distances * search_triton.BLOCK_D


@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
def test_fast_search_uses_the_tensor_cores(precision: str) -> None:
    ptx = compiled_search(search_triton.CONFIGS[0], precision, torch.bfloat16).asm["ptx"]
    assert "wgmma.mma_async" in ptx


@pytest.mark.parametrize("with_rest", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_combine(direction: str, with_rest: bool) -> None:
    kernel = getattr(combine_triton, f"_{direction}_kernel")
    kinds: dict[str, Kind] = dict.fromkeys(kernel.arg_names, "i32")
    rest = ["y", "p_continuous", *(["grad_y", "grad_p_continuous"] * (direction == "backward"))]
    for name in rest:
        kinds[name] = torch.bfloat16 if name.endswith("y") else torch.float32
        if not with_rest:
            kinds[name] = None
    kinds |= {"table": torch.float32, "ids": torch.int64, "scale": "fp32"}
    if direction == "forward":
        kinds |= {"out": torch.bfloat16, "p_discrete": torch.float32}
    else:
        kinds |= {"grad": torch.bfloat16, "grad_p_discrete": torch.float32}
    kinds |= {"num_codes": 1, "BLOCK_T": 2, "BLOCK_H": 1024}
    ptx = compiled(kernel, kinds, num_warps=4, num_stages=3).asm["ptx"]
    assert re.search(r"ld\.global\.v4", ptx)  # 16 bytes at a time
