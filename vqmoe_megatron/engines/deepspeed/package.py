"""Import DeepSpeed and tell it which rank this is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.runtime.world import discover_rank

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def import_deepspeed() -> ModuleType:
    """Return the package, ready for a run.

    Raises:
        ValueError: when it is not installed or cannot be imported.
    """
    require("deepspeed", "train.engine=deepspeed")
    import deepspeed

    # Its all-reduce of CPUs serves inference alone; it would be compiled at the first start, which
    # takes a minute, a compiler, and a lock that a killed rank leaves behind.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its progress, per rank
    return deepspeed


@contextmanager
def local_rank_variable() -> Iterator[None]:
    """Set ``LOCAL_RANK``, which DeepSpeed insists on, where another launcher than torchrun did not;
    only for a while, since processes started later would take it for torchrun's."""
    name = "LOCAL_RANK"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(discover_rank().local_rank)
    try:
        yield
    finally:
        del os.environ[name]
