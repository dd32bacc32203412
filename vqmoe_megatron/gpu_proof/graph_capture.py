"""A step of a layer as one CUDA graph: captured forward and backward, replayed, compared, timed.

A discrete path in code space has static shapes and reads nothing on the host, so its step should be
capturable whole. Whether it is, is a row, not a check: an arm that is not captured says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.gate import relative_difference
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.bench.timing import Action, time_in_turns
from vqmoe_megatron.gpu_proof.attempt import in_words

LETTERS = ("E", "F", "F2", "G1")  # of bench/arm_table.py: the discrete path alone, in code space
NUM_EAGER_STEPS = 3  # on the side stream before the capture, as torch's documentation asks


def has_graphs() -> bool:
    """Whether this device has CUDA graphs."""
    return torch.cuda.is_available()


def capture_rows(
    inputs: CaseInputs, grad: torch.Tensor, num_repeats: int, num_warmup: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per arm: captured or why not, how far a replay is from a step, both times.

    Args:
        inputs: of the arms.
        grad: ``[T, 1, H]`` of the output.
        num_repeats: timed rounds.
        num_warmup: untimed rounds before them.

    No communication. An arm whose capture fails leaves the device usable, or the next one says so.
    """
    for letter in LETTERS:
        case = inputs.case
        row = {"N": case.num_experts, "T": case.num_tokens, "arm": letter}
        row |= {"text": ARMS[letter].text, "outcome": "not captured: no CUDA device"}
        if has_graphs():
            try:
                row |= _captured(letter, inputs, grad, num_repeats, num_warmup)
            except Exception as error:
                row["outcome"] = f"not captured: {in_words(error)}"
        yield row


def _captured(
    letter: str, inputs: CaseInputs, grad: torch.Tensor, num_repeats: int, num_warmup: int
) -> dict[str, Any]:
    (arm,) = build_arms({letter: ARMS[letter]}, inputs).values()
    arm.enter(FORWARD_BACKWARD)
    leaf = inputs.x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(NUM_EAGER_STEPS):
            _forget(arm, leaf)
            arm.step(leaf, grad)
    torch.cuda.current_stream().wait_stream(side)
    _forget(arm, leaf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # gradients that are None before it live in the graph's memory
        output = arm.step(leaf, grad)
    static = {"output": output, "x": leaf.grad}
    static |= {name: part.grad for name, (part, *_) in arm.parameters.items()}
    graph.replay()
    torch.cuda.synchronize()
    replayed = {name: value.clone() for name, value in static.items() if value is not None}
    eager = build_arms({letter: ARMS[letter]}, inputs)[letter]
    eager.enter(FORWARD_BACKWARD)
    expected = eager.result(inputs.x, grad, FORWARD_BACKWARD)
    wanted = {**expected.gradients, "output": expected.output}
    worst = max(relative_difference(value, wanted[name]) for name, value in replayed.items())
    other = inputs.x.clone().requires_grad_()
    times = time_in_turns(
        {
            "replayed": Action(graph.replay),
            "eager": Action(lambda: eager.step(other, grad), lambda: _forget(eager, other)),
        },
        num_repeats,
        num_warmup,
    )
    return {
        "outcome": "captured",
        "replayed_ms": times["replayed"].median_ms,
        "eager_ms": times["eager"].median_ms,
        "difference_from_eager": worst,
        "num_compared": len(replayed),
    }


def _forget(arm: Arm, leaf: torch.Tensor) -> None:
    arm.forget()
    leaf.grad = None
