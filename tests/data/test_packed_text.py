"""Packed text is recognised by its first bytes, read to its very end, or refused in one line."""

import bz2
import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import zipfile
import zlib

import pytest

from vqmoe_megatron import cli
from vqmoe_megatron.data import corpora, packed_text
from vqmoe_megatron.data.corpora import KnownText
from vqmoe_megatron.data.documents import Document, hash_text
from vqmoe_megatron.data.packed_text import open_text, text_size
from vqmoe_megatron.data.prepare import prepare_corpus

TEXT = b"".join(b"line %d of a text, %s\n" % (n, hex(n * n * 7919).encode()) for n in range(4000))


def zipped(*members: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for number, content in enumerate(members):
            archive.writestr(f"{number}.txt", content)
    return stream.getvalue()


def tarred(mode: str = "w", format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=format) as archive:
        member = tarfile.TarInfo("mine.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return stream.getvalue()


def patched_zip(offset: int, in_directory: int, value: bytes) -> bytes:
    """A zip of one file with another value in its local and in its central header."""
    content = bytearray(zipped(TEXT))
    central = content.find(b"PK\x01\x02")
    content[offset : offset + len(value)] = value
    content[central + in_directory : central + in_directory + len(value)] = value
    return bytes(content)


def broken(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 64]) + content[at + 64 :]


HALVES = (TEXT[:50_000], TEXT[50_000:])
READABLE = {
    "plain": TEXT,
    "gz": gzip.compress(TEXT),
    "bz2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zip": zipped(TEXT),
    "stored zip": zipped(TEXT, method=zipfile.ZIP_STORED),
    "bzip2 in zip": zipped(TEXT, method=zipfile.ZIP_BZIP2),
    "lzma in zip": zipped(TEXT, method=zipfile.ZIP_LZMA),
    "two gz": b"".join(map(gzip.compress, HALVES)),
    "two bz2": b"".join(map(bz2.compress, HALVES)),
    "two xz": b"".join(map(lzma.compress, HALVES)),
    "two xz with padding": bytes(4).join(map(lzma.compress, HALVES)) + bytes(8),
    "gz with padding": gzip.compress(TEXT) + bytes(100_000),
    "text that begins like a name": b"BZhang and LZIP are words\n" + TEXT,
}
GZ, BZ2, XZ, ZIP = (READABLE[kind] for kind in ("gz", "bz2", "xz", "zip"))
UNREADABLE = {
    "cut gz": GZ[: len(GZ) // 2],
    "gz cut in its checksum": GZ[:-3],
    "gz of a header": GZ[:10],
    "damaged gz": broken(GZ, len(GZ) // 2),
    "gz with a wrong checksum": GZ[:-8] + struct.pack("<LL", zlib.crc32(TEXT) ^ 1, len(TEXT)),
    "gz with more behind it": GZ + b"more",
    "second gz cut": GZ + GZ[:-9],
    "cut bz2": BZ2[:-20],
    "damaged bz2": broken(BZ2, len(BZ2) // 2),
    "bz2 with more behind it": BZ2 + b"more",
    "second bz2 damaged": BZ2 + b"X" + BZ2[1:],
    "cut xz": XZ[:-20],
    "damaged xz": broken(XZ, len(XZ) // 2),
    "xz with more behind it": XZ + b"more",
    "second xz cut": XZ + XZ[:40],
    "cut zip": ZIP[:-30],
    "zip cut in the middle": ZIP[: len(ZIP) // 2],
    "damaged zip": broken(ZIP, len(ZIP) // 2),
    "zip with a wrong checksum": patched_zip(14, 16, b"\0\0\0\0"),
    "deflate64 zip": patched_zip(8, 10, struct.pack("<H", 9)),
    "zip of an unknown method": patched_zip(8, 10, struct.pack("<H", 98)),
    "damaged lzma in zip": broken(zipped(TEXT, method=zipfile.ZIP_LZMA), 60),
    "damaged bzip2 in zip": broken(zipped(TEXT, method=zipfile.ZIP_BZIP2), 60),
    "encrypted zip": patched_zip(6, 8, b"\x01\x00"),
}
REFUSED = {
    "zstd": b"\x28\xb5\x2f\xfd" + TEXT,
    "zstd, skippable frame first": b"\x53\x2a\x4d\x18" + TEXT,
    "lz4": b"\x04\x22\x4d\x18" + TEXT,
    "7z": b"7z\xbc\xaf\x27\x1c" + TEXT,
    "rar": b"Rar!\x1a\x07\x01\x00" + TEXT,
    "lzma": lzma.compress(TEXT, lzma.FORMAT_ALONE),
    "compress": b"\x1f\x9d\x90" + TEXT,
    "lzip": b"LZIP\x01" + TEXT,
    "parquet": b"PAR1" + TEXT,
    "arrow": b"ARROW1\0\0" + TEXT,
    "pdf": b"%PDF-1.7" + TEXT,
    "png": b"\x89PNG\r\n\x1a\n" + TEXT,
    "jpeg": b"\xff\xd8\xff\xe0" + TEXT,
    "sqlite": b"SQLite format 3\0" + TEXT,
    "ELF": b"\x7fELF" + TEXT,
    "ELF within gz": gzip.compress(b"\x7fELF" + TEXT),
    "tar": tarred(),
    "tar, ustar": tarred(format=tarfile.USTAR_FORMAT),
    "tar within gz": tarred("w:gz"),
    "tar within bz2": tarred("w:bz2"),
    "tar within xz": tarred("w:xz"),
    "gz within zip": zipped(GZ),
    "zip within gz": gzip.compress(ZIP),
    "gz within gz": gzip.compress(GZ),
    "zip of two": zipped(TEXT, TEXT),
    "zip of none": zipped(),
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE.keys())
def test_it_reads_like_the_plain_file(tmp_path, content):
    path, plain = tmp_path / "packed.txt", tmp_path / "plain"
    path.write_bytes(content)
    text = content if content.startswith(b"BZhang") else TEXT
    plain.write_bytes(text)
    assert text_size(path) == len(text)
    assert hash_text(path, ("sha256",)) == hash_text(plain, ("sha256",))
    with open_text(path) as stream:
        for start, size in ((70_000, 9), (5, 70_000), (len(text) - 3, 10), (0, 1), (len(text), 1)):
            stream.seek(start)
            assert stream.read(size) == text[start : start + size]
    assert b"".join(Document(path, 1000, 90_000).read()) == text[1000:91_000]


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_unpacked_is_one_line_and_leaves_nothing(tmp_path, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="mine.txt is a .* cannot be unpacked here: ") as refused:
        prepare_corpus("text", tmp_path / "out", [path])
    assert "\n" not in str(refused.value) and "unpack it by other means" in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("kind", "content"), REFUSED.items(), ids=REFUSED.keys())
def test_another_packing_is_refused_by_its_name(tmp_path, kind, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    message = (
        "holds [02] files" if kind.startswith("zip of") else f"no text but {kind.split(',')[0]}"
    )
    with pytest.raises(ValueError, match=f"mine.txt (is )?{message}"):
        prepare_corpus("text", tmp_path / "out", [path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_is_refused_with_what_converts_it(tmp_path, encoding, pack):
    path = tmp_path / "mine.txt"
    path.write_bytes(pack(TEXT.decode().encode(encoding)))
    with pytest.raises(ValueError, match=f"iconv -f {encoding.upper()} -t UTF-8"):
        prepare_corpus("text", tmp_path / "out", [path])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


WITH_NULS = {
    "UTF-16 without a mark": (TEXT.decode().encode("utf-16-le"), 1),
    "UTF-32 without a mark": (TEXT.decode().encode("utf-32-be"), 0),
    "self-extracting zip": (b"#!/bin/sh\nexec unzip $0\n" + ZIP, 29),
    "an unknown binary": (bytes(range(200, -1, -1)) * 20, 200),
    "one far behind the head": (TEXT + b"\0" + TEXT, len(TEXT)),
}


@pytest.mark.parametrize("pack", [bytes, bz2.compress], ids=["plain", "bz2"])
@pytest.mark.parametrize(("content", "at"), WITH_NULS.values(), ids=WITH_NULS.keys())
def test_a_nul_anywhere_is_refused_with_its_place(tmp_path, content, at, pack):
    path = tmp_path / "mine.txt"
    path.write_bytes(pack(content))
    with pytest.raises(ValueError, match=f"mine.txt is no text: byte {at} is NUL") as refused:
        prepare_corpus("text", tmp_path / "out", [path])
    assert "\n" not in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_eight_bit_text_is_bytes_and_refused_where_characters_are_read(tmp_path):
    path, latin = tmp_path / "mine.txt", TEXT + "caf\xe9\n".encode("latin-1") * 3000
    path.write_bytes(latin)
    corpus = prepare_corpus("text", tmp_path / "out", [path])
    assert b"".join(split.bin_path.read_bytes() for split in corpus.splits.values()) == latin
    for tokenizer in ("char", "word", "sentencepiece"):
        with pytest.raises(ValueError, match=f"not UTF-8 at byte {len(TEXT) + 3} .0xe9"):
            prepare_corpus("text", tmp_path / "other", [path], tokenizer)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "sentencepiece"])
def test_for_every_tokenizer_packed_text_gives_the_corpus_of_the_plain(tmp_path, tokenizer):
    vocab_size = 300 if tokenizer == "sentencepiece" else None
    (tmp_path / "plain").write_bytes(TEXT)
    (tmp_path / "packed").write_bytes(READABLE["two bz2"])
    plain, packed = (
        prepare_corpus("text", tmp_path / f"{name}-out", [tmp_path / name], tokenizer, vocab_size)
        for name in ("plain", "packed")
    )
    for name, split in plain.splits.items():
        assert split.bin_path.read_bytes() == packed.split(name).bin_path.read_bytes()
    (tmp_path / "tar").write_bytes(tarred("w:gz"))
    with pytest.raises(ValueError, match="no text but tar within gz"):
        prepare_corpus("text", tmp_path / "out", [tmp_path / "tar"], tokenizer, vocab_size)


@pytest.mark.parametrize(
    "kind", ["cut gz", "damaged zip", "encrypted zip", "bz2 with more behind it"]
)
def test_a_known_text_is_no_exception(tmp_path, monkeypatch, kind):
    known = KnownText("text8", "-", len(TEXT), "md5", hashlib.md5(TEXT).hexdigest(), 5000, 4000)
    monkeypatch.setitem(corpora.KNOWN_TEXTS, "text8", known)
    (tmp_path / "text8").write_bytes(UNREADABLE[kind])
    with pytest.raises(ValueError, match="cannot be unpacked here"):
        prepare_corpus("text8", tmp_path / "out", [tmp_path / "text8"])
    (tmp_path / "text8").write_bytes(XZ)
    corpus = prepare_corpus("text8", tmp_path / "out", [tmp_path / "text8"])
    assert corpus.split("test").bin_path.read_bytes() == TEXT[-4000:]


def test_a_disk_that_fails_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.gz"
    path.write_bytes(GZ)

    def fail(self, num_bytes):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(packed_text._Streams, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        text_size(path)


def test_the_command_ends_with_2_and_one_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.zip"
    path.write_bytes(UNREADABLE["deflate64 zip"])
    monkeypatch.setattr(
        "sys.argv", ["vqmoe", "prepare", "text", "--input", str(path), "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
