"""What a folder of tables holds of a code memory: the codes of tokens, and the rows of a layer.

H hidden size, V vocabulary entries, R rows of a layer, K codes of hidden states.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.checkpoint.layer_table import exported
from vqmoe_megatron.config import CodeMemoryConfig
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.memory.code_search import USED_TABLES
from vqmoe_megatron.moe.memory.code_stream import CodeStream
from vqmoe_megatron.moe.memory.path import MemoryPath
from vqmoe_megatron.vq.memory_tables import MemorySettings

Exported = tuple[dict[str, torch.Tensor], MemorySettings]


def memory_codes(stream: CodeStream, iteration: int) -> Exported:
    """Tensors and settings that a :class:`MemoryCodes` is made of, on the CPU; of a loaded stream.

    No communication.
    """
    tensors = {} if stream.memory.codes == "hidden" else _tables(stream)
    return tensors, _settings(stream.memory, 0, iteration)


def _tables(stream: CodeStream) -> dict[str, torch.Tensor]:
    used = {name: getattr(stream, name) for name in USED_TABLES if hasattr(stream, name)}
    return {name: table.detach().cpu().contiguous() for name, table in used.items()}


@torch.no_grad()
def memory_rows(layer: VQMoELayer, iteration: int) -> Exported | None:
    """Tensors and settings that a :class:`MemoryLayer` is made of, on the CPU; None for a layer
    without memory.

    Args:
        layer: in evaluation, all of its rows on this rank.
        iteration: of the checkpoint it comes from.

    Tensors are fp32 (fp64 for an fp64 layer); experts that make rows run in their own dtype.

    Raises:
        ValueError: for a codebook of hidden states that has not seen any data yet.
    """
    path = next((path for path in layer.paths if isinstance(path, MemoryPath)), None)
    if path is None:
        return None
    places, own = path.values.places, path.own_rows()
    natural = torch.arange(places.num_rows, device=own.device)
    tensors = {"rows": own.index_select(0, places.slots(natural))}
    if path.gate is not None:
        tensors |= {f"gate.{name}": part for name, part in path.gate.linear.named_parameters()}
    if path.hidden is not None:
        codebook = path.hidden.assigner.codebook
        if codebook.needs_data_init:
            raise ValueError(
                f"layer {layer.layer_number}: the codes of its memory are not initialised, which "
                "the first training step does; export a checkpoint of iteration 1 or later"
            )
        tensors["codes"] = codebook.code_vectors()
    settings = _settings(path.settings, layer.layer_number, iteration)
    return {name: exported(tensor) for name, tensor in tensors.items()}, settings


def _settings(memory: CodeMemoryConfig, layer_number: int, iteration: int) -> MemorySettings:
    return MemorySettings(
        codes=memory.codes,
        num_rows=memory.num_rows,
        max_order=memory.max_order,
        num_context_codes=memory.num_context_codes,
        context_decay=memory.context_decay,
        gate=memory.gate,
        layer_number=layer_number,
        iteration=iteration,
    )
