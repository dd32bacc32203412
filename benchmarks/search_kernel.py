"""The nearest-code search on the GPU: the Triton kernel, torch.cdist + argmin, and a plain GEMM.

    python benchmarks/search_kernel.py --json benchmarks/search_kernel.json

T tokens, D width, K codes. Every arm gets the same tokens and codes, and the arms take turns, so
that clocks and temperature meet all of them. A GEMM of [T, D] by [D, K] is the least that a search
through products can cost: the fp32 one is the ceiling of ``triton_ieee``, that in tf32 the ceiling
of the fast modes. Before anything is timed, the ids of each arm are held against distances in fp64.

Exits 2 on a machine without CUDA or Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vqmoe_megatron.bench.origin import origin  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


TOKENS, WIDTHS, CODES = [8192, 32768], [64, 256, 1024, 2048], [64, 512, 4096, 16384]
NUM_WARMUP = 3
EXACT_ARMS = ("triton_ieee", "cdist_argmin")
CHECKED_TOKENS = 512
Arm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> int:
    """Measure, print and write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--turns", type=int, default=20, help="timed calls of each arm")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--codes", type=int, nargs="+", default=CODES)
    parser.add_argument("--token-dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        print(
            "benchmarks/search_kernel.py times a GPU kernel and needs a CUDA device and triton; "
            "there is none here, nothing was measured",
            file=sys.stderr,
        )
        return 2
    rows = []
    for num_tokens in arguments.tokens:
        for width in arguments.widths:
            for num_codes in arguments.codes:
                size = num_tokens, width, num_codes
                rows += measure(*size, getattr(torch, arguments.token_dtype), arguments.turns)
                for row in rows[-len(arms()) :]:
                    print(json.dumps(row), flush=True)
    device = torch.cuda.get_device_properties(0)
    result = {
        **origin(),
        "gpu": {"name": device.name, "multiprocessors": device.multi_processor_count},
        "triton": importlib.import_module("triton").__version__,
        "turns": arguments.turns,
        "rows": rows,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def arms() -> dict[str, Arm]:
    """Every way of searching by name, and the two products that bound them."""
    from vqmoe_megatron.vq.search_triton import DOT_PRECISIONS, nearest_code_triton

    def kernel(precision: str) -> Arm:
        return lambda x, codes: nearest_code_triton(x, codes, dot_precision=precision)

    def product(allow_tf32: bool) -> Arm:
        def multiply(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
            torch.backends.cuda.matmul.allow_tf32 = allow_tf32
            result = x.float() @ codes.t()
            torch.backends.cuda.matmul.allow_tf32 = False
            return result

        return multiply

    return {
        **{f"triton_{precision}": kernel(precision) for precision in DOT_PRECISIONS},
        "cdist_argmin": lambda x, codes: torch.cdist(x.float(), codes).argmin(dim=1),
        "gemm_fp32": product(allow_tf32=False),
        "gemm_tf32": product(allow_tf32=True),
    }


def measure(
    num_tokens: int, width: int, num_codes: int, dtype: torch.dtype, turns: int
) -> list[dict[str, Any]]:
    """Return one row per arm for one size."""
    generator = torch.Generator("cuda").manual_seed(0)
    codes = torch.randn(num_codes, width, generator=generator, device="cuda")
    x = torch.randn(num_tokens, width, generator=generator, device="cuda").to(dtype)
    shares = check_ids(x, codes)
    all_times_ms: dict[str, list[float]] = {name: [] for name in arms()}
    peaks_bytes: dict[str, int] = {}
    for turn in range(NUM_WARMUP + turns):
        for name, arm in arms().items():
            torch.cuda.reset_peak_memory_stats()
            before_bytes = torch.cuda.memory_allocated()
            time_ms = timed_ms(arm, x, codes)
            peaks_bytes[name] = torch.cuda.max_memory_allocated() - before_bytes
            if turn >= NUM_WARMUP:
                all_times_ms[name].append(time_ms)
    num_flops = 2 * num_tokens * num_codes * width
    rows = []
    for name, times_ms in all_times_ms.items():
        deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
        median_ms = statistics.median(times_ms)
        rows.append(
            {
                "arm": name,
                "num_tokens": num_tokens,
                "width": width,
                "num_codes": num_codes,
                "token_dtype": str(dtype).removeprefix("torch."),
                "median_ms": median_ms,
                "p10_ms": deciles[0],
                "p90_ms": deciles[-1],
                "tflops": num_flops / median_ms / 1e9,
                "peak_bytes": peaks_bytes[name],
                "share_of_ids_as_fp64": shares.get(name),
            }
        )
    return rows


def timed_ms(arm: Arm, x: torch.Tensor, codes: torch.Tensor) -> float:
    """Return the time of one call on the device, launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    arm(x, codes)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def check_ids(x: torch.Tensor, codes: torch.Tensor) -> dict[str, float]:
    """Return each search's share of ids equal to fp64 on some tokens; exact arms must have all.

    Tokens whose two nearest codes lie closer than fp32 can tell are left out.
    """
    x = x[:CHECKED_TOKENS]
    doubles = codes.double()
    distances = doubles.square().sum(dim=1) * 0.5 - x.double() @ doubles.t()
    least = distances.topk(2, dim=1, largest=False)
    clear = least.values[:, 1] - least.values[:, 0] > 1e-5 * codes.shape[1]
    wanted = least.indices[:, 0]
    shares = {}
    for name, arm in arms().items():
        if name.startswith("gemm"):
            continue
        shares[name] = (arm(x, codes) == wanted)[clear].double().mean().item()
        if name in EXACT_ARMS and shares[name] < 1:
            raise ValueError(
                f"{name} finds {shares[name]:.4%} of the nearest codes at T={len(x)}, "
                f"D={codes.shape[1]}, K={codes.shape[0]}; its times would mean nothing"
            )
    return shares


if __name__ == "__main__":
    sys.exit(main())
