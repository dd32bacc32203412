"""From a recipe to this rank's model chunks: TransformerConfig, a model of text or images, DDP.

One chunk per virtual pipeline stage; without interleaving there is one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.config.router_rules import OF_TOKEN_IDS
from vqmoe_megatron.engines.megatron.classification_head import make_classifier
from vqmoe_megatron.engines.megatron.fast_path import start_before_attention
from vqmoe_megatron.engines.megatron.layout_independent_init import redraw_parameters
from vqmoe_megatron.engines.megatron.vision_model import VisionTransformer
from vqmoe_megatron.moe.expert_engine import EngineType, ExpertEngine
from vqmoe_megatron.moe.memory.attach import attach_code_stream
from vqmoe_megatron.moe.memory.code_stream import CodeStream
from vqmoe_megatron.moe.memory.path import LayerMemory
from vqmoe_megatron.moe.norms import ParallelNorm
from vqmoe_megatron.moe.routers.builder import LayerRouter
from vqmoe_megatron.moe.spec import get_vqmoe_block_spec
from vqmoe_megatron.moe.token_stream import TokenStream, attach_token_stream
from vqmoe_megatron.moe.transformer_xl.attach import (
    attach_segment_memory,
    with_relative_attention,
)
from vqmoe_megatron.moe.transformer_xl.segment_memory import SegmentMemory
from vqmoe_megatron.plan.capture import starts_rows, starts_tables
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.fused_parts import PLAIN, FusedParts
from vqmoe_megatron.runtime.graphs import Graph
from vqmoe_megatron.runtime.versions import forget_moe_log
from vqmoe_megatron.vq.kernel_choice import kernel_obstacle

ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}
SOFTMAX_KERNELS = (  # by which FusedScaleMaskSoftmax imports them
    "scaled_masked_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
    "scaled_softmax_cuda",
)
# Fields of our model section that GPTModel takes, not TransformerConfig.
GPT_FIELDS = {
    "seq_length",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "position_embedding_type",
    "rotary_base",
    "untie_embeddings_and_output_weights",
    "activation_func",
}
# Switches that may stand open in a recipe, and are settled for a device.
SWITCHES = {"transformer_impl", "gradient_accumulation_fusion"}


def padded_vocab_size(model: ModelConfig) -> int:
    """Vocabulary rows of the embedding: a multiple of ``make_vocab_size_divisible_by``.

    The multiple does not depend on TP, so every layout has the same table.

    Raises:
        ValueError: when the vocabulary size is not known yet.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is not set and no corpus has filled it in")
    multiple = model.make_vocab_size_divisible_by
    return (model.vocab_size + multiple - 1) // multiple * multiple


def has_softmax_kernels() -> bool:
    """Whether Apex's softmax kernels are here, which Megatron's own attention imports unasked."""
    return all(importlib.util.find_spec(name) is not None for name in SOFTMAX_KERNELS)


def build_transformer_config(
    config: RunConfig, layout: ParallelLayout, parts: FusedParts = PLAIN
) -> TransformerConfig:
    """Translate the recipe. Fields that need CUDA kernels follow the device, or ``parts``.

    No communication.
    """
    model = config.model
    known = {f.name for f in fields(TransformerConfig)}
    settings = {
        f.name: getattr(model, f.name)
        for f in fields(ModelConfig)
        if f.name in known and f.name not in GPT_FIELDS | SWITCHES
    }
    # Megatron refuses one expert weighed by the softmax over its own logit, which trains no router.
    settings["moe_router_pre_softmax"] |= model.moe_router_freeze
    has_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    transformer = TransformerConfig(
        **settings,
        activation_func=ACTIVATIONS[model.activation_func],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # see below
        sequence_parallel=layout.sequence_parallel,
        moe_token_dispatcher_type="alltoall",
        attention_softmax_in_fp32=True,
        deterministic_mode=config.train.deterministic,
        variable_seq_lengths=False,
        # Batched, the two directions between the same two ranks get mixed up in the interleaved
        # schedule at PP = 2: each rank is both the previous and the next stage of the other.
        overlap_p2p_comm=layout.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=layout.virtual_pipeline_model_parallel_size is None,
        transformer_impl=parts.transformer_impl,
        gradient_accumulation_fusion=parts.gradient_accumulation_fusion,
        masked_softmax_fusion=has_cuda and has_softmax_kernels(),
        bias_dropout_fusion=has_cuda and kernel_obstacle([dtype]) is None,  # torch.compile
        bias_activation_fusion=False,
        persist_layer_norm=False,
        init_method=init_method_normal(model.init_method_std),
        output_layer_init_method=scaled_init_method_normal(model.init_method_std, model.num_layers),
    )
    # Megatron refuses biased experts at ETP > 1, which its own experts cannot shard and
    # GroupedExperts does; it reads the field nowhere else.
    transformer.expert_tensor_parallel_size = layout.expert_tensor_parallel_size
    transformer.moe_router_pre_softmax = model.moe_router_pre_softmax
    # Layers with and without memory hold different tensors, so checkpoints name each by its number.
    transformer.hetereogenous_dist_checkpoint = config.code_memory.layers is not None
    return transformer


