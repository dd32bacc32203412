"""VQ losses and code usage in Megatron's own MoE log, beside its balance losses.

M metrics, L transformer layers of the whole model (multi-token prediction included).

Megatron's ``track_moe_metrics`` shows everything in its tracker, multiplied by 1 / microbatches and
averaged over MoE layers, on the last pipeline stage; it sums over stages only the names its caller
lists (``track_names``), and a training script does not know ours. So where every stage holds such
layers the values are brought to the last stage here, and no other stage keeps any: the log is right
whether the names are listed or not.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

from vqmoe_megatron.moe.step_owner import LayerStatistics, StepOwner

# By the names of our own metrics; for ``track_names`` of a caller that lists them.
METRIC_NAMES = {
    "expert_load_imbalance": "moe/expert_load_imbalance",
    "combine_discrete_weight": "vq/combine_discrete_weight",
    "code_perplexity": "vq/code_perplexity",
    "dead_codes": "vq/dead_codes",
    "revived_codes": "vq/revived_codes",
    "assignment_change_rate": "vq/assignment_change_rate",
    "commitment_loss": "vq/commitment_loss",
    "codebook_loss": "vq/codebook_loss",
}


def log_statistics(owners: list[StepOwner], layers: list[LayerStatistics]) -> None:
    """Add one step to Megatron's tracker; a no-op without layers.

    Communicates: one all-reduce of [M, L] over the pipeline group, where ``owners`` say that every
    stage has such layers; else every stage keeps its own.
    """
    if not layers:
        return
    config = owners[0].config
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    places = range(1, num_layers + 1)  # a layer outside a model may have none of them
    layers = [layer for layer in layers if layer.layer_number in places]
    values = torch.zeros(len(METRIC_NAMES), num_layers, device=torch.cuda.current_device())
    for layer in layers:
        nothing = values.new_zeros(())
        column = torch.stack([layer.scalars.get(name, nothing) for name in METRIC_NAMES])
        # Megatron divides by the number of microbatches.
        values[:, layer.layer_number - 1] = column * layer.num_microbatches
    numbers = [layer.layer_number for layer in layers]
    if all(owner.on_every_stage for owner in owners):
        torch.distributed.all_reduce(
            values, group=parallel_state.get_pipeline_model_parallel_group()
        )
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        numbers = list(places) if is_last else []
    for name, of_layers in zip(METRIC_NAMES.values(), values, strict=True):
        for number in numbers:
            save_to_aux_losses_tracker(name, of_layers[number - 1], number, num_layers)
