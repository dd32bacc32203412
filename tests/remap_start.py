"""A rank's start from a checkpoint with other numbers of codes and experts, for tests."""

from __future__ import annotations


def start_remapped(recipe: str, overrides: list[str], folder: str) -> dict:
    """Build a trainer, fill it from ``folder``, and train from iteration 0.

    Returns the validation loss before the first step, what was reported, the training losses, and
    all tensors of this rank by name and place, as loaded and as trained.
    """
    from pathlib import Path

    import torch

    from vqmoe_megatron.checkpoint.remap import load_remapped
    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.engines.megatron.layout_independent_init import sharded_tensors
    from vqmoe_megatron.moe.layer import VQMoELayer
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.run_report import RunReport
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    class Records(RunReport):
        def __init__(self) -> None:
            self.records: list[dict[str, float]] = []

        def log(self, record) -> None:
            self.records.append({name: float(value) for name, value in record.items()})

    def tensors() -> dict[str, torch.Tensor]:
        return {
            f"{part.key} {list(part.global_offset)}": part.data.detach().clone()
            for chunk in trainer.model
            for part in sharded_tensors(chunk.module.sharded_state_dict())
        }

    config = load_recipe(Path(recipe), overrides)
    run = check_run(config, torch.distributed.get_world_size(), "cpu")
    trainer = Trainer(run, StopRequests({}))
    said: list[str] = []
    load_remapped(Path(folder), trainer.model, run.config, said.append)
    trainer.engine.optimizer.reload_model_params()
    layers = [m for chunk in trainer.model for m in chunk.modules() if isinstance(m, VQMoELayer)]
    needs_data_init = [layer.assigner.codebook.needs_data_init for layer in layers]
    loaded = tensors()
    report = Records()
    trainer.train(report)
    start, *steps = report.records
    return {
        "loss": start["val/loss"],
        "said": said,
        "needs_data_init": needs_data_init,
        "losses": [record["loss"] for record in steps],
        "loaded": loaded,
        "trained": tensors(),
    }
