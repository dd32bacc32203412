"""Runs with code memory: the same curve at every layout across the freeze, exact resume."""

from __future__ import annotations

import pytest
from fast_tier import only
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
ETP = "expert_tensor_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
FULL = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
MOE = ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"]
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = [
    *DISTRIBUTED,
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
# More codes than bytes in use, contexts, gradient accumulation; codes are frozen after 5 steps.
MEMORY = [
    "code_memory.num_rows=64",
    "code_memory.codes=embedding",
    "code_memory.num_codes=128",
    "code_memory.num_context_codes=12",
    "code_memory.context_dim=8",
    "code_memory.freeze_after_steps=5",
    "code_memory.exchange=rows",
    "code_memory.lr_mult=5",
]
SIX = ["train.train_iters=20", "train.exit_interval=6", "train.global_batch_size=8", *MEMORY]
LAYOUTS = {
    "ep2": (2, {EP: 2}, []),
    "tp2-moe-recompute": (2, {TP: 2}, MOE),
    "etp2-table": (2, {ETP: 2}, ["code_memory.exchange=table"]),
    "tp2-ep2": (4, {TP: 2, EP: 2}, DISTRIBUTED),
    "tp2-ep2-etp2": (4, {TP: 2, EP: 2, ETP: 2}, []),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}, []),
    "pp2-vpp2-full-recompute": (2, {PP: 2, VPP: 2}, FULL),
    "pp2-full-recompute": (2, {PP: 2}, FULL),
    "pp2-ep2-full-recompute": (4, {PP: 2, EP: 2}, [*FULL, *DISTRIBUTED]),
    "dp2-distributed-optimizer": (2, {}, DISTRIBUTED),
    "ep2-overlap": (2, {EP: 2}, OVERLAP),
}


@pytest.fixture(scope="module")
def one_rank(ranks, stdlib_corpus, tmp_path_factory):
    return run_on(ranks(1), stdlib_corpus, tmp_path_factory.mktemp("one"), SIX, {})[0]


@pytest.mark.parametrize("name", only(LAYOUTS, "tp2-ep2", "pp2-full-recompute"))
def test_the_curve_is_that_of_one_rank(name, ranks, one_rank, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = LAYOUTS[name]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path, [*SIX, *overrides], layout)
    expected = one_rank["records"]
    assert [record["code_memory/stream_frozen"] for record in expected[1:]] == [0, 0, 0, 0, 0, 1]
    for result in results:
        for ours, theirs in zip(result["records"], expected, strict=True):
            for metric in {"loss", "grad_norm", "val/loss"} & set(theirs):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-6), metric
            of_stream = {metric for metric in theirs if metric.startswith("code_memory/")}
            others = {m for m in ours if m.startswith("code_memory/")} - of_stream
            assert of_stream < set(ours)
            assert all(m.endswith("/distinct_rows") for m in others)  # one rank does not know
            for metric in of_stream:
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric
        assert result["streams"] == results[0]["streams"]


@pytest.mark.parametrize("name", only(["bf16", "hidden", "hidden-fixed", "layers-2"], "bf16"))
def test_variants_agree_between_one_rank_and_two(name, ranks, stdlib_corpus, tmp_path):
    overrides, tolerance = {
        "bf16": (["model.bf16=true"], 2e-2),
        "hidden": (["code_memory.codes=hidden", "code_memory.num_context_codes=0"], 1e-6),
        "hidden-fixed": (
            [
                "code_memory.codes=hidden",
                "code_memory.num_context_codes=0",
                "code_memory.num_codes=4",
                "code_memory.freeze_after_steps=0",
            ],
            1e-6,
        ),
        "layers-2": (["code_memory.layers=[2]", "code_memory.values=experts"], 1e-6),
    }[name]
    every = [*TINY, *SIX, *overrides]
    (one,) = run_on(ranks(1), stdlib_corpus, tmp_path / "one", every, {})
    two = run_on(ranks(2), stdlib_corpus, tmp_path / "two", every, {EP: 2})
    assert one["error"] == two[0]["error"] == ""
    for ours, theirs in zip(two[0]["records"], one["records"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    assert two[0]["streams"] == two[1]["streams"]
    if name.startswith("hidden"):
        assert set(two[0]["codebooks"]) >= {"1.memory", "2.memory"}
        assert two[0]["codebooks"] == two[1]["codebooks"]
        assert two[0]["records"][-1]["code_memory/hidden_codes_in_use"] > 0


@pytest.mark.parametrize("path", ["dual", "discrete"])
def test_a_stage_without_memory_and_a_model_with_one_expert(path, ranks, stdlib_corpus, tmp_path):
    """Layer 2, which is dense, is alone on its stage: only the stream is there."""
    every = [*TINY, *SIX, "model.moe_layer_freq=2", f"vq.path={path}"]
    every += ["model.num_moe_experts=1", "model.moe_router_topk=1", "code_memory.layers=[1]"]
    (one,) = run_on(ranks(1), stdlib_corpus, tmp_path / "one", every, {})
    two = run_on(ranks(2), stdlib_corpus, tmp_path / "two", every, {PP: 2})
    assert len(one["records"]) == 6
    for ours, theirs in zip(two[0]["records"], one["records"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert two[0]["streams"] == two[1]["streams"]


def test_a_run_that_was_stopped_goes_on_bit_by_bit(ranks, small_corpus, tmp_path):
    """Before and after the freeze."""
    every = [*TINY, *MEMORY, "train.train_iters=6", "optimizer.lr_warmup_iters=1"]
    layout = {EP: 2}
    stayed = run_on(ranks(2), small_corpus, tmp_path / "stayed", every, layout)[0]
    cut = []
    for interval in (2, 2, 4):
        cut_here = [*every, f"train.exit_interval={interval}"]
        cut += [run_on(ranks(2), small_corpus, tmp_path / "cut", cut_here, layout)[0]]
    assert cut[-1]["iteration"] == 6
    moved = {r["iteration"]: r["loss"] for part in cut for r in part["records"]}
    assert {r["iteration"]: r["loss"] for r in stayed["records"]} == moved
    assert cut[-1]["streams"] == stayed["streams"]
    assert cut[-1]["codebooks"] == stayed["codebooks"]


JOURNEYS = {
    "ep2-pp2-tp2": ([(2, {EP: 2}), (2, {PP: 2}), (2, {TP: 2})], []),
    "ep4-ep1-etp2": ([(4, {EP: 4}), (1, {}), (2, {ETP: 2})], []),
    "layers-2": ([(2, {PP: 2}), (2, {EP: 2}), (1, {})], ["code_memory.layers=[2]"]),
}


@pytest.mark.parametrize("name", only(JOURNEYS, "ep2-pp2-tp2"))
def test_a_run_goes_on_at_other_layouts(name, ranks, stdlib_corpus, tmp_path):
    journey, overrides = JOURNEYS[name]
    every = [*TINY, *SIX, *overrides]
    moved = {}
    for num_ranks, layout in journey:
        cut = [*every, "train.exit_interval=2"]
        results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path / "moved", cut, layout)
        moved |= {r["iteration"]: r["loss"] for r in results[0]["records"] if r["iteration"]}
    (stayed,) = run_on(ranks(1), stdlib_corpus, tmp_path / "stayed", every, {})
    expected = {r["iteration"]: r["loss"] for r in stayed["records"] if r["iteration"]}
    assert sorted(moved) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    for iteration, loss in expected.items():
        assert moved[iteration] == pytest.approx(loss, rel=1e-5)
