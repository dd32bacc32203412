"""Dead codes take the place of tokens: which codes, which tokens, in which order.

C code slices, K codes per slice, D slice width, M candidate tokens. Pure functions of reduced
statistics, deterministic, so that replicas stay bit-equal. No host synchronisation.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.codebook_init import SAME_VECTOR
from vqmoe_megatron.vq.codebook_update import CodebookState
from vqmoe_megatron.vq.host_draws import on_device


def random_order(candidates: torch.Tensor, seed: int) -> torch.Tensor:
    """Candidates ``[M, C, D]`` in an order drawn from ``seed``: int64 ``[M, C]``, equal slices."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(candidates.shape[0], generator=generator)
    order = on_device(drawn, candidates.device)
    return order.unsqueeze(1).expand(-1, candidates.shape[1])


def error_order(candidates: torch.Tensor, nearest: torch.Tensor, seed: int) -> torch.Tensor:
    """Candidates in an order drawn by their quantisation error: int64 ``[M, C]``.

    Each next one is drawn among those left with a probability proportional to its squared error,
    as k-means++ draws centres (Arthur and Vassilvitskii 2007), by the largest of log error plus
    Gumbel noise. The largest errors themselves would be single tokens far from all others, whose
    codes nobody else uses.

    Args:
        candidates: fp32 ``[M, C, D]``.
        nearest: fp32 ``[M, C, D]``, the code of each.
        seed: of the draw, identical on every replica.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(candidates.shape[:2], generator=generator).clamp_(min=1e-20)
    noise = -(-on_device(drawn, candidates.device).log()).log()
    error = (candidates - nearest).square_().sum(dim=-1)
    return (error.log() + noise).argsort(dim=0, descending=True, stable=True)


def revive_dead_codes(
    state: CodebookState, candidates: torch.Tensor, order: torch.Tensor, threshold: float
) -> tuple[CodebookState, torch.Tensor]:
    """Re-seed codes whose usage is under ``threshold`` times uniform usage.

    Every dead code of a slice gets a vector of its own. Where more codes are dead than there are
    different candidates, the last ones stay as they are, and wait for the next step.

    Args:
        state: after the step's usage update.
        candidates: fp32 ``[M, C, D]``, identical on every replica; a row of zeros is none.
        order: int64 ``[M, C]``, the candidates of each slice in the order in which they are taken.
        threshold: share of uniform usage; 0 revives nothing.

    Returns:
        The new state, with usage and sums of revived codes reset to uniform, and the bool ``[C,
        K]`` map of revived codes.
    """
    num_slices, num_codes, _ = state.codes.shape
    usable = usable_candidates(candidates)
    is_last = ~usable.gather(0, order)
    order = order.gather(0, is_last.to(torch.uint8).argsort(dim=0, stable=True))
    dead = state.usage < threshold / num_codes
    place = dead.cumsum(dim=1) - 1
    revived = dead & (place < usable.sum(dim=0).unsqueeze(1))  # [C, K]
    place = place.clamp(min=0, max=candidates.shape[0] - 1)
    slices = torch.arange(num_slices, device=candidates.device).unsqueeze(1)
    replacement = candidates[order[place, slices], slices]  # [C, K, D]
    mask = revived.unsqueeze(-1)
    codes = torch.where(mask, replacement, state.codes)
    usage = torch.where(revived, torch.full_like(state.usage, 1.0 / num_codes), state.usage)
    ema_sum = (
        None if state.ema_sum is None else torch.where(mask, replacement / num_codes, state.ema_sum)
    )
    return CodebookState(codes, usage, ema_sum), revived


def usable_candidates(candidates: torch.Tensor) -> torch.Tensor:
    """Bool ``[M, C]``: whether a candidate was offered and no earlier one is the same vector.

    Tokens that differ by rounding (``SAME_VECTOR``), as those of a run of blanks do, would as two
    codes leave it to rounding which of them is nearest. Their weighted sums are equal but for
    rounding, so they are neighbours once sorted by those.
    """
    is_offered = (candidates != 0).any(dim=-1)  # [M, C]
    near = SAME_VECTOR * _spread(candidates, is_offered)  # [C]
    weights = torch.arange(1, candidates.shape[2] + 1, device=candidates.device).sqrt()
    key = (candidates * weights.to(candidates.dtype)).sum(dim=-1)
    by_key = key.masked_fill(~is_offered, torch.inf).argsort(dim=0, stable=True)
    ordered = candidates.gather(0, by_key.unsqueeze(-1).expand_as(candidates))
    is_same = (ordered[1:] - ordered[:-1]).norm(dim=-1) <= near
    is_same &= is_offered.gather(0, by_key)[1:]  # a row of zeros is the same as none
    group = torch.nn.functional.pad((~is_same).cumsum(dim=0), (0, 0, 1, 0))
    earliest = torch.full_like(by_key, len(by_key)).scatter_reduce_(0, group, by_key, "amin")
    return is_offered & torch.zeros_like(is_offered).scatter_(
        0, by_key, earliest.gather(0, group) == by_key
    )


def _spread(candidates: torch.Tensor, is_offered: torch.Tensor) -> torch.Tensor:
    """fp32 ``[C]``: root mean square distance of those offered from their mean."""
    num_offered = is_offered.sum(dim=0).clamp(min=1)  # [C]
    centred = candidates - candidates.sum(dim=0) / num_offered.unsqueeze(-1)
    squares = centred.square_().sum(dim=-1).masked_fill_(~is_offered, 0.0)
    return (squares.sum(dim=0) / num_offered).sqrt()
