"""The alpha-beta model by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from real_model import recipe

from vqmoe_megatron.plan.grid import AxisPlace
from vqmoe_megatron.plan.hardware import GB, PROFILES, Hardware, Link, hardware_profile
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.step_time import bubble_microbatches, term_seconds
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


def test_a_step_is_the_sum_of_its_exposed_parts() -> None:
    config = recipe(["parallel.pipeline_model_parallel_size=2"])
    time = plan_run(config, 2, "CPU").step_time
    microbatches = 8
    in_schedule = sum(
        entry.exposed_seconds for entry in time.communication if entry.part == "pipeline"
    )
    once = time.compute_seconds / microbatches + in_schedule / microbatches
    assert time.bubble_seconds == pytest.approx(once)  # PP - 1 = 1 microbatch
    assert time.total_seconds == pytest.approx(
        time.compute_seconds + time.exposed_seconds + time.bubble_seconds + time.optimizer_seconds
    )
    assert time.tokens_per_second == pytest.approx(8 * 16 / time.total_seconds)


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
    with pytest.raises(ValueError, match="no source for achievable_flops"):
        without = {k: v for k, v in PROFILES["CPU"].sources.items() if k != "achievable_flops"}
        replace(PROFILES["CPU"], sources=without)
    assert isinstance(PROFILES["B200"], Hardware)


def test_bubble_shrinks_with_chunks() -> None:
    def bubble(stages: int, chunks: int | None) -> Fraction:
        return bubble_microbatches(ParallelLayout(stages, 1, stages, chunks, 1, 1, 1, False))

    assert bubble(1, None) == 0
    assert bubble(4, None) == 3
    assert bubble(4, 2) == Fraction(3, 2)
