"""Parts of speech of Python source: what the language's own tokenizer says of every byte."""

from __future__ import annotations

import io
import keyword
import token as kinds
import tokenize

import numpy as np

CLASSES = (
    "space",  # also line ends and indentation
    "keyword",
    "name",
    "number",
    "string",
    "comment",
    "operator",
)
UNKNOWN = -1  # of bytes in source that the tokenizer refuses
# Pieces of an f-string, which Python tokenizes apart from 3.12 on.
STRINGS = tuple(
    getattr(kinds, name)
    for name in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if hasattr(kinds, name)
)


def byte_classes(source: bytes) -> np.ndarray:
    """Return int64 ``[bytes]``: places in ``CLASSES``; all ``UNKNOWN`` for what is not Python."""
    classes = np.full(len(source), CLASSES.index("space"), dtype=np.int64)
    try:
        text = source.decode("utf-8")
        # Not splitlines: a form feed ends no line of source. Newlines stay as they are.
        lines = io.StringIO(text, newline="").readlines()
        starts = np.cumsum([0, *(len(line.encode()) for line in lines)])
        for found in tokenize.generate_tokens(iter([*lines, ""]).__next__):
            name = _class_of(found)
            if name is not None:
                first, last = (_byte(lines, starts, *at) for at in (found.start, found.end))
                classes[first:last] = CLASSES.index(name)
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError, IndexError):
        classes[:] = UNKNOWN
    return classes


def _class_of(found: tokenize.TokenInfo) -> str | None:
    if found.type in STRINGS:
        return "string"
    if found.type == kinds.NAME:
        return "keyword" if keyword.iskeyword(found.string) else "name"
    by_type = {kinds.NUMBER: "number", kinds.OP: "operator", tokenize.COMMENT: "comment"}
    return by_type.get(found.type)


def _byte(lines: list[str], starts: np.ndarray, row: int, column: int) -> int:
    """The byte at a row from 1 and a column in characters."""
    if row > len(lines):
        return int(starts[-1])
    return int(starts[row - 1]) + len(lines[row - 1][:column].encode())
