"""The captured discrete path (``train.cuda_graphs``): equal to the one without graphs, its time.

On CUDA with CUDA's graphs, on the CPU with their recorder. A capture that fails is a failed check.
"""

from __future__ import annotations

from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import ARMS
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.bench.timing import time_in_turns
from vqmoe_megatron.gpu_proof.arm_pairs import check_pair, step_of, training_arm
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.runtime.graphs import CudaGraph, Graph
from vqmoe_megatron.runtime.recorded_graph import RecordedGraph

LETTERS = ("E", "F", "F2", "E2", "F3")  # of bench/arm_table.py: code space, alone and beside top-1


class NotCaptured(Exception):
    """A path that should have been captured ran as it is."""


def graph_type(device: str) -> type[Graph]:
    """What captures on a device."""
    return CudaGraph if device == "cuda" else RecordedGraph


def check_captured(job: Job, inputs: CaseInputs) -> None:
    """Hold every captured layer against the layer, over microbatches whose gradients add up."""
    job.say("captured layers against layers without graphs")
    for letter in LETTERS:
        what = f"captured {letter}, {ARMS[letter].text}"
        if job.has_time(what):
            with attempt(job, what):
                arm = training_arm(ARMS[letter], inputs, graph_type(job.device))
                check_pair(job, what, arm, training_arm(ARMS[letter], inputs), inputs)
                if not all(path.is_captured for path in arm.module.discrete_paths):
                    raise NotCaptured(f"arm {letter} ran without a graph")


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
        what = f"CUDA graph of {letter}, {ARMS[letter].text}"
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
    plain = training_arm(ARMS[letter], inputs)
    captured = training_arm(ARMS[letter], inputs, new_graph)
    leaf = inputs.x.clone().requires_grad_()
    captured.step(leaf, grad)
    reserved = torch.cuda.memory_reserved() if new_graph is CudaGraph else None
    captured.step(leaf, grad)
    if reserved is not None:
        reserved = torch.cuda.memory_reserved() - reserved
    times = time_in_turns(
        {"plain": step_of(plain, leaf, grad), "captured": step_of(captured, leaf, grad)},
        num_repeats,
        num_warmup,
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
