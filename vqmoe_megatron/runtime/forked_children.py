"""Forked helpers of a rank end with it.

Megatron's checkpoint writers and the data loader's workers are forks. When a rank is killed they
would wait for it for good, each holding the memory it was forked with.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_forks_with_parent() -> None:
    """From now on the kernel kills a fork of this process when the thread that forked it ends.

    For every later ``os.fork`` of this process and of its forks. Programs that are started are not
    touched. On systems other than Linux this does nothing, and says so.
    """
    if not sys.platform.startswith("linux"):
        print(f"{sys.platform} cannot end helpers of a killed rank: they may be left behind")
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = 0

    def remember_parent() -> None:
        nonlocal parent
        parent = os.getpid()

    def die_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # killed between the fork and the line above
            os.kill(os.getpid(), signal.SIGKILL)

    os.register_at_fork(before=remember_parent, after_in_child=die_with_parent)
