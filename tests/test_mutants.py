"""The list of mistakes fits the source: each can be made, and where it must be seen exists."""

from __future__ import annotations

from mutants import MUTANTS, ROOT


def test_every_mistake_has_one_place_and_tests():
    for mutant in MUTANTS:
        source = (ROOT / "vqmoe_megatron" / mutant.file).read_text()
        assert source.count(mutant.old) == 1, mutant.name
        assert mutant.new != mutant.old and (ROOT / mutant.tests).is_file(), mutant.name
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
