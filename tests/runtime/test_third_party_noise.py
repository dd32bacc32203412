"""Known messages are dropped; everything else still reaches the reader."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import logging, warnings
from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages
quiet_known_messages()
log = logging.getLogger("megatron.core.tensor_parallel.random")
log.warning("CPU RNG state changed within GPU RNG context")
log.warning("a real problem")
for name in ("models.gpt.gpt_model", "dist_checkpointing.strategies.torch"):
    logging.getLogger(f"megatron.core.{name}").warning("GPTModel IS DEPRECATED. It is")
    logging.getLogger(f"megatron.core.{name}").warning("a problem of %s", name)
warnings.warn("Apex is not installed. Falling back to Torch Norm")
warnings.warn("`load_state_dict` is deprecated and will be removed in future versions. Please "
              "use `load` instead.", FutureWarning)
warnings.warn("Please use DTensor instead and we are deprecating ShardedTensor.", FutureWarning)
for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.warn(f"`torch.distributed.{name}` is deprecated. Please use another", FutureWarning)
warnings.warn("`torch.distributed.all_gather_object` is deprecated.", FutureWarning)
warnings.warn("another real problem")
"""


def test_only_the_known_messages_disappear() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert "a real problem" in result.stderr
    assert "another real problem" in result.stderr
    assert "RNG state" not in result.stderr
    assert "Apex" not in result.stderr and "IS DEPRECATED" not in result.stderr
    assert result.stderr.count("a problem of") == 2
    assert result.stderr.count("FutureWarning") == 1 and "all_gather_object" in result.stderr
