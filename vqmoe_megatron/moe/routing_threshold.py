"""Threshold routing: how much a pair of token and expert must be worth to be evaluated exactly.

T tokens, N experts, H hidden size, Q bins.

    score[t, e] = p[t, e] * |x_t - v_k(t)| / sqrt(H)

An expert sees the token where its score exceeds tau: what fill would get wrong is large there. tau
is held so that a token has one exact expert on average: once per optimizer step

    tau <- 0.9 tau + 0.1 q,    q the T-th largest score of the global batch

and the first step sets tau = q; until then every token's most likely expert is chosen. Nothing
differentiates the choice.

q is read from a histogram of log2 scores, BINS_PER_OCTAVE bins to an octave (1.1 % of a score),
linear within a bin. Counts are whole numbers, exact in fp32 up to 2^24 pairs of a bin, and are
added up with the step's other statistics: tau is the same on all ranks and does not depend on how
tokens are spread over them. A step with a score that is no number leaves tau.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vqmoe_megatron.moe.step_statistics import KeepsStatistics
from vqmoe_megatron.vq.segment_sum import count_ids

LOWEST_LOG2, HIGHEST_LOG2 = -32, 32
BINS_PER_OCTAVE = 64
NUM_BINS = (HIGHEST_LOG2 - LOWEST_LOG2) * BINS_PER_OCTAVE
DECAY = 0.9


class RoutingThreshold(KeepsStatistics):
    """tau and what the step saw; the choice itself."""

    tau: torch.Tensor  # fp32 scalar, 0 before the first step
    step_scores: torch.Tensor  # fp32 [Q], pairs by score
    step_tokens: torch.Tensor  # fp32 [4]: tokens, chosen pairs, tokens with none, with one

    def __init__(self) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.register_buffer("tau", torch.zeros((), device=device))
        self.register_buffer("step_scores", torch.zeros(NUM_BINS, device=device), persistent=False)
        self.register_buffer("step_tokens", torch.zeros(4, device=device), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """tau keeps fp32 as well: in bf16 a tenth of a small change would be lost."""
        exact = self.tau
        super()._apply(fn, recurse)
        if self.tau.dtype in (torch.bfloat16, torch.float16):
            self.tau = exact.to(self.tau.device)
        return self

    @torch.no_grad()
    def choose(self, scores: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Scores and probabilities ``[T, N]`` -> bool ``[T, N]``. No communication, no host
        synchronisation."""
        likeliest = torch.zeros_like(scores, dtype=torch.bool)
        likeliest.scatter_(1, probs.argmax(dim=1, keepdim=True), True)
        return torch.where(self.tau > 0, scores > self.tau, likeliest)

    @torch.no_grad()
    def count(self, scores: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What :meth:`record` adds for scores and chosen pairs ``[T, N]`` of one microbatch: two
        sums of a few thousand numbers, and not the scores, are kept until then."""
        log2 = scores.clamp(min=2.0**LOWEST_LOG2).log2() - LOWEST_LOG2
        bins = (log2 * BINS_PER_OCTAVE).nan_to_num().to(torch.int64).clamp(0, NUM_BINS - 1)
        per_token = chosen.sum(dim=1)
        of_tokens = torch.stack(
            [
                torch.full_like(per_token, 1).sum() + 0.0 * scores.sum(),  # NaN for a broken step
                per_token.sum(),
                (per_token == 0).sum(),
                (per_token == 1).sum(),
            ]
        )
        counts = count_ids(bins.reshape(-1), NUM_BINS).to(self.step_scores.dtype)
        return counts, of_tokens.to(self.step_tokens.dtype)

    @torch.no_grad()
    def record(self, counts: torch.Tensor, of_tokens: torch.Tensor) -> None:
        """Add one microbatch; called from its backward pass."""
        self.step_scores += counts
        self.step_tokens += of_tokens

    def local_parts(self) -> list[torch.Tensor]:
        """This rank's sums, in the order of :meth:`apply_parts`. No communication."""
        return [self.step_scores, self.step_tokens]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """fp32 scalars by metric name, of the step as it was routed. Moves nothing."""
        next(parts)
        tokens, pairs, with_none, with_one = next(parts).unbind()
        num_tokens = tokens.clamp(min=1.0)
        return {
            "exact_experts_per_token": pairs / num_tokens,
            "routing_threshold": self.tau.clone(),
            "tokens_without_exact_expert": with_none / num_tokens,
            "tokens_with_one_exact_expert": with_one / num_tokens,
            "tokens_with_several_exact_experts": (tokens - with_none - with_one) / num_tokens,
        }

    @torch.no_grad()
    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move tau by the sums over all replicas; return the scalars. No communication."""
        parts = [next(reduced), next(reduced)]
        scalars = self.scalars_of(iter(parts))
        num_tokens = parts[1][0]
        found = kth_largest_score(parts[0], num_tokens).to(self.tau.dtype)
        moved = torch.where(self.tau > 0, DECAY * self.tau + (1.0 - DECAY) * found, found)
        is_sound = torch.isfinite(num_tokens) & (num_tokens > 0)
        self.tau.copy_(torch.where(is_sound, moved, self.tau))
        return scalars

    def clear_step(self) -> None:
        """Forget what the step recorded."""
        self.step_scores.zero_()
        self.step_tokens.zero_()


def kth_largest_score(counts: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The k-th largest score of a histogram ``[Q]``, fp64 scalar: below it, within its bin, lie the
    rest. ``k`` is a scalar of at least 1 and at most the sum of the counts."""
    counts = counts.to(torch.int64)  # whole numbers, whose sums have no order on any device
    at_least = counts.flip(0).cumsum(0).flip(0)  # [Q], pairs of this bin and those above
    highest = (at_least >= k).sum().clamp(min=1) - 1  # the bin that reaches k
    index = highest.view(1)  # as a scalar it would be read on the host
    in_bin = counts.index_select(0, index)
    above = at_least.index_select(0, index) - in_bin
    share = (k.double() - above) / in_bin.clamp(min=1)  # of the bin, from its upper end
    log2 = LOWEST_LOG2 + (index + 1 - share) / BINS_PER_OCTAVE
    return torch.exp2(log2).view(())
