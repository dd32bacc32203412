"""In a rank of a ``RankPool``: check replicas during training, healthy and with flipped bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def check_in_training(recipe: str, overrides: list[str], damages: list) -> dict:
    """Train two steps, check, then check again with one bit flipped at a time.

    Args:
        recipe: path.
        overrides: of the recipe.
        damages: [rank, end of a tensor's name in the first chunk, element] each.
    """
    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.replica_check import ReplicaMismatch, check_replicas, fingerprints
    from vqmoe_megatron.train.run_report import RunReport
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    class CheckedEnough(Exception):
        """Ends training: nothing after the check matters here."""

    class Report(RunReport):
        def log(self, record) -> None:
            if record["iteration"] < 2:
                return
            found["before_gather"] = {
                f"{p.name} {list(p.offset)}": text
                for p, text in fingerprints(trainer.model).items()
            }
            found["compared"] = check_replicas(trainer.model, 2)
            for rank, name, element in damages:
                with flipped_bit(trainer.model[0], rank, name, element):
                    try:
                        check_replicas(trainer.model, 2)
                        found["messages"].append("")
                    except ReplicaMismatch as error:
                        found["messages"].append(str(error))
            raise CheckedEnough

    found: dict = {"messages": []}
    config = load_recipe(Path(recipe), overrides)
    run = check_run(config, torch.distributed.get_world_size(), "cpu")
    trainer = Trainer(run, StopRequests({}))
    try:
        trainer.train(Report())
    except CheckedEnough:
        return found
    raise AssertionError("iteration 2 was not logged")


@contextmanager
def flipped_bit(chunk: torch.nn.Module, rank: int, name: str, element: int) -> Iterator[None]:
    """Flip the lowest bit of one element of one tensor on one rank, and back."""
    if torch.distributed.get_rank() != rank:
        yield
        return
    tensors = chunk.module.state_dict(keep_vars=True)
    (target,) = (tensor for key, tensor in tensors.items() if key.endswith(name))
    bits = target.data.view(-1)[element : element + 1].view(torch.int32)
    bits ^= 1
    yield
    bits ^= 1
