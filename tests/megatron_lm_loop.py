"""Megatron-LM's training script, followed step by step with megatron-core's public interface.

The wheel has no ``pretrain_gpt.py``; this is what its ``megatron/training/training.py`` (tag
core_v0.16.1) does with a model, in its order: import the spec by name, build, wrap, let ``train()``
overwrite the configuration's hooks, step, log, save. It knows nothing of codebooks. Only the data
and the initial weights are ours, so that curves can be compared with those of ``vqmoe pretrain``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

MOE_LOG_NAMES = ["load_balancing_loss"]  # what Megatron-LM lists for aux_loss


class Scalars(dict):
    """In place of TensorBoard's writer; what Megatron returns differs between releases."""

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        self[name] = float(value)


class MegatronLM:
    """In a rank: one model of a recipe, trained as Megatron-LM trains it."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        import torch

        from vqmoe_megatron.config.recipe import load_recipe
        from vqmoe_megatron.engines.megatron.model import build_transformer_config
        from vqmoe_megatron.plan.layout import ParallelLayout
        from vqmoe_megatron.runtime.versions import forget_moe_log
        from vqmoe_megatron.train.preflight import check_run

        run = check_run(
            load_recipe(Path(recipe), overrides), torch.distributed.get_world_size(), "cpu"
        )
        self.recipe, self.corpus = run.config, run.corpus
        self.layout = ParallelLayout.from_config(self.recipe, torch.distributed.get_world_size())
        self.config = build_transformer_config(self.recipe, self.layout)
        self.config.bf16 = self.recipe.model.bf16
        forget_moe_log()  # of another test in this process
        self.model = self._get_model()
        self.optimizer, self.scheduler = self._get_optimizer()
        self.iteration = 0

    def _get_model(self) -> list[Any]:
        """``get_model`` and the model provider of ``pretrain_gpt.py --spec``."""
        import torch
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.spec_utils import import_module
        from megatron.core.transformer.transformer_block import (
            TransformerBlockSubmodules,
            get_num_layers_to_build,
        )

        from vqmoe_megatron.engines.megatron.layout_independent_init import redraw_parameters
        from vqmoe_megatron.engines.megatron.model import padded_vocab_size
        from vqmoe_megatron.moe.norms import ParallelNorm

        spec = import_module(("vqmoe_megatron.moe", "vqmoe_layer_spec"))
        num_chunks = self.layout.virtual_pipeline_model_parallel_size
        chunks = []
        for stage in [None] if num_chunks is None else range(num_chunks):
            layers = spec
            if self.config.sequence_parallel:
                # Without Transformer Engine and Apex Megatron's own last norm refuses it.
                count = get_num_layers_to_build(self.config, vp_stage=stage)
                layers = TransformerBlockSubmodules([spec] * count, layer_norm=ParallelNorm)
            place = {"ignore_virtual": False, "vp_stage": stage}
            model = GPTModel(
                self.config,
                layers,
                vocab_size=padded_vocab_size(self.recipe.model),
                max_sequence_length=self.recipe.model.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                parallel_output=True,
                share_embeddings_and_output_weights=False,
                position_embedding_type=self.recipe.model.position_embedding_type,
                vp_stage=stage,
            )
            for parameter in model.parameters():
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            redraw_parameters(model, self.recipe.train.seed)  # the start of vqmoe pretrain
            model.cuda(torch.cuda.current_device())
            if self.config.bf16:
                model = Float16Module(self.config, model)
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=self.recipe.optimizer.overlap_grad_reduce,
                overlap_param_gather=self.recipe.optimizer.overlap_param_gather,
                use_distributed_optimizer=self.recipe.optimizer.use_distributed_optimizer,
            )
            chunks.append(
                DistributedDataParallel(
                    self.config, ddp_config, model, disable_bucketing=bool(stage)
                )
            )
        return chunks

    def _get_optimizer(self) -> tuple[Any, Any]:
        import torch
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from vqmoe_megatron.engines.megatron.fused_adam import fuse_adams

        section, train = self.recipe.optimizer, self.recipe.train
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=section.lr,
                min_lr=section.min_lr,
                weight_decay=section.weight_decay,
                adam_beta1=section.adam_beta1,
                adam_beta2=section.adam_beta2,
                adam_eps=section.adam_eps,
                clip_grad=section.clip_grad,
                bf16=self.config.bf16,
                params_dtype=torch.bfloat16 if self.config.bf16 else torch.float32,
                use_distributed_optimizer=section.use_distributed_optimizer,
                overlap_param_gather=section.overlap_param_gather,
            ),
            self.model,
        )
        # Megatron-LM brings a fused Adam or none; ours rounds as `vqmoe pretrain` does, so that
        # codes can be compared bit by bit.
        fuse_adams(optimizer, "cpu")
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=section.lr,
            min_lr=section.min_lr,
            lr_warmup_steps=section.lr_warmup_iters * train.global_batch_size,
            lr_decay_steps=train.train_iters * train.global_batch_size,
            lr_decay_style=section.lr_decay_style,
            start_wd=section.weight_decay,
            end_wd=section.weight_decay,
            wd_incr_steps=train.train_iters * train.global_batch_size,
            wd_incr_style="constant",
        )
        return optimizer, scheduler

    def train(self, num_steps: int, track_names: list[str] | None = None) -> list[dict]:
        """``train()``: set the hooks, then step and log; what it would print, per step."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.utils import get_model_config

        from vqmoe_megatron.tasks.pretrain import Pretrain

        config = get_model_config(self.model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        if self.recipe.optimizer.overlap_grad_reduce:
            config.no_sync_func = [chunk.no_sync for chunk in self.model]
            if len(self.model) == 1:
                config.no_sync_func = config.no_sync_func[0]
        config.finalize_model_grads_func = finalize_model_grads
        consumed = self.iteration * self.recipe.train.global_batch_size
        self.task = Pretrain(self.recipe, self.corpus)
        iterators = self.task.training_iterators(len(self.model), consumed, 0)
        for chunk in self.model:
            chunk.train()
        steps = []
        for _ in range(num_steps):
            loss, grad_norm = self._train_step(iterators)
            self.iteration += 1
            logged = self._training_log(track_names or MOE_LOG_NAMES)
            steps.append(
                {"loss": loss, "grad_norm": grad_norm, "log": logged, "codes": self.codes()}
            )
        return steps

    def _train_step(self, iterators: list) -> tuple[float, float]:
        from vqmoe_megatron.engines.megatron.step import run_microbatches

        train = self.recipe.train
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_microbatches(
            self.task.forward_step,
            self.model,
            iterators,
            self.layout.num_microbatches(train),
            self.recipe.model.seq_length,
            train.micro_batch_size,
            forward_only=False,
        )
        updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=train.global_batch_size)
        return float(sums[0] / sums[1]), float(grad_norm)

    def _training_log(self, track_names: list[str]) -> dict[str, float]:
        """The MoE part of ``training_log``; Megatron-LM prints it on the last rank."""
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        train = self.recipe.train
        shown = Scalars()
        track_moe_metrics(
            loss_scale=1 / self.layout.num_microbatches(train),
            iteration=self.iteration,
            writer=shown,
            force_initialize=True,
            track_names=track_names,
            num_layers=self.config.num_layers,
            moe_layer_freq=self.config.moe_layer_freq,
            mtp_num_layers=self.config.mtp_num_layers,
        )
        return dict(shown)

    def codes(self) -> dict[str, str]:
        """sha256 of every codebook's state, by global layer number."""
        from codebook_hashes import codebook_hashes

        return codebook_hashes(self.model)

    def save(self, folder: str) -> None:
        """The model by ``dist_checkpointing``, the optimizer by rank."""
        import torch
        from megatron.core import dist_checkpointing

        path = Path(folder) / f"iter_{self.iteration:07d}"
        path.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(self._model_state(), str(path))
        rank = torch.distributed.get_rank()
        optimizer = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        torch.save(optimizer, Path(folder) / f"optimizer_{rank}.pt")

    def load(self, folder: str, iteration: int) -> None:
        """Put back what :meth:`save` wrote."""
        import torch
        from megatron.core import dist_checkpointing

        path = Path(folder) / f"iter_{iteration:07d}"
        with torch.no_grad():
            loaded = dist_checkpointing.load(self._model_state(), str(path))
            for number, chunk in enumerate(self.model):
                chunk.module.load_state_dict(loaded[f"model{number}"], strict=False)
        rank = torch.distributed.get_rank()
        optimizer = torch.load(Path(folder) / f"optimizer_{rank}.pt", weights_only=True)
        self.optimizer.load_state_dict(optimizer["optimizer"])
        self.scheduler.load_state_dict(optimizer["scheduler"])
        self.iteration = iteration

    def _model_state(self) -> dict:
        return {
            f"model{n}": chunk.module.sharded_state_dict() for n, chunk in enumerate(self.model)
        }


