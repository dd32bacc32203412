"""Ranks of gradients against the number of codes: a plot and a table of models that differ in it.

N experts, K codes. A model is one point: the mean over its layers. Whoever gives several models of
one N and K, seeds for instance, sees how far they lie apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vqmoe_megatron.analysis.part import Findings
from vqmoe_megatron.analysis.parts.plots import mean
from vqmoe_megatron.study.report.page import Table
from vqmoe_megatron.study.report.plot_style import (
    legend_outside,
    panels,
    series_marker,
    size_colours,
)

PLOT = "ranks_by_codes.png"
RANKS = {
    "routing_effective_rank": "gradients through routing alone",
    "gradient_effective_rank": "all gradients",
    "output_rank": "outputs",
}
CAPTION = (
    "Effective ranks against the number of codes, those of all slices together. Every marker is a "
    "model, the mean over its layers; a line joins the means of the models with as many experts "
    "and codes, whatever else they differ in. Dashed: the mean of the models without codes. Models "
    "whose layers differ in either number are left out."
)
Group = dict[str, list[float]]  # figure -> one number per model


def grouped(findings: Mapping[str, Findings]) -> dict[tuple[int, int], Group]:
    """Means over layers of every model, by (N, K) in rising order.

    Models whose layers differ in N or K are left out.
    """
    groups: dict[tuple[int, int], Group] = defaultdict(lambda: {name: [] for name in RANKS})
    for found in findings.values():
        sizes = {(row["num_experts"], row["num_codes"]) for row in found["rows"]}
        if len(sizes) == 1:
            for name, values in groups[sizes.pop()].items():
                values.append(mean([row[name] for row in found["rows"]]))
    return dict(sorted(groups.items()))


def differ_in_codes(groups: Mapping[tuple[int, int], Group]) -> bool:
    """Whether there are two numbers of codes for one number of experts."""
    with_codes = [num_experts for num_experts, num_codes in groups if num_codes]
    return len(with_codes) > len(set(with_codes))


def drawn(groups: Mapping[tuple[int, int], Group]) -> Figure:
    """One panel per rank, one colour per number of experts."""
    figure, axes = panels(len(RANKS))
    colours = size_colours(num_experts for num_experts, _ in groups)
    for axis, (name, words) in zip(axes, RANKS.items(), strict=True):
        for index, (num_experts, colour) in enumerate(colours.items()):
            of_size = {k: group[name] for (n, k), group in groups.items() if n == num_experts}
            points = [(k, value) for k, values in of_size.items() if k for value in values]
            means = [(k, mean(values)) for k, values in of_size.items() if k]
            style = {"color": colour, "marker": series_marker(index)}
            if points:
                axis.plot(*zip(*means, strict=True), color=colour)
                label = f"{num_experts} experts"
                axis.plot(*zip(*points, strict=True), linestyle="none", label=label, **style)
            if 0 in of_size:
                label = None if points else f"{num_experts} experts, no codes"
                axis.axhline(mean(of_size[0]), color=colour, linestyle="--", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({k for _, k in groups if k}), minor=False)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("codes")
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylabel("effective rank")
        axis.set_title(words, fontsize=11)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    legend_outside(axes[-1])
    return figure


def table(groups: Mapping[tuple[int, int], Group]) -> Table:
    """Mean, and the least and the most among several models, of every (N, K)."""
    headings = ["experts N", "codes K", "models", *RANKS.values()]
    cells = [
        [str(num_experts), str(num_codes or "none"), str(len(group["output_rank"]))]
        + [_spread(values) for values in group.values()]
        for (num_experts, num_codes), group in groups.items()
    ]
    return Table(headings, cells)


def _spread(values: Sequence[float]) -> str:
    text = f"{mean(values):.1f}"
    return text if len(values) < 2 else f"{text} ({min(values):.1f} to {max(values):.1f})"
