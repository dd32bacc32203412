"""The same training at every layout, and bit-equal codebooks on all replicas."""

from __future__ import annotations

import pytest
from fast_tier import only
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
ETP = "expert_tensor_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
# The schedule of the whole recipe; four microbatches, or more, of every rank of data.
SIX = ["train.train_iters=20", "train.exit_interval=6", "train.global_batch_size=8"]
RECOMPUTE = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
OVERLAP = [
    "optimizer.use_distributed_optimizer=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
LAYOUTS = {
    "ep2": (2, {EP: 2}, []),
    "tp2": (2, {TP: 2}, []),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}, []),
    "dp2-distributed-optimizer": (2, {}, ["optimizer.use_distributed_optimizer=true"]),
    "tp2-ep4": (4, {TP: 2, EP: 4}, []),
    "etp2": (2, {ETP: 2}, []),
    "pp2-ep2": (4, {PP: 2, EP: 2}, []),
    "tp2-ep2-etp2": (4, {TP: 2, EP: 2, ETP: 2}, ["optimizer.use_distributed_optimizer=true"]),
    # the one rank runs in code space
    "token-dispatch-ep2": (2, {EP: 2}, ["vq.execution=tokens"]),
    "table-per-step-ep2": (2, {EP: 2}, ["vq.table_per_step=true"]),
    "table-per-step-pp2-vpp2": (2, {PP: 2, VPP: 2}, ["vq.table_per_step=true"]),
    "table-per-step-recompute-tp2": (2, {TP: 2}, ["vq.table_per_step=true", *RECOMPUTE]),
    "overlap-ep2": (2, {EP: 2}, OVERLAP),
}

FAST = (
    "tp2",
    "pp2-vpp2",
    "dp2-distributed-optimizer",
    "tp2-ep2-etp2",
    "token-dispatch-ep2",
    "table-per-step-pp2-vpp2",
)


# Control arms, by what their recipes say: a shared expert beside both paths, and a dense model.
CONTROLS = {
    "shared-expert": [
        "model.moe_shared_expert_intermediate_size=32",
        "model.add_bias_linear=false",
        "model.gated_linear_unit=true",
    ],
    "one-expert": ["model.num_moe_experts=1", "model.moe_router_topk=1", "vq.path=continuous"],
}
CONTROL_LAYOUTS = {
    "shared-expert-ep2": (2, {EP: 2}, []),
    "shared-expert-tp2-recompute": (2, {TP: 2}, RECOMPUTE),
    "shared-expert-pp2-vpp2": (2, {PP: 2, VPP: 2}, []),
    "shared-expert-tp2-ep4": (4, {TP: 2, EP: 4}, OVERLAP),
    "shared-expert-tp2-ep2-etp2": (4, {TP: 2, EP: 2, ETP: 2}, OVERLAP[:1]),
    "one-expert-tp2": (2, {TP: 2}, []),
    "one-expert-pp2-vpp2": (2, {PP: 2, VPP: 2}, []),
    "one-expert-tp2-etp2": (4, {TP: 2, ETP: 2}, OVERLAP[:1]),
    "one-expert-dp2-recompute": (2, {}, [*OVERLAP, *RECOMPUTE]),
}


@pytest.fixture(scope="module")
def controls_of_one_rank(ranks, stdlib_corpus, tmp_path_factory):
    """By control arm: what one rank makes of it."""
    return {
        name: run_on(
            ranks(1), stdlib_corpus, tmp_path_factory.mktemp(name), [*SIX, *overrides], {}
        )[0]
        for name, overrides in CONTROLS.items()
    }


@pytest.fixture(scope="module")
def one_rank(ranks, stdlib_corpus, tmp_path_factory):
    return run_on(ranks(1), stdlib_corpus, tmp_path_factory.mktemp("one"), SIX, {})[0]


@pytest.mark.parametrize("name", only(LAYOUTS, *FAST))
def test_the_curve_is_that_of_one_rank(name, ranks, one_rank, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = LAYOUTS[name]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path, [*SIX, *overrides], layout)
    check_curve(results, one_rank["records"])


