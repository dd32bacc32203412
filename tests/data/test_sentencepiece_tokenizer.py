"""The sentencepiece tokenizer is lossless, reproducible and says what it cannot do."""

import numpy as np
import pytest

from vqmoe_megatron.data import sentencepiece_tokenizer
from vqmoe_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer


def train(text: bytes, vocab_size: int) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(lambda split: iter([text]), vocab_size)


def test_unseen_characters_and_odd_whitespace_come_back(library_file):
    tokenizer = train(library_file.read_bytes(), 600)
    text = "  two  spaces\t\n\n\r\nünseen 日本 🙂 \n ".encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_twice_gives_the_same_model_and_says_how(library_file):
    first, second = (train(library_file.read_bytes(), 600) for _ in range(2))
    assert first.model == second.model
    assert "--vocab_size=600" in first.command and "--model_type=bpe" in first.command


def test_breaking_long_lines_changes_no_token(library_file, monkeypatch):
    text = library_file.read_bytes().replace(b"\n", b" ")  # one line with runs of spaces
    tokenizer = train(text, 600)
    monkeypatch.setattr(sentencepiece_tokenizer, "MAX_SENTENCE_BYTES", 10**9)
    whole = tokenizer.encode(text)
    assert tokenizer.decode(whole) == text and len(whole) < len(text) / 2
    monkeypatch.setattr(sentencepiece_tokenizer, "MAX_SENTENCE_BYTES", 50)
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize("vocab_size", [10, 100_000])
def test_impossible_vocabulary_is_refused(library_file, vocab_size):
    with pytest.raises(ValueError, match=f"--vocab-size {vocab_size}"):
        train(library_file.read_bytes(), vocab_size)
