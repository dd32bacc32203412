"""Whole training steps of the real model whose CUDA is the ``meta`` device, watched.

    python pure_steps.py FOLDER

FOLDER holds ``cases.json``, {name: [layout in short names, overrides, what is planted]};
``found.json`` appears beside it, {name: {"seen": [[kind, operator, place], ...]} or
{"refused": text} or
{"crashed": traceback}}. One process takes all steps, one model after the other.

Real are model, DDP, schedule, optimizer and codebooks, and the layer's expert engine but for what
needs contents: the split sizes that dispatch has read are replaced by balanced ones, code rows are
placed by the map that the codes really have, and in fp32 a product of the same shape stands for
grouped_mm, whose rule for shapes knows bf16 only.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from counted_ranks import SIZES, random_batches, small_recipe
from megatron.core import parallel_state
from real_model import PeakBytes

from vqmoe_megatron.checkpoint.state import Progress, TrainingState, sharded_state
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.megatron.engine import MegatronEngine
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows
from vqmoe_megatron.moe.dispatch import DispatchReceipt, ResidentRows, dispatch
from vqmoe_megatron.moe.expert_engine import ExpertEngine
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.runtime.collective_counter import process_group_axes
from vqmoe_megatron.runtime.cpu_compat import in_place_of_cuda, install_cpu_compat
from vqmoe_megatron.runtime.cpu_compat.fake_world import fake_ranks
from vqmoe_megatron.runtime.cpu_compat.meta_device import answered_reads
from vqmoe_megatron.runtime.device_purity import DevicePurity, ImpureStep
from vqmoe_megatron.simulate.engines import same_shape_as_grouped_linear
from vqmoe_megatron.simulate.fake_collectives import SimulatedCollectives
from vqmoe_megatron.simulate.simulated_rank import join_fake_world, without_values
from vqmoe_megatron.tasks.pretrain import Pretrain
from vqmoe_megatron.vq.code_map import mod_map
from vqmoe_megatron.vq.permutation import PermutationPlan

NUM_MICROBATCHES = 2
SAVE = "save"
FIRST_STEP = "first step"  # in the place of what is planted: that step is watched, from data


class ShapesEngine(ExpertEngine):
    """The layer's own engine, with what only contents could tell."""

    def dispatch(
        self, rows: torch.Tensor, plan: PermutationPlan, residents: list[ResidentRows]
    ) -> tuple[torch.Tensor, DispatchReceipt]:
        num_ranks, num_shards = (group.size() for group in self.groups)
        share = rows.shape[0] // num_ranks
        balanced = [share] * (2 * num_ranks) + [rows.shape[0]] * num_shards
        return dispatch(
            rows, plan, *self.groups, residents, lambda sizes: [sizes.tolist(), balanced][1]
        )

    def read_num_rows(self, num_rows: torch.Tensor, balanced: int) -> int:
        return [super().read_num_rows(num_rows, balanced), balanced][1]

    def place(self, expert_of_row: torch.Tensor) -> CodeRows:
        group = self.groups[0]
        on_host = mod_map(expert_of_row.numel(), self.num_experts)
        placed = place_code_rows(on_host, self.num_experts, group.size(), group.rank())
        tensors = {n: t for n, t in vars(placed).items() if isinstance(t, torch.Tensor)}
        return replace(placed, **{n: t.to(expert_of_row.device) for n, t in tensors.items()})


class Fp32ShapesEngine(ShapesEngine):
    """With a product that has a shape in fp32."""

    def __init__(self, *of_layer: Any) -> None:
        super().__init__(*of_layer)
        self.experts.matmul = same_shape_as_grouped_linear