@pytest.mark.parametrize(
    "name", only(CONTROL_LAYOUTS, "shared-expert-tp2-ep4", "one-expert-tp2-etp2")
)
def test_control_arms_train_alike(name, ranks, controls_of_one_rank, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = CONTROL_LAYOUTS[name]
    arm = next(arm for arm in CONTROLS if name.startswith(arm))
    every = [*SIX, *CONTROLS[arm], *overrides]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path, every, layout)
    check_curve(results, controls_of_one_rank[arm]["records"])


def check_curve(results, expected) -> None:
    assert [record["iteration"] for record in expected] == [0, 1, 2, 3, 4, 5, 6]
    for result in results:  # every rank: their gradient norms clip their own parameters
        for ours, theirs in zip(result["records"], expected, strict=True):
            compared = {"loss", "grad_norm", "val/loss"} & set(theirs)
            assert compared
            for metric in compared:
                assert ours[metric] == pytest.approx(theirs[metric], rel=2e-6), metric
            assert ours.get("vq/dead_codes") == theirs.get("vq/dead_codes")
            if "moe/expert_load_imbalance" in theirs:
                assert ours["moe/expert_load_imbalance"] == theirs["moe/expert_load_imbalance"]


RELEASED = [
    "model.norm_placement=post",
    "vq.norm=shared_with_block",
    "vq.expert_input=blend",
    "vq.codebook_update=gradient",
    "model.moe_router_topk=1",
    "model.moe_router_pre_softmax=false",
    "model.moe_router_freeze=true",
    "model.moe_router_load_balancing_type=none",
    "data.eval_window_tokens=32",
]
RELEASED_LAYOUTS = {
    "tp2-ep2-overlap": (4, {TP: 2, EP: 2}, OVERLAP),
    "pp2-vpp2-recompute": (2, {PP: 2, VPP: 2}, RECOMPUTE),
    "dp2": (2, {}, OVERLAP[:1]),
}


@pytest.mark.parametrize("name", only(RELEASED_LAYOUTS, "tp2-ep2-overlap"))
def test_the_released_curve_is_that_of_one_rank(name, ranks, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = RELEASED_LAYOUTS[name]
    every = [*SIX, *RELEASED]
    one = run_on(ranks(1), stdlib_corpus, tmp_path / "one", every, {})[0]["records"]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path / "n", [*every, *overrides], layout)
    check_curve(results, one)


FIXED = ["vq.freeze_codebook=true", "vq.codebook_update=gradient", "vq.init=uniform"]
QUANTIZERS = {
    "residual": ["vq.quantizer=residual", "vq.num_code_slices=3", "vq.revival=error"],
    "residual-gradient": [
        "vq.quantizer=residual", "vq.num_code_slices=2", "vq.codebook_update=gradient",
        "vq.init=kmeans",
    ],
    "fsq": [
        "vq.quantizer=fsq", "vq.code_dim=3", "vq.fsq_levels=[4, 3, 5]", "vq.num_codes=60",
        "vq.train_projection=true", *FIXED,
    ],
    "lfq": [
        "vq.quantizer=lfq", "vq.code_dim=6", "vq.num_codes=64", "vq.entropy_loss_coeff=0.5", *FIXED,
    ],
    "low-dim-trained": [
        "vq.quantizer=low_dim", "vq.code_dim=16", "vq.train_projection=true",
    ],
    "cosine-scale": ["vq.quantizer=cosine", "vq.learn_code_scale=true"],
}  # fmt: skip
QUANTIZER_LAYOUTS = {"ep2": (2, {EP: 2}, []), "tp2-ep2": (4, {TP: 2, EP: 2}, OVERLAP)}


