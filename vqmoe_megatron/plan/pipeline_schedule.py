"""Megatron's 1F1B and interleaved schedules: what is in flight on a stage, and the bubble.

PP stages, VPP chunks per stage, m microbatches. A stage runs w forward passes ahead, then one
forward and one backward pass in turn, then the w backward passes that are left:

    1F1B          w = PP - 1 - stage
    interleaved   w = 2 (PP - 1 - stage) + (VPP - 1) PP, in passes of one chunk

Interleaved chunks take turns every PP microbatches, forwards from the first chunk, backwards from
the last. The bubble is (PP - 1) / VPP microbatches long, whatever m is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, chain, cycle, islice, repeat
from operator import sub


def num_warmup_passes(num_stages: int, num_chunks: int, stage: int, num_microbatches: int) -> int:
    """w: forward passes of one chunk before the first backward pass."""
    ahead = num_stages - 1 - stage
    if num_chunks > 1:
        ahead = 2 * ahead + (num_chunks - 1) * num_stages
    return min(ahead, num_microbatches * num_chunks)


def peak_in_flight(
    chunk_bytes: Sequence[int], num_stages: int, stage: int, num_microbatches: int
) -> int:
    """Most bytes that a stage holds between its passes, when chunk c keeps ``chunk_bytes[c]``.

    Walks the schedule; what lies behind two rounds of chunks repeats itself and is left out.
    """
    num_chunks = len(chunk_bytes)
    period = num_stages * num_chunks
    warmup = num_warmup_passes(num_stages, num_chunks, stage, num_microbatches)
    num_passes = min(num_microbatches * num_chunks, warmup + 2 * period)

    def in_turn(chunks: Iterable[int]) -> Iterator[int]:
        turns = [chunk for chunk in chunks for _ in range(num_stages)]
        return accumulate(islice(cycle(turns), num_passes))

    freed = chain(repeat(0, warmup + 1), in_turn(reversed(chunk_bytes)))
    return max(map(sub, in_turn(chunk_bytes), freed), default=0)


def bubble_microbatches(num_stages: int, num_chunks: int) -> Fraction:
    """Idle time of a stage in a step, in forward and backward passes of whole microbatches."""
    return Fraction(num_stages - 1, num_chunks)
