"""Captions and tables count the runs that have the figures they use."""

import re

import pytest
from written_study import write_study

from vqmoe_megatron.study.report.plot_sections import (
    against_experts,
    loss_curves,
    mean_table,
    routing,
    speed_and_wire,
)
from vqmoe_megatron.study.report.run_table import read_study
from vqmoe_megatron.study.report.series import split_series

DIVERGED = {f"experts{size}-vq-ranks1-seed2": 16 for size in (4, 8)}


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    directory = tmp_path_factory.mktemp("losses") / "s"
    write_study(directory, sizes=(4, 8), routers=("vq",), diverged=DIVERGED)
    return split_series(read_study(directory, "CPU").rows)


def test_captions_count_the_seeds_that_have_a_loss(series):
    sections = [against_experts(series), loss_curves(series)]
    captions = [plot.caption for section in sections for plot in section.plots]
    assert [re.findall(r"\(n = [^)]*\)", caption) for caption in captions] == [["(n = 1)"]] * 3
    assert "runs without a finite one are left out" in captions[0]
    assert "single runs that have not finished or diverged" in captions[1]


def test_the_text_says_over_which_runs_the_laws_are_fitted(series):
    section = against_experts(series)
    assert any(
        "finished runs of a series with a finite loss" in text for text in section.paragraphs
    )
    fits, means = section.tables
    assert [line[3] for line in fits.lines if line[3]] in ([], ["2"])  # runs, where determined
    assert [line[:3] for line in means.lines] == [["all runs", "4", "1"], ["all runs", "8", "1"]]


def test_a_loss_of_exactly_zero_enters_the_table(tmp_path):
    rows = read_study(write_study(tmp_path / "s", sizes=(4,), routers=("vq",)), "CPU").rows
    rows[0].final_val_loss, rows[1].final_val_loss = 0.0, 1.0
    (line,) = mean_table(split_series(rows)).lines
    assert line[2:4] == ["2", "0.5000"] and line[4] == line[5] != ""
    rows[1].final_val_loss = 0.0
    (line,) = mean_table(split_series(rows)).lines
    assert line[3] == "0.0000"


def test_captions_of_throughput_and_routing_count_the_seeds_that_are_drawn(tmp_path):
    diverged = {
        "experts4-vq-ranks1-seed2": 0
    }  # its speed and its routing are measured all the same
    directory = write_study(tmp_path / "s", sizes=(4, 8), routers=("vq",), diverged=diverged)
    study = read_study(directory, "CPU")
    series = split_series(study.rows)
    assert "mean over seeds (n = 2)" in speed_and_wire(study, series).plots[0].caption
    assert "over seeds (n = 2)" in routing(series).plots[0].caption
    study.rows[0].tokens_per_second = None
    assert "mean over seeds (n = 1 to 2)" in speed_and_wire(study, series).plots[0].caption
    for row in study.rows:
        row.tokens_per_second = None
    assert "mean over seeds (none measured)" in speed_and_wire(study, series).plots[0].caption
    study.rows[0].late["vq/dead_codes"] = float("nan")
    assert "over seeds (n = 1 to 2)" in routing(series).plots[0].caption
