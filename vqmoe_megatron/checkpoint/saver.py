"""Saving: complete or absent, at once or in the background, never more than the disk holds.

1. All ranks agree on the size; the first rank makes room, checks the disk and creates
   ``iter_0000100.<attempt>.incomplete``.
2. Every rank writes its tensors and sums its files, itself or in a fork. In the background the fork
   sees the memory of this moment, whatever training does to it afterwards.
3. When the writers of all ranks are done ``checksums.json`` is written and the folder is renamed to
   ``iter_0000100``, then named by ``latest_checkpointed_iteration.txt``, and the oldest checkpoints
   go.

A kill at any moment leaves the previous checkpoint in place; what it leaves besides is removed by
the next save.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import shutil
import time
import uuid
from collections import ChainMap
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from vqmoe_megatron.checkpoint.checksums import Checksum, foreign_files, write_checksums
from vqmoe_megatron.checkpoint.content import COMMON_FILE
from vqmoe_megatron.checkpoint.folder import (
    CORPUS_COPY,
    LAYOUT_FILE,
    NEXT_TRACKER_FILE,
    complete_checkpoints,
)
from vqmoe_megatron.checkpoint.room import missing_room
from vqmoe_megatron.checkpoint.state import Progress, TrainingState, sharded_state
from vqmoe_megatron.checkpoint.writer import write_buckets
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import save_recipe
from vqmoe_megatron.engines.megatron.stale_parameters import gather_parameters
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.rundir.atomic import name_file, replace_file, sync
from vqmoe_megatron.rundir.file_names import CONFIG_FILE, TRACKER_FILE
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.rundir.waiting import tell
from vqmoe_megatron.runtime.versions import async_save, common_file

POLL_SECONDS = 0.05
TELL_SECONDS = 60.0
NO_RESULT = "results_queue should not be empty"  # Megatron's words


class SaveFailed(OSError):
    """A checkpoint could not be written; raised on all ranks. Earlier ones are untouched."""


@dataclass(frozen=True)
class _Save:
    partial: Path
    folder: Path
    iteration: int
    checksums: SimpleQueue[dict[str, Checksum]]  # from this rank's writer, perhaps a fork
    common: bytes | None  # of common.pt, where Megatron does not write it


@dataclass(frozen=True)
class SavedRun:
    """The run whose checkpoints are written, and where."""

    config: RunConfig
    layout: ParallelLayout
    corpus_content: bytes  # of the corpus.json that it trains on
    run_dir: RunDirectory


class CheckpointSaver:
    """Writes the checkpoints of one run; at most one is being written at a time.

    Every method communicates over the world; all ranks call it together.
    """

    def __init__(self, saved_run: SavedRun, state: TrainingState) -> None:
        self.run = saved_run
        self.state = state
        self._calls = AsyncCallsQueue()
        self._current: _Save | None = None
        self._left_alone: set[str] = set()  # old checkpoints with files of the user's, said once

    @property
    def is_writing(self) -> bool:
        """Whether a save is still going on in the background; equal on all ranks."""
        return self._current is not None

    def save(self, progress: Progress, in_background: bool) -> Path | None:
        """Write a checkpoint; return its folder, or None when it goes on in the background.

        Poll until an earlier one is published before.

        Raises:
            SaveFailed: when it cannot be written.
            RuntimeError: while another save is being written.
        """
        if self._current is not None:
            raise RuntimeError(f"{self._current.folder} is still being written; poll first")
        gather_parameters(self.state.model)
        state = sharded_state(self.state, progress)
        num_bytes = _global_bytes(state)
        save = self._prepare(progress.iteration, num_bytes, common_file(state))
        request = async_save(state, save.partial)
        if request.async_fn is not None:  # None: this rank has nothing to write
            write = functools.partial(
                write_buckets, *request.async_fn.args, checksums=save.checksums
            )
            request = request._replace(async_fn=write)
        request.add_finalize_fn(lambda: self._publish(save))
        self._current = save
        if in_background:
            self._calls.schedule_async_request(request)
            return None
        try:
            request.execute_sync()
        except CheckpointException as error:
            raise self._failure(save, error) from None
        finally:
            self._current = None
        return save.folder

    def poll(self, wait: bool = False) -> Path | None:
        """Publish the background save if all ranks have written it; return its folder then.

        ``wait``: until they have. Does not communicate when nothing is being written.

        Raises:
            SaveFailed: when it could not be written.
        """
        save = self._current
        if save is None:
            return None
        began = told = time.monotonic()
        try:
            while not self._calls.maybe_finalize_async_calls(blocking=False):
                if not wait:
                    return None
                time.sleep(POLL_SECONDS)
                if time.monotonic() - told > TELL_SECONDS:
                    told = time.monotonic()
                    print(f"still writing {save.partial} after {told - began:.0f} s", flush=True)
        except CheckpointException as error:
            raise self._failure(save, error) from None
        finally:
            self._current = save if self._calls.get_num_unfinalized_calls() else None
        return save.folder

    def _failure(self, save: _Save, error: CheckpointException) -> SaveFailed:
        """Remove what was written; say what is known. The first rank knows more than the others."""
        causes = {str(cause[0]) for cause in error.failures.values()}
        detail = "; ".join(sorted(causes)) or "another rank could not write its part"
        if NO_RESULT in detail:
            detail = "a writer process ended without a result; was it killed?"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(save.partial, ignore_errors=True)
        free_bytes = self.run.run_dir.checkpoints_free_bytes()
        return SaveFailed(
            f"the checkpoint of iteration {save.iteration} was not written: {detail} "
            f"({free_bytes / 1e9:.2f} GB free)"
        )

    def _prepare(self, iteration: int, num_bytes: int, common: bytes | None) -> _Save:
        """Let the first rank create the folder; all ranks learn its name, or why there is none."""
        checkpoints = self.run.run_dir.checkpoints
        answer: list[str | None] = [None, None]
        if torch.distributed.get_rank() == 0:
            name = f"iter_{iteration:07d}"
            partial = checkpoints / f"{name}.{uuid.uuid4().hex[:8]}.incomplete"
            try:
                self._make_room(num_bytes)
                partial.mkdir(parents=True)
                answer = [partial.name, None]
            except OSError as error:
                answer = [None, str(error)]
        torch.distributed.broadcast_object_list(answer, src=0)
        partial_name, problem = answer
        if partial_name is None:
            raise SaveFailed(f"the checkpoint of iteration {iteration} was not written: {problem}")
        folder = checkpoints / partial_name.split(".")[0]
        queue = multiprocessing.get_context("fork").SimpleQueue()
        return _Save(checkpoints / partial_name, folder, iteration, queue, common)

    def _make_room(self, num_bytes: int) -> None:
        checkpoints = self.run.run_dir.checkpoints
        for abandoned in checkpoints.glob("iter_*.incomplete"):
            # A writer process of a killed attempt may still be adding to it: the next save's turn.
            shutil.rmtree(abandoned, ignore_errors=True)
        problem = missing_room(self.run.run_dir, num_bytes)
        if problem is not None:
            raise OSError(problem)

    def _publish(self, save: _Save) -> None:
        """Let the first rank name the folder; all ranks learn how it went."""
        mine = {} if save.checksums.empty() else save.checksums.get()
        checksums: list[dict[str, Checksum]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(checksums, mine)
        problem: list[str | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                self._give_name(save, dict(ChainMap(*checksums)))
            except OSError as error:
                problem = [str(error)]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise SaveFailed(
                f"the checkpoint of iteration {save.iteration} was not published: {problem[0]}"
            )

    def _give_name(self, save: _Save, checksums: dict[str, Checksum]) -> None:
        checkpoints, folder = self.run.run_dir.checkpoints, save.folder
        save_recipe(self.run.config, save.partial / CONFIG_FILE)
        if save.common is not None:
            (save.partial / COMMON_FILE).write_bytes(save.common)
        (save.partial / CORPUS_COPY).write_bytes(self.run.corpus_content)
        layout = json.dumps(asdict(self.run.layout), indent=2)
        (save.partial / LAYOUT_FILE).write_text(layout + "\n")
        write_checksums(save.partial, checksums)
        for path in (*save.partial.iterdir(), save.partial):
            sync(path)
        # Ready before the folder has its name: between the two renames it says that this counts.
        next_tracker = checkpoints / NEXT_TRACKER_FILE
        replace_file(next_tracker, f"{save.iteration}\n")
        replaced = folder.with_name(f"{folder.name}.replaced.incomplete")
        if os.path.lexists(folder):  # of a later attempt that the tracker was set back from
            if foreign_files(folder):
                replaced = kept_name(folder)
                tell(f"{folder} holds what no save wrote; it is {replaced.name} now")
            os.rename(folder, replaced)
        os.replace(save.partial, folder)
        name_file(next_tracker, checkpoints / TRACKER_FILE)
        if replaced.suffix == ".incomplete":
            shutil.rmtree(replaced, ignore_errors=True)
        names = [name for name in complete_checkpoints(checkpoints) if name <= folder.name]
        for old in names[: -self.run.config.checkpoint.keep_last]:
            if foreign_files(checkpoints / old):
                if old not in self._left_alone:
                    tell(f"{checkpoints / old} holds what no save wrote, and is not removed")
                self._left_alone.add(old)
                continue
            # Renamed first: a kill in the middle must not leave a half that looks whole. What
            # cannot be removed now (a file still open elsewhere) is tried again by the next save.
            removed = checkpoints / f"{old}.removed.incomplete"
            os.rename(checkpoints / old, removed)
            shutil.rmtree(removed, ignore_errors=True)


def kept_name(folder: Path) -> Path:
    """A free name beside ``folder`` under which nobody takes it for a checkpoint."""
    names = (folder.with_name(f"{folder.name}.kept_{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _global_bytes(state: dict) -> int:
    """Bytes of all tensors over all ranks, replicas once. One all-reduce over the world."""
    apply_factories(state)  # as the save would do
    local = sum(
        part.data.numel() * part.data.element_size()
        for part in nested_values(state)
        if isinstance(part, ShardedTensor) and is_main_replica(part.replica_id)
    )
    total = torch.tensor(local, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total)
