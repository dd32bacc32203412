"""A corpus' tokenizer as ``tokenizer.json`` and ``tokenizer_config.json``, for ``AutoTokenizer``.

The form is that of the library tokenizers, written by hand: exporting needs no further package.

| kind | model | equal to ours |
|---|---|---|
| byte | bytes as characters of their own, no merges | both ways |
| char | characters | both ways |
| word | words between ASCII whitespace, ``<eos>`` for a newline | ids; text comes back as words |
| sentencepiece | its pieces, merged in the order of their scores, bytes for the rest | both ways |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqmoe_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from vqmoe_megatron.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPACE_MARK = "\u2581"
UNKNOWN = "<unk>"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length_tokens: int) -> list[str]:
    """Write both files; return their names.

    Raises:
        ValueError: for a kind that has no such form.
    """
    forms = {
        ByteTokenizer: _of_bytes,
        CharTokenizer: _of_characters,
        WordTokenizer: _of_words,
        SentencePieceTokenizer: _of_pieces,
    }
    if type(tokenizer) not in forms:
        raise ValueError(f"a {tokenizer.kind} tokenizer has no form that Transformers reads")
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **forms[type(tokenizer)](tokenizer),
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length_tokens,
    }
    for name, content in ((TOKENIZER_FILE, described), (CONFIG_FILE, settings)):
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, "utf-8")
    return [TOKENIZER_FILE, CONFIG_FILE]


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    return {
        "pre_tokenizer": level,
        "decoder": level,
        "model": _bpe({character: byte for byte, character in enumerate(_byte_characters())}, []),
    }


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **others: Any) -> dict[str, Any]:
    settings = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**settings, **others, "vocab": vocabulary, "merges": merges}


def _of_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    vocabulary = {character: number for number, character in enumerate(tokenizer.characters)}
    if tokenizer.has_unknown:
        vocabulary[UNKNOWN] = len(vocabulary)
    return {
        "pre_tokenizer": _split("[\\s\\S]", "Isolated"),
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }


def _of_words(tokenizer: WordTokenizer) -> dict[str, Any]:
    vocabulary = {word.decode("utf-8"): number for number, word in enumerate(tokenizer.words)}
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": "\n"}, "content": " <eos> "},
        "pre_tokenizer": _split("[ \\t\\r\\x0B\\x0C]+", "Removed"),
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


def _of_pieces(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    pieces = tokenizer.pieces
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    # A piece is made of two others; sentencepiece joins the neighbours whose piece scores most.
    merges = [
        (-score, number, [piece[:cut], piece[cut:]])
        for number, (piece, score) in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[:2])
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _bpe(
            vocabulary,
            [pair for *_, pair in merges],
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }
