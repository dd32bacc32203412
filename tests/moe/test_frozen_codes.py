"""A codebook that has frozen stays: in every loop, with every optimizer, over a resume."""

from __future__ import annotations

import math

import pytest
import torch
from small_run import PARITY, TINY, run_on
from tiny_layer import HIDDEN, build_layer, draw_parameters
from troubled_run import train_with_one_poisoned_step

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = [
    *DISTRIBUTED,
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
# Revival would move codes without any optimizer.
NO_REVIVAL = "vq.dead_code_threshold=0"
LAST = 3  # the last step that moves
FREEZE = f"vq.freeze_after_steps={LAST}"


def codes_by_step(recipe: str, overrides: list[str]) -> list[list[torch.Tensor]]:
    """In a rank: each layer's codes after each step."""
    from pathlib import Path

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.moe.layer import VQMoELayer
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.run_report import RunReport
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    class Codes(RunReport):
        seen: list[list[torch.Tensor]] = []

        def log(self, record) -> None:  # noqa: ANN001
            modules = (m for chunk in trainer.model for m in chunk.modules())
            layers = [m for m in modules if isinstance(m, VQMoELayer)]
            self.seen.append([layer.assigner.codebook.codes.detach().clone() for layer in layers])

    config = load_recipe(Path(recipe), overrides)
    run = check_run(config, torch.distributed.get_world_size(), "cpu")
    stop_requests = StopRequests({})
    trainer = Trainer(run, stop_requests)
    trainer.resume()
    is_first = torch.distributed.get_rank() == 0
    stop_requests.watch(run.run_dir.path, config.train.exit_duration_in_mins, is_first)
    report = Codes()
    report.seen = []
    trainer.train(report)
    stop_requests.acknowledge()
    return report.seen


@pytest.mark.parametrize(
    ("update", "layout", "optimizer"),
    [
        pytest.param("gradient", EP2, [], id="gradient-ep2"),
        pytest.param("reanchor", TP2, [*DISTRIBUTED, "model.bf16=true"], id="reanchor-tp2-bf16"),
        pytest.param("gradient", EP2, OVERLAP, id="gradient-ep2-overlap"),
        pytest.param("ema", TP2, [], id="ema-tp2"),
    ],
)
def test_codes_move_so_many_steps_and_then_stay(
    ranks, update: str, layout: dict, optimizer: list[str], small_corpus, tmp_path
) -> None:
    """Adam's momentum and a weight decay of 1 notwithstanding, and alike on all replicas."""
    every = [*TINY, "train.train_iters=6", FREEZE, NO_REVIVAL, f"vq.codebook_update={update}"]
    every += [*optimizer, "optimizer.weight_decay=1", "optimizer.lr_warmup_iters=0"]
    every += [f"data.path={small_corpus}", f"train.output_dir={tmp_path}"]
    every += [f"parallel.{name}={size}" for name, size in layout.items()]
    both = ranks(2).run(codes_by_step, str(PARITY), every, layout=layout)
    # Overlapped, a step's codes are gathered in the next forward pass.
    first = LAST if optimizer == OVERLAP else LAST - 1
    for found in both:
        assert len(found) == 6
        for layer in range(2):
            codes = [step[layer] for step in found]
            for one, next_one in zip(codes[: LAST - 1], codes[1:LAST], strict=True):
                assert not torch.equal(one, next_one)
            for one in codes[first:]:
                assert torch.equal(one, codes[-1])
            assert torch.equal(codes[-1], both[0][-1][layer])


@pytest.mark.parametrize(
    ("update", "layout", "revival"),
    [("ema", EP2, "error"), ("gradient", TP2, "random"), ("reanchor", EP2, "random")],
)
def test_a_resume_over_the_freeze_point_is_exact(
    ranks, update: str, layout: dict, revival: str, small_corpus, tmp_path
) -> None:
    """Stopped before it, behind it, or never: the same losses and codebooks to the last bit."""
    every = [*TINY, "train.train_iters=6", FREEZE, f"vq.codebook_update={update}"]
    every += [f"vq.revival={revival}", "vq.dead_code_threshold=0.8"]
    whole = run_on(ranks(2), small_corpus, tmp_path / "whole", every, layout)
    for stop in (2, 4):
        where = tmp_path / str(stop)
        run_on(ranks(2), small_corpus, where, [*every, f"train.exit_interval={stop}"], layout)
        resumed = run_on(ranks(2), small_corpus, where, every, layout)
        for rank, other in zip(whole, resumed, strict=True):
            assert other["codebooks"] == rank["codebooks"] == whole[0]["codebooks"]
            ours = [(r["loss"], r["vq/codebook_frozen"]) for r in rank["records"]]
            theirs = [(r["loss"], r["vq/codebook_frozen"]) for r in other["records"]]
            assert theirs == ours[stop:]
    assert [r["vq/codebook_frozen"] for r in whole[0]["records"]] == [0, 0, 0, 1, 1, 1]
    assert [r["vq/assignment_change_rate"] for r in whole[0]["records"][4:]] == [0, 0]


def test_a_frozen_run_is_opened_by_resuming_it_with_another_number(
    ranks, small_corpus, tmp_path
) -> None:
    every = [*TINY, "train.train_iters=6", "vq.codebook_update=gradient", NO_REVIVAL]
    stop = ["train.exit_interval=4", FREEZE]
    run_on(ranks(2), small_corpus, tmp_path, [*every, *stop], EP2)
    opened = run_on(ranks(2), small_corpus, tmp_path, [*every, "vq.freeze_after_steps=5"], EP2)
    assert [r["vq/codebook_frozen"] for r in opened[0]["records"]] == [0, 1]
    assert opened[0]["codebooks"] == opened[1]["codebooks"]


def test_a_skipped_step_is_none_of_the_steps(ranks, small_corpus, tmp_path) -> None:
    every = [*TINY, "train.train_iters=6", "train.nan_policy=skip", f"data.path={small_corpus}"]
    every += [f"train.output_dir={tmp_path}", "parallel.expert_model_parallel_size=2", FREEZE]
    for result in ranks(2).run(train_with_one_poisoned_step, str(PARITY), every, layout=EP2):
        assert result["skipped"] == 1
        frozen = {
            r["iteration"]: r["vq/codebook_frozen"]
            for r in result["records"]
            if math.isfinite(r["loss"])
        }
        assert frozen == {1: 0, 2: 0, 4: 0, 5: 1, 6: 1}


def in_a_loop_of_ones_own(update: str) -> list[dict]:
    """In a rank: a hand-written loop with torch's AdamW, and a second model's beside it."""
    vq = VQConfig(
        num_codes=12, codebook_update=update, freeze_after_steps=2, dead_code_threshold=0.0
    )
    parameters = {n: p.float() for n, p in draw_parameters(vq).items()}
    layers = [build_layer(vq, parameters) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5) for layer in layers
    ]
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(5):
        for layer, optimizer in zip(layers[: 1 if step < 2 else 2], optimizers, strict=False):
            codes = layer.assigner.codebook.codes
            before, weight = codes.detach().clone(), next(layer.experts.parameters())
            weight_before = weight.detach().clone()
            optimizer.zero_grad()
            layer(torch.randn(6, 2, HIDDEN, generator=generator))[0].square().sum().backward()
            optimizer.step()
            found.append(
                {
                    "model": layers.index(layer),
                    "codes move": not torch.equal(codes, before),
                    "weights move": not torch.equal(weight, weight_before),
                    "codes have a gradient": bool(codes.grad.any()),
                }
            )
    return found


@pytest.mark.parametrize("update", ["gradient", "reanchor"])
def test_a_loop_that_knows_nothing_of_codebooks_freezes_each_model_by_its_own_steps(
    ranks, update: str
) -> None:
    (found,) = ranks(1).run(in_a_loop_of_ones_own, update)
    assert all(step["weights move"] for step in found)
    for model, wanted in ((0, [True, True, False, False, False]), (1, [True, True, False])):
        own = [step for step in found if step["model"] == model]
        assert [step["codes move"] for step in own] == wanted
        assert [step["codes have a gradient"] for step in own] == wanted
