"""A corpus that is not whole is refused, in words that say what to do."""

import json
import shutil
import subprocess
import sys

import pytest

from vqmoe_megatron.data.corpus import check_tokenizer, load_corpus
from vqmoe_megatron.data.prepare import prepare_corpus


@pytest.fixture
def copied(byte_corpus, tmp_path):
    return shutil.copytree(byte_corpus.path, tmp_path / "copy")


def test_loading_gives_what_was_prepared(byte_corpus, library_file):
    corpus = load_corpus(byte_corpus.path)
    assert corpus == byte_corpus
    assert (corpus.vocab_size, corpus.token_dtype, corpus.tokenizer["kind"]) == (
        256,
        "uint8",
        "byte",
    )
    text = library_file.read_bytes()
    assert sum(split.num_tokens for split in corpus.splits.values()) == len(text)
    assert corpus.split("train").bin_path.read_bytes() == text[: corpus.split("train").num_bytes]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, valid, test"):
        corpus.split("dev")


def test_truncated_bin_is_refused_with_both_sizes(copied):
    path = copied / "train.bin"
    full_bytes = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(full_bytes - 1)
    with pytest.raises(ValueError, match=f"{full_bytes - 1} bytes, corpus.json says {full_bytes}"):
        load_corpus(copied)


@pytest.mark.parametrize("name", ["valid.bin", "test.idx"])
def test_missing_file_is_refused(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_corpus(copied)


def test_missing_directory_and_missing_corpus_json(copied, tmp_path):
    with pytest.raises(ValueError, match="vqmoe prepare stdlib --out"):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "mine.txt").write_text("a text")
    with pytest.raises(ValueError, match=r"mine.txt is a text.*prepare text .* --out data/mine"):
        load_corpus(tmp_path / "mine.txt")
    (copied / "corpus.json").unlink()
    with pytest.raises(ValueError, match="interrupted"):
        load_corpus(copied)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}', b"\xff"])
def test_damaged_corpus_json_is_refused(copied, content):
    raw = content if isinstance(content, bytes) else content.encode()
    (copied / "corpus.json").write_bytes(raw)
    with pytest.raises(ValueError, match="is damaged"):
        load_corpus(copied)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("tokenizer.file", "absent"),
        ("tokenizer.kind", "absent"),
        ("tokenizer.sha256", "absent"),
        ("tokenizer.vocab_size", "big"),
        ("tokenizer.vocab_size", 0),
        ("tokenizer.file", 3),
        ("token_dtype", None),
        ("source", []),
        ("splits.train.num_tokens", "many"),
        ("splits.valid.bin_bytes", 1.5),
        ("splits.test.num_documents", True),
        ("splits.train.num_bytes", -1),
        ("splits.train.idx_bytes", "absent"),
    ],
)
def test_a_missing_or_wrong_entry_of_corpus_json_is_damage(copied, entry, value):
    content = json.loads((copied / "corpus.json").read_text())
    *path, name = entry.split(".")
    holder = content
    for part in path:
        holder = holder[part]
    if value == "absent":
        del holder[name]
    else:
        holder[name] = value
    (copied / "corpus.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"is damaged .*{name}"):
        load_corpus(copied)


def test_newer_format_is_refused(copied):
    content = json.loads((copied / "corpus.json").read_text())
    (copied / "corpus.json").write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2"):
        load_corpus(copied)


def test_changed_tokenizer_file_is_refused(tmp_path, library_file):
    prepare_corpus("text", tmp_path, [library_file], "char")
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="tokenizer.json has sha256"):
        load_corpus(tmp_path)


def test_model_and_checkpoint_must_fit_the_tokenizer(byte_corpus):
    check_tokenizer(byte_corpus, None)
    check_tokenizer(byte_corpus, 300, dict(byte_corpus.tokenizer, command="another"))
    with pytest.raises(ValueError, match="model.vocab_size=255 is smaller than the 256"):
        check_tokenizer(byte_corpus, 255)
    other = {"kind": "char", "vocab_size": 256, "sha256": "0"}
    with pytest.raises(ValueError, match="kind: checkpoint 'char', corpus 'byte'; sha256"):
        check_tokenizer(byte_corpus, None, other)


def test_preparing_and_loading_do_not_import_torch():
    code = (
        "import sys, vqmoe_megatron.data.corpus, vqmoe_megatron.data.prepare;"
        "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
