"""The captured discrete path (``train.cuda_graphs``): equal to the one without graphs, its time.

On CUDA with CUDA's graphs, on the CPU with their recorder. A capture that fails is a failed check.
"""

from __future__ import annotations

from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.gate import relative_difference
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.bench.timing import Action, time_in_turns
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.runtime.static_graph import CudaGraph, Graph, RecordedGraph

LETTERS = ("E", "F", "F2", "E2", "F3")  # of bench/arm_table.py: code space, alone and beside top-1
NUM_MICROBATCHES = 4  # the first runs as it is, the second is captured
LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}  # with both paths, rows meet experts apart
NAME = "CUDA graph"


class NotCaptured(Exception):
    """A path that should have been captured ran as it is."""


def graph_type(device: str) -> type[Graph]:
    """What captures on a device."""
    return CudaGraph if device == "cuda" else RecordedGraph


def captured_arm(letter: str, inputs: CaseInputs, new_graph: type[Graph]) -> Arm:
    """An arm, in training, whose discrete path is captured at its second step."""
    (arm,) = build_arms({letter: ARMS[letter]}, inputs, new_graph).values()
    arm.enter(FORWARD_BACKWARD)
    return arm


def plain_arm(letter: str, inputs: CaseInputs) -> Arm:
    """The arm without graphs."""
    (arm,) = build_arms({letter: ARMS[letter]}, inputs).values()
    arm.enter(FORWARD_BACKWARD)
    return arm


def check_captured(job: Job, inputs: CaseInputs) -> None:
    """Hold every captured layer against the layer, over microbatches whose gradients add up."""
    job.say("captured layers against layers without graphs")
    for letter in LETTERS:
        what = f"captured {letter}, {ARMS[letter].text}"
        if job.has_time(what):
            with attempt(job, what):
                by_name = captured_differences(letter, inputs, graph_type(job.device))
                worst = max(by_name, key=by_name.__getitem__)
                text = f"worst of {len(by_name)} tensors: {worst}"
                job.within(what, by_name[worst], LIMIT[inputs.case.dtype], text)


def captured_differences(
    letter: str, inputs: CaseInputs, new_graph: type[Graph]
) -> dict[str, float]:
    """Return relative differences of outputs and added gradients, by name and microbatch.

    Raises:
        NotCaptured: when no graph was made.
    """
    expected = _microbatches(plain_arm(letter, inputs), inputs)
    arm = captured_arm(letter, inputs, new_graph)
    found = _microbatches(arm, inputs)
    if not all(getattr(path, "is_captured", False) for path in arm.module.discrete_paths):
        raise NotCaptured(f"arm {letter} ran without a graph")
    return {name: relative_difference(found[name], expected[name]) for name in expected}


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


def time_captured(
    job: Job, inputs: CaseInputs, grad: torch.Tensor, num_repeats: int, num_warmup: int
) -> None:
    """Time steps with and without graphs, in turns; one row per arm. No communication.

    Args:
        job: takes the rows; an error is a failed check.
        inputs: of the arms.
        grad: ``[T, 1, H]`` of the output.
        num_repeats: timed rounds.
        num_warmup: untimed rounds before them.
    """
    for letter in LETTERS:
        what = f"{NAME} of {letter}, {ARMS[letter].text}"
        if job.has_time(what):
            with attempt(job, what):
                row = _timed(letter, inputs, grad, graph_type(job.device), num_repeats, num_warmup)
                job.check(what, True)
                job.row("A step with the discrete path captured, forward and backward", **row)
                job.say(f"{what}: {row['captured_ms']:.3f} ms, without {row['plain_ms']:.3f} ms")


def _timed(
    letter: str,
    inputs: CaseInputs,
    grad: torch.Tensor,
    new_graph: type[Graph],
    num_repeats: int,
    num_warmup: int,
) -> dict[str, Any]:
    plain, captured = plain_arm(letter, inputs), captured_arm(letter, inputs, new_graph)
    leaf = inputs.x.clone().requires_grad_()

    def action(arm: Arm) -> Action:
        def forget() -> None:
            arm.forget()
            leaf.grad = None

        return Action(lambda: arm.step(leaf, grad), forget)

    captured.step(leaf, grad)
    reserved = torch.cuda.memory_reserved() if new_graph is CudaGraph else None
    captured.step(leaf, grad)
    if reserved is not None:
        reserved = torch.cuda.memory_reserved() - reserved
    times = time_in_turns(
        {"plain": action(plain), "captured": action(captured)}, num_repeats, num_warmup
    )
    return {
        "N": inputs.case.num_experts,
        "T": inputs.case.num_tokens,
        "arm": letter,
        "text": ARMS[letter].text,
        "graph": new_graph.__name__,
        "captured_ms": times["captured"].median_ms,
        "plain_ms": times["plain"].median_ms,
        "reserved_by_capture_bytes": reserved,
    }
