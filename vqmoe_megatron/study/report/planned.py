"""What the plan says of a run: parameters, operations, wire bytes, predicted throughput.

Nothing here is measured. A plan that is refused leaves its fields None and says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.hardware import PROFILES
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.study.budget import with_vocabulary


@dataclass(frozen=True)
class Planned:
    """None: not known, for the ``reason``."""

    num_parameters_total: int | None = None
    num_parameters_active: int | None = None  # used by one token
    flops_per_token: float | None = None  # forward and backward, all ranks together
    wire_bytes_per_step: int | None = None  # sent by the busiest rank in an optimizer step
    predicted_tokens_per_second: float | None = None  # of the whole job
    reason: str = ""


def planned_quantities(config: RunConfig, num_ranks: int, hardware: str) -> Planned:
    """Plan ``config`` on ``num_ranks`` ranks of a hardware profile.

    Reads the corpus for a vocabulary that the recipe leaves open.
    """
    try:
        plan = plan_run(with_vocabulary(config), num_ranks, hardware)
        return Planned(
            num_parameters_total=plan.parameters.total,
            num_parameters_active=plan.parameters.active,
            flops_per_token=plan.flops_per_token,
            wire_bytes_per_step=plan.wire_bytes_per_step,
            predicted_tokens_per_second=plan.step_time.tokens_per_second,
        )
    except ValueError as error:
        return Planned(reason="no plan: " + " ".join(str(error).split()))


def spread_over_ranks(config: RunConfig, num_ranks: int, hardware: str) -> Planned:
    """Plan ``config`` as if ``num_ranks`` ranks shared its experts, with as many times its batch:
    what a run of a single rank would send on a larger machine."""
    parallel = replace(
        config.parallel, expert_model_parallel_size=min(num_ranks, config.model.num_moe_experts)
    )
    batch = config.train.global_batch_size * num_ranks
    train = replace(config.train, global_batch_size=batch)
    return planned_quantities(replace(config, parallel=parallel, train=train), num_ranks, hardware)


def machine_profile(gpu_name: str | None) -> str:
    """Return the profile of a machine by its GPU's name, CPU without one.

    Raises:
        ValueError: for a GPU without a profile.
    """
    if gpu_name is None:
        return "CPU"
    for name in PROFILES:
        if name.lower() in gpu_name.lower():
            return name
    raise ValueError(
        f"no hardware profile for {gpu_name}; name one for the predictions with "
        f"--hardware {'|'.join(PROFILES)}"
    )
