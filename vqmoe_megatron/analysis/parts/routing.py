"""Part ``routing``: do tokens keep their experts and codes, over training and under noise?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from vqmoe_megatron.analysis.consistency import agreement
from vqmoe_megatron.analysis.observation import Observation, observe
from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts.plots import draw_lines, mean, name_lines
from vqmoe_megatron.analysis.perturbation import add_noise
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels

PLOT = "routing.png"
CHECKPOINTS, NOISE = "earlier checkpoint", "embedding noise"


def measure(subject: Subject) -> Findings:
    """Agreement with the run's earlier checkpoints, and with the same model under noise."""
    if not subject.seen.choices:
        return {"reason": "a dense model: nothing is chosen"}
    settings, rows = subject.settings, []
    skipped = [c.key for c in subject.seen.choices.values() if not c.is_per_token]
    for iteration, observation in subject.earlier.items():
        rows += _compared(subject, observation, CHECKPOINTS, iteration)
    for size in settings.noise_sizes[1:]:
        change = partial(add_noise, size=size, generator=settings.generator("noise"))
        noisy = observe(subject.model, subject.text.batches(), change_embedding=change)
        rows += _compared(subject, noisy, NOISE, size)
    if not rows:
        return {"reason": "every token has any number of experts (vq.threshold_routing)"}
    return {"rows": rows, "skipped": skipped, "earlier": list(subject.earlier)}


def _compared(subject: Subject, other: Observation, what: str, level: float) -> list[Findings]:
    rows = []
    for key, choices in subject.seen.choices.items():
        if choices.is_per_token and key in other.choices:
            theirs, draws = other.choices[key].ids, subject.settings.generator("shuffle")
            found = agreement(theirs, choices.ids, draws)
            place = {"layer": choices.layer, "kind": choices.kind}
            rows.append({"compared": what, "level": level, **place, **asdict(found)})
    return rows


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """Agreement over iterations and noise, means over layers; one row per model and comparison."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {CHECKPOINTS: {}, NOISE: {}}
    of_renamed: dict[str, list[tuple[float, float]]] = {}  # like the first of lines
    cells, texts = [], reasons(findings)
    for name, found in applying(findings).items():
        for what, level, kind in sorted({_group(row) for row in found["rows"]}):
            rows = [row for row in found["rows"] if _group(row) == (what, level, kind)]
            same, renamed, by_chance = (
                mean([row[figure] for row in rows])
                for figure in ("same", "renamed", "renamed_by_chance")
            )
            for drawn_lines in (*lines.values(), of_renamed):
                drawn_lines.setdefault(f"{name}: {kind}", [])
            lines[what][f"{name}: {kind}"].append((level, same))
            if what == CHECKPOINTS:
                of_renamed[f"{name}: {kind}"].append((level, renamed))
            where = f"iteration {level:,.0f}" if what == CHECKPOINTS else f"noise {level:g}"
            moved = sum(row["num_moved"] for row in rows)
            lowest = min(row["same"] for row in rows)
            figures = [f"{value:.3f}" for value in (same, lowest, renamed, by_chance)]
            cells.append([name, kind, where, *figures, str(moved)])
        if not found["earlier"]:
            texts.append(f"{name}: no earlier checkpoint of its run is there to compare with.")
        if found["skipped"]:
            left_out = ", ".join(found["skipped"])
            texts.append(f"{name}: left out, as tokens have any number of choices: {left_out}.")
    texts.append(
        "Agreement is the share of a token's choices that are the same, of experts as a set. "
        "Renamed: after the best one-to-one renaming of experts or codes (Hungarian method); far "
        "above the plain one it says that labels changed places, not choices. By chance: renamed "
        "again, with the tokens of one side shuffled. Noise is normal, its length in units of the "
        "embedding's."
    )
    drawn = "no choices could be compared"
    if cells:
        drawn, axes = panels(2, share_y=True)
        draw_lines(axes[0], lines[CHECKPOINTS], "iteration compared with", "same choice")
        draw_lines(axes[0], of_renamed, "iteration compared with", "same choice", "--")
        draw_lines(axes[1], lines[NOISE], "size of the embedding noise", "same choice")
        axes[0].set_ylim(0, 1.05)
        name_lines(drawn, axes, 2)
    headings = ["model", "what", "compared with", "same", "lowest layer", "renamed", "by chance"]
    table = Table(
        [*headings, "names moved"],
        cells,
        "Means over layers, and the lowest layer's. Names moved: used experts or codes that the "
        "best renaming calls otherwise, summed over layers.",
    )
    caption = (
        "Share of choices that stay. Left: against earlier checkpoints of the same run, dashed "
        "after the best renaming; right: under noise on the embedding, every size with the same "
        "draws for all models."
    )
    tables = [table] if cells else []
    return drawn_section("Routing consistency", [(PLOT, drawn, caption)], texts, tables)


def _group(row: Findings) -> tuple[str, float, str]:
    return row["compared"], row["level"], row["kind"]


ROUTING = Part("routing", measure, section)
