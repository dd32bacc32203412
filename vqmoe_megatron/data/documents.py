"""Where the bytes of a corpus are: runs of bytes in text files, plain or packed, read in chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.data.packed_text import open_text

# With chunks of MiBs the arrays made from them fragment the C heap, and memory grows with the text.
CHUNK_BYTES = 64 * 2**10
MAX_UNCUT_BYTES = 16 * 2**20  # text without a place to cut is refused beyond this


def hash_text(path: Path, algorithms: tuple[str, ...]) -> dict[str, str]:
    """Return the hex digests of the uncompressed bytes, one per algorithm.

    Raises:
        ValueError: for a NUL byte: what has one is no text in UTF-8 or any 8-bit encoding, but a
            binary file, or UTF-16 or UTF-32 without its byte order mark.
    """
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    num_bytes = 0
    with open_text(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if (at := chunk.find(0)) >= 0:
                order = "LE" if (num_bytes + at) % 2 else "BE"  # of text like this one
                raise ValueError(
                    f"{path} is no text: byte {num_bytes + at} is NUL, as in a binary file or "
                    f"UTF-16; convert it (iconv -f UTF-16{order} -t UTF-8), or delete stray NULs "
                    "with tr -d '\\000'"
                )
            num_bytes += len(chunk)
            for digest in digests.values():
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in digests.items()}


@dataclass(frozen=True)
class Document:
    """``num_bytes`` bytes of a file from ``start_byte``: one document of the corpus."""

    path: Path
    start_byte: int
    num_bytes: int

    def read(self) -> Iterator[bytes]:
        """Yield the bytes in chunks; ``ValueError`` if the file has become shorter."""
        remaining_bytes = self.num_bytes
        with open_text(self.path) as stream:
            stream.seek(self.start_byte)
            while remaining_bytes:
                chunk = stream.read(min(CHUNK_BYTES, remaining_bytes))
                if not chunk:
                    raise ValueError(f"{self.path} ended {remaining_bytes} bytes early: it changed")
                remaining_bytes -= len(chunk)
                yield chunk


def document_pieces(
    document: Document, cut: Callable[[bytes], int], needs_utf8: bool
) -> Iterator[bytes]:
    """Yield the document in pieces of about ``CHUNK_BYTES`` that end where ``cut`` allows.

    ``cut(buffer)`` is the number of leading bytes that may be encoded on their own, 0 if more is
    needed. Raises ``ValueError`` for bytes that are not UTF-8 where the tokenizer needs it, and for
    ``MAX_UNCUT_BYTES`` without a place to cut.
    """
    pending = b""
    position = document.start_byte

    def checked(piece: bytes) -> bytes:
        if needs_utf8:
            try:
                piece.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{document.path} is not UTF-8 at byte {position + error.start} "
                    f"(0x{piece[error.start]:02x}); use the byte tokenizer for it"
                ) from error
        return piece

    for chunk in document.read():
        pending += chunk
        num_bytes = cut(pending)
        if num_bytes:
            yield checked(pending[:num_bytes])
            position += num_bytes
            pending = pending[num_bytes:]
        elif len(pending) >= MAX_UNCUT_BYTES:
            raise ValueError(
                f"{document.path} has no space or newline in {len(pending)} bytes from byte "
                f"{position}; use the byte or char tokenizer for it"
            )
    if pending:
        yield checked(pending)
