"""What a rank does in tests of whole-step wire bytes: count real steps, compare with the plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "parity.yaml"
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
SMALL = [
    "model.vocab_size=250",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.moe_ffn_hidden_size=32",
    "model.seq_length=16",
    "train.global_batch_size=8",
]


def small_recipe(layout: dict[str, int], overrides: list[str]) -> Any:
    """The parity recipe made smaller, at ``layout`` (short names of SIZES)."""
    from vqmoe_megatron.config.recipe import load_recipe

    sizes = [f"parallel.{SIZES[name]}={size}" for name, size in layout.items()]
    return load_recipe(RECIPE, [*SMALL, *sizes, *overrides])


def random_batches(config: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of random tokens for ever, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = config.train.micro_batch_size, config.model.seq_length
    while True:
        drawn = torch.randint(0, config.model.vocab_size, (batch, length + 1), generator=generator)
        yield {
            "tokens": drawn[:, :-1].contiguous(),
            "labels": drawn[:, 1:].contiguous(),
            "position_ids": torch.arange(length).expand(batch, length).contiguous(),
            "loss_mask": torch.ones(batch, length),
        }


def count_and_plan(layout_sizes: dict[str, int], overrides: list[str]) -> dict[str, Any]:
    """One balanced step and one with the model's routing: [collective, axis, calls, bytes] as
    counted, and as planned. Bytes are text, because they may be fractions. With the model's routing
    without calls: one whose rows all stay at home is none."""
    from megatron.core import parallel_state

    from vqmoe_megatron.plan.layout import check_layout
    from vqmoe_megatron.plan.step_wire import stage_wire
    from vqmoe_megatron.simulate.counted_step import count_steps

    config = small_recipe(layout_sizes, overrides)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    stage = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank()
    found: dict[str, Any] = {"stage": stage}
    for name, is_balanced in (("balanced", True), ("routed", False)):
        (step,) = count_steps(
            config, layout, lambda: random_batches(config, replica), 1, is_balanced
        )
        planned = stage_wire(config, layout, stage, None if is_balanced else step.traffic)
        found[name] = as_rows(step.counted, is_balanced)
        found[f"{name} plan"] = as_rows(planned.by_collective, is_balanced)
        found[f"{name} loss"] = step.loss
    return found


def as_rows(table: dict[tuple[str, str], tuple[int, Any]], with_calls: bool) -> list[list[Any]]:
    """[collective, axis, calls, bytes as text]."""
    return [
        [*key, calls if with_calls else None, str(sent)]
        for key, (calls, sent) in sorted(table.items())
    ]
