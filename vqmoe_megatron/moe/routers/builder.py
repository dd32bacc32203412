"""From a router's name and settings to what Megatron's MoE layer builds: MoESubmodules.router."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vqmoe_megatron import registry
from vqmoe_megatron.config import RouterConfig
from vqmoe_megatron.moe.routers.step_router import StepRouter
from vqmoe_megatron.moe.token_stream import TokenStream

DEFAULT_ROUTER = "topk"


@dataclass(frozen=True)
class LayerRouter:
    """Which router the layers have, and what it is built with."""

    name: str = DEFAULT_ROUTER
    settings: RouterConfig | None = None  # None: the defaults, of which some need a run
    tokens: TokenStream | None = None  # the model's, for routers by token ids

    def builder(self, seed: int) -> Callable[..., torch.nn.Module]:
        """What Megatron calls with ``config`` and ``pg_collection``.

        Raises:
            ValueError: for an unknown name, or settings that this router does not have.
        """
        router = registry.load("router", self.name)
        settings = self.settings or RouterConfig()
        settings.check_taken(self.name)
        if not (isinstance(router, type) and issubclass(router, StepRouter)):
            return router
        return functools.partial(router, settings=settings, seed=seed, tokens=self.tokens)
