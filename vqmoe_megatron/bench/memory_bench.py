"""``vqmoe bench memory``: what each arm's forward pass saves for its backward pass.

T tokens. Counted by :mod:`saved_tensors`, without parameters, buffers and the layer's input; the
arms pass the equality gate first. Beside it stands what ``plan/activation_memory.py``
predicts, which counts the rows in experts and the code table only, the part in which executions
differ. On CUDA the allocator's peak over a whole step, above what was allocated before it, is
measured as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import FORWARD_BACKWARD, choose_arms, layer_shape
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.gate import check_arms, check_routing, output_gradient
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.saved_tensors import saved_bytes
from vqmoe_megatron.bench.shared_inputs import case_inputs
from vqmoe_megatron.plan.activation_memory import saved_bytes as predicted_saved_bytes


def measure_memory(
    case: LayerCase, letters: Sequence[str], progress: Progress
) -> list[dict[str, Any]]:
    """Gate the arms of one case and count what they save; one row per arm.

    Raises:
        GateFailed: when arms disagree.
        ValueError: for unknown arms, or settings that an arm cannot take.

    Needs the process groups of one rank. No communication.
    """
    specs = choose_arms(letters, FORWARD_BACKWARD, case.hidden_size)
    inputs = case_inputs(case)
    check_routing(inputs)
    grad, arms = output_gradient(inputs, case.seed), build_arms(specs, inputs)
    progress.say(f"{case.words}: {check_arms(arms, inputs, grad, FORWARD_BACKWARD, progress)}")
    rows = []
    for letter, arm in arms.items():
        progress.look(f"{case.words}: counting arm {letter}")
        predicted = None
        if arm.spec.kind == "vqmoe":
            predicted = predicted_saved_bytes(layer_shape(case, arm.spec, {})).saved_bytes
        row = case.row(letter, arm.spec.title, FORWARD_BACKWARD)
        row |= dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "wire_bytes"))
        row |= {
            "saved_bytes": count_saved_bytes(arm, inputs.x),
            "predicted_saved_bytes": predicted,
            "peak_bytes": peak_bytes(arm, inputs.x, grad),
        }
        rows.append(row)
    return rows


def count_saved_bytes(arm: Arm, x: torch.Tensor) -> int:
    """Return what one microbatch ``[T, 1, H]`` keeps; communicates as the layer's forward pass."""
    arm.forget()
    leaf = x.detach().clone().requires_grad_()
    module = arm.module
    excluded = [leaf, *module.parameters(), *module.buffers(), *arm.all_parameters()]

    def forward() -> torch.Tensor:
        output, loss = module(leaf)
        return output if loss is None else output.sum() + loss

    num_bytes, _ = saved_bytes(forward, excluded)
    arm.forget()
    return num_bytes


def peak_bytes(arm: Arm, x: torch.Tensor, grad: torch.Tensor) -> int | None:
    """Return the allocator's peak over a step above what lay there before; None without CUDA.

    Args:
        arm: ready for its backward pass.
        x: ``[T, 1, H]``.
        grad: ``[T, 1, H]`` of the output.

    Communicates as the layer does.
    """
    if not torch.cuda.is_available():
        return None
    arm.forget()
    leaf = x.detach().clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    arm.step(leaf, grad)
    torch.cuda.synchronize()
    num_bytes = torch.cuda.max_memory_allocated() - before_bytes
    arm.forget()
    return num_bytes
