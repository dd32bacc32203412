"""WikiText-103 and One Billion Words in their real file layouts, with small texts in the files."""

import dataclasses
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vqmoe_megatron.data.corpus_folder import BUILDING_DIR
from vqmoe_megatron.data.prepare import prepare_corpus
from vqmoe_megatron.data.released import RELEASED_CORPORA
from vqmoe_megatron.data.tokenizers import load_tokenizer

WIKI_FOLDER = "wikitext-103"
LM1B_FOLDER = "1-billion-word-language-modeling-benchmark-r13output"
TRAIN_FOLDER = f"{LM1B_FOLDER}/training-monolingual.tokenized.shuffled"
HELDOUT_FOLDER = f"{LM1B_FOLDER}/heldout-monolingual.tokenized.shuffled"


def ids_of(corpus, split):
    found = corpus.split(split)
    return np.memmap(found.bin_path, dtype=found.token_dtype, mode="r")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def wiki_files() -> dict[str, bytes]:
    """The first lines of an article in WikiText's own format, three times."""
    text = " \n = Valkyria Chronicles III = \n \n The game , a <unk> role @-@ playing game . \n"
    return {
        f"{WIKI_FOLDER}/wiki.train.tokens": text.encode() * 2,
        f"{WIKI_FOLDER}/wiki.valid.tokens": b" \n = The game = \n",
        f"{WIKI_FOLDER}/wiki.test.tokens": b" \n A role , a song . \n",
    }


@pytest.fixture
def wikitext(tmp_path, monkeypatch, wiki_files) -> Path:
    """A zip laid out like the released one, whose digests stand in for the real ones."""
    path = write_zip(tmp_path / "wikitext-103-v1.zip", {f"{WIKI_FOLDER}/": b"", **wiki_files})
    known = dataclasses.replace(
        RELEASED_CORPORA["wikitext-103"],
        sha256=sha256(path),
        file_sha1={
            Path(name).name: hashlib.sha1(content).hexdigest()
            for name, content in wiki_files.items()
        },
    )
    monkeypatch.setitem(RELEASED_CORPORA, "wikitext-103", known)
    return path


@pytest.fixture
def lm1b_files() -> dict[str, bytes]:
    """All 99 training shards, two sentences each, and the held-out ones, the shards' name twin too.

    The vocabulary is capped at 6 words, which is not all of them.
    """
    contents = {
        f"{TRAIN_FOLDER}/news.en-{shard:05d}-of-00100": f"A dog ran .\nShard {shard} .\n".encode()
        for shard in reversed(range(1, 100))  # as an archive may list them
    }
    contents[f"{HELDOUT_FOLDER}/news.en-00000-of-00100"] = b"The whole held out text .\n"
    for part in range(50):
        contents[f"{HELDOUT_FOLDER}/news.en.heldout-{part:05d}-of-00050"] = (
            f"A cat ran {part} .\n".encode()
        )
    contents[f"{LM1B_FOLDER}/README"] = b"not text to train on"
    return contents


@pytest.fixture
def lm1b(tmp_path, monkeypatch, lm1b_files) -> Path:
    path = write_tar(tmp_path / f"{LM1B_FOLDER}.tar.gz", lm1b_files)
    known = dataclasses.replace(
        RELEASED_CORPORA["lm1b"], sha256=sha256(path), num_train_lines=198, word_vocab_size=6
    )
    monkeypatch.setitem(RELEASED_CORPORA, "lm1b", known)
    return path


