"""Plain files and zip members are read the same way, in pieces that respect the cut."""

import zipfile

import pytest

from vqmoe_megatron.data import documents
from vqmoe_megatron.data.documents import Document, document_pieces, hash_text
from vqmoe_megatron.data.packed_text import text_size
from vqmoe_megatron.data.tokenizers import CharTokenizer, WordTokenizer


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 5)
    monkeypatch.setattr(documents, "MAX_UNCUT_BYTES", 20)


def test_zip_member_reads_like_the_plain_file(tmp_path, library_file):
    archive = tmp_path / "text.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.write(library_file, "text")
    content = library_file.read_bytes()
    assert text_size(archive) == text_size(library_file) == len(content)
    assert hash_text(archive, ("sha1",)) == hash_text(library_file, ("sha1",))
    assert b"".join(Document(archive, 1000, 5000).read()) == content[1000:6000]


def test_zip_of_two_files_missing_file_and_directory_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as stream:
        stream.writestr("a", "a")
        stream.writestr("b", "b")
    for path, message in ((tmp_path / "two.zip", "2 files"), (tmp_path / "no", "does not exist")):
        with pytest.raises(ValueError, match=message):
            text_size(path)
    with pytest.raises(ValueError, match="regular file"):
        text_size(tmp_path)


def test_pieces_end_at_whitespace_and_add_up(tmp_path, small_chunks):
    text = b"one two three four-five\nsix"
    (tmp_path / "x").write_bytes(text)
    pieces = list(document_pieces(Document(tmp_path / "x", 0, len(text)), WordTokenizer.cut, True))
    assert b"".join(pieces) == text
    assert all(piece[-1:].isspace() for piece in pieces[:-1]) and len(pieces) > 3


def test_characters_across_chunks_are_whole(tmp_path, small_chunks):
    text = "aé日🙂é日🙂x".encode()
    (tmp_path / "x").write_bytes(text)
    pieces = list(document_pieces(Document(tmp_path / "x", 0, len(text)), CharTokenizer.cut, True))
    assert b"".join(pieces) == text and len(pieces) > 2


def test_invalid_utf8_is_named_by_its_place(tmp_path, small_chunks):
    text = "日本 日本 ".encode() + b"ab\xffcd"
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError, match="not UTF-8 at byte 16 .0xff"):
        list(document_pieces(Document(tmp_path / "x", 0, len(text)), CharTokenizer.cut, True))


def test_text_without_whitespace_is_refused_before_memory_fills(tmp_path, small_chunks):
    (tmp_path / "x").write_bytes(b"a" * 100)
    with pytest.raises(ValueError, match="no space or newline in 20 bytes"):
        list(document_pieces(Document(tmp_path / "x", 0, 100), WordTokenizer.cut, True))


def test_a_file_that_became_shorter_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(ValueError, match="7 bytes early"):
        list(Document(tmp_path / "x", 0, 10).read())
