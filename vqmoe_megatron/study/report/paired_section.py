"""The section of a report that compares arms: plots, paired differences, gains, costs."""

from __future__ import annotations

from collections.abc import Sequence

from vqmoe_megatron.study.baselines import Arms
from vqmoe_megatron.study.report.intervals import POOLED, SeedMean, seeds_of
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.paired import (
    FINAL_BITS,
    Comparison,
    GainChange,
    Place,
    Seed,
    axis_values,
    compare_arms,
    gain_changes,
    study_arms,
    verdict,
)
from vqmoe_megatron.study.report.paired_plots import draw_differences, draw_figure_of_arms
from vqmoe_megatron.study.report.run_table import ReportedStudy, RunRow
from vqmoe_megatron.study.report.series import (
    FINAL_LOSS,
    Series,
    figure_of,
    follows_size,
    words_of,
)

TITLE = "Arms against a baseline"
UNITS = {FINAL_BITS: "bits per byte", FINAL_LOSS: "nats per token"}


def against_baselines(study: ReportedStudy, series: Sequence[Series]) -> Section | None:
    """Every arm against every baseline, paired by seed; None for a study without arms.

    Raises:
        ValueError: for ``study.baseline`` with names that are no arms.
    """
    try:
        arms = study_arms(study)
    except ValueError as error:
        if study.baselines:
            raise
        return Section(TITLE, [f"Nothing is compared: {error}."]) if has_words(study) else None
    comparisons = compare_arms(study, arms)
    figure = leading_figure(comparisons)
    changes = gain_changes(comparisons)
    differences = (
        "arm_differences.png",
        draw_differences(comparisons, arms, figure, UNITS[figure], _panel_of(study)),
        "Validation loss of each arm minus that of the baseline against the number of experts; "
        "below the line at 0 the arm is better. Markers: means over the pairs of runs that share "
        f"seed and data ({_pairs(comparisons, figure)}). Bars: 95% t-intervals of the mean over "
        "the pairs of that point alone; none for a single pair. Not measured: other learning rates "
        "or lengths, under which arms may stand in another order.",
    )
    seeds = seeds_of(mean for one in series for mean in one.means(figure).values())
    losses = (
        "arm_bits_per_byte.png",
        draw_figure_of_arms(series, figure, UNITS[figure]),
        "Validation loss at the end of finished runs of each arm against the number of experts. "
        f"Markers: means over seeds ({seeds}). Bars: {POOLED}; they hold what the seed does to all "
        "arms alike, so overlapping bars do not say that arms are equal. Not measured: what a "
        "longer run would reach.",
    )
    tables = [paired_table(study, comparisons), gain_table(study, changes)]
    tables.append(cost_table(study, arms, comparisons))
    return drawn_section(
        TITLE, [differences, losses], _said(study, comparisons), [one for one in tables if one]
    )


def has_words(study: ReportedStudy) -> bool:
    """Whether an axis has two words, so that a reader may expect a comparison."""
    return any(
        sum(isinstance(value, str) for value in values) > 1
        for values in axis_values(study.rows).values()
    )


def leading_figure(comparisons: Sequence[Comparison]) -> str:
    """Return bits per byte where pairs have them, else the loss; it decides what is better."""
    has_bits = any(one.differences(FINAL_BITS) for one in comparisons)
    return FINAL_BITS if has_bits else FINAL_LOSS


def _said(study: ReportedStudy, comparisons: Sequence[Comparison]) -> list[str]:
    said = (
        "A difference is an arm's validation loss minus the baseline's, of two runs with the same "
        "seed and the same value on every other axis, which read the same samples in the same "
        "order; below 0 the arm is better. Intervals are Student's t over the pairs of a row "
        "alone. Better and worse stand only where the 95% interval excludes 0. Nothing corrects "
        "for the number of rows: where no arm differs, about one interval in twenty excludes 0 "
        "all the same."
    )
    flops = (
        " The rule is equal FLOPs, so arms read different numbers of samples: pairs share seed and "
        "corpus, and the order only as far as the numbers of epochs are equal."
    )
    num_lost = sum(len(one.left_out) for one in comparisons)
    lost = f" {num_lost} pairs are left out, each named in its row." if num_lost else ""
    return [said + (flops if study.rule == "equal_flops" else "") + lost]


def _pairs(comparisons: Sequence[Comparison], figure: str) -> str:
    return seeds_of(mean for one in comparisons if (mean := one.mean(figure)) is not None)


def _panel_of(study: ReportedStudy):
    """Panels by baseline, and by the axes that do not follow from the number of experts."""
    known = [row for row in study.rows if row.config is not None]
    several = [name for name, values in axis_values(study.rows).items() if len(values) > 1]
    axes = [axis for axis in several if not follows_size(axis, known)]

    def panel(one: Comparison) -> str:
        where = words_of(dict(one.place), axes)
        return f"minus {one.baseline}" + (f", {where}" if where else "")

    return panel


