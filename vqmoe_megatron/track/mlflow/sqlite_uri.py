"""A file's path as a SQLite URI, and back: one rule for every database this package names.

SQLAlchemy ends the path at the first ``?`` and decodes ``%41``, so such characters are quoted.
MLflow makes the folder that it reads in the URI without decoding it. Therefore the separators
behind a quoted character are quoted too: what MLflow then takes for the folder is one that is
there.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

SQLITE_PREFIX = "sqlite:///"
_SPECIAL = re.compile(r"[%?\x00-\x1f\x7f]")  # all else is itself in a URI of SQLAlchemy


def sqlite_uri(path: str | Path) -> str:
    """Return the URI of the database at ``path``: ``sqlite:////a/q%3Fx%2Fmlflow.db``."""
    text = str(path)
    special = _SPECIAL.search(text)
    if special is None:
        return f"{SQLITE_PREFIX}{text}"
    start = text.rfind("/", 0, special.start()) + 1
    quoted = _SPECIAL.sub(lambda found: quote(found[0]), text[start:]).replace("/", "%2F")
    return f"{SQLITE_PREFIX}{text[:start]}{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file that a ``sqlite:///`` URI names; None for any other URI, or no file."""
    text = unquote(uri.removeprefix(SQLITE_PREFIX).partition("?")[0])
    return Path(text) if uri.startswith(SQLITE_PREFIX) and text not in ("", ":memory:") else None
