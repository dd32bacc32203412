"""Shared fixtures: a world of ranks, and two corpora. ``tiers`` decides what a session runs."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for helpers such as gloo_ranks

pytest_plugins = ["tiers"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable]:
    """``ranks(world_size)``: a world of gloo ranks, started at first use and kept for the
    session."""
    from gloo_ranks import RankPool

    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size in pools and pools[world_size].is_worn:
            pools[world_size].close()  # here, between tests: one may run several jobs in its pool
        if world_size not in pools or pools[world_size].is_closed:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """About 300 kB of the interpreter's own library as a byte corpus."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    folder = tmp_path_factory.mktemp("small_corpus")
    source = Path(sysconfig.get_path("stdlib"))
    files = [source / name for name in ("typing.py", "inspect.py", "argparse.py")]
    prepare_corpus("text", folder / "corpus", files, "byte", None, False, False)
    return folder / "corpus"


@pytest.fixture(scope="session")
def stdlib_corpus(tmp_path_factory) -> Path:
    """The interpreter's whole library as a byte corpus, as recipes/parity.yaml is meant to run on.

    Layouts round differently, and a token as near to one code as to another by fp32 rounding may
    then change its code. Here none does; in a small, repetitive text one sometimes does.
    """
    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("stdlib_corpus") / "corpus"
    prepare_corpus("stdlib", out, [], "byte", None, False, False)
    return out
