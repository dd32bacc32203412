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
from pathlib import Path
from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import ArmSpec
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.launch.local_ranks import STOP_SIGNALS

JOB_FILE = "job.json"
NUM_MICROBATCHES = 4  # of a step with one table


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

    from vqmoe_megatron.bench.arm_table import ARMS
    from vqmoe_megatron.bench.arms import build_arm
    from vqmoe_megatron.bench.routing import routed_tokens
    from vqmoe_megatron.bench.weights import draw_weights

    case = LayerCase(**case_fields)
    tokens = routed_tokens(case, torch.distributed.get_rank())
    weights = draw_weights(case, tokens.router_weight)
    x = tokens.x.unsqueeze(1)
    arms = {}
    for letter in letters:
        arms[letter] = _count(build_arm(step_spec(ARMS[letter]), case, tokens, weights), x)
    return {
        "place": [
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_rank(),
        ],
        "arms": arms,
    }


def _count(arm: Any, x: torch.Tensor) -> dict[str, Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from vqmoe_megatron.bench.arm_table import FORWARD_BACKWARD
    from vqmoe_megatron.bench.wire_count import WireCounter

    names = ("ep", "expt_tp", "tp", "tp_ep")
    collection = ProcessGroupCollection.use_mpu_process_groups(list(names))
    counter = WireCounter({name: getattr(collection, name) for name in names})
    arm.enter(FORWARD_BACKWARD)
    arm.forget()
    leaf = x.detach().clone().requires_grad_()
    grad = torch.ones_like(x)
    with counter:
        arm.step(leaf, grad, counter.enter_pass)
    arm.forget()
    return {
        "sent": [
            [s.is_backward, s.collective, s.group, s.num_bytes.numerator, s.num_bytes.denominator]
            for s in counter.sent
        ],
        **_experts(arm, x),
    }


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
