"""Operations of a step against those that torch counts on a real model."""

from __future__ import annotations

import pytest
from real_model import measure_flops, recipe

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.run_flops import run_flops

ONE = ["train.global_batch_size=1", "train.micro_batch_size=1"]
CASES = {
    "dual": [],
    "dense layers, gated, groups": [
        "model.moe_layer_freq=2", "model.gated_linear_unit=true", "model.num_query_groups=2",
    ],
    "recomputed": [
        "vq.path=continuous", "model.recompute_granularity=full",
        "model.recompute_method=uniform", "model.recompute_num_layers=2",
    ],
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_the_model(ranks, name: str) -> None:
    overrides = [*CASES[name], *ONE]
    ((forward, backward),) = ranks(1).run(measure_flops, overrides)
    config = recipe(overrides)
    planned = run_flops(config, check_layout(config, 1, "cpu")).all_ranks
    assert (planned.forward, planned.backward + planned.recompute) == (forward, backward)


def test_all_ranks_do_the_same_work_together_at_every_layout() -> None:
    base = ["vq.path=continuous"]  # code space evaluates codes once per replica
    one = recipe(base)
    whole = run_flops(one, check_layout(one, 1, "cpu"))
    for sizes in (
        ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        ["parallel.expert_model_parallel_size=4"],
        ["parallel.expert_tensor_parallel_size=2"],
    ):
        config = recipe([*base, *sizes])
        cut = run_flops(config, check_layout(config, 4, "cpu"))
        assert cut.all_ranks == whole.all_ranks
        assert cut.by_part == whole.by_part
        assert sum(of_rank.total for of_rank in cut.per_rank) * 4 // len(cut.per_rank) == (
            cut.all_ranks.total
        )
    assert whole.per_token == whole.all_ranks.model / (8 * 16)


def test_selective_recompute_repeats_the_scores() -> None:
    config = recipe(["model.recompute_granularity=selective"])
    flops = run_flops(config, check_layout(config, 1, "cpu")).all_ranks
    assert flops.recompute == 8 * 4 * (4 * 16 * 16 * 48)  # batch, layers, 4 t S A d