@pytest.mark.parametrize(
    "name",
    only(
        [f"{layout}-{kind}" for kind in QUANTIZERS for layout in QUANTIZER_LAYOUTS],
        "tp2-ep2-residual",
        "tp2-ep2-fsq",
    ),
)
def test_the_curve_of_a_quantizer_is_that_of_one_rank(name, ranks, stdlib_corpus, tmp_path):
    layout = next(one for one in QUANTIZER_LAYOUTS if name.startswith(f"{one}-"))
    num_ranks, sizes, overrides = QUANTIZER_LAYOUTS[layout]
    every = [*SIX, *QUANTIZERS[name.removeprefix(f"{layout}-")]]
    one = run_on(ranks(1), stdlib_corpus, tmp_path / "one", every, {})[0]["records"]
    every += overrides
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path / "n", every, sizes)
    check_curve(results, one)
    assert all(result["codebooks"] == results[0]["codebooks"] for result in results)


FILLED = ["vq.path=filled", "optimizer.use_distributed_optimizer=true"]
THRESHOLD = [*FILLED, "vq.threshold_routing=true", "model.moe_router_topk=1"]
FILLED_LAYOUTS = {
    "pp2-vpp2-threshold": (2, {PP: 2, VPP: 2}, THRESHOLD),
    "tp2-ep2-etp2-per-step": (4, {TP: 2, EP: 2, ETP: 2}, [*FILLED, "vq.table_per_step=true"]),
    "tp2-recompute-threshold": (2, {TP: 2}, [*THRESHOLD, *RECOMPUTE]),
    "etp2-learned-rows": (2, {ETP: 2}, [*THRESHOLD, "vq.fill_values=direct"]),
    "overlap-ep2": (2, {EP: 2}, [*FILLED, *OVERLAP]),
}


@pytest.mark.parametrize("name", only(FILLED_LAYOUTS, "pp2-vpp2-threshold", "etp2-learned-rows"))
def test_the_filled_curve_is_that_of_one_rank(name, ranks, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = FILLED_LAYOUTS[name]
    alone = [one for one in overrides if one not in RECOMPUTE and "per_step" not in one]
    one = run_on(ranks(1), stdlib_corpus, tmp_path / "one", [*SIX, *alone], {})[0]["records"]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path / "n", [*SIX, *overrides], layout)
    metrics = {"loss", "grad_norm", "val/loss", "moe/load_balancing_loss"}
    if "vq.threshold_routing=true" in overrides:
        metrics |= {"moe/routing_threshold", "moe/exact_experts_per_token"}
        assert one[-1]["moe/tokens_without_exact_expert"] > 0
    for result in results:
        assert result["codebooks"].items() <= (
            {n: h for other in results for n, h in other["codebooks"].items()}.items()
        )  # replicas of a layer, threshold included, are bit-equal
        for ours, theirs in zip(result["records"], one, strict=True):
            for metric in metrics & set(theirs):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric


def test_a_pipeline_stage_without_experts_takes_part(ranks, small_corpus, tmp_path):
    every = [*TINY, "model.moe_layer_freq=2", "train.train_iters=8", "train.exit_interval=3"]
    one = run_on(ranks(1), small_corpus, tmp_path / "one", every, {})[0]["records"]
    two = run_on(ranks(2), small_corpus, tmp_path / "two", every, {PP: 2})[0]["records"]
    for ours, theirs in zip(two, one, strict=True):
        for metric in ("loss", "grad_norm", "moe/load_balancing_loss", "vq/code_perplexity"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric


@pytest.mark.parametrize(
    "num_ranks, layout",
    [
        pytest.param(4, {EP: 2}, id="dp2-ep2"),
        pytest.param(2, {TP: 2}, id="tp2", marks=pytest.mark.full),
    ],
)
def test_codebooks_are_bit_equal_on_all_replicas(num_ranks, layout, ranks, small_corpus, tmp_path):
    overrides = [*TINY, "train.train_iters=50", "train.log_interval=50"]
    results = run_on(ranks(num_ranks), small_corpus, tmp_path, overrides, layout)
    assert [result["iteration"] for result in results] == [50] * num_ranks
    first = results[0]["codebooks"]
    assert set(first) == {"1", "2"}
    assert results[0]["records"][-1]["vq/revived_codes"] > 0  # the hard case was met
    for result in results:
        assert result["codebooks"] == first
