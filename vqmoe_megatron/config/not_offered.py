"""Keys that a user of Megatron may look for in a recipe, and why there are none."""

from __future__ import annotations

FP16_REFUSED = (
    "a loss scale skips steps, and that codebooks, their losses and a resumed scale stay right "
    "through it was never proved; use bf16, which needs no scale"
)
NOT_OFFERED = {"model.fp16": f"{FP16_REFUSED} (model.bf16=true)"}
