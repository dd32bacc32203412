"""Arms of a study against a baseline, paired: differences of runs that share seed and data.

The difference of a pair is the arm's figure minus the baseline's. Both runs have the same seed and
the same value on every other axis, and they read the same samples in the same order and are scored
on the same text, so what the seed and the data do to both is not in it:

    d_s = x_s(arm) - x_s(baseline)          mean +- t(n - 1) * std(d) / sqrt(n)

The gain is -d. A change of the gain between two values of an axis is paired by seed in the same
way. Intervals use the pairs of one comparison alone; nothing is pooled. A run that is missing,
unfinished or without a finite loss leaves its pair out, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqmoe_megatron.config.recipe import flatten_config
from vqmoe_megatron.study.baselines import Arms, find_arms
from vqmoe_megatron.study.report.intervals import SeedMean, seed_means
from vqmoe_megatron.study.report.run_table import ReportedStudy, RunRow
from vqmoe_megatron.study.report.series import figure_of, has_loss, is_seed

FINAL_BITS = "final_bits_per_byte"
# What decides which text a loss is of, and what the seed begins.
SAME_TEXT = (
    "train.task",
    "model.attention",  # with transformer_xl rows of a batch are streams, in evaluation too
    "train.seed",
    "data.path",
    "data.eval_split",
    "data.eval_window_tokens",
    "data.eval_stride_tokens",
    "train.eval_iters",
    "model.seq_length",
)
# With those, the order of the samples; under equal_flops the arms read different numbers of them.
SAME_ORDER = ("train.global_batch_size", "train.train_iters")
Seed = tuple[tuple[str, Any], ...]  # its axis and value; empty where no axis stands for the seed
Place = tuple[tuple[str, Any], ...]  # values of all axes but the arms' and the seed's


@dataclass(frozen=True)
class Comparison:
    """An arm and a baseline at one place of the grid; ``pairs`` holds (arm's run, baseline's)."""

    place: Place
    arm: str
    baseline: str
    num_moe_experts: int | None  # of the baseline's runs
    pairs: Mapping[Seed, tuple[RunRow, RunRow]]
    left_out: Mapping[Seed, str]  # why

    def differences(self, figure: str) -> dict[Seed, float]:
        """Arm minus baseline by seed, of a figure (see :func:`figure_of`); pairs that lack it are
        left out."""
        found = {
            seed: (figure_of(arm, figure), figure_of(baseline, figure))
            for seed, (arm, baseline) in self.pairs.items()
        }
        return {
            seed: arm - baseline
            for seed, (arm, baseline) in found.items()
            if arm is not None and baseline is not None
        }

    def mean(self, figure: str) -> SeedMean | None:
        """Mean difference with its interval; None without a pair."""
        return _mean(self.differences(figure))

    def time_ratio(self) -> SeedMean | None:
        """Time per token, the arm's over the baseline's, mean over pairs; the ratio of step times,
        as the batch of a pair is the same. None where it was not measured."""
        speeds = [
            (figure_of(arm, "tokens_per_second"), figure_of(baseline, "tokens_per_second"))
            for arm, baseline in self.pairs.values()
        ]
        ratios = [baseline / arm for arm, baseline in speeds if arm and baseline]
        return seed_means([ratios])[0] if ratios else None


@dataclass(frozen=True)
class GainChange:
    """How much larger an arm's gain is at one value of ``axis`` than at another."""

    axis: str
    at: Comparison
    reference: Comparison

    def differences(self, figure: str) -> dict[Seed, float]:
        """Gain at ``at`` minus gain at ``reference`` by seed; a gain is baseline minus arm."""
        here, there = self.at.differences(figure), self.reference.differences(figure)
        return {seed: there[seed] - here[seed] for seed in here if seed in there}

    def mean(self, figure: str) -> SeedMean | None:
        """Mean change with its interval; None without a pair of pairs."""
        return _mean(self.differences(figure))

    @property
    def left_out(self) -> dict[Seed, str]:
        """Seeds that lack a pair at one of the two values, and why."""
        sides = (self.at, self.reference)
        reasons: dict[Seed, list[str]] = {}
        for seed in dict.fromkeys(seed for side in sides for seed in (*side.pairs, *side.left_out)):
            for side in sides:
                if seed not in side.pairs:
                    where = f"not in the study at {self.axis} {dict(side.place)[self.axis]}"
                    reasons.setdefault(seed, []).append(side.left_out.get(seed, where))
        return {seed: " and ".join(found) for seed, found in reasons.items()}


def _mean(differences: Mapping[Seed, float]) -> SeedMean | None:
    return seed_means([list(differences.values())])[0] if differences else None


def verdict(mean: SeedMean | None, below: str, above: str) -> str:
    """Return ``below`` or ``above`` where the interval lies on one side of zero, which it does not
    touch; else ``not separated``, or that there is no interval."""
    if mean is None:
        return "no pair"
    if mean.half_width is None:
        return "one pair, no interval"
    if mean.high < 0:
        return below
    return above if mean.low > 0 else "not separated"