def _place_in_words(study: ReportedStudy, place: Place) -> str:
    several = [name for name, values in axis_values(study.rows).items() if len(values) > 1]
    return words_of(dict(place), several) or "all"


def _seed_in_words(seed: Seed) -> str:
    return " ".join(f"{axis} {value}" for axis, value in seed) or "the only run"


def _left_out(one: Comparison | GainChange) -> str:
    return "; ".join(f"{_seed_in_words(seed)}: {why}" for seed, why in one.left_out.items())


def _mean_cells(mean: SeedMean | None) -> list[str]:
    if mean is None:
        return ["", ""]
    interval = "" if mean.half_width is None else f"{mean.low:+.4f} to {mean.high:+.4f}"
    return [f"{mean.mean:+.4f}", interval]


def paired_table(study: ReportedStudy, comparisons: Sequence[Comparison]) -> Table:
    """A line per place, arm and baseline: difference in both units, pairs, interval, verdict."""
    figure = leading_figure(comparisons)
    lines = [
        [
            _place_in_words(study, one.place),
            one.arm,
            one.baseline,
            str(len(one.differences(figure))),
            *_mean_cells(one.mean(FINAL_BITS)),
            verdict(one.mean(figure), "better", "worse"),
            *_mean_cells(one.mean(FINAL_LOSS)),
            _left_out(one),
        ]
        for one in comparisons
    ]
    headings = ["where", "arm", "minus", "pairs n", "bits/byte", "95%", "the arm is"]
    return Table([*headings, "nats/token", "95%", "left out"], lines)


def gain_table(study: ReportedStudy, changes: Sequence[GainChange]) -> Table | None:
    """A line per arm, baseline and two values of an axis; None where no axis has two."""
    if not changes:
        return None
    figure = leading_figure([one.at for one in changes] + [one.reference for one in changes])
    lines = []
    for one in changes:
        rest = tuple(item for item in one.at.place if item[0] != one.axis)
        here, there = (words_of(dict(side.place), [one.axis]) for side in (one.at, one.reference))
        lines.append(
            [
                _place_in_words(study, rest),
                one.at.arm,
                one.at.baseline,
                f"{here} minus {there}",
                str(len(one.differences(figure))),
                *_mean_cells(one.mean(figure)),
                verdict(one.mean(figure), "smaller", "larger"),
                _left_out(one),
            ]
        )
    headings = ["where", "arm", "gain over", "at", "pairs n", f"change ({UNITS[figure]})", "95%"]
    caption = (
        "The gain is the baseline's validation loss minus the arm's. Each line is the gain at one "
        "value of an axis minus the gain at the axis' first value, paired by seed."
    )
    return Table([*headings, "the gain is", "left out"], lines, caption)


def cost_table(study: ReportedStudy, arms: Arms, comparisons: Sequence[Comparison]) -> Table:
    """A line per place and arm: planned sizes and operations, and measured time per token."""
    planned: dict[tuple[Place, str], RunRow] = {}
    place_of = {frozenset(one.place): one.place for one in comparisons}
    axes = [axis for axis, _ in comparisons[0].place]
    for row in study.rows:
        place = place_of.get(frozenset((axis, row.point.get(axis)) for axis in axes))
        if place is not None and arms.axis in row.point and row.planned.flops_per_token:
            planned.setdefault((place, row.point[arms.axis]), row)
    by_key = {(one.place, one.arm, one.baseline): one for one in comparisons}
    lines = []
    for place in dict.fromkeys(one.place for one in comparisons):
        for arm in arms.names:
            row = planned.get((place, arm))
            if row is None:
                continue
            cells = [
                f"{row.planned.num_parameters_total:,}",
                f"{row.planned.num_parameters_active:,}",
                f"{row.planned.flops_per_token:.3e}",
            ]
            for baseline in arms.baselines:
                theirs = planned.get((place, baseline))
                ratio = (
                    figure_of(row, "plan.flops_per_token") / theirs.planned.flops_per_token
                    if theirs is not None
                    else None
                )
                cells.append("" if ratio is None else f"{ratio:.3f}")
                found = by_key.get((place, arm, baseline))
                time = found.time_ratio() if found is not None else None
                cells.append("" if time is None else f"{time.mean:.3f}")
            lines.append([_place_in_words(study, place), arm, *cells])
    ratios = [f"{what} / {name}" for name in arms.baselines for what in ("FLOPs", "time")]
    caption = (
        "Parameters and FLOPs are planned, per token. Time is measured: time per token over the "
        "baseline's (equal batches: the ratio of step times), mean over the pairs, for "
        "information. Runs of a study may share the machine; `vqmoe bench` measures arms side by "
        "side."
    )
    headings = ["where", "arm", "parameters", "active", "FLOPs/token", *ratios]
    return Table(headings, lines, caption)
