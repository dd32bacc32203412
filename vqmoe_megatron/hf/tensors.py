"""A checkpoint's tensors under the names of the modelling file, layer by layer.

H hidden size, V vocabulary entries, N experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from vqmoe_megatron.checkpoint.layer_table import exported, filled_table, layer_table
from vqmoe_megatron.checkpoint.memory_table import memory_codes, memory_rows
from vqmoe_megatron.hf.checkpoint_reader import CheckpointReader
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.memory.code_stream import CodeStream

Named = Iterator[tuple[str, torch.Tensor]]
# Parts of a layer that are stored as they are read: ours, and the names that Megatron has for it.
# A dense layer's norms have the names of the linear layers behind them.
PLAIN = {
    "input_layernorm.": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "self_attn.qkv_proj.": ("self_attention.linear_qkv.",),
    "self_attn.o_proj.": ("self_attention.linear_proj.",),
    "post_attention_layernorm.": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    "mlp.fc1.": ("mlp.linear_fc1.",),
    "mlp.fc2.": ("mlp.linear_fc2.",),
    "mlp.shared_expert.fc1.": ("mlp.shared_experts.linear_fc1.",),
    "mlp.shared_expert.fc2.": ("mlp.shared_experts.linear_fc2.",),
}
# Megatron's names of what is no layer's, and ours.
OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "embedding.position_embeddings.weight": "model.embed_positions.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
}
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # by entries of no token
# Parts of our MoE layer, and their names below an exported one's.
EXPERT_PARTS = {
    "weight1": "fc1.weight",
    "bias1": "fc1.bias",
    "weight2": "fc2.weight",
    "bias2": "fc2.bias",
}
MOE_PARTS = {
    "router.weight": "router.weight",
    "router.bias": "router.bias",
    "gate.linear.weight": "combine.weight",
    "gate.linear.bias": "combine.bias",
    "fill_rows.values": "discrete.table",
    "output_norm.weight": "discrete.output_norm.weight",
    "output_norm.bias": "discrete.output_norm.bias",
    "memory_gate.linear.weight": "memory.gate.weight",
    "memory_gate.linear.bias": "memory.gate.bias",
}


def outer_tensors(reader: CheckpointReader, vocab_size: int, is_tied: bool) -> Named:
    """Embeddings, the last norm and the output layer; entries that pad the vocabulary are left
    out: nothing is ever told to be one."""
    needed = {*PADDED[:1], *([] if is_tied else PADDED[1:])}
    for name, ours in OUTER.items():
        if name in needed or (name in reader and name not in PADDED):
            tensor = reader.read(name)
            yield ours, tensor[:vocab_size].contiguous() if name in PADDED else tensor


def layer_tensors(reader: CheckpointReader, layer: int) -> Named:
    """What of layer ``layer`` (from 0) is stored as it is read: attention, norms, dense MLPs."""
    for ours, names in PLAIN.items():
        for part, theirs in product(("weight", "bias"), names):
            if reader.has_of_layer(layer, theirs + part):
                tensor = reader.read_of_layer(layer, theirs + part)
                yield f"model.layers.{layer}.{ours}{part}", tensor


def moe_tensors(layer: VQMoELayer, iteration: int) -> Named:
    """Of a loaded MoE layer: router, experts by their global numbers, table, gate and memory."""
    prefix = f"model.layers.{layer.layer_number - 1}.mlp."
    vq, experts = layer.vq, layer.experts
    if vq.path != "discrete":
        if layer.config.num_moe_experts > 1:
            yield f"{prefix}router.weight", _cpu(layer.router.weight)
            bias = layer.router.bias
            zeros = torch.zeros(layer.config.num_moe_experts)
            yield f"{prefix}router.bias", zeros if bias is None else _cpu(bias)
        for part, ours in EXPERT_PARTS.items():
            stacked = getattr(experts, part, None)
            for number, tensor in enumerate([] if stacked is None else stacked):
                yield f"{prefix}experts.{number}.{ours}", _cpu(tensor)
    if vq.path == "filled":
        for name, tensor in filled_table(layer).items():
            yield f"{prefix}discrete.{name}", tensor
    elif vq.path != "continuous":
        found, settings = layer_table(layer, iteration)
        for name, tensor in found.items():
            owner, _, part = name.rpartition(".")
            place = {"gate": "combine.", "output_norm": "discrete.output_norm."}
            yield f"{prefix}{place.get(owner, 'discrete.')}{part}", tensor
    if (of_memory := memory_rows(layer, iteration)) is not None:
        for name, tensor in of_memory[0].items():
            yield f"{prefix}memory.{name}", tensor


def stream_tensors(stream: CodeStream, iteration: int) -> Named:
    """The codes of tokens and contexts, once for the model."""
    for name, tensor in memory_codes(stream, iteration)[0].items():
        is_index = not tensor.is_floating_point()
        yield f"model.memory_codes.{name}", tensor if is_index else exported(tensor)


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
