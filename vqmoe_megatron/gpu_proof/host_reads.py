"""Does a step of the layer wait for the device, or move data between host and device?

Two witnesses, on the step after several of the same:

    operations    those that read a tensor's value or size its result by one, and copies between
                  host and device, counted as they are dispatched
    torch         ``torch.cuda.set_sync_debug_mode("error")`` raises at what synchronises, on CUDA

At EP = ETP = 1 a step has none of either.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.shared_inputs import CaseInputs, case_inputs
from vqmoe_megatron.gpu_proof.attempt import attempt, in_words
from vqmoe_megatron.gpu_proof.part import Job

LETTERS = ("D0", "C", "E", "F", "F2", "G1", "D", "E2", "F3")  # of bench/arm_table.py
NUM_WARMUP = 4  # autotuners time their configurations, and follow() compares weights at first
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount")
MASKED = ("index", "index_put", "index_put_")


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:  # noqa: ANN001
        result = function(*args, **(kwargs or {}))
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in READS or (name in MASKED and _has_mask(args[1])):
            self.counts[name] += 1
        elif name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != result.device.type:
                self.counts[f"{source.device.type} to {result.device.type}"] += 1
        return result


def _has_mask(indices: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(i, torch.Tensor) and i.dtype in masks for i in indices)


def check_host_reads(job: Job) -> None:
    """Step every execution; what waits is a failed check on CUDA, a row on the CPU."""
    job.say("host reads of a step")
    is_tiny = job.is_tiny
    case = LayerCase(
        num_experts=8,
        num_codes=24,
        num_tokens=48 if is_tiny else 2048,
        hidden_size=32 if is_tiny else 512,
        ffn_hidden_size=48 if is_tiny else 512,
        dtype="bfloat16",
        norm="separate",
    )
    inputs = case_inputs(case)
    for letter in LETTERS:
        what = f"{letter}, {ARMS[letter].text}"
        if job.has_time(f"host reads of {what}"):
            with attempt(job, f"a step of {what}"):
                _check_arm(job, letter, what, inputs)


def _check_arm(job: Job, letter: str, what: str, inputs: CaseInputs) -> None:
    (arm,) = build_arms({letter: ARMS[letter]}, inputs).values()
    arm.enter(FORWARD_BACKWARD)
    leaf = inputs.x.clone().requires_grad_()
    grad = torch.ones_like(leaf)
    for _ in range(NUM_WARMUP):
        _step(arm, leaf, grad)
    with HostReads() as reads:
        _step(arm, leaf, grad)
    found = ", ".join(f"{name} {count}" for name, count in reads.counts.items())
    job.row("Host reads of a step", arm=what, operations=found or "none")
    if job.device == "cuda":
        job.check(f"no host read in a step: {what}", not reads.counts, found)
        said = _synchronisation(arm, leaf, grad)
        job.check(f"no synchronisation in a step: {what}", not said, said)


def _step(arm: Arm, leaf: torch.Tensor, grad: torch.Tensor) -> None:
    arm.forget()
    leaf.grad = None
    arm.step(leaf, grad)


def _synchronisation(arm: Arm, leaf: torch.Tensor, grad: torch.Tensor) -> str:
    """Where a step synchronises, by torch; empty: nowhere that it sees."""
    arm.forget()
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arm.step(leaf, grad)
    except RuntimeError as error:
        return in_words(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        arm.forget()
    return ""
