"""From a step's results and the layers' statistics to one metrics record on rank 0.

L MoE layers over all pipeline stages, N experts, C code slices, K codes per slice.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.metrics.table import layer_metric
from vqmoe_megatron.moe.step_owner import LayerStatistics
from vqmoe_megatron.runtime.versions import clear_moe_log, moe_log_values


@dataclass
class LayerWindow:
    """Layer statistics since the last log, by 1-based layer number and then by name.

    Loads, usages, reads and scalars that the metric table sums over steps are summed; other scalars
    are the latest step's.
    """

    layers: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(self, layers: list[LayerStatistics]) -> None:
        """Add one step; a skipped one has no layers. No communication, no host sync.

        Raises:
            ValueError: for a scalar without a row in the metric table.
        """
        for layer in layers:
            known = self.layers.setdefault(layer.layer_number, {})
            sums = {"expert_load": layer.expert_load, "code_usage": layer.code_usage}
            sums["row_reads"] = layer.row_reads
            for name, value in layer.scalars.items():
                if layer_metric(name).over_steps == "sum":
                    sums[name] = value
                else:
                    known[name] = value
            for name, value in sums.items():
                if value is not None:
                    known[name] = known[name] + value if name in known else value.clone()


def gather_layers(window: LayerWindow) -> dict[int, dict[str, float | np.ndarray]]:
    """Collect every stage's layers on every rank, by 1-based layer number.

    Communicates: one object gather over the pipeline-parallel group; statistics are already equal
    within a stage.
    """
    mine = {
        number: {
            name: value.cpu().numpy() if value.dim() else value.item()
            for name, value in entry.items()
        }
        for number, entry in window.layers.items()
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict] = [{}] * group.size()
    torch.distributed.all_gather_object(stages, mine, group=group)
    gathered: dict[int, dict] = {}
    for number, entry in sorted(
        ((n, entry) for stage in stages for n, entry in stage.items()), key=lambda row: row[0]
    ):
        gathered[number] = gathered.get(number, {}) | entry  # what is no layer is on every stage
    return gathered


def layer_record(layers: dict[int, dict[str, float | np.ndarray]]) -> dict[str, float]:
    """Per-layer scalars, and their mean or sum over layers as the metric table says."""
    record: dict[str, float] = {}
    collected: dict[str, list[float]] = {}
    for number, entry in layers.items():
        for scalar, value in entry.items():
            if not np.ndim(value):
                record[layer_metric(scalar).name_of_layer(number)] = float(value)
                collected.setdefault(scalar, []).append(float(value))
    for scalar, values in collected.items():
        metric = layer_metric(scalar)
        record[metric.name] = float(
            np.sum(values) if metric.reduction == "sum" else np.mean(values)
        )
    return record


def balance_loss(config: RunConfig, num_steps: int, num_microbatches: int) -> dict[str, float]:
    """Mean load-balancing loss since the last log, over MoE layers; clears Megatron's tracker.

    Communicates over ``tp_dp_cp`` and the pipeline group. Whether it does follows from the
    configuration alone: a pipeline stage without MoE layers has an empty tracker and takes part.
    """
    model = config.model
    has_loss = model.moe_router_load_balancing_type != "none" and model.moe_aux_loss_coeff > 0
    has_router = config.vq.has_router(model.num_moe_experts)
    if not has_loss or not has_router or not num_steps:
        return {}
    values = torch.zeros(model.num_layers, device=torch.cuda.current_device())
    for name, part, is_global in moe_log_values():
        if name.endswith("load_balancing_loss"):
            # Each rank holds a part of its data-parallel rank's loss, or of the global one.
            dp_size = 1 if is_global else parallel_state.get_data_parallel_world_size()
            values += part / dp_size
    clear_moe_log()
    replicas = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(values, group=replicas)
    torch.distributed.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    num_moe_layers = len(range(0, model.num_layers, model.moe_layer_freq))
    total = float(values.sum()) / num_moe_layers
    return {"moe/load_balancing_loss": total / (num_steps * num_microbatches)}


def peak_rss_bytes() -> float:
    """Largest peak resident set of any rank. Communicates: one all-reduce over the world."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(
        float(kilobytes * 1024), dtype=torch.float64, device=torch.cuda.current_device()
    )
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return float(peak)


def write_routing(
    path: Path, layers: dict[int, dict[str, float | np.ndarray]], addresses: Sequence[str] = ()
) -> None:
    """Write ``routing.npz`` for the plots; layers without a codebook carry no code usage.

    ``addresses`` names those of a code memory, whose reads are the model's, as layer 0, or of its
    layers.
    """
    routed = {n: e for n, e in layers.items() if "expert_load" in e}
    if not routed:
        return
    arrays = {
        "layer_numbers": np.array(list(routed)),
        "expert_load": np.stack([e["expert_load"] for e in routed.values()]),
        "combine_discrete_weight": np.array(
            [e["combine_discrete_weight"] for e in routed.values()]
        ),
    }
    if all("code_usage" in e for e in routed.values()):
        arrays["code_usage"] = np.stack([e["code_usage"] for e in routed.values()])
    if reads := {n: e["row_reads"] for n, e in layers.items() if "row_reads" in e}:
        arrays["row_reads"] = np.stack(list(reads.values()))
        arrays["row_reads_of"] = np.array(list(reads))
        arrays["row_addresses"] = np.array(addresses)
    np.savez(path, **arrays)