def study_arms(study: ReportedStudy) -> Arms:
    """Return the arms of a study and its baselines.

    Raises:
        ValueError: where no axis, or more than one, may hold them; see :func:`find_arms`.
    """
    seeds = seed_axes(study.rows)
    axes = {name: values for name, values in axis_values(study.rows).items() if name not in seeds}
    return find_arms(axes, study.baselines)


def axis_values(rows: Sequence[RunRow]) -> dict[str, list[Any]]:
    """Return every axis with its values: numbers in ascending order, words in the grid's."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for axis, value in row.point.items():
            values = found.setdefault(axis, [])
            if value not in values:
                values.append(value)
    is_number = {axis: all(isinstance(v, int | float) for v in found[axis]) for axis in found}
    return {axis: sorted(v) if is_number[axis] else v for axis, v in found.items()}


def seed_axes(rows: Sequence[RunRow]) -> list[str]:
    """Return the axes that stand for the seed."""
    known = [row for row in rows if row.config is not None]
    return [axis for axis in axis_values(rows) if known and is_seed(axis, known)]


def compare_arms(study: ReportedStudy, arms: Arms) -> list[Comparison]:
    """Return every arm against every baseline at every place, in the grid's order."""
    seeds, order = seed_axes(study.rows), axis_values(study.rows)
    runs: dict[tuple[Place, str, Seed], RunRow] = {}
    for row in study.rows:
        if arms.axis in row.point:
            seed = tuple((axis, row.point.get(axis)) for axis in seeds)
            place = tuple(
                (axis, row.point.get(axis))
                for axis in order
                if axis != arms.axis and axis not in seeds
            )
            runs[place, row.point[arms.axis], seed] = row
    places = sorted(
        {place for place, _, _ in runs},
        key=lambda place: [order[axis].index(value) for axis, value in place],
    )
    return [
        _comparison(runs, place, arm, baseline, study.rule)
        for baseline in arms.baselines
        for place in places
        for arm in arms.names
        if arm != baseline
    ]


def _comparison(
    runs: Mapping[tuple[Place, str, Seed], RunRow],
    place: Place,
    arm: str,
    baseline: str,
    rule: str,
) -> Comparison:
    seeds = dict.fromkeys(
        seed for where, name, seed in runs if where == place and name in (arm, baseline)
    )
    pairs: dict[Seed, tuple[RunRow, RunRow]] = {}
    left_out: dict[Seed, str] = {}
    sizes: list[int | None] = []
    for seed in seeds:
        found = [(name, runs.get((place, name, seed))) for name in (arm, baseline)]
        reasons = [why for name, row in found if (why := _why_no_loss(name, row))]
        (_, ours), (_, theirs) = found
        if theirs is not None and theirs.num_moe_experts is not None:
            sizes.append(theirs.num_moe_experts)
        if not reasons and ours is not None and theirs is not None:
            reasons = list(_other_data(ours, theirs, rule))
        if reasons or ours is None or theirs is None:
            left_out[seed] = " and ".join(reasons)
        else:
            pairs[seed] = ours, theirs
    return Comparison(place, arm, baseline, sizes[0] if sizes else None, pairs, left_out)


def _why_no_loss(arm: str, row: RunRow | None) -> str:
    """Why a run has no loss to compare; nothing when it has."""
    if row is None:
        return f"{arm} is not in the study"
    if not row.is_finished:
        how_far = (
            ""
            if row.config is None
            else f" ({row.iteration or 0} of {row.config.train.train_iters})"
        )
        return f"{row.name} {row.state}{how_far}"
    if row.final_val_loss is None:
        return f"{row.name} was never evaluated"
    return "" if has_loss(row) else f"{row.name} diverged"


def _other_data(arm: RunRow, baseline: RunRow, rule: str) -> Iterator[str]:
    """What two runs do not share of seed and data."""
    keys = SAME_TEXT if rule == "equal_flops" else (*SAME_TEXT, *SAME_ORDER)
    ours, theirs = flatten_config(arm.config), flatten_config(baseline.config)
    for key in keys:
        if ours[key] != theirs[key]:
            yield f"{arm.name} has {key}={ours[key]}, {baseline.name} {theirs[key]}"


def gain_changes(comparisons: Sequence[Comparison]) -> list[GainChange]:
    """Return the changes of the gain along every axis, each value against the axis' first."""
    found = []
    axes = dict.fromkeys(axis for one in comparisons for axis, _ in one.place)
    for axis in axes:
        first: dict[tuple[str, str, Place], Comparison] = {}
        for one in comparisons:
            rest = tuple((name, value) for name, value in one.place if name != axis)
            reference = first.setdefault((one.arm, one.baseline, rest), one)
            if reference is not one:
                found.append(GainChange(axis, one, reference))
    return found
