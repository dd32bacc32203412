"""The searches by name: a further one is one line here, checked and timed with the others.

T tokens, D width, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vqmoe_megatron.vq.kernel_choice import kernel_obstacle

Search = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [T, D], codes [K, D] -> ids [T]
FP32, BF16 = "fp32_gemm", "bf16_gemm"  # the roof of the unit that an arm multiplies on
EXACT, SPLIT = "fp32 kernel", "split in bf16 products"
CLEAR_MARGIN = 1e-5  # of the two least half squared distances, relative to D


def _triton(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    from vqmoe_megatron.vq.search_triton import nearest_code_triton

    return nearest_code_triton(x, codes)


def _split(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    from vqmoe_megatron.vq.split_search_triton import nearest_code_split

    return nearest_code_split(x, codes)


def _cdist(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.float(), codes).argmin(dim=1)


def _product(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (0.5 * codes.square().sum(dim=1) - x.float() @ codes.t()).argmin(dim=1)


@dataclass(frozen=True)
class SearchArm:
    """A search. ``is_kernel``: it needs Triton. ``is_ours``: it must find fp64's codes."""

    run: Search
    unit: str
    is_kernel: bool = False
    is_ours: bool = False


SEARCH_ARMS: dict[str, SearchArm] = {
    EXACT: SearchArm(_triton, FP32, is_kernel=True, is_ours=True),
    SPLIT: SearchArm(_split, BF16, is_kernel=True, is_ours=True),
    "torch cdist + argmin": SearchArm(_cdist, FP32),
    "torch product + argmin": SearchArm(_product, FP32),
}


def share_undecided(x: torch.Tensor, codes: torch.Tensor) -> float:
    """Of tokens [T, D]: those for which bf16 products do not prove a code of [K, D] the nearest,
    so that they are searched in fp32. No communication."""
    from vqmoe_megatron.vq.codes_triton import split_codes_triton
    from vqmoe_megatron.vq.split_search import takes_whole
    from vqmoe_megatron.vq.split_search_triton import decide

    split = split_codes_triton(codes.float().unsqueeze(0), takes_whole(x.dtype))
    _, _, counts = decide(x, split)
    return float(counts.sum()) / x.shape[0]


def tuned_configuration() -> str:
    """What the autotuner chose for the size that was searched last."""
    from vqmoe_megatron.vq import split_search_triton

    chosen = getattr(split_search_triton._tuned_kernel, "best_config", None)
    return "none: interpreted" if chosen is None else str(chosen)


def kernels_missing() -> str | None:
    """What keeps Triton kernels from running here; None when nothing does."""
    return kernel_obstacle([torch.float32])


@dataclass(frozen=True)
class Agreement:
    """How a search's ids compare with those of fp64."""

    num_wrong: int  # tokens with a clearly nearest code that got another one
    share_equal: float  # of all tokens
    worst_excess: float  # distance to the found code above the least, relative to the token's norm


def search_agreement(run: Search, x: torch.Tensor, codes: torch.Tensor) -> Agreement:
    """Hold the ids of ``x`` [T, D] against half squared distances in fp64, less |x|^2 / 2.

    No communication.
    """
    doubles, tokens = codes.double(), x.double()
    distances = 0.5 * doubles.square().sum(dim=1) - tokens @ doubles.t()  # [T, K]
    least = distances.topk(min(2, codes.shape[0]), dim=1, largest=False)
    margin = least.values[:, -1] - least.values[:, 0]
    clear = margin > CLEAR_MARGIN * x.shape[1] if codes.shape[0] > 1 else margin == 0
    ids = run(x, codes).to(distances.device)
    wanted = least.indices[:, 0]
    excess = distances.gather(1, ids.unsqueeze(1))[:, 0] - least.values[:, 0]
    scale = tokens.square().sum(dim=1).clamp(min=1e-30)
    return Agreement(
        num_wrong=int(((ids != wanted) & clear).sum()),
        share_equal=float((ids == wanted).double().mean()),
        worst_excess=float((excess / scale).max()),
    )
