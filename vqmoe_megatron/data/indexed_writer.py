"""Stream tokens into Megatron's ``.bin/.idx`` pair with memory independent of the corpus size.

``.bin`` holds the tokens of all documents back to back. ``.idx`` holds, little-endian: the header
``MMIDIDX\\0\\0``, version 1 (uint64), the token dtype code (uint8), the number of sequences and of
document boundaries (uint64), the length of each sequence (int32), its byte offset (int64) and the
sequence number at each document boundary (int64). Megatron's own ``IndexedDatasetBuilder`` writes
the same bytes, but takes a whole sequence as one tensor (and needs torch): one 90 MB document could
not be streamed. A document is one sequence here, unless it passes ``MAX_SEQUENCE_TOKENS``.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

INDEX_HEADER = b"MMIDIDX\x00\x00"
# Codes of megatron.core.datasets.indexed_dataset.DType for the dtypes a token can have.
DTYPE_CODES = {"uint8": 1, "int32": 4, "uint16": 8}
# Sequence lengths and the offsets in GPTDataset's sample index are int32.
MAX_SEQUENCE_TOKENS = 2**30
INDEX_BLOCK = 65536  # sequences whose offsets are computed at once when the index is written


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest token dtype for ``vocab_size`` (65500: Megatron's own uint16 limit)."""
    if vocab_size <= 256:
        return "uint8"
    return "uint16" if vocab_size < 65500 else "int32"


class IndexedWriter:
    """Write one split. Use as a context manager: the ``.idx`` appears only on a clean exit.

    ``prefix`` is the path without suffix. Does not communicate.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.bin_path = Path(f"{prefix}.bin")
        self.idx_path = Path(f"{prefix}.idx")
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self.num_documents = 0
        self._sequence_lengths = array("i")  # [num_sequences] tokens
        self._document_ends = array("q", [0])  # [num_documents + 1] sequence numbers
        self._open_sequence_tokens = 0
        self._bin = self.bin_path.open("wb")

    def write(self, ids: np.ndarray) -> None:
        """Append ``ids`` [T], any integer dtype whose values fit, to the open document."""
        ids = np.ascontiguousarray(ids, dtype=self.dtype)
        start = 0
        while start < ids.size:
            stop = min(ids.size, start + MAX_SEQUENCE_TOKENS - self._open_sequence_tokens)
            self._bin.write(ids[start:stop].data)
            self._open_sequence_tokens += stop - start
            if self._open_sequence_tokens == MAX_SEQUENCE_TOKENS:
                self._end_sequence()
            start = stop
        self.num_tokens += ids.size

    def end_document(self) -> None:
        """Close the open document; a document without tokens leaves no trace."""
        self._end_sequence()
        if len(self._sequence_lengths) > self._document_ends[-1]:
            self._document_ends.append(len(self._sequence_lengths))
            self.num_documents += 1

    def _end_sequence(self) -> None:
        if self._open_sequence_tokens:
            self._sequence_lengths.append(self._open_sequence_tokens)
            self._open_sequence_tokens = 0

    def _index_blocks(self) -> Iterator[bytes]:
        yield INDEX_HEADER
        yield struct.pack("<QB", 1, DTYPE_CODES[self.dtype.name])
        yield struct.pack("<QQ", len(self._sequence_lengths), len(self._document_ends))
        lengths = np.frombuffer(self._sequence_lengths, dtype=np.int32)
        yield lengths.tobytes()
        offset_bytes = 0
        for start in range(0, lengths.size, INDEX_BLOCK):
            sizes = lengths[start : start + INDEX_BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = offset_bytes + np.cumsum(sizes)
            yield (ends - sizes).tobytes()
            offset_bytes = int(ends[-1])
        yield np.frombuffer(self._document_ends, dtype=np.int64).tobytes()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._bin:
            if exc_type is not None:
                return
            self._bin.flush()
            os.fsync(self._bin.fileno())
        with self.idx_path.open("wb") as stream:
            stream.writelines(self._index_blocks())
            stream.flush()
            os.fsync(stream.fileno())
