"""Where the sample order of a training run is kept, and under which name.

Imports neither torch nor megatron, so that a place that cannot be written is refused before any
rank starts.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vqmoe_megatron.data.corpus import CACHE_DIR, FINGERPRINT_CHARACTERS, Corpus

RUN_CACHE_DIR = "data_cache"  # in the run directory


def order_name(corpus: Corpus, seq_length: int, num_samples: int, seed: int) -> str:
    """Return the name of the order's folder: all that decides the order is in it."""
    fingerprint = corpus.fingerprint[:FINGERPRINT_CHARACTERS]
    return f"train-s{seq_length}-n{num_samples}-seed{seed}-{fingerprint}"


def cache_folders(corpus: Corpus, cache_dir: str | None, run_dir: Path) -> list[Path]:
    """Return where the sample order may lie, in the order of looking.

    ``cache_dir``: ``data.cache_dir``, None where the recipe leaves it open. Then the corpus' own
    folder serves all its runs, and a corpus that cannot be written leaves the run's.
    """
    if cache_dir is not None:
        return [Path(cache_dir)]
    return [corpus.path / CACHE_DIR, run_dir / RUN_CACHE_DIR]


def check_cache_dir(cache_dir: str, name: str) -> None:
    """Raise ``ValueError`` unless ``cache_dir`` has the order ``name`` or can be written."""
    folder = Path(cache_dir)
    if os.path.isdir(folder / name):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix="building-", dir=folder))
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir} cannot be written: {error.strerror}; choose another, or "
            "null for the corpus' own or, where that cannot be written, the run directory"
        ) from error
