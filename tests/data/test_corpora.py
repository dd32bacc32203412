"""Which text goes into which split, and which requests are refused."""

import hashlib
import sysconfig
from pathlib import Path

import pytest

from vqmoe_megatron.data import download
from vqmoe_megatron.data.corpora import (
    KNOWN_TEXTS,
    KnownText,
    check_corpus_request,
    known_text_source,
    open_source,
    stdlib_split,
)

NOWHERE = Path("/nowhere")  # these corpora unpack nothing


def split_bytes(source, split):
    return b"".join(b"".join(document.read()) for document in source.documents[split])


def known_text(content: bytes) -> KnownText:
    return KnownText("tiny", "-", len(content), "sha1", hashlib.sha1(content).hexdigest(), 5, 6)


def test_stdlib_is_split_by_name_and_deterministic():
    first, second = (open_source("stdlib", [], None, False, NOWHERE) for _ in range(2))
    assert first == second
    root = Path(sysconfig.get_path("stdlib"))
    names = {
        split: [document.path.relative_to(root).as_posix() for document in documents]
        for split, documents in first.documents.items()
    }
    everything = [name for split in names.values() for name in split]
    assert "argparse.py" in everything and len(set(everything)) == len(everything) > 300
    assert not [name for name in everything if "site-packages" in name or "/test/" in name]
    for split, members in names.items():
        assert members == sorted(members) and all(stdlib_split(name) == split for name in members)
    assert 0.9 < len(names["train"]) / len(everything) < 0.98
    assert first.description["num_bytes"] == sum(
        document.num_bytes for documents in first.documents.values() for document in documents
    )


def test_one_text_is_split_in_order_at_line_starts(library_file):
    source = open_source("text", [library_file], None, False, NOWHERE)
    parts = [split_bytes(source, split) for split in ("train", "valid", "test")]
    text = library_file.read_bytes()
    assert b"".join(parts) == text
    assert parts[0].endswith(b"\n") and parts[1].endswith(b"\n")
    assert 0.9 <= len(parts[0]) / len(text) < 0.91 and 0.04 < len(parts[1]) / len(text) < 0.06
    assert source.description["inputs"] == [
        {
            "name": "argparse.py",
            "num_bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        }
    ]


def test_two_and_three_inputs_are_the_splits(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name * 3)
    source = open_source("text", paths, None, False, NOWHERE)
    assert [split_bytes(source, split) for split in source.documents] == [b"aaa", b"bbb", b"ccc"]
    two = open_source("text", paths[:2], None, False, NOWHERE)
    assert list(two.documents) == ["train", "valid"]


def test_known_text_is_split_byte_exactly_or_at_characters(tmp_path):
    content = "日本語日本語日本語".encode()
    (tmp_path / "tiny").write_bytes(content)
    source = known_text_source(known_text(content), tmp_path / "tiny", keep_characters=False)
    assert [split_bytes(source, split) for split in ("train", "valid", "test")] == [
        content[:16],
        content[16:21],
        content[21:],
    ]
    source = known_text_source(known_text(content), tmp_path / "tiny", keep_characters=True)
    assert split_bytes(source, "train") == content[:18]
    assert split_bytes(source, "valid") == content[18:21]


def test_altered_known_text_is_refused(tmp_path):
    content = b"some text of a known size"
    (tmp_path / "tiny").write_bytes(content.replace(b"known", b"KNOWN"))
    with pytest.raises(ValueError, match="is not tiny: its sha1"):
        known_text_source(known_text(content), tmp_path / "tiny", False)
    with pytest.raises(ValueError, match="25 bytes instead of 100000000"):
        open_source("enwik8", [tmp_path / "tiny"], None, False, NOWHERE)


def test_a_wrong_download_is_not_kept_and_a_wrong_file_of_that_name_not_removed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(download, "download_file", lambda url, target: target.write_bytes(b"error"))
    with pytest.raises(ValueError, match="is not text8"):
        open_source("text8", [], tmp_path, False, tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    (tmp_path / "text8.zip").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not text8.*move it away to have it downloaded"):
        open_source("text8", [], tmp_path, False, tmp_path / "work")
    assert (tmp_path / "text8.zip").read_bytes() == b"mine"


def test_digests_of_known_texts_are_whole():
    for known in KNOWN_TEXTS.values():
        assert len(known.digest) == 2 * hashlib.new(known.algorithm).digest_size


@pytest.mark.parametrize(
    ("corpus", "num_inputs", "download", "message"),
    [
        ("wikitext-2", 0, False, "stdlib, text, enwik8, text8, wikitext-103, lm1b"),
        ("stdlib", 1, False, "takes no --input"),
        ("stdlib", 0, True, "nothing to download"),
        ("text", 0, False, "needs one --input"),
        ("text", 4, False, "not 4"),
        ("enwik8", 2, False, "one file"),
        ("text8", 1, True, "not both"),
    ],
)
def test_requests_that_do_not_fit_are_refused(corpus, num_inputs, download, message):
    with pytest.raises(ValueError, match=message):
        check_corpus_request(corpus, [Path("x")] * num_inputs, download)


def test_inputs_that_cannot_work_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "tiny").write_text("a\nb\n")
    for name, message in (("no", "does not exist"), ("empty", "is empty"), ("tiny", "too small")):
        with pytest.raises(ValueError, match=message):
            open_source("text", [tmp_path / name], None, False, NOWHERE)
    with pytest.raises(ValueError, match="--input FILE .* or --download"):
        open_source("enwik8", [], None, False, NOWHERE)
