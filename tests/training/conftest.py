"""A small real corpus, prepared once, and this folder on the path for ``small_run``."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """About 300 kB of the interpreter's own library as a byte corpus."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    folder = tmp_path_factory.mktemp("small_corpus")
    source = Path(sysconfig.get_path("stdlib"))
    files = [source / name for name in ("typing.py", "inspect.py", "argparse.py")]
    prepare_corpus("text", folder / "corpus", files, "byte", None, False, False)
    return folder / "corpus"
