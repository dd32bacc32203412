"""Losses of pretraining: what a rank that holds a part of its sequences gives of their mean."""

from __future__ import annotations

import pytest
import torch
from small_run import PARITY

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.tasks.pretrain import Pretrain, masked_loss, part_of_mean_loss
from vqmoe_megatron.train.preflight import check_parts


@pytest.mark.parametrize("num_scored", [1, 3, 8])
def test_parts_of_a_mean_are_the_mean_whatever_the_mask(num_scored: int) -> None:
    """As Megatron does it: divided by the count it is told, then the mean over ranks."""
    losses = torch.rand(2, 8, dtype=torch.float64).float()
    mask = torch.zeros(2, 8)
    mask[0, :num_scored] = 1.0  # all of them on the first of two ranks, or nearly
    total, num_tokens, report = masked_loss(mask, losses)
    parts = [
        part_of_mean_loss(own_mask, mask, 2, own)
        for own_mask, own in zip(mask.chunk(2, 1), losses.chunk(2, 1), strict=True)
    ]
    means = [part / count.clamp(min=1) for part, count, _ in parts]
    torch.testing.assert_close(sum(means) / 2, total / num_tokens)
    torch.testing.assert_close(sum(part[2]["loss"] for part in parts), report["loss"])
    assert all(count.dtype == torch.int32 for _, count, _ in parts)


def test_a_task_that_does_not_cut_its_batches_is_refused(monkeypatch) -> None:  # noqa: ANN001
    config = load_recipe(PARITY, ["parallel.context_parallel_size=2"])
    check_parts(config, "cpu")
    monkeypatch.setattr(Pretrain, "cuts_sequences", False)
    with pytest.raises(ValueError, match="context_parallel_size=2: train.task=pretrain gives"):
        check_parts(config, "cpu")
    check_parts(load_recipe(PARITY, []), "cpu")


def test_a_task_that_reads_no_streams_is_refused(monkeypatch) -> None:  # noqa: ANN001
    relative = ["model.attention=transformer_xl", "model.position_embedding_type=relative"]
    config = load_recipe(PARITY, relative)
    check_parts(config, "cpu")
    monkeypatch.setattr(Pretrain, "reads_streams", False)
    with pytest.raises(ValueError, match="train.task=pretrain does not read parallel streams"):
        check_parts(config, "cpu")
    check_parts(load_recipe(PARITY, []), "cpu")
