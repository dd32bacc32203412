"""DeepSpeed's optimizer, as checkpoints ask of Megatron's.

Adam's state is stored by parameter and under Megatron's names, so that any engine resumes it:
ZeRO's partitions are put together one parameter at a time (DeepSpeed's tensor fragments), kept
where the parameter's first replica is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)

ADAM_STATE = ("exp_avg", "exp_avg_sq")
MAIN_COPY = "fp32_param"


class DeepSpeedOptimizer:
    """Of one rank.

    Args:
        engine: DeepSpeed's.
        adam: the torch optimizer inside.
        of_groups: the model's parameters that each of its groups moves.
        has_main_copies: whether fp32 copies are kept beside the model's own parameters.
    """

    def __init__(
        self,
        engine: Any,
        adam: torch.optim.Optimizer,
        of_groups: list[list[torch.nn.Parameter]],
        has_main_copies: bool,
    ) -> None:
        self.engine, self.optimizer, self.has_main_copies = engine, adam, has_main_copies
        self.of_groups = of_groups
        self.parameters = [p for group in of_groups for p in group]
        self.chained_optimizers = [self]  # what Megatron's chain of optimizers has

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's, whose rates a schedule sets."""
        return self.optimizer.param_groups

    @property
    def is_cut(self) -> bool:
        """Whether the state lies in partitions of ZeRO's."""
        return self.engine.zero_optimization()

    def sharded_state_dict(
        self, model_sharded_state_dict: dict, is_loading: bool = False, metadata: Any = None
    ) -> dict[str, ShardedBase]:
        """Adam's moments, and the main copies of bf16 training, by their global names.

        Communicates: under ZeRO one gather per parameter and value over its replicas.
        """
        if self.is_cut:
            self._link_state()
        found = get_param_id_to_sharded_param_map(model_sharded_state_dict, iter(self.parameters))
        state = {}
        for number, parameter in enumerate(self.parameters):
            for name in self._stored_names():
                whole = torch.empty_like(parameter, dtype=torch.float32)
                if not is_loading:
                    whole.copy_(self._get(parameter, name))
                part = make_sharded_optimizer_tensor(
                    found[number], whole, prefix=f"optimizer.state.{name}"
                )
                state[f"{number}.{name}"] = part
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take what :meth:`sharded_state_dict` asked for, and the model's own parameters as main
        copies where none are stored. No communication."""
        for number, parameter in enumerate(self.parameters):
            for name in self._stored_names():
                self._set(parameter, name, state[f"{number}.{name}"])
        if not self.has_main_copies:
            self.reload_model_params()

    def reload_model_params(self, parameters: list[torch.nn.Parameter] | None = None) -> None:
        """Make main copies of these parameters, or all, as they are now. No communication."""
        if self.is_cut:
            for parameter in self.parameters if parameters is None else parameters:
                safe_set_full_fp32_param(parameter, parameter.detach().float())

    def _link_state(self) -> None:
        """Let parameters find their part of Adam's state, which DeepSpeed does after a first step
        only."""
        for parameters, group in zip(self.of_groups, self.param_groups, strict=True):
            (flat,) = group["params"]
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _stored_names(self) -> Iterator[str]:
        yield from ADAM_STATE
        if self.has_main_copies:
            yield MAIN_COPY

    def _get(self, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
        if not self.is_cut:
            return self.optimizer.state[parameter][name]
        if name == MAIN_COPY:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, name)

    def _set(self, parameter: torch.nn.Parameter, name: str, value: torch.Tensor) -> None:
        if not self.is_cut:
            self.optimizer.state[parameter][name].copy_(value)
        elif name == MAIN_COPY:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, name)
