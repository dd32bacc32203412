"""Training on images: the loss, the same curve at every layout, resuming, moving, accuracy."""

from __future__ import annotations

import pytest
from fast_tier import only
from images_run import VISION, prepare_digits
from small_run import run_on

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP = "virtual_pipeline_model_parallel_size"
FOUR = [
    *("train.train_iters=20", "train.exit_interval=4", "data.eval_split=test"),
    *("train.micro_batch_size=4", "train.eval_iters=8", "train.eval_interval=4"),  # 128 images
]
LAYOUTS = {
    "ep2": (2, {EP: 2}, []),
    "tp2": (2, {TP: 2}, []),
    "pp2": (2, {PP: 2}, []),
    "dp2-distributed-optimizer": (2, {}, ["optimizer.use_distributed_optimizer=true"]),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}, []),
    "tp2-ep2": (2, {TP: 2, EP: 2}, ["vq.execution=tokens"]),
    "tp2-pp2": (4, {TP: 2, PP: 2}, ["optimizer.use_distributed_optimizer=true"]),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def one_rank(ranks, digits, tmp_path_factory):
    return run_on(ranks(1), digits, tmp_path_factory.mktemp("one"), [*VISION, *FOUR], {})[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", only(LAYOUTS, "ep2", "tp2", "pp2"))
def test_the_curve_is_that_of_one_rank(name, ranks, one_rank, digits, tmp_path):
    num_ranks, layout, overrides = LAYOUTS[name]
    results = run_on(ranks(num_ranks), digits, tmp_path, [*VISION, *FOUR, *overrides], layout)
    expected = one_rank["records"]
    assert [record["iteration"] for record in expected] == [0, 1, 2, 3, 4]
    assert 0 < expected[0]["val/accuracy"] < 1
    assert expected[-1]["val/loss"] != expected[0]["val/loss"]
    for result in results:
        for ours, theirs in zip(result["records"], expected, strict=True):
            for metric in {"loss", "grad_norm", "val/loss"} & set(theirs):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric
            assert ours.get("val/accuracy") == theirs.get("val/accuracy")
            assert "val/bits_per_byte" not in ours


@pytest.mark.full
@pytest.mark.distributed
def test_it_learns_the_digits(ranks, digits, tmp_path):
    """Chance is 0.1; four passes over a thousand digits bring a tiny model well above it."""
    learn = ["train.train_iters=80", "train.global_batch_size=64", "train.micro_batch_size=64"]
    learn += ["train.eval_iters=12", "data.eval_split=test", "optimizer.lr=3e-3"]
    learn += ["model.init_method_std=0.1", "optimizer.lr_warmup_iters=10"]
    (found,) = run_on(ranks(1), digits, tmp_path, [*VISION, *learn, "model.num_layers=2"], {})
    records = found["records"]
    assert records[0]["val/accuracy"] < 0.2
    assert records[-1]["val/accuracy"] > 0.2
    assert records[-1]["val/loss"] < 0.95 * records[0]["val/loss"]


@pytest.mark.distributed
def test_a_run_resumes_bitwise_and_goes_on_at_another_layout(ranks, digits, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = [*VISION, "train.train_iters=6", "train.eval_iters=1"]
    (straight,) = run_on(ranks(1), digits, whole, every, {})
    run_on(ranks(1), digits, parts, [*every, "train.exit_interval=3"], {})
    (resumed,) = run_on(ranks(1), digits, parts, [*every, "train.exit_interval=5"], {})
    losses = [record["loss"] for record in straight["records"] if "loss" in record]
    assert [r["loss"] for r in resumed["records"] if "loss" in r] == losses[3:5]
    moved = run_on(ranks(2), digits, parts, every, {TP: 2})
    for result in moved:
        (record,) = [r for r in result["records"] if "loss" in r]
        assert record["loss"] == pytest.approx(losses[5], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("vision.num_channels=3", r"vision\.num_channels=3, but the images of .* have 1"),
        ("vision.num_classes=11", r"vision\.num_classes=11, but the images of .* have 10"),
        ("data.path=/nowhere", r"has no images\.json"),
    ],
)
def test_other_images_than_the_recipe_s_are_refused_first(digits, tmp_path, override, says):
    from small_run import PARITY

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.train.preflight import check_run

    run = tmp_path / "run"
    overrides = [*VISION, f"data.path={digits}", f"train.output_dir={run}", override]
    with pytest.raises(ValueError, match=says):
        check_run(load_recipe(PARITY, overrides), 1, "cpu")
    assert not run.exists()
