"""VQ losses and code usage in Megatron's own MoE log, beside its balance losses.

M metrics, L transformer layers of the whole model (multi-token prediction included).

Megatron's ``track_moe_metrics`` shows everything in its tracker, multiplied by 1 / microbatches and
averaged over MoE layers, on the last pipeline stage; it sums over stages only the names its caller
lists (``track_names``), and a training script does not know ours. So the values are brought to the
last stage here, and on the others they are zero: the log is right whether the names are listed or
not. That needs every stage; where some may hold no VQMoE layer, nothing is logged, and said so.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from vqmoe_megatron.metrics.table import layer_metrics
from vqmoe_megatron.moe.step_owner import StepOwner
from vqmoe_megatron.runtime.versions import add_to_moe_log

_said: set[str] = set()


def logged_names() -> dict[str, str]:
    """What a layer calls a scalar -> its name in the log; for a caller that lists ``track_names``.

    The rows of layers in the metric table, without those that are known only after the codebook's
    step.
    """
    rows = layer_metrics()
    return {scalar: row.name for scalar, row in rows.items() if not row.needs_update}


def log_statistics(owners: list[StepOwner]) -> None:
    """Add the reduced sums of one step to Megatron's tracker.

    Communicates: one all-reduce of [M, L] over the pipeline group, which every stage joins.
    """
    if not owners:
        return
    config = owners[0].config
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    if num_stages > 1 and not all(owner.on_every_stage for owner in owners):
        _say_once(
            "VQ metrics are not in Megatron's MoE log: not every pipeline stage is known to hold a "
            "VQMoE layer; get_vqmoe_block_spec and vqmoe_layer_spec know"
        )
        return
    names = logged_names()
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    values = torch.zeros(len(names), num_layers, device=torch.cuda.current_device())
    for owner in owners:
        # A layer outside a model may have no place among them.
        if owner.sums is not None and owner.layer_number in range(1, num_layers + 1):
            scalars = owner.scalars_of(iter(owner.sums.parts))
            nothing = values.new_zeros(())
            column = torch.stack([scalars.get(name, nothing) for name in names])
            # Megatron divides by the number of microbatches.
            values[:, owner.layer_number - 1] += column * owner.sums.num_microbatches
    if num_stages > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_reduce(values, group=group)
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            values.zero_()
    for name, of_layers in zip(names.values(), values, strict=True):
        for number, value in enumerate(of_layers, start=1):
            add_to_moe_log(name, value, number, num_layers)


def _say_once(text: str) -> None:
    if text not in _said and parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        _said.add(text)
        print(text, flush=True)
