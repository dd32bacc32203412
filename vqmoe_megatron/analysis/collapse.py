"""Whether representations collapse: effective ranks, likeness of experts, rank of gradients.

T tokens, H hidden size, N experts, M inputs.

The *effective rank* of a matrix is exp of the entropy of its singular values' shares (Roy and
Vetterli, 2007): n for n equal ones, 1 for one alone. The *rank* counts those above ``RANK_STEP`` of
the largest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

RANK_STEP = 1e-4  # of the largest singular value: sums in fp32 leave 1e-6 to 1e-5 where zero is


def singular_values(matrix: torch.Tensor, center: bool = False) -> torch.Tensor:
    """Return the singular values of ``[M, H]``, fp64 and falling; ``center``: of its deviations
    from the mean row."""
    matrix = matrix.detach().double()
    if center:
        matrix = matrix - matrix.mean(dim=0, keepdim=True)
    return torch.linalg.svdvals(matrix)


def effective_rank(values: torch.Tensor) -> float:
    """Return exp(entropy) of the shares of singular values; 0 where all are zero."""
    total = float(values.sum())
    if total <= 0:
        return 0.0
    share = values[values > 0] / total
    return float((-(share * share.log()).sum()).exp())


def rank(values: torch.Tensor) -> int:
    """Count singular values above ``RANK_STEP`` of the largest; 0 where all are zero."""
    largest = float(values.max()) if values.numel() else 0.0
    return int((values > RANK_STEP * largest).sum()) if largest > 0 else 0


def mean_cosine(rows: torch.Tensor) -> float:
    """Mean cosine over all pairs of N rows: 1 for copies, about 0 for unrelated ones.

    Args:
        rows: ``[N, ...]``; each is one vector.

    Returns:
        NaN for one row, which has no pair.
    """
    flat = torch.nn.functional.normalize(rows.detach().double().flatten(1), dim=1)
    num_rows = flat.shape[0]
    if num_rows < 2:
        return float("nan")
    summed = flat.sum(dim=0).square().sum() - flat.square().sum()
    return float(summed / (num_rows * (num_rows - 1)))


def num_different_experts(outputs: torch.Tensor) -> float:
    """Effective rank of N experts' outputs ``[N, M, H]`` to the same inputs, each one vector.

    1 for copies of one expert, N for outputs at right angles.
    """
    return effective_rank(singular_values(outputs.flatten(1)))


def input_gradients(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    num_probes: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return rows ``v^T J_t`` of random directions v, for every token and probe: ``[P * T, H]``.

    J_t is the Jacobian of a function that maps every token by itself. One forward and backward pass
    (a vector-Jacobian product) per probe serves all tokens.

    Args:
        function: ``[T, H]`` to ``[T, D]``, differentiable.
        x: ``[T, H]``.
        num_probes: P.
        generator: of the directions, normal.
    """
    rows = []
    with torch.enable_grad():
        for _ in range(num_probes):  # each a pass of its own: codes' gradients can be taken once
            leaf = x.detach().clone().requires_grad_()
            output = function(leaf)
            probe = torch.randn(output.shape, generator=generator).to(output)
            if not output.requires_grad:  # of nothing in x, as where a path keeps it constant
                rows.append(torch.zeros_like(leaf))
                continue
            (grad,) = torch.autograd.grad(output, leaf, probe, materialize_grads=True)
            rows.append(grad.detach())
    return torch.cat(rows)
