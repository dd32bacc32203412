"""How many parameters a model has, by part: in total, used by one token, and on a rank.

A token uses: its row of the word embedding (and of learned positions); attention, norms, dense
MLPs, router, gates and the output layer whole; the codebook whole, because every code is compared;
of the experts those that its rows meet, k continuous and C discrete ones (as many experts as rows,
also when two meet the same, but at most all); and its C learned inputs. In code space an expert
runs once per code and not once per token: its weights count for the token all the same, because the
token's output comes from them. Per path of the recipe:

    path=continuous   k experts, router                    (a plain sparse mixture of experts)
    path=discrete     C experts, codebook                  (no router)
    path=dual         k + C experts, router, codebook, gate

Tied embeddings count once, and whole, because the output layer uses all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_cost import layer_parameters
from vqmoe_megatron.plan.model_parameters import (
    PARTS,
    Parameter,
    is_moe_layer,
    stage_parameters,
    unsharded,
)


@dataclass(frozen=True)
class ParameterCount:
    """Elements by part, and by rank of every pipeline stage."""

    total_by_part: dict[str, int]  # replicas once, a tied table once
    active_by_part: dict[str, int]  # used by one token
    per_rank_by_part: tuple[dict[str, int], ...]  # of each stage; equal for all its TP, EP places

    @property
    def total(self) -> int:
        """Of the model."""
        return sum(self.total_by_part.values())

    @property
    def active(self) -> int:
        """Used by one token."""
        return sum(self.active_by_part.values())

    @property
    def per_rank(self) -> tuple[int, ...]:
        """On one rank of each pipeline stage."""
        return tuple(sum(parts.values()) for parts in self.per_rank_by_part)


def count_parameters(config: RunConfig, layout: ParallelLayout) -> ParameterCount:
    """Count the model of a recipe at a layout that passed the check.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    whole = LayerShape.from_config(config, unsharded())
    total = _by_part(p for chunk in stage_parameters(config, unsharded(), 0) for p in chunk)
    stages = range(layout.pipeline_model_parallel_size)
    return ParameterCount(
        total_by_part=total,
        active_by_part=_active(config, whole, total),
        per_rank_by_part=tuple(
            _by_part(p for chunk in stage_parameters(config, layout, stage) for p in chunk)
            for stage in stages
        ),
    )


def num_moe_layers(config: RunConfig) -> int:
    """Layers that hold experts."""
    model = config.model
    return sum(is_moe_layer(model, number) for number in range(model.num_layers))


def _active(config: RunConfig, whole: LayerShape, total: dict[str, int]) -> dict[str, int]:
    model, moe_layers = config.model, num_moe_layers(config)
    of_layer = layer_parameters(whole)
    active = dict(total)
    if model.untie_embeddings_and_output_weights:
        num_tables = 2 if model.position_embedding_type == "learned_absolute" else 1
        active["embeddings"] = num_tables * model.hidden_size
    elif model.position_embedding_type == "learned_absolute":
        active["embeddings"] -= (model.seq_length - 1) * model.hidden_size
    active["experts"] = moe_layers * of_layer.active_experts
    if "learned_inputs" in active:
        active["learned_inputs"] = moe_layers * of_layer.active_learned_inputs
    return active


def _by_part(parameters: Iterable[Parameter]) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    for parameter in parameters:
        counts[parameter.part] += parameter.num_elements
    return {part: count for part, count in counts.items() if count}
