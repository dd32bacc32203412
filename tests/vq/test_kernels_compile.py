"""Every kernel compiles for an NVIDIA GPU of the Hopper generation; none is needed for that.

The interpreter runs code that the compiler refuses, and knows neither registers nor shared memory.
What each kernel takes of both is printed (``pytest -rP``).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not importable")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vqmoe_megatron.vq import (  # noqa: E402
    codes_triton,
    combine_triton,
    losses_triton,
    search_triton,
    split_search_triton,
)

pytestmark = pytest.mark.skipif(
    codes_triton.IS_INTERPRETED, reason="TRITON_INTERPRET is set in this process"
)

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 227 << 10  # that one block may use on an H100 or H200
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}
MAX_REGISTERS = 255  # the compiler never takes more, and spills to the stack what is left
MAX_STACK_BYTES = 160
CODE_BLOCKS = {"BLOCK_K": codes_triton.BLOCK_K, "BLOCK_D": codes_triton.BLOCK_D}
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
    registers, stack_bytes = resources(result.asm["cubin"])
    print(
        f"{kernel.__name__}: {registers} registers, {stack_bytes} bytes of stack, "
        f"{result.metadata.shared} bytes of shared memory"
    )
    assert registers <= MAX_REGISTERS and stack_bytes <= MAX_STACK_BYTES
    return result


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of stack that it spills to, by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK"))


@pytest.fixture(autouse=True)
def no_cached_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_search(config: triton.Config, dtype: torch.dtype):  # noqa: ANN201
    kernel = search_triton._nearest_kernel
    kinds: dict[str, Kind] = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= {"found": torch.int64, "x": dtype, "x_stride_column": 1}
    kinds |= {"lists": torch.int32, "counts": torch.int32}
    kinds |= dict.fromkeys(("centres", "codes", "half_norms"), torch.float32)
    kinds |= {"CHAIN": search_triton.CHAIN, **config.kwargs}
    return compiled(kernel, kinds, num_warps=config.num_warps, num_stages=config.num_stages)


def compiled_bounds(config: triton.Config, dtype: torch.dtype):  # noqa: ANN201
    kernel = split_search_triton._bounds_kernel
    kinds: dict[str, Kind] = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= {"x": dtype, "x_stride_column": 1, "lowest_ids": torch.int32}
    floats = ("lowest", "second", "norms", "centres", "lower_bias", "slope")
    kinds |= dict.fromkeys(floats, torch.float32)
    kinds |= dict.fromkeys(("high", "low"), torch.bfloat16)
    kinds |= {"IS_WHOLE": dtype == torch.bfloat16, "FACTOR": tl.bfloat16}
    kinds |= {"BLOCK_D": split_search_triton.BLOCK_D, **config.kwargs}
    return compiled(kernel, kinds, num_warps=config.num_warps, num_stages=config.num_stages)


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_search_adds_in_the_order_of_the_columns(index: int, dtype: torch.dtype) -> None:
    config = search_triton.CONFIGS[index]
    ptx = compiled_search(config, dtype).asm["ptx"]
    assert "mma" not in ptx  # no tensor cores, which round
    steps = re.findall(r"fma\.rn\.f32\s+(%\w+), %\w+, %\w+, (%\w+);", ptx)
    earlier: set[str] = set()
    num_chains = 0
    for result, addend in steps:
        num_chains += addend not in earlier
        earlier.add(result)
    num_distances = config.kwargs["BLOCK_T"] * config.kwargs["BLOCK_K"] // (32 * config.num_warps)
    assert num_chains == num_distances  # of one thread, each distance one chain
    assert len(steps) == num_distances * (2 * search_triton.CHAIN - 1)  # the first multiplies


@pytest.mark.parametrize("index", range(len(split_search_triton.CONFIGS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_search_multiplies_bf16_on_tensor_cores(index: int, dtype: torch.dtype) -> None:
    ptx = compiled_bounds(split_search_triton.CONFIGS[index], dtype).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64" in ptx
    assert ".f32.bf16.bf16" in ptx
    assert not re.search(r"f32\.tf32", ptx)


@pytest.mark.parametrize("whole", [True, False])
def test_the_kernels_that_cut_codes(whole: bool) -> None:
    from_mean, split = codes_triton._from_mean_kernel, codes_triton._split_kernel
    kinds: dict[str, Kind] = dict.fromkeys(from_mean.arg_names, "i32")
    kinds |= dict.fromkeys(("out", "codes", "mean"), torch.float32) | CODE_BLOCKS
    compiled(from_mean, kinds, num_warps=4, num_stages=3)
    kinds = dict.fromkeys(split.arg_names, "fp32") | {"num_codes": "i32", "width": "i32"}
    floats = ("centres", "shifted", "half_norms", "lower_bias", "slope", "offset", "codes")
    kinds |= dict.fromkeys(floats, torch.float32) | {"most_central": torch.int64}
    kinds |= {"high": torch.bfloat16, "low": torch.bfloat16}
    kinds |= {"IS_WHOLE": whole, "FACTOR": tl.bfloat16, **CODE_BLOCKS}
    compiled(split, kinds, num_warps=4, num_stages=3)


def test_the_small_kernels_of_the_split_search() -> None:
    norms, decide = split_search_triton._norms_kernel, split_search_triton._decide_kernel
    kinds: dict[str, Kind] = dict.fromkeys(norms.arg_names, "i32")
    kinds |= {"norms": torch.float32, "centres": torch.float32, "x": torch.bfloat16}
    kinds |= {"x_stride_column": 1, "IS_WHOLE": True, "BLOCK_T": 16, "BLOCK_D": 64}
    compiled(norms, kinds, num_warps=4, num_stages=3)
    kinds = dict.fromkeys(decide.arg_names, "i32")
    floats = ("lowest", "second", "norms", "slope", "offset")
    kinds |= {"found": torch.int64, **dict.fromkeys(floats, torch.float32)}
    kinds |= dict.fromkeys(("lists", "counts", "lowest_ids"), torch.int32)
    kinds |= {"UNDERFLOW": 2.0**-100, "UNDECIDED": 2**63 - 1, "BLOCK_T": 256}
    compiled(decide, kinds, num_warps=4, num_stages=3)


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


@pytest.mark.parametrize("name", ["_error_kernel", "_gradient_kernel"])
def test_losses(name: str) -> None:
    kernel = getattr(losses_triton, name)
    kinds: dict[str, Kind] = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= {"x": torch.bfloat16, "vectors": torch.float32, "ids": torch.int64}
    kinds |= {"BLOCK_T": 2, "BLOCK_D": 1024}
    if name == "_error_kernel":
        kinds |= {"sums": torch.float32}
    else:
        kinds |= {"dx": torch.bfloat16, "at_loss": torch.float32, "factor": "fp32"}
    ptx = compiled(kernel, kinds, num_warps=4, num_stages=3).asm["ptx"]
    assert re.search(r"ld\.global\.v4", ptx)  # 16 bytes at a time
