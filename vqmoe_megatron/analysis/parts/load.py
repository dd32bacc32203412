"""Part ``load``: how evenly experts and codes are used, in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts.plots import draw_lines, layer_axis, name_lines
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.analysis.usage import choice_counts, usage_of
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels

PLOT = "usage.png"


def measure(subject: Subject) -> Findings:
    """Usage of every layer's experts and codes on the undisturbed text."""
    rows = []
    for choices in subject.seen.choices.values():
        counts = choice_counts(choices.ids, choices.num_ids)
        found = asdict(usage_of(counts))
        share = (counts / counts.sum()).tolist()
        row = {"layer": choices.layer, "kind": choices.kind, **found, "share": share}
        rows.append(row | {"error": subject.seen.errors.get(choices.key)})
    if not rows:
        return {"reason": "a dense model: nothing is chosen"}
    return {"rows": rows}


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """Perplexity and imbalance over layers; one row per model, layer and kind."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"perplexity": {}, "imbalance": {}}
    cells = []
    for name, found in applying(findings).items():
        for row in found["rows"]:
            series = f"{name}: {row['kind']}"
            share = row["perplexity"] / row["num_chosen"]
            lines["perplexity"].setdefault(series, []).append((row["layer"], share))
            lines["imbalance"].setdefault(series, []).append((row["layer"], row["imbalance"]))
            error = "" if row["error"] is None else f"{row['error']:.3f}"
            cells.append(
                [name, str(row["layer"]), row["kind"], str(row["num_chosen"])]
                + [f"{row['perplexity']:.2f}", str(row["num_dead"])]
                + [f"{row['imbalance']:.2f}", error]
            )
    drawn = "no model has experts to choose among"
    if cells:
        drawn, axes = panels(2)
        draw_lines(axes[0], lines["perplexity"], "layer", "perplexity / number (1: uniform)")
        draw_lines(axes[1], lines["imbalance"], "layer", "largest share / uniform share")
        axes[0].set_ylim(0, 1.05)
        axes[1].set_ylim(bottom=0)
        for axis in axes:
            layer_axis(axis)
        name_lines(drawn, axes, 2)
    caption = (
        "Use of experts and codes by layer. Perplexity is exp of the entropy of their shares, "
        "here over their number."
    )
    headings = ["model", "layer", "what", "number", "perplexity", "dead", "imbalance", "code error"]
    table = Table(
        headings,
        cells,
        "Dead: chosen by no token that was read. Imbalance: the largest share over the uniform "
        "one. Code error: |x - v|^2 / |x|^2 of a token x and its code v, the mean over tokens.",
    )
    return drawn_section(
        "Load and code usage", [(PLOT, drawn, caption)], reasons(findings), [table] if cells else []
    )


LOAD = Part("load", measure, section)
