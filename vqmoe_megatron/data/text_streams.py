"""A corpus as parallel streams: every row of a batch goes on where the same row ended before.

B rows of a global batch, S = seq_length, b = micro_batch_size, D data-parallel ranks. The P = N - 1
predictions of a split of N tokens (token i predicts token i + 1) are cut into B parts as equal as
can be; row r begins with part r.

    P = 12, B = 3, S = 2      step 0     step 1     step 2
                  row 0       0 1        2 3        4 5
                  row 1       4 5        6 7        8 9
                  row 2       8 9        10 11      0 1

In training a row that has read its part goes on into the next one's, and from the split's end to
its start: no row ever jumps within the text, and after P / S / B steps all of it was read once.
In evaluation it ends with its part. Microbatch m of rank d holds rows ``(m D + d) b + [0, b)``, so
row r of a global batch is the same stream at every layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vqmoe_megatron.data.corpus import CorpusSplit


class StreamRows:
    """Which rows of a global batch one data-parallel rank reads, in which microbatch.

    Raises ``ValueError`` where rows do not fill microbatches, and for a split of fewer than two
    tokens.
    """

    def __init__(
        self,
        split: CorpusSplit,
        seq_length: int,
        num_rows: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        if not 0 <= dp_rank < dp_size or num_rows % (micro_batch_size * dp_size):
            raise ValueError(
                f"need 0 <= dp_rank < dp_size and num_rows % (micro_batch_size * dp_size) = 0, got "
                f"{dp_rank}, {dp_size}, {num_rows} rows of {micro_batch_size}"
            )
        if split.num_tokens < 2:
            raise ValueError(f"split {split.name} has {split.num_tokens} tokens; a row needs two")
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.num_predictions = split.num_tokens - 1
        # [B + 1] where the parts begin, and the last one's end
        self.starts = np.arange(num_rows + 1, dtype=np.int64) * self.num_predictions // num_rows
        # [microbatches, b]
        self.rows = np.arange(num_rows).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
        # [num_tokens], mapped once: a corpus that takes this one's place changes nothing
        self.tokens = np.memmap(split.bin_path, dtype=split.token_dtype, mode="r")

    def microbatch(self, positions: np.ndarray, loss_mask: np.ndarray) -> dict[str, torch.Tensor]:
        """Tokens at ``positions`` ``[b, S]``, each with the one behind it as its label."""
        positions = positions % self.num_predictions
        return {
            "tokens": torch.from_numpy(self.tokens[positions].astype(np.int64)),
            "labels": torch.from_numpy(self.tokens[positions + 1].astype(np.int64)),
            "loss_mask": torch.from_numpy(loss_mask.astype(np.float32)),
            "position_ids": torch.arange(self.seq_length).repeat(self.micro_batch_size, 1),
        }


def training_streams(
    rows: StreamRows, num_read_samples: int, pin_memory: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the microbatches of a rank behind ``num_read_samples``, without end.

    Each is a dict of ``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` fp32, ``[b,
    S]``.

    Raises:
        ValueError: when the samples are no whole number of global batches.
    """
    num_rows, length = len(rows.starts) - 1, rows.seq_length
    if num_read_samples % num_rows:
        raise ValueError(
            f"num_read_samples={num_read_samples} is no multiple of the {num_rows} rows of a "
            "global batch: every row has read equally much; was the checkpoint written with "
            "another train.global_batch_size?"
        )
    step = num_read_samples // num_rows
    mask = np.ones((rows.micro_batch_size, length))
    while True:
        for numbers in rows.rows:
            first = rows.starts[numbers] + step * length
            batch = rows.microbatch(first[:, None] + np.arange(length), mask)
            yield {n: t.pin_memory() for n, t in batch.items()} if pin_memory else batch
        step += 1


class EvaluationStreams:
    """Iterate over an evaluation split in segments, each row in order, so that memory carries over.

    Row r scores the predictions of its part, each once, in segments of S; its first segment has no
    text before. ``max_segments`` ends every row after so many. Rows, and so scores, depend on
    neither b nor D. Totals (``num_scored_tokens``, ``num_scored_bytes``) are over all ranks.
    Iterating again starts over.
    """

    def __init__(
        self,
        split: CorpusSplit,
        rows: StreamRows,
        memory_length_tokens: int,
        max_segments: int,
    ) -> None:
        self.rows, self._bytes_per_token = rows, split.bytes_per_token
        self.seq_length, self.micro_batch_size = rows.seq_length, rows.micro_batch_size
        self.memory_length_tokens = memory_length_tokens
        lengths = np.diff(rows.starts)
        self.num_all_segments = -(-int(lengths.max()) // rows.seq_length)
        self.num_segments = min(self.num_all_segments, max_segments)
        scored = np.minimum(lengths, self.num_segments * rows.seq_length)
        self.num_scored_tokens = int(scored.sum())

    @property
    def num_scored_bytes(self) -> float:
        """Bytes that the scored tokens stand for, as :class:`EvaluationWindows` counts them."""
        return self.num_scored_tokens * self._bytes_per_token

    @property
    def description(self) -> str:
        """How the split is read, for reports."""
        text = (
            f"{len(self.rows.starts) - 1} rows in order, segments of {self.seq_length} tokens with "
            f"up to {self.memory_length_tokens} of memory, every token scored once"
        )
        if self.num_segments < self.num_all_segments:
            text += f", the first {self.num_segments} of {self.num_all_segments} segments of a row"
        return text

    def __len__(self) -> int:
        return self.num_segments * len(self.rows.rows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        starts, length = self.rows.starts, self.seq_length
        for segment in range(self.num_segments):
            for numbers in self.rows.rows:
                positions = (starts[numbers] + segment * length)[:, None] + np.arange(length)
                yield self.rows.microbatch(positions, positions < starts[numbers + 1][:, None])
