"""How far two sets of choices agree: as they are, and after the best renaming of experts or codes.

T tokens, k choices per token, n experts or codes. Both sets are of the same tokens in the same
order. A codebook whose codes changed places chooses the same under other names: renaming by the
Hungarian method (scipy's ``linear_sum_assignment`` over the counts of pairs) tells it from one that
really chooses differently. Renaming also fits noise, so agreement is given beside that of the same
choices dealt to the tokens at random, renamed as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Agreement:
    """Shares of the choices of one side that the other side has for the same token, in [0, 1]."""

    same: float  # under their own names
    renamed: float  # after the best one-to-one renaming
    renamed_by_chance: float  # the same with one side's tokens shuffled
    num_moved: int  # used ids that the best renaming gives another name


def pair_counts(first: torch.Tensor, second: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Count pairs of a choice of each side, over all tokens.

    Args:
        first: int64 ``[T, k]`` in ``[0, num_ids)``, different ids within a token.
        second: likewise.
        num_ids: n.

    Returns:
        fp64 ``[n, n]``: tokens for which ``first`` has the row's id and ``second`` the column's.

    Raises:
        ValueError: where the two are not of the same tokens.
    """
    _check_alike(first, second)
    pairs = first.unsqueeze(2) * num_ids + second.unsqueeze(1)  # [T, k, k]
    counts = torch.bincount(pairs.reshape(-1), minlength=num_ids * num_ids)
    return counts.view(num_ids, num_ids).double()


def best_renaming(counts: torch.Tensor) -> torch.Tensor:
    """Return int64 ``[n]``: the id of the second side that each id of the first becomes.

    Of all one-to-one renamings one with the most agreement over ``counts`` ``[n, n]``; where ids
    were never chosen they keep their name if it is free.
    """
    tie = torch.eye(counts.shape[0], dtype=torch.float64) * 1e-6
    _, columns = linear_sum_assignment((counts + tie).numpy(), maximize=True)
    return torch.from_numpy(columns)


def agreement(first: torch.Tensor, second: torch.Tensor, generator: torch.Generator) -> Agreement:
    """Compare two sets of choices of the same tokens, int64 ``[T, k]`` each.

    Of n ids only those that one side chose are looked at, so that n may be large.

    ``generator`` shuffles tokens for the agreement by chance.

    Raises:
        ValueError: where they are not of the same tokens, or there is none.
    """
    if not first.numel():
        raise ValueError("there is no choice to compare")
    _check_alike(first, second)
    used, (first, second) = torch.stack([first, second]).unique(return_inverse=True)
    num_ids = len(used)
    counts = pair_counts(first, second, num_ids)
    renaming = best_renaming(counts)
    order = torch.randperm(first.shape[0], generator=generator)
    shuffled = pair_counts(first, second[order], num_ids)
    is_used = counts.sum(dim=1) > 0
    return Agreement(
        same=_kept(counts, torch.arange(num_ids)) / first.numel(),
        renamed=_kept(counts, renaming) / first.numel(),
        renamed_by_chance=_kept(shuffled, best_renaming(shuffled)) / first.numel(),
        num_moved=int(((renaming != torch.arange(num_ids)) & is_used).sum()),
    )


def _check_alike(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"choices of shapes {list(first.shape)} and {list(second.shape)} are not of the same "
            "tokens; both must be [tokens, choices]"
        )


def _kept(counts: torch.Tensor, renaming: torch.Tensor) -> float:
    return float(counts[torch.arange(counts.shape[0]), renaming].sum())
