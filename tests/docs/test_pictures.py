"""The pictures are those that the program draws, and say what the program does."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pictures
import pytest

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("draw", pictures.PICTURES, ids=lambda draw: draw.__name__)
def test_the_stored_picture_is_the_drawn_one(draw) -> None:
    stored = (pictures.FOLDER / f"{draw.__name__}.svg").read_text("utf-8")
    assert stored == draw().svg(), "draw it again: python docs/site/pictures.py"


@pytest.mark.parametrize("draw", pictures.PICTURES, ids=lambda draw: draw.__name__)
def test_everything_lies_inside_and_nothing_comes_from_elsewhere(draw) -> None:
    picture = draw()
    tree = ElementTree.fromstring(picture.svg())
    assert tree.find(f"{SVG}title").text
    for box in tree.iter(f"{SVG}rect"):
        x, y, width, height = (float(box.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + width <= picture.width and 0 <= y <= y + height <= picture.height
    for words in tree.iter(f"{SVG}text"):
        assert 0 < float(words.get("y")) < picture.height
    assert "href" not in picture.svg() and "url(" not in picture.svg()


def test_the_layout_picture_places_ranks_as_megatron_does() -> None:
    words = re.findall(r">([^<]+)</text>", pictures.layouts().svg())
    ranks = [words.index(f"rank {rank}") for rank in range(8)]
    halves = [words[start + 1 : start + 3] for start in ranks]
    assert halves[0] == halves[2] == ["attention, half 0", "experts 0 to 3"]
    assert halves[1] == halves[3] == ["attention, half 1", "experts 4 to 7"]


def test_the_routing_picture_uses_code_mod_n() -> None:
    sums = re.findall(r">(\d+) mod (\d+) = (\d+)<", pictures.routing().svg())
    assert len(sums) == 6 and all(int(k) % int(n) == int(e) for k, n, e in sums)
