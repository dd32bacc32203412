"""The loss of tasks whose answer is a class: cross entropy, and how many were found.

b micro batch size, G classes.
"""

from __future__ import annotations

from typing import Any

import torch

NUM_SUMS = 3  # of a report: summed loss, scored answers, answers whose class was found


def class_loss(
    labels: torch.Tensor, mask: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum the cross entropies, in fp32, of logits ``[b, G]`` under the mask ``[b]``, and count it.

    Returns:
        As a task's loss: summed loss, number of answers int32, and ``{"loss": fp64 [3]}``. No
        communication.
    """
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    total, num_answers = (losses * mask).sum(), mask.sum()
    num_right = ((logits.argmax(dim=-1) == labels) * mask).sum()
    report = torch.stack([total.detach().double(), num_answers.double(), num_right.double()])
    return total, num_answers.to(torch.int), {"loss": report}


def class_scores(loss: float, num_answers: int, num_right: float) -> dict[str, float]:
    """Nats per answer, and the share of answers whose class was found."""
    return {"val/loss": loss / num_answers, "val/accuracy": num_right / num_answers}
