"""What one rank of ``vqmoe bench wire`` does: run each arm's step, write down what it sent.

T tokens of this rank. The starter leaves a job file in a folder; each rank runs the job's layouts
one after the other and writes its findings beside it. All in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD, ArmSpec
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.launch.local_ranks import STOP_SIGNALS
from vqmoe_megatron.runtime.collective_counter import CollectiveCounter

JOB_FILE = "job.json"
NUM_MICROBATCHES = 4  # of a step with one table


class WireCounter(CollectiveCounter):
    """While entered, lists what this rank sends, by collective; the caller says in which pass."""

    def __init__(self, groups: Sequence[tuple[str, ProcessGroup]]) -> None:
        """``groups``: names that are written down, and their process groups; of a group named twice
        the first holds. Others are ``other``."""
        super().__init__({group.group_name: name for name, group in reversed(groups)})
        self.is_backward = False
        self.sent: list[list[Any]] = []  # is_backward, collective, group, numerator, denominator

    def enter_pass(self, is_backward: bool) -> None:
        """Say which pass runs from here on."""
        self.is_backward = is_backward

    def add(self, collective: str, axis: str, num_bytes: Fraction) -> None:
        """List one collective."""
        fraction = [num_bytes.numerator, num_bytes.denominator]
        self.sent.append([self.is_backward, collective, axis, *fraction])


def result_file(folder: Path, rank: int) -> Path:
    """Where a rank writes what it found."""
    return folder / f"rank_{rank}.json"


def run_wire_rank(folder: Path) -> None:
    """Join the world of the environment on the CPU, run the folder's job, write the result.

    Communicates: all ranks of the world.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the starter until here
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bytes are the same on gloo; GPUs may be too few
    from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
    from vqmoe_megatron.runtime.world import discover_rank, join_world, leave_world

    install_cpu_compat()
    # torch's new names for collectives, which Megatron 0.16.1 does not know yet
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    # of Megatron's own experts, which are not sharded where the attention is
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`")
    from vqmoe_megatron.bench.bench_world import lay_out

    variables = discover_rank()
    join_world(variables, "cpu")
    job = json.loads((folder / JOB_FILE).read_text())
    found = {}
    for name, sizes in job["layouts"].items():
        lay_out(sizes)
        found[name] = count_arms(job["case"], job["arms"])
    result_file(folder, variables.rank).write_text(json.dumps(found))
    leave_world()


def step_spec(spec: ArmSpec) -> ArmSpec:
    """The arm as it is counted: several microbatches where one table serves them."""
    if spec.vq.get("table_per_step"):
        return dataclasses.replace(spec, num_microbatches=NUM_MICROBATCHES)
    return spec


def count_arms(case_fields: Mapping[str, Any], letters: Sequence[str]) -> dict[str, Any]:
    """In a rank with its process groups: one step of every arm.

    Returns:
        ``place``: this rank's expert-data, expert and expert-tensor rank; ``arms``: by letter what
        was sent, as ``[is_backward, collective, group, numerator, denominator]``, and the experts
        of this rank's rows by path.

    Communicates as the layers do.
    """
    from megatron.core import parallel_state

    from vqmoe_megatron.bench.arms import build_arms
    from vqmoe_megatron.bench.shared_inputs import case_inputs

    inputs = case_inputs(LayerCase(**case_fields), torch.distributed.get_rank())
    arms = build_arms({letter: step_spec(ARMS[letter]) for letter in letters}, inputs)
    return {
        "place": [
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_rank(),
        ],
        "arms": {letter: _count(arm, inputs.x) for letter, arm in arms.items()},
    }


def _count(arm: Any, x: torch.Tensor) -> dict[str, Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    names = ("ep", "expt_tp", "tp", "tp_ep")
    collection = ProcessGroupCollection.use_mpu_process_groups([*names, "tp_cp"])
    groups = [(name, getattr(collection, name)) for name in names]
    # No arm cuts sequences, and tp_cp then has the ranks of tp in a group of its own.
    counter = WireCounter([*groups, ("tp", collection.tp_cp)])
    arm.enter(FORWARD_BACKWARD)
    arm.forget()
    leaf = x.detach().clone().requires_grad_()
    grad = torch.ones_like(x)
    with counter:
        arm.step(leaf, grad, counter.enter_pass)
    arm.forget()
    return {"sent": counter.sent, **_experts(arm, x)}


@torch.no_grad()
def _experts(arm: Any, x: torch.Tensor) -> dict[str, list[int]]:
    """The experts of this rank's rows, by path; what the formulas are told of the routing."""
    if arm.spec.kind != "vqmoe":
        return {"continuous": [], "discrete": []}
    layer = arm.module
    found: dict[str, list[int]] = {"continuous": [], "discrete": []}
    for path in layer.paths:
        experts = path.ask(x, x.flatten(0, 1)).experts.flatten().tolist()
        found["discrete" if path.is_discrete else "continuous"] += experts
    return found
