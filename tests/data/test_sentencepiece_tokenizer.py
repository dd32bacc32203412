"""The sentencepiece tokenizer is lossless, reproducible and says what it cannot do."""

import numpy as np
import pytest

from vqmoe_megatron.data import sentencepiece_tokenizer
from vqmoe_megatron.data.sentencepiece_tokenizer import (
    MAX_SENTENCE_BYTES,
    SentencePieceTokenizer,
    _sentences,
    _TrainingText,
)


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


def pieces_with(tokenizer: SentencePieceTokenizer, character: str) -> int:
    processor = tokenizer._processor
    return sum(character in processor.id_to_piece(i) for i in range(tokenizer.vocab_size))


LONG_LINES = {
    "Chinese without a space": "中文段落没有空格" * 100,
    "a line just too long": "中" * 342,  # 1026 bytes
    "characters of two and four bytes": "é🙂" * 300,
    "one long word among short ones": "short words " + "中文" * 400 + " and short ones after it",
    "a long run of spaces": " " * 1500 + "中文",
    "bytes that never meet the limit at a character": "a" + "中" * 600,
}


@pytest.mark.parametrize("line", LONG_LINES.values(), ids=LONG_LINES.keys())
def test_training_takes_every_byte_of_long_lines(line):
    text = _TrainingText(iter([f"{line}\n{line}".encode()]))
    sentences = list(text)
    assert "".join(sentences) == line * 2
    assert max(len(sentence.encode()) for sentence in sentences) <= MAX_SENTENCE_BYTES
    assert text.left_out == []


def test_long_lines_without_spaces_are_learned():
    paragraphs = "".join(f"Chapter {n}\n{'甲乙丙丁戊己庚辛' * 60}\n" for n in range(100))
    tokenizer = train(paragraphs.encode(), 330)
    assert pieces_with(tokenizer, "甲") > 3  # the character and pieces of several
    assert tokenizer.decode(tokenizer.encode(paragraphs.encode())) == paragraphs.encode()


def test_a_long_word_stays_whole_for_encoding_and_the_rest_of_its_line_is_broken(monkeypatch):
    line = ("ab " * 20 + "中文" * 100 + "  tail " * 20).encode()
    monkeypatch.setattr(sentencepiece_tokenizer, "MAX_SENTENCE_BYTES", 30)
    sentences = _sentences(line)
    assert "".join(sentences).encode() == line and "中文" * 100 in "".join(sentences)
    assert sum("中" in sentence for sentence in sentences) == 1 and len(sentences) > 5
    assert all(sentence.startswith(" ") for sentence in sentences[1:])


def test_text_around_the_reserved_character_is_learned_and_the_loss_said():
    text = ("plain words only\n" * 300 + "Zqx▅Zqx Zqx▅\n" * 100).encode()
    tokenizer = train(text, 290)
    assert pieces_with(tokenizer, "Zqx") > 0
    assert tokenizer.decode(tokenizer.encode(text)) == text
    (line,) = tokenizer.left_out
    assert "U+2585: the 200 in the train split are left out" in line


def test_a_choice_of_sentences_and_marks_that_become_spaces_are_said(monkeypatch):
    monkeypatch.setitem(sentencepiece_tokenizer.TRAINING_OPTIONS, "input_sentence_size", 101)
    tokenizer = train("one line of words ▁\n".encode() * 404, 270)
    assert tokenizer.left_out == [
        "sentencepiece is trained on 101 of 404 sentences (25.0% of the train split), chosen at "
        "random",
        "sentencepiece writes a space as U+2581: the 404 of that character in the train split "
        "become spaces",
    ]
