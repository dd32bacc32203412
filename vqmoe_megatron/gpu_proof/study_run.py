"""Part ``study``: the loss of SMoE top-1, SMoE top-2 and the default VQMoE at equal tokens, N = 64.

1. A calibration trains every arm for a few steps, as many at a time as the study will.
2. The study is as long as fits what is left: every arm under the same seeds, ``vqmoe study run``.
3. Differences are paired by seed and the page is made as ``vqmoe study report`` does both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_megatron.bench.origin import PACKAGE
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.vqmoe_command import CommandFailed, prepare_corpus, run_vqmoe
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.study.baselines import Arms
from vqmoe_megatron.study.report.paired import compare_arms
from vqmoe_megatron.study.report.run_table import ReportedStudy
from vqmoe_megatron.study.report.series import FINAL_LOSS, has_loss

RECIPE = PACKAGE.parent / "recipes" / "scale" / "tiny_64.yaml"
ARMS = {
    "smoe_top1": "[code_memory.num_rows=0]",
    "smoe_top2": "[code_memory.num_rows=0, model.moe_router_topk=2]",
    "vqmoe": "[]",
}
OURS = "vqmoe"
COMMON = [
    "parallel.expert_model_parallel_size=1",
    "model.vocab_size=256",
    "checkpoint.save_interval=0",
    "checkpoint.keep_last=1",
    "tracking.mlflow=false",
    "tracking.system_metrics=false",
]
FULL = [  # on tiny_64: four times as wide, and a batch four times as large
    "model.hidden_size=256", "model.num_attention_heads=8", "model.moe_ffn_hidden_size=256",
    "model.bf16=true", "model.init_method_std=0.02", "optimizer.lr=2e-3", "optimizer.min_lr=2e-4",
    "train.global_batch_size=64", "train.micro_batch_size=64", "train.eval_iters=24",
    "train.log_interval=10",
]  # fmt: skip
TINY = [
    "model.num_layers=1", "code_memory.layers=[1]", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.moe_ffn_hidden_size=16", "model.seq_length=32",
    "train.global_batch_size=4", "train.micro_batch_size=4", "train.eval_iters=1",
    "train.log_interval=1",
]  # fmt: skip
SEEDS, TINY_SEEDS = (1, 2, 3), (1, 2)
NUM_JOBS, NUM_TINY_JOBS = 3, 2  # small models leave a GPU idle most of the time
NUM_CALIBRATION_STEPS = 60
LEAST_STEPS, MOST_STEPS, NUM_TINY_STEPS = 100, 4000, 6
USED_SHARE = 0.85  # of the time that is left: a run may be slower than the calibration was
REPORT_SECONDS = 20.0


@dataclass(frozen=True)
class Pace:
    """What the calibration saw: of the slowest arm, while all of them ran."""

    start_seconds: float  # of a run, without its steps
    step_seconds: float


def run(job: Job) -> None:
    """Calibrate, run the study, report it."""
    corpus = prepare_corpus(job)
    seeds = TINY_SEEDS if job.is_tiny else SEEDS
    num_steps: int | None = NUM_TINY_STEPS
    if not job.is_tiny:
        num_steps = _affordable_steps(job, corpus, len(seeds))
    if num_steps is None:
        return
    path = _write_study(job, corpus, "study", num_steps, seeds)
    job.say(f"{len(ARMS) * len(seeds)} runs of {num_steps} steps")
    try:
        words = ["study", "run", str(path), "--jobs", str(_num_jobs(job))]
        run_vqmoe(job, *words, kept_seconds=REPORT_SECONDS)
    except CommandFailed as error:
        job.check("the study came to its end", False, str(error))
    report = _report(path, job.out / "study_report", say=job.say)
    job.findings.figures |= {"steps_per_run": num_steps, "page": "study_report/index.html"}
    _tell(job, report.study, len(seeds))


def _num_jobs(job: Job) -> int:
    return NUM_TINY_JOBS if job.is_tiny else NUM_JOBS


def _write_study(job: Job, corpus: Path, name: str, num_steps: int, seeds: Sequence[int]) -> Path:
    settings = [
        *COMMON,
        *(TINY if job.is_tiny else FULL),
        f"data.path={corpus}",
        f"train.train_iters={num_steps}",
        f"train.eval_interval={max(1, num_steps // 8)}",
        f"optimizer.lr_warmup_iters={max(1, num_steps // 20)}",
    ]
    lines = [
        "study:",
        f"  name: {name}",
        f"  output_dir: {job.work / name}",
        f"  recipe: {RECIPE}",
        "  rule: equal_tokens",
        "  num_ranks: 1",
        "set:",
        *(f"  - {text}" for text in settings),
        "grid:",
        "  router:",
        *(f"    {arm}: {overrides}" for arm, overrides in ARMS.items()),
        f"  seed: {list(seeds)}",
    ]
    path = job.work / f"{name}.yaml"
    replace_file(path, "\n".join(lines) + "\n")
    return path


def _affordable_steps(job: Job, corpus: Path, num_seeds: int) -> int | None:
    """Steps per run that fit what is left; None, and left out, when too few would."""
    path = _write_study(job, corpus, "calibration", NUM_CALIBRATION_STEPS, SEEDS[:1])
    job.say(f"calibrating, {NUM_CALIBRATION_STEPS} steps of every arm")
    started = time.monotonic()
    run_vqmoe(job, "study", "run", str(path), "--jobs", str(NUM_JOBS))
    seconds = time.monotonic() - started
    rows = _report(path, say=job.say).study.rows
    pace = pace_of([row.records for row in rows], seconds)
    num_rounds = math.ceil(num_seeds * len(ARMS) / NUM_JOBS)
    num_steps = steps_within(job.seconds_left - REPORT_SECONDS, pace, num_rounds)
    job.findings.figures |= {
        "calibrated_step_ms": 1e3 * pace.step_seconds,
        "calibrated_start_seconds": pace.start_seconds,
    }
    if num_steps < LEAST_STEPS:
        job.leave_out("the study", f"{num_steps} steps would fit, {LEAST_STEPS} are the least")
        return None
    return num_steps


def pace_of(records: Sequence[Sequence[Mapping[str, float]]], seconds: float) -> Pace:
    """Return the pace of runs that took ``seconds`` together, side by side.

    Args:
        records: of ``metrics.jsonl``, for every run.
        seconds: from the first one's start to the last one's end.
    """
    step_ms, num_steps = 0.0, 0
    for of_run in records:
        times = [record["step_time_ms"] for record in of_run if "step_time_ms" in record]
        step_ms = max(step_ms, statistics.median(times))
        num_steps = max(num_steps, int(of_run[-1]["iteration"]))
    step_seconds = step_ms / 1e3
    return Pace(max(0.0, seconds - num_steps * step_seconds), step_seconds)


def steps_within(seconds: float, pace: Pace, num_rounds: int) -> int:
    """Return the steps of every run when ``num_rounds`` of them follow each other."""
    of_round = seconds * USED_SHARE / num_rounds - pace.start_seconds
    return max(0, min(MOST_STEPS, int(of_round / pace.step_seconds)))


def _tell(job: Job, study: ReportedStudy, num_seeds: int) -> None:
    for row in study.rows:
        job.row(
            "Runs",
            run=row.name,
            state=row.state,
            validation_loss=row.final_val_loss,
            bits_per_byte=row.final_bits_per_byte,
            tokens=row.num_tokens,
            tokens_per_second=row.tokens_per_second,
            parameters=row.planned.num_parameters_total,
            active=row.planned.num_parameters_active,
            flops_per_token=row.planned.flops_per_token,
        )
    num_finished = sum(has_loss(row) for row in study.finished)
    wanted = len(ARMS) * num_seeds
    job.check("every run ended with a finite loss", num_finished == wanted, f"{num_finished}")
    others = tuple(arm for arm in ARMS if arm != OURS)
    for comparison in compare_arms(study, Arms("router", tuple(ARMS), others)):
        found, other = comparison.mean(FINAL_LOSS), comparison.baseline
        if comparison.arm == OURS and found is not None:
            job.row(
                "Validation loss of VQMoE minus that of the other, paired by seed",
                other=other,
                mean=found.mean,
                low=None if found.half_width is None else found.low,
                high=None if found.half_width is None else found.high,
                pairs=found.num_seeds,
            )
            width = "" if found.half_width is None else f" +- {found.half_width:.4f}"
            job.say(f"VQMoE minus {other}: {found.mean:+.4f}{width} nats, {found.num_seeds} pairs")


def _report(*args: Any, **kwargs: Any) -> Any:
    """:func:`write_report`, which needs the optional matplotlib."""
    from vqmoe_megatron.study.report.write import write_report

    return write_report(*args, **kwargs)
