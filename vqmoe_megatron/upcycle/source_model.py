"""The source as a model that can be evaluated, built and filled: the measure of what comes of it.

A checkpoint of ours is built by its own recipe. One of Megatron's is built of Megatron-core's own
layers, its dense MLP or its ``SequentialMLP`` behind its own dispatcher, so that what is compared
with is not our layer. Either is evaluated on the recipe's text, in its windows and its dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.module import Float16Module

from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.engines.megatron.engine import MegatronEngine
from vqmoe_megatron.engines.megatron.model import (
    build_model,
    build_transformer_config,
    padded_vocab_size,
)
from vqmoe_megatron.engines.megatron.step import TrainStep
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions
from vqmoe_megatron.tasks.task import Task
from vqmoe_megatron.upcycle.source import Source
from vqmoe_megatron.upcycle.tensor_map import copy_tensors


def evaluated_source(
    source: Source, target: RunConfig, layout: ParallelLayout, task: Task
) -> MegatronEngine:
    """Build and fill the source's model; the engine has no optimizer and only evaluates.

    Args:
        source: what to read.
        target: the recipe, with ``model.vocab_size`` filled in: text, windows and dtype, and of a
            Megatron model also what tensors do not tell.
        layout: of one rank, whose process groups stand.
        task: the recipe's.

    Communicates over the world, which is this process.

    Raises:
        ValueError: naming every stored tensor that does not fit the model.
    """
    if source.config is not None:
        model = _ours(source.config, target, layout)
    else:
        model = _megatrons(source, target, layout)
    copy_tensors(model[0].module, source)
    train = target.train
    step = TrainStep(
        task.forward_step,
        model,
        None,
        None,
        CodebookSync(),
        1,
        target.model.seq_length,
        train.micro_batch_size,
        train.global_batch_size,
    )
    return MegatronEngine(model, None, None, step)


def _ours(stored: RunConfig, target: RunConfig, layout: ParallelLayout) -> list[torch.nn.Module]:
    same = {"bf16": target.model.bf16, "fp8": None, "seq_length": target.model.seq_length}
    config = replace(
        stored,
        model=replace(stored.model, vocab_size=target.model.vocab_size, **same),
        parallel=ParallelConfig(),
        train=target.train,
        optimizer=target.optimizer,
    )
    return build_model(config, build_transformer_config(config, layout), layout)


class _Alone(torch.nn.Module):
    """In the place of Megatron's DDP, for a model that is only evaluated."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, module.config

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """As the model."""
        return self.module(*args, **kwargs)

    def set_input_tensor(self, tensor: object) -> None:
        """As Megatron's schedules ask."""
        self.module.set_input_tensor(tensor)


def _megatrons(source: Source, target: RunConfig, layout: ParallelLayout) -> list[torch.nn.Module]:
    name_missing_functions()
    settings = target.model
    transformer = build_transformer_config(target, layout)
    experts = [source.num_experts(layer) for layer in range(settings.num_layers)]
    transformer.num_moe_experts = next(filter(None, experts), None)
    transformer.moe_layer_freq = [int(number is not None) for number in experts]
    transformer.hetereogenous_dist_checkpoint = True  # layers of any kind, each by its number
    stored, is_stacked = (
        source.of_layer("mlp.linear_fc1.weight", experts.index(None))
        if (None in experts)
        else (None, False)
    )
    if stored is not None:
        width = stored.shape[1 if is_stacked else 0]
        transformer.ffn_hidden_size = width // (2 if settings.gated_linear_unit else 1)
    spec = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=False, normalization=settings.normalization
    )
    model = GPTModel(
        transformer,
        spec,
        vocab_size=padded_vocab_size(settings),
        max_sequence_length=settings.seq_length,
        parallel_output=True,
        share_embeddings_and_output_weights=not settings.untie_embeddings_and_output_weights,
        position_embedding_type=settings.position_embedding_type,
        rotary_base=settings.rotary_base,
    ).to(torch.cuda.current_device())
    return [_Alone(Float16Module(transformer, model) if settings.bf16 else model)]
