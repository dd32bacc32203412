"""Tokens are found in their split again, and get the class that their place has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vqmoe_megatron.analysis.python_classes import CLASSES
from vqmoe_megatron.analysis.text import Text, parts_of_speech
from vqmoe_megatron.data.corpus import load_corpus


@pytest.fixture
def text(small_corpus) -> Text:
    return Text(load_corpus(small_corpus), "valid", seq_length=32, num_tokens=1000)


def read(text: Text) -> tuple[torch.Tensor, np.ndarray]:
    """All tokens in the order of rows, and where in the split they are."""
    batches = list(text.batches())
    tokens = torch.cat([batch["tokens"] for batch in batches])
    window = torch.arange(len(tokens)).repeat_interleave(32)
    return tokens.flatten(), text.places(window, torch.arange(32).repeat(len(tokens)))


def test_batches_have_no_empty_rows_and_places_are_those_of_the_tokens(text) -> None:
    tokens, places = read(text)
    assert len(tokens) == 32 * 32  # whole windows, in microbatches of eight
    assert text.windows.micro_batch_size == 8 and text.windows.num_scored_tokens == 32 * 32
    assert text.all_tokens[places].tolist() == tokens.tolist()
    assert text.say(tokens[:5].numpy()).encode() == bytes(tokens[:5].tolist())


def test_source_of_the_library_has_classes_of_its_own_tokenizer(text) -> None:
    _, places = read(text)
    other = parts_of_speech(text, places, None)
    assert other.classes is None and "not computed" in other.said and "--tags" in other.said
    library = replace(text, corpus=replace(text.corpus, name="stdlib"))
    found = parts_of_speech(library, places, None)
    content = bytes(text.all_tokens)
    known = {name: i for i, name in enumerate(CLASSES)}
    at = next(i for i in places if content[i : i + 1].isspace() and found.classes[i] >= 0)
    assert found.classes[at] in (known["space"], known["string"], known["comment"])
    words = [found.classes[i] for i in places if chr(content[i]).isalpha()]
    assert known["name"] in words and known["keyword"] in words and known["operator"] not in words


def test_tags_are_read_from_a_file(text, tmp_path) -> None:
    num_tokens = len(text.all_tokens)
    tags = tmp_path / "tags"
    lines = ("NOUN\n" if n % 2 else "VERB\n" for n in range(num_tokens))
    tags.write_text("".join(lines), "utf-8-sig")  # as Windows' editors save it
    found = parts_of_speech(text, np.arange(num_tokens), tags)
    assert found.names == ("NOUN", "VERB")
    assert found.classes.tolist() == [1 - n % 2 for n in range(num_tokens)]
    tags.write_text("NOUN\n")
    with pytest.raises(ValueError, match=r"has 1 lines.*one tag per line"):
        parts_of_speech(text, np.arange(num_tokens), tags)
    with pytest.raises(ValueError, match="cannot be read"):
        parts_of_speech(text, np.arange(num_tokens), tmp_path / "nothing")
