"""What one real rank of ``step_wire.py`` does: count its steps, and give the formulas' bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def count(recipe: str, overrides: list[str], corpus_path: str, num_steps: int) -> dict[str, Any]:
    """One step with balanced routing, then ``num_steps`` of training with the model's routing, on
    the corpus. Tables are [collective, axis, calls, bytes as text]."""
    from megatron.core import parallel_state

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.data.corpus import load_corpus
    from vqmoe_megatron.plan.layout import check_layout
    from vqmoe_megatron.plan.step_wire import stage_wire
    from vqmoe_megatron.simulate.counted_step import count_steps
    from vqmoe_megatron.tasks.pretrain import Pretrain

    config = load_recipe(Path(recipe), overrides)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    stage = parallel_state.get_pipeline_model_parallel_rank()
    corpus = load_corpus(Path(corpus_path))

    def batches() -> Any:
        return Pretrain(config, corpus).training_iterators(1, 0, 0)[0]

    (balanced,) = count_steps(config, layout, batches, 1, is_balanced=True)
    steps = count_steps(config, layout, batches, num_steps, is_balanced=False)
    unequal = [
        number
        for number, step in enumerate(steps, start=1)
        if sent(stage_wire(config, layout, stage, step.traffic).by_collective) != sent(step.counted)
    ]
    return {
        "pipeline_rank": stage,
        "balanced": as_rows(balanced.counted),
        "trained_steps": len(steps),
        "unequal_steps": unequal,
        "last_step": as_rows(steps[-1].counted),
        "losses": [step.loss for step in steps],
        "sent_bytes_of_steps": [str(sum(sent(s.counted).values())) for s in steps],
    }


def sent(table: dict[tuple[str, str], tuple[int, Any]]) -> dict[tuple[str, str], Any]:
    """Bytes by collective and axis. Not calls: one whose rows all stay at home is none."""
    return {key: num_bytes for key, (_, num_bytes) in table.items()}


def as_rows(table: dict[tuple[str, str], tuple[int, Any]]) -> list[list[Any]]:
    """[collective, axis, calls, bytes as text]."""
    return [[*key, calls, str(sent)] for key, (calls, sent) in sorted(table.items())]
