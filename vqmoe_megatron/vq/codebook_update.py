"""What happens to a codebook once per optimizer step. Pure functions of already reduced statistics.

C code slices, K codes per slice, D slice width, M candidate tokens. ``usage`` is the exponential
moving average of the fraction of tokens that chose each code, so it sums to 1 over a slice and does
not depend on the batch size; uniform usage is 1 / K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.vq.host_draws import on_device

USAGE_FLOOR = 1e-12  # under it, sum / usage has no digits left and the code keeps its place
# CVQ-VAE's re-anchoring (arXiv 2307.15139, eq. 4; the constants are those of the VQMoE release).
REANCHOR_RATE = 10.0
REANCHOR_OFFSET = 1e-3


@dataclass(frozen=True)
class CodebookState:
    """The quantities an update reads and returns."""

    codes: torch.Tensor  # fp32 [C, K, D]
    usage: torch.Tensor  # fp32 [C, K]
    ema_sum: torch.Tensor | None  # fp32 [C, K, D]; None unless codebook_update is ema


@dataclass(frozen=True)
class StepStatistics:
    """Sums over all tokens of one optimizer step, reduced over the ranks that saw them."""

    count: torch.Tensor  # fp32 [C, K], tokens per code
    total: torch.Tensor | None  # fp32 [C, K, D], sum of the tokens of each code (ema)
    candidates: torch.Tensor | None  # fp32 [M, C, D], tokens that may replace dead codes


def update_usage(state: CodebookState, count: torch.Tensor, decay: float) -> CodebookState:
    """Return ``state`` with usage moved towards this step's fraction of tokens per code."""
    share = count / count.sum(dim=1, keepdim=True).clamp(min=1.0)
    return CodebookState(state.codes, state.usage.lerp(share, 1.0 - decay), state.ema_sum)


def ema_update(state: CodebookState, statistics: StepStatistics, decay: float) -> CodebookState:
    """Move codes to the moving average of their tokens (VQ-VAE, arXiv 1711.00937, appendix A.1).

    Counts and sums are taken as fractions of the step's tokens, which makes the update independent
    of the batch size.

    Raises:
        ValueError: when the state or the statistics carry no sums.
    """
    if state.ema_sum is None or statistics.total is None:
        raise ValueError("the ema update needs ema_sum and the sum of tokens per code")
    num_tokens = statistics.count.sum(dim=1).clamp(min=1.0)  # [C]
    moved = update_usage(state, statistics.count, decay)
    ema_sum = state.ema_sum.lerp(statistics.total / num_tokens[:, None, None], 1.0 - decay)
    usage = moved.usage.unsqueeze(-1)
    codes = torch.where(usage > USAGE_FLOOR, ema_sum / usage.clamp(min=USAGE_FLOOR), state.codes)
    return CodebookState(codes, moved.usage, ema_sum)


def reanchor(
    state: CodebookState, candidates: torch.Tensor, decay: float, seed: int
) -> CodebookState:
    """Pull rarely used codes to sampled tokens; leave used codes where they are.

    v_k <- (1 - a_k) v_k + a_k anchor_k with a_k = exp(-p_k K 10 / (1 - decay) - 1e-3); the anchor
    is a candidate drawn with probability softmax_t cos(x_t, v_k) (arXiv 2307.15139, eq. 4 and 5).

    Args:
        state: after the step's usage update.
        candidates: fp32 ``[M, C, D]``, identical on every replica; a row of zeros is none.
        decay: of usage.
        seed: of the draw, identical on every replica.

    No host synchronisation.
    """
    num_codes = state.codes.shape[1]
    generator = torch.Generator().manual_seed(seed)
    tokens = candidates.transpose(0, 1)  # [C, M, D]
    cosine = torch.nn.functional.normalize(state.codes, dim=-1) @ torch.nn.functional.normalize(
        tokens, dim=-1
    ).transpose(1, 2)  # [C, K, M]
    drawn = torch.rand(cosine.shape, generator=generator).clamp_(min=1e-20)
    uniform = on_device(drawn, cosine.device)
    is_offered = (tokens != 0).any(dim=-1)  # [C, M]
    key = (cosine - (-uniform.log()).log()).masked_fill_(~is_offered.unsqueeze(1), -torch.inf)
    choice = key.argmax(dim=-1)  # Gumbel-max draw, [C, K]
    anchor = torch.gather(tokens, 1, choice.unsqueeze(-1).expand_as(state.codes))
    rate = torch.exp(-state.usage * num_codes * REANCHOR_RATE / (1.0 - decay) - REANCHOR_OFFSET)
    rate = torch.where(is_offered.any(dim=1, keepdim=True), rate, 0.0).unsqueeze(-1)
    return CodebookState(state.codes.lerp(anchor, rate), state.usage, state.ema_sum)
