"""Where each rank stands in the layout, in Megatron's default order ``tp-cp-ep-dp-pp``.

The leftmost axis varies fastest. Megatron lays two grids over the same ranks; both have PP
outermost, so a rank's pipeline stage is the same in both:

    dense    rank = tp  + TP  * (cp + CP * (dp  + DP  * pp))
    experts  rank = etp + ETP * (ep + EP * (edp + EDP * pp))

    TP 2, PP 2, EP 2, 8 ranks:   rank       0  1  2  3 | 4  5  6  7
                                 (tp, dp)  00 10 01 11 |00 10 01 11
                                 (ep, edp) 00 10 01 11 |00 10 01 11
                                 pp          stage 0   |  stage 1
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.plan.layout import ParallelLayout


@dataclass(frozen=True)
class RankCoordinates:
    """One rank's place along every axis of both grids."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_tensor: int
    expert_data: int


def rank_grid(layout: ParallelLayout) -> list[RankCoordinates]:
    """Return the coordinates of ranks ``0 .. world_size-1``, in order. Communicates nothing.

    Raises ``ValueError`` when a grid does not tile the world.
    """
    for name, size in (
        ("TP * PP * CP", layout.dense_ranks),
        ("EP * ETP * PP", layout.expert_ranks),
    ):
        if layout.world_size % size:
            raise ValueError(
                f"world_size % ({name}) != 0: {layout.world_size} % {size} = "
                f"{layout.world_size % size}"
            )
    return [_coordinates(rank, layout) for rank in range(layout.world_size)]


def _coordinates(rank: int, layout: ParallelLayout) -> RankCoordinates:
    tensor, outer = _split(rank, layout.tensor_model_parallel_size)
    context, outer = _split(outer, layout.context_parallel_size)
    data, pipeline = _split(outer, layout.data_parallel_size)
    expert_tensor, outer = _split(rank, layout.expert_tensor_parallel_size)
    expert, outer = _split(outer, layout.expert_model_parallel_size)
    expert_data, _ = _split(outer, layout.expert_data_parallel_size)
    return RankCoordinates(
        rank=rank,
        tensor=tensor,
        context=context,
        data=data,
        pipeline=pipeline,
        expert=expert,
        expert_tensor=expert_tensor,
        expert_data=expert_data,
    )


def _split(index: int, size: int) -> tuple[int, int]:
    """Peel the fastest axis off an index: its coordinate and the index over the other axes."""
    outer, coordinate = divmod(index, size)
    return coordinate, outer