def unpacked(root: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_digests_are_whole_and_every_wikitext_file_has_one():
    for known in RELEASED_CORPORA.values():
        assert len(known.sha256) == 64 and set(known.file_sha1) <= set(known.file_names)
        assert all(len(digest) == 40 for digest in known.file_sha1.values())
    assert set(RELEASED_CORPORA["wikitext-103"].file_sha1) == {
        "wiki.train.tokens",
        "wiki.valid.tokens",
        "wiki.test.tokens",
    }
    assert len(RELEASED_CORPORA["lm1b"].splits["train"]) == 99


def test_wikitext_words_end_every_line_with_eos(tmp_path, wikitext, wiki_files):
    corpus = prepare_corpus("wikitext-103", tmp_path / "out", [wikitext], "word")
    tokenizer = load_tokenizer(corpus.path, corpus.tokenizer)
    words = [tokenizer.words[index] for index in ids_of(corpus, "train")]
    # 4 lines per copy: an empty one, a title, an empty one, a paragraph with a literal <unk>
    assert words.count(b"<eos>") == 8 and words[:2] == [b"<eos>", b"="]
    assert words.count(b"<unk>") == 2 and words.index(b"<unk>") == words.index(b",") + 2
    # unseen in train: A, song
    unseen = [word for word in ids_of(corpus, "test") if word == 0]
    assert len(unseen) == 2
    assert corpus.split("valid").num_bytes == len(wiki_files[f"{WIKI_FOLDER}/wiki.valid.tokens"])
    assert [s.num_documents for s in corpus.splits.values()] == [1, 1, 1]
    assert not (corpus.path / BUILDING_DIR).exists()


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_wikitext_keeps_every_byte(tmp_path, wikitext, wiki_files, tokenizer):
    corpus = prepare_corpus("wikitext-103", tmp_path / "out", [wikitext], tokenizer)
    loaded = load_tokenizer(corpus.path, corpus.tokenizer)
    text = wiki_files[f"{WIKI_FOLDER}/wiki.train.tokens"]
    assert loaded.decode(ids_of(corpus, "train")) == text


def test_archive_folder_and_files_give_the_same_corpus(tmp_path, wikitext, wiki_files):
    folder = unpacked(tmp_path / "folder", wiki_files)
    files = [folder / name for name in reversed(wiki_files)]
    first, second, third = (
        prepare_corpus("wikitext-103", tmp_path / name, inputs)
        for name, inputs in (("a", [wikitext]), ("b", [folder]), ("c", files))
    )
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert (first.path / "train.bin").read_bytes() == (third.path / "train.bin").read_bytes()
    assert all(path.is_file() for path in files)  # what was not unpacked here is not removed


def test_a_complete_corpus_needs_no_input_and_no_unpacking(tmp_path, wikitext, capsys):
    first = prepare_corpus("wikitext-103", tmp_path / "out", [wikitext])
    assert prepare_corpus("wikitext-103", tmp_path / "out", []) == first
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="asked for 'word'"):
        prepare_corpus("wikitext-103", tmp_path / "out", [], "word")


def test_real_wikitext_has_transformer_xls_number_of_tokens(tmp_path, wikitext_valid):
    """217,646: the valid split's words, of which <unk> are some, and an <eos> for each of 3,760
    lines."""
    corpus = prepare_corpus("text", tmp_path / "out", [wikitext_valid, wikitext_valid], "word")
    ids = ids_of(corpus, "valid")
    assert ids.size == 217_646 and np.count_nonzero(ids == 1) == 3760


def test_altered_wikitext_is_refused(tmp_path, wikitext, wiki_files):
    other = write_zip(tmp_path / "other.zip", {**wiki_files, "more": b""})
    with pytest.raises(ValueError, match="other.zip is not wikitext-103-v1.zip: its sha256"):
        prepare_corpus("wikitext-103", tmp_path / "out", [other])
    wiki_files[f"{WIKI_FOLDER}/wiki.test.tokens"] += b"more\n"
    folder = unpacked(tmp_path / "folder", wiki_files)
    with pytest.raises(ValueError, match="wiki.test.tokens is not the released file.*corpus text"):
        prepare_corpus("wikitext-103", tmp_path / "out", [folder])
    assert not (tmp_path / "out" / BUILDING_DIR).exists()


def test_lm1b_reads_shards_in_order_and_keeps_test_apart_from_valid(tmp_path, lm1b):
    corpus = prepare_corpus("lm1b", tmp_path / "out", [lm1b])
    assert [s.num_documents for s in corpus.splits.values()] == [99, 1, 1]
    train = ids_of(corpus, "train").tobytes().decode()
    shards = [int(line.split()[1]) for line in train.splitlines() if line.startswith("Shard")]
    assert shards == list(range(1, 100))
    assert ids_of(corpus, "valid").tobytes() == b"A cat ran 1 .\n"
    assert ids_of(corpus, "test").tobytes() == b"A cat ran 0 .\n"
    assert not (corpus.path / BUILDING_DIR).exists()


def test_lm1b_words_are_capped_and_each_sentence_ends_with_eos(tmp_path, lm1b):
    corpus = prepare_corpus("lm1b", tmp_path / "out", [lm1b], "word")
    tokenizer = load_tokenizer(corpus.path, corpus.tokenizer)
    # ties by byte order; Shard has no place
    assert tokenizer.words == [b"<unk>", b"<eos>", b".", b"A", b"Shard", b"dog"]
    assert np.count_nonzero(ids_of(corpus, "train") == 1) == 198
    assert ids_of(corpus, "test").tolist() == [3, 0, 0, 0, 2, 1]  # A <unk> <unk> <unk> . <eos>
    wider = prepare_corpus("lm1b", tmp_path / "wide", [lm1b], "word", vocab_size=50)
    assert wider.vocab_size == 50


