"""One token of the filled path, slow and readable: part of the layer's oracle.

H hidden size, N experts, K codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vqmoe_megatron.config import VQConfig


def filled_output(
    token: torch.Tensor,
    logits: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    vector: torch.Tensor,
    distance: float,
    rows: torch.Tensor | None,
    vq: VQConfig,
    topk: int,
    tau: float | None,
) -> tuple[torch.Tensor, list[int]]:
    """Evaluate one token.

    Args:
        token: ``[H]``.
        logits: ``[N]`` of the router.
        expert: number and input ``[H]`` -> output ``[H]``.
        vector: ``[H]``, of the token's code.
        distance: |x - v| / sqrt(H).
        rows: ``[N, H]`` learned rows of the token's code (fill_values=direct).
        vq: the layer's settings.
        topk: k, without threshold routing.
        tau: of threshold routing; None: not set yet.

    Returns:
        The output ``[H]`` and the experts that saw the token. The softmax is taken in the dtype of
        ``token``.
    """
    p = logits.softmax(dim=0)
    by_likelihood = sorted(range(len(p)), key=lambda e: -float(p[e]))
    if not vq.threshold_routing:
        chosen = by_likelihood[:topk]
    elif tau is None:
        chosen = by_likelihood[:1]
    else:
        chosen = [e for e in range(len(p)) if float(p[e]) * distance > tau]
    y = torch.zeros_like(token) + 0.0 * p.sum()  # no expert at all: zero, and no gradient
    for e in chosen:
        y = y + p[e] * expert(e, token)
    for j in by_likelihood[: vq.num_fill_experts]:
        if j not in chosen:
            row = expert(j, vector) if rows is None else rows[j]
            y = y + p[j] * (row.detach() if vq.fill_values == "detached" else row)
    return y, sorted(chosen)
