"""Every kernel against its reference: searches in fp64, the combine and its gradients, sums.

T tokens, D width, K codes, C codes per token, H hidden size, R rows of a table.

On a CPU Triton's interpreter runs the same kernels.
"""

from __future__ import annotations

from itertools import product

import torch

from vqmoe_megatron.bench.gate import relative_difference
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.kernel_arms import (
    EXACT,
    SEARCH_ARMS,
    SPLIT,
    kernels_missing,
    search_agreement,
    share_undecided,
)
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.search_cases import CASES
from vqmoe_megatron.vq.combine import gather_scale_add, gather_scale_add_backward
from vqmoe_megatron.vq.segment_sum import segment_sum

SEARCHES = [(512, 64, 64), (1000, 96, 300), (4096, 1024, 896), (777, 2048, 4096)]  # T, D, K
TINY_SEARCHES = [(24, 16, 20), (17, 40, 33)]
HARD, HARD_TINY = (2048, 896, 256), (24, 20, 40)  # T, K, D
MOST_EXCESS = 1e-5  # near ties: fp32 cannot tell them apart
COMBINES = [(1000, 1024, 1, 896), (777, 320, 8, 512)]  # T, H, C, R
TINY_COMBINES = [(18, 24, 1, 12), (9, 40, 3, 12)]
DTYPES = (torch.float32, torch.bfloat16)
SUM_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a result is rounded once
GRADIENT_NAMES = ("y_continuous", "p_continuous", "p_discrete")


def check_kernels(job: Job) -> None:
    """Check them all on the current device. No communication."""
    missing = kernels_missing()
    if missing is not None and job.device == "cuda":
        job.check("Triton kernels can run", False, missing)
    elif missing is not None:
        job.row("Kernels not run", kernel="all of Triton's", reason=missing)
    job.say("kernels against their references")
    _check_searches(job, missing is None)
    if missing is None:
        check_hard_searches(job)
        _check_combine(job)
    _check_segment_sum(job)


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(torch.cuda.current_device())


def _check_searches(job: Job, has_kernels: bool) -> None:
    for (num_tokens, width, num_codes), dtype in product(
        TINY_SEARCHES if job.is_tiny else SEARCHES, DTYPES
    ):
        generator = torch.Generator().manual_seed(num_codes)
        codes = _draw(generator, num_codes, width) + 3.0  # a large common part, as in a model
        x = (_draw(generator, num_tokens, width) + 3.0).to(dtype)
        for name, arm in SEARCH_ARMS.items():
            if not arm.is_ours or (arm.is_kernel and not has_kernels):
                continue
            what = f"search {name}, {_short(dtype)}, T={num_tokens} D={width} K={num_codes}"
            if not job.has_time(what):
                continue
            with attempt(job, what):
                found = search_agreement(arm.run, x, codes)
                text = f"{found.share_equal:.4%} of all ids equal"
                job.check(f"{what}: clearly nearest codes found", found.num_wrong == 0, text)
                job.within(f"{what}: near ties", found.worst_excess, MOST_EXCESS)


def check_hard_searches(job: Job) -> None:
    """The search in split products finds the fp32 kernel's ids, bit for bit, where it is hard."""
    sizes = HARD_TINY if job.is_tiny else HARD
    for (name, case), dtype in product(CASES.items(), DTYPES):
        what = f"split search, {name}, {_short(dtype)}: the fp32 kernel's ids"
        if not job.has_time(what):
            continue
        with attempt(job, what):
            x, codes = case(*sizes, torch.Generator().manual_seed(1))
            device = torch.cuda.current_device()
            x, codes = x.to(device=device, dtype=dtype), codes.to(device)
            found, expected = (SEARCH_ARMS[arm].run(x, codes) for arm in (SPLIT, EXACT))
            num_wrong = int((found != expected).sum())
            undecided = share_undecided(x, codes)
            text = f"{num_wrong} of {len(found)} differ; {undecided:.2%} undecided"
            job.check(what, num_wrong == 0, text)


def _check_combine(job: Job) -> None:
    for (num_tokens, hidden, num_slices, num_rows), dtype, has_y in product(
        TINY_COMBINES if job.is_tiny else COMBINES, DTYPES, (True, False)
    ):
        generator = torch.Generator().manual_seed(hidden)
        table = _draw(generator, num_rows, hidden).to(dtype)
        grad = _draw(generator, num_tokens, hidden).to(dtype)
        ids = torch.randint(num_rows, (num_tokens, num_slices), generator=generator)
        ids = ids.to(table.device)
        p_discrete = _draw(generator, num_tokens).to(dtype)
        y = _draw(generator, num_tokens, hidden).to(dtype) if has_y else None
        p_continuous = _draw(generator, num_tokens).to(dtype) if has_y else None
        what = f"combine, {_short(dtype)}, T={num_tokens} H={hidden} C={num_slices}"
        what += "" if has_y else ", table alone"
        if job.has_time(what):
            with attempt(job, what):
                given = ids, num_slices**-0.5, y, p_continuous, p_discrete
                _compare_combine(job, what, grad, table, *given)


def _compare_combine(
    job: Job,
    what: str,
    grad: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    *terms: torch.Tensor | None,
) -> None:
    """Hold the kernels against plain torch in fp64; ``terms``: y_continuous and the weights."""
    from vqmoe_megatron.vq.combine_triton import (
        gather_scale_add_backward_triton,
        gather_scale_add_triton,
    )

    limit = SUM_LIMIT[table.dtype]
    exact = [None if term is None else term.double() for term in terms]
    found = gather_scale_add_triton(table, ids, scale, *terms, table.dtype)
    expected = gather_scale_add(table.double(), ids, scale, *exact)
    job.within(f"{what}: forward", relative_difference(found.double(), expected), limit)
    gradients = gather_scale_add_backward_triton(grad, table, ids, scale, *terms)
    wanted = gather_scale_add_backward(grad.double(), table.double(), ids, scale, *exact)
    for name, one, other in zip(GRADIENT_NAMES, gradients, wanted, strict=True):
        if other is not None:
            difference = relative_difference(one.double(), other)
            job.within(f"{what}: gradient of {name}", difference, limit)


def _check_segment_sum(job: Job) -> None:
    for (num_tokens, hidden, _, num_rows), dtype in product(
        TINY_COMBINES if job.is_tiny else COMBINES, DTYPES
    ):
        generator = torch.Generator().manual_seed(num_rows)
        rows = _draw(generator, num_tokens, hidden).to(dtype)
        ids = torch.randint(num_rows, (num_tokens,), generator=generator).to(rows.device)
        what = f"segment sum, {_short(dtype)}, T={num_tokens} H={hidden} R={num_rows}"
        with attempt(job, what):
            found = segment_sum(rows, ids, num_rows)
            expected = found.new_zeros(found.shape, dtype=torch.float64)
            expected.index_add_(0, ids, rows.double())
            difference = relative_difference(found.double(), expected)
            job.within(f"{what}: equals fp64", difference, SUM_LIMIT[torch.float32])
            again = torch.equal(found, segment_sum(rows, ids, num_rows))
            job.check(f"{what}: the same bits again", again)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
