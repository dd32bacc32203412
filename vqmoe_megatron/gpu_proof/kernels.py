"""Part ``kernels``: each kernel's time, against torch's ways and the measured roofs of the card.

T tokens, D width, K codes, C codes per token, H hidden size, R rows of a table.

    search       2 T K D operations, against the roof of the unit that multiplies them; what the
                 product alone takes, in fp32 and in bf16, stands beside it
    combine      forward reads y and writes the result, backward reads the gradient and y and writes
                 that of y: bytes of [T, H] arrays, ids and the table once, against the copy
    segment sum  reads T rows and writes R, against the copy
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vqmoe_megatron.bench.bench_world import one_rank_world
from vqmoe_megatron.bench.timing import Action, Times, time_in_turns
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.discrete_share import measure_discrete_share
from vqmoe_megatron.gpu_proof.kernel_arms import (
    BF16,
    FP32,
    SEARCH_ARMS,
    SPLIT,
    kernels_missing,
    search_agreement,
    share_undecided,
    tuned_configuration,
)
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.roofs import Roofs, fp32_products, measure_roofs
from vqmoe_megatron.vq.combine import gather_scale_add, gather_scale_add_backward
from vqmoe_megatron.vq.segment_sum import segment_sum

# T, D, K; first the layer of recipes/scale/billion_64.yaml, then behind a projection of it.
SEARCHES = [
    (32768, 1024, 896), (32768, 64, 896), (8192, 1024, 896), (8192, 2048, 1920),
    (32768, 2048, 1920), (32768, 256, 512), (32768, 1024, 4096), (8192, 64, 16384),
]  # fmt: skip
TINY_SEARCHES = [(16, 16, 12)]
COMBINES = [(32768, 1024, 1, 896), (8192, 2048, 1, 1920), (32768, 1024, 8, 7168)]  # T, H, C, R
TINY_COMBINES = [(8, 16, 1, 12)]
CHECKED_TOKENS = 512
NUM_WARMUP = 3
SECONDS_PER_SIZE = 3.0  # with less left a size is not begun


def run(job: Job) -> None:
    """Measure the roofs, then each kernel. No communication."""
    num_repeats = 3 if job.is_tiny else 20
    with one_rank_world(), torch.no_grad(), fp32_products():
        roofs = measure_roofs(job.is_tiny, num_repeats)
        job.findings.figures |= roofs.figures
        job.say(
            f"roofs: bf16 {roofs.bf16_gemm_flops_per_second / 1e12:.1f} TFLOP/s, fp32 "
            f"{roofs.fp32_gemm_flops_per_second / 1e12:.2f} TFLOP/s, copy "
            f"{roofs.copy_bytes_per_second / 1e12:.3f} TB/s"
        )
        is_real = all(value > 0 for value in roofs.figures.values())
        job.check("the roofs were measured", is_real)
        for size in TINY_SEARCHES if job.is_tiny else SEARCHES:
            what = f"search T={size[0]} D={size[1]} K={size[2]}"
            if job.has_time(what, SECONDS_PER_SIZE):
                with attempt(job, what):
                    _time_search(job, size, roofs, num_repeats)
        what = "search, read and combine beside a top-1 layer"
        if job.has_time(what, SECONDS_PER_SIZE):
            with attempt(job, what):
                measure_discrete_share(job, num_repeats)
        for size in TINY_COMBINES if job.is_tiny else COMBINES:
            what = f"combine and segment sum T={size[0]} H={size[1]} C={size[2]} R={size[3]}"
            if job.has_time(what, SECONDS_PER_SIZE):
                with attempt(job, what):
                    _time_combine(job, size, roofs, num_repeats)
                    _time_segment_sum(job, size, roofs, num_repeats)


def _dtype(job: Job) -> torch.dtype:
    return torch.bfloat16 if job.device == "cuda" else torch.float32


def _draw(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    device = torch.cuda.current_device()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def _time_search(job: Job, size: tuple[int, int, int], roofs: Roofs, num_repeats: int) -> None:
    num_tokens, width, num_codes = size
    codes = _draw(1, torch.float32, num_codes, width)
    x = _draw(2, _dtype(job), num_tokens, width)
    what = f"search T={num_tokens} D={width} K={num_codes}"
    actions: dict[str, Action] = {}
    units: dict[str, str] = {}
    equal: dict[str, float] = {}
    missing = kernels_missing()
    for name, arm in SEARCH_ARMS.items():
        if arm.is_kernel and missing is not None:
            job.row("Kernels not run", kernel=f"{what} {name}", reason=missing)
            if job.device == "cuda":
                job.check(f"{what} {name}: runs", False, missing)
            continue
        found = search_agreement(arm.run, x[:CHECKED_TOKENS], codes)
        equal[name] = found.share_equal
        if arm.is_ours:
            job.check(f"{what} {name}: finds the nearest codes", found.num_wrong == 0)
        actions[name] = Action(lambda run=arm.run: run(x, codes))
        units[name] = arm.unit
    half, tokens = codes.bfloat16(), x.bfloat16()
    single = x.float()
    products = {"product alone, fp32": (FP32, lambda: single @ codes.t())}
    products["product alone, bf16"] = BF16, lambda: tokens @ half.t()
    for name, (unit, multiply) in products.items():
        actions[name], units[name] = Action(multiply), unit
    times = time_in_turns(actions, num_repeats, NUM_WARMUP)
    num_flops = 2 * num_tokens * num_codes * width
    fp32_roof_ms = 1e3 * num_flops / roofs.fp32_gemm_flops_per_second
    for name, one in times.items():
        roof = roofs.figures[f"{units[name]}_flops_per_second"]
        job.row(
            "Search",
            T=num_tokens,
            D=width,
            K=num_codes,
            arm=name,
            **_of(one),
            tflops=num_flops / one.median_ms / 1e9,
            roof=units[name],
            share_of_roof=num_flops / one.median_ms * 1e3 / roof,
            speed_over_fp32_roof=fp32_roof_ms / one.median_ms,
            share_of_ids_as_fp64=equal.get(name),
        )
    if SPLIT in times:
        job.row(
            "Search in split bf16 products",
            T=num_tokens,
            D=width,
            K=num_codes,
            share_undecided=share_undecided(x, codes),
            configuration=tuned_configuration(),
        )
    job.say(f"{what}: " + ", ".join(f"{n} {one.median_ms:.3f} ms" for n, one in times.items()))


def _time_combine(
    job: Job, size: tuple[int, int, int, int], roofs: Roofs, num_repeats: int
) -> None:
    num_tokens, hidden, num_slices, num_rows = size
    dtype = _dtype(job)
    table, y = _draw(1, dtype, num_rows, hidden), _draw(2, dtype, num_tokens, hidden)
    grad = _draw(3, dtype, num_tokens, hidden)
    p_continuous, p_discrete = _draw(4, dtype, num_tokens), _draw(5, dtype, num_tokens)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(num_rows, (num_tokens, num_slices), generator=generator).to(y.device)
    scale = num_slices**-0.5
    given = table, ids, scale, y, p_continuous, p_discrete

    def torch_forward() -> torch.Tensor:
        rows = table[ids].sum(dim=1) * scale
        return p_continuous[:, None] * y + p_discrete[:, None] * rows

    def torch_backward() -> tuple[torch.Tensor, ...]:
        rows = table[ids].sum(dim=1)
        products = (grad * y).sum(dim=1), (grad * rows).sum(dim=1) * scale
        return p_continuous[:, None] * grad, *products

    array, rest = y.numel() * y.element_size(), table.numel() * table.element_size()
    rest += ids.numel() * ids.element_size()
    passes: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
        "forward": (
            2 * array + rest,
            {"ours": lambda: gather_scale_add(*given), "torch": torch_forward},
        ),
        "backward": (
            3 * array + rest,
            {"ours": lambda: gather_scale_add_backward(grad, *given), "torch": torch_backward},
        ),
    }
    for pass_name, (num_bytes, ways) in passes.items():
        times = time_in_turns(
            {name: Action(run) for name, run in ways.items()}, num_repeats, NUM_WARMUP
        )
        for name, one in times.items():
            job.row(
                "Combine",
                T=num_tokens,
                H=hidden,
                C=num_slices,
                R=num_rows,
                arm=f"{pass_name}, {name}",
                **_of(one),
                **_of_copy(num_bytes, one, roofs),
            )
        job.say(f"combine {pass_name} {size}: " + _said(times))


def _time_segment_sum(
    job: Job, size: tuple[int, int, int, int], roofs: Roofs, num_repeats: int
) -> None:
    num_tokens, hidden, _, num_rows = size
    rows = _draw(1, _dtype(job), num_tokens, hidden)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(num_rows, (num_tokens,), generator=generator).to(rows.device)

    def index_add() -> torch.Tensor:
        total = torch.zeros(num_rows, hidden, dtype=torch.float32, device=rows.device)
        return total.index_add_(0, ids, rows.float())

    ways = {"segment_sum": lambda: segment_sum(rows, ids, num_rows), "torch index_add_": index_add}
    times = time_in_turns(
        {name: Action(run) for name, run in ways.items()}, num_repeats, NUM_WARMUP
    )
    num_bytes = rows.numel() * rows.element_size() + 4 * num_rows * hidden
    for name, one in times.items():
        copied = _of_copy(num_bytes, one, roofs)
        job.row("Segment sum", T=num_tokens, H=hidden, R=num_rows, arm=name, **_of(one), **copied)
    job.say(f"segment sum {size}: " + _said(times))


def _of(times: Times) -> dict[str, float]:
    return {"median_ms": times.median_ms, "p10_ms": times.p10_ms, "p90_ms": times.p90_ms}


def _of_copy(num_bytes: int, times: Times, roofs: Roofs) -> dict[str, float]:
    per_second = 1e3 * num_bytes / times.median_ms
    return {
        "least_bytes": num_bytes,
        "gb_per_second": per_second / 1e9,
        "share_of_copy": per_second / roofs.copy_bytes_per_second,
    }


def _said(times: dict[str, Times]) -> str:
    return ", ".join(f"{name} {one.median_ms:.3f} ms" for name, one in times.items())
