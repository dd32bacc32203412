"""Two ways of running one arm: their outputs and gradients over microbatches, and their times."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vqmoe_megatron.bench.arm_table import FORWARD_BACKWARD, ArmSpec
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.gate import relative_difference
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.bench.timing import Action
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.runtime.graphs import Graph

NUM_MICROBATCHES = 4  # of a captured path the first runs as it is, the second is captured
LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}  # with both paths, rows meet experts apart


def training_arm(
    spec: ArmSpec, inputs: CaseInputs, new_graph: Callable[[], Graph] | None = None
) -> Arm:
    """An arm in training, captured with ``new_graph``. No communication."""
    (arm,) = build_arms({"it": spec}, inputs, new_graph).values()
    arm.enter(FORWARD_BACKWARD)
    return arm


def check_pair(job: Job, what: str, arm: Arm, plain: Arm, inputs: CaseInputs) -> None:
    """Check that two arms, which share their weights, train alike. No communication."""
    expected, found = _microbatches(plain, inputs), _microbatches(arm, inputs)
    by_name = {name: relative_difference(found[name], expected[name]) for name in expected}
    failed = [name for name, difference in by_name.items() if difference != difference]
    worst = failed[0] if failed else max(by_name, key=by_name.__getitem__)
    text = f"worst of {len(by_name)} tensors: {worst}"
    job.within(what, by_name[worst], LIMIT[inputs.case.dtype], text)


def _microbatches(arm: Arm, inputs: CaseInputs) -> dict[str, torch.Tensor]:
    """Outputs of all microbatches, kept to the end; gradients as they stand after each."""
    arm.forget()
    found = {}
    for number in range(NUM_MICROBATCHES):
        generator = torch.Generator().manual_seed(number)
        grad = torch.randn(inputs.x.shape, generator=generator).to(inputs.x)
        order = torch.randperm(inputs.x.shape[0], generator=generator).to(inputs.x.device)
        leaf = inputs.x[order].requires_grad_()
        found[f"output {number}"] = arm.step(leaf, grad)
        found[f"gradient of x {number}"] = leaf.grad
        for name, parts in arm.parameters.items():
            gradients = [part.grad for part in parts if part.grad is not None]
            if gradients:
                found[f"gradient of {name} {number}"] = torch.stack(gradients)
    arm.forget()
    return found


def step_of(arm: Arm, leaf: torch.Tensor, grad: torch.Tensor) -> Action:
    """A step to time, on ``leaf`` [T, 1, H] with ``grad`` [T, 1, H] of the output."""

    def forget() -> None:
        arm.forget()
        leaf.grad = None

    return Action(lambda: arm.step(leaf, grad), forget)
