"""Cross entropy and found classes, under the mask."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.tasks.class_loss import class_loss


def test_the_loss_is_the_cross_entropy_under_the_mask() -> None:
    logits = torch.randn(5, 10, dtype=torch.float64).float()
    logits[4 - 1, 1] = logits[2, 4] = 9.0  # two of three are found
    labels, mask = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([1.0, 0, 1, 1, 0])
    total, count, report = class_loss(labels, mask, logits)
    wanted = sum(float(-torch.log_softmax(logits[i].double(), 0)[labels[i]]) for i in (0, 2, 3))
    assert float(total) == pytest.approx(wanted, rel=1e-6)
    assert int(count) == 3 and count.dtype == torch.int32
    right = sum(int(logits[i].argmax() == labels[i]) for i in (0, 2, 3))
    assert report["loss"].tolist() == pytest.approx([wanted, 3.0, right], rel=1e-6)
