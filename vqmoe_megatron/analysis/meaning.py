"""What codes say about tokens: mutual information and purity, each beside its chance.

T tokens. A code is one id per token; a *class* is what it is compared with: the token itself, its
place in the window, its part of speech. Both are int64 ``[T]``, of any values from 0.

Counted on T tokens, the information of unrelated things is above zero (about (n - 1)(m - 1) / 2T
nats), and purity above the largest class. So each is given with the mean of the same figure over
shuffled codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vqmoe_megatron.analysis.usage import entropy


@dataclass(frozen=True)
class Meaning:
    """How much codes say about one kind of class."""

    information_nats: float  # I(code; class)
    information_by_chance: float
    class_entropy_nats: float  # H(class): the most that codes could say
    purity: float  # share of tokens in the class that is most frequent among their code's
    purity_by_chance: float


def table_of_counts(codes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Count pairs: fp64 ``[codes, classes]`` over the values that occur.

    Raises:
        ValueError: where the two are not of the same tokens.
    """
    if codes.shape != classes.shape or codes.dim() != 1 or not codes.numel():
        raise ValueError(
            f"codes {list(codes.shape)} and classes {list(classes.shape)} must be one id each of "
            "the same tokens"
        )
    _, rows = codes.unique(return_inverse=True)
    _, columns = classes.unique(return_inverse=True)
    num_rows, num_columns = int(rows.max()) + 1, int(columns.max()) + 1
    counts = torch.bincount(rows * num_columns + columns, minlength=num_rows * num_columns)
    return counts.view(num_rows, num_columns).double()


def mutual_information(counts: torch.Tensor) -> float:
    """I in nats of a table of counts: H(row) + H(column) - H(row, column), at least 0."""
    information = entropy(counts.sum(dim=1)) + entropy(counts.sum(dim=0)) - entropy(counts)
    return max(0.0, information)


def purity(counts: torch.Tensor) -> float:
    """Share of tokens that are of their code's most frequent class, of a table ``[codes, n]``."""
    return float(counts.max(dim=1).values.sum() / counts.sum())


def meaning_of(
    codes: torch.Tensor, classes: torch.Tensor, generator: torch.Generator, num_shuffles: int = 5
) -> Meaning:
    """Compare codes with classes, int64 ``[T]`` each; ``generator`` shuffles the codes.

    Raises:
        ValueError: as :func:`table_of_counts`.
    """
    counts = table_of_counts(codes, classes)
    shuffled = [
        table_of_counts(codes[torch.randperm(len(codes), generator=generator)], classes)
        for _ in range(num_shuffles)
    ]

    def by_chance(figure: Callable[[torch.Tensor], float]) -> float:
        return sum(map(figure, shuffled)) / num_shuffles

    return Meaning(
        information_nats=mutual_information(counts),
        information_by_chance=by_chance(mutual_information),
        class_entropy_nats=entropy(counts.sum(dim=0)),
        purity=purity(counts),
        purity_by_chance=by_chance(purity),
    )
