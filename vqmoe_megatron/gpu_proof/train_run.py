"""Part ``train``: a 64-expert recipe through ``vqmoe pretrain``: speed, shares, bitwise resume.

The recipe is ``recipes/scale/billion_64.yaml`` with fewer layers and on one rank, on the bytes of
Python's library. MFU is the plan's operations of forward and backward pass, without recompute, over
the card's peak by its data sheet; on a CPU there is none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vqmoe_megatron.bench.origin import PACKAGE
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.step_profile import profile_steps
from vqmoe_megatron.gpu_proof.vqmoe_command import prepare_corpus, run_vqmoe
from vqmoe_megatron.metrics.table import SINCE_START_METRICS
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.study.report.planned import machine_profile
from vqmoe_megatron.track.metrics_log import read_metrics

RECIPE = PACKAGE.parent / "recipes" / "scale" / "billion_64.yaml"
COMMON = [
    "parallel.expert_model_parallel_size=1",
    "model.vocab_size=256",
    "code_memory.layers=[1]",  # of two
    "train.eval_iters=0",
    "train.log_interval=1",
    "optimizer.lr_warmup_iters=2",
    "checkpoint.save_interval=0",
    "checkpoint.keep_last=1",
    "tracking.mlflow=false",
    "tracking.system_metrics=false",
]
FULL = ["model.num_layers=4", "train.global_batch_size=32"]
SHALLOW = ["model.num_layers=2", "train.global_batch_size=16"]  # its checkpoints are small
TINY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.num_query_groups=2", "model.moe_ffn_hidden_size=16", "model.seq_length=32",
    "vq.num_codes=64", "train.global_batch_size=4", "train.micro_batch_size=2",
]  # fmt: skip
NUM_STEPS, NUM_TINY_STEPS = 30, 6
NUM_RESUMED_STEPS, NUM_TINY_RESUMED_STEPS = 12, 4  # half of them before the stop
WARM_UP_SHARE = 1 / 3  # of the steps, left out of the median
BOTH_PATHS = ["vq.path=dual", "code_memory.num_rows=0"]
ARMS = {
    "VQMoE, code memory": [],
    "VQMoE, both paths": BOTH_PATHS,
    "SMoE top-1": ["code_memory.num_rows=0"],
    # Megatron's DDP is around it here, as it is nowhere else in the proof.
    "VQMoE, captured": [
        *BOTH_PATHS, "train.cuda_graphs=true", "optimizer.overlap_param_gather=false",
    ],
}  # fmt: skip
RESUMED = ["vq.path=dual"]  # with the memory: every kind of state
CAPTURE_IS_OFF = "train.cuda_graphs is off"
# A step's time and memory are not its result.
NOT_RESULTS = ("timestamp_ms", "tokens_per_second", "step_time_ms", "overhead_share")
NOT_RESULTS_OF = ("memory/", "system/")


def run(job: Job) -> None:
    """Train. The runs are processes of their own; the profile is taken in this one, at the end."""
    corpus = prepare_corpus(job)
    first, *others = ARMS
    steps: dict[str, Callable[[], None]] = {
        f"training {first}": lambda: _train_arm(job, corpus, first),
        "resume": lambda: _check_resume(job, corpus),
    }
    if not job.is_tiny:
        for arm in others:
            steps[f"training {arm}"] = partial(_train_arm, job, corpus, arm)
    steps["profile"] = lambda: _profile(job, corpus)
    for what, step in steps.items():
        if job.has_time(what):
            with attempt(job, what):
                step()


def _profile(job: Job, corpus: Path) -> None:
    job.say("profiling")
    shares = profile_steps(RECIPE, _overrides(job, corpus, "profile", SHALLOW, 8))
    job.findings.figures["profiled_device_ms_per_step"] = shares.device_ms_per_step
    for row in shares.kinds:
        job.row("Share of device time in a step, by kind of kernel", **row)
    for row in shares.kernels:
        job.row("Kernels of a step that take most", **row)
    job.check("the profiler saw the step", bool(shares.kinds))


def _overrides(
    job: Job, corpus: Path, name: str, size: list[str], num_steps: int, *more: str
) -> list[str]:
    return [
        *COMMON,
        *(TINY if job.is_tiny else size),
        f"data.path={corpus}",
        f"train.output_dir={job.work / name}",
        f"train.train_iters={num_steps}",
        *more,
    ]


def _train_arm(job: Job, corpus: Path, arm: str) -> None:
    num_steps = NUM_TINY_STEPS if job.is_tiny else NUM_STEPS
    name = f"speed_{list(ARMS).index(arm)}"
    overrides = _overrides(job, corpus, name, FULL, num_steps, *ARMS[arm])
    job.say(f"training {arm}, {num_steps} steps")
    run_vqmoe(job, "pretrain", str(RECIPE), *overrides)
    records = read_metrics(job.work / name / "metrics.jsonl")
    steps = [record for record in records if "step_time_ms" in record]
    late = steps[int(len(steps) * WARM_UP_SHARE) :]
    step_ms = statistics.median(record["step_time_ms"] for record in late)
    config = load_recipe(RECIPE, overrides)
    card = job.findings.facts["card"]
    plan = plan_run(config, 1, machine_profile(card and card["name"]))
    tokens_per_second = 1e3 * plan.tokens_per_step / step_ms
    achieved = plan.flops_per_token * tokens_per_second
    mfu = None
    if card is not None:
        mfu = achieved / plan.hardware.peak_flops_per_second(config.model.bf16)
    job.row(
        "Training",
        arm=arm,
        parameters=plan.parameters.total,
        steps=len(steps),
        step_ms=step_ms,
        tokens_per_second=tokens_per_second,
        tflops_per_second=achieved / 1e12,
        mfu=mfu,
        first_loss=steps[0]["loss"],
        last_loss=steps[-1]["loss"],
        predicted_step_ms=1e3 * plan.tokens_per_step / plan.step_time.tokens_per_second,
    )
    shown = "" if mfu is None else f", MFU {mfu:.1%}"
    job.say(f"{arm}: {tokens_per_second:,.0f} tokens/s, {step_ms:.1f} ms per step{shown}")
    job.check(f"{arm}: all steps were taken", len(steps) == num_steps)
    said = (job.work / "command.log").read_text("utf-8", "replace").splitlines()
    off = [line for line in said if CAPTURE_IS_OFF in line]
    job.check(f"{arm}: as asked", not off, off[0] if off else "")
    has_learnt = steps[-1]["loss"] < steps[0]["loss"]
    job.check(f"{arm}: the loss fell", has_learnt, f"{steps[0]['loss']} to {steps[-1]['loss']}")


def _check_resume(job: Job, corpus: Path) -> None:
    num_steps = NUM_TINY_RESUMED_STEPS if job.is_tiny else NUM_RESUMED_STEPS
    half = num_steps // 2
    for name, stops in (("straight", ((),)), ("resumed", ((f"train.exit_interval={half}",), ()))):
        for stop in stops:
            words = _overrides(
                job, corpus, name, SHALLOW, num_steps, *RESUMED, "train.deterministic=true", *stop
            )
            job.say(f"{name} run{' to the stop' if stop else ''}")
            run_vqmoe(job, "pretrain", str(RECIPE), *words)
    straight, resumed = (
        {record["iteration"]: _results(record) for record in read_metrics(path)}
        for path in (job.work / name / "metrics.jsonl" for name in ("straight", "resumed"))
    )
    behind = [iteration for iteration in straight if iteration > half]
    different = [
        f"iteration {iteration}: {name} {value} and {resumed.get(iteration, {}).get(name)}"
        for iteration in behind
        for name, value in straight[iteration].items()
        if resumed.get(iteration, {}).get(name) != value
    ]
    job.check(
        f"resume is bitwise: {len(behind)} steps behind the stop",
        len(behind) == num_steps - half and not different,
        different[0] if different else "every loss, norm and layer metric",
    )


def _results(record: dict[str, float]) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if name not in NOT_RESULTS
        and not name.startswith(NOT_RESULTS_OF)
        and not name.endswith(SINCE_START_METRICS)
    }
