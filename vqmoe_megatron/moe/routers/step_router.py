"""A router with settings of its own and what ends once per optimizer step: base of the baselines.

T tokens, N experts, H hidden size.

``topk`` of a router is the number of rows of every token at this moment, not only
``config.moe_router_topk``. What a step leaves behind (biases, a counter of steps) is a buffer, so
that checkpoints hold it; the layer moves it together with codebooks, once per optimizer step that
is taken, and neither in evaluation nor in recomputed passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import RouterConfig
from vqmoe_megatron.moe.routers.topk import BalancedRouter
from vqmoe_megatron.moe.step_statistics import KeepsStatistics
from vqmoe_megatron.moe.token_stream import TokenStream

ROUTER_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
}  # None: the input's


class StepRouter(KeepsStatistics, BalancedRouter):
    """Megatron's ``TopKRouter`` to build on. Its own step does nothing by default.

    Args:
        config: of the model.
        pg_collection: ``tp``, ``cp``, ``tp_cp``, ``tp_dp_cp``.
        settings: with every null filled in (:meth:`RouterConfig.for_run`).
        seed: of random choices, the same on all ranks.
        tokens: the model's token ids; None for a router that does not ask for them.
        of_newer_megatron: what newer Megatrons pass to a router besides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        settings: RouterConfig | None = None,
        seed: int = 1234,
        tokens: TokenStream | None = None,
        **of_newer_megatron: Any,
    ) -> None:
        super().__init__(config, pg_collection, **of_newer_megatron)
        self.settings = settings or RouterConfig()
        self.seed = seed
        self.tokens = tokens

    def setting(self, name: str) -> Any:
        """The value of a setting that must be there.

        Raises:
            ValueError: for one that is left null, which only a run can fill in.
        """
        if (value := getattr(self.settings, name)) is None:
            raise ValueError(
                f"router.{name} is null and this {type(self).__name__} is built outside a run; "
                "give it, or RouterConfig.for_run(...)"
            )
        return value

    def new_weight(self, *shape: int) -> torch.nn.Parameter:
        """A trained tensor drawn as Megatron draws a router's, replicated on all ranks."""
        drawn = torch.empty(*shape, dtype=torch.float32, device=torch.cuda.current_device())
        if self.config.perform_initialization:
            self.config.init_method(drawn)
        return self.replicated(drawn)

    def replicated(self, values: torch.Tensor) -> torch.nn.Parameter:
        """A parameter of ``values``, whose gradient is summed over sequence shards."""
        parameter = torch.nn.Parameter(values.to(self.config.params_dtype))
        parameter.sequence_parallel = self.config.sequence_parallel
        return parameter

    def attach_loss(self, probs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """``probs`` [T, N] that carry ``loss``, a mean over this rank's tokens, as a mean over all
        tokens of the microbatch, at its weight. No communication."""
        num_parts = self.tp_cp_group.size()
        loss = loss / num_parts
        if self.calculate_per_token_loss:  # Megatron then divides by the tokens of the batch
            loss = loss * (probs.shape[0] * num_parts)
        return MoEAuxLossAutoScaler.apply(probs, loss)

    @property
    def is_trained_now(self) -> bool:
        """Whether this pass is of training, and will be differentiated."""
        return self.training and torch.is_grad_enabled()

    # What ends once per optimizer step (moe/step_owner.py), called by the layer.
    def local_parts(self) -> list[torch.Tensor]:
        """This rank's fp32 sums of the step, in the order of :meth:`apply_parts`."""
        return []

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What reduced sums say: fp32 scalars by metric name. Moves nothing."""
        return {}

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move by the sums over all replicas; return scalars. No communication."""
        return self.scalars_of(reduced)

    def clear_step(self) -> None:
        """Forget the step."""


class CountsSteps(StepRouter):
    """A router that behaves otherwise as training goes on: it counts the optimizer's steps.

    ``steps_taken`` is the buffer that checkpoints hold; the host knows its value, so that no pass
    has to wait for the device.
    """

    steps_taken: torch.Tensor  # int64 scalar

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = torch.cuda.current_device()
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64, device=device))
        self.num_steps = 0  # on the host

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Count the step."""
        scalars = super().apply_parts(reduced)
        self.steps_taken += 1
        self.num_steps += 1
        self.steps_changed()
        return scalars

    def steps_changed(self) -> None:
        """``num_steps`` is another: the step ended, or a checkpoint was loaded."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.num_steps = int(self.steps_taken)
        self.steps_changed()
