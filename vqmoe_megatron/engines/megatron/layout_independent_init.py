"""Draw every parameter from (seed, global name, global position), so all layouts start identical.

Megatron draws experts per expert-parallel rank and dense layers per tensor-parallel rank from one
stream per stage, so its initial weights depend on the layout. Here each parameter's global tensor
is cut into matrices (its last two axes, or the one of a vector); every matrix has its own
generator, and a rank draws only the matrices it holds a part of.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer import TransformerConfig

# Weights that Megatron initialises with its output_layer_init_method.
OUTPUT_WEIGHTS = ("linear_proj.weight", "linear_fc2.weight")
# Weights that it initialises with its embedding_init_method.
EMBEDDING_WEIGHTS = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
# Vectors that are drawn too: Megatron's of a router, and the biases of Transformer-XL's scores.
DRAWN_VECTORS = ("router.bias", "core_attention.content_bias", "core_attention.position_bias")
# A codebook draws from (seed, layer number) by itself and is then initialised from data; rows of a
# memory start at zero, or draw likewise, and its gate starts at one half.
OWN_INITIALISATION = (".codebook.", ".code_memory.", ".memory_gate.")
# Where layers hold different tensors, the layer's number stands in the name, else in the position.
NUMBERED_LAYER = re.compile(r"(?<=\.layers\.)(\d+)\.")


def redraw_parameters(model: torch.nn.Module, seed: int) -> None:
    """Redraw the matrices of ``model`` and the router biases in place.

    Other vectors (norms, biases) keep their constants.

    Args:
        model: a Megatron module with ``config`` and ``sharded_state_dict``.
        seed: of the whole model.

    No communication.
    """
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for part in sharded_tensors(model.sharded_state_dict()):
        # Stacked biases of grouped experts have two axes, but each expert's share is a vector.
        is_matrix = part.data is not None and part.data.dim() >= 2 and part.key.endswith("weight")
        is_drawn = is_matrix or part.key.endswith(DRAWN_VECTORS)
        if not is_drawn or any(name in part.key for name in OWN_INITIALISATION):
            continue
        if part.data.untyped_storage().data_ptr() in storages:
            _redraw(part, _draw_of(part.key, model.config), seed)


def _draw_of(key: str, config: TransformerConfig) -> Callable[[torch.Tensor], Any]:
    """Megatron's initialisation of the weight of that name."""
    if key.endswith(OUTPUT_WEIGHTS):
        return config.output_layer_init_method
    if key.endswith(EMBEDDING_WEIGHTS):
        return config.embedding_init_method
    return config.init_method


def sharded_tensors(state: Any) -> list[ShardedTensor]:
    """All ShardedTensors of a sharded state dict, factories built, in a fixed order."""
    found: list[ShardedTensor] = []
    if isinstance(state, ShardedTensor):
        found.append(state)
    elif isinstance(state, ShardedTensorFactory):
        found.extend(sharded_tensors(state.build()))
    elif isinstance(state, dict):
        for value in state.values():
            found.extend(sharded_tensors(value))
    elif isinstance(state, list | tuple):
        for value in state:
            found.extend(sharded_tensors(value))
    return found


@torch.no_grad()
def _redraw(part: ShardedTensor, draw: Callable[[torch.Tensor], Any], seed: int) -> None:
    """Fill each matrix (or the vector) of ``part`` with this rank's cut of the global draw."""
    local = part.data
    num_drawn = min(2, local.dim())  # axes of one draw: a matrix, or a vector
    shape, first = part.global_shape[-num_drawn:], part.global_offset[-num_drawn:]
    cut = tuple(
        slice(start, start + size)
        for start, size in zip(first, local.shape[-num_drawn:], strict=True)
    )
    num_prepended = len(part.global_offset) - local.dim()
    prepended = part.global_offset[:num_prepended]
    name, layer = NUMBERED_LAYER.sub("", part.key), map(int, NUMBERED_LAYER.findall(part.key))
    outer = *layer, *prepended
    stack_offset = part.global_offset[num_prepended:-num_drawn]
    for index in product(*(range(size) for size in local.shape[:-num_drawn])):
        place = (*outer, *(o + i for o, i in zip(stack_offset, index, strict=True)))
        drawn = torch.empty(shape, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(seed, name, place))
            draw(drawn)
        local[index].copy_(drawn[cut])


def _seed_of(seed: int, key: str, place: tuple[int, ...]) -> int:
    digest = hashlib.sha256(f"{seed}|{key}|{','.join(map(str, place))}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
