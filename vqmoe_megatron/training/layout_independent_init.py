"""Draw every parameter from (seed, global name, global position), so all layouts start identical.

Megatron draws experts per expert-parallel rank and dense layers per tensor-parallel rank from one
stream per stage, so its initial weights depend on the layout. Here each parameter's global tensor is
cut into matrices (its last two axes); every matrix has its own generator, and a rank draws only the
matrices it holds a part of.
"""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

# Weights that Megatron initialises with its output_layer_init_method.
OUTPUT_WEIGHTS = ("linear_proj.weight", "linear_fc2.weight")
# The codebook draws from (seed, layer number) by itself and is then initialised from data.
OWN_INITIALISATION = (".codebook.",)


def redraw_parameters(model: torch.nn.Module, seed: int) -> None:
    """Redraw the matrices of ``model`` in place; vectors (norms, biases) keep their constants.

    Args:
        model: a Megatron module with ``config`` and ``sharded_state_dict``.
        seed: of the whole model.

    No communication.
    """
    config = model.config
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for part in _sharded_tensors(model.sharded_state_dict()):
        # Stacked biases of grouped experts have two axes, but each expert's share is a vector.
        is_matrix = part.data is not None and part.data.dim() >= 2 and part.key.endswith("weight")
        if not is_matrix or any(name in part.key for name in OWN_INITIALISATION):
            continue
        if part.data.untyped_storage().data_ptr() in storages:
            is_output = part.key.endswith(OUTPUT_WEIGHTS)
            _redraw(
                part,
                config.output_layer_init_method if is_output else config.init_method,
                seed,
            )


def _sharded_tensors(state: Any) -> list[ShardedTensor]:
    """All ShardedTensors of a sharded state dict, factories built, in a fixed order."""
    found: list[ShardedTensor] = []
    if isinstance(state, ShardedTensor):
        found.append(state)
    elif isinstance(state, ShardedTensorFactory):
        found.extend(_sharded_tensors(state.build()))
    elif isinstance(state, dict):
        for value in state.values():
            found.extend(_sharded_tensors(value))
    elif isinstance(state, list | tuple):
        for value in state:
            found.extend(_sharded_tensors(value))
    return found


@torch.no_grad()
def _redraw(part: ShardedTensor, draw: Any, seed: int) -> None:
    rows, columns = part.global_shape[-2:]
    first_row, first_column = part.global_offset[-2:]
    local = part.data
    stack_shape = local.shape[:-2]
    prepended = part.global_offset[: len(part.global_offset) - local.dim()]
    stack_offset = part.global_offset[len(prepended) : -2]
    for index in product(*(range(size) for size in stack_shape)):
        place = (*prepended, *(o + i for o, i in zip(stack_offset, index, strict=True)))
        matrix = torch.empty(rows, columns, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(seed, part.key, place))
            draw(matrix)
        height, width = local.shape[-2:]
        local[index].copy_(
            matrix[first_row : first_row + height, first_column : first_column + width]
        )


def _seed_of(seed: int, key: str, place: tuple[int, ...]) -> int:
    digest = hashlib.sha256(f"{seed}|{key}|{','.join(map(str, place))}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
