"""The alpha-beta model by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from real_model import recipe

from vqmoe_megatron.plan.grid import AxisPlace
from vqmoe_megatron.plan.hardware import GB, PROFILES, Hardware, Link, hardware_profile
from vqmoe_megatron.plan.kernels import STEP
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.step_time import bubble_microbatches, least_seconds, term_seconds
from vqmoe_megatron.plan.wire import Term

PLAIN = replace(
    PROFILES["H100"],
    intra_node=Link(1e-6, 100 * GB),
    inter_node=Link(1e-5, 10 * GB),
    achievable_link=1.0,
)
NEAR, FAR = AxisPlace(8, 1, 8), AxisPlace(16, 2, 8)


def seconds(collective: str, place: AxisPlace, calls: int = 3) -> float:
    return term_seconds(Term("rows", collective, "ep", 10 * GB, calls), place, PLAIN)


def test_within_a_node() -> None:
    assert seconds("all_gather", NEAR) == pytest.approx(3 * 3 * 1e-6 + 0.1)
    assert seconds("all_reduce", NEAR) == pytest.approx(3 * 6 * 1e-6 + 0.1)
    assert seconds("send", NEAR) == pytest.approx(3 * 1e-6 + 0.1)


def test_across_nodes_rings_share_the_ports_and_rows_do_not() -> None:
    assert seconds("all_gather", FAR) == pytest.approx(3 * 4 * 1e-5 + 10 / 8 / 10)
    assert seconds("send", FAR) == pytest.approx(3 * 1e-5 + 1.0)
    assert seconds("all_to_all", FAR) == pytest.approx(3 * 4 * 1e-5 + 10 * 8 / 15 / 10)


def test_a_step_is_the_sum_of_its_rows() -> None:
    config = recipe(["parallel.pipeline_model_parallel_size=2"])
    time = plan_run(config, 2, "CPU").step_time
    microbatches = 8
    in_schedule = sum(
        entry.exposed_seconds for entry in time.communication if entry.part == "pipeline"
    )
    once = sum(
        seconds
        for row in time.rows
        for kernel, seconds in zip(row.kernels, row.kernel_seconds, strict=True)
        if kernel.phase == STEP
    )
    assert once > 0
    microbatch = (time.compute_seconds - once + in_schedule) / microbatches
    assert time.bubble_seconds == pytest.approx(microbatch)  # PP - 1 = 1 microbatch
    rows = sum(row.seconds for row in time.rows)
    others = time.exposed_seconds + time.bubble_seconds + time.optimizer_seconds
    assert time.total_seconds == pytest.approx(rows + others)
    assert len(time.parts) == len(time.rows) + 3
    assert time.tokens_per_second == pytest.approx(8 * 16 / time.total_seconds)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.pipeline_model_parallel_size=2"],
        ["parallel.expert_model_parallel_size=2", "vq.table_per_step=true"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        [
            "optimizer.overlap_grad_reduce=true",
            "model.recompute_granularity=full",
            "model.recompute_method=uniform",
            "model.recompute_num_layers=1",
        ],
    ],
)
@pytest.mark.parametrize("hardware", PROFILES.values(), ids=PROFILES)
def test_no_step_is_faster_than_its_kernels_and_their_bubble(overrides, hardware) -> None:
    plan = plan_run(recipe(overrides), 2, hardware)
    least = least_seconds(plan.config, plan.layout, hardware)
    assert 0 < least < plan.step_time.total_seconds
    time = plan.step_time
    once = sum(k.seconds(hardware) for row in time.rows for k in row.kernels if k.phase == STEP)
    bubble = bubble_microbatches(plan.layout) / plan.layout.num_microbatches(plan.config.train)
    kernels = time.compute_seconds + float(bubble) * (time.compute_seconds - once)
    assert least == pytest.approx(kernels)  # of the slower end


def test_overlap_hides_what_it_can() -> None:
    exposed = plan_run(recipe([]), 2, "CPU").step_time
    config = recipe(["optimizer.overlap_grad_reduce=true"])
    hidden = plan_run(config, 2, "CPU").step_time
    assert exposed.overlapped_seconds == 0 < hidden.overlapped_seconds
    assert hidden.exposed_seconds < exposed.exposed_seconds
    assert {e.part for e in hidden.communication if e.overlapped_seconds} == {"gradients"}


def test_every_hardware_figure_has_a_source() -> None:
    assert set(PROFILES) == {"H100", "H200", "B200", "CPU"}
    assert hardware_profile("h200") is PROFILES["H200"]
    with pytest.raises(ValueError, match="hardware 'TPU' is not known; choose one of H100, H200"):
        hardware_profile("TPU")
    with pytest.raises(ValueError, match="no source for launch_seconds"):
        without = {k: v for k, v in PROFILES["CPU"].sources.items() if k != "launch_seconds"}
        replace(PROFILES["CPU"], sources=without)
    assert isinstance(PROFILES["B200"], Hardware)


def test_bubble_shrinks_with_chunks() -> None:
    def bubble(stages: int, chunks: int | None) -> Fraction:
        return bubble_microbatches(ParallelLayout(stages, 1, stages, chunks, 1, 1, 1, False))

    assert bubble(1, None) == 0
    assert bubble(4, None) == 3
    assert bubble(4, 2) == Fraction(3, 2)
