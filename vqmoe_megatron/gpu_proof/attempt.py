"""One thing of a part that may raise without ending the part."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vqmoe_megatron.gpu_proof.part import Job

SHOWN_FRAMES = 3


@contextmanager
def attempt(job: Job, what: str) -> Iterator[None]:
    """Make an error within a failed check called ``what``, and go on.

    An error that poisoned the device is raised again, by the device: all after it would fail.
    """
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        job.check(what, False, in_words(error))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def in_words(error: Exception) -> str:
    """Return the error's kind, its first line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[-SHOWN_FRAMES:]
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames)]
    first = "".join(str(error).strip().splitlines()[:1])
    return f"{type(error).__name__}: {first} (at {' < '.join(places)})"
