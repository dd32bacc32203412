"""The table on a second stream (``vq.overlap_table``): equal to the table in turn, and its time.

T tokens, H hidden size. What the table may hide behind is attention over sequences of
``SEQUENCE`` tokens, forward and backward, with heads of width ``HEAD``; the layer follows it, as
in a transformer layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vqmoe_megatron.bench.arm_table import ARMS, ArmSpec
from vqmoe_megatron.bench.arms import Arm
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.bench.timing import Action, time_in_turns
from vqmoe_megatron.gpu_proof.arm_pairs import check_pair, training_arm
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.part import Job

LETTERS = ("E", "F", "F2", "E2", "F3")  # of bench/arm_table.py
SEQUENCE, HEAD = 2048, 128


def ahead(letter: str) -> ArmSpec:
    """The arm with its table started before attention."""
    return replace(ARMS[letter], vq={**ARMS[letter].vq, "overlap_table": True})


def check_overlap(job: Job, inputs: CaseInputs) -> None:
    """Hold every layer with its table ahead against the layer. No communication."""
    job.say("tables on a second stream against tables in turn")
    for letter in LETTERS:
        what = f"table ahead, {letter}, {ARMS[letter].text}"
        if job.has_time(what):
            with attempt(job, what):
                arm = training_arm(ahead(letter), inputs)
                check_pair(job, what, arm, training_arm(ARMS[letter], inputs), inputs)


def time_overlap(
    job: Job, inputs: CaseInputs, grad: torch.Tensor, num_repeats: int, num_warmup: int
) -> None:
    """Time attention, and attention with a layer behind it, both ways; one row per arm.

    ``grad``: ``[T, 1, H]`` of the layer's output. No communication.
    """
    for letter in ("E", "E2"):
        what = f"table during attention, {letter}"
        if job.has_time(what):
            with attempt(job, what):
                arms = {
                    "table in turn": training_arm(ARMS[letter], inputs),
                    "table ahead": training_arm(ahead(letter), inputs),
                }
                actions = {"attention alone": _layer(None, inputs, grad)}
                actions |= {name: _layer(arm, inputs, grad) for name, arm in arms.items()}
                times = time_in_turns(actions, num_repeats, num_warmup)
                alone = times["attention alone"].median_ms
                job.row(
                    "Attention and a layer behind it, forward and backward",
                    N=inputs.case.num_experts,
                    T=inputs.case.num_tokens,
                    arm=letter,
                    text=ARMS[letter].text,
                    attention_ms=alone,
                    layer_in_turn_ms=times["table in turn"].median_ms - alone,
                    layer_with_table_ahead_ms=times["table ahead"].median_ms - alone,
                )


def _layer(arm: Arm | None, inputs: CaseInputs, grad: torch.Tensor) -> Action:
    """Attention of the tokens, then the arm; both differentiated."""
    num_tokens, _, hidden = inputs.x.shape
    sequence, head = min(SEQUENCE, num_tokens), min(HEAD, hidden)
    leaf = inputs.x.clone().requires_grad_()

    def run() -> None:
        if arm is not None:
            arm.module.start_ahead()
        # [T, 1, H] -> [sequences, heads, tokens, width]
        heads = leaf.view(num_tokens // sequence, sequence, hidden // head, head).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            heads, heads, heads, is_causal=True
        )
        y = leaf + mixed.transpose(1, 2).reshape(num_tokens, 1, hidden)
        if arm is not None:
            y = arm.module(y)[0]
        y.backward(grad)

    def forget() -> None:
        leaf.grad = None
        if arm is not None:
            arm.forget()

    return Action(run, forget)
