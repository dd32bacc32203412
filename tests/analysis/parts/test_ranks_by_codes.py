"""Planted ranks: what is grouped, what is drawn where, and when there is anything to draw."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from vqmoe_megatron.analysis.parts import ranks_by_codes
from vqmoe_megatron.analysis.parts.plots import MAX_NAMED, draw_lines, name_lines


def model(num_experts: int, num_codes: int, *routing: float) -> dict:
    """Findings of a model with a layer for every rank of ``routing``."""
    fixed = {"num_experts": num_experts, "num_codes": num_codes, "output_rank": 7.0}
    rows = [
        {**fixed, "routing_effective_rank": r, "gradient_effective_rank": 2 * r} for r in routing
    ]
    return {"rows": rows}


MODELS = {
    "a": model(4, 8, 1.0, 3.0),
    "b": model(4, 8, 5.0, 5.0),
    "c": model(4, 32, 9.0),
    "d": model(4, 0, 1.5),
    "uneven": {"rows": [*model(4, 8, 1.0)["rows"], *model(4, 16, 1.0)["rows"]]},
    "e": model(16, 8, 6.0),
}


def test_a_model_is_the_mean_of_its_layers_and_stands_with_its_like() -> None:
    groups = ranks_by_codes.grouped(MODELS)
    assert list(groups) == [(4, 0), (4, 8), (4, 32), (16, 8)]
    assert groups[4, 8]["routing_effective_rank"] == [2.0, 5.0]
    assert groups[4, 8]["gradient_effective_rank"] == [4.0, 10.0]
    lines = {tuple(line[:3]): line[3:] for line in ranks_by_codes.table(groups).lines}
    assert lines["4", "8", "2"] == ["3.5 (2.0 to 5.0)", "7.0 (4.0 to 10.0)", "7.0 (7.0 to 7.0)"]
    assert lines["4", "none", "1"] == ["1.5", "3.0", "7.0"]


def test_it_is_drawn_of_several_numbers_of_codes_over_as_many_experts() -> None:
    def differ(*names: str) -> bool:
        return ranks_by_codes.differ_in_codes(
            ranks_by_codes.grouped({name: MODELS[name] for name in names})
        )

    assert differ("a", "c") and differ(*MODELS)
    assert not differ("a", "b", "d", "e")  # one K, none at all, another N
    assert not differ("uneven")
    assert not differ()


def test_every_model_is_a_marker_and_those_without_codes_a_dashed_line() -> None:
    routing = ranks_by_codes.drawn(ranks_by_codes.grouped(MODELS)).axes[0]
    drawn = {
        (line.get_linestyle(), line.get_label().startswith("_")): list(
            map(tuple, line.get_xydata())
        )
        for line in routing.lines
        if line.get_color() == routing.lines[0].get_color()  # 4 experts
    }
    assert drawn["-", True] == [(8, 3.5), (32, 9)]
    assert drawn["None", False] == [(8, 2), (8, 5), (32, 9)]
    assert [y for _, y in drawn["--", True]] == [1.5, 1.5]
    assert routing.get_ylim()[1] > 9
    more = ranks_by_codes.drawn(ranks_by_codes.grouped(MODELS | {"f": model(32, 0, 2.0)}))
    assert more.axes[0].get_legend_handles_labels()[1][-1] == "32 experts, no codes"
    assert [text.get_text() for text in routing.get_xticklabels()] == ["8", "32"]


@pytest.mark.parametrize("num_lines", [MAX_NAMED, MAX_NAMED + 1])
def test_very_many_lines_are_not_named(num_lines: int) -> None:
    figure = Figure()
    axis = figure.subplots()
    draw_lines(axis, {f"model {n}": [(1, n)] for n in range(num_lines)}, "x", "y")
    name_lines(figure, [axis], 3)
    named = bool(figure.legends)
    assert named == (num_lines == MAX_NAMED)
    assert named or figure.get_suptitle().startswith(f"{num_lines} models, too many")
