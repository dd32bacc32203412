"""Text files, plain or packed. What a file is, its first bytes say, not its name.

A file of no text that no mark here names has a NUL byte somewhere, which documents.py refuses.

| packing | |
|---|---|
| none | read as it is |
| gz, bz2, xz | read as a stream, or as several behind each other |
| zip of one file | that file is read |
| anything else of :data:`REFUSED`, an archive of several files, packing within packing | refused |
| UTF-16 or UTF-32, by its byte order mark | refused |

What cannot be unpacked (damaged, cut, encrypted, of another method) is a one-line ``ValueError``.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

HEAD_BYTES = tarfile.BLOCKSIZE  # a tar file is recognised by its first header
READ_BYTES = 16 * 2**10  # of a packed file at once: it may become a thousand times as much
ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# Marks, and what unpacks one stream. Python's own readers of bz2 and xz files pass over whatever
# follows the first stream and is none.
STREAMS: dict[str, tuple[tuple[bytes, ...], Callable[[], Any]]] = {
    "gz": ((b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    "bz2": (tuple(b"BZh%d" % level for level in range(1, 10)), bz2.BZ2Decompressor),
    "xz": ((b"\xfd7zXZ\x00",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
}
REFUSED = {
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes((n, 0x2A, 0x4D, 0x18)) for n in range(0x50, 0x60))),
    "lz4": (b"\x04\x22\x4d\x18",),
    "lzma": (b"\x5d\x00\x00",),
    "lzip": (b"LZIP\x01",),
    "compress": (b"\x1f\x9d",),
    "7z": (b"7z\xbc\xaf\x27\x1c",),
    "rar": (b"Rar!\x1a\x07",),
    "parquet": (b"PAR1",),
    "arrow": (b"ARROW1\x00\x00",),
    "pdf": (b"%PDF-",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "jpeg": (b"\xff\xd8\xff",),
    "sqlite": (b"SQLite format 3\x00",),
    "ELF": (b"\x7fELF",),
    "numpy": (b"\x93NUMPY",),
    "hdf5": (b"\x89HDF\r\n\x1a\n",),
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before UTF-16, whose mark begins it
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
UNREADABLE = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,  # zipfile: a method that it does not know
    RuntimeError,  # zipfile: encrypted
)


def packing(path: Path) -> str | None:
    """Return how ``path`` is packed, a name of the table above; None for a plain file."""
    with path.open("rb") as stream:
        return _packing_of(stream.read(HEAD_BYTES))


@contextmanager
def explained_packing(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong in unpacking ``path`` into a ``ValueError`` that says what to do."""
    try:
        yield
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        reason = f"it is damaged or cut ({error})"
        if isinstance(error, NotImplementedError):
            reason = f"it is packed by another method than Python knows ({error})"
        elif isinstance(error, RuntimeError):
            reason = "it is encrypted"
        raise ValueError(
            f"{path} is a {kind} file that cannot be unpacked here: {reason}; unpack it by other "
            "means, or get it again"
        ) from error


class PackedText:
    """The unpacked bytes of a file, for reading and seeking."""

    def __init__(self, path: Path, kind: str, stream: IO[bytes] | _Streams) -> None:
        self._path = path
        self._kind = kind
        self._stream = stream

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes, fewer only at the end; ``ValueError`` where unpacking fails."""
        with explained_packing(self._path, self._kind):
            return self._stream.read(num_bytes)

    def seek(self, position: int) -> int:
        """Go to a position in the unpacked bytes, which unpacks what lies before it."""
        with explained_packing(self._path, self._kind):
            return self._stream.seek(position)

    def __enter__(self) -> PackedText:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


def open_text(path: Path) -> IO[bytes] | PackedText:
    """Open a text, packed or not, for reading and seeking.

    Raises ``ValueError`` when the file is missing or not a regular file, and for a packing that is
    refused.
    """
    if not path.is_file():
        raise ValueError(f"input file {path} does not exist or is not a regular file")
    kind = packing(path)
    if kind is None:
        return path.open("rb")
    if kind != "zip" and kind not in STREAMS:
        _refuse(path, kind)
    with explained_packing(path, kind):
        stream = _only_member(path) if kind == "zip" else _Streams(path, STREAMS[kind][1])
        try:
            inner = _packing_of(stream.read(HEAD_BYTES))
            if inner is not None:
                _refuse(path, f"{inner} within {kind}")
            stream.seek(0)
        except BaseException:
            stream.close()
            raise
    return PackedText(path, kind, stream)


def text_size(path: Path) -> int:
    """Return the number of unpacked bytes that :func:`open_text` gives.

    A packed file is unpacked to its very end, so that a cut or damaged one is refused here.
    """
    with open_text(path) as stream:
        if not isinstance(stream, PackedText):
            return path.stat().st_size
        return sum(len(chunk) for chunk in iter(lambda: stream.read(READ_BYTES), b""))


class _Streams:
    """All streams of a gz, bz2 or xz file, unpacked; anything else behind them is an error."""

    def __init__(self, path: Path, new_decompressor: Callable[[], Any]) -> None:
        self._file = path.open("rb")
        self._new_decompressor = new_decompressor
        self._rewind()

    def _rewind(self) -> None:
        self._file.seek(0)
        self._position = 0  # in the unpacked bytes
        self._pieces = self._unpacked()
        self._piece, self._taken = b"", 0  # its first bytes have been read

    def _unpacked(self) -> Iterator[bytes]:
        decompressor = self._new_decompressor()
        while packed := self._file.read(READ_BYTES):
            while packed:
                if decompressor.eof:
                    packed = packed.lstrip(b"\0")  # padding
                    if not packed:
                        break
                    decompressor = self._new_decompressor()
                yield decompressor.decompress(packed)
                packed = decompressor.unused_data
        if not decompressor.eof:
            raise EOFError("it ends before its end-of-stream mark")

    def read(self, num_bytes: int) -> bytes:
        found = []
        while num_bytes:
            if self._taken == len(self._piece):
                try:
                    self._piece, self._taken = next(self._pieces), 0
                except StopIteration:
                    break
            part = self._piece[self._taken : self._taken + num_bytes]
            self._taken += len(part)
            self._position += len(part)
            num_bytes -= len(part)
            found.append(part)
        return b"".join(found)

    def seek(self, position: int) -> int:
        if position < self._position:
            self._rewind()
        while self._position < position and self.read(min(READ_BYTES, position - self._position)):
            pass
        return self._position

    def close(self) -> None:
        self._file.close()


def _packing_of(head: bytes) -> str | None:
    for kind, (marks, _) in STREAMS.items():
        if head.startswith(marks):
            return kind
    if head.startswith(ZIP):
        return "zip"
    for kind, marks in REFUSED.items():
        if head.startswith(marks):
            return kind
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return "tar"


def _only_member(path: Path) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"{path} holds {len(members)} files; give a zip of one, or the file")
        return archive.open(members[0])


def _refuse(path: Path, kind: str) -> NoReturn:
    if kind.startswith("UTF"):
        encoding = kind.split()[0]
        raise ValueError(
            f"{path} is {kind}, by its first bytes; convert it: iconv -f {encoding} -t UTF-8"
        )
    raise ValueError(
        f"{path} is no text but {kind}, by its first bytes; unpack or convert it and give the text "
        "(read as they are: plain text, gz, bz2, xz, a zip of one file)"
    )
