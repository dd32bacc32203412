"""A name that megatron-core 0.16.1 forgets without Transformer Engine, on every device.

Its ``moe_utils`` imports ``te_general_gemm`` together with Transformer Engine and asks for it in
the router's gating whether or not that worked: without Transformer Engine every MoE layer raises a
NameError, on a GPU as on a CPU.
"""

from __future__ import annotations


def name_missing_functions() -> None:
    """Let the router's gating see that there is no such function, where there is none.

    A name that is defined stays. No communication.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
