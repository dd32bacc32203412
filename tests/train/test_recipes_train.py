"""Recipes train: the smallest of 64 experts as it ships but shorter, all cut to a CPU's size.

What a cut keeps: every switch of the recipe (kernels aside), its experts per code, its axes.
"""

from __future__ import annotations

import math

import pytest
from fast_tier import only
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
    "optimizer.min_lr=0",
    "model.vocab_size=256",
    "model.hidden_size=64",
    "model.moe_ffn_hidden_size=32",
    "model.seq_length=64",
]
# Bytes in the place of words; widths and depths of a CPU; of a layout what the ranks can hold.
# recipe: (ranks, layout, overrides, whether the loss is followed for six steps)
EP2 = (2, {EP: 2})
STAGES = {PP: 2, VPP: 2}
TWO_LAYERS = ["model.num_layers=2", "code_memory.layers=[1]", "code_memory.num_rows=256"]
FOUR_LAYERS = ["model.num_layers=4", "code_memory.num_rows=256"]
WORDS = ["model.kv_channels=16", "data.eval_stride_tokens=16", "model.num_layers=2"]
SEGMENTS = ["model.kv_channels=16", "model.num_layers=2", "model.memory_length_tokens=64"]
LOW_DIM = ["vq.num_codes=512", "vq.code_dim=8"]
OF_PAPER = "code_memory.num_rows=0 vq.path=dual vq.code_input=learned".split()
CUTS = {
    "quickstart.yaml": (*EP2, TWO_LAYERS, False),
    "parity.yaml": (1, {}, ["model.num_layers=2"], False),
    "paper_base/enwik8.yaml": (1, {}, WORDS, False),
    "paper_base/released_enwik8.yaml": (1, {}, [*WORDS[::2], "data.eval_window_tokens=16"], False),
    "paper_base/text8.yaml": (1, {}, WORDS, False),
    "paper_base/wikitext103.yaml": (1, {}, WORDS[:2], True),
    "paper_base/lm1b.yaml": (1, {}, WORDS, False),
    "paper_base/enwik8_txl.yaml": (1, {}, SEGMENTS, True),
    "paper_base/text8_txl.yaml": (1, {}, SEGMENTS, False),
    "paper_base/wikitext103_txl.yaml": (1, {}, SEGMENTS, False),
    "paper_base/lm1b_txl.yaml": (1, {}, SEGMENTS, False),
    "scale/tiny_64.yaml": (*EP2, TWO_LAYERS, False),
    "scale/tiny_128.yaml": (*EP2, TWO_LAYERS, False),
    "scale/tiny_256.yaml": (*EP2, TWO_LAYERS, False),
    "scale/small_64.yaml": (*EP2, TWO_LAYERS, False),
    "scale/small_128.yaml": (*EP2, TWO_LAYERS, True),
    "scale/small_256.yaml": (*EP2, TWO_LAYERS, False),
    "scale/billion_64.yaml": (*EP2, TWO_LAYERS, True),
    "scale/billion_128.yaml": (*EP2, TWO_LAYERS, False),
    "scale/billion_256.yaml": (*EP2, TWO_LAYERS, False),
    "scale/multi_billion_64.yaml": (
        4,
        {TP: 2, **STAGES, EP: 2},
        [*FOUR_LAYERS, *LOW_DIM],
        True,
    ),
    "scale/multi_billion_128.yaml": (2, {TP: 2, PP: 1, EP: 2}, [*TWO_LAYERS, *LOW_DIM], False),
    "scale/multi_billion_256.yaml": (2, {TP: 1, **STAGES, EP: 1}, [*FOUR_LAYERS, *LOW_DIM], False),
}


def test_every_recipe_has_its_cut() -> None:
    found = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")}
    elsewhere = ("studies/", "vision/")  # tests/tasks/test_images.py trains those of images
    assert set(CUTS) == {name for name in found if not name.startswith(elsewhere)}


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
        assert losses[0] == pytest.approx(5.55, abs=0.15)  # ln 256, nothing learned yet
        assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize(
    "name", only(CUTS, "quickstart.yaml", "parity.yaml", "scale/small_64.yaml")
)
def test_what_a_recipe_switches_on_trains(name, ranks, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides, is_followed = CUTS[name]
    num_steps = 6 if is_followed else 2
    losses = _losses(
        name, ranks(num_ranks), layout, overrides, num_steps, stdlib_corpus, tmp_path / "run"
    )
    if is_followed:
        assert losses[-1] < losses[0] - 0.5


@pytest.mark.full
def test_the_papers_layer_of_a_large_recipe_trains(ranks, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides, _ = CUTS["scale/multi_billion_128.yaml"]
    overrides = [*overrides, *OF_PAPER]
    _losses(
        "scale/multi_billion_128.yaml", ranks(num_ranks), layout, overrides, 2, stdlib_corpus,
        tmp_path / "run",
    )  # fmt: skip


def _losses(name, pool, layout, overrides, num_steps, corpus, output_dir) -> list[float]:
    """Train the cut recipe; every rank has the same finite losses, and they are returned."""
    sizes = {TP: 1, PP: 1, VPP: None, EP: 1, **layout}
    overrides = [
        *BRIEF,
        *overrides,
        *(f"parallel.{axis}={'null' if size is None else size}" for axis, size in sizes.items()),
        f"data.path={corpus}",
        f"train.output_dir={output_dir}",
        f"train.exit_interval={num_steps}",
        "optimizer.lr=5e-3",
    ]
    results = pool.run(train_here, str(RECIPES / name), overrides, layout=layout)
    for result in results:
        assert (result["state"], result["error"]) == ("completed", "")
        assert result["finite_codebooks"]
    (losses,) = {tuple(record["loss"] for record in result["records"]) for result in results}
    assert len(losses) == num_steps and all(map(math.isfinite, losses))
    return list(losses)
