"""prepare end to end: what Megatron reads back, what a kill leaves, what a second run does."""

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from vqmoe_megatron.data import corpora
from vqmoe_megatron.data.corpora import KnownText
from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.data.corpus_folder import BUILDING_DIR
from vqmoe_megatron.data.prepare import prepare_corpus
from vqmoe_megatron.data.tokenizers import load_tokenizer

RUN = """
import sys
from pathlib import Path
from vqmoe_megatron.data.prepare import prepare_corpus
prepare_corpus("text", Path(sys.argv[1]), [Path(sys.argv[2])])
"""


def read_back(corpus, split):
    """All tokens of a split through Megatron's own reader."""
    dataset = IndexedDataset(str(corpus.split(split).prefix))
    assert len(dataset.document_indices) - 1 == corpus.split(split).num_documents
    return np.concatenate(dataset[:])


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "dtype"),
    [
        ("byte", None, "uint8"),
        ("char", None, "uint8"),
        ("word", 2000, "uint16"),
        ("sentencepiece", 600, "uint16"),
    ],
)
def test_megatron_reads_back_the_text(tmp_path, library_file, tokenizer, vocab_size, dtype):
    corpus = prepare_corpus("text", tmp_path, [library_file], tokenizer, vocab_size)
    loaded = load_tokenizer(tmp_path, corpus.tokenizer)
    text = library_file.read_bytes()
    start = 0
    for name, split in corpus.splits.items():
        ids = read_back(corpus, name)
        assert ids.dtype == dtype == corpus.token_dtype and ids.size == split.num_tokens
        expected = text[start : start + split.num_bytes]
        np.testing.assert_array_equal(ids, loaded.encode(expected))
        if tokenizer != "word":
            assert loaded.decode(ids) == expected
        start += split.num_bytes
    assert start == len(text)


def test_stdlib_has_one_document_per_file(tmp_path):
    corpus = prepare_corpus("stdlib", tmp_path, [])
    assert sum(s.num_documents for s in corpus.splits.values()) == corpus.source["num_files"]
    train = read_back(corpus, "train").tobytes()
    assert train == corpus.split("train").bin_path.read_bytes()
    assert corpus.split("train").num_tokens > 20 * corpus.split("valid").num_tokens > 0


def test_a_known_text_from_a_zip(tmp_path, monkeypatch, library_file):
    text = library_file.read_bytes()
    known = KnownText("text8", "-", len(text), "md5", hashlib.md5(text).hexdigest(), 5000, 4000)
    monkeypatch.setitem(corpora.KNOWN_TEXTS, "text8", known)
    with zipfile.ZipFile(tmp_path / "text8.zip", "w", zipfile.ZIP_DEFLATED) as stream:
        stream.write(library_file, "text8")
    corpus = prepare_corpus("text8", tmp_path / "out", [tmp_path / "text8.zip"])
    assert read_back(corpus, "valid").tobytes() == text[-9000:-4000]
    assert read_back(corpus, "test").tobytes() == text[-4000:]
    assert prepare_corpus("text8", tmp_path / "out", []) == corpus  # complete: needs no input


