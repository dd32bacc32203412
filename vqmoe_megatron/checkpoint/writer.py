"""Write one rank's part of a checkpoint in one process, the rank's own or one fork of it.

Megatron's own writer starts a process for each file and waits for word from all of them. When one
is killed, for instance for want of memory, that word never comes and the run hangs. One process
that is gone can be seen to be gone.
"""

from __future__ import annotations

import queue
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from vqmoe_megatron.checkpoint.checksums import Checksum, checksum


def write_buckets(
    transforms: list[Any],
    use_msc: bool,
    rank: int,
    buckets: list[Any],
    results: Any,
    checksums: SimpleQueue[dict[str, Checksum]],
) -> None:
    """Write Megatron's ``buckets``, a file each, and put their results or the first exception.

    Takes the place of ``FileSystemWriterAsync.write_preloaded_data_multiproc`` in an asynchronous
    request, with the same arguments and ``checksums``, which takes one dict by file name before
    the results. Files are flushed to the disk. No communication.
    """
    written: dict[int, Any] = {}
    sums: dict[str, Checksum] = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, pending, use_fsync=True, use_msc=use_msc
        )
        _, answer = answers.get_nowait()
        if not isinstance(answer, Exception):
            try:
                path = Path(bucket[0])
                sums[path.name] = checksum(path)
            except OSError as error:
                answer = error
        if isinstance(answer, Exception):
            results.put(answer)
            return
        written[number] = answer
    checksums.put(sums)
    results.put(written)
