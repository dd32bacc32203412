"""The layer inside Megatron-LM's own loop is the layer inside ours: same curve, same codes.

The loop (``megatron_lm_loop``) knows nothing of codebooks and overwrites every hook when training
begins.
"""

from __future__ import annotations

import pytest
from fast_tier import only
from megatron_lm_loop import bf16_state, train_as_megatron_lm
from small_run import PARITY, layout_overrides, run_on

METRIC_NAMES = {
    name: f"{'moe' if name == 'expert_load_imbalance' else 'vq'}/{name}"
    for name in (
        "expert_load_imbalance",
        "combine_discrete_weight",
        "code_perplexity",
        "dead_codes",
        "commitment_loss",
        "codebook_loss",
    )
}
pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP = "virtual_pipeline_model_parallel_size"
NUM_STEPS = 20
# Megatron's standard optimizer groups decay stacked biases, ours do not; and they sum the norm in
# another order, so with clipping curves agree to 1e-6 and not bitwise.
SHORT = [
    "model.num_layers=2",
    "model.seq_length=16",
    "train.train_iters=20",
    "train.eval_iters=0",
    "optimizer.weight_decay=0.0",
    "optimizer.clip_grad=1000",
]
LAYOUTS = {
    "1": (1, {}, []),
    "ep2": (2, {EP: 2}, []),
    "tp2-ep2": (4, {TP: 2, EP: 2}, []),
    "pp2": (2, {PP: 2}, []),
    "pp2-vpp2-recompute": (
        2,
        {PP: 2, VPP: 2},
        [
            "model.num_layers=4",
            "model.recompute_granularity=full",
            "model.recompute_method=uniform",
            "model.recompute_num_layers=1",
        ],
    ),
    "table-per-step-ep2": (2, {EP: 2}, ["vq.table_per_step=true"]),
    "gradient-dp2-distributed-optimizer": (
        2,
        {},
        ["vq.codebook_update=gradient", "optimizer.use_distributed_optimizer=true"],
    ),
}
SAVED = ("1", "ep2", "tp2-ep2", "pp2")


def settings_file(folder, overrides):
    """The file that VQMOE_CONFIG names: the vq section of parity.yaml and the case's own keys."""
    from dataclasses import asdict

    import yaml

    from vqmoe_megatron.config.recipe import load_recipe

    recipe = load_recipe(PARITY, overrides)
    path = folder / "vq.yaml"
    path.write_text(yaml.safe_dump({"vq": asdict(recipe.vq), "train": {"seed": recipe.train.seed}}))
    return path


def in_megatron_lm(pool, corpus, folder, overrides, layout, save_at=0, is_listed=False):
    every = [f"data.path={corpus}", f"train.output_dir={folder}", *overrides]
    every += layout_overrides(layout)
    settings = settings_file(folder, overrides)
    return pool.run(
        train_as_megatron_lm,
        str(PARITY),
        every,
        NUM_STEPS,
        str(settings),
        save_at,
        is_listed,
        layout=layout,
    )


@pytest.mark.parametrize("name", only(LAYOUTS, "ep2"))
def test_the_curve_is_that_of_our_own_loop(name, ranks, small_corpus, tmp_path):
    """Losses, norms, log and, bitwise, codes at every step; half of the cases go on from a
    checkpoint in the middle."""
    num_ranks, layout, changes = LAYOUTS[name]
    overrides = [*SHORT, *changes]
    pool = ranks(num_ranks)
    ours = run_on(pool, small_corpus, tmp_path / "ours", overrides, layout)
    save_at = 8 if name in SAVED else 0
    theirs = in_megatron_lm(pool, small_corpus, tmp_path, overrides, layout, save_at)
    expected = [record for record in ours[0]["records"] if record["iteration"] > 0]
    for rank in theirs:
        for step, record in zip(rank["steps"], expected, strict=True):
            assert step["loss"] == pytest.approx(record["loss"], rel=1e-6)
            assert step["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-6)
    for found, own in zip(theirs, ours, strict=True):
        assert found["steps"][-1]["codes"] == own["codebooks"]  # bitwise
    check_codes(theirs)
    check_log(theirs[-1], expected, num_layers=4 if "vpp2" in name else 2)


def check_codes(results):
    """Every codebook moves at every step, and alike on all ranks that hold a replica."""
    for rank in results:
        for number in rank["steps"][0]["codes"]:
            assert len({step["codes"][number] for step in rank["steps"]}) == NUM_STEPS
    for steps in zip(*(rank["steps"] for rank in results), strict=True):
        for number in {number for step in steps for number in step["codes"]}:
            assert len({s["codes"][number] for s in steps if number in s["codes"]}) == 1


def check_log(last_rank, records, num_layers):
    """Megatron's MoE log, shown by the last rank: means over layers of what our own loop logs."""
    for step, record in zip(last_rank["steps"], records, strict=True):
        for name in METRIC_NAMES.values():
            expected = record.get(name, 0.0)
            if name == "vq/dead_codes":  # a sum over layers
                expected /= num_layers
            assert step["log"][name] == pytest.approx(expected, rel=1e-5, abs=1e-7), name
        balance = step["log"]["load_balancing_loss"]
        assert balance == pytest.approx(record["moe/load_balancing_loss"], rel=1e-5)
    assert any(step["log"]["vq/dead_codes"] > 0 for step in last_rank["steps"])


@pytest.mark.full
def test_the_log_is_right_when_the_names_are_listed_too(ranks, small_corpus, tmp_path):
    num_ranks, layout, changes = LAYOUTS["pp2"]
    pool, overrides = ranks(num_ranks), [*SHORT, *changes]
    plain = in_megatron_lm(pool, small_corpus, tmp_path, overrides, layout)
    listed = in_megatron_lm(pool, small_corpus, tmp_path, overrides, layout, is_listed=True)
    for one, other in zip(plain[-1]["steps"], listed[-1]["steps"], strict=True):
        assert one["log"] == pytest.approx(other["log"], rel=1e-6)
    for one, other in zip(listed[0]["steps"], listed[-1]["steps"], strict=True):
        assert one["log"] == pytest.approx(other["log"], rel=1e-6)  # then on every stage


def test_a_plain_bf16_run_can_be_saved(ranks, small_corpus, tmp_path):
    """What Megatron-LM's --bf16 --save writes of an optimizer that is not distributed."""
    every = [f"data.path={small_corpus}", f"train.output_dir={tmp_path}", *SHORT, "model.bf16=true"]
    settings = settings_file(tmp_path, SHORT)
    (keys,) = ranks(1).run(bf16_state, str(PARITY), every, str(settings))
    assert any("experts" in key for key in keys)
