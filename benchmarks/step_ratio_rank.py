"""What one rank of ``step_ratio.py`` does: build every arm's engine, take their steps in turns."""

from __future__ import annotations

from pathlib import Path


def time_steps(
    recipe: str, arms: dict[str, list[str]], corpus_path: str, num_rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of ``num_rounds`` steps of each arm, after two that are not counted."""
    import time

    import torch

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.data.corpus import load_corpus
    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.plan.layout import check_layout
    from vqmoe_megatron.tasks.pretrain import Pretrain

    torch.set_num_threads(1)
    corpus = load_corpus(Path(corpus_path))
    engines, iterators = {}, {}
    for arm, overrides in arms.items():
        config = load_recipe(Path(recipe), overrides)
        config.model.vocab_size = corpus.vocab_size
        layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
        task = Pretrain(config, corpus)
        engines[arm] = MegatronEngine.build(config, layout, task)
        for chunk in engines[arm].model:
            chunk.train()
        iterators[arm] = task.training_iterators(1, 0, 0)
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    names = list(arms)
    for turn in range(num_rounds + 2):
        first = turn % len(names)
        for arm in names[first:] + names[:first]:
            torch.distributed.barrier()
            started = time.perf_counter()
            engines[arm].step(iterators[arm], 0, False)
            if turn >= 2:
                found[arm].append(1e3 * (time.perf_counter() - started))
    return found
