"""Evaluation over a whole split in order: each token but the first is scored exactly once.

Window w reads W tokens (seq_length, or ``window_tokens``) from token w * stride on and predicts the
W tokens shifted by one. Window 0 scores all its predictions; a later one scores its last
``stride``, the ones that no earlier window scored, each with at least W - stride tokens of context.
With stride = W windows do not overlap. What is left of a sample of S = seq_length tokens behind its
window, and the end of the last window, past the split, is filled with token 0 and masked: no token
sees what stands behind it.

    W = 4, stride 2, 8 tokens   t0 t1 t2 t3 t4 t5 t6 t7
    window 0 scores                t1 t2 t3 t4
    window 1 (from t2)                        t5 t6
    window 2 (from t4)                              t7

Documents are concatenated in order. Shapes: b = micro_batch_size, S = seq_length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from vqmoe_megatron.data.corpus import CorpusSplit


class EvaluationWindows:
    """Iterate over the windows of one data-parallel rank, as microbatches like TrainBatches'.

    Microbatch m of rank r holds the chosen windows ``(m * D + r) * b + [0, b)``; every rank yields
    ``len(self)`` of them, the last filled up with windows whose mask is all zero. ``max_windows``
    chooses that many windows spread evenly over the split, the first included; the choice depends
    on neither b nor D. Totals (``num_windows``, ``num_scored_tokens``, ``num_scored_bytes``) are
    over all ranks. Iterating again starts over. Does not communicate.

    Raises ``ValueError`` for a split of fewer than two tokens, a window outside 1..S or a stride
    outside 1..W.
    """

    def __init__(
        self,
        split: CorpusSplit,
        seq_length: int,
        stride_tokens: int | None = None,
        micro_batch_size: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_windows: int | None = None,
        window_tokens: int | None = None,
    ) -> None:
        window = seq_length if window_tokens is None else window_tokens
        if not 1 <= window <= seq_length:
            raise ValueError(f"window of {window} tokens must lie in 1..seq_length = {seq_length}")
        stride = window if stride_tokens is None else stride_tokens
        if not 1 <= stride <= window:
            name = "seq_length" if window_tokens is None else "window_tokens"
            raise ValueError(
                f"stride of {stride} tokens must lie in 1..{name} = {window}, or tokens "
                "between windows would never be scored"
            )
        if split.num_tokens < 2:
            raise ValueError(f"split {split.name} has {split.num_tokens} tokens; scoring needs two")
        if not 0 <= dp_rank < dp_size or micro_batch_size < 1:
            raise ValueError(
                f"need 0 <= dp_rank < dp_size and micro_batch_size >= 1, got {dp_rank}, {dp_size}, "
                f"{micro_batch_size}"
            )
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"max_windows={max_windows} must be at least 1")
        self.split = split
        self.seq_length = seq_length
        self.window_tokens = window
        self.stride_tokens = stride
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        num_predictions = split.num_tokens - 1
        self.num_all_windows = 1 + max(0, math.ceil((num_predictions - window) / stride))
        self.num_windows = min(self.num_all_windows, max_windows or self.num_all_windows)
        # [num_windows] the chosen windows
        self._chosen = np.arange(self.num_windows) * self.num_all_windows // self.num_windows
        starts, stops = self._scored_range(self._chosen)
        self.num_scored_tokens = int((stops - starts).sum())
        # [num_tokens], mapped once: a corpus that takes this one's place changes no evaluation
        self._tokens = np.memmap(split.bin_path, dtype=split.token_dtype, mode="r")

    def _scored_range(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scored predictions [start, stop) in each window, positions 0..W."""
        starts = np.where(windows == 0, 0, self.window_tokens - self.stride_tokens)
        stops = np.minimum(
            self.window_tokens, self.split.num_tokens - 1 - windows * self.stride_tokens
        )
        return starts, stops

    @property
    def num_scored_bytes(self) -> float:
        """Bytes that the scored tokens stand for.

        Exact for the byte tokenizer; for others the split's average bytes per token, times tokens.
        """
        return self.num_scored_tokens * self.split.bytes_per_token

    @property
    def first_tokens(self) -> np.ndarray:
        """int64 ``[num_windows]``: where in the split the chosen windows begin."""
        return self._chosen * self.stride_tokens

    @property
    def description(self) -> str:
        """How the split is read, for reports: 'window 256, stride 256 tokens'."""
        text = f"window {self.window_tokens}, stride {self.stride_tokens} tokens"
        if self.num_windows < self.num_all_windows:
            text += f", {self.num_windows} of {self.num_all_windows} windows, evenly spread"
        return text

    def __len__(self) -> int:
        return math.ceil(self.num_windows / (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch_size
            yield self._microbatch(self._chosen[first : first + self.micro_batch_size])

    def _microbatch(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        shape = (self.micro_batch_size, self.seq_length)
        text = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        for row, (window, start, stop) in enumerate(
            zip(windows, *self._scored_range(windows), strict=True)
        ):
            first = window * self.stride_tokens
            found = self._tokens[first : first + self.window_tokens + 1]
            text[row, : found.size] = found
            loss_mask[row, start:stop] = 1.0
        tokens = text[:, :-1].copy()
        tokens[:, self.window_tokens :] = 0
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(text[:, 1:].copy()),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.arange(shape[1]).repeat(shape[0], 1),
        }


def bits_per_byte(
    loss_sum_nats: float, num_scored_tokens: int, num_scored_bytes: float | None = None
) -> float:
    """Return the loss in bits per byte of text.

    ``num_scored_bytes`` None: a token is a byte. With a tokenizer that has ``<unk>`` the figure is
    too low, since the text cannot be restored from the tokens.
    """
    num_bytes = num_scored_tokens if num_scored_bytes is None else num_scored_bytes
    if num_bytes <= 0:
        raise ValueError("nothing was scored, so there is no loss per byte")
    return loss_sum_nats / math.log(2) / num_bytes


def perplexity(loss_sum_nats: float, num_scored_tokens: int) -> float:
    """Return exp(mean loss per token); infinite where that overflows."""
    if num_scored_tokens <= 0:
        raise ValueError("nothing was scored, so there is no perplexity")
    mean = loss_sum_nats / num_scored_tokens
    return math.exp(mean) if mean < 709.0 else math.inf
