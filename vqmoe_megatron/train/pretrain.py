"""Pretraining on one rank, from joining the world to the exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import traceback
from typing import NoReturn

import torch

from vqmoe_megatron.checkpoint.folder import iteration_of
from vqmoe_megatron.checkpoint.saver import SaveFailed
from vqmoe_megatron.plan.memory_shape import MemoryShape
from vqmoe_megatron.plan.parameter_count import count_parameters, count_trained
from vqmoe_megatron.rundir.status import read_status, write_status
from vqmoe_megatron.runtime.fused_parts import choose_parts
from vqmoe_megatron.runtime.rendezvous import RendezvousFailed, StoppedWhileWaiting
from vqmoe_megatron.runtime.world import (
    RankVariables,
    build_process_groups,
    choose_device,
    join_world,
    leave_world,
)
from vqmoe_megatron.train.preflight import CheckedRun
from vqmoe_megatron.train.replica_check import ReplicaMismatch
from vqmoe_megatron.train.run_report import Rank0Report, RunReport, SilentReport
from vqmoe_megatron.train.stop_requests import NO_REQUEST, REASONS, StopRequests
from vqmoe_megatron.train.trainer import Trainer

# Their messages are for people; a traceback would only hide them.
SELF_EXPLAINING = (RendezvousFailed, ReplicaMismatch, SaveFailed, FloatingPointError)
EXIT_DONE, EXIT_CRASH, EXIT_USAGE, EXIT_REQUEUE = 0, 1, 2, 75


def pretrain(
    run: CheckedRun, variables: RankVariables, device: str, stop_requests: StopRequests
) -> int:
    """Train this rank's part of ``run``.

    Returns:
        The exit code: 0 done, 75 saved and wants to be started again.

    A failure does not return: it is reported, recorded in ``status.json`` and ends the process with
    code 1 (2 for a refused configuration), because leaving the process groups could hang.
    """
    report: RunReport = SilentReport()
    try:
        if variables.rank == 0:
            _mark_started(run)
        join_world(variables, device, lambda: stop_requests.current() != NO_REQUEST)
        run = _with_the_first_ranks_checkpoint(run)
        build_process_groups(run.layout)
        trainer = Trainer(run, stop_requests)
        resumed = trainer.resume()
        report = _open_report(run, trainer)
        for text in resumed:
            report.message(text)
        train = run.config.train
        stop_requests.watch(run.run_dir.path, train.exit_duration_in_mins, variables.rank == 0)
        outcome = trainer.train(report)
        stop_requests.acknowledge()
        report.finish(outcome.state, outcome.iteration, outcome.reason)
        stop_requests.close()
    except StoppedWhileWaiting as stopped:
        why = REASONS.get(stop_requests.current(), str(stopped))
        _stopped_before_training(run, variables, why)
    except BaseException as error:  # SystemExit and torch's CheckpointException are no Exceptions
        _fail(run, variables, report, error)
    code = EXIT_DONE if outcome.state == "completed" else EXIT_REQUEUE
    try:
        leave_world()
    except Exception as error:  # all is saved and said; another rank may have left in a hurry
        print(f"rank {variables.rank}: left in disorder: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)
    return code


def _mark_started(run: CheckedRun) -> None:
    """Replace the status of an earlier attempt, so that what it says is about this one.

    That of a completed run stays until nothing can refuse this attempt any more.
    """
    known = read_status(run.run_dir.path)
    if known is not None and known.state == "completed":
        return
    iteration, run_id = (known.iteration, known.mlflow_run_id) if known else (0, None)
    write_status(run.run_dir.path, "running", iteration, "starting", run_id)


def _with_the_first_ranks_checkpoint(run: CheckedRun) -> CheckedRun:
    """Only the first rank looked, under the lock; communicates one broadcast over the world."""
    found = [run.resume_from, run.remap_from, run.is_own]
    torch.distributed.broadcast_object_list(found, src=0)
    resume_from, remap_from, is_own = found
    return dataclasses.replace(run, resume_from=resume_from, remap_from=remap_from, is_own=is_own)


def _stopped_before_training(run: CheckedRun, variables: RankVariables, reason: str) -> NoReturn:
    """Ask to be started again, from where this attempt would have started; end the process.

    At once: a thread may still be connecting, and the interpreter's orderly end would abort in it.
    """
    print(f"rank {variables.rank}: {reason}, before training", flush=True)
    if variables.rank == 0:
        known, folder = read_status(run.run_dir.path), run.resume_from
        iteration = iteration_of(folder) if folder else 0
        run_id = known.mlflow_run_id if known else None
        write_status(run.run_dir.path, "requeue", iteration, reason, run_id)
    sys.stdout.flush()
    os._exit(EXIT_REQUEUE)


def _open_report(run: CheckedRun, trainer: Trainer) -> RunReport:
    """Rank 0 opens the run; the others learn its MLflow run id, which checkpoints keep."""
    report: RunReport = SilentReport()
    if torch.distributed.get_rank() == 0:
        progress = trainer.progress
        known_id = progress.mlflow_run_id
        report = Rank0Report(run, progress.iteration, known_id)
        if known_id is not None and not run.is_own:
            report.message(f"a run of its own, started from {run.resume_from}")
        planned = count_parameters(run.config, run.layout)
        report.message(
            f"{trainer.num_parameters:,} parameters on rank 0; by the plan {planned.total:,} in "
            f"all, {planned.active:,} used by one token"
        )
        if run.config.finetune.is_on:
            report.message(f"of these {count_trained(run.config):,} train")
        if run.config.vision.is_on:
            report.message(run.config.vision.in_words)
        report.message(f"experts: {run.config.experts_in_words}")
        report.message(run.config.vq.execution_in_words)
        if run.config.code_memory.is_on:
            report.message(run.config.code_memory.in_words)
            form = MemoryShape.from_config(run.config, run.layout).form_in_words
            report.message(f"rows of the code memory: {form}")
        device, _ = choose_device(run.config.train.device)
        for text in choose_parts(run.config, device).fallbacks:
            report.message(text)
    shared = [report.mlflow_run_id]
    torch.distributed.broadcast_object_list(shared, src=0)
    report.mlflow_run_id = shared[0]
    return report


def _fail(
    run: CheckedRun, variables: RankVariables, report: RunReport, error: BaseException
) -> NoReturn:
    """Report the failure of this rank and end the process at once."""
    is_refusal = isinstance(error, ValueError)
    try:  # the disk may be full, and that may be why we are here
        if is_refusal or isinstance(error, SELF_EXPLAINING):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        # A rank that never met the first may stand in a directory that is another run's.
        if variables.rank == 0 or torch.distributed.is_initialized():
            run.run_dir.record_end(variables.rank, error)
        if not isinstance(report, SilentReport):
            known = read_status(run.run_dir.path)
            report.finish("failed", known.iteration, known.reason)
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception as second:
        with contextlib.suppress(OSError):
            print(f"the failure could not be recorded: {second}", file=sys.stderr)
    finally:
        os._exit(EXIT_USAGE if is_refusal else EXIT_CRASH)
