"""What Transformers reads encodes and decodes as the corpus' own tokenizer does."""

from __future__ import annotations

import numpy as np
import pytest

from vqmoe_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from vqmoe_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from vqmoe_megatron.hf.tokenizer_files import write_tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")
LINES = (
    "def f(x):\n    return  x + 1  # größer als, 日本語, 🙂\n",
    "\tclass Words:\r\n        pass\n\n\nfor word in words: print(word)\n",
)
TRAINED_ON = [text.encode() for text in LINES * 40]
TEXT = "".join(LINES) + "  unseen: ß → ∑\n   \n"


def pieces(_split: str):
    yield from TRAINED_ON


def with_unseen(split: str):
    return pieces(split) if split == "train" else iter([TEXT.encode()])


TOKENIZERS = {
    "byte": lambda: ByteTokenizer(),
    "char": lambda: CharTokenizer.train(with_unseen, None),
    "word": lambda: WordTokenizer.train(pieces, None),
    "sentencepiece": lambda: SentencePieceTokenizer.train(pieces, 340),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_text_are_ours(kind, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    ours = TOKENIZERS[kind]()
    assert write_tokenizer(tmp_path, ours, 128) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    expected = ours.encode(TEXT.encode()).tolist()
    assert theirs(TEXT)["input_ids"] == expected
    assert theirs.vocab_size == ours.vocab_size
    if kind not in ("word", "char"):
        assert theirs.decode(expected) == ours.decode(np.array(expected)).decode() == TEXT
