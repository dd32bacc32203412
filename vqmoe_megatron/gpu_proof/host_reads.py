"""Does a step of the layer wait for the device, or move data between host and device?

Two witnesses, on the step after several of the same:

    operations    what ``runtime/device_purity.py`` sees, but for what
                  ``runtime/host_synchronisations.py`` names
    torch         ``torch.cuda.set_sync_debug_mode("error")`` raises at what synchronises, on CUDA

At EP = ETP = 1 a step has none of either.
"""

from __future__ import annotations

from collections import Counter

import torch

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.gpu_proof.attempt import attempt, in_words
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.runtime.device_purity import DevicePurity
from vqmoe_megatron.runtime.host_synchronisations import OF_EVERY_STEP

LETTERS = ("D0", "C", "E", "F", "F2", "G1", "D", "E2", "F3")  # of bench/arm_table.py
NUM_WARMUP = 4  # autotuners time their configurations, and follow() compares weights at first
ON_ONE_DEVICE = ("copy to the host", "copy to the device")  # on the CPU: any copy


def check_host_reads(job: Job, inputs: CaseInputs) -> None:
    """Step every execution; what waits is a failed check on CUDA, a row on the CPU."""
    job.say("host reads of a step")
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
    with DevicePurity(job.device) as purity:
        _step(arm, leaf, grad)
    if job.device == "cpu":
        purity.seen = [one for one in purity.seen if one.operator not in ON_ONE_DEVICE]
    counts = Counter(f"{one.operator} at {one.place}" for one in purity.seen)
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    job.row("Host reads of a step", arm=what, operations=found or "none")
    if job.device == "cuda":
        unexpected = purity.unexpected(OF_EVERY_STEP)
        job.check(f"no host read in a step: {what}", not unexpected, found)
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
