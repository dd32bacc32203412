"""Frozen codes are put back behind every optimizer's step, in any training loop.

torch's hook for all optimizers, which Megatron's wrap, runs after the parameters were written and
before Megatron's distributed optimizer gathers them: codes are fp32, so its shards are the model's
own memory. To put back twice, or behind the optimizer of another model, changes nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from vqmoe_megatron.vq.codebook import Codebook

_held: weakref.WeakSet[Codebook] = weakref.WeakSet()


def hold_frozen_codes(codebook: Codebook) -> None:
    """From now on put ``codebook``'s codes back while they are frozen; nothing for codes that no
    optimizer trains."""
    if codebook.hold is not None:
        _held.add(codebook)


def _after_an_optimizer_stepped(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    for codebook in _held:
        codebook.put_back_frozen()


register_optimizer_step_post_hook(_after_an_optimizer_stepped)
