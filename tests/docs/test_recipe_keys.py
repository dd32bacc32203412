"""The page of recipe keys has every key, with default, unit, legal values and a meaning."""

from __future__ import annotations

import dataclasses

import recipe_keys as keys
from recipe_keys import borders, choices, comments, default_of, meaning_of, sections, unit_of

from vqmoe_megatron.config.code_memory import LEGAL_MEMORY_VALUES
from vqmoe_megatron.config.declared_types import declared_types
from vqmoe_megatron.config.ranges import LEGAL_RANGES, Range
from vqmoe_megatron.config.vq import LEGAL_VQ_VALUES

PAGE = keys.page()
FIELDS = [
    (section, kind, field)
    for section, kind in sections().items()
    for field in dataclasses.fields(kind)
]


def test_every_key_has_one_row_with_its_default_and_a_meaning() -> None:
    rows = [line.strip("|").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    keys_and_meanings = [row[0].strip().split("<br>") for row in rows]
    assert [key for key, _ in keys_and_meanings] == [f"`{s}.{f.name}`" for s, _, f in FIELDS]
    assert all(len(row) == 4 for row in rows) and all(said for _, said in keys_and_meanings)
    by_key = {key.strip("`"): row for (key, _), row in zip(keys_and_meanings, rows, strict=True)}
    assert by_key["train.micro_batch_size"][1:3] == ["`4`", "int, samples"]
    assert by_key["code_memory.layers"][1] == "`null`"
    assert by_key["optimizer.clip_grad"][3].strip() == "0 to 1,000,000,000"


def test_every_range_is_shown() -> None:
    by_key = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    missing = [
        key for key, legal in LEGAL_RANGES.items() if f" {borders(legal)} " not in by_key[key]
    ]
    assert missing == []


def test_choices_are_those_of_the_tables_that_refuse() -> None:
    kinds = sections()
    for section, table in (("vq", LEGAL_VQ_VALUES), ("code_memory", LEGAL_MEMORY_VALUES)):
        hints = declared_types(kinds[section])
        found = {name: choices(kinds[section], name, hints[name]) for name in table}
        assert found == table
    hints = declared_types(kinds["train"])
    assert choices(kinds["train"], "nan_policy", hints["nan_policy"]) == (
        *("stop", "skip", "rollback"),
    )
    assert choices(kinds["train"], "output_dir", hints["output_dir"]) == ()


def test_a_key_without_a_word_is_seen() -> None:
    @dataclasses.dataclass
    class Toy:
        silent: int = 1
        said: int = 2  # of (both)
        named: str = "a"  # auto: None or so

    assert comments(Toy) == {"said": "of (both)", "named": "auto: None or so"}
    assert [meaning_of("toy", Toy, name) for name in ("silent", "said", "named")] == [
        *("", "Of (both)", "auto: null or so"),
    ]


def test_every_meaning_is_of_a_key() -> None:
    known = {
        section: {f.name for f in dataclasses.fields(kind)} for section, kind in sections().items()
    }
    assert {s: set(words) - known[s] for s, words in keys.MEANINGS.items()} == {
        section: set() for section in keys.MEANINGS
    }
    assert set(keys.SECTION_WORDS) == set(sections())


def test_words_of_a_cell() -> None:
    assert borders(Range(0, 1, without_low=True, without_high=True)) == "above 0 to below 1"
    assert unit_of("eval_iters") == "global batches" and unit_of("lr_warmup_iters") == "iterations"
    also = next(f for s, _, f in FIELDS if (s, f.name) == ("tracking", "also"))
    assert default_of(also) == "[]"
