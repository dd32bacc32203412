"""Runs with Transformer-XL's attention: the same curve at every layout, exact resume, streams."""

from __future__ import annotations

import pytest
from fast_tier import only
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP = "virtual_pipeline_model_parallel_size"
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = [
    *DISTRIBUTED,
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
RECOMPUTE = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
# Four microbatches a rank, a memory longer than a segment and no multiple of it.
RELATIVE = [
    "model.attention=transformer_xl",
    "model.position_embedding_type=relative",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
]
MEMORY = [*RELATIVE, "model.memory_length_tokens=40"]
TWENTY = ["vq.path=continuous", "train.eval_interval=10", "train.eval_iters=3"]
LAYOUTS = {
    "tp2": (2, {TP: 2}, []),
    "pp2": (2, {PP: 2}, []),
    "pp2-vpp2-recompute": (2, {PP: 2, VPP: 2}, RECOMPUTE),
    "dp2-overlap": (2, {}, OVERLAP),
    "tp2-ep2-dp2": (4, {TP: 2, EP: 2}, DISTRIBUTED),
    "tp2-pp2-core-recompute": (4, {TP: 2, PP: 2}, ["model.recompute_granularity=selective"]),
}
LIMIT = 1e-5


@pytest.fixture(scope="module")
def one_rank(ranks, stdlib_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_on(ranks(1), stdlib_corpus, folder, [*MEMORY, *TWENTY], {})[0]


@pytest.mark.parametrize("name", only(LAYOUTS, "tp2", "pp2", "dp2-overlap"))
def test_the_curve_is_that_of_one_rank(name, ranks, one_rank, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = LAYOUTS[name]
    every = [*MEMORY, *TWENTY, *overrides]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path, every, layout)
    expected = one_rank["records"]
    assert [record["iteration"] for record in expected] == list(range(21))
    for result in results:
        for ours, theirs in zip(result["records"], expected, strict=True):
            compared = {"loss", "grad_norm", "val/loss"} & set(theirs)
            assert compared
            for metric in compared:
                assert ours[metric] == pytest.approx(theirs[metric], rel=LIMIT), metric


def test_codes_agree_too(ranks, stdlib_corpus, tmp_path):
    every = [*MEMORY, *TINY, "train.train_iters=20", "train.exit_interval=6"]
    one = curve(run_on(ranks(1), stdlib_corpus, tmp_path / "one", every, {}))
    two = curve(run_on(ranks(2), stdlib_corpus, tmp_path / "two", every, {TP: 2}))
    assert sorted(one) == sorted(two) == list(range(1, 7))
    for iteration, found in two.items():
        assert found == pytest.approx(one[iteration], rel=LIMIT)


def curve(results):
    """Loss and gradient norm of rank 0 by iteration, exact."""
    return {r["iteration"]: (r["loss"], r["grad_norm"]) for r in results[0]["records"]}


# 40 tokens of memory are full after 3 steps of 16: one run stops while it fills, one behind that.
SHORT = [*TINY, *MEMORY, "train.train_iters=8", "model.hidden_dropout=0.1"]


@pytest.mark.parametrize(
    ("stop", "layout", "overrides"),
    [
        pytest.param(2, {}, ["model.attention_dropout=0.1"], id="filling-dp2"),
        pytest.param(5, {PP: 2}, [], id="full-pp2"),
        pytest.param(5, {TP: 2}, ["model.bf16=true"], id="bf16-tp2", marks=pytest.mark.full),
    ],
)
def test_resuming_is_bitwise_exact(stop, layout, overrides, ranks, small_corpus, tmp_path):
    pool, every = ranks(2), [*SHORT, *overrides]
    whole = run_on(pool, small_corpus, tmp_path / "whole", every, layout)
    cut = [*every, f"train.exit_interval={stop}"]
    first = run_on(pool, small_corpus, tmp_path / "cut", cut, layout)
    second = run_on(pool, small_corpus, tmp_path / "cut", every, layout)
    assert first[0]["iteration"] == stop
    assert sorted(curve(second)) == list(range(stop + 1, 9))
    assert curve(first) | curve(second) == curve(whole)


def test_a_run_goes_on_at_another_layout_with_its_memory(ranks, small_corpus, tmp_path):
    """Rows are streams wherever they are computed: DP 2 by two rows, then DP 1 by four, then PP."""
    every = [*TINY, *MEMORY, "train.train_iters=9", "vq.init=uniform"]
    every.append("model.moe_aux_loss_coeff=0")  # balance is of a microbatch, whose size varies here
    whole = curve(run_on(ranks(1), small_corpus, tmp_path / "whole", every, {}))
    found = {}
    for stop, num_ranks, layout, micro in ((3, 2, {}, 2), (6, 1, {}, 4), (9, 2, {PP: 2}, 1)):
        overrides = [*every, f"train.micro_batch_size={micro}"]
        if stop < 9:
            overrides.append(f"train.exit_interval={stop}")
        moved = run_on(ranks(num_ranks), small_corpus, tmp_path / "moved", overrides, layout)
        found |= curve(moved)
    assert sorted(found) == sorted(whole) == list(range(1, 10))
    for iteration, (loss, grad_norm) in found.items():
        assert loss == pytest.approx(whole[iteration][0], rel=LIMIT)
        assert grad_norm == pytest.approx(whole[iteration][1], rel=LIMIT)


def test_evaluation_changes_nothing_and_forgets_between(ranks, small_corpus, tmp_path):
    every = [*SHORT, "train.eval_iters=2"]
    never = run_on(ranks(1), small_corpus, tmp_path / "a", [*every, "train.eval_iters=0"], {})
    often = run_on(ranks(1), small_corpus, tmp_path / "b", [*every, "train.eval_interval=1"], {})
    losses = [[r["loss"] for r in run[0]["records"] if "loss" in r] for run in (never, often)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert any("8 rows in order" in text for text in often[0]["messages"])


def test_beside_a_code_memory(ranks, small_corpus, tmp_path):
    every = [*SHORT, "code_memory.num_rows=64", "vq.path=continuous", "model.hidden_dropout=0"]
    one = run_on(ranks(1), small_corpus, tmp_path / "one", every, {})
    two = run_on(ranks(2), small_corpus, tmp_path / "two", every, {EP: 2})
    for iteration, (loss, _) in curve(one).items():
        assert curve(two)[iteration][0] == pytest.approx(loss, rel=LIMIT)
