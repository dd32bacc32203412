"""Real text for the data tests: a library file that is always there, WikiText-2 where it is."""

import argparse
import os
from pathlib import Path

import pytest

from vqmoe_megatron.data.corpus import Corpus
from vqmoe_megatron.data.prepare import prepare_corpus

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def library_file() -> Path:
    """About 100 kB of Python source."""
    return Path(argparse.__file__)


@pytest.fixture(scope="session")
def wikitext_valid() -> Path:
    """WikiText-2's validation text, 1.1 MB, whose words are already separated by spaces."""
    root = Path(os.environ.get("VQMOE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    path = root / "wikitext-2" / "valid.txt"
    if not path.is_file():
        pytest.skip(f"no test data at {path}; set VQMOE_TEST_DATA to its directory")
    return path


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory: pytest.TempPathFactory, library_file: Path) -> Corpus:
    """A small byte corpus; read it, do not change it."""
    return prepare_corpus("text", tmp_path_factory.mktemp("byte") / "corpus", [library_file])
