"""Nearest-code search on the GPU in fp32: distances and argmin in one kernel, no [T, K] in memory.

T tokens, H hidden size, C code slices, K codes per slice, D = H / C slice width.

1. As in search.py, the codes of a slice are shifted by their most central one (codes_triton.py):
   ``v_k - centre`` and ``h_k = |v_k - centre|^2 / 2``. Representations share a large common part,
   which would eat the digits that tell close codes apart.
2. A program of the kernel takes BLOCK_T tokens of one slice and walks over one piece of the codes,
   BLOCK_K at a time. It shifts the tokens as it loads them, so a bf16 token meets fp32 codes in
   fp32: rounding either side to bf16 would merge close codes.
3. It keeps the smallest ``h_k - <x - centre, v_k - centre>`` per token and the first k that has it.
4. Each piece puts one int64 per token: the distance as an ordered integer above, k below. The
   smallest of these is the nearest code and, among equals, the lowest index, whatever the pieces.

The distance to a code is made of chains of BLOCK_D fused multiply-adds in the order of D, added in
that order, whatever the block sizes are. So the configuration that the autotuner picks on a rank,
which depends on timing, does not change the ids.

The kernel takes a list of tokens: all of them here, those that split_search_triton.py could not
decide there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vqmoe_megatron.vq.codes_triton import IS_INTERPRETED, split_codes_triton
from vqmoe_megatron.vq.split_search import BLOCK_D, SplitCodes, takes_whole

CHAIN = BLOCK_D // 2  # columns of one product; two of them are one chain
PROGRAMS_PER_PROCESSOR = 4  # programs to aim for on each multiprocessor
PIECE_CODES = 128  # of a listed token's codes: few tokens must give every multiprocessor work
INDEX_MASK = 0xFFFFFFFF
UNDECIDED = 2**63 - 1
CONFIGS = [
    triton.Config({"BLOCK_T": block_t, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_t, block_k, warps, stages in [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
    ]
]


def nearest_code_triton(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest code of every token; ties go to the lowest index.

    Args:
        x: ``[T, H]`` fp32, fp16 or bf16 on CUDA, any strides.
        codes: ``[K, H]``, or ``[C, K, H / C]`` for product codes; fp32, fp16 or bf16.

    Returns:
        int64 ``[T]`` for ``[K, H]`` codes, int64 ``[T, C]`` for ``[C, K, H / C]``. A token with a
        NaN gets some index in ``[0, K)``.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit.

    No communication and no gradient. The first call for a size (rounded up to powers of two) times
    the configurations and synchronises with the device; later calls do not.
    """
    if codes.dim() == 2:
        return nearest_code_triton(x, codes.unsqueeze(0)).squeeze(1)
    check_search(x, codes)
    num_slices, _, _ = codes.shape
    with torch.no_grad(), torch.cuda.device_of(x):
        found = torch.full((x.shape[0], num_slices), UNDECIDED, dtype=torch.int64, device=x.device)
        if x.shape[0]:
            everyone = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
            counts = torch.full((num_slices,), x.shape[0], dtype=torch.int32, device=x.device)
            split = split_codes_triton(codes.float(), takes_whole(x.dtype))
            search_listed(found, x, split, everyone.unsqueeze(0), counts)
        return found.bitwise_and_(INDEX_MASK)


