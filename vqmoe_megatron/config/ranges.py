"""The legal range of every numeric key of a recipe: one table.

What a key may be by itself stands here and nowhere else; what two keys may be together stands with
the section, or in ``plan/``. A test compares the table with the fields of the sections, and trains
at the borders. A key without a value (null) is in no range and always legal where null is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(1e-37)  # fp32 may hold smaller ones as 0
SHARE = Range(0, 1)
SHARE_BELOW_ONE = Range(0, 1, without_high=True)

LEGAL_RANGES: dict[str, Range] = {
    "model.num_layers": COUNT,
    "model.hidden_size": COUNT,
    "model.num_attention_heads": COUNT,
    "model.num_query_groups": COUNT,
    "model.kv_channels": COUNT,
    "model.ffn_hidden_size": COUNT,
    "model.moe_ffn_hidden_size": COUNT,
    "model.num_moe_experts": COUNT,
    "model.moe_layer_freq": COUNT,
    "model.moe_router_topk": COUNT,
    "model.moe_aux_loss_coeff": NOT_NEGATIVE,
    "model.moe_z_loss_coeff": NOT_NEGATIVE,
    "model.layernorm_epsilon": POSITIVE,
    "model.hidden_dropout": SHARE_BELOW_ONE,
    "model.attention_dropout": SHARE_BELOW_ONE,
    "model.init_method_std": NOT_NEGATIVE,
    "model.rotary_base": COUNT,
    "model.recompute_num_layers": COUNT,
    "model.seq_length": COUNT,
    "model.vocab_size": COUNT,
    "model.make_vocab_size_divisible_by": COUNT,
    "vq.num_codes": COUNT,
    "vq.num_code_slices": COUNT,
    "vq.code_dim": COUNT,
    "vq.contribution_rate": SHARE,
    "vq.combine_bias": Range(),
    "vq.ema_decay": Range(0, 1, without_low=True, without_high=True),
    "vq.commitment_coeff": NOT_NEGATIVE,
    "vq.vq_loss_coeff": NOT_NEGATIVE,
    # A share of uniform usage: at 1 every code would be re-seeded at every step.
    "vq.dead_code_threshold": SHARE_BELOW_ONE,
    "parallel.tensor_model_parallel_size": COUNT,
    "parallel.pipeline_model_parallel_size": COUNT,
    "parallel.virtual_pipeline_model_parallel_size": COUNT,
    "parallel.context_parallel_size": COUNT,
    "parallel.expert_model_parallel_size": COUNT,
    "parallel.expert_tensor_parallel_size": COUNT,
    "data.eval_stride_tokens": COUNT,
    "data.num_workers": Range(0, 1024),  # processes of every rank
    "optimizer.lr": NOT_NEGATIVE,
    "optimizer.min_lr": NOT_NEGATIVE,
    "optimizer.lr_warmup_iters": NOT_NEGATIVE,
    "optimizer.lr_decay_iters": COUNT,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.adam_beta1": SHARE_BELOW_ONE,
    "optimizer.adam_beta2": SHARE_BELOW_ONE,
    "optimizer.adam_eps": POSITIVE,  # at 0 a parameter without a gradient becomes 0 / 0
    "optimizer.clip_grad": NOT_NEGATIVE,
    "train.train_iters": COUNT,
    "train.global_batch_size": COUNT,
    "train.micro_batch_size": COUNT,
    "train.seed": Range(0, 2**32 - 1),  # of NumPy's generator, which shuffles the corpus
    "train.log_interval": COUNT,
    "train.eval_interval": NOT_NEGATIVE,
    "train.eval_iters": NOT_NEGATIVE,
    "train.exit_interval": COUNT,
    "train.exit_duration_in_mins": NOT_NEGATIVE,
    "train.check_replicas_interval": NOT_NEGATIVE,
    "checkpoint.save_interval": NOT_NEGATIVE,
    "checkpoint.keep_last": COUNT,
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
    return f"{key}={value} must be {', '.join(words)}"
