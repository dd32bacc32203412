"""``vqmoe bench layer``: whole layers, forward and with their backward pass, against each other.

T tokens, H hidden size. One process and one rank, arms in turns, the same expert weights and tokens
in all of them, the equality gate first.

forward: evaluation mode, no autograd graph. forward_backward: training mode; a step of one
microbatch (of 8 for G8 and G2, times are per microbatch) with its VQ losses and statistics.
Gradients and statistics are dropped between steps, unmeasured: what a training loop does once per
step (reducing gradients, the optimizer, moving the codebook) belongs to no arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import FORWARD, choose_arms
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.gate import check_arms, check_routing, output_gradient
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.shared_inputs import CaseInputs, case_inputs
from vqmoe_megatron.bench.timing import Action, time_in_turns

GRADIENT_SEED = 99


def measure_layers(
    case: LayerCase,
    passes: Sequence[str],
    letters: Sequence[str],
    num_repeats: int,
    num_warmup: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Gate and time the arms of one case; one row per arm and pass.

    Args:
        case: sizes and routing.
        passes: forward, forward_backward.
        letters: of the arms; none: all.
        num_repeats: timed rounds.
        num_warmup: untimed rounds before them.
        progress: says one line per pass about the gate.

    Raises:
        GateFailed: when arms disagree; nothing was timed then.
        ValueError: for unknown arms, or settings that an arm cannot take.

    Needs the process groups of one rank. No communication.
    """
    inputs = case_inputs(case)
    check_routing(inputs)
    grad = output_gradient(inputs, GRADIENT_SEED)
    rows: list[dict[str, Any]] = []
    for pass_name in passes:
        specs = choose_arms(letters, pass_name, case.hidden_size)
        if not specs:
            progress.say(f"{pass_name}: none of these arms does it")
            continue
        arms = build_arms(specs, inputs)
        gate = check_arms(arms, inputs, grad, pass_name, progress)
        progress.say(f"{case.words} {pass_name}: {gate}")
        rows += time_arms(arms, inputs, grad, pass_name, num_repeats, num_warmup, progress)
    return rows


def time_arms(
    arms: Mapping[str, Arm],
    inputs: CaseInputs,
    grad: torch.Tensor,
    pass_name: str,
    num_repeats: int,
    num_warmup: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Time arms that passed the gate in turns; one row per arm. No communication.

    ``grad``: ``[T, 1, H]`` of the output; the other arguments as :func:`measure_layers`.
    """
    case = inputs.case
    leaf = inputs.x.clone().requires_grad_()
    actions = {name: _action(arm, inputs.x, leaf, grad, pass_name) for name, arm in arms.items()}
    what = f"{case.words} {pass_name}"
    found = time_in_turns(
        actions, num_repeats, num_warmup, lambda turn: progress.look(f"{what}, {turn}")
    )
    rows = []
    for letter, times in found.items():
        row = case.row(letter, arms[letter].spec.title, pass_name)
        row["num_microbatches"] = arms[letter].spec.num_microbatches
        rows.append(row | times.row_fields)
    return rows


def _action(
    arm: Arm, x: torch.Tensor, leaf: torch.Tensor, grad: torch.Tensor, pass_name: str
) -> Action:
    if pass_name == FORWARD:
        return Action(lambda: arm.forward(x))

    def forget() -> None:
        arm.forget()
        leaf.grad = None

    return Action(lambda: arm.step(leaf, grad), forget, arm.spec.num_microbatches)
