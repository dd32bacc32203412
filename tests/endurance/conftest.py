"""A small real corpus, and this folder on the path for ``kill_rounds``."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def endurance_corpus(tmp_path_factory) -> Path:
    """About 160 kB of the interpreter's own library as a byte corpus."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("endurance") / "corpus"
    source = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    prepare_corpus("text", out, [source, source.with_name("typing.py")], "byte", None, False, False)
    return out
