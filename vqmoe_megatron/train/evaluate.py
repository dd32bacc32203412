"""Validation loss over strided windows, with the window stated."""

from __future__ import annotations

import itertools
import math

import torch

from vqmoe_megatron.data.evaluation_windows import EvaluationWindows
from vqmoe_megatron.engines.engine import Engine
from vqmoe_megatron.tasks.task import Task


@torch.no_grad()
def evaluate(
    engine: Engine, task: Task, windows: EvaluationWindows, pipeline_size: int
) -> dict[str, float]:
    """Return the task's scores, such as ``val/loss`` (nats per token).

    Every scored token counts once. Dropout is off, codebooks and statistics are untouched, and the
    random state is left as it was. Communicates as :meth:`Engine.forward`.
    """
    for chunk in engine.model:
        chunk.eval()
    # The interleaved schedule wants a multiple of the pipeline size; extra batches score nothing.
    num_microbatches = math.ceil(len(windows) / pipeline_size) * pipeline_size
    iterators = [_padded(windows, num_microbatches) for _ in engine.model]
    sums = engine.forward(iterators, num_microbatches, windows.seq_length, windows.micro_batch_size)
    for chunk in engine.model:
        chunk.train()
    loss, num_tokens, *others = sums.tolist()
    return task.scores(loss, int(num_tokens), windows, *others)


def _padded(windows: EvaluationWindows, num_microbatches: int):  # noqa: ANN202
    """The windows' microbatches, then copies of the last with an empty mask."""
    batch = None
    for batch in windows:
        yield batch
    empty = dict(batch, loss_mask=torch.zeros_like(batch["loss_mask"]))
    yield from itertools.repeat(empty, num_microbatches - len(windows))
