"""How many parameters a model has: in total, used by one token, and on a rank.

Letters are those of ``parameters``. A token uses its row of the word
embedding (and of learned positions); attention, norms, dense MLPs, shared expert, router, gates and
the output layer whole; the codebook whole, because every code is compared; of the experts those
that its rows meet, k continuous and C discrete ones (as many experts as rows, also when two meet
the same, but at most all); and its C learned inputs. In code space an expert runs once per code and
not once per token: its weights count for the token all the same, because the token's output comes
from them:

    path=continuous   k experts, router                    (a plain sparse mixture of experts)
    path=discrete     C experts, codebook                  (no router)
    path=dual         k + C experts, router, codebook, gate
    one expert        path=continuous is dense, all of it used; no path has a router
    path=filled       max(k, n) experts, n those that answer by code, router, codebook; with learned
                      rows k experts and n rows

Of a code memory a token uses A of the A M rows of a layer; with ``code_memory.values=experts`` also
the A experts that those are brought to; its gate and the codes of hidden states whole.

Tied embeddings count once, and whole, because the output layer uses all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout, unsharded
from vqmoe_megatron.plan.parameters import (
    PARTS,
    ChunkPlace,
    is_moe_layer,
    num_moe_layers,
    num_token_ids,
    stage_parameters,
)
from vqmoe_megatron.plan.router_cost import num_rows_not_read
from vqmoe_megatron.plan.shape import LayerShape


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


def count_trained(config: RunConfig) -> int:
    """Elements of the model that an optimizer moves; replicas once.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    chunks = stage_parameters(config, unsharded(), 0)
    return sum(p.num_elements for chunk in chunks for p in chunk if p.is_trained)


def count_parameters(config: RunConfig, layout: ParallelLayout) -> ParameterCount:
    """Count the model of a recipe at a layout that passed the check.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    total = _by_part(config, unsharded(), 0)
    stages = range(layout.pipeline_model_parallel_size)
    return ParameterCount(
        total_by_part=total,
        active_by_part=_active(config, total),
        per_rank_by_part=tuple(_by_part(config, layout, stage) for stage in stages),
    )


def _active(config: RunConfig, total: dict[str, int]) -> dict[str, int]:
    model, vq = config.model, config.vq
    active = dict(total)
    if config.vision.is_on:  # one position of S
        active["patches"] -= (model.seq_length - 1) * model.hidden_size
    elif model.untie_embeddings_and_output_weights:
        num_tables = 2 if model.position_embedding_type == "learned_absolute" else 1
        active["embeddings"] = num_tables * model.hidden_size
    elif model.position_embedding_type == "learned_absolute":
        active["embeddings"] -= (model.seq_length - 1) * model.hidden_size
    num_rows = 0 if vq.path == "discrete" else model.moe_router_topk
    num_rows += vq.num_code_slices if vq.has_discrete_path else 0
    if vq.has_fill_table:
        num_answers = vq.num_fill_experts or model.num_moe_experts
        if "fill_rows" in active:  # one of K
            active["fill_rows"] //= model.num_moe_experts * vq.num_codes
            active["fill_rows"] *= num_answers
        else:
            num_rows = max(num_rows, num_answers)
    active["experts"] = _active_experts(config, total["experts"], num_rows)
    if "router" in active:  # of words of a router's own, one
        layer, places = LayerShape.from_config(config, unsharded()), [_whole_model(model)]
        unread = num_rows_not_read(layer, num_token_ids(config))
        active["router"] -= num_moe_layers(model, places) * unread
    if "learned_inputs" in active:  # one of K per slice
        active["learned_inputs"] //= vq.num_codes
    if "memory_rows" in active:  # one of M per address
        active["memory_rows"] //= config.code_memory.num_rows
    return active


def _whole_model(model: ModelConfig) -> ChunkPlace:
    return ChunkPlace(range(model.num_layers), is_first=True, is_last=True)


def _active_experts(config: RunConfig, total: int, num_rows: int) -> int:
    """Elements of the experts that ``num_rows`` rows meet in every layer, and with them the learned
    inputs of a memory."""
    model, memory = config.model, config.code_memory
    numbers = [n for n in range(model.num_layers) if is_moe_layer(model, n)]
    of_one = total // len(numbers) // model.num_moe_experts
    num_experts = 0
    for number in numbers:
        reads = memory.values == "experts" and memory.carries(number + 1)
        of_layer = num_rows + (memory.num_addresses if reads else 0)
        num_experts += min(of_layer, model.num_moe_experts)
    return of_one * num_experts


def _by_part(config: RunConfig, layout: ParallelLayout, stage: int) -> dict[str, int]:
    found = [p for chunk in stage_parameters(config, layout, stage) for p in chunk]
    counts = {part: sum(p.num_elements for p in found if p.part == part) for part in PARTS}
    return {part: count for part, count in counts.items() if count}
