"""Fine-tuning on real ranks: filling changes nothing, what is frozen stays, layouts agree."""

from __future__ import annotations

import pytest
import torch
from fast_tier import only
from labelled_folders import losses, pretrained, recipes_of, tune_on, write_sst2
from upcycle_source import stored_tensors

from vqmoe_megatron.tasks.finetune import last_token_loss

pytestmark = pytest.mark.distributed

LAST, TUNED = "checkpoints/iter_0000004", "checkpoints/iter_0000006"
MODES = ["full", "continuous", "discrete", "head"]


@pytest.fixture(scope="module")
def start(ranks, small_corpus, tmp_path_factory):
    """A pretrained run directory and a folder of texts."""
    folder = tmp_path_factory.mktemp("start")
    pretrained(ranks(1), small_corpus, folder / "run")
    return folder / "run", write_sst2(folder / "texts")


@pytest.fixture(scope="module")
def one_rank(start, ranks, tmp_path_factory):
    """``one_rank(mode)`` -> (recipe, run directory, result); each run once."""
    out = tmp_path_factory.mktemp("tuned") / "runs"
    todo = recipes_of(*start, out, MODES)
    known = {}

    def run(mode: str):
        if mode not in known:
            (planned,) = [r for r in todo.runs if r.mode == mode]
            result = tune_on(ranks(1), planned.recipe, planned.run_dir, {})
            known[mode] = planned, planned.run_dir, result
        return known[mode]

    return run


def test_the_class_is_read_off_the_last_token_alone() -> None:
    logits = torch.zeros(3, 4, 2)
    logits[0, 1] = torch.tensor([0.0, 2.0])
    logits[1, 3] = torch.tensor([3.0, 0.0])
    batch = {
        "last": torch.tensor([1, 3, 0]),
        "labels": torch.tensor([1, 1, 0]),
        "loss_mask": torch.tensor([1.0, 1.0, 0.0]),
    }
    total, count, report = last_token_loss(batch, logits)
    expected = -torch.log_softmax(logits[[0, 1], [1, 3]], dim=1)[:, 1].sum()
    torch.testing.assert_close(total, expected)
    assert (int(count), count.dtype) == (2, torch.int32)
    assert report["loss"].tolist()[1:] == [2.0, 1.0]
    other = logits.clone()
    other[0, 2:] = 9.0  # behind the last token
    assert torch.equal(last_token_loss(batch, other)[0], total)


@pytest.mark.parametrize("mode", ["full", pytest.param("discrete", marks=pytest.mark.full)])
def test_a_run_does_not_depend_on_how_far_texts_are_filled(mode, one_rank, ranks, tmp_path) -> None:
    planned, _, short = one_rank(mode)
    assert planned.config.model.seq_length == 16  # the checkpoint's; texts have 3 to 25 bytes
    wide = tune_on(ranks(1), planned.recipe, tmp_path / "32", {}, "model.seq_length=32")
    wider = tune_on(ranks(1), planned.recipe, tmp_path / "64", {}, "model.seq_length=64")
    assert losses(wider) == pytest.approx(losses(wide), rel=1e-5)
    assert len(losses(wide)) == 6
    for name in ("val/loss", "val/accuracy"):
        ends = [result["records"][-1][name] for result in (wide, wider)]
        assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    assert losses(short) != pytest.approx(losses(wide), rel=1e-5)  # there texts are cut


@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_is_bitwise_what_it_was(mode, start, one_rank, ranks) -> None:
    _, run_dir, result = one_rank(mode)
    old = ranks(1).run(stored_tensors, str(start[0] / LAST))[0]
    new = ranks(1).run(stored_tensors, str(run_dir / TUNED))[0]
    model = {name: t for name, t in new.items() if not name.startswith("optimizer.")}
    shared = {name for name in model if name in old and not name.startswith("output_layer.")}
    moved = {name for name in shared if not model[name].equal(old[name])}
    assert model["output_layer.weight"].shape == (2, 32)
    assert model["output_layer.weight"].any() and model["output_layer.bias"].any()
    codebooks = {name for name in shared if ".codebook." in name}
    assert not {name for name in moved if name.endswith((".codes", ".usage", ".ema_sum"))}
    parts = {p: any(f".{p}." in n for n in model) for p in ("router", "gate", "codebook")}
    dropped = {"continuous": ["gate", "codebook"], "discrete": ["router", "gate"]}.get(mode, [])
    assert [part for part, is_there in parts.items() if not is_there] == dropped
    if mode == "head":
        assert moved <= codebooks  # of them only the count of steps
        assert not {name for name in moved if not name.endswith("num_steps")}
    else:
        assert any("experts" in name for name in moved)
        assert any("word_embeddings" in name for name in moved)
    assert result["records"][-1]["val/accuracy"] in [n / 6 for n in range(7)]


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_counts_the_model_as_it_is(mode, one_rank, ranks) -> None:
    planned, _, _ = one_rank(mode)
    from vqmoe_megatron.finetune.runs import sizes_of
    from vqmoe_megatron.plan.layout import unsharded

    found = ranks(1).run(parameters_here, str(planned.recipe))[0]
    sizes = sizes_of(planned.config, unsharded())
    assert found == [sizes["total_parameters"], sizes["trainable_parameters"]]
    forward, training = sizes["forward_flops_per_token"], sizes["training_flops_per_token"]
    if mode == "head":
        assert sizes["trainable_parameters"] == 2 * 32 + 2
        assert training == forward + 2 * 32 * 2
    else:
        assert training > 2 * forward


