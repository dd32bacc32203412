"""Microbatches with different numbers of counted tokens: what the losses are means over."""

from __future__ import annotations

from itertools import product

import pytest
from fast_tier import tiered
from small_run import PARITY, TINY, layout_overrides
from troubled_run import train_with_uneven_masks

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
PER_TOKEN = ["model.calculate_per_token_loss=true"]
LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {TP: 2}),
    "pp2-ep2": (4, {PP: 2, EP: 2}),
}
# What is defined per microbatch, and so depends on how a batch is cut: the balance loss, the first
# microbatch's tokens as first codes and as candidates.
CUT_INDEPENDENT = ["vq.init=uniform", "vq.dead_code_threshold=0", "model.moe_aux_loss_coeff=0"]


def train(ranks, num_ranks, layout, corpus, run_dir, overrides):
    every = [*TINY, "train.global_batch_size=8", "train.train_iters=8", "train.exit_interval=4"]
    every += [f"data.path={corpus}", f"train.output_dir={run_dir}", *overrides]
    every += layout_overrides(layout)
    return ranks(num_ranks).run(train_with_uneven_masks, str(PARITY), every, layout=layout)


def assert_same_curve(results, expected):
    assert [record["iteration"] for record in expected[0]["records"]] == [1, 2, 3, 4]
    for result in results:
        for ours, theirs in zip(result["records"], expected[0]["records"], strict=True):
            for metric in ("loss", "grad_norm", "vq/commitment_loss", "vq/code_perplexity"):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric


CASES = list(product(LAYOUTS, (True, False), ("ema", "gradient")))
FAST = [
    ("dp2", True, "gradient"),
    ("dp2", False, "ema"),
    ("tp2", True, "ema"),
    ("pp2-ep2", False, "gradient"),
]


@pytest.mark.parametrize(("name", "per_token", "update"), tiered(CASES, FAST))
def test_every_layout_agrees_on_uneven_microbatches(
    name, per_token, update, ranks, small_corpus, tmp_path
):
    num_ranks, layout = LAYOUTS[name]
    options = [*(PER_TOKEN if per_token else []), f"vq.codebook_update={update}"]
    one = train(ranks, 1, {}, small_corpus, tmp_path / "one", options)
    many = train(ranks, num_ranks, layout, small_corpus, tmp_path / "many", options)
    assert_same_curve(many, one)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_per_token_loss_does_not_depend_on_how_the_batch_is_cut(
    update, ranks, small_corpus, tmp_path
):
    options = [*PER_TOKEN, *CUT_INDEPENDENT, f"vq.codebook_update={update}"]
    single = train(ranks, 1, {}, small_corpus, tmp_path / "single", options)
    cut = [*options, "train.micro_batch_size=4"]
    whole = train(ranks, 1, {}, small_corpus, tmp_path / "whole", cut)
    assert_same_curve(whole, single)
    # The same setting without the option: a mean of means, which does depend on it.
    means = train(ranks, 1, {}, small_corpus, tmp_path / "means", options[1:])
    assert means[0]["records"][0]["grad_norm"] != pytest.approx(
        single[0]["records"][0]["grad_norm"], rel=1e-3
    )
