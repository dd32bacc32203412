"""``vqmoe bench search``: the nearest-code search, its textbook form, and its ceiling.

T tokens, D width, K codes. Arms:

    search  nearest_code of the package
    cdist   torch.cdist, then argmin
    gemm    the product of tokens and codes [T, D] x [D, K] alone: no search that takes it can be
            faster; its result is thrown away

Before anything is timed, ``search`` and ``cdist`` must find the same codes, but for tokens whose
two nearest codes lie closer than fp32 can tell.
"""

from __future__ import annotations

from typing import Any

import torch

from vqmoe_megatron.bench.cases import GateFailed
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.timing import Action, time_in_turns
from vqmoe_megatron.vq.search import nearest_code

TEXTS = {
    "search": "nearest_code",
    "cdist": "torch.cdist and argmin",
    "gemm": "the bare product, ceiling",
}
CLEAR_MARGIN = 1e-5  # of the squared distance, relative to the width


def measure_search(
    num_tokens: int,
    width: int,
    num_codes: int,
    num_repeats: int,
    num_warmup: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Gate and time the three arms at one size; one row each. fp32. No communication.

    Raises:
        GateFailed: when the two searches find different codes.
        ValueError: for a size that is not positive.
    """
    for name, size in (("num_tokens", num_tokens), ("width", width), ("num_codes", num_codes)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(num_codes, width, generator=generator).to(device)
    x = torch.randn(num_tokens, width, generator=generator).to(device)
    check_ids(x, codes)
    what = f"T={num_tokens} D={width} K={num_codes}"
    progress.say(f"{what}: both searches find the same codes")
    actions = {
        "search": Action(lambda: nearest_code(x, codes)),
        "cdist": Action(lambda: torch.cdist(x, codes).argmin(dim=1)),
        "gemm": Action(lambda: x @ codes.t()),
    }
    num_flops = 2 * num_tokens * width * num_codes
    found = time_in_turns(
        actions, num_repeats, num_warmup, lambda turn: progress.look(f"{what}, {turn}")
    )
    return [
        {
            "arm": name,
            "text": TEXTS[name],
            "num_experts": None,
            "num_codes": num_codes,
            "num_tokens": num_tokens,
            "width": width,
            "expert_model_parallel_size": 1,
            "routing": None,
            "pass": "forward",
            "num_repeats": num_repeats,
            "median_ms": times.median_ms,
            "p10_ms": times.p10_ms,
            "p90_ms": times.p90_ms,
            "gflops_per_second": num_flops / times.median_ms / 1e6,
            "wire_bytes": None,
            "saved_bytes": None,
        }
        for name, times in found.items()
    ]


def check_ids(x: torch.Tensor, codes: torch.Tensor) -> None:
    """Raise :class:`GateFailed` when a clear token's nearest code differs from fp64's."""
    distances = torch.cdist(x.double(), codes.double()).square()
    least = distances.topk(min(2, codes.shape[0]), dim=1, largest=False)
    clear = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    if codes.shape[0] > 1:
        clear = least.values[:, 1] - least.values[:, 0] > CLEAR_MARGIN * x.shape[1]
    for name, ids in (
        ("search", nearest_code(x, codes)),
        ("cdist", torch.cdist(x, codes).argmin(dim=1)),
    ):
        num_wrong = int(((ids != least.indices[:, 0]) & clear).sum())
        if num_wrong:
            raise GateFailed(
                f"{name} misses the nearest code of {num_wrong} of {x.shape[0]} tokens at "
                f"D={x.shape[1]}, K={codes.shape[0]}"
            )
