"""What ``vqmoe pretrain`` needs of megatron-core beyond its public interface, asked of the library.

The layer works in newer Megatrons; our own loop also reads the tracker of balance losses and writes
checkpoints through Megatron's asynchronous request, and both have changed since 0.16.1. The library
is asked what it does, not which version it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker


def require_abilities() -> None:
    """Raise ``ValueError`` naming what this megatron-core does otherwise. No communication."""
    missing = list(
        missing_abilities(
            get_moe_layer_wise_logging_tracker, TorchDistSaveShardedStrategy.async_save
        )
    )
    if missing:
        raise ValueError(
            f"megatron-core {megatron.core.__version__} cannot run this command: "
            f"{'; '.join(missing)}. Install the one that setup.cfg names (pip install "
            "'megatron-core==0.16.1'); the layer itself works here, in a loop of Megatron's"
        )


def missing_abilities(
    get_tracker: Callable[[], Any], async_save: Callable[..., Any]
) -> Iterator[str]:
    """Yield one sentence for each thing that Megatron's functions do otherwise.

    Args:
        get_tracker: ``moe_utils.get_moe_layer_wise_logging_tracker``.
        async_save: ``TorchDistSaveShardedStrategy.async_save``.
    """
    if get_tracker() is not get_tracker():
        yield "its tracker of balance losses is a copy (moe_logging) that cannot be cleared"
    if "async_strategy" in inspect.signature(async_save).parameters:
        yield "its checkpoints are written by a choice of strategies (async_strategy)"
