"""Codes cut for the search, on the GPU: :func:`split_codes` in four launches instead of forty.

C code slices, K codes per slice, D slice width. A search that takes a fifth of a millisecond cannot
wait for forty small kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vqmoe_megatron.vq.split_search import SplitCodes, bound_factors

BLOCK_K, BLOCK_D = 2, 256  # of one program


def split_codes_triton(codes: torch.Tensor, whole_tokens: bool) -> SplitCodes:
    """Return :func:`split_codes` of fp32 codes ``[C, K, D]`` on CUDA; norms are summed in fp64.

    No communication, no gradient, no host synchronisation.
    """
    num_slices, num_codes, width = codes.shape
    codes = codes.contiguous()
    mean = codes.mean(dim=1)
    from_mean = codes.new_empty(num_slices, num_codes)
    block_k = 128 if IS_INTERPRETED else BLOCK_K
    grid = triton.cdiv(num_codes, block_k), num_slices
    blocks = {"BLOCK_K": block_k, "BLOCK_D": BLOCK_D}
    _from_mean_kernel[grid](from_mean, codes, mean, num_codes, width, **blocks)
    most_central = from_mean.argmin(dim=1)
    centre = codes.new_empty(num_slices, 1, width)
    shifted = torch.empty_like(codes)
    high, low = (torch.empty_like(codes, dtype=torch.bfloat16) for _ in range(2))
    numbers = [codes.new_empty(num_slices, num_codes) for _ in range(4)]
    factors = bound_factors(width, whole_tokens)
    _split_kernel[grid](
        centre,
        shifted,
        high,
        low,
        *numbers,
        codes,
        most_central,
        num_codes,
        width,
        factors.high,
        factors.low,
        factors.rest,
        factors.code,
        factors.half_norm,
        factors.centre,
        factors.bias,
        IS_WHOLE=whole_tokens,
        FACTOR=FACTOR,
        **blocks,
    )
    return SplitCodes(centre, shifted, high, low, *numbers)


@triton.jit
def nearest_bf16(values, FACTOR: tl.constexpr):
    """fp32 values rounded to bf16, ties to even. The interpreter cuts off what ``to`` rounds, and
    multiplies no bf16: there FACTOR is float32."""
    if FACTOR == tl.bfloat16:
        rounded = values.to(tl.bfloat16)
    else:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = bits.to(tl.float32, bitcast=True)
    return rounded


@triton.jit
def _from_mean_kernel(
    out,  # fp32 [C, K]: squared distance of each code from the mean
    codes,  # fp32 [C, K, D]
    mean,  # fp32 [C, D]
    num_codes,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1).to(tl.int64)
    is_code = k < num_codes
    squares = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for d in range(0, width, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        is_column = column < width
        mask = is_code[:, None] & is_column[None, :]
        places = (c * num_codes + k[:, None]) * width + column[None, :]
        v = tl.load(codes + places, mask=mask, other=0.0)
        v = v - tl.load(mean + c * width + column, mask=is_column, other=0.0)[None, :]
        squares += tl.where(mask, v * v, 0.0)
    tl.store(out + c * num_codes + k, tl.sum(squares, axis=1), mask=is_code)


@triton.jit
def _split_kernel(
    centres,  # out, fp32 [C, 1, D]
    shifted,  # out, fp32 [C, K, D]
    high,  # out, bf16 [C, K, D], as low
    low,
    half_norms,  # out, fp32 [C, K], as the next three
    lower_bias,
    slope,
    offset,
    codes,  # fp32 [C, K, D]
    most_central,  # int64 [C]
    num_codes,
    width,
    of_high,  # the factors of the bounds
    of_low,
    of_rest,
    of_code,
    of_half_norm,
    of_centre,
    of_bias,
    IS_WHOLE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1).to(tl.int64)
    is_code = k < num_codes
    centre_row = (c * num_codes + tl.load(most_central + c)) * width
    v2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    high2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    low2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    rest2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    with_centre = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    centre2 = tl.zeros([BLOCK_D], tl.float64)
    for d in range(0, width, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        is_column = column < width
        mask = is_code[:, None] & is_column[None, :]
        places = (c * num_codes + k[:, None]) * width + column[None, :]
        centre = tl.load(codes + centre_row + column, mask=is_column, other=0.0)
        v = tl.load(codes + places, mask=mask, other=0.0)
        v = tl.where(mask, v - centre[None, :], 0.0)
        v_high = nearest_bf16(v, FACTOR)
        rest = v - v_high.to(tl.float32)
        v_low = nearest_bf16(rest, FACTOR)
        rest = rest - v_low.to(tl.float32)
        tl.store(shifted + places, v, mask=mask)
        tl.store(high + places, v_high.to(tl.bfloat16), mask=mask)
        tl.store(low + places, v_low.to(tl.bfloat16), mask=mask)
        if tl.program_id(0) == 0:
            tl.store(centres + c * width + column, centre, mask=is_column)
        v2 += v.to(tl.float64) * v.to(tl.float64)
        high2 += v_high.to(tl.float64) * v_high.to(tl.float64)
        low2 += v_low.to(tl.float64) * v_low.to(tl.float64)
        rest2 += rest.to(tl.float64) * rest.to(tl.float64)
        centre2 += centre.to(tl.float64) * centre.to(tl.float64)
        with_centre += v.to(tl.float64) * centre.to(tl.float64)[None, :]
    half_norm = tl.sum(v2, axis=1) * 0.5
    norm = tl.sqrt(tl.sum(v2, axis=1))
    bias = half_norm
    if IS_WHOLE:
        bias += tl.sum(with_centre, axis=1)
    of_parts = of_high * tl.sqrt(tl.sum(high2, axis=1)) + of_low * tl.sqrt(tl.sum(low2, axis=1))
    code_slope = of_parts + of_rest * tl.sqrt(tl.sum(rest2, axis=1)) + of_code * norm
    centre_norm = tl.sqrt(tl.sum(centre2, axis=0))
    code_offset = of_half_norm * half_norm + of_centre * centre_norm * norm + of_bias * tl.abs(bias)
    place = c * num_codes + k
    rounded = half_norm.to(tl.float32)
    # What fp32 cannot hold the fp32 kernel takes for infinitely far away.
    lower = tl.where(rounded == float("inf"), float("inf"), (bias - code_offset).to(tl.float32))
    tl.store(half_norms + place, rounded, mask=is_code)
    tl.store(lower_bias + place, lower, mask=is_code)
    tl.store(slope + place, code_slope.to(tl.float32), mask=is_code)
    tl.store(offset + place, code_offset.to(tl.float32), mask=is_code)


IS_INTERPRETED = not isinstance(_split_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
FACTOR = tl.float32 if IS_INTERPRETED else tl.bfloat16
