"""A file of tags: one line, one tag, for every token of a split."""

from __future__ import annotations

from pathlib import Path

from vqmoe_megatron.data.corpus import Corpus


def read_tags(tags: Path, corpus: Corpus, split: str) -> list[str]:
    """The tags, in the order of the split's tokens.

    Raises:
        ValueError: for a file that cannot be read, or of another number of lines.
    """
    try:
        lines = tags.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--tags {tags} cannot be read: {error}") from error
    num_tokens = corpus.split(split).num_tokens
    if len(lines) != num_tokens:
        raise ValueError(
            f"--tags {tags} has {len(lines)} lines, split {split} of {corpus.path} "
            f"{num_tokens} tokens; give one tag per line for every token"
        )
    return lines
