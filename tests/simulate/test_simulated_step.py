"""A rank of a world that is not there sends what the plan says, at any size."""

from __future__ import annotations

import subprocess
from fractions import Fraction

import pytest
from counted_ranks import small_recipe

from vqmoe_megatron.plan.step_wire import step_wire
from vqmoe_megatron.simulate import simulated_step
from vqmoe_megatron.simulate.simulated_step import SimulationFailed, compare, simulate_step

WIDE = {"tp": 4, "pp": 4, "ep": 16, "etp": 1}
OPTIONS = [
    "model.num_layers=8",
    "model.num_moe_experts=32",
    "vq.num_codes=64",
    "model.seq_length=64",
    "model.bf16=true",
    "optimizer.use_distributed_optimizer=true",
    "train.global_batch_size=1024",
]


@pytest.mark.full
def test_512_ranks_agree_with_the_plan() -> None:
    config = small_recipe(WIDE, OPTIONS)
    simulated = simulate_step(config, 512)
    assert simulated.matches
    # One rank of the first stage, of the inner ones, and of the last.
    assert [rank.rank for rank in simulated.ranks] == [0, 128, 384]
    assert [rank.pipeline_rank for rank in simulated.ranks] == [0, 1, 3]
    assert simulated.num_microbatches == 4  # one per stage
    assert simulated.num_microbatches_of_run == 32
    assert any("4 of 32 microbatches" in note for note in simulated.notes)
    axes = {axis for rank in simulated.ranks for _, axis in rank.counted}
    assert {"tp", "ep", "pp", "dp", "expt_dp", "tp_dp", "world"} <= axes
    assert simulated.peak_memory_bytes < 8 * 1024**3
    for rank in simulated.ranks:
        total = simulated.planned.stages[rank.pipeline_rank].sent_bytes
        assert rank.sent_bytes == total > 0


def test_a_wrong_plan_is_seen() -> None:
    config = small_recipe({"tp": 2}, ["train.global_batch_size=1"])
    simulated = simulate_step(config, 2)
    assert simulated.matches
    (rank,) = simulated.ranks
    (calls, sent) = rank.counted["all_gather", "tp"]
    rank.counted["all_gather", "tp"] = (calls, sent + 1)
    assert not simulated.matches
    (wrong,) = [entry for entry in simulated.comparison(rank) if not entry.is_equal]
    assert (wrong.axis, wrong.counted[1] - wrong.planned[1]) == ("tp", 1)


def test_a_missing_collective_is_a_difference() -> None:
    (only,) = compare({("send", "pp"): (1, 4)}, {})
    assert not only.is_equal
    assert only.counted == (0, 0)
    (only,) = compare({("send", "pp"): (1, Fraction(4))}, {("send", "pp"): (1, 4)})
    assert only.is_equal


@pytest.mark.parametrize(
    ("world_size", "ranks", "message"),
    [
        (8192, None, "1 <= world_size <= 4096 fails: 8192"),
        (0, None, "1 <= world_size <= 4096 fails: 0"),
        (2, [2], "0 <= rank < world_size fails: 2 of 2"),
        (3, None, r"world_size % .TP .*3 % 2 = 1"),
    ],
)
def test_illegal_worlds_are_refused(world_size, ranks, message) -> None:  # noqa: ANN001
    config = small_recipe({"tp": 2}, [])
    with pytest.raises(ValueError, match=message):
        simulate_step(config, world_size, ranks)


def test_rows_that_cannot_be_spread_evenly_are_refused() -> None:
    config = small_recipe({"ep": 4}, ["model.seq_length=6", "train.global_batch_size=4"])
    with pytest.raises(ValueError, match="6 % 4 = 2"):
        simulate_step(config, 4)


def test_a_failed_process_shows_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_step, "save_recipe", lambda config, path: path.write_text("x: 1"))
    with pytest.raises(SimulationFailed, match=r"(?s)ended with exit code 1\n.*x"):
        simulate_step(small_recipe({}, ["train.global_batch_size=1"]), 1)


def test_a_process_that_the_kernel_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = ["bash", "-c", "kill -9 $$"]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(killed, **options))
    with pytest.raises(SimulationFailed, match="killed by SIGKILL, most likely out of memory$"):
        simulate_step(small_recipe({}, ["train.global_batch_size=1"]), 1)


def test_the_plan_is_that_of_the_simulated_microbatches() -> None:
    config = small_recipe({"pp": 2}, ["train.global_batch_size=64"])
    whole = step_wire(config, simulated_step.check_layout(config, 2, "cpu"))
    short = simulated_step._shortened(config, simulated_step.check_layout(config, 2, "cpu"))
    assert short.train.global_batch_size == 2
    assert whole.sent_bytes > step_wire(short, simulated_step.check_layout(short, 2)).sent_bytes
