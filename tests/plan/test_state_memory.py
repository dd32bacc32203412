"""Megatron's buffers drawn by hand; the real ones are compared in test_model_parameters.py."""

from __future__ import annotations

from real_model import recipe

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.state_memory import GradientBuffer, stage_buffers


def test_shards_cut_buckets_not_parameters() -> None:
    # two buckets of 256 and 128 for 2 ranks; parameters 0..100, 128..250, 256..300
    buffer = GradientBuffer(
        chunk=0,
        is_expert=False,
        bytes_per_element=2,
        num_ranks=2,
        is_distributed=True,
        buckets=((0, 256), (256, 384)),
        spans=((0, 100), (128, 250), (256, 300)),
    )
    assert buffer.num_elements == 384
    assert buffer.shard_elements(0) == 100 + 44
    assert buffer.shard_elements(1) == 122 + 0


def test_shards_hold_every_element_once() -> None:
    overrides = ["optimizer.use_distributed_optimizer=true", "train.global_batch_size=12"]
    config = recipe([*overrides, "parallel.expert_model_parallel_size=2"])
    dense, experts = stage_buffers(config, check_layout(config, 6, "cpu"), 0)
    assert (dense.num_ranks, experts.num_ranks) == (6, 3)
    for buffer in (dense, experts):
        elements = sum(end - start for start, end in buffer.spans)
        assert sum(buffer.shard_elements(r) for r in range(buffer.num_ranks)) == elements
        assert all(start % 64 == 0 for start, _ in buffer.spans)
        assert buffer.num_elements % 128 == 0 == buffer.num_elements % buffer.num_ranks


def test_tied_embeddings_are_alone_in_their_bucket() -> None:
    overrides = [
        "optimizer.use_distributed_optimizer=true", "parallel.pipeline_model_parallel_size=2",
        "model.untie_embeddings_and_output_weights=false",
    ]  # fmt: skip
    config = recipe(overrides)
    layout = check_layout(config, 2, "cpu")
    table = 384 * 48
    first, last = (stage_buffers(config, layout, stage)[0] for stage in (0, 1))
    assert first.buckets[-1][1] - first.buckets[-1][0] == table
    assert last.buckets[0] == (0, table)
    assert len(first.buckets) == len(last.buckets) == 2


def test_frozen_codes_have_no_gradient_and_trained_ones_their_own_buffer() -> None:
    bf16 = ["model.bf16=true", "optimizer.use_distributed_optimizer=true"]
    frozen = recipe(bf16)
    trained = recipe([*bf16, "vq.codebook_update=gradient"])
    layout = check_layout(frozen, 1, "cpu")
    assert [b.bytes_per_element for b in stage_buffers(frozen, layout, 0)] == [2, 2]
    assert [b.bytes_per_element for b in stage_buffers(trained, layout, 0)] == [2, 4, 2]
