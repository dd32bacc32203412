"""The head of a page, the order of its sections; finished runs without a loss are announced."""

from datetime import datetime, timezone

import pytest
from written_study import write_study

from vqmoe_megatron.bench.origin import origin
from vqmoe_megatron.study.report.content import PLOT_NAMES, build_page, runs_without_loss
from vqmoe_megatron.study.report.run_table import read_study

DIVERGED = "experts8-vq-ranks1-seed2"


def test_what_is_left_out_stands_before_what_is_averaged(tmp_path):
    directory = write_study(
        tmp_path / "s",
        sizes=(4, 8),
        routers=("vq",),
        states={"experts4-vq-ranks1-seed1": ("failed", 9)},
        diverged={"experts8-vq-ranks1-seed2": 16},
    )
    page = build_page(read_study(directory, "CPU"), origin(), datetime.now(timezone.utc))
    left_out = "3 finished (1 of them without a finite validation loss), 1 not"
    assert dict(page.facts)["Runs"] == left_out
    assert [section.title for section in page.sections][:3] == [
        "Runs that have not finished",
        "Finished runs without a finite validation loss",
        "Loss against experts",
    ]
    assert page.sections[-1].title == "All runs"
    drawn = [plot.file_name for section in page.sections for plot in section.plots]
    assert tuple(drawn) == tuple(name for name in PLOT_NAMES if not name.startswith("arm_"))


@pytest.fixture
def study(tmp_path):
    states = {"experts4-vq-ranks1-seed2": ("failed", 20)}
    directory = write_study(
        tmp_path / "s", sizes=(4, 8), routers=("vq",), states=states, diverged={DIVERGED: 16}
    )
    return read_study(directory, "CPU")


def test_finished_runs_that_diverged_are_named(study):
    section = runs_without_loss(study)
    assert section.tables[0].lines == [[DIVERGED, "nan", "12"]]
    (said,) = section.paragraphs
    assert said.startswith("1 of 3 finished runs have no finite validation loss at their end")
    assert "no mean or fit of the loss" in said and "is then too good" in said


def test_finished_runs_that_were_never_evaluated_are_named(study):
    row = study.finished[0]
    row.final_val_loss = None
    row.records = [{"iteration": 40, "consumed_tokens": 10240}]
    assert [row.name, "none", ""] in runs_without_loss(study).tables[0].lines


def test_there_is_no_section_without_such_runs(study):
    study.rows[:] = [row for row in study.rows if row.name != DIVERGED]
    assert runs_without_loss(study) is None
