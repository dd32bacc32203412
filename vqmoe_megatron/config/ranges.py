"""The legal range of every numeric key of a recipe: one table.

What a key may be by itself stands here and nowhere else; what two keys may be together stands with
the section, or in ``plan/``. A test compares the table with the fields of the sections, and trains
at the borders. A key without a value (null) is in no range and always legal where null is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vqmoe_megatron.config.declared_types import shown

FP32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; a border belongs to it unless said otherwise."""

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, number: float) -> bool:
        """Tell whether ``number`` is in the range; what is not finite in fp32 never is."""
        above = number > self.low if self.without_low else number >= self.low
        below = number < self.high if self.without_high else number <= self.high
        return above and below and is_finite(number)

    def __str__(self) -> str:
        """The borders in words, to follow "must be"; without borders nothing."""
        borders = []
        if self.low > -math.inf:
            borders.append(f"{'above' if self.without_low else 'at least'} {self.low}")
        if self.high < math.inf:
            borders.append(f"{'below' if self.without_high else 'at most'} {self.high}")
        return " and ".join(borders)


# The highest are far above any machine's: they keep mistyped numbers out, and plans quick.
MOST_RANKS = 2**17  # the largest clusters have about as many devices
LAYERS = Range(1, 2000)  # twice the deepest transformers that were published
WIDTH = Range(1, 2**20)  # of vectors and matrices, and what they are cut into
ROWS = Range(1, 2**24)  # of tables and batches
RANKS = Range(1, MOST_RANKS)
PIXELS = Range(1, 4096)
STEPS = Range(1, 10**9)  # decades at a few steps a second; as an interval: never
STEPS_OR_NONE = Range(0, 10**9)
# At 10 one update is as large as any weight. Not higher: fp32 has to hold powers of these.
RATE = Range(0, 10)
COEFFICIENT = Range(0, 1000)
EPSILON = Range(1e-37, 1)  # fp32 may hold smaller ones as 0; at 1 it already outweighs the rest
SHARE = Range(0, 1)
SHARE_BELOW_ONE = Range(0, 1, without_high=True)

