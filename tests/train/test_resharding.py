"""A run that is stopped, moved to other layouts and continued is the run that stayed."""

from __future__ import annotations

import pytest
from fast_tier import only
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP, ETP = "virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
SIX = ["train.train_iters=20", "train.exit_interval=2"]
# Ranks, sizes and options of each two-step stretch of one run.
JOURNEYS = {
    "ep4-ep2-ep1": [(4, {EP: 4}, []), (2, {EP: 2}, []), (1, {}, [])],
    "tp2-pp2-tp1": [(2, {TP: 2}, []), (2, {PP: 2}, []), (2, {PP: 2, VPP: 2}, [])],
    "distributed-optimizer-dp1-dp2-dp4-off": [
        (1, {}, DISTRIBUTED),
        (2, {EP: 2}, DISTRIBUTED),
        (4, {EP: 2}, DISTRIBUTED),
        (2, {}, []),
        (2, {TP: 2}, DISTRIBUTED),
    ],
    "etp2-etp1-gated": [
        (2, {ETP: 2}, DISTRIBUTED),
        (2, {EP: 2}, []),
        (4, {TP: 2, EP: 2, ETP: 2}, []),
    ],
    "shared-expert-tp2-tp1": [
        (2, {TP: 2}, DISTRIBUTED),
        (2, {EP: 2}, []),
        (4, {TP: 2, PP: 2}, DISTRIBUTED),
    ],
    "one-expert-etp2-tp2": [(2, {ETP: 2}, []), (2, {TP: 2}, DISTRIBUTED), (1, {}, [])],
    "released": [(4, {TP: 2, EP: 2}, DISTRIBUTED), (2, {PP: 2, VPP: 2}, []), (1, {}, [])],
    "residual": [(2, {TP: 2}, DISTRIBUTED), (2, {EP: 2}, []), (1, {}, [])],
    "filled": [(2, {EP: 2}, []), (2, {ETP: 2}, DISTRIBUTED), (2, {PP: 2, VPP: 2}, [])],
}
GATED = ["model.gated_linear_unit=true", "model.activation_func=silu"]
OPTIONS = {
    "etp2-etp1-gated": GATED,
    "shared-expert-tp2-tp1": [
        *GATED,
        "model.add_bias_linear=false",
        "model.moe_shared_expert_intermediate_size=32",
    ],
    "one-expert-etp2-tp2": ["model.num_moe_experts=1", "model.moe_router_topk=1"],
    "released": [
        *("model.norm_placement=post", "vq.norm=shared_with_block", "vq.expert_input=blend"),
        *("model.moe_router_freeze=true", "model.moe_router_pre_softmax=false"),
        *("model.moe_router_topk=1", "vq.codebook_update=gradient"),
    ],
    "residual": [
        *("vq.quantizer=residual", "vq.num_code_slices=2", "vq.codebook_update=gradient"),
    ],
    "filled": [
        *("vq.path=filled", "vq.threshold_routing=true", "model.moe_router_topk=1"),
        "vq.fill_values=direct",
    ],
}


def curve(results):
    return {r["iteration"]: r for r in results[0]["records"] if r["iteration"] > 0}


@pytest.mark.parametrize("name", only(JOURNEYS, "tp2-pp2-tp1"))
def test_a_run_goes_on_at_other_layouts(name, ranks, stdlib_corpus, tmp_path):
    every = [*SIX, "train.eval_iters=0", *OPTIONS.get(name, [])]
    moved = {}
    for number, (num_ranks, layout, overrides) in enumerate(JOURNEYS[name]):
        results = run_on(
            ranks(num_ranks), stdlib_corpus, tmp_path / "moved", [*every, *overrides], layout
        )
        assert [result["iteration"] for result in results] == [2 * number + 2] * num_ranks
        moved |= curve(results)
    stayed = [*every[1:], "train.train_iters=20", f"train.exit_interval={len(moved)}"]
    expected = curve(run_on(ranks(1), stdlib_corpus, tmp_path / "stayed", stayed, {}))
    assert sorted(moved) == sorted(expected)
    for iteration, theirs in expected.items():
        for metric in ("loss", "grad_norm", "vq/code_perplexity", "learning_rate"):
            assert moved[iteration][metric] == pytest.approx(theirs[metric], rel=1e-5), metric


@pytest.mark.full
@pytest.mark.parametrize("first, second", [(DISTRIBUTED, []), ([], DISTRIBUTED)])
def test_bf16_keeps_its_main_parameters_when_the_optimizer_changes(
    first, second, ranks, small_corpus, tmp_path
):
    every = [*TINY, "train.train_iters=6", "model.bf16=true"]
    stayed = run_on(ranks(2), small_corpus, tmp_path / "stayed", [*every, *first], {EP: 2})
    cut = [*every, "train.exit_interval=3"]
    run_on(ranks(2), small_corpus, tmp_path / "moved", [*cut, *first], {EP: 2})
    moved = run_on(ranks(2), small_corpus, tmp_path / "moved", [*every, *second], {EP: 2})
    expected = curve(stayed)
    for iteration, ours in curve(moved).items():
        # Main parameters of bf16 resolution would be off by 1e-3 at once.
        assert ours["loss"] == pytest.approx(expected[iteration]["loss"], rel=1e-6)


def test_a_stage_without_experts_and_dropout_at_another_layout(ranks, small_corpus, tmp_path):
    every = [*TINY, "train.train_iters=8", "model.moe_layer_freq=2", "model.hidden_dropout=0.1"]
    cut = [*every, "train.exit_interval=4"]
    run_on(ranks(2), small_corpus, tmp_path, cut, {PP: 2})
    first = run_on(ranks(1), small_corpus, tmp_path, cut, {})
    assert sorted(curve(first)) == [5, 6, 7, 8]
    assert max(r["loss"] for r in curve(first).values()) < 5.6  # it went on, not back
