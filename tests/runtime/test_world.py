"""Who am I and which device: launcher variables, their gaps by name, and refused devices."""

from __future__ import annotations

import os

import pytest
import torch
from toy_package import pretend_installed

from vqmoe_megatron import registry
from vqmoe_megatron.runtime.world import (
    RankVariables,
    choose_device,
    discover_rank,
    join_world,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
}


def test_torchruns_variables() -> None:
    assert discover_rank(TORCHRUN) == RankVariables(3, 8, 1, "torchrun")


def test_sruns_variables() -> None:
    assert discover_rank(SRUN) == RankVariables(5, 16, 1, "slurm")


def test_torchrun_inside_srun_wins() -> None:
    assert discover_rank({**SRUN, **TORCHRUN}).source == "torchrun"


def test_a_plain_process_is_a_world_of_one() -> None:
    assert discover_rank({}) == RankVariables(0, 1, 0, "single process")


def test_a_batch_script_outside_srun_is_a_world_of_one() -> None:
    # sbatch sets these for the script itself; without srun there is one process, not sixteen.
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert discover_rank(batch) == RankVariables(0, 1, 0, "single process")


@pytest.mark.parametrize("missing", list(TORCHRUN))
def test_a_missing_torchrun_variable_is_named(missing: str) -> None:
    present = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ValueError, match=f"torchrun set .* but not {missing};"):
        discover_rank(present)


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"])
def test_a_missing_slurm_variable_is_named(missing: str) -> None:
    present = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(ValueError, match=f"slurm set .* but not {missing};"):
        discover_rank(present)


@pytest.mark.parametrize(
    ("launcher", "name", "value", "message"),
    [
        (TORCHRUN, "RANK", "three", "RANK='three' is not an integer"),
        (TORCHRUN, "RANK", " ", "RANK=' ' is not an integer"),
        (
            TORCHRUN,
            "RANK",
            "9" * 5000,
            r"RANK=.9{119}\.\.\. \(5,002 characters\) is",
        ),
        (TORCHRUN, "LOCAL_RANK", "8", "0 <= LOCAL_RANK < WORLD_SIZE fails: 8 of 8"),
        (TORCHRUN, "WORLD_SIZE", "-8", "WORLD_SIZE=-8 must be at least 1"),
        (TORCHRUN, "WORLD_SIZE", "", "WORLD_SIZE='' is not an integer"),
        (TORCHRUN, "LOCAL_RANK", "1.0", "LOCAL_RANK='1.0' is not an integer"),
        (SRUN, "SLURM_PROCID", "x", "SLURM_PROCID='x' is not an integer"),
        (TORCHRUN, "RANK", "8", "0 <= RANK < WORLD_SIZE fails: 8 of 8"),
        (SRUN, "SLURM_PROCID", "-1", "0 <= SLURM_PROCID < SLURM_NTASKS fails: -1 of 16"),
        (TORCHRUN, "LOCAL_RANK", "-1", "0 <= LOCAL_RANK < WORLD_SIZE fails: -1 of 8"),
        (TORCHRUN, "WORLD_SIZE", "0", "WORLD_SIZE=0 must be at least 1"),
    ],
)
def test_an_impossible_launcher_variable_is_named(launcher, name, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        discover_rank({**launcher, name: value})


@pytest.mark.parametrize(
    ("requested", "available", "chosen"),
    [("auto", False, "cpu"), ("cpu", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda")],
)
def test_device_follows_what_is_there(
    monkeypatch: pytest.MonkeyPatch, requested: str, available: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    device, reason = choose_device(requested)
    assert device == chosen
    assert ("no CUDA" in reason) is not available


def test_absent_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="train.device=cuda, but torch sees no CUDA device"):
        choose_device("cuda")


def test_the_cpu_beside_a_gpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=''"):
        choose_device("cpu")


@pytest.mark.parametrize(
    ("present", "named"),
    [
        ({}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "n1"}, "MASTER_PORT='n1' is not a port"),
    ],
)
def test_many_ranks_need_a_meeting_place(
    monkeypatch: pytest.MonkeyPatch, present: dict[str, str], named: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(present))
    with pytest.raises(ValueError, match=named):
        join_world(RankVariables(0, 2, 0, "torchrun"), "cpu")
    assert not torch.distributed.is_initialized()


def lonely_world() -> dict:
    """In a rank: what join_world and the process groups made of this world."""
    from megatron.core import parallel_state

    return {
        "backend": torch.distributed.get_backend(),
        "world_size": torch.distributed.get_world_size(),
        "rank": torch.distributed.get_rank(),
        "data_parallel": parallel_state.get_data_parallel_world_size(),
        "expert_parallel": parallel_state.get_expert_model_parallel_world_size(),
        "expert_data_parallel": parallel_state.get_expert_data_parallel_world_size(),
        "tensor_parallel_ranks": torch.distributed.get_process_group_ranks(
            parallel_state.get_tensor_model_parallel_group()
        ),
    }


@pytest.mark.distributed
def test_process_groups_of_a_layout(ranks) -> None:  # noqa: ANN001
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}
    for rank, found in enumerate(ranks(4).run(lonely_world, layout=layout)):
        assert found == {
            "backend": "gloo",
            "world_size": 4,
            "rank": rank,
            "data_parallel": 2,
            "expert_parallel": 4,
            "expert_data_parallel": 1,
            "tensor_parallel_ranks": [rank // 2 * 2, rank // 2 * 2 + 1],
        }


@pytest.mark.distributed
def test_a_single_process_joins_a_world_of_one(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(lonely_world)
    assert found["world_size"] == found["data_parallel"] == found["expert_parallel"] == 1


def test_a_packages_launcher_is_asked_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {"substrate.toyrun": "toy_launch:Toyrun"})
    place = {"TOY_RANK": "1", "TOY_SIZE": "2", "TOY_LOCAL_RANK": "0"}
    try:
        assert discover_rank(place) == RankVariables(1, 2, 0, "toyrun")
        torchrun = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}
        assert discover_rank(place | torchrun).source == "torchrun"
        with pytest.raises(ValueError, match="toyrun set TOY_RANK but not TOY_SIZE"):
            discover_rank({"TOY_RANK": "1"})
    finally:
        registry._installed.cache_clear()
