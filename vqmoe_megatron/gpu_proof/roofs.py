"""The roofs of this card, measured in the same process as what is held against them.

A roof is the best of several repeats: the most that this card did here and now, of

    bf16_gemm    a square bf16 product on tensor cores, FLOP/s
    fp32_gemm    a square fp32 product without TF32, that is on fused multiply-adds, FLOP/s
    copy         one large copy on the device, bytes read and written per second
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from vqmoe_megatron.bench.timing import Action, time_in_turns

NUM_WARMUP = 3


@dataclass(frozen=True)
class Roofs:
    """Of one device."""

    bf16_gemm_flops_per_second: float
    fp32_gemm_flops_per_second: float
    copy_bytes_per_second: float

    @property
    def figures(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def measure_roofs(is_tiny: bool, num_repeats: int) -> Roofs:
    """Measure them on the current device. No communication; about 3 GB of memory."""
    device = torch.cuda.current_device()
    size, num_bytes = (128, 1 << 20) if is_tiny else (8192, 1 << 30)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(size, size, generator=generator).to(device)  # zeros would run too fast
    half = drawn.bfloat16()
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    with fp32_products():
        times = time_in_turns(
            {
                "bf16": Action(lambda: half @ half),
                "fp32": Action(lambda: drawn @ drawn),
                "copy": Action(lambda: target.copy_(source)),
            },
            num_repeats,
            NUM_WARMUP,
        )
    per_second = {name: 1e3 / found.p10_ms for name, found in times.items()}
    return Roofs(
        bf16_gemm_flops_per_second=2 * size**3 * per_second["bf16"],
        fp32_gemm_flops_per_second=2 * size**3 * per_second["fp32"],
        copy_bytes_per_second=2 * num_bytes * per_second["copy"],
    )


class fp32_products:  # noqa: N801 (used as a context, like torch.no_grad)
    """Within, fp32 products are products of fp32 numbers: no TF32."""

    def __enter__(self) -> None:
        self._allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._allowed