def test_lm1b_folder_must_be_whole(tmp_path, lm1b, lm1b_files):
    folder = unpacked(tmp_path / "folder", lm1b_files)
    assert prepare_corpus("lm1b", tmp_path / "a", [folder]).split("train").num_documents == 99
    shard = folder / TRAIN_FOLDER / "news.en-00042-of-00100"
    content = shard.read_bytes()
    shard.write_bytes(b"One sentence .\n")
    with pytest.raises(ValueError, match="hold 197 lines instead of 198"):
        prepare_corpus("lm1b", tmp_path / "b", [folder])
    shard.unlink()
    with pytest.raises(ValueError, match="1 of 101 files are missing .news.en-00042-of-00100"):
        prepare_corpus("lm1b", tmp_path / "b", [folder])
    shard.write_bytes(content)
    (folder / "copy").mkdir()
    (folder / "copy" / shard.name).write_bytes(content)
    with pytest.raises(ValueError, match="news.en-00042-of-00100 is there twice"):
        prepare_corpus("lm1b", tmp_path / "b", [folder])


@pytest.mark.parametrize("damage", ["cut", "encrypted", "deflate64", "flipped"])
def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path, wikitext, monkeypatch, damage):
    content = bytearray(wikitext.read_bytes())
    first = content.find(b"PK\x03\x04", 4)  # behind the folder's own entry
    central = content.find(b"PK\x01\x02", content.find(b"PK\x01\x02") + 1)
    if damage == "cut":
        del content[-40:]
    elif damage == "flipped":
        start = first + 30 + len("wikitext-103/wiki.train.tokens")
        content[start : start + 8] = bytes(byte ^ 0xFF for byte in content[start : start + 8])
    else:
        local, listed, value = (6, 8, 1) if damage == "encrypted" else (8, 10, 9)
        content[first + local] = content[central + listed] = value
    wikitext.write_bytes(content)
    known = dataclasses.replace(RELEASED_CORPORA["wikitext-103"], sha256=sha256(wikitext))
    monkeypatch.setitem(RELEASED_CORPORA, "wikitext-103", known)
    with pytest.raises(ValueError, match="v1.zip is a packed file that cannot be .*by other means"):
        prepare_corpus("wikitext-103", tmp_path / "out", [wikitext])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_cut_tar_is_one_line(tmp_path, lm1b, monkeypatch, share):
    content = lm1b.read_bytes()
    lm1b.write_bytes(content[: int(len(content) * share)])
    known = dataclasses.replace(RELEASED_CORPORA["lm1b"], sha256=sha256(lm1b))
    monkeypatch.setitem(RELEASED_CORPORA, "lm1b", known)
    with pytest.raises(ValueError, match="tar.gz is a packed file that cannot be unpacked here"):
        prepare_corpus("lm1b", tmp_path / "out", [lm1b])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("corpus", ["wikitext-103", "lm1b"])
def test_inputs_that_cannot_work_are_refused(tmp_path, corpus):
    archive = RELEASED_CORPORA[corpus].archive_name
    with pytest.raises(ValueError, match=f"needs --input {archive} .*or --download"):
        prepare_corpus(corpus, tmp_path / "out", [])
    with pytest.raises(ValueError, match="not both"):
        prepare_corpus(corpus, tmp_path / "out", [tmp_path], download=True)
    with pytest.raises(ValueError, match="does not exist"):
        prepare_corpus(corpus, tmp_path / "out", [tmp_path / "no"])
    (tmp_path / "plain.txt").write_text("one two\n")
    with pytest.raises(ValueError, match=f"files are missing .*--input takes {archive}"):
        prepare_corpus(corpus, tmp_path / "out", [tmp_path / "plain.txt"])
    with pytest.raises(ValueError, match="give one folder, or files"):
        prepare_corpus(corpus, tmp_path / "out", [tmp_path, tmp_path / "plain.txt"])
    damaged = tmp_path / archive
    damaged.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ValueError, match="another text or a damaged copy; get it from"):
        prepare_corpus(corpus, tmp_path / "out", [damaged])
    assert not (tmp_path / "out").exists()


def test_download_is_checked_and_a_wrong_one_removed(tmp_path, monkeypatch, lm1b):
    served = tmp_path / "served"
    served.mkdir()
    lm1b.rename(served / lm1b.name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, directory=str(served), **keywords)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{lm1b.name}"
        known = dataclasses.replace(RELEASED_CORPORA["lm1b"], url=url)
        monkeypatch.setitem(RELEASED_CORPORA, "lm1b", known)
        corpus = prepare_corpus("lm1b", tmp_path / "out", [], download=True)
        assert corpus.split("train").num_documents == 99
        write_tar(served / lm1b.name, {"something": b"else"})
        with pytest.raises(ValueError, match="its sha256 is"):
            prepare_corpus("lm1b", tmp_path / "other", [], download=True)
        assert not (tmp_path / "other" / lm1b.name).exists()
        server.shutdown()
