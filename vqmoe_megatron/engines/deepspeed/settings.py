"""The recipe as DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout


def deepspeed_settings(config: RunConfig, layout: ParallelLayout) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes as ``config``. No communication.

    Without ZeRO gradients are clipped by us (``gradients.py``).
    """
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage:
        zero |= {"contiguous_gradients": True, "overlap_comm": False}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": layout.num_microbatches(train),
        "gradient_clipping": config.optimizer.clip_grad if train.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        # A step with a NaN is dropped, as in fp32, and not taken.
        "bf16": {"enabled": config.model.bf16, "check_grad_overflow": True},
        "steps_per_print": 2**31,
    }
