"""One layer's discrete path as a table: every code row through its expert, once.

H hidden size, C code slices, K codes per slice, D = H / C (for low_dim
the codebook's own). Row ids are ``slice * K + code``.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.moe.executions.step_table import StepTable
from vqmoe_megatron.moe.filled_path import FilledPath
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.norms import NoNorm
from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.table_layer import TableSettings


@torch.no_grad()
def layer_table(layer: VQMoELayer, iteration: int) -> tuple[dict[str, torch.Tensor], TableSettings]:
    """Return the tensors and settings that a :class:`TableLayer` is made of, on the CPU.

    Args:
        layer: in code space, in evaluation, its codebook initialised.
        iteration: of the checkpoint it comes from.

    Tensors are fp32 (fp64 for an fp64 layer); the experts run in their own dtype.

    Communicates as ``CodeSpace.evaluate``: over the expert-tensor and expert-parallel groups.

    Raises:
        ValueError: when the codebook has not seen any data yet.
    """
    (path,) = layer.discrete_paths
    execution, codebook = path.execution, path.assigner.codebook
    space = execution.space if isinstance(execution, StepTable) else execution
    _refuse_without_codes(layer, codebook)
    dtype = next(layer.experts.parameters()).dtype
    values = space.evaluate(dtype).values  # [slots, H], in the order of the experts' ranks
    tensors = {
        "codes": codebook.code_vectors(),
        "table": values.index_select(0, space.rows.slot_of_row),
    }
    tensors |= codebook.space
    norm, has_norm = space.parts.output_norm, not isinstance(space.parts.output_norm, NoNorm)
    place = "none" if not has_norm else "in_table" if space.table_norm is norm else "after_sum"
    if place == "after_sum":
        tensors |= {f"output_norm.{name}": part for name, part in norm.named_parameters()}
    is_dual = layer.vq.path == "dual"
    if is_dual:
        tensors |= {f"gate.{name}": part for name, part in layer.gate.linear.named_parameters()}
    settings = TableSettings(
        quantizer=layer.vq.quantizer,
        path=layer.vq.path,
        combine=layer.vq.combine if is_dual else "none",
        num_code_slices=layer.vq.num_code_slices,
        normalization=layer.config.normalization if has_norm else "none",
        normalization_eps=float(norm.eps) if has_norm else 0.0,
        output_norm=place,
        layer_number=layer.layer_number,
        iteration=iteration,
        computed_in=str(dtype).removeprefix("torch."),
        code_memory="added" if layer.memory is not None else "none",
    )
    return {name: exported(tensor) for name, tensor in tensors.items()}, settings


@torch.no_grad()
def filled_table(layer: VQMoELayer) -> dict[str, torch.Tensor]:
    """What a layer of ``vq.path=filled`` reads by code, on the CPU; as :func:`layer_table`.

    N experts. ``codes [1, K, D]`` with what their space is made of; ``table [N K, H]``, every
    expert's answer to every code (none for num_fill_experts=0: no rows); with threshold routing
    its ``tau``.
    """
    (path,) = (path for path in layer.paths if isinstance(path, FilledPath))
    codebook, fill = path.assigner.codebook, path.fill
    _refuse_without_codes(layer, codebook)
    tensors = {"codes": codebook.code_vectors(), **codebook.space}
    tensors["table"] = codebook.codes.new_zeros(0, layer.config.hidden_size)
    if fill is not None:
        space = fill.space if isinstance(fill, StepTable) else fill
        tensors["table"] = space.evaluate(next(layer.experts.parameters()).dtype).values
    if path.threshold is not None:
        tensors["tau"] = path.threshold.tau
    return {name: exported(tensor) for name, tensor in tensors.items()}


def _refuse_without_codes(layer: VQMoELayer, codebook: Codebook) -> None:
    if codebook.needs_data_init:
        raise ValueError(
            f"layer {layer.layer_number}: its codes are not initialised, which the first training "
            "step does; export a checkpoint of iteration 1 or later"
        )


def exported(tensor: torch.Tensor) -> torch.Tensor:
    """As files hold it: on the CPU, in fp32 (fp64 for fp64)."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype).contiguous()