def search_listed(
    found: torch.Tensor,
    x: torch.Tensor,
    split: SplitCodes,
    lists: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Search the listed tokens in fp32 and lower ``found`` to what is found.

    Args:
        found: int64 ``[T, C]``, :data:`UNDECIDED` for the listed tokens.
        x: ``[T, C * D]``.
        split: the codes.
        lists: int32 ``[C, T]`` or, for all slices alike, ``[1, T]``: tokens.
        counts: int32 ``[C]``, how many of each list count. Read on the device alone.
    """
    num_slices, num_codes, width = split.shifted.shape
    choice = {"BLOCK_T": 16, "BLOCK_K": 16} if IS_INTERPRETED else {}
    programs = triton.cdiv(num_programs(x.device), num_slices)
    (_nearest_kernel if IS_INTERPRETED else _tuned_kernel)[(programs, num_slices)](
        found,
        x,
        x.stride(0),
        x.stride(1),
        split.centre,
        split.shifted,
        split.half_norms,
        lists,
        lists.stride(0) if lists.shape[0] > 1 else 0,
        counts,
        num_codes,
        width,
        PIECE_CODES,
        triton.next_power_of_2(num_codes),
        triton.next_power_of_2(width),
        CHAIN=CHAIN,
        enable_fp_fusion=True,  # the default of Triton up to 3.9; half as fast without
        **choice,
    )


def num_programs(device: torch.device) -> int:
    """Programs that keep every multiprocessor at work."""
    if IS_INTERPRETED:
        return 3
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * PROGRAMS_PER_PROCESSOR


@triton.jit
def _dot_chain(
    rows,
    centres,
    codes,
    first_column,
    x_stride_column,
    is_token,
    is_code,
    width,
    total,
    CHAIN: tl.constexpr,
):
    """``total`` plus the products of CHAIN columns; rows and codes point to column 0."""
    column = first_column + tl.arange(0, CHAIN)
    is_column = column < width
    values = tl.load(
        rows + column[None, :].to(tl.int64) * x_stride_column,
        mask=is_token[:, None] & is_column[None, :],
        other=0.0,
    ).to(tl.float32)
    centre = tl.load(centres + column, mask=is_column, other=0.0)
    tile = tl.load(codes + column[:, None], mask=is_code[None, :] & is_column[:, None], other=0.0)
    return tl.dot(values - centre[None, :], tile, total, input_precision="ieee")


@triton.jit(do_not_specialize=["codes_class", "width_class"])
def _nearest_kernel(
    found,  # in and out, int64 [T, C]: ordered distance and index of the best code
    x,  # [T, C * D]
    x_stride_token,
    x_stride_column,
    centres,  # fp32 [C, D]
    codes,  # fp32 [C, K, D], shifted by the centre of their slice
    half_norms,  # fp32 [C, K]
    lists,  # int32 [C, T]
    list_stride,
    counts,  # int32 [C]
    num_codes,
    width,
    piece_codes,
    codes_class,  # num_codes and width rounded up, for the autotuner's key alone
    width_class,
    CHAIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    c = tl.program_id(1).to(tl.int64)
    num_slices = tl.num_programs(1)
    num_listed = tl.load(counts + c)
    num_pieces = tl.cdiv(num_codes, piece_codes)
    num_items = tl.cdiv(num_listed, BLOCK_T) * num_pieces
    slice_codes = codes + c * num_codes * width
    slice_centre = centres + c * width
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        places = (item // num_pieces) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = places < num_listed
        tokens = tl.load(lists + c * list_stride + places, mask=is_token, other=0).to(tl.int64)
        rows = x + tokens[:, None] * x_stride_token + c * width * x_stride_column
        first = (item % num_pieces) * piece_codes
        last = tl.minimum(first + piece_codes, num_codes)
        best = tl.full([BLOCK_T], float("inf"), tl.float32)
        best_ids = tl.zeros([BLOCK_T], tl.int32) + first
        for start in range(first, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_code = k < last
            columns = slice_codes + k[None, :].to(tl.int64) * width
            products = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
            for d in range(0, width, 2 * CHAIN):
                part = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
                part = _dot_chain(
                    rows, slice_centre, columns, d, x_stride_column, is_token, is_code, width,
                    part, CHAIN,
                )  # fmt: skip
                part = _dot_chain(
                    rows, slice_centre, columns, d + CHAIN, x_stride_column, is_token, is_code,
                    width, part, CHAIN,
                )  # fmt: skip
                products += part
            norms = tl.load(half_norms + c * num_codes + k, mask=is_code, other=float("inf"))
            distances = norms[None, :] - products
            # A NaN compares with nothing: as infinity it leaves the index at a code that exists.
            distances = tl.where(distances == distances, distances, float("inf"))
            nearest, lane = tl.min(distances, axis=1, return_indices=True)  # the first of equals
            is_closer = nearest < best  # strictly: an earlier tile wins a tie
            best = tl.where(is_closer, nearest, best)
            best_ids = tl.where(is_closer, start + lane, best_ids)
        bits = best.to(tl.int32, bitcast=True)  # of no -0: half norms are no less than +0
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
        packed = (ordered.to(tl.int64) << 32) | best_ids.to(tl.int64)
        tl.atomic_min(found + tokens * num_slices + c, packed, mask=is_token, sem="relaxed")


# Its configurations may all run on the same ``found``: the smallest stays the smallest.
_tuned_kernel = triton.autotune(CONFIGS, key=["codes_class", "width_class"])(_nearest_kernel)


def check_search(x: torch.Tensor, codes: torch.Tensor) -> None:
    """Raise ``ValueError`` for tokens ``[T, H]`` and codes ``[C, K, D]`` that no kernel takes."""
    if x.dim() != 2 or codes.dim() != 3 or codes.shape[0] * codes.shape[2] != x.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} and codes {list(codes.shape)} do not fit: need x [T, H] and "
            "codes [K, H] or [C, K, H / C]"
        )
    if codes.numel() == 0:
        raise ValueError(f"codes {list(codes.shape)} are empty; need one code of one column")
    if x.shape[0] >= 1 << 31:
        raise ValueError(f"x {list(x.shape)}: need fewer than 2^31 tokens")
    for name, tensor in (("x", x), ("codes", codes)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is {tensor.dtype}; the kernel takes float32, float16 and bfloat16, "
                "vqmoe_megatron.vq.nearest_code also float64"
            )
    if x.device != codes.device or not (x.is_cuda or IS_INTERPRETED):
        raise ValueError(
            f"x is on {x.device} and codes on {codes.device}; the kernel needs both on one CUDA "
            "device, or TRITON_INTERPRET=1 in the environment"
        )