def parameters_here(recipe: str) -> list[int]:
    from pathlib import Path

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
    from vqmoe_megatron.plan.layout import ParallelLayout

    config = load_recipe(Path(recipe), [])
    layout = ParallelLayout.from_config(config, 1)
    (model,) = build_model(config, build_transformer_config(config, layout), layout)
    every = list(model.parameters())
    return [sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)]


LAYOUTS = {
    "ep2": (2, {"expert_model_parallel_size": 2}, "full"),
    "ep2-discrete": (2, {"expert_model_parallel_size": 2}, "discrete"),
    "tp2": (2, {"tensor_model_parallel_size": 2}, "full"),
    "tp2-head": (2, {"tensor_model_parallel_size": 2}, "head"),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, "discrete"),
    "pp2-full": (2, {"pipeline_model_parallel_size": 2}, "full"),
}
FAST = ("ep2", "tp2", "pp2")


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=() if n in FAST else pytest.mark.full) for n in LAYOUTS]
)
def test_a_layout_is_one_rank(case, one_rank, ranks, tmp_path) -> None:
    num_ranks, layout, mode = LAYOUTS[case]
    planned, _, alone = one_rank(mode)
    spread = tune_on(ranks(num_ranks), planned.recipe, tmp_path / "run", layout)
    assert losses(spread) == pytest.approx(losses(alone), rel=1e-5)
    for here, there in zip(spread["records"], alone["records"], strict=True):
        if "grad_norm" in there:
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        if "val/loss" in there:
            assert here["val/loss"] == pytest.approx(there["val/loss"], rel=1e-5)
            assert here["val/accuracy"] == there["val/accuracy"]


@pytest.mark.parametrize("mode", ["full", pytest.param("head", marks=pytest.mark.full)])
def test_a_run_goes_on_bitwise(mode, one_rank, ranks, tmp_path) -> None:
    planned, _, whole = one_rank(mode)
    first = tune_on(ranks(1), planned.recipe, tmp_path / "run", {}, "train.exit_interval=3")
    assert first["iteration"] == 3
    second = tune_on(ranks(1), planned.recipe, tmp_path / "run", {})
    assert losses(first) + losses(second) == losses(whole)
    assert second["records"][-1]["val/loss"] == whole["records"][-1]["val/loss"]


STILL = {
    "scale": (["vq.quantizer=cosine", "vq.learn_code_scale=true"], "codebook.scale"),
    "loss_free": (
        ["model.moe_router=loss_free", "model.moe_router_load_balancing_type=none"],
        "router.expert_bias",
    ),
}


@pytest.mark.parametrize("name", only(STILL, "scale"))
def test_what_would_count_filling_stays_as_it_was_trained(
    name, start, ranks, small_corpus, tmp_path
) -> None:
    overrides, tensor = STILL[name]
    pretrained(ranks(1), small_corpus, tmp_path / "run", *overrides)
    todo = recipes_of(tmp_path / "run", start[1], tmp_path / "out", ["full"])
    run_dir = todo.runs[0].run_dir
    tune_on(ranks(1), todo.runs[0].recipe, run_dir, {})
    (before,), (after,) = (
        [value for key, value in stored_tensors(folder).items() if key.endswith(tensor)]
        for folder in (tmp_path / "run" / LAST, run_dir / TUNED)
    )
    assert before.abs().max() > 0 and before.unique().numel() > 1  # it had moved
    assert torch.equal(before, after)


def test_it_learns(start, ranks, tmp_path) -> None:
    todo = recipes_of(*start, tmp_path / "out", ["full"], "train.train_iters=40")
    result = tune_on(ranks(1), todo.runs[0].recipe, tmp_path / "run", {})
    assert result["records"][-1]["val/accuracy"] == 1.0  # the dev texts are among those of train
    assert result["records"][-1]["val/loss"] < 0.1
