"""Validation loss over strided windows, with the window stated."""

from __future__ import annotations

import itertools
import math

import torch
from megatron.core import parallel_state

from vqmoe_megatron.data.evaluation_windows import EvaluationWindows, bits_per_byte, perplexity
from vqmoe_megatron.engines.megatron.step import run_microbatches


@torch.no_grad()
def evaluate(model: list[torch.nn.Module], windows: EvaluationWindows) -> dict[str, float]:
    """Return ``val/loss`` (nats per token), ``val/bits_per_byte`` and ``val/perplexity``.

    Every scored token counts once. Dropout is off, codebooks and statistics are untouched, and the
    random state is left as it was. Communicates as :func:`run_microbatches`, forward only.
    """
    for chunk in model:
        chunk.eval()
    # The interleaved schedule wants a multiple of the pipeline size; extra batches score nothing.
    pipeline_size = parallel_state.get_pipeline_model_parallel_world_size()
    num_microbatches = math.ceil(len(windows) / pipeline_size) * pipeline_size
    iterators = [_padded(windows, num_microbatches) for _ in model]
    sums = run_microbatches(
        model,
        iterators,
        num_microbatches,
        windows.seq_length,
        windows.micro_batch_size,
        forward_only=True,
    )
    for chunk in model:
        chunk.train()
    total, num_tokens = sums.tolist()
    return {
        "val/loss": total / num_tokens,
        "val/bits_per_byte": bits_per_byte(total, int(num_tokens), windows.num_scored_bytes),
        "val/perplexity": perplexity(total, int(num_tokens)),
    }


def _padded(windows: EvaluationWindows, num_microbatches: int):  # noqa: ANN202
    """The windows' microbatches, then copies of the last with an empty mask."""
    batch = None
    for batch in windows:
        yield batch
    empty = dict(batch, loss_mask=torch.zeros_like(batch["loss_mask"]))
    yield from itertools.repeat(empty, num_microbatches - len(windows))
