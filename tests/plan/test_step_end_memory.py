"""What a step's end makes, by hand; a real step's end is measured in test_memory.py."""

from __future__ import annotations

import pytest
from real_model import recipe

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.state_memory import stage_buffers
from vqmoe_megatron.plan.step_end_memory import (
    candidate_bytes,
    codebook_move_bytes,
    held_candidate_bytes,
    save_bytes,
    step_end_bytes,
)

# 4 layers of 16 codes of width 48: u = 3072 bytes.
SLICES = ["vq.quantizer=product", "vq.num_code_slices=2"]


@pytest.mark.parametrize(
    ("overrides", "num_bytes"),
    [
        ([], 6 * 3072),
        (["vq.dead_code_threshold=0"], 3 * 3072),
        (["vq.codebook_update=gradient"], 2 * 3072),
        (["vq.codebook_update=gradient", "vq.dead_code_threshold=0"], 0),
        (["vq.codebook_update=reanchor"], 4 * 16 * 16 * 4),
        (["vq.codebook_update=reanchor", *SLICES], 4 * 2 * 16 * 16 * 4),
        (["vq.freeze_codebook=true"], 0),
        (["vq.path=continuous"], 0),
    ],
)
def test_a_codebooks_move(overrides: list[str], num_bytes: int) -> None:
    config = recipe(overrides)
    assert codebook_move_bytes(config, check_layout(config, 1, "cpu")) == num_bytes


def test_candidates_of_all_layers() -> None:
    config = recipe([])
    layout = check_layout(config, 1, "cpu")
    assert candidate_bytes(config, layout, 0) == 4 * 16 * 48 * 4
    many = recipe(["vq.num_codes=5000", *SLICES])
    assert candidate_bytes(many, layout, 0) == 4 * 4096 * 48 * 4
    assert candidate_bytes(recipe(["vq.path=continuous"]), layout, 0) == 0


def test_candidates_that_a_rank_holds_between_its_microbatches() -> None:
    tokens = ["model.seq_length=32", "train.micro_batch_size=1", "train.global_batch_size=12"]
    few, many = recipe(tokens), recipe([*tokens, "vq.num_codes=100"])
    one, three = check_layout(few, 1, "cpu"), check_layout(few, 3, "cpu")
    row = 4 * 48 * 4
    assert [held_candidate_bytes(few, one, 0, number) for number in (0, 1, 5)] == [
        0,
        16 * row,
        16 * row,
    ]
    of_many = [held_candidate_bytes(many, one, 0, number) // row for number in range(6)]
    assert of_many == [0, 32, 64, 96, 100, 100]
    # Of three replicas the first has microbatches 0 and 3 of the global batch.
    assert [held_candidate_bytes(many, three, 0, n) // row for n in (1, 2, 3)] == [32, 36, 36]
    sharded = check_layout(recipe([*tokens, "parallel.tensor_model_parallel_size=2"]), 2, "cpu")
    assert held_candidate_bytes(many, sharded, 0, 4) // row == 3 * 16 + 2
    assert held_candidate_bytes(recipe(["vq.path=continuous"]), one, 0, 1) == 0


def test_the_end_of_a_step_holds_candidates_and_one_moving_codebook() -> None:
    config = recipe([])
    layout = check_layout(config, 1, "cpu")
    expected = candidate_bytes(config, layout, 0) + codebook_move_bytes(config, layout)
    assert step_end_bytes(config, layout, 0) == expected > 0


def test_a_save_gathers_the_largest_bucket() -> None:
    config = recipe(["optimizer.use_distributed_optimizer=true", "train.global_batch_size=12"])
    layout = check_layout(config, 3, "cpu")
    buckets = [end - start for b in stage_buffers(config, layout, 0) for start, end in b.buckets]
    assert len(buckets) == 2
    assert save_bytes(config, layout, 0) == max(buckets) * 4 // 3 * 4
    assert save_bytes(recipe([]), layout, 0) == 0
