"""Nearest-code search on the GPU's tensor cores, with the ids of the fp32 kernel.

T tokens, H hidden size, C code slices, K codes per slice, D = H / C slice width, S pieces of K.

split_search.py says what is computed and why it proves anything. Four kernels behind those that
cut the codes (codes_triton.py), none of which makes the host wait, and no [T, K] array:

1. the norm of every token, of what of it is multiplied: [C, T];
2. bf16 products with both parts of the codes; of every token's lower bounds the smallest, its code,
   and the second smallest, in each of S pieces of the codes: 3 x [S, C, T];
3. a token whose smallest upper bound lies under its second smallest lower bound is decided; all
   others go on a list, in no fixed order;
4. the listed tokens are searched in fp32 (search_triton.py), with a grid that does not know how
   many they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vqmoe_megatron.vq.codes_triton import (
    FACTOR,
    IS_INTERPRETED,
    nearest_bf16,
    split_codes_triton,
)
from vqmoe_megatron.vq.search_triton import (
    INDEX_MASK,
    UNDECIDED,
    check_search,
    num_programs,
    search_listed,
)
from vqmoe_megatron.vq.split_search import (
    BLOCK_D,
    UNDERFLOW,
    SplitCodes,
    takes_whole,
)

DECIDED_TOKENS = 256  # of one program
TYPICAL_BLOCK = 128  # of tokens or of codes, to count programs before the autotuner has chosen
CONFIGS = [  # at least 64 tokens: below, tensor cores work with other instructions
    triton.Config({"BLOCK_T": block_t, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_t, block_k, warps, stages in [
        (64, 64, 4, 4),
        (64, 128, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
    ]
]


def nearest_code_split(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest code of every token, as ``nearest_code_triton`` does.

    Args:
        x: ``[T, H]`` fp32, fp16 or bf16 on CUDA, any strides; bf16 takes two products, others
            three.
        codes: ``[K, H]``, or ``[C, K, H / C]`` for product codes; fp32, fp16 or bf16.

    Returns:
        int64 ``[T]`` for ``[K, H]`` codes, int64 ``[T, C]`` for ``[C, K, H / C]``: the ids of
        ``nearest_code_triton``, bit for bit.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit.

    No communication and no gradient. The first call for a size (rounded up to powers of two) times
    the configurations and synchronises with the device; later calls do not.
    """
    if codes.dim() == 2:
        return nearest_code_split(x, codes.unsqueeze(0)).squeeze(1)
    check_search(x, codes)
    with torch.no_grad(), torch.cuda.device_of(x):
        split = split_codes_triton(codes.float(), takes_whole(x.dtype))
        found, lists, counts = decide(x, split)
        if x.shape[0]:
            search_listed(found, x, split, lists, counts)
        return found.bitwise_and_(INDEX_MASK)


