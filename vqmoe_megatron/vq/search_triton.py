"""Nearest-code search on the GPU: distances and argmin in one kernel, no [T, K] array in memory.

T tokens, H hidden size, C code slices, K codes per slice, D = H / C slice width, S splits of K.

1. As in search.py, the codes of a slice are shifted by their most central one, in torch and fp32:
   ``v_k - centre`` and ``h_k = |v_k - centre|^2 / 2``. Representations share a large common part,
   which would eat the digits that tell close codes apart.
2. A program of the kernel takes BLOCK_T tokens of one slice and walks over one split of the codes,
   BLOCK_K at a time. It shifts the tokens as it loads them, so a bf16 token meets fp32 codes in
   fp32: rounding either side to bf16 would merge close codes.
3. It keeps the smallest ``h_k - <x - centre, v_k - centre>`` per token and the first k that has it.
4. Each split leaves one int64 per token: the distance as an ordered integer above, k below. The
   smallest of these is the nearest code and, among equals, the lowest index, whatever the split.

The distance to a code is one chain of fused multiply-adds in the order of D, whatever the block
sizes are. So the configuration that the autotuner picks on a rank, which depends on timing, does
not change the ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DOT_PRECISIONS = ("ieee", "tf32x3", "tf32")
BLOCK_D = 32  # one value for every configuration: tensor cores sum over D in its steps
PROGRAMS_PER_PROCESSOR = 4  # programs to aim for on each multiprocessor when splitting the codes
TYPICAL_BLOCK = 64  # of tokens or of codes, to count programs before the autotuner has chosen
INDEX_MASK = 0xFFFFFFFF
CONFIGS = [  # at least 64 tokens: below, tensor cores work with other instructions
    triton.Config({"BLOCK_T": block_t, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_t, block_k, warps, stages in [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    ]
]


def nearest_code_triton(
    x: torch.Tensor, codes: torch.Tensor, *, dot_precision: str = "ieee"
) -> torch.Tensor:
    """Return the index of the nearest code of every token; ties go to the lowest index.

    Args:
        x: ``[T, H]`` fp32, fp16 or bf16 on CUDA, any strides.
        codes: ``[K, H]``, or ``[C, K, H / C]`` for product codes; fp32, fp16 or bf16.
        dot_precision: ``ieee``, the default, multiplies in fp32 and is what ``nearest_code`` uses.
            ``tf32x3`` (three tensor-core products, about fp32) and ``tf32`` (one, 10 bits of
            mantissa) are faster and may choose another code among close ones.

    Returns:
        int64 ``[T]`` for ``[K, H]`` codes, int64 ``[T, C]`` for ``[C, K, H / C]``. A token with a
        NaN gets some index in ``[0, K)``.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or for an unknown ``dot_precision``.

    No communication and no gradient. The first call for a size (rounded up to powers of two) times
    the configurations and synchronises with the device; later calls do not.
    """
    if codes.dim() == 2:
        return nearest_code_triton(x, codes.unsqueeze(0), dot_precision=dot_precision).squeeze(1)
    _check(x, codes, dot_precision)
    num_tokens = x.shape[0]
    num_slices, num_codes, width = codes.shape
    if num_tokens == 0:
        return torch.empty(0, num_slices, dtype=torch.int64, device=x.device)
    with torch.no_grad(), torch.cuda.device_of(x):
        centres, shifted, half_norms = _shift(codes.float())
        num_splits = _num_splits(x, num_slices, num_codes)
        found = torch.empty(num_splits, num_tokens, num_slices, dtype=torch.int64, device=x.device)
        choice = {"BLOCK_T": 16, "BLOCK_K": 16} if IS_INTERPRETED else {}

        def grid(meta: dict) -> tuple[int, int, int]:
            return triton.cdiv(num_tokens, meta["BLOCK_T"]), num_slices, num_splits

        (_nearest_kernel if IS_INTERPRETED else _tuned_kernel)[grid](
            found,
            x,
            x.stride(0),
            x.stride(1),
            centres,
            shifted,
            half_norms,
            num_tokens,
            num_codes,
            width,
            triton.cdiv(num_codes, num_splits),
            triton.next_power_of_2(num_codes),
            triton.next_power_of_2(width),
            DOT_PRECISION=dot_precision,
            BLOCK_D=BLOCK_D,
            enable_fp_fusion=True,  # the default of Triton up to 3.9; half as fast without
            **choice,
        )
        return found.amin(dim=0).bitwise_and_(INDEX_MASK)


@triton.jit(do_not_specialize=["num_tokens", "split_codes", "codes_class", "width_class"])
def _nearest_kernel(
    found,  # out, int64 [S, T, C]: ordered distance and index of the best code of a split
    x,  # [T, C * D]
    x_stride_token,
    x_stride_column,
    centres,  # fp32 [C, D]
    codes,  # fp32 [C, K, D], shifted by the centre of their slice
    half_norms,  # fp32 [C, K]
    num_tokens,
    num_codes,
    width,
    split_codes,  # codes in one split
    codes_class,  # num_codes and width rounded up, for the autotuner's key alone
    width_class,
    DOT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    is_token = tokens < num_tokens
    columns = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_K)
    x_rows = x + tokens[:, None] * x_stride_token + c * width * x_stride_column
    slice_codes = codes + c * num_codes * width
    first = tl.program_id(2) * split_codes
    last = tl.minimum(first + split_codes, num_codes)
    best = tl.full([BLOCK_T], float("inf"), tl.float32)
    best_ids = tl.zeros([BLOCK_T], tl.int32) + first
    for start in range(first, last, BLOCK_K):
        k = start + lanes
        is_code = k < last
        products = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for d in range(0, width, BLOCK_D):
            column = d + columns
            is_column = column < width
            rows = tl.load(
                x_rows + column[None, :] * x_stride_column,
                mask=is_token[:, None] & is_column[None, :],
                other=0.0,
            ).to(tl.float32)
            centre = tl.load(centres + c * width + column, mask=is_column, other=0.0)
            tile = tl.load(
                slice_codes + k[None, :] * width + column[:, None],
                mask=is_code[None, :] & is_column[:, None],
                other=0.0,
            )
            products = tl.dot(rows - centre[None, :], tile, products, input_precision=DOT_PRECISION)
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
    num_slices = tl.num_programs(1)
    tl.store(found + (split * num_tokens + tokens) * num_slices + c, packed, mask=is_token)


IS_INTERPRETED = not isinstance(_nearest_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
_tuned_kernel = triton.autotune(CONFIGS, key=["codes_class", "width_class"])(_nearest_kernel)


def _shift(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 codes [C, K, D] -> central ones [C, 1, D], codes minus these, half norms [C, K]."""
    from_mean = (codes - codes.mean(dim=1, keepdim=True)).square_().sum(dim=2)
    most_central = from_mean.argmin(dim=1).view(-1, 1, 1).expand(-1, 1, codes.shape[2])
    centres = codes.gather(1, most_central)
    shifted = codes - centres
    return centres, shifted, shifted.square().sum(dim=2).mul_(0.5)


