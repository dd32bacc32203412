"""Transformer-XL in Megatron's GPTModel: its attention by specs, its memory by hooks.

Nothing of Megatron is changed: a pre-hook of the model begins a microbatch, one of each layer keeps
what enters it, and attention asks for what was kept before, under the norm of its layer.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from vqmoe_megatron.moe.transformer_xl.relative_attention import RelativeAttention
from vqmoe_megatron.moe.transformer_xl.segment_attention import SegmentAttention
from vqmoe_megatron.moe.transformer_xl.segment_memory import SegmentMemory


def with_relative_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The spec of a block of local modules, with Transformer-XL's attention in every layer."""
    block = copy.copy(block)
    block.layer_specs = [_with_relative_attention(layer) for layer in block.layer_specs]
    return block


def _with_relative_attention(layer: ModuleSpec) -> ModuleSpec:
    attention = copy.copy(layer.submodules.self_attention)
    attention.module, attention.submodules = SegmentAttention, copy.copy(attention.submodules)
    attention.submodules.core_attention = RelativeAttention
    layer, submodules = copy.copy(layer), copy.copy(layer.submodules)
    submodules.self_attention, layer.submodules = attention, submodules
    return layer


def attach_segment_memory(model: torch.nn.Module, memory: SegmentMemory) -> None:
    """Make ``memory`` a part of ``model``, Megatron's GPTModel or one chunk of it, before it is
    wrapped. No communication."""
    model.segment_memory = memory
    model.register_forward_pre_hook(lambda *_: memory.begin())
    model.decoder.register_forward_hook(partial(_follow_output, memory))
    for layer in model.decoder.layers:
        memory.layers.append(layer.layer_number)
        layer.register_forward_pre_hook(partial(_remember, memory), with_kwargs=True)
        layer.self_attention.earlier = partial(_normed, memory, layer)


def _remember(memory: SegmentMemory, layer: TransformerLayer, args: tuple, kwargs: dict) -> None:
    states = args[0] if args else kwargs["hidden_states"]
    memory.remember(layer.layer_number, states)


def _normed(memory: SegmentMemory, layer: TransformerLayer) -> torch.Tensor | None:
    states = memory.earlier(layer.layer_number)
    return None if states is None else layer.input_layernorm(states)


def _follow_output(memory: SegmentMemory, _: torch.nn.Module, __: tuple, output: Any) -> None:
    memory.follow(output[0] if isinstance(output, tuple) else output)
