"""How long every run of a study trains, so that runs may be compared.

    as_written    train.train_iters of the recipe, or of the grid
    equal_tokens  the tokens that the recipe with ``set`` alone would train on
    equal_flops   the floating-point operations that the recipe with ``set`` alone would take

The budget depends on no point of the grid, so it stays when the grid is extended. Iterations are
whole, so a run's tokens or operations differ from the budget by up to half a step; a run for which
that is more than ``TOLERANCE`` of the budget is refused, because its rule would not hold.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.plan.layout import check_layout, minimum_world_size
from vqmoe_megatron.plan.run_plan import plan_run

TOLERANCE = 0.02  # of the budget; half a step of 25, so every run of 25 steps or more keeps it


def tokens_per_step(config: RunConfig) -> int:
    """Training tokens of one optimizer step, all ranks together."""
    return config.train.global_batch_size * config.model.seq_length


def rule_train_iters(
    rule: str,
    budget: RunConfig,
    config: RunConfig,
    num_ranks: int,
    num_budget_ranks: int | None = None,
) -> int:
    """Return the iterations of ``config`` under ``equal_tokens`` or ``equal_flops``; at least 1.

    ``budget`` is the configuration whose length sets the budget, ``num_ranks`` that of ``config``,
    ``num_budget_ranks`` that of ``budget`` (None: the fewest its layout fits on).

    Raises:
        ValueError: when no whole number of steps is within ``TOLERANCE`` of the budget; under
            equal_flops also for a layout that cannot run, or an unknown vocabulary.
    """
    per_step, per_budget_step = float(tokens_per_step(config)), float(tokens_per_step(budget))
    if rule == "equal_flops":
        check_layout(config, num_ranks)
        per_step *= flops_per_token(config, num_ranks)
        per_budget_step *= _budget_flops_per_token(budget, num_budget_ranks)
    iterations = max(1, round(budget.train.train_iters * per_budget_step / per_step))
    _check_budget_is_kept(rule, budget.train.train_iters, per_budget_step, iterations, per_step)
    return iterations


def _check_budget_is_kept(
    rule: str, budget_iters: int, per_budget_step: float, iterations: int, per_step: float
) -> None:
    total = budget_iters * per_budget_step
    deviation = iterations * per_step / total - 1
    if abs(deviation) <= TOLERANCE:
        return
    unit = "tokens" if rule == "equal_tokens" else "floating-point operations"
    enough = math.ceil(per_step / (2 * TOLERANCE) / per_budget_step)
    raise ValueError(
        f"{rule} cannot be kept in whole steps: the budget is {budget_iters} steps x "
        f"{per_budget_step:,.0f} = {total:,.0f} {unit}, one step of this run takes "
        f"{per_step:,.0f}, so {total / per_step:.4g} steps; the nearest whole number, "
        f"{iterations}, is off by {deviation:+.1%}, more than {TOLERANCE:.0%}. Lengthen the budget "
        f"(train.train_iters in the recipe or in `set`; {enough} are enough for this run), or take "
        "rule: as_written"
    )


def flops_per_token(config: RunConfig, num_ranks: int) -> float:
    """Return the operations of one training token, forward and backward, over all ranks.

    Raises:
        ValueError: when neither recipe nor corpus tells the vocabulary.
    """
    return plan_run(with_vocabulary(config), num_ranks).flops_per_token


def with_vocabulary(config: RunConfig) -> RunConfig:
    """Return ``config`` with ``model.vocab_size`` filled in from its corpus.

    Raises:
        ValueError: when it is unset and the corpus is not there.
    """
    if config.model.vocab_size is not None or config.vision.is_on:
        return config
    vocab_size = load_corpus(Path(config.data.path)).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def _budget_flops_per_token(budget: RunConfig, num_ranks: int | None) -> float:
    num_ranks = num_ranks or minimum_world_size(budget)
    try:
        check_layout(budget, num_ranks)
    except ValueError as error:
        raise ValueError(
            "equal_flops takes its budget from the recipe with `set` alone, which must be a legal "
            f"run: {error}"
        ) from error
    return flops_per_token(budget, num_ranks)