def decide(x: torch.Tensor, split: SplitCodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the nearest code of every token for which products of bf16 prove it.

    Returns:
        int64 ``[T, C]`` ids, :data:`UNDECIDED` for the others, which are listed: int32 ``[C, T]``,
        of which the first ``counts``, int32 ``[C]``, are meant.
    """
    num_tokens, whole = x.shape[0], takes_whole(x.dtype)
    num_slices, num_codes, width = split.high.shape
    device = x.device
    found = torch.empty(num_tokens, num_slices, dtype=torch.int64, device=device)
    lists = torch.empty(num_slices, num_tokens, dtype=torch.int32, device=device)
    counts = torch.zeros(num_slices, dtype=torch.int32, device=device)
    if num_tokens == 0:
        return found, lists, counts
    norms = torch.empty(num_slices, num_tokens, dtype=torch.float32, device=device)
    num_pieces = _num_pieces(num_tokens, num_slices, num_codes, device)
    shape = num_pieces, num_slices, num_tokens
    lowest, second = torch.empty(2, *shape, dtype=torch.float32, device=device).unbind()
    lowest_ids = torch.empty(shape, dtype=torch.int32, device=device)
    tokens = x, x.stride(0), x.stride(1), split.centre
    _norms_kernel[(triton.cdiv(num_tokens, 16), num_slices)](
        norms, *tokens, num_tokens, width, IS_WHOLE=whole, BLOCK_T=16, BLOCK_D=BLOCK_D
    )
    choice = {"BLOCK_T": 16, "BLOCK_K": 16} if IS_INTERPRETED else {}

    def grid(meta: dict) -> tuple[int, int, int]:
        return triton.cdiv(num_tokens, meta["BLOCK_T"]), num_slices, num_pieces

    (_bounds_kernel if IS_INTERPRETED else _tuned_kernel)[grid](
        lowest,
        second,
        lowest_ids,
        norms,
        *tokens,
        split.high,
        split.low,
        split.lower_bias,
        split.slope,
        num_tokens,
        num_codes,
        width,
        triton.cdiv(num_codes, num_pieces),
        triton.next_power_of_2(num_codes),
        triton.next_power_of_2(width),
        IS_WHOLE=whole,
        FACTOR=FACTOR,
        BLOCK_D=BLOCK_D,
        **choice,
    )
    _decide_kernel[(triton.cdiv(num_tokens, DECIDED_TOKENS), num_slices)](
        found,
        lists,
        counts,
        lowest,
        second,
        lowest_ids,
        norms,
        split.slope,
        split.offset,
        num_tokens,
        num_codes,
        num_pieces,
        UNDERFLOW=UNDERFLOW,
        UNDECIDED=UNDECIDED,
        BLOCK_T=DECIDED_TOKENS,
    )
    return found, lists, counts


def _num_pieces(num_tokens: int, num_slices: int, num_codes: int, device: torch.device) -> int:
    """Pieces of the codes that give every multiprocessor work when the tokens alone do not."""
    block = 16 if IS_INTERPRETED else TYPICAL_BLOCK
    programs = triton.cdiv(num_tokens, block) * num_slices
    wanted = triton.cdiv(num_programs(device), programs)
    wanted = max(1, min(wanted, triton.cdiv(num_codes, block)))
    return triton.cdiv(num_codes, triton.cdiv(num_codes, wanted))  # none of them empty


@triton.jit
def _rows(
    x, x_stride_column, centre, d, tokens_mask, width, IS_WHOLE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_D columns of the tokens ``x`` points to: as they are, or fp32 minus the centre."""
    column = d + tl.arange(0, BLOCK_D)
    is_column = column < width
    rows = tl.load(
        x + column[None, :].to(tl.int64) * x_stride_column,
        mask=tokens_mask[:, None] & is_column[None, :],
        other=0.0,
    )
    if not IS_WHOLE:
        shift = tl.load(centre + column, mask=is_column, other=0.0)
        rows = rows.to(tl.float32) - shift[None, :]
    return rows


@triton.jit(do_not_specialize=["num_tokens"])
def _norms_kernel(
    norms,  # out, fp32 [C, T]
    x,  # [T, C * D]
    x_stride_token,
    x_stride_column,
    centres,  # fp32 [C, D]
    num_tokens,
    width,
    IS_WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64)
    is_token = tokens < num_tokens
    x_rows = x + tokens[:, None] * x_stride_token + c * width * x_stride_column
    squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for d in range(0, width, BLOCK_D):
        rows = _rows(
            x_rows, x_stride_column, centres + c * width, d, is_token, width, IS_WHOLE, BLOCK_D
        ).to(tl.float32)
        squares += rows * rows
    tl.store(norms + c * num_tokens + tokens, tl.sqrt(tl.sum(squares, axis=1)), mask=is_token)


@triton.jit(do_not_specialize=["num_tokens", "piece_codes", "codes_class", "width_class"])
def _bounds_kernel(
    lowest,  # out, fp32 [S, C, T]: the smallest lower bound of a piece
    second,  # out, fp32 [S, C, T]: the second smallest
    lowest_ids,  # out, int32 [S, C, T]: the code of the smallest
    norms,  # fp32 [C, T]
    x,  # [T, C * D]
    x_stride_token,
    x_stride_column,
    centres,  # fp32 [C, D]
    high,  # bf16 [C, K, D]
    low,  # bf16 [C, K, D]
    lower_bias,  # fp32 [C, K]
    slope,  # fp32 [C, K]
    num_tokens,
    num_codes,
    width,
    piece_codes,
    codes_class,  # num_codes and width rounded up, for the autotuner's key alone
    width_class,
    IS_WHOLE: tl.constexpr,
    FACTOR: tl.constexpr,  # bfloat16; the interpreter multiplies that only as float32
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64)
    num_slices = tl.num_programs(1)
    is_token = tokens < num_tokens
    x_rows = x + tokens[:, None] * x_stride_token + c * width * x_stride_column
    token_norms = tl.load(norms + c * num_tokens + tokens, mask=is_token, other=0.0)
    first = tl.program_id(2) * piece_codes
    last = tl.minimum(first + piece_codes, num_codes)
    best = tl.full([BLOCK_T], float("inf"), tl.float32)
    runner_up = tl.full([BLOCK_T], float("inf"), tl.float32)
    best_ids = tl.zeros([BLOCK_T], tl.int32) + first
    lanes = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_K):
        k = start + lanes
        is_code = k < last
        code_rows = (c * num_codes + k[None, :]) * width
        products = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for d in range(0, width, BLOCK_D):
            rows = _rows(
                x_rows, x_stride_column, centres + c * width, d, is_token, width, IS_WHOLE, BLOCK_D
            )
            column = d + tl.arange(0, BLOCK_D)
            mask = is_code[None, :] & (column < width)[:, None]
            of_high = tl.load(high + code_rows + column[:, None], mask=mask, other=0.0).to(FACTOR)
            of_low = tl.load(low + code_rows + column[:, None], mask=mask, other=0.0).to(FACTOR)
            if IS_WHOLE:
                part = tl.dot(rows.to(FACTOR), of_low)
                part = tl.dot(rows.to(FACTOR), of_high, part)
            else:
                of_first = nearest_bf16(rows, FACTOR)
                of_second = nearest_bf16(rows - of_first.to(tl.float32), FACTOR)
                part = tl.dot(of_second, of_high)
                part = tl.dot(of_first, of_low, part)
                part = tl.dot(of_first, of_high, part)
            products += part
        bias = tl.load(lower_bias + c * num_codes + k, mask=is_code, other=float("inf"))
        slopes = tl.load(slope + c * num_codes + k, mask=is_code, other=0.0)
        bounds = bias[None, :] - products - token_norms[:, None] * slopes[None, :]
        bounds = tl.where(bounds == bounds, bounds, float("inf"))  # a NaN decides nothing
        least, lane = tl.min(bounds, axis=1, return_indices=True)
        next_least = tl.min(tl.where(lanes[None, :] == lane[:, None], float("inf"), bounds), axis=1)
        is_lower = least < best
        runner_up = tl.minimum(runner_up, tl.minimum(next_least, tl.maximum(best, least)))
        best_ids = tl.where(is_lower, start + lane, best_ids)
        best = tl.minimum(best, least)
    places = (tl.program_id(2) * num_slices + c) * num_tokens + tokens
    tl.store(lowest + places, best, mask=is_token)
    tl.store(second + places, runner_up, mask=is_token)
    tl.store(lowest_ids + places, best_ids, mask=is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def _decide_kernel(
    found,  # out, int64 [T, C]
    lists,  # out, int32 [C, T]
    counts,  # in and out, int32 [C]
    lowest,  # fp32 [S, C, T], as second and lowest_ids
    second,
    lowest_ids,
    norms,  # fp32 [C, T]
    slope,  # fp32 [C, K]
    offset,  # fp32 [C, K]
    num_tokens,
    num_codes,
    num_pieces,
    UNDERFLOW: tl.constexpr,
    UNDECIDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64)
    num_slices = tl.num_programs(1)
    is_token = tokens < num_tokens
    best = tl.full([BLOCK_T], float("inf"), tl.float32)
    runner_up = tl.full([BLOCK_T], float("inf"), tl.float32)
    ids = tl.zeros([BLOCK_T], tl.int32)
    for piece in range(0, num_pieces):
        places = (piece * num_slices + c) * num_tokens + tokens
        least = tl.load(lowest + places, mask=is_token, other=float("inf"))
        of_least = tl.load(lowest_ids + places, mask=is_token, other=0)
        next_least = tl.load(second + places, mask=is_token, other=float("inf"))
        runner_up = tl.minimum(runner_up, tl.minimum(next_least, tl.maximum(best, least)))
        ids = tl.where(least < best, of_least, ids)
        best = tl.minimum(best, least)
    norm = tl.load(norms + c * num_tokens + tokens, mask=is_token, other=0.0)
    of_slope = tl.load(slope + c * num_codes + ids, mask=is_token, other=0.0)
    of_offset = tl.load(offset + c * num_codes + ids, mask=is_token, other=0.0)
    is_certain = runner_up > best + (2 * (norm * of_slope + of_offset) + UNDERFLOW)
    tl.store(
        found + tokens * num_slices + c,
        tl.where(is_certain, ids.to(tl.int64), UNDECIDED),
        mask=is_token,
    )
    is_listed = (is_token & (is_certain == 0)).to(tl.int32)
    first = tl.atomic_add(counts + c, tl.sum(is_listed), sem="relaxed")
    place = first + tl.cumsum(is_listed) - 1
    tl.store(lists + c * num_tokens + place, tokens.to(tl.int32), mask=is_listed != 0)


_tuned_kernel = triton.autotune(CONFIGS, key=["codes_class", "width_class", "IS_WHOLE"])(
    _bounds_kernel
)
