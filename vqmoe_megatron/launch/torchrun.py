"""torchrun, and our own local ranks, which get the same variables."""

from __future__ import annotations

from vqmoe_megatron.launch.substrate import Substrate


class Torchrun(Substrate):
    """``torchrun`` or ``vqmoe pretrain --nproc``."""

    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    starter = "torchrun"
