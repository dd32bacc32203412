"""How evenly codes are used: in one step, and over the last steps.

C code slices, K codes per slice.
"""

from __future__ import annotations

import torch

IN_USE_SHARE = 0.1  # of uniform usage, from which on a code counts as in use


class RecentUsage(torch.nn.Module):
    """Moving average of the share of tokens that chose each code.

    Unlike the usage that decides on revival it is never reset, and goes on in a frozen codebook.
    It is not stored: after a start or a load it begins with the first step's shares.
    """

    share: torch.Tensor  # fp32 [C, K]; zero before the first step

    def __init__(self, num_slices: int, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros(num_slices, num_codes), persistent=False)

    def add(self, count: torch.Tensor, decay: float) -> None:
        """Add one step's tokens per code ``[C, K]``; a step without tokens or with NaN is none."""
        num_tokens = count.sum(dim=1, keepdim=True)
        share = count / num_tokens.clamp(min=1.0)
        is_step = (num_tokens > 0).all() & torch.isfinite(share).all()
        mixed = torch.where((self.share == 0).all(), share, self.share.lerp(share, 1.0 - decay))
        self.share.copy_(torch.where(is_step, mixed, self.share))

    def num_in_use(self) -> torch.Tensor:
        """fp32 scalar: codes over all slices with at least ``IN_USE_SHARE`` of uniform usage."""
        return (self.share >= IN_USE_SHARE / self.share.shape[1]).sum().float()

    def forget(self) -> None:
        """Begin anew."""
        self.share.zero_()


def code_perplexity(count: torch.Tensor) -> torch.Tensor:
    """exp(entropy) of code usage, mean over slices; K when uniform, 1 when collapsed.

    Args:
        count: ``[C, K]`` tokens per code.
    """
    share = count / count.sum(dim=1, keepdim=True).clamp(min=1.0)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(dim=1)
    return entropy.exp().mean()
