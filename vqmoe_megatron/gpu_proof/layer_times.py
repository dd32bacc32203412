"""Part ``layer``: the arms of the fair benchmark at the sizes of a large model, and CUDA graphs.

T tokens, H hidden size, F expert hidden size, N experts, K codes.

Every arm is tried alone first: one that cannot run here is a failed check, and the others go on.
The equality gate then takes all that can; where it finds arms that disagree, each is held against
the oracle alone, and those that pass are timed. K is the largest multiple of N with N + K + 2 <= H,
as in recipes/scale.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD, choose_arms
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.bench_world import one_rank_world
from vqmoe_megatron.bench.cases import PASSES, GateFailed, LayerCase
from vqmoe_megatron.bench.gate import check_arms, check_routing, output_gradient
from vqmoe_megatron.bench.layer_bench import GRADIENT_SEED, time_arms
from vqmoe_megatron.bench.memory_bench import count_saved_bytes, peak_bytes
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.shared_inputs import CaseInputs, case_inputs
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.graph_capture import time_captured
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.table_overlap import time_overlap

REFERENCE = "A"  # Megatron's MoELayer, top-1
LETTERS = ("A", "A1", "A2", "D0", "C", "D", "E", "F", "F2", "G1", "G8", "E2", "F3", "G2", "P8")
TINY_LETTERS = ("A", "D0", "E", "F")
HIDDEN, FFN = 2048, 1408
# N, T, seed: one with which the second expert of the gate's tokens is clear in bf16, for top-2.
CASES = ((64, 8192, 1234), (128, 8192, 1240), (64, 32768, 1234), (128, 32768, 1234))
SECONDS_PER_CASE = 25.0  # with less left a case is not begun


def run(job: Job) -> None:
    """Measure every case; then, since a capture that fails may leave the device in disorder,
    capture at the first one's sizes. No communication."""
    measured: list[CaseInputs] = []  # the first case's: 128 experts need not stay in memory
    with one_rank_world():
        for case in _cases(job.is_tiny):
            if not job.has_time(case.words, 0.0 if job.is_tiny else SECONDS_PER_CASE):
                continue
            with attempt(job, case.words):
                inputs = _measure(job, case, TINY_LETTERS if job.is_tiny else LETTERS)
                measured = measured or [inputs]
            torch.cuda.empty_cache()
        if measured and job.has_time("tables during attention, and CUDA graphs"):
            grad = output_gradient(measured[0], GRADIENT_SEED)
            time_overlap(job, measured[0], grad, *_repeats(job))
            time_captured(job, measured[0], grad, *_repeats(job))


def _cases(is_tiny: bool) -> list[LayerCase]:
    if is_tiny:
        return [LayerCase(4, 10, 24, 32, 48, norm="separate")]
    return [
        LayerCase(
            num_experts=num_experts,
            num_codes=(HIDDEN - num_experts - 2) // num_experts * num_experts,
            num_tokens=num_tokens,
            hidden_size=HIDDEN,
            ffn_hidden_size=FFN,
            norm="separate",
            dtype="bfloat16",
            seed=seed,
        )
        for num_experts, num_tokens, seed in CASES
    ]


def _repeats(job: Job) -> tuple[int, int]:
    """Timed rounds, and untimed ones before them."""
    return (3, 0) if job.is_tiny else (20, 3)


def _measure(job: Job, case: LayerCase, letters: tuple[str, ...]) -> CaseInputs:
    job.say(f"{case.words}: drawing weights and tokens")
    inputs = case_inputs(case)
    check_routing(inputs)
    grad = output_gradient(inputs, GRADIENT_SEED)
    able = [letter for letter in letters if _can_run(job, letter, inputs, grad)]
    for pass_name in PASSES:
        specs = choose_arms(able, pass_name, case.hidden_size) if able else {}
        arms = _gated(job, build_arms(specs, inputs), inputs, grad, pass_name)
        if not arms or not job.has_time(f"{case.words} {pass_name}: times"):
            continue
        rows = time_arms(arms, inputs, grad, pass_name, *_repeats(job), Progress())
        reference = {row["arm"]: row["median_ms"] for row in rows}.get(REFERENCE)
        for row in rows:
            arm = arms[row["arm"]]
            memory = {}
            if pass_name == FORWARD_BACKWARD:
                memory["saved_bytes"] = count_saved_bytes(arm, inputs.x)
                memory["peak_bytes"] = peak_bytes(arm, inputs.x, grad)
            job.row(
                f"Layer, {pass_name.replace('_', ' and ')}",
                N=case.num_experts,
                K=case.num_codes,
                T=case.num_tokens,
                arm=row["arm"],
                text=row["text"],
                **{name: row[name] for name in ("median_ms", "p10_ms", "p90_ms")},
                over_megatron=reference and row["median_ms"] / reference,
                **memory,
            )
        job.say(
            f"{case.words} {pass_name}: "
            + ", ".join(f"{row['arm']} {row['median_ms']:.2f} ms" for row in rows)
        )
    return inputs


def _can_run(job: Job, letter: str, inputs: CaseInputs, grad: torch.Tensor) -> bool:
    """Take a step alone; an error is a failed check."""
    spec = ARMS[letter]
    with attempt(job, f"{inputs.case.words}, arm {letter}, {spec.text}: runs"):
        (arm,) = build_arms({letter: spec}, inputs).values()
        arm.enter(FORWARD_BACKWARD)
        arm.result(inputs.x, grad, FORWARD_BACKWARD)
        return True
    return False


def _gated(
    job: Job, arms: dict[str, Arm], inputs: CaseInputs, grad: torch.Tensor, pass_name: str
) -> dict[str, Arm]:
    """Return the arms that compute what they should; the rest are failed checks."""
    if not arms:
        return {}
    what = f"{inputs.case.words} {pass_name}"
    try:
        text = check_arms(arms, inputs, grad, pass_name, Progress())
    except GateFailed as error:
        job.check(f"{what}: arms agree", False, str(error))
    else:
        job.check(f"{what}: arms agree", True, text)
        return arms
    passing = {}
    for letter, arm in arms.items():
        try:
            check_arms({letter: arm}, inputs, grad, pass_name, Progress())
        except GateFailed as error:
            job.check(f"{what}: arm {letter} is the oracle's", False, str(error))
        else:
            passing[letter] = arm
    return passing
