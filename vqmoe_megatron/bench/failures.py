"""What stops a benchmark: its message is all that the command prints before exit code 1."""

from __future__ import annotations


class BenchFailed(Exception):
    """Nothing can be reported; the message says why."""


class GateFailed(BenchFailed):
    """Arms disagree, so their times would compare different things; the message lists where."""


class RanksFailed(BenchFailed):
    """Local ranks did not finish; they printed their own errors."""
