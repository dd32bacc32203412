"""What replaces a function while one rank of a world that does not exist takes its step.

Each has its reason beside it. None of them calls or skips a collective of the step, so what is
counted is what the real code calls. R rows, P expert-parallel ranks, E expert-tensor ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from vqmoe_megatron.moe import code_space, expert_slopes, grouped_experts, layer
from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows
from vqmoe_megatron.training import optimizer as optimizer_of_training
from vqmoe_megatron.vq.code_map import mod_map


@contextmanager
def stand_ins(mode: FakeTensorMode) -> Iterator[None]:
    """Replace what cannot work on fake tensors or on a fake process group."""
    with ExitStack() as stack:
        for owner, name, replacement in (
            # Gloo groups beside fake ones would look for the other ranks.
            (
                optimizer_of_training,
                "get_megatron_optimizer",
                functools.partial(
                    optimizer_of_training.get_megatron_optimizer, use_gloo_process_groups=False
                ),
            ),
            # Objects travel as bytes, which fake tensors have not; in Megatron's optimizer all
            # ranks tell their kinds of parameter groups, and those of experts exist somewhere.
            (torch.distributed, "all_gather_object", _all_say_the_same),
            # Generator states are bytes too; nothing is drawn.
            (megatron_random, "_get_cuda_rng_state", _no_state),
            (megatron_random, "_set_cuda_rng_state", _nothing),
            (torch, "get_rng_state", _no_state),
            (torch, "set_rng_state", _nothing),
            # Torch swaps a fake parameter for its converted self and refuses where it is known
            # by others; on one device only a dtype can change.
            (torch.nn.Module, "_apply", _apply),
            # Without Apex Megatron makes a tensor of each gradient's norm, as a number.
            (clip_grads, "multi_tensor_applier", _norm_of_shape_one),
            # An address tells whether a tensor was replaced; so does the object.
            (torch.Tensor, "data_ptr", _identity),
            # torch's rule for shapes of grouped_mm knows bf16 only.
            (grouped_experts, "grouped_linear", _same_shape_as_grouped_linear),
            (expert_slopes, "grouped_linear", _same_shape_as_grouped_linear),
            # Slots of the code table are sizes that are read from the code map.
            (code_space, "place_code_rows", functools.partial(_placed_code_rows, mode)),
            # Row counts that arrive become sizes; they are those of balanced routing.
            (layer, "dispatch", _dispatch_of_known_splits(layer.dispatch)),
            (code_space, "dispatch", _dispatch_of_known_splits(code_space.dispatch)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Accept anything."""


def _identity(tensor: torch.Tensor) -> int:
    return id(tensor)


def _norm_of_shape_one(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return torch.ones(1), None


def _no_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _all_say_the_same(found: list, mine: Any, group: object = None) -> None:
    if isinstance(mine, list) and mine and not any(is_expert for _, is_expert in mine):
        mine = [*mine, (mine[0][0], True)]  # a stage without experts learns of them from others
    found[:] = [mine] * len(found)


def _apply(
    self: torch.nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    for child in self.children() if recurse else ():
        child._apply(convert)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                converted = convert(parameter)
            if converted.dtype != parameter.dtype:
                parameter.data = converted
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = convert(buffer)
    return self


def _same_shape_as_grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    equal_count: int | None = None,
) -> torch.Tensor:
    """Rows ``[R, I]`` times the mean of weights ``[n, O, I]``: gradients reach both."""
    return rows @ weight.mean(dim=0).t()


def _placed_code_rows(
    mode: FakeTensorMode, expert_of_row: torch.Tensor, num_experts: int, num_ranks: int, rank: int
) -> CodeRows:
    """With the map expert = row mod N, whose slots are as many as those of every other map."""
    with unset_fake_temporarily():
        real = place_code_rows(
            mod_map(expert_of_row.numel(), num_experts), num_experts, num_ranks, rank
        )
    fake = {
        name: mode.from_tensor(value)
        for name, value in vars(real).items()
        if isinstance(value, torch.Tensor)
    }
    return CodeRows(**{**vars(real), **fake})


def _dispatch_of_known_splits(real: Callable[..., Any]) -> Callable[..., Any]:
    """``dispatch`` whose one host synchronisation answers: R / P rows to and from every rank."""

    def dispatch(
        rows: torch.Tensor,
        plan: Any,
        ep_group: torch.distributed.ProcessGroup,
        expt_tp_group: torch.distributed.ProcessGroup,
        residents: Any = None,
    ) -> Any:
        num_ranks, num_shards = ep_group.size(), expt_tp_group.size()
        share = rows.shape[0] // num_ranks
        sizes = [share] * (2 * num_ranks) + [rows.shape[0]] * num_shards
        # FakeTensor reads element by element, and nothing else in dispatch reads.
        with mock.patch.object(FakeTensor, "tolist", lambda tensor: list(sizes)):
            return real(rows, plan, ep_group, expt_tp_group, residents)

    return dispatch