LEGAL_RANGES: dict[str, Range] = {
    "model.num_layers": LAYERS,
    "model.hidden_size": WIDTH,
    "model.num_attention_heads": WIDTH,
    "model.num_query_groups": WIDTH,
    "model.kv_channels": WIDTH,
    "model.ffn_hidden_size": WIDTH,
    "model.moe_ffn_hidden_size": WIDTH,
    "model.num_moe_experts": WIDTH,
    "model.moe_shared_expert_intermediate_size": WIDTH,
    "model.moe_layer_freq": LAYERS,
    "model.moe_router_topk": WIDTH,
    "model.moe_aux_loss_coeff": COEFFICIENT,
    "model.moe_z_loss_coeff": COEFFICIENT,
    "model.layernorm_epsilon": EPSILON,
    "model.hidden_dropout": SHARE_BELOW_ONE,
    "model.attention_dropout": SHARE_BELOW_ONE,
    "model.init_method_std": RATE,
    "model.embedding_init_method_std": RATE,
    "model.rotary_base": Range(1, 10**12),
    "model.memory_length_tokens": Range(0, 2**24),
    "model.recompute_num_layers": LAYERS,
    "model.seq_length": ROWS,
    "model.vocab_size": ROWS,
    "model.make_vocab_size_divisible_by": WIDTH,
    "vq.num_codes": ROWS,
    "vq.num_code_slices": WIDTH,
    "vq.code_dim": WIDTH,
    "vq.fsq_levels": WIDTH,
    "vq.entropy_loss_coeff": COEFFICIENT,
    "vq.num_fill_experts": Range(0, 2**20),
    "vq.contribution_rate": SHARE,
    "vq.combine_bias": Range(-100, 100),  # a logit: fp32's sigmoid is 0 or 1 beyond
    "vq.ema_decay": Range(0, 1, without_low=True, without_high=True),
    "vq.commitment_coeff": COEFFICIENT,
    "vq.vq_loss_coeff": COEFFICIENT,
    # A share of uniform usage: at 1 every code would be re-seeded at every step.
    "vq.dead_code_threshold": SHARE_BELOW_ONE,
    "router.low_dim": WIDTH,
    "router.initial_temperature": Range(0.01, 100),  # the learned one is held above 0.01, too
    "router.min_topk": WIDTH,
    "router.schedule_steps": STEPS,
    "router.eval_topk": WIDTH,
    "router.capacity_factor": Range(0, 1000, without_low=True),
    "router.bias_update_rate": RATE,
    "router.stage_1_steps": STEPS,
    "router.light_dim": WIDTH,
    "router.distill_coeff": COEFFICIENT,
    "code_memory.num_rows": Range(0, 2**24),
    "code_memory.num_codes": ROWS,
    "code_memory.max_order": Range(1, 8),  # longer runs of codes hardly come again
    "code_memory.num_context_codes": Range(0, 2**24),
    "code_memory.context_decay": Range(0, 0.999),  # its window is cut where it weighs 1e-4
    "code_memory.context_dim": WIDTH,
    "code_memory.freeze_after_steps": STEPS_OR_NONE,
    "code_memory.layers": LAYERS,
    "code_memory.lr_mult": Range(0, 1000, without_low=True),
    "vq.freeze_after_steps": STEPS,
    "finetune.num_classes": Range(2, 2**20),
    "vision.image_size": PIXELS,
    "vision.patch_size": PIXELS,
    "vision.num_channels": Range(1, 4),  # Pillow's and released images have no more
    "vision.num_classes": Range(2, 2**20),
    "vision.crop_padding": Range(0, 4096),
    "parallel.tensor_model_parallel_size": RANKS,
    "parallel.pipeline_model_parallel_size": RANKS,
    "parallel.virtual_pipeline_model_parallel_size": LAYERS,
    "parallel.context_parallel_size": RANKS,
    "parallel.expert_model_parallel_size": RANKS,
    "parallel.expert_tensor_parallel_size": RANKS,
    "data.eval_window_tokens": ROWS,
    "data.eval_stride_tokens": ROWS,
    "data.num_workers": Range(0, 1024),  # processes of every rank
    "optimizer.lr": RATE,
    "optimizer.min_lr": RATE,
    "optimizer.lr_warmup_iters": STEPS_OR_NONE,
    "optimizer.lr_decay_iters": STEPS,
    "optimizer.weight_decay": RATE,
    "optimizer.adam_beta1": SHARE_BELOW_ONE,
    "optimizer.adam_beta2": SHARE_BELOW_ONE,
    "optimizer.adam_eps": EPSILON,  # at 0 a parameter without a gradient becomes 0 / 0
    "optimizer.clip_grad": Range(0, 1e9),  # people write large ones for none, which is 0
    "train.train_iters": STEPS,
    "train.global_batch_size": ROWS,
    "train.micro_batch_size": ROWS,
    "train.seed": Range(0, 2**32 - 1),  # of NumPy's generator, which shuffles the corpus
    "train.log_interval": STEPS,
    "train.eval_interval": STEPS_OR_NONE,
    "train.eval_iters": STEPS_OR_NONE,
    "train.exit_interval": STEPS,
    "train.exit_duration_in_mins": Range(0, 10**7),  # 19 years
    "train.check_replicas_interval": STEPS_OR_NONE,
    "train.zero_stage": Range(0, 2),  # 3 cuts weights, and DeepSpeed refuses it beside our experts
    "checkpoint.save_interval": STEPS_OR_NONE,
    "checkpoint.keep_last": STEPS,
}


def is_finite(number: float) -> bool:
    """Tell whether ``number`` is one in fp32, where settings end: not so nan, 1e300, 10**400."""
    return abs(number) <= FP32_MAX


def range_problem(key: str, value: Any) -> str | None:
    """Describe a number of the right type, or a list with one, that is not in the key's range."""
    legal = LEGAL_RANGES.get(key)
    numbers = value if isinstance(value, (list, tuple)) else [value]
    wrong = [number for number in numbers if number is not None and legal and number not in legal]
    if not wrong:
        return None
    words = [str(legal)] if str(legal) else []
    if not all(map(is_finite, wrong)):
        words.insert(0, "a finite number in fp32")
    return f"{key}={shown(value)} must be {', '.join(words)}"
