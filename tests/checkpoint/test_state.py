"""Resuming is bitwise exact; saving publishes whole checkpoints and rotates them."""

from __future__ import annotations

import json

import pytest
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
SHORT = [*TINY, "train.train_iters=14", "model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
# A step's parameters are gathered by the next forward, so a save must gather them itself.
OVERLAPPED = [
    "optimizer.use_distributed_optimizer=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
    "optimizer.lr=1e-2",
    "model.bf16=true",
]


def curve(results):
    """Loss and gradient norm of rank 0 by iteration, exact."""
    return {r["iteration"]: (r["loss"], r["grad_norm"]) for r in results[0]["records"]}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="plain"),
        pytest.param(["optimizer.use_distributed_optimizer=true"], id="distributed-optimizer"),
        pytest.param(["model.bf16=true"], id="bf16", marks=pytest.mark.full),
        pytest.param(
            ["vq.codebook_update=gradient", "vq.quantizer=product", "vq.num_code_slices=2"],
            id="gradient-product",
            marks=pytest.mark.full,
        ),
        pytest.param(OVERLAPPED, id="overlapped-bf16"),
        pytest.param(
            [
                *("vq.path=filled", "vq.threshold_routing=true", "model.moe_router_topk=1"),
                *("vq.fill_values=direct", "optimizer.use_distributed_optimizer=true"),
            ],
            id="threshold",
        ),
        pytest.param(
            ["vq.quantizer=residual", "vq.num_code_slices=3"], id="residual", marks=pytest.mark.full
        ),
        pytest.param(
            [
                "vq.quantizer=lfq",
                "vq.code_dim=5",
                "vq.num_codes=32",
                "vq.train_projection=true",
                "vq.freeze_codebook=true",
                "vq.codebook_update=gradient",
                "vq.init=uniform",
            ],
            id="lfq-trained",
            marks=pytest.mark.full,
        ),
        pytest.param(
            [*OVERLAPPED, "vq.quantizer=cosine", "vq.learn_code_scale=true"],
            id="bf16-scale",
            marks=pytest.mark.full,
        ),
        pytest.param(
            [
                "model.norm_placement=post",
                "vq.norm=shared_with_block",
                "vq.expert_input=blend",
                "model.moe_router_freeze=true",
                "model.moe_router_pre_softmax=false",
                "model.moe_router_topk=1",
                "vq.codebook_update=gradient",
            ],
            id="released",
            marks=pytest.mark.full,
        ),
        # fp32 codes beside bf16 parameters
        pytest.param(
            [*OVERLAPPED, "vq.codebook_update=gradient"], id="bf16-gradient", marks=pytest.mark.full
        ),
    ],
)
def test_resuming_is_bitwise_exact(overrides, ranks, small_corpus, tmp_path):
    pool, every = ranks(2), [*SHORT, *overrides]
    whole = run_on(pool, small_corpus, tmp_path / "whole", every, EP2)
    cut = [*every, "train.exit_interval=4"]
    first = run_on(pool, small_corpus, tmp_path / "cut", cut, EP2)
    second = run_on(pool, small_corpus, tmp_path / "cut", every, EP2)
    assert first[0]["iteration"] == 4
    assert sorted(curve(second)) == list(range(5, 15))
    assert curve(first) | curve(second) == curve(whole)
    assert [rank["codebooks"] for rank in second] == [rank["codebooks"] for rank in whole]


def test_rotation_keeps_the_last_and_clears_what_a_kill_left(ranks, small_corpus, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "iter_0000009.incomplete").mkdir(parents=True)
    every = [*TINY, "train.train_iters=6", "checkpoint.save_interval=1", "checkpoint.keep_last=2"]
    run_on(ranks(1), small_corpus, tmp_path, every, {})
    assert sorted(entry.name for entry in checkpoints.iterdir()) == [
        "iter_0000005",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]
    description = json.loads((checkpoints / "iter_0000006" / "corpus.json").read_text())
    assert description["tokenizer"]["kind"] == "byte"


def test_rolling_back_does_not_rotate_the_new_checkpoints_away(ranks, small_corpus, tmp_path):
    every = [*TINY, "train.train_iters=6", "checkpoint.save_interval=1", "checkpoint.keep_last=3"]
    run_on(ranks(1), small_corpus, tmp_path, every, {})
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.write_text("4\n")
    again = [*every, "train.exit_interval=5", "checkpoint.keep_last=1"]
    result = run_on(ranks(1), small_corpus, tmp_path, again, {})[0]
    assert [record["iteration"] for record in result["records"]] == [5]
    assert tracker.read_text() == "5\n"
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000005", "iter_0000006"]
