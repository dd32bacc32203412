"""Disturbing a model's input, and summing up what that costs.

b sequences, S tokens each, H hidden size. A *level* is how strong a disturbance is: the share of
tokens that are replaced, or the length of the noise in units of the embedding's own length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PAPER_CLAIM = 0.28  # of arXiv 2411.19402: "28% improvement in robustness"; protocol not public


def corrupt_tokens(
    tokens: torch.Tensor, rate: float, vocab_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Replace a share of the tokens by others, drawn evenly from the vocabulary.

    Args:
        tokens: int64 ``[b, S]``.
        rate: in [0, 1], of every token by itself.
        vocab_size: at least 2; a replaced token is never the one that was there.
        generator: of the draws, on the CPU.

    Returns:
        int64 ``[b, S]``.

    Raises:
        ValueError: for another rate.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"a corruption rate of {rate} is no share in 0..1")
    is_replaced = torch.rand(tokens.shape, generator=generator) < rate
    steps = torch.randint(1, vocab_size, tokens.shape, generator=generator)
    return torch.where(is_replaced, (tokens + steps) % vocab_size, tokens)


def add_noise(embedding: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """Add normal noise ``[..., H]`` whose expected squared length is that of each embedding, times
    ``size`` squared.

    Raises:
        ValueError: for a negative size.
    """
    if size < 0.0:
        raise ValueError(f"a noise of size {size} is negative")
    noise = torch.randn(embedding.shape, generator=generator).to(embedding)
    scale = embedding.detach().norm(dim=-1, keepdim=True) / embedding.shape[-1] ** 0.5
    return embedding + size * scale * noise


def area_under_curve(levels: Sequence[float], losses: Sequence[float]) -> float:
    """Mean loss over the range of levels, by trapezoids: in the unit of the losses.

    Raises:
        ValueError: for fewer than two levels, or levels that do not rise.
    """
    if len(levels) != len(losses) or len(levels) < 2:
        raise ValueError(f"{len(levels)} levels and {len(losses)} losses make no curve")
    steps = [after - before for before, after in zip(levels, levels[1:], strict=False)]
    if min(steps) <= 0:
        raise ValueError(f"levels {list(levels)} do not rise")
    means = [(a + b) / 2 for a, b in zip(losses, losses[1:], strict=False)]
    return sum(s * m for s, m in zip(steps, means, strict=True)) / (levels[-1] - levels[0])


def added_loss(levels: Sequence[float], losses: Sequence[float]) -> float:
    """What the disturbance adds: the area under the curve above its value at the first level."""
    return area_under_curve(levels, losses) - losses[0]


def reduction(added: float, reference: float) -> float:
    """Share by which ``added`` is below ``reference``: 0.28 is 28 % more robust; NaN where the
    reference lost nothing."""
    return 1.0 - added / reference if reference > 0 else float("nan")
