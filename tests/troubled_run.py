"""Training runs with an accident, for the ranks of a ``RankPool``."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a rank loads this file by its path

from small_run import train_here  # noqa: E402


def train_with_one_poisoned_step(recipe: str, overrides: list[str]) -> dict:
    """As ``train_here``, with a NaN in the loss mask of one microbatch of step 3 on rank 0."""
    import torch

    from vqmoe_megatron.tasks import pretrain as task

    original = task.to_device
    num_batches = 0

    def poisoned(batch):
        nonlocal num_batches
        batch = original(batch)
        num_batches += torch.is_grad_enabled()
        if num_batches == 6 and torch.distributed.get_rank() == 0:  # 2 per step and rank
            batch["loss_mask"][0, 0] = float("nan")
        return batch

    task.to_device = poisoned
    try:
        return train_here(recipe, overrides)
    finally:
        task.to_device = original


def train_with_a_small_file_limit(recipe: str, overrides: list[str], limited: int) -> dict:
    """As ``train_here``; files cannot grow beyond 32 kB in the save of iteration ``limited``."""
    from vqmoe_megatron.train import trainer

    original = trainer.CheckpointSaver.save

    def save(self, progress, in_background):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if progress.iteration == limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, hard))
        try:
            return original(self, progress, in_background)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer.CheckpointSaver.save = save
    try:
        return train_here(recipe, overrides)
    except OSError as error:
        return {"error": str(error)}
    finally:
        trainer.CheckpointSaver.save = original


def train_until_killed_before_the_tracker(recipe: str, overrides: list[str]) -> None:
    """As ``train_here``, killed when the first checkpoint has its name and the tracker has not."""
    from vqmoe_megatron.checkpoint import saver as checkpoint_saver

    class Killed(BaseException):
        pass

    original = checkpoint_saver.os.replace

    def replace(source, target):
        if Path(target).name == checkpoint_saver.TRACKER_FILE:
            raise Killed
        original(source, target)

    checkpoint_saver.os.replace = replace
    try:
        train_here(recipe, overrides)
    except Killed:
        return
    finally:
        checkpoint_saver.os.replace = original
    raise AssertionError("there was no tracker to write")


def train_on_a_full_disk(recipe: str, overrides: list[str]) -> dict:
    """As ``train_here``, where every save is larger than any disk."""
    from vqmoe_megatron.checkpoint import saver as checkpoint_saver

    original = checkpoint_saver.missing_room
    checkpoint_saver.missing_room = lambda run_dir, num_bytes: original(run_dir, 2**60)
    try:
        return train_here(recipe, overrides)
    except OSError as error:
        return {"error": str(error)}
    finally:
        checkpoint_saver.missing_room = original


def train_with_uneven_masks(recipe: str, overrides: list[str]) -> dict:
    """As ``train_here``, where the loss counts about two thirds of the tokens, some samples none.

    The mask follows from a sample's own tokens, so every layout and batch size sees the same.
    """
    from vqmoe_megatron.tasks import pretrain as task

    original = task.to_device

    def masked(batch):
        batch = original(batch)
        kept = (batch["tokens"] % 3 != 0) & (batch["tokens"].sum(dim=1, keepdim=True) % 5 != 0)
        return {**batch, "loss_mask": batch["loss_mask"] * kept}

    task.to_device = masked
    try:
        return train_here(recipe, overrides)
    finally:
        task.to_device = original


def is_deterministic() -> bool:
    """Whether torch refuses nondeterministic operations."""
    import torch

    return torch.are_deterministic_algorithms_enabled()


def train_behind_a_bad_batch(recipe: str, overrides: list[str], passed_over: int) -> dict:
    """As ``train_here`` from ``checkpoint.load``, with its data position moved on."""
    import dataclasses

    from vqmoe_megatron.train import trainer

    original = trainer.Trainer.resume

    def resume(self):
        done = original(self)
        self.progress = dataclasses.replace(self.progress, passed_over_samples=passed_over)
        return done

    trainer.Trainer.resume = resume
    try:
        return train_here(recipe, overrides)
    finally:
        trainer.Trainer.resume = original


def refusal_of_resuming(recipe: str, overrides: list[str]) -> str:
    """What the trainer says when it cannot load the checkpoint."""
    import torch

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    world_size = torch.distributed.get_world_size()
    run = check_run(load_recipe(Path(recipe), overrides), world_size, "cpu")
    try:
        Trainer(run, StopRequests({})).resume()
    except ValueError as error:
        return str(error)
    return "it was loaded"


def refusal_of_exporting(run_dir: str, out: str) -> str:
    """What the export says when it cannot load the checkpoint."""
    from table_model import export_here

    try:
        export_here(run_dir, out)
    except ValueError as error:
        return str(error)
    return "it was exported"


def finish_again_without_data(recipe: str, overrides: list[str]) -> dict:
    """As ``train_here``, where opening the training data is an error."""
    from vqmoe_megatron.tasks.pretrain import Pretrain

    def opened(*arguments):
        raise AssertionError("the training data was opened")

    original = Pretrain.training_iterators
    Pretrain.training_iterators = opened
    try:
        return train_here(recipe, overrides)
    finally:
        Pretrain.training_iterators = original