def test_killed_prepare_leaves_no_corpus_and_a_second_run_succeeds(tmp_path, library_file):
    big = tmp_path / "big.txt"
    with big.open("wb") as stream:
        for _ in range(3000):  # 300 MB: long enough to be killed inside
            stream.write(library_file.read_bytes())
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(out), str(big)])
    deadline = time.monotonic() + 30
    written = out / BUILDING_DIR / "corpus" / "train.bin"
    while not (written.exists() and written.stat().st_size > 2**20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < written.stat().st_size < big.stat().st_size * 0.9
    with pytest.raises(ValueError, match="interrupted"):
        load_corpus(out)
    os.truncate(big, 1_000_000)
    corpus = prepare_corpus("text", out, [big])
    parts = [read_back(load_corpus(out), split).tobytes() for split in corpus.splits]
    assert b"".join(parts) == big.read_bytes()


def test_second_run_does_nothing_and_another_request_is_refused(tmp_path, library_file, capsys):
    out = tmp_path / "out"
    first = prepare_corpus("text", out, [library_file])
    before = (out / "train.bin").stat()
    assert prepare_corpus("text", out, [library_file]) == first
    assert "already holds this corpus" in capsys.readouterr().out
    after = (out / "train.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(ValueError, match="tokenizer: it has 'byte', asked for 'char'.*--overwrite"):
        prepare_corpus("text", out, [library_file], "char")
    other = tmp_path / "other.txt"
    other.write_bytes(library_file.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="source"):
        prepare_corpus("text", out, [other])
    with pytest.raises(ValueError, match="'text', asked for 'enwik8'"):
        prepare_corpus("enwik8", out, [])
    assert load_corpus(out) == first


def test_overwrite_replaces_everything_of_the_old_corpus(tmp_path, library_file):
    prepare_corpus("text", tmp_path, [library_file], "char")
    (tmp_path / "cache").mkdir()
    old = np.memmap(tmp_path / "train.bin", dtype=np.uint8, mode="r")
    digest = hashlib.sha256(old).hexdigest()
    corpus = prepare_corpus("text", tmp_path, [library_file] * 2, overwrite=True)
    assert list(corpus.splits) == ["train", "valid"]
    assert not {"cache", "test.bin", "tokenizer.json"} & {path.name for path in tmp_path.iterdir()}
    assert hashlib.sha256(old).hexdigest() == digest  # a process still reading is not disturbed


def test_a_damaged_corpus_is_prepared_again(tmp_path, library_file, capsys):
    first = prepare_corpus("text", tmp_path, [library_file])
    (tmp_path / "train.bin").write_bytes(b"")
    assert prepare_corpus("text", tmp_path, [library_file]) == first
    assert "preparing again" in capsys.readouterr().out


def test_two_at_once_are_refused(tmp_path, library_file):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
            "print(flush=True); sys.stdin.read()",
            str(tmp_path / ".prepare.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(ValueError, match="another prepare"):
        prepare_corpus("text", tmp_path, [library_file])
    holder.communicate()
    prepare_corpus("text", tmp_path, [library_file])


def test_what_cannot_be_read_or_written_is_explained(tmp_path, library_file):
    blocker = tmp_path / "file"
    blocker.write_bytes(b"\xff not utf-8\n" * 1000)
    with pytest.raises(ValueError, match="cannot prepare a corpus in"):
        prepare_corpus("text", blocker / "out", [library_file])
    for tokenizer in ("char", "word", "sentencepiece"):
        with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
            prepare_corpus("text", tmp_path / "out", [blocker], tokenizer)
    with pytest.raises(ValueError, match="no corpus|has no corpus.json"):
        load_corpus(tmp_path / "out")
    (tmp_path / "blank").write_bytes(b" " * 100)
    with pytest.raises(ValueError, match="valid split .* holds no word token"):
        prepare_corpus("text", tmp_path / "out", [library_file, tmp_path / "blank"], "word")


def test_splits_of_the_same_bytes_are_said(tmp_path, library_file, capsys):
    text = library_file.read_bytes()
    (tmp_path / "copy.gz").write_bytes(gzip.compress(text))
    (tmp_path / "other").write_bytes(text + b"\n")
    inputs = [library_file, tmp_path / "copy.gz", tmp_path / "other"]
    prepare_corpus("text", tmp_path / "out", inputs)
    shown = capsys.readouterr().out
    assert "valid (copy.gz) is the text of train, byte for byte" in shown
    assert "test (other)" not in shown


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "said"),
    [
        ("word", 12, "train: 2 of 22 tokens (9.09%) are <unk>"),
        ("word", None, "valid: 2 of 12 tokens (16.67%) are <unk>"),
        ("char", None, "valid: 3 of 21 tokens (14.29%) are <unk>"),
    ],
)
def test_the_share_of_text_outside_the_vocabulary_is_said(
    tmp_path, capsys, tokenizer, vocab_size, said
):
    (tmp_path / "train").write_text("a b c d e f g h i j k l\na b c d e f g h\n")
    (tmp_path / "valid").write_text("a b Xx c Y\na b c d e\n")
    prepare_corpus(
        "text",
        tmp_path / "out",
        [tmp_path / "train", tmp_path / "valid"],
        tokenizer,
        vocab_size,
    )
    assert said in capsys.readouterr().out
