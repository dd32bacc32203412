"""What keeps the discrete path out of a CUDA graph, or its table from being built during attention.

Neither is an error: the run goes on without, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout


def capture_obstacles(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    """Yield a reason for each thing about ``train.cuda_graphs`` that a graph cannot repeat."""
    vq, model = config.vq, config.model
    if not vq.in_code_space:
        yield f"{vq.execution_in_words}: shapes follow the data"
        return
    if vq.table_per_step:
        yield "vq.table_per_step: the table belongs to a step, not to a microbatch"
    if not model.bf16:
        yield (
            "model.bf16=false: on CUDA torch reads the counts of grouped products on the host, but "
            "for bf16"
        )
    if vq.train_projection:
        yield "vq.train_projection: its gradient comes from in and around the graph, untried"
    if vq.overlap_table:
        yield "vq.overlap_table: the table is built outside of the path"
    num_owners = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    if vq.straight_through in ("token", "group") and num_owners > 1:
        yield (
            f"vq.straight_through={vq.straight_through} with EP * ETP = {num_owners}: gradients "
            "travel to the owners of their codes in counts that the host reads; identity and none "
            "send nothing"
        )
    if layout.pipeline_model_parallel_size > 1:
        yield (
            f"PP = {layout.pipeline_model_parallel_size}: several microbatches are under way at "
            "once, and a graph keeps the activations of one"
        )
    if model.recompute_granularity == "full" or _recomputes_moe(config):
        yield "recomputed MoE layers: a graph keeps its activations"
    if config.optimizer.overlap_param_gather:
        yield "optimizer.overlap_param_gather: weights arrive in hooks, which a replay does not run"


def starts_tables(config: RunConfig) -> bool:
    """Whether ``vq.overlap_table`` builds tables before attention.

    With optimizer.overlap_param_gather the stream that first asks for weights waits for them, and
    attention, on the other stream, would read those of the same bucket before they are there.
    """
    is_read = not (config.optimizer.overlap_param_gather or _recomputes_moe(config))
    return config.vq.overlap_table and is_read


def starts_rows(config: RunConfig) -> bool:
    """Whether a code memory's rows travel from before attention on: as tables, they are read of
    weights that optimizer.overlap_param_gather may still be bringing."""
    return config.code_memory.is_on and not config.optimizer.overlap_param_gather


def overlap_obstacles(config: RunConfig, has_cuda: bool) -> Iterator[str]:
    """Yield a reason why ``vq.overlap_table`` overlaps nothing."""
    if not has_cuda:
        yield "there is one stream on a CPU: each table is built before attention, not beside it"
    if _recomputes_moe(config):
        yield "recompute_modules=moe: the pass that keeps gradients builds its table itself"
    if config.optimizer.overlap_param_gather:
        yield (
            "optimizer.overlap_param_gather: weights arrive for the stream that asks first, and "
            "the other one would not wait for them"
        )


def _recomputes_moe(config: RunConfig) -> bool:
    """Whether MoE layers alone run again in the backward pass."""
    model = config.model
    is_selective = model.recompute_granularity == "selective"
    return is_selective and "moe" in (model.recompute_modules or ())