def _num_splits(x: torch.Tensor, num_slices: int, num_codes: int) -> int:
    """Splits of the codes that give every multiprocessor work when the tokens alone do not."""
    if IS_INTERPRETED:
        num_processors, block = 2, 16
    else:
        num_processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        block = TYPICAL_BLOCK
    programs = triton.cdiv(x.shape[0], block) * num_slices
    wanted = triton.cdiv(num_processors * PROGRAMS_PER_PROCESSOR, programs)
    wanted = max(1, min(wanted, triton.cdiv(num_codes, block)))
    split_codes = triton.cdiv(num_codes, wanted)
    return triton.cdiv(num_codes, split_codes)  # none of them empty


def _check(x: torch.Tensor, codes: torch.Tensor, dot_precision: str) -> None:
    if x.dim() != 2 or codes.dim() != 3 or codes.shape[0] * codes.shape[2] != x.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} and codes {list(codes.shape)} do not fit: need x [T, H] and "
            "codes [K, H] or [C, K, H / C]"
        )
    if codes.numel() == 0:
        raise ValueError(f"codes {list(codes.shape)} are empty; need one code of one column")
    if codes[0].numel() >= 1 << 31:
        raise ValueError(
            f"codes {list(codes.shape)}: a slice has {codes[0].numel()} elements, "
            "need fewer than 2^31"
        )
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
    if dot_precision not in DOT_PRECISIONS:
        raise ValueError(f"dot_precision={dot_precision!r} is none of {list(DOT_PRECISIONS)}")
