"""Every tokenizer's round trip, streaming cuts and saved file."""

import numpy as np
import pytest

from vqmoe_megatron.data.tokenizers import (
    TOKENIZER_CLASSES,
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    check_tokenizer_request,
    describe_tokenizer,
    load_tokenizer,
)


def pieces_of(**splits):
    return lambda split: iter([splits[split]] if split in splits else [])


@pytest.mark.parametrize("kind", ["byte", "char", "word", "sentencepiece"])
def test_round_trip_of_real_text_and_of_the_saved_file(kind, wikitext_valid, tmp_path):
    text = wikitext_valid.read_bytes()[:300_000].rsplit(b"\n", 1)[0] + b"\n"
    vocab_size = 1000 if kind == "sentencepiece" else None
    tokenizer = TOKENIZER_CLASSES[kind].train(pieces_of(train=text), vocab_size)
    ids = tokenizer.encode(text)
    assert ids.max() < tokenizer.vocab_size
    tokenizer.save(tmp_path)
    description = describe_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path, description)
    assert loaded.vocab_size == tokenizer.vocab_size == description["vocab_size"]
    np.testing.assert_array_equal(loaded.encode(text), ids)
    expected = text
    if kind == "word":  # words keep one space between them, none at line ends
        expected = b"\n".join(b" ".join(line.split()) for line in text.split(b"\n"))
    assert loaded.decode(ids) == expected


@pytest.mark.parametrize("kind", ["byte", "char", "word", "sentencepiece"])
def test_encoding_in_pieces_gives_the_same_ids(kind, library_file):
    text = library_file.read_bytes()[:40_000] + "né  日本語 \t 🙂\n".encode() * 50
    vocab_size = 600 if kind == "sentencepiece" else None
    tokenizer = TOKENIZER_CLASSES[kind].train(pieces_of(train=text), vocab_size)
    pending, parts = b"", []
    for start in range(0, len(text), 997):
        pending += text[start : start + 997]
        cut = tokenizer.cut(pending)
        parts.append(tokenizer.encode(pending[:cut]))
        pending = pending[cut:]
    parts.append(tokenizer.encode(pending))
    np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(text))


@pytest.mark.parametrize("kind", ["byte", "char", "word", "sentencepiece"])
def test_a_changed_tokenizer_file_is_refused(kind, library_file, tmp_path):
    text = library_file.read_bytes()
    vocab_size = 600 if kind == "sentencepiece" else None
    tokenizer = TOKENIZER_CLASSES[kind].train(pieces_of(train=text), vocab_size)
    tokenizer.save(tmp_path)
    description = describe_tokenizer(tokenizer, tmp_path)
    if kind == "byte":
        assert description["file"] is None
        return
    with (tmp_path / description["file"]).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(ValueError, match="sha256"):
        load_tokenizer(tmp_path, description)
    (tmp_path / description["file"]).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_tokenizer(tmp_path, description)


def test_byte_tokens_are_the_bytes():
    every_byte = bytes(range(256))
    ids = ByteTokenizer().encode(every_byte)
    assert ids.dtype == np.uint8 and ids.tolist() == list(range(256))
    assert ByteTokenizer().decode(ids) == every_byte


def test_char_ids_are_in_code_point_order_without_unk():
    tokenizer = CharTokenizer.train(pieces_of(train="bañ a".encode(), valid=b"ab"), None)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("ab ñ".encode()).tolist() == [1, 2, 0, 3]
    with pytest.raises(ValueError, match="'z'"):
        tokenizer.encode(b"abz")


def test_char_unk_exists_when_another_split_needs_it():
    tokenizer = CharTokenizer.train(pieces_of(train=b"ab", test="a日".encode()), None)
    assert tokenizer.vocab_size == 3
    ids = tokenizer.encode("b日a".encode())
    assert ids.tolist() == [1, 2, 0]
    assert tokenizer.decode(ids) == "b\ufffda".encode()


def test_word_ids_are_by_frequency_and_the_cap_makes_unk():
    text = b"b a\nb c a b\n"
    tokenizer = WordTokenizer.train(pieces_of(train=text), 4)
    assert tokenizer.words == [b"<unk>", b"<eos>", b"b", b"a"]
    ids = tokenizer.encode(text)
    assert ids.tolist() == [2, 3, 1, 2, 0, 3, 2, 1]
    assert tokenizer.decode(ids) == b"b a\nb <unk> a b\n"


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bpe", None, "byte, char, word"),
        ("byte", 300, "256"),
        ("char", 9, "characters"),
        ("word", 2, "3"),
    ],
)
def test_impossible_requests_are_refused(kind, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer_request(kind, vocab_size)