def train_as_megatron_lm(
    recipe: str,
    overrides: list[str],
    num_steps: int,
    settings: str,
    save_at: int = 0,
    is_listed: bool = False,
) -> dict:
    """In a rank: train; with ``save_at`` a new model goes on from a checkpoint of that step.

    ``is_listed``: the script lists the names of VQ metrics, too; from 0.18 on Megatron shows no
    others.
    """
    from megatron.core.transformer.moe import moe_utils

    from vqmoe_megatron.moe import METRIC_NAMES

    os.environ["VQMOE_CONFIG"] = settings
    is_listed |= hasattr(moe_utils, "get_moe_metrics_tracker")
    names = [*MOE_LOG_NAMES, *METRIC_NAMES.values()] if is_listed else None
    try:
        script = MegatronLM(recipe, overrides)
        steps = script.train(save_at or num_steps, names)
        if save_at:
            folder = str(Path(settings).parent / "checkpoint")
            script.save(folder)
            script = MegatronLM(recipe, overrides)
            script.load(folder, save_at)
            steps += script.train(num_steps - save_at, names)
    finally:
        del os.environ["VQMOE_CONFIG"]
    return {"steps": steps}


def bf16_state(recipe: str, overrides: list[str], settings: str) -> list[str]:
    """In a rank: two steps in bf16, then the optimizer's sharded state; its keys."""
    os.environ["VQMOE_CONFIG"] = settings
    try:
        script = MegatronLM(recipe, overrides)
        script.train(2)
    finally:
        del os.environ["VQMOE_CONFIG"]
    model = script._model_state()["model0"]
    state = script.optimizer.sharded_state_dict(model)
    found: list[str] = []

    def collect(part: Any) -> None:
        if hasattr(part, "key"):
            found.append(part.key)
        elif isinstance(part, dict):
            for value in part.values():
                collect(value)
        elif isinstance(part, list | tuple):
            for value in part:
                collect(value)

    collect(state)
    return found
