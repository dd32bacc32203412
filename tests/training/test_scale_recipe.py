"""Recipes train: the smallest of 64 experts as it ships but shorter, others cut to a CPU's size.

What a cut keeps: every switch of the recipe (kernels aside), its experts per code, its axes.
"""

from __future__ import annotations

import pytest
from small_run import ROOT, train_here

pytestmark = pytest.mark.distributed

RECIPES = ROOT / "recipes"
TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP = "virtual_pipeline_model_parallel_size"
BRIEF = [
    "train.log_interval=1",
    "train.eval_iters=0",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "optimizer.lr_warmup_iters=1",
    "model.vocab_size=256",
    "model.hidden_size=64",
    "model.moe_ffn_hidden_size=32",
    "model.seq_length=64",
]
# Bytes in the place of words; widths and depths of a CPU.
CUTS = {
    "paper_base/wikitext103.yaml": (1, {}, ["model.kv_channels=16", "data.eval_stride_tokens=16"]),
    "scale/small_128.yaml": (2, {EP: 2}, ["model.num_layers=2"]),
    "scale/billion_64.yaml": (2, {EP: 2}, ["model.num_layers=2", "vq.num_codes=128"]),
    "scale/multi_billion_64.yaml": (
        4,
        {TP: 2, PP: 2, VPP: 2, EP: 2},
        ["model.num_layers=4", "vq.num_codes=128", "vq.code_dim=8"],
    ),
}


def test_64_experts_train_on_two_ranks(ranks, stdlib_corpus, tmp_path):
    overrides = [
        f"data.path={stdlib_corpus}",
        f"train.output_dir={tmp_path}",
        "train.exit_interval=8",
        "train.log_interval=1",
        "train.eval_iters=0",
        "optimizer.lr_warmup_iters=2",  # of 20, so that eight steps show
    ]
    recipe = str(RECIPES / "scale" / "tiny_64.yaml")
    for result in ranks(2).run(train_here, recipe, overrides, layout={EP: 2}):
        assert (result["state"], result["error"]) == ("completed", "")
        losses = [record["loss"] for record in result["records"]]
        assert len(losses) == 8 and result["finite_codebooks"]
        assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 256, nothing learned yet
        assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("name", CUTS)
def test_what_a_recipe_switches_on_trains(name, ranks, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = CUTS[name]
    overrides = [
        *BRIEF,
        *overrides,
        *(f"parallel.{axis}={size}" for axis, size in layout.items()),
        f"data.path={stdlib_corpus}",
        f"train.output_dir={tmp_path}",
        "train.exit_interval=6",
        "optimizer.lr=5e-3",
    ]
    for result in ranks(num_ranks).run(train_here, str(RECIPES / name), overrides, layout=layout):
        assert (result["state"], result["error"]) == ("completed", "")
        losses = [record["loss"] for record in result["records"]]
        assert len(losses) == 6 and result["finite_codebooks"]
        assert losses[-1] < losses[0] - 0.5