def build_model(
    config: RunConfig,
    transformer: TransformerConfig,
    layout: ParallelLayout,
    engine: EngineType = ExpertEngine,
    parts: FusedParts = PLAIN,
    new_graph: Callable[[], Graph] | None = None,
) -> list[torch.nn.Module]:
    """Build this rank's chunks, wrapped in Megatron's DDP and, for bf16, its Float16Module.

    ``engine`` builds the expert engine of every layer, ``new_graph`` the graphs of its discrete
    path (None: none); ``parts`` are those of ``transformer``.

    Communicates: DDP broadcasts parameters of the data-parallel group.
    """
    chunks = build_chunks(config, transformer, layout, engine, parts, new_graph)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the loop checks and follows train.nan_policy
    )
    wrapped = [
        DistributedDataParallel(transformer, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_chunks(
    config: RunConfig,
    transformer: TransformerConfig,
    layout: ParallelLayout,
    engine: EngineType = ExpertEngine,
    parts: FusedParts = PLAIN,
    new_graph: Callable[[], Graph] | None = None,
) -> list[torch.nn.Module]:
    """Build this rank's chunks with their first weights, for bf16 in Megatron's Float16Module; no
    data parallelism yet. Arguments as :func:`build_model`. No communication."""
    forget_moe_log()  # of another model of this process
    num_chunks = layout.virtual_pipeline_model_parallel_size or 1
    streams = _code_streams(config, transformer, num_chunks)
    chunks: list[torch.nn.Module] = [
        _build_chunk(
            config,
            transformer,
            stage if num_chunks > 1 else None,
            engine,
            parts,
            new_graph,
            stream,
            layout.num_microbatches(config.train),
        )
        for stage, stream in enumerate(streams)
    ]
    if config.train.layout_independent_init:
        for chunk in chunks:
            redraw_parameters(chunk, config.train.seed)
    if config.model.bf16:
        chunks = [Float16Module(transformer, chunk) for chunk in chunks]
    return chunks


def _code_streams(
    config: RunConfig, transformer: TransformerConfig, num_chunks: int
) -> list[CodeStream | None]:
    """The stream of codes of every chunk of this rank, where the recipe has a code memory."""
    if not config.code_memory.is_on:
        return [None] * num_chunks
    streams: list[CodeStream | None] = []
    for chunk in range(num_chunks):
        streams.append(
            CodeStream(
                transformer,
                config.code_memory,
                padded_vocab_size(config.model),
                get_default_pg_collection(),
                config.train.seed,
                chunk,
                streams[0] if streams else None,
            )
        )
    return streams


def _layer_router(config: RunConfig, transformer: TransformerConfig) -> LayerRouter:
    """The router of one chunk's layers, with its nulls filled in and the chunk's token ids."""
    model, tokens = config.model, None
    if model.moe_router in OF_TOKEN_IDS:
        tokens = TokenStream(transformer, padded_vocab_size(model), get_default_pg_collection())
    name, steps = model.moe_router, config.train.train_iters
    return LayerRouter(name, config.router.for_run(name, model.num_moe_experts, steps), tokens)


def _build_chunk(
    config: RunConfig,
    transformer: TransformerConfig,
    vp_stage: int | None,
    engine: EngineType,
    parts: FusedParts,
    new_graph: Callable[[], Graph] | None,
    stream: CodeStream | None,
    num_microbatches: int,
) -> torch.nn.Module:
    place = {"ignore_virtual": False, "vp_stage": vp_stage}
    local_norm = FusedLayerNorm if parts.apex_norm else ParallelNorm
    memory = None
    if stream is not None:
        memory = LayerMemory(config.code_memory, stream, config.train.seed)
    router = _layer_router(config, transformer)
    spec = get_vqmoe_block_spec(
        transformer,
        config.vq,
        config.train.seed,
        vp_stage,
        engine,
        router,
        local_norm,
        new_graph,
        memory,
        config.model.norm_placement,
        config.model.moe_router_freeze,
    )
    ends = {
        "pre_process": parallel_state.is_pipeline_first_stage(**place),
        "post_process": parallel_state.is_pipeline_last_stage(**place),
        "vp_stage": vp_stage,
    }
    if config.vision.is_on:
        model = VisionTransformer(transformer, spec, config.vision, **ends)
    else:
        model = _gpt_model(config, transformer, spec, ends)
    if config.finetune.is_on:
        make_classifier(model, config.finetune)
    for name, parameter in model.named_parameters():
        # Megatron marks expert parameters so only when EP > 1; at EP = 1 with TP > ETP their
        # gradients would then not be reduced over TP ranks.
        if ".experts." in name or ".code_memory." in name:
            parameter.allreduce = False
    if stream is not None:
        attach_code_stream(model, stream)
    if router.tokens is not None:
        attach_token_stream(model, router.tokens)
    if config.model.memory_length_tokens:
        tp_group = model.pg_collection.tp if transformer.sequence_parallel else None
        segment_memory = SegmentMemory(
            config.model.memory_length_tokens,
            num_microbatches,
            (config.train.micro_batch_size, config.model.hidden_size),
            transformer.params_dtype,
            tp_group,
        )
        attach_segment_memory(model, segment_memory)
    start_before_attention(model, starts_tables(config), starts_rows(config))
    return model.to(torch.cuda.current_device())


def _gpt_model(
    config: RunConfig,
    transformer: TransformerConfig,
    spec: TransformerBlockSubmodules,
    ends: dict[str, Any],
) -> GPTModel:
    model = config.model
    has_relative = model.attention == "transformer_xl"
    return GPTModel(
        transformer,
        with_relative_attention(spec) if has_relative else spec,
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.seq_length,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="none" if has_relative else model.position_embedding_type,
        rotary_base=model.rotary_base,
        **ends,
    )