def watch(config: RunConfig, world_size: int, rank: int, planted: str) -> DevicePurity | PeakBytes:
    """Take one step to three and watch the last; or, behind them, what a save makes on the
    device."""
    is_first = planted == FIRST_STEP
    start = replace(config.train, layout_independent_init=False)
    config = replace(config, train=start) if is_first else without_values(config)
    layout = check_layout(config, world_size, "cpu")
    engine = ShapesEngine if config.model.bf16 else Fp32ShapesEngine
    engine = ExpertEngine if is_first else engine
    with ExitStack() as stack:
        stack.enter_context(in_place_of_cuda("meta"))
        join_fake_world(layout, rank, "cpu:fake,cuda:fake,meta:fake")
        stack.callback(torch.distributed.destroy_process_group)
        stack.callback(parallel_state.destroy_model_parallel)
        for context in (fake_ranks(), answered_reads(), SimulatedCollectives(process_group_axes())):
            stack.enter_context(context)
        task = Pretrain(config, corpus=None)  # its loss; batches are made here
        parts = MegatronEngine.build(config, layout, task, engine, has_gloo_groups=False)
        for chunk in parts.model:
            chunk.train()
        iterators = [_pinned_batches(config) for _ in parts.model]
        # Contexts start from the first step's data, and their codebook's first step is the second.
        num_before = 2 if config.code_memory.num_context_codes else 1
        for _ in range(0 if is_first else num_before):
            assert not parts.step(iterators, 0, False).skipped
        if planted == SAVE:
            state = TrainingState(parts.model, parts.optimizer, parts.scheduler)
            with PeakBytes("meta") as made:
                sharded_state(state, Progress(1, 1, 0))
            return made
        with PLANTED[planted](), DevicePurity("meta") as purity:
            assert not parts.step(iterators, 0, False).skipped
        assert parts.layers  # their codebooks moved
    return purity


def _pinned_batches(config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    for batch in random_batches(config, 0):
        yield {name: tensor.pin_memory() for name, tensor in batch.items()}


def _in_layer(change: Any) -> Any:
    """A context in which the layer's input goes through ``change``."""
    evaluate = VQMoELayer._evaluate

    def evaluate_planted(self: VQMoELayer, hidden_states: torch.Tensor) -> torch.Tensor:
        return evaluate(self, change(hidden_states))

    return lambda: mock.patch.object(VQMoELayer, "_evaluate", evaluate_planted)


def planted_item(x: torch.Tensor) -> torch.Tensor:
    return x * x.detach().float().norm().item()


def planted_item_backward(x: torch.Tensor) -> torch.Tensor:
    def read_in_backward() -> None:
        x.detach().sum().tolist()

    return run_in_backward(x, read_in_backward)


def planted_copy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.arange(x.shape[-1]).to(x.device)


PLANTED = {
    "": nullcontext,
    FIRST_STEP: nullcontext,
    SAVE: nullcontext,
    "host arange": _in_layer(lambda x: x + torch.arange(x.shape[-1])),
    "host matrix": _in_layer(lambda x: x @ torch.eye(x.shape[-1], dtype=x.dtype)),
    "host number": _in_layer(lambda x: x * torch.tensor(2.0)),
    "item": _in_layer(planted_item),
    "item backward": _in_layer(planted_item_backward),
    "copy": _in_layer(planted_copy),
}


def main(folder: Path) -> None:
    """Watch every case of the folder."""
    install_cpu_compat()
    found = {}
    for name, (sizes, overrides, planted) in json.loads(
        (folder / "cases.json").read_text()
    ).items():
        layout = {word.rstrip("248"): int(word[-1]) for word in sizes.split()}
        world_size = layout.pop("dp", 1) * max(1, layout.get("pp", 1))
        world_size *= max(layout.get("tp", 1), layout.get("ep", 1) * layout.get("etp", 1))
        assert set(layout) <= set(SIZES), layout
        num_samples = NUM_MICROBATCHES * world_size // (layout.get("tp", 1) * layout.get("pp", 1))
        config = small_recipe(layout, [f"train.global_batch_size={num_samples}", *overrides])
        ranks = [layout.get("tp", 1) - 1]  # the first replica, whose tokens replace dead codes
        ranks += [world_size - 1] if "pp" in layout else []  # and the last stage
        try:
            if planted == SAVE:
                made = watch(config, world_size, world_size - 1, planted)
                found[name] = {"peak_bytes": made.peak, "largest_bytes": made.largest}
                continue
            seen = [one for rank in ranks for one in watch(config, world_size, rank, planted).seen]
            found[name] = {"seen": [[one.kind, one.operator, one.place] for one in seen]}
        except ImpureStep as error:
            found[name] = {"refused": str(error)}
        except Exception:
            found[name] = {"crashed": traceback.format_exc(limit=-12)}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
